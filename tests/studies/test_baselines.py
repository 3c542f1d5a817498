"""Stronger baselines: their rows, what is published beside them, and the section of the page."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vdrop_cli import ROOT, runs
from vdrop_cli.errors import ConfigError
from vdrop_cli.model import LanguageModel
from vdrop_cli.run_files import SHARED_DEVICE
from vdrop_cli.runs import Finished
from vdrop_cli.settings.choices import Pictures, Size, StudyName
from vdrop_cli.settings.commands import Reproduce, Table
from vdrop_cli.studies import baselines, page, rows, table1
from vdrop_cli.studies.baselines import Baselines
from vdrop_cli.studies.rows import Collected
from vdrop_cli.studies.study import Line

PUBLISHED = {
    "quick_tied": (76.18, 73.27),
    "inan_medium_tied": (75.7, 73.2),
    "melis_10m": (61.8, 59.6),
    "awd_lstm": (61.2, 58.8),
}


@pytest.fixture(autouse=True)
def hydra(composing: None) -> None:
    pass


def collected(*finished: Finished) -> Collected:
    return Collected({rows.key(run.numbers): [run] for run in finished}, {})


@pytest.fixture(scope="module")
def quick_tied() -> Finished:
    (run,) = runs.below(ROOT / "outputs/record/baselines/quick_tied-bf16-amd_epyc")
    return run


@pytest.fixture(scope="module")
def untied() -> Finished:
    return runs.read(ROOT / "outputs/record/table1/medium_untied-bf16-intel_xeon/s1")


def test_every_row_is_the_experiment_of_its_name_with_the_published_numbers() -> None:
    every = Baselines().rows
    assert len({row.key for row in every}) == len(every)
    for row in every:
        reference = row.reference
        numbers = tuple(one and one.value for one in (reference.valid, reference.test))
        assert numbers == PUBLISHED.get(row.name, (None, None)), row.name
        assert (reference.source is None) == (row.name not in PUBLISHED), row.name


def test_rows_are_chosen_by_name() -> None:
    chosen = Baselines.from_reproduce(
        Reproduce(StudyName.baselines, rows=["melis_10m"], overrides="log_every=7")
    )
    assert chosen == Baselines(["melis_10m"], "log_every=7")
    assert [row.name for row in chosen.rows] == ["melis_10m"]
    assert chosen.rows[0].settings.log_every == 7
    with pytest.raises(ConfigError, match=r"^rows: melis is not a row of study=baselines; did you mean mel"):
        _ = Baselines(["melis"]).rows


def test_parameters_are_those_of_the_models() -> None:
    for row in Baselines().rows:
        with torch.device("meta"):
            model = LanguageModel(row.settings.model, row.settings.dropout.to_policy(), 10_000)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert baselines.parameters(Line(row, [])) == f"{count / 1e6:.1f}", row.name
        if row.name == "ptb_3h":
            assert count <= 10_000_000


def test_the_lines_are_those_of_the_rows_and_of_table_1(
    quick_tied: Finished, untied: Finished, tmp_path: Path
) -> None:
    study = Baselines()
    by_name = {line.row.name: line for line in study.lines(collected(quick_tied, untied))}
    assert {name for name, line in by_name.items() if line.runs} == {"quick_tied", "table1_medium_untied"}
    ours = by_name["quick_tied"]
    assert ours.values("test") == [quick_tied.result["test_ppl"]]
    trained = sum(epoch["seconds"] for epoch in quick_tied.epochs)
    assert baselines.hours(ours) == f"≤ {trained / 3600:.1f}"
    copied = shutil.copytree(quick_tied.folder, tmp_path / "s1")
    (copied / SHARED_DEVICE).unlink()
    alone = replace(ours, runs=[replace(ours.runs[0], run=runs.read(copied))])
    assert baselines.hours(alone) == f"{trained / 3600:.1f}"
    names = study.record_names(list(by_name.values()))
    assert names[rows.key(quick_tied.numbers)] == "baselines/quick_tied"
    assert rows.key(untied.numbers) not in names, "it is a record of Table 1"


def test_the_section_sets_measured_beside_published(
    quick_tied: Finished, untied: Finished, tmp_path: Path
) -> None:
    study, every = Baselines(), collected(quick_tied, untied)
    composed = page.Composed([study], every, [study.lines(every)])
    table = Table(outputs=str(tmp_path), file=str(tmp_path / "R.md"))
    whole = page.render(composed, table, Pictures.svg)
    lines = {cells[1]: cells for line in whole.splitlines() if len(cells := line.split(" | ")) > 8}
    hours, test = quick_tied.result["seconds"] / 3600, quick_tied.result["test_ppl"]
    assert lines["`quick_tied`"][2:9] == [
        *("9.3", f"≤ {hours:.1f}", "76.18‡", f"{quick_tied.result['valid_ppl']:.2f}", "73.27‡"),
        *(f"{test:.2f}", "–"),  # read in columns there: they do not compare
    ]
    assert "| `melis_10m` | 10.0 | 61.8‡ | 59.6‡ |" in whole
    assert "table1_medium_untied" not in whole, "it is in the table of Table 1"
    drawn = (tmp_path / "record" / "pictures" / "baselines_hours.svg").read_text()
    for name in ("hours of training", "published: 10 million, at most 241 epochs", "≤ Table 1, medium: "):
        assert name in drawn


def test_with_overrides_there_are_no_rows_of_table_1() -> None:
    changed = Baselines(["quick_tied"], "schedule.lr=0.1")
    (line,) = changed.lines(collected())
    assert line.row.settings.schedule.lr == 0.1
    (section,) = changed.sections([line])
    assert "All runs with `schedule.lr=0.1`, which is not what was published." in section.about


def test_the_rows_in_the_picture_are_those_of_table_1() -> None:
    theirs = [
        table1.make_row(size, name, "")
        for size in (Size.medium, Size.large)
        for name in ("zaremba", "variational", "untied")
    ]
    assert [row.key for row in baselines.rows_of_table1()] == [row.key for row in theirs]


def test_every_ablation_differs_from_its_recipe_in_what_it_names() -> None:
    differences = {
        row.name: baselines.changes("ptb_3h", row.settings, "")
        for row in Baselines().rows
        if baselines.base_name(row.name) == "ptb_3h"
    }
    assert differences == {
        "ptb_3h_no_recurrent": {"dropout.p_h": 0.0},
        "ptb_3h_new_recurrent": {"dropout.new_each_step": "p_x, p_between, p_h, p_out"},
        "ptb_3h_averaged": {
            "schedule.lr_shape": "step",
            "schedule.average_decay": 1.0,
            "schedule.average_from": 34,
        },
        "ptb_3h_untied_vectors": {"model.tie_embeddings": False},
    }


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "ptb_3h_no_recurrent",
            "dropout.p_h=0.2",
            "must leave what ptb_3h_no_recurrent changes (dropout.p_h)",
        ),
        ("ptb_3h_no_recurrent", "dropout.p_h=0", "must leave what ptb_3h_no_recurrent changes (dropout.p_h)"),
        ("ptb_3h_averaged", "schedule.epochs=20", "ptb_3h_averaged: schedule.average_from must be"),
    ],
)
def test_overrides_do_not_undo_an_ablation(name: str, overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        _ = Baselines([name], overrides).rows
    (row,) = Baselines([name], "model.hidden_size=20 schedule.epochs=40").rows
    assert row.settings.model.hidden_size == 20


def test_ablations_have_a_section_with_the_difference_from_their_recipe(quick_tied: Finished) -> None:
    study = Baselines(["ptb_3h", "ptb_3h_averaged", "ptb_3h_no_recurrent"])
    test = quick_tied.result["test_ppl"]
    better = replace(quick_tied, result=quick_tied.result | {"test_ppl": test - 3})
    averaged = replace(quick_tied, result=quick_tied.result | {"test_ppl": test - 2, "test_ppl_raw": test})
    elsewhere = replace(quick_tied, config=quick_tied.config | {"precision": "fp32"})
    keys = {row.name: row.key for row in study.rows}
    measured = {
        keys["ptb_3h"]: [better],
        keys["ptb_3h_averaged"]: [averaged],
        keys["ptb_3h_no_recurrent"]: [quick_tied, elsewhere],
    }
    recipes, ablations = study.sections(study.lines(Collected(measured, {})))
    assert [line.row.name for line in recipes.lines] == ["ptb_3h"]
    assert "`ptb_3h` with one part changed" in ablations.about
    cells = [
        [
            line.row.name,
            *(dict(ablations.columns)[name](line) for name in ("test", "test, raw", "difference")),
        ]
        for line in ablations.lines
    ]
    assert sorted(cells) == [
        ["ptb_3h_averaged", f"{test - 2:.2f}", f"{test:.2f}", "+1.00"],
        ["ptb_3h_no_recurrent", f"{test:.2f}", "–", "+3.00"],
        ["ptb_3h_no_recurrent", f"{test:.2f}", "–", "–"],  # no run of the recipe is in this precision
    ]
    alone = Baselines(["ptb_3h_averaged"], "model.hidden_size=20")
    sections = alone.sections(alone.lines(collected()))
    assert [[line.row.name for line in section.lines] for section in sections] == [
        ["ptb_3h"],  # not run, but on the page: the difference needs it
        ["ptb_3h_averaged"],
    ]
    assert sections[0].lines[0].row.settings.model.hidden_size == 20
    drawn = [drawing.figure for drawing in recipes.draw()]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    name, machine = "Layers of 640, 640 and 300, tied, held recurrent mask", "bf16, AMD EPYC, 2 threads"
    assert labels[0] == f"≤ {name} ({machine})"
    assert not any("recurrence" in label for label in labels), "ablations are not in the picture"
