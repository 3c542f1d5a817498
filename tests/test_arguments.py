"""What is typed is what a setting holds: free text, paths, lists, sweeps, options anywhere, through the real
dispatch in this process.
"""

import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tests.conftest import composed, examples
from vdrop_cli import cli
from vdrop_cli.arguments import NAMES, PATHS, QUOTED, VERBATIM, full_keys, literal, to_hydra
from vdrop_cli.commands import eval as evaluation
from vdrop_cli.commands import predict, reproduce, table, train
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.settings.choices import Size, SplitProtocol
from vdrop_cli.settings.commands import ROOTS, Reproduce
from vdrop_cli.settings.compose import parse
from vdrop_cli.settings.fields import is_list, is_text, types
from vdrop_cli.settings.train import Train
from vdrop_cli.studies.plan import PlannedEvaluation, Training
from vdrop_cli.studies.processes import train_arguments
from vdrop_cli.studies.study import Row
from vdrop_cli.studies.table1 import Table1

Dispatch = Callable[..., list[Any]]


@pytest.fixture
def dispatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Dispatch:
    """Runs a command line up to the point where the command itself begins; gives the settings of each of its
    jobs.
    """
    monkeypatch.chdir(tmp_path)
    seen: list[Any] = []

    def record(settings: Any, *_: Any, **__: Any) -> None:
        seen.append(settings)

    for command in (train, evaluation, predict, table, reproduce):
        monkeypatch.setattr(command, "run", record)

    def run(*line: str) -> list[Any]:
        seen.clear()
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["vdrop", *line])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        cli.main()
        return list(seen)

    return run


def refused(dispatch: Dispatch, capsys: pytest.CaptureFixture[str], *line: str) -> str:
    """The one line that is said of a mistake."""
    with pytest.raises(SystemExit) as stop:
        dispatch(*line)
    assert stop.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    return str(said)


def holds(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = getattr(settings, name)
    return settings


TEXT = ("data=text", "data.train=a", "data.valid=b", "data.test=c")
TYPED = [  # the line, the setting, and what it must hold
    (("predict", "checkpoint=runs/lr=0.1/x"), "checkpoint", "runs/lr=0.1/x"),
    (("train", *TEXT, "data.train=~/a.txt"), "data.train", "{home}/a.txt"),
    (("train", *TEXT, "++data.train=~/a.txt"), "data.train", "{home}/a.txt"),
    (("train", *TEXT, "data.train=josé/a.txt"), "data.train", "josé/a.txt"),
    (("train", *TEXT, "data.train=a, b.txt"), "data.train", "a, b.txt"),
    (("train", *TEXT, "data.train='~/a'"), "data.train", "~/a"),
    (("train", *TEXT, "data.train=${outputs}/a b"), "data.train", "outputs/a b"),
    (("train", *TEXT, "data.train=a${b"), "data.train", "a${b"),
    (("train", "data.cache=null"), "data.cache", None),
    (("train", "outputs=null "), "outputs", "null "),
    (("train", "outputs=1e3"), "outputs", "1e3"),
    (("train", "outputs=True"), "outputs", "True"),
    (("train", "model.name=1e3"), "model.name", "1e3"),
    (
        ("train", "data=hub", "data.name=a/b", "data.column=review text (en)"),
        "data.column",
        "review text (en)",
    ),
    (
        ("train", "data=hub", "data.name=a/b", "data.column=c", "data.revision=1234567e8"),
        "data.revision",
        "1234567e8",
    ),
    (("predict", "checkpoint=a", "file=in (1).txt"), "file", "in (1).txt"),
    (("predict", "checkpoint=a", "text=null"), "text", "null"),
    (("eval", "checkpoint=a", "members=[b c,'d,e',~/f=1]"), "members", ["b c", "d,e", "{home}/f=1"]),
    (("eval", "checkpoint=a", "members=b (1)"), "members", ["b (1)"]),
    (("eval", "checkpoint=a", "members=[]"), "members", []),
    (("table", "csv=a [1].csv", "latex=~/t.tex"), "csv", "a [1].csv"),
    (("reproduce", "launcher=joblib hydra.launcher.n_jobs=4"), "launcher", "joblib hydra.launcher.n_jobs=4"),
    (
        ("reproduce", "launcher='joblib hydra.launcher.n_jobs=4'"),
        "launcher",
        "joblib hydra.launcher.n_jobs=4",
    ),
    (("reproduce", "overrides=seed=1 data.csv='a b.csv'"), "overrides", "seed=1 data.csv='a b.csv'"),
    (("reproduce", "rows=variational"), "rows", ["variational"]),
    (("reproduce", "rows=none,variational"), "rows", ["none", "variational"]),
    (("reproduce", "rows=null"), "rows", None),
    (("table", "sizes=small"), "sizes", [Size.small]),
    (("reproduce", "study=film_reviews", "protocols=clean"), "protocols", [SplitProtocol.clean]),
    (("reproduce", "study=film_reviews", "dropouts= none , naive"), "dropouts", ["none", "naive"]),
    (("eval", "a/b-s1"), "checkpoint", "a/b-s1"),
    (("predict", "text=x", "./lr=0.1/b"), "checkpoint", "./lr=0.1/b"),
]


@pytest.mark.parametrize(("line", "key", "value"), TYPED, ids=[" ".join(line) for line, _, _ in TYPED])
def test_a_setting_holds_what_is_typed(
    line: tuple[str, ...], key: str, value: Any, dispatch: Dispatch
) -> None:
    home = os.path.expanduser("~")
    expected = (
        [one.replace("{home}", home) for one in value]
        if key == "members"
        else value.replace("{home}", home)
        if value == str(value)
        else value
    )
    (settings,) = dispatch(*line)
    assert holds(settings, key) == expected


def text_settings() -> list[tuple[str, str]]:
    """Every command's settings that hold one text, by type."""
    return [
        (command, key)
        for command, root in ROOTS.items()
        for key, kind in types(root).items()
        if is_text(kind) and not is_list(kind)
    ]


def test_the_kinds_are_those_of_the_dataclasses() -> None:
    known_settings = set(text_settings())
    assert {
        ("train", "data.train"),
        ("eval", "checkpoint"),
        ("predict", "text"),
        ("table", "csv"),
    } <= known_settings
    known = {key for root in ROOTS.values() for key in types(root)}
    assert PATHS - {"hydra.sweep.dir"} <= known and set(NAMES) <= known


GRAMMAR = "ab1\\'\"${}[](),=~@ \t.e+-#:|é\n"
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    st.text(GRAMMAR, max_size=12),
).filter(
    lambda text: (
        text != "null"
        and not re.fullmatch(QUOTED, text, re.DOTALL)
        and not re.search(r"\$\{.*\}", text, re.DOTALL)
    )
)


def value_after(override: str) -> Any:
    """The value of an override in a composed configuration."""
    return OmegaConf.create({"value": OverridesParser.create().parse_override(override).value()}).value


@given(st.sampled_from(text_settings()), texts)
@examples(300)
def test_for_every_text_what_is_typed_is_what_the_setting_holds(setting: tuple[str, str], text: str) -> None:
    command, key = setting
    assume(key not in NAMES or "," not in text)
    (override,) = to_hydra(command, [f"{key}={text}"])
    assert value_after(override) == (os.path.expanduser(text) if key in PATHS else text)
    if key != VERBATIM:  # whose quotes are text
        assert to_hydra(command, [override]) == [override], "what is written down can be typed again"


@given(st.lists(texts, min_size=1, max_size=3))
@examples(100)
def test_a_sweep_and_a_list_hold_every_text_that_is_in_quotes(several: list[str]) -> None:
    in_quotes = ",".join(map(literal, several))
    (override,) = to_hydra("train", [f"data.train={in_quotes}"], sweep=True)
    (batch,) = BasicSweeper.split_arguments([OverridesParser.create().parse_override(override)], None)
    assert [value_after(one) for (one,) in batch] == several
    (override,) = to_hydra("eval", [f"members=[{in_quotes}]"])
    assert list(value_after(override)) == several


@given(texts)
@examples(6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_so_it_is_through_the_whole_dispatch(dispatch: Dispatch, text: str) -> None:
    (settings,) = dispatch("predict", f"checkpoint=x{text}", f"data.name=y{text}", f"text=z{text}")
    assert (settings.checkpoint, settings.data.name, settings.text) == (f"x{text}", f"y{text}", f"z{text}")


READ = [
    "A fine, moving film.",
    "It's great",
    "café {x} [y] (z)",
    "a=b",
    "1e3",
    "null",
    "true",
    "back\\slash",
    "ends\\",
    "q\\'q",
    'say "hi"',
]
READ += ["${x} costs $5", "\\${x}", "a;b#c&d", "tab\there", "\\\\'x", "'it", "'good' is not 'bad'", "an end'"]
READ += ['"costs ${oc.env:HOME}"', "'${oc.env:HOME}'", '"w1 w2"', "'a, b'", "choice(a,b)", "'a','b'", ""]


@pytest.mark.parametrize("text", READ)
def test_a_text_to_be_read_has_no_grammar_at_all(text: str) -> None:
    (override,) = to_hydra("predict", [f"text={text}"])
    assert composed("checkpoint=a", override, command="predict").text == text
    assert to_hydra("predict", [f"text={text}"], sweep=True) == [override], "nor are there several of it"


def test_what_is_in_hydras_quotes_or_no_free_text_is_left_alone() -> None:
    words = [
        "seed=1,2",
        "schedule.lr=choice(1,2)",
        "+model.hiden=a b",
        "~seed",
        "hydra/launcher=joblib",
        "data.train='a, b'",
        "dropout=none",
    ]
    assert to_hydra("train", words, sweep=True) == words


def test_in_a_sweep_a_comma_separates_runs_also_of_paths_and_lists(dispatch: Dispatch) -> None:
    jobs = dispatch("eval", "-m", "checkpoint=a (1),'b,c',~/d", "members=[e,f],g")
    home = os.path.expanduser("~")
    assert [(job.checkpoint, job.members) for job in jobs] == [
        (checkpoint, members)
        for checkpoint in ("a (1)", "b,c", f"{home}/d")
        for members in (["e", "f"], ["g"])
    ]
    assert [job.outputs for job in dispatch("train", "outputs=choice(a,b c)", "hydra.mode=MULTIRUN")] == [
        "a",
        "b c",
    ]
    assert [job.sizes for job in dispatch("table", "sizes=small,[medium,large]", "-m")] == [
        [Size.small],
        [Size.medium, Size.large],
    ]


def test_lists_of_numbers_stay_numbers_and_lists_of_texts_texts() -> None:
    """As they are shown in the command that resumes a run."""
    words = ["model.lower_sizes=640, 640", "dropout.new_each_step=[p_x]", "tags=[a,1]"]
    numbers, places, tags = to_hydra("train", words)
    assert (numbers, places) == ("model.lower_sizes=[640,640]", "dropout.new_each_step=[p_x]")
    assert tags == "tags=[a,'1']"
    assert to_hydra("train", ["model.lower_sizes=[640,640],[3,4]"], True) == [
        "model.lower_sizes=[640,640],[3,4]"
    ]
    assert to_hydra("eval", ["dropout_factors=[0.5,1e-1]"]) == ["dropout_factors=[0.5,1e-1]"]
    # mistakes are left to the setting, which names itself, instead of Hydra's grammar
    mistakes = {
        "eval": "dropout_factors=[0.5(]",
        "train": "model.lower_sizes=[640;3]",
        "bench": "parts=[a;b]",
    }
    for command, word in mistakes.items():
        (prepared_word,) = to_hydra(command, [word])
        name, _, value = word.partition("=")
        assert prepared_word == f"{name}=['{value[1:-1]}']"


def test_the_folder_of_a_sweep_is_a_path_as_typed(dispatch: Dispatch, tmp_path: Path) -> None:
    dispatch("train", "-m", "seed=1", "hydra.sweep.dir=my sweeps, (1)")
    assert (tmp_path / "my sweeps, (1)" / "summary.json").exists()


def test_options_stand_anywhere_in_the_line(dispatch: Dispatch, capsys: pytest.CaptureFixture[str]) -> None:
    for line in (
        ["-m", "train", "seed=1,2"],
        ["train", "seed=1,2", "-m"],
        ["train", "--multirun", "seed=1,2"],
    ):
        assert [job.seed for job in dispatch(*line, "log_every=3")] == [1, 2]
    capsys.readouterr()
    shown = set()
    for line in (
        ["--cfg", "job", "train"],
        ["train", "--cfg", "job"],
        ["-c", "job", "--resolve", "train"],
        ["train", "--cfg=job"],
    ):
        assert dispatch(*line, "seed=7", "dropout=none") == []
        shown.add(capsys.readouterr().out)
    assert len(shown) == 1 and "seed: 7\n" in shown.pop()
    assert dispatch("--help", "eval") == [] and "vdrop eval checkpoint=" in capsys.readouterr().out


MISTAKES = {
    ("train", "dropout=none,variational"): "dropout=none,variational: .* add -m",
    ("train", "seed=range(1,3)"): "seed=range.* add -m",
    ("train", "device=cpu,cuda"): "device=cpu,cuda: .* add -m",
    (
        "train",
        "checkpoint=outputs/train/a",
    ): r"checkpoint is a group of settings \(checkpoint\.minutes, checkpoint\.epochs\).*resumes",
    ("eval", "checkpoint=a", "data=ptb"): r"data is a group of settings \(data\.dir, ",
    ("eval", "a", "checkpoint=b"): "checkpoint=a and checkpoint=b are two checkpoints",
    ("predict", "a", "b.txt"): "two checkpoints; name one, and write other paths as setting=path",
    ("eval", "a", "members=[b,,c]"): r"members=\[b,,c\]: there is nothing between two commas",
    ("train", "-m", "outputs=a,"): "outputs=a,: there is nothing between two commas",
    ("train", "outputs=caf\udce9"): "is not UTF-8",
    ("predict", "text=w3\udcff"): "is not UTF-8",
    ("reproduce", "launcher=it's"): "launcher must be words as in a shell",
    ("-m",): "-m has no command",
    ("--cfg", "foo", "train"): "foo is not a command",
}


@pytest.mark.parametrize("typed", MISTAKES, ids=[ascii(" ".join(line)) for line in MISTAKES])
def test_a_mistake_is_one_line_that_says_what_to_do(
    typed: tuple[str, ...], dispatch: Dispatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(MISTAKES[typed], refused(dispatch, capsys, *typed))


def trainings(row: Row, *seeds: int) -> list[Training]:
    return [Training(row, replace(row.settings, seed=seed), None) for seed in seeds]  # type: ignore[arg-type]


@pytest.mark.usefixtures("composing")
def test_overrides_of_rows_are_read_as_typed_on_the_command_line(dispatch: Dispatch) -> None:
    overrides = "data=text \"data.train=in (1).txt\" data.valid=josé/b=1 data.test='a, b'"
    (row,) = Table1([Size.small], ["none"], overrides).rows
    assert (row.settings.data.train, row.settings.data.valid, row.settings.data.test) == (
        "in (1).txt",
        "josé/b=1",
        "a, b",
    )
    line = train_arguments(trainings(row, 1, 2), Reproduce(outputs="my, runs", overrides=overrides))
    jobs = dispatch("train", *line)
    assert [job.seed for job in jobs] == [1, 2] and {job.outputs for job in jobs} == {"my, runs"}
    assert all(job.data == row.settings.data for job in jobs)


@pytest.mark.usefixtures("composing")
def test_a_launcher_is_read_as_printed_in_the_help_and_jobs_are_one() -> None:
    (row,) = Table1([Size.small], ["none"]).rows
    for side_by_side in (Reproduce(launcher="joblib hydra.launcher.n_jobs=4"), Reproduce(jobs=4)):
        line = train_arguments(trainings(row, 1), side_by_side)
        words = to_hydra("train", [word for word in line if word != "-m"], sweep=True)
        assert "hydra/launcher=joblib" in words and "hydra.launcher.n_jobs=4" in words
    one = train_arguments(trainings(row, 1), Reproduce())
    assert not any("launcher" in word for word in one)


def test_an_evaluation_names_its_checkpoints_whatever_their_folder_is_called(
    dispatch: Dispatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [Path("my, runs/lr=0.1 (a)/x-s1"), Path("my, runs/[b]/x-s2")]
    settings = parse(composed("data=pydoc", "device=cpu", "precision=fp32"), Train)

    class Made(Training):
        @property
        def folder(self) -> Path:
            return made[self.settings.seed - 1]

    row = Row("it", (), (), settings, (), Evaluation(members=2))
    members = [Made(row, replace(settings, seed=seed), None) for seed in (1, 2)]  # type: ignore[arg-type]
    (job,) = dispatch("eval", *PlannedEvaluation(row, list(members)).arguments)
    assert (job.checkpoint, job.members) == (str(made[0]), [str(made[1])])


def test_nothing_is_quoted_that_need_not_be() -> None:
    """A command that is printed to be typed again stays readable."""
    words = ["data=text", "data.train=a/b-c_1.txt", "data.valid=../b", "data.test=/c", "outputs=outputs"]
    assert to_hydra("train", words) == words and shlex.join(words) == " ".join(words)


@pytest.mark.parametrize(
    ("word", "full"),
    [
        ("lr=0.5", "schedule.lr=0.5"),
        ("lr=0.5,1", "schedule.lr=0.5,1"),
        ("epochs=3", "schedule.epochs=3"),
        ("batch_size=8", "task.batch_size=8"),
        ("optimizer=adam", "schedule.optimiser=adam"),
        ("optimiser=adam", "schedule.optimiser=adam"),
        ("hidden_size=9", "model.hidden_size=9"),
        ("+p_x=0.1", "+dropout.p_x=0.1"),
        ("schedule=variational_untied", "schedule=variational"),
        ("schedule=naive,moon_word,none", "schedule=variational,moon,none"),
    ],
)
def test_what_people_type_first_is_the_setting_that_they_mean_and_is_noted(word: str, full: str) -> None:
    words, notes = full_keys("train", ["seed=2", word])
    assert words == ["seed=2", full] and notes and all(" is " in note for note in notes)


@pytest.mark.parametrize("word", ["schedule.lr=0.5", "schedule=none", "epochs", "dropout=naive"])
def test_what_is_a_setting_already_stays_without_a_note(word: str) -> None:
    assert full_keys("train", [word]) == ([word], [])
    assert full_keys("bench", ["epochs=3"]) == (["epochs=3"], [])
