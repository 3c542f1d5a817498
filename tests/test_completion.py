"""What the last word of a line can become; that a real bash takes it is in test_cli.py."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import environment
from vdrop_cli import cli, completion


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("outputs/train/a-s1", "out (2)", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "outputs" / "a.csv").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", [f"{name} " for name in cli.COMMANDS]),
        ("tr", ["train "]),
        ("-m tr", ["train "]),
        ("train --mul", ["--multirun"]),
        (
            "train dropout=var",
            ["dropout=variational", "dropout=variational_no_word", "dropout=variational_untied"],
        ),
        ("train dropout=none,nai", ["dropout=none,naive", "dropout=none,naive_word"]),
        ("train dropout=none,naive,none", []),
        ("train -m model=lstm_l", ["model=lstm_large"]),
        ("train seed=1 sche", ["schedule.", "schedule="]),
        ("train checkpoint", ["checkpoint."]),
        ("train device=c", ["device=cpu", "device=cuda"]),
        (
            "train backend=",
            ["backend=auto", "backend=reference", "backend=fused", "backend=native", "backend=triton"],
        ),
        ("train force=t", ["force=true"]),
        ("train +task.protocol=p", ["+task.protocol=paper"]),
        ("train data=h", ["data=hub"]),
        ("train hydra/launcher=j", ["hydra/launcher=joblib"]),
        ("eval data=", []),
        ("eval mod", []),
        ("eval precision=", ["precision=auto", "precision=fp32", "precision=bf16", "precision=null"]),
        ("eval checkpoint=outputs/tr", ["checkpoint=outputs/train/"]),
        ("eval checkpoint=out", ["checkpoint=out\\ \\(2\\)/", "checkpoint=outputs/"]),
        ("eval checkpoint=out\\ \\(", ["checkpoint=out\\ \\(2\\)/"]),
        ("eval outputs/t", ["outputs/train/"]),
        ("eval members=[outputs/a.csv,outputs/t", ["members=[outputs/a.csv,outputs/train/"]),
        ("train data=text data.t", ["data.train=", "data.test="]),
        ("train data=pydoc data.t", []),
        ("train data.t", ["data.train=", "data.test="]),
        ("train task=sentiment task.b", ["task.batch_size="]),
        ("data data=text data.train=outputs/", ["data.train=outputs/a.csv", "data.train=outputs/train/"]),
        ("predict file=.h", ["file=.hidden/"]),
        ("reproduce rows=untied_c", ["rows=untied_corrected", "rows=untied_corrected_mc"]),
        ("table rows=[none,table1_medium_untied_", ["rows=[none,table1_medium_untied_mc"]),
        ("train experiment=table1_large_e", ["experiment=table1_large_ensemble"]),
        ("reproduce rows=[none,zar", ["rows=[none,zaremba"]),
        ("table sizes=[small,", ["sizes=[small,medium", "sizes=[small,large"]),
        ("reproduce study=f", ["study=film_reviews"]),
        ("reproduce study=baselines rows=[qu", ["rows=[quick_tied"]),
        ("reproduce dropouts=naive_", ["dropouts=naive_word"]),
        ("compare outputs/t", ["outputs/train/"]),
        ("compare outputs/a.csv picture=outputs/t", ["picture=outputs/train/"]),
    ],
)
def test_a_line_is_completed(
    line: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", f"vdrop {line}")
    monkeypatch.delenv("COMP_POINT", raising=False)
    monkeypatch.setattr(sys, "argv", ["vdrop", "completion", "query"])
    cli.main()
    assert capsys.readouterr().out.splitlines() == expected


def test_what_stands_after_the_cursor_does_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", "vdrop train dev seed=1")
    monkeypatch.setenv("COMP_POINT", str(len("vdrop train dev")))
    completion.answer(cli.COMMANDS, [])
    assert capsys.readouterr().out == "device=\n"


def test_a_home_folder_is_looked_into_and_stays_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert completion.completions(["eval", "checkpoint=~/outputs/tr"], cli.COMMANDS, []) == [
        "checkpoint=~/outputs/train/"
    ]


def test_it_is_quick_torch_is_not_imported() -> None:
    code = (
        "import sys; sys.argv[1:] = ['completion', 'query']; from vdrop_cli.cli import main; "
        "main()\nassert 'torch' not in sys.modules"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(COMP_LINE="vdrop train dropout=non"),
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout) == (0, "dropout=none\n"), ran.stderr
