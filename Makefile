PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo reproduce-table reproduce-figures test test-slurm test-gpu check format golden clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,plot]'
	@touch $@

setup: .venv/.ready  ## create .venv with everything in it

demo: setup  ## none, naive and variational side by side on the embedded corpus, in minutes
	$(BIN)/vdrop train -m experiment=demo dropout=none,naive,variational
	$(BIN)/vdrop compare --picture outputs/demo/curves.png outputs/demo/train/*/*

SIZE ?= medium
SEEDS ?= 1
ROWS ?=
LAUNCHER ?=
PRECISION ?= auto
comma := ,
sizes = $(if $(filter all,$(SIZE)),small$(comma)medium$(comma)large,$(SIZE))

reproduce-table: setup  ## the paper's Table 1 into RESULTS.md; SIZE=small|medium|large|all SEEDS=1 ROWS=none,… LAUNCHER=… PRECISION=…
	$(BIN)/vdrop reproduce 'sizes=[$(sizes)]' seeds=$(SEEDS) precision=$(PRECISION) $(if $(ROWS),'rows=[$(ROWS)]') \
	  $(if $(LAUNCHER),"launcher=$(LAUNCHER)")

EPOCHS ?= 60
PROTOCOLS ?= paper,clean
CELLS ?= lstm,gru

reproduce-figures: setup  ## the paper's experiments on film reviews; PROTOCOLS=paper,clean CELLS=lstm,gru EPOCHS=60 SEEDS=1 LAUNCHER=… PRECISION=…
	$(BIN)/vdrop figures 'protocols=[$(PROTOCOLS)]' 'cells=[$(CELLS)]' epochs=$(EPOCHS) seeds=$(SEEDS) precision=$(PRECISION) \
	  $(if $(LAUNCHER),"launcher=$(LAUNCHER)")

test: setup  ## run the tests; those on real data need VDROP_DATA
	$(BIN)/python -m pytest -n auto

test-slurm: setup  ## a sweep through a real SLURM on this machine; needs root, and Debian's slurm-wlm and munge
	$(BIN)/python -m pytest -n 0 -m slurm

test-gpu: setup  ## the cells on a GPU: against the definition, and how fast they are
	$(BIN)/python -m pytest -n 0 -m gpu
	$(BIN)/vdrop bench device=cuda 'sizes=[small,medium,large]' 'parts=[step,layer,mc]'

check: setup  ## format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: setup  ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: setup  ## renew the recorded losses of tests/golden.json; say in the commit why they changed
	$(BIN)/python -m tests.test_golden

clean:  ## remove .venv and what the tools leave; data and outputs stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache dist
