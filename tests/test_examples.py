"""Every example of the help texts and of the pages: composed and validated as printed; what is cheap is run
on a tiny model.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from tests.conftest import TINY, TINY_SENTIMENT, settings
from tests.processes import ROOT
from vdrop_cli import CONF, cli, sweeps
from vdrop_cli.command_examples import EXAMPLES
from vdrop_cli.commands import bench, compare, data, export, predict, reproduce, table, train
from vdrop_cli.commands import eval as evaluation
from vdrop_cli.settings.commands import ROOTS, Reproduce
from vdrop_cli.settings.compose import parse
from vdrop_cli.settings.train import Train
from vdrop_cli.studies.plan import Training
from vdrop_cli.studies.processes import train_arguments
from vdrop_cli.studies.study import Row

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
STARTS = ("vdrop ", "make ")
RUN = (
    "predict",
    "export",
    "eval",
    "table",
    "compare",
    "completion",
    "help",
    "--help",
)  # in seconds; the others are composed and checked


def in_help(text: str) -> list[str]:
    """Lines of an example, without the column that says what they do."""
    return [re.split(r"\s{2,}", line.strip())[0] for line in text.splitlines() if line.startswith("  vdrop ")]


def in_blocks(page: str) -> list[str]:
    """Lines of code blocks, without their comments."""
    lines, fenced = [], False
    for line in page.splitlines():
        fenced ^= line.startswith("```")
        if (fenced or line.startswith("    ")) and line.strip().startswith(STARTS):
            lines.append(re.sub(r"\s+#.*", "", line.strip()))
    return lines


def in_sentences(page: str) -> list[str]:
    """Commands in backticks, which can go over the end of a line."""
    return [" ".join(match.split()) for match in re.findall(r"`((?:vdrop|make) [^`]+)`", page)]


def examples() -> list[str]:
    texts = [cli.HELP, *EXAMPLES.values()]
    pages = [path.read_text() for path in PAGES]
    lines = [line for text in texts for line in in_help(text)]
    lines += [line for page in pages for line in (*in_blocks(page), *in_sentences(page))]
    return list(dict.fromkeys(line.rstrip(".,;") for line in lines))


@pytest.fixture(scope="module")
def made(text: list[str], rated: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A finished run of each task, and the files that examples name, in one folder."""
    folder = tmp_path_factory.mktemp("examples")
    outputs = f"outputs={folder}/outputs"
    for seed in (1, 2):
        train.run(settings(*TINY, *text, "data.min_count=17", "tags=[ablation]", f"seed={seed}", outputs))
    train.run(settings(*TINY_SENTIMENT, *rated, "task.protocol=clean", outputs))
    for name, setting in zip("abc", text[1:], strict=True):
        shutil.copy(setting.partition("=")[2], folder / f"{name}.txt")
    shutil.copy(rated[1].partition("=")[2], folder / "a.csv")
    (folder / "reviews.txt").write_text("good1 bad2\ngood3\n")
    (folder / "other.txt").write_text("w1 w2\nw3\n")
    (folder / "reviews.csv").write_text('id,review\n1,good1 bad2\n2,"good3, bad1"\n')
    short = re.search(r"```yaml\n(# @package.*?)```", (ROOT / "docs/runs.md").read_text(), re.DOTALL)
    assert short is not None
    (folder / "mine" / "experiment").mkdir(parents=True)
    (folder / "mine" / "experiment" / "short.yaml").write_text(short[1])
    lm, other = (str(next(folder.rglob(f"language_model-*/*-s{seed}"))) for seed in (1, 2))
    rated_run = str(next(folder.rglob("sentiment-*/*-s1")))
    how = (f"checkpoint={rated_run}", "mc_samples=50", "stored_data=true")  # conformal intervals take it
    evaluation.run(settings(*how, command="eval"))
    return {"folder": str(folder), "language_model": lm, "another": other, "sentiment": rated_run}


def filled(line: str, made: dict[str, str]) -> list[str]:
    """The words of an example, with real things in place of what it leaves open."""
    words = shlex.split(
        line.replace("[key=value …]", "").replace("key=value", "").replace("COMMAND", "train")
    )
    words = [word for word in words if word != "…"]
    run = made["sentiment" if "sentiment" in line else "language_model"]
    words = [
        made["another"] if word == "RUN" and "RUN" in words[:place] else word
        for place, word in enumerate(words)
    ]
    words = [run if word == "RUN" else word for word in words]
    words = [re.sub(r"^checkpoint=(…|RUN|outputs/.*)$", f"checkpoint={run}", word) for word in words]
    words = [run if word.startswith("outputs/") else word for word in words]
    words = [
        word.replace("text=…", "text=w1 w2").replace("file=…", "file=other.txt").replace("=…", "=1")
        for word in words
        if word not in ("LAUNCHER=…", "ROWS=…")
    ]
    named = any(word.startswith("checkpoint=") or word == run for word in words)
    if (
        words[0] == "vdrop"
        and len(words) > 1
        and words[1] in ("eval", "predict", "export")
        and not {"--help"} & set(words)
        and not named
    ):
        words.append(f"checkpoint={run}")
    reads_corpus = not any(word == "--help" or word.startswith("file=") for word in words)
    if words[:2] == ["vdrop", "eval"] and reads_corpus:
        words.append("stored_data=true")  # these runs are of a text of one's own
    if words[:2] == ["vdrop", "predict"] and not any(
        word.startswith(("text=", "file=", "sample=")) for word in words
    ):
        words.append("text=w1")  # it would wait for standard input
    return words[1:]


Line = Callable[..., list[Any]]


@pytest.fixture
def validate(monkeypatch: pytest.MonkeyPatch) -> Line:
    """Composes and validates a line through the real dispatch; gives the settings of its jobs. Of a sweep the
    first and the last.
    """
    seen: list[Any] = []

    def record(settings: Any, *_: Any, **__: Any) -> None:
        seen.append(settings)

    def sweep(sweeper: sweeps.Sweeper, arguments: list[str]) -> None:
        sweeper.read_jobs(arguments)
        command = sweeper.job.command
        for overrides in (sweeper.jobs[0], sweeper.jobs[-1]):
            record(parse(compose(command, overrides), ROOTS[command]))

    def run(*line: str) -> list[Any]:
        seen.clear()
        with monkeypatch.context() as patch:
            for command in (bench, compare, data, evaluation, export, predict, reproduce, table, train):
                patch.setattr(command, "run", record)
            patch.setattr(sweeps.Sweeper, "sweep", sweep)
            dispatch(monkeypatch, *line)
        return list(seen)

    return run


def dispatch(monkeypatch: pytest.MonkeyPatch, *line: str) -> None:
    """Raises AssertionError where the command fails."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["vdrop", *line])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, line


def rows_of(settings: Reproduce) -> list[Row]:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return reproduce.study_of(settings).rows


def check_rest(outputs: list[Any], validate: Line) -> None:
    """What a command of many runs hands on to `vdrop train`."""
    for one in outputs:
        if isinstance(one, Reproduce):
            one.require_place()
            trainings = [Training(row, row.settings, None) for row in rows_of(one)]  # type: ignore[arg-type]
            trained = validate("train", *train_arguments(trainings, one))
            assert trained and all(isinstance(settings, Train) for settings in trained)


@pytest.mark.parametrize("line", examples())
def test_an_example_works_as_printed(
    line: str,
    made: dict[str, str],
    validate: Line,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(made["folder"])
    words = filled(line, made)
    if line.startswith("make "):
        validate_make(words, validate)
        return
    command, options = words[0], set(words)
    slow = command == "table" and not any(word.startswith("sizes=") for word in words)
    if command in RUN and not slow and not any(word.startswith(("data.dir=", "push=")) for word in words):
        dispatch(monkeypatch, *(re.sub(r"^mc_samples=[1-9]\d*$", "mc_samples=2", word) for word in words))
        assert capsys.readouterr().out
    elif command in ROOTS:
        configs = validate(*words)
        assert configs or options & {"--help", "--cfg"}
        check_rest(configs, validate)


def validate_make(words: list[str], validate: Line) -> None:
    """Validates the commands of vdrop that a target runs."""
    made = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = made.stdout.replace("\\\n", " ").splitlines()
    for line in lines:
        if line.startswith(".venv/bin/vdrop"):
            configs = validate(*shlex.split(line)[1:])
            assert configs
            check_rest(configs, validate)


def test_no_line_of_a_page_is_left_out() -> None:
    every = examples()
    lines = [
        re.sub(r"\s+#.*", "", line.strip())
        for path in PAGES
        for line in path.read_text().splitlines()
        if line.strip().startswith(STARTS)
    ]
    assert len(lines) >= 10 and [line for line in lines if line.rstrip(".,;") not in every] == []
    assert {words[1] for line in every if len(words := line.split()) > 1} >= {*EXAMPLES}


def python_blocks() -> list[str]:
    return [
        block
        for path in PAGES
        if path.name != "api.md"  # whose blocks are signatures
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    ]


@pytest.mark.parametrize("block", python_blocks())
def test_an_example_in_python_runs(block: str) -> None:
    time, batch = 5, 3
    x, ids = torch.randn(batch, time, 128), torch.randint(9, (time, batch))
    step = {"x_t": torch.randn(batch, 128), "h": torch.zeros(batch, 256)}
    model = torch.nn.Sequential(torch.nn.Linear(128, 2), torch.nn.Dropout(0.5))
    names = {
        "x": x,
        "time": time,
        "batch": batch,
        "lengths": torch.tensor([5, 2, 4]),
        "ids": ids,
        "model": model,
    }
    exec(block, {"torch": torch, "embedding": torch.nn.Embedding(9, 128), **step, **names})
