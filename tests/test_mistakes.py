"""Generated command lines, most of them wrong: exit code 2 and one line, or a valid run; never a traceback.

About 260 that are the same each time; `make fuzz` generates thousands, others each time.
"""

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.conftest import TINY, TINY_SENTIMENT, examples
from vdrop_cli import cli, prediction, training
from vdrop_cli.commands import bench
from vdrop_cli.corpora import cornell, hub, ptb, vader
from vdrop_cli.errors import ConfigError, lacks_memory
from vdrop_cli.settings.commands import ROOTS
from vdrop_cli.settings.data import HubData
from vdrop_cli.settings.fields import keys
from vdrop_cli.studies import plan, processes
from vdrop_cli.tasks import LanguageModelling, RatingPredictor

EXAMPLES = {
    "train": 30,
    "eval": 30,
    "data": 25,
    "bench": 25,
    "table": 12,
    "reproduce": 10,
    "predict": 35,
    "film_reviews": 12,
}
numbers = st.one_of(
    st.integers(-2, 9),
    st.sampled_from(
        [10**9, 10**12, 2**63, 10**30, -(10**30), 0.5, 1.0, -0.1, 1e-300, 1e300, float("inf"), float("nan")]
    ),
)
WORDS = [
    "",
    "null",
    "true",
    "no",
    "''",
    "'",
    '"',
    "a b",
    "äöü",
    "\u2028",
    "[",
    "[]",
    "[1,2]",
    "{}",
    "{a:1}",
    "${",
    "${seed}",
    "${nope}",
    "a,b",
    "1,x",
]
WORDS += [
    "${oc.env:NOPE}",
    "..",
    "/",
    "/dev/null",
    "nowhere/x",
    "\\",
    "=",
    "a=b",
    "$(ls)",
    "lstm_small",
    "variational",
    "text",
    "ptb",
    "pydoc",
    "range(1,3)",
]
WORDS += [
    "choice(1,2)",
    "glob(*)",
    "glob(typo_*)",
    "cpu",
    "cuda",
    "cuda:7",
    "fp32",
    "bf16",
    "auto",
    "gru",
    "naive",
    "???",
    "x" * 5000,
    "small",
    "step",
    "sentiment",
    "clean",
    "cornell",
    "vader",
    "text_regression",
]
values = st.one_of(
    numbers.map(str),
    st.sampled_from(WORDS),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
)
GROUPS = [
    "model",
    "dropout",
    "data",
    "task",
    "schedule",
    "experiment",
    "hydra/launcher",
    "hydra/sweeper",
    "hydra/job_logging",
    "nope",
]
OTHERS = [
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.mode",
    "hydra.verbose",
    "hydra.job.chdir",
    "hydra.nope",
    "model.hiden",
    "model.size.x",
    "model.layers.y",
]
OPTIONS = [
    "-m",
    "--multirun",
    "--cfg",
    "--cfg=job",
    "--nope",
    "-x",
    "--resolve",
    "--package=model",
    "model.layers",
    "=",
    "==",
    "a",
    "+",
    "~",
    "~seed",
    "~model",
]
OPTIONS += ["+seed=1", "~model.layers", "data.train", "--info", "--hydra-help", "-p", ""]
LEFT_OUT = (
    "hydra.run.dir",
    "hydra.sweep.dir",
    "outputs",
    "data.cache",
    "file",
    "csv",
    "latex",
)  # would write wherever they say


def command_lines(command: str) -> st.SearchStrategy[list[str]]:
    known = [key for key in keys(ROOTS[command]) if key not in LEFT_OUT]
    names = st.one_of(st.sampled_from(known), st.sampled_from(known), st.sampled_from(GROUPS + OTHERS[2:]))
    setting = st.builds(
        lambda prefix, key, value: f"{prefix}{key}={value}",
        st.sampled_from(["", "", "", "+", "++"]),
        names,
        values,
    )
    return st.lists(st.one_of(setting, setting, setting, st.sampled_from(OPTIONS)), min_size=1, max_size=4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Valid runs are cut short: two epochs of two chunks; and nothing is measured, or fetched."""
    chunks, should_continue = LanguageModelling.batches, training.Run.should_continue.fget
    assert should_continue is not None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LanguageModelling, "batches", lambda task, order: iter(list(chunks(task, order))[:2]))
    monkeypatch.setattr(LanguageModelling, "batches_an_epoch", 2)
    monkeypatch.setattr(
        training.Run, "should_continue", property(lambda run: should_continue(run) and run.progress.epoch < 2)
    )
    monkeypatch.setattr(bench, "measure_rates", lambda *_: sys.exit(0))
    monkeypatch.setattr(
        plan,
        "Cost",
        lambda settings, task: SimpleNamespace(epoch=1.0, result=1.0, mc=lambda samples, mc_batch: 1.0),
    )
    monkeypatch.setattr(processes.Commands, "vdrop", lambda *arguments: None)
    monkeypatch.setattr(prediction, "PREDICT_SAMPLES", 3)
    passes_of = RatingPredictor.passes_of
    monkeypatch.setattr(
        RatingPredictor,
        "passes_of",
        lambda task, model, words, samples, *more: passes_of(task, model, words, min(samples, 3), *more),
    )
    read_splits = hub.read_splits

    def read_local(data: HubData, folder: str) -> dict[str, hub.Split]:
        if not os.path.isdir(str(data.name)):
            raise ConfigError(f"data.name={data.name} cannot be loaded from the Hub (nothing is fetched)")
        return read_splits(data, folder)

    monkeypatch.setattr(hub, "read_splits", read_local)
    monkeypatch.setattr(ptb, "URL", "http://127.0.0.1:1/{part}")
    monkeypatch.setattr(cornell, "URL", "http://127.0.0.1:1/")
    monkeypatch.setattr(vader, "PACKAGE", "no such package")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("VDROP_DATA", raising=False)


def run(arguments: list[str]) -> tuple[int, str]:
    """The exit code, and what was said on the error channel."""
    said = io.StringIO()
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()), redirect_stderr(said):
        patch.setattr(sys, "argv", ["vdrop", *arguments])
        patch.delenv("HYDRA_FULL_ERROR", raising=False)  # the program sets it for Hydra
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), said.getvalue()
    return 0, said.getvalue()


def base(command: str, text: list[str], rated: list[str]) -> list[str]:
    """What makes of a command line a valid one; a model that is evaluated is trained first."""
    if command == "predict":
        assert run(["train", *TINY_SENTIMENT, *rated])[0] == 0
        return [f"checkpoint={next(Path().rglob('checkpoint-0001.pt'))}", "device=cpu", "text=good1 bad2"]
    if command == "film_reviews":
        changed = [
            change
            for change in TINY_SENTIMENT
            if not change.startswith(("task=", "task.protocol", "schedule.epochs", "device=", "precision="))
        ]
        few = ["study=film_reviews", "cells=[lstm]", "dropouts=[none]", "device=cpu", "precision=fp32"]
        return [f"overrides='{' '.join([*changed, *rated])}'", *few]
    if command == "eval":
        assert run(["train", *TINY, *text])[0] == 0
        return [f"checkpoint={next(Path().rglob('checkpoint-0001.pt'))}", "stored_data=true", "device=cpu"]
    if command in ("table", "reproduce"):
        return [f"overrides='{' '.join([*text, 'task.batch_size=4', 'task.bptt=5'])}'", "sizes=[small]"]
    return [*TINY, *text] if command == "train" else []


@pytest.mark.usefixtures("no_shipped_records")
@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_command_line_is_a_run_or_a_line(kind: str, quick: None, text: list[str], rated: list[str]) -> None:
    codes, first = set(), base(kind, text, rated)
    command = "reproduce" if kind == "film_reviews" else kind

    @given(command_lines(command))
    @examples(EXAMPLES[kind], suppress_health_check=list(HealthCheck))
    def check(arguments: list[str]) -> None:
        code, said = run([command, *first, *arguments])
        codes.add(code)
        assert code in (0, 1, 2)
        assert "Traceback" not in said
        lines = [line for line in said.splitlines() if line.startswith("vdrop: ")]
        if code == 2 and not {"-m", "--multirun"} & set(arguments):
            assert len(lines) == 1 and len(said.strip().splitlines()) == 1, said
        elif code == 1:
            assert any(
                reason in line
                for line in lines
                for reason in ("memory", "not finite", " is inf", " is nan", "not finished", "is stuck")
            ), said

    check()
    assert {1 if command == "reproduce" else 0, 2} <= codes, "some are valid, some are not"


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (MemoryError(), True),
        (RuntimeError("not enough memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("x"), False),
    ],
)
def test_memory_that_is_not_there(error: Exception, is_one: bool) -> None:
    assert lacks_memory(error) == is_one
