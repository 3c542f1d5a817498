PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
unexport PYTHONDONTWRITEBYTECODE  # many processes of the tests import the same modules: these are compiled once
.PHONY: help setup demo baseline reproduce-table reproduce-figures test test-long fuzz test-oldest test-newest test-slurm test-gpu bench-gpu check docs docs-api docs-settings docs-speed format golden clean

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,plot]'
	@touch $@

setup: .venv/.ready  ## create .venv with vdrop and all its extras for development

demo: setup  ## train and compare none, naive and variational on the embedded corpus, in minutes
	$(BIN)/vdrop train -m experiment=demo dropout=none,naive,variational
	$(BIN)/vdrop compare outputs/demo/train picture=outputs/demo/curves.png

SIZE ?= medium
SEEDS ?= 1
ROWS ?=
LAUNCHER ?=
JOBS ?= 1
UNTIL ?=
MC_BATCH ?=
DEVICE ?= auto
BACKEND ?= auto
PRECISION ?= auto
place = device=$(DEVICE) backend=$(BACKEND) precision=$(PRECISION)
comma := ,
sizes = $(if $(filter all,$(SIZE)),small$(comma)medium$(comma)large,$(SIZE))

reproduce-table: setup  ## the paper's Table 1 into RESULTS.md; SIZE=small|medium|large|all SEEDS=1 ROWS=none,… JOBS=1 UNTIL=8h DEVICE=… BACKEND=… PRECISION=…
	$(BIN)/vdrop reproduce 'sizes=[$(sizes)]' seeds=$(SEEDS) $(place) jobs=$(JOBS) $(if $(ROWS),'rows=[$(ROWS)]') \
	  $(if $(UNTIL),until=$(UNTIL)) $(if $(MC_BATCH),mc_batch=$(MC_BATCH)) $(if $(LAUNCHER),"launcher=$(LAUNCHER)")

baseline: setup  ## a strong small model of Penn Treebank, in a few hours on two cores; SEEDS=1 UNTIL=2h DEVICE=… PRECISION=…
	$(BIN)/vdrop reproduce study=baselines 'rows=[ptb_3h]' seeds=$(SEEDS) $(place) $(if $(UNTIL),until=$(UNTIL))

EPOCHS ?= 60
PROTOCOLS ?= paper,clean
CELLS ?= lstm,gru

reproduce-figures: setup  ## the paper's experiments on film reviews; PROTOCOLS=paper,clean CELLS=lstm,gru EPOCHS=60 SEEDS=1 JOBS=1 UNTIL=8h DEVICE=… BACKEND=… PRECISION=…
	$(BIN)/vdrop reproduce study=film_reviews 'protocols=[$(PROTOCOLS)]' 'cells=[$(CELLS)]' epochs=$(EPOCHS) seeds=$(SEEDS) $(place) jobs=$(JOBS) \
	  $(if $(UNTIL),until=$(UNTIL)) $(if $(LAUNCHER),"launcher=$(LAUNCHER)")

test: setup  ## run the tests; those on real data need VDROP_DATA
	$(BIN)/python -m pytest --dist worksteal -n auto

test-long: setup  ## run only the long forms of tests: more kills, more seeds, longer records; half an hour
	$(BIN)/python -m pytest --dist worksteal -n auto -m long

FUZZ ?= 20

fuzz: setup  ## new random command lines in each run; FUZZ=20 times as many as in the tests
	VDROP_FUZZ=$(FUZZ) $(BIN)/python -m pytest --dist worksteal -n auto tests/test_mistakes.py tests/test_arguments.py

test-slurm: setup  ## a sweep through a real SLURM on this machine; needs root, and Debian's slurm-wlm and munge
	$(BIN)/python -m pytest -n 0 -m slurm

.venv-oldest/.ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable '.[dev,plot]'
	@touch $@

test-oldest: .venv-oldest/.ready  ## run the tests with the oldest versions that pyproject.toml allows; PYTHON=python3.11
	.venv-oldest/bin/python -m pytest --dist worksteal -n auto

.venv-newest/.ready: pyproject.toml
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade --editable '.[dev,plot]'
	@touch $@

test-newest: .venv-newest/.ready  ## run the tests with the newest versions that pip finds; PYTHON=python3.13
	.venv-newest/bin/python -m pytest --dist worksteal -n auto

GPU_TESTS ?= 8

test-gpu: setup  ## minutes on a GPU: the cells against the definition, and a step of the published sizes; GPU_TESTS=8 tests at once
	$(BIN)/python -m pytest -n $(GPU_TESTS) -m gpu
	$(BIN)/vdrop bench device=cuda 'sizes=[medium,large]' 'parts=[step]' 'precisions=[bf16]' starts=1 \
	  'cells=[variational,variational_untied,none,torch_lstm,cell_loop]'

bench-gpu: setup  ## most of an hour on a GPU: every cell and precision, the sizes small, medium and large, the parts step, layer and mc
	$(BIN)/vdrop bench device=cuda 'sizes=[small,medium,large]' 'parts=[step,layer,mc]'

.venv-docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/pip install --quiet --constraint constraints.txt mkdocs-material
	@touch $@

docs: .venv-docs/.ready  ## build the pages into site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

docs-api: setup  ## write docs/api.md from the docstrings
	$(BIN)/python docs/write_api.py

docs-settings: setup  ## write docs/settings.md from the settings' metadata
	$(BIN)/python -m vdrop_cli.help > docs/settings.md

docs-speed: setup  ## write the tables of docs/speed.md, and README's of speeds, from the records of vdrop bench
	$(BIN)/python docs/write_speed.py

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

clean:  ## remove the environments and what the tools leave; data and outputs stay
	rm -rf .venv .venv-oldest .venv-newest .venv-docs site .pytest_cache .mypy_cache .ruff_cache dist
