"""Committed records: the same command still gives their losses. On the real corpus, and the kind of machine
they were made on.
"""

import json
import re
from itertools import islice
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import pytest
import torch

from tests.conftest import mark_long
from tests.processes import ROOT
from vdrop_cli import runs, tasks
from vdrop_cli.device import choose_precision, configure_process
from vdrop_cli.evaluation_files import Evaluation
from vdrop_cli.provenance import describe
from vdrop_cli.settings.choices import Precision, Size, SplitProtocol, TaskName
from vdrop_cli.settings.compose import restore
from vdrop_cli.sinks import read_log
from vdrop_cli.studies import rows
from vdrop_cli.studies.table1 import Table1
from vdrop_cli.training import Run

RECORDS = Path(__file__).parent.parent / "outputs" / "record"
pytestmark = pytest.mark.skipif(not RECORDS.exists(), reason="a source distribution holds no records")
SMALL = 200  # units
# that are made again
STEPS = 100
STEPS_OF_RATINGS = 40
STEPS_OF_LARGE = 10
STEPS_OF_SHORT = 20  # of those in the normal run, or as many as there are until the first that is recorded
SAME = (
    "device",
    "torch",
    "precision",
    "backend",
    "fp32_products",
    "processor_features",
)  # of the environment, for losses to be the same

SLOWER = (  # rows of docs/speed.md: record, size and part, cell
    ("20261128-061728", "small layer", "variational"),
    ("20261128-061728", "small layer", "naive"),
    ("20261125-093741", "small layer", "variational"),
    ("20261128-061728", "medium layer", "naive"),
    ("20261125-093741", "medium layer", "variational"),
    ("20261128-061728", "medium step", "naive"),
    ("20261128-061728", "medium step", "fused"),
    ("20261128-065234", "sentiment ratings", "naive"),
    ("20261126-070152", "sentiment ratings", "naive"),
    ("20261126-070152", "sentiment ratings", "variational_untied"),
    ("20261129-194823", "small layer", "variational"),
    ("20261129-194823", "small layer", "naive"),
    ("20261129-194823", "medium layer", "variational"),
    ("20261129-194823", "medium layer", "naive"),
    ("20261129-194823", "small layer", "variational_untied"),
    ("20261129-194823", "medium layer", "variational_untied"),
    ("20261129-194823", "small step", "naive"),
    ("20261129-194823", "medium step", "naive"),
    ("20261129-194823", "medium step", "variational_untied"),
    ("20261129-194823", "medium step", "variational"),
    ("20261129-194823", "medium step", "fused"),
    ("20261129-195828", "sentiment ratings", "naive"),
    ("20261129-225406", "medium step", "variational"),
    ("20261129-225406", "medium step", "variational_untied"),
    ("20261129-225406", "medium step", "none"),
    ("20261129-225507", "large step", "variational"),
    ("20261129-225507", "large step", "variational_untied"),
    *(
        ("20261130-033739", f"{size} layer", cell)
        for size in ("small", "medium")
        for cell in ("variational", "variational_untied", "naive", "none")
    ),
    ("20261128-123829", "sentiment cell_step", "variational"),
    ("20261128-123829", "sentiment cell_step", "gru"),
)


SHORT = (  # each task, cell and precision once; the others are long
    "precision/lstm_small-variational-bf16/s3",
    "precision/lstm_small-variational-fp32/s2",
    "choices/variational/schedule.weight_decay/1e-07",
    "ratings/clean_gru_variational-100-bf16-amd_epyc/s1",
)


def steps_of(config: dict[str, Any]) -> int:
    """So many that they take seconds."""
    if config["task"]["name"] == TaskName.sentiment.name:
        return STEPS_OF_RATINGS
    return STEPS if config["model"]["hidden_size"] <= SMALL else STEPS_OF_LARGE


def starts() -> dict[Path, dict[str, Any]]:
    """The first record of every finished run, without reading the others, by run folder; but for the records
    of `moon_every_step`, which were made with another scale.
    """
    made = {}
    for path in sorted(RECORDS.rglob("result.json")):
        if path.is_relative_to(RECORDS / "moon_every_step"):
            continue
        with (path.parent / "log.jsonl").open() as log:
            made[path.parent] = json.loads(log.readline())
    return made


def records() -> list[Any]:
    """The run folders that say what they were made with and hold a loss of these steps, and how many; of
    those that take longer the first seed. In the normal run there are few of them, and fewer steps.
    """
    steps = {
        folder: steps_of(start["config"])
        for folder, start in starts().items()
        if "precision" in start["environment"] and start["config"]["log_every"] <= steps_of(start["config"])
    }
    first = {folder.parent: folder for folder in reversed(steps)}
    cases = [
        (folder.relative_to(RECORDS).as_posix(), count)
        for folder, count in steps.items()
        if count == STEPS or folder is first[folder.parent]
    ]
    every = starts()
    short = [(name, max(every[RECORDS / name]["config"]["log_every"], STEPS_OF_SHORT)) for name in SHORT]
    return mark_long([*short, *(case for case in cases if case not in short)], short)


def test_the_short_form_has_records_of_every_task_and_precision() -> None:
    marks = [(case.values[0], case.marks) for case in records()]
    assert [name for name, long in marks if not long] == list(SHORT) and len(marks) > 8 * len(SHORT)


@pytest.mark.parametrize(("name", "step_count"), records())
def test_a_record_is_still_what_its_command_gives(
    name: str, step_count: int, real_data: Path, tmp_path: Path
) -> None:
    record = runs.read(RECORDS / name)
    config = record.train
    device, threads = torch.device("cpu"), torch.get_num_threads()
    configure_process(device)
    here = describe(device, config.backend.name, config.precision.name)
    if any(here.get(name) != record.environment.get(name) for name in SAME):
        pytest.skip(f"made with {', '.join(str(record.environment.get(name)) for name in SAME)}")
    if config.precision is Precision.bf16 and choose_precision(Precision.auto, device) is Precision.fp32:
        pytest.skip("this processor has no bf16, and rounds other numbers than those that have it")
    if step_count == steps_of(record.log[0]["config"]):  # fewer are the same with one thread, and faster
        torch.set_num_threads(record.environment["threads"])
    try:
        run = Run(config, tasks.load(config, device), tmp_path)
        losses = {step.step: step.loss for step in islice(run.train_epoch(), step_count)}
    finally:
        torch.set_num_threads(threads)
    recorded = {
        entry["step"]: entry["loss"]
        for entry in record.log
        if entry["kind"] == "step" and entry["step"] <= step_count
    }
    recorded = {step: loss for step, loss in recorded.items() if step in losses}  # an epoch may be shorter
    assert len(recorded) == len(losses) // config.log_every > 0
    assert {step: losses[step] for step in recorded} == pytest.approx(recorded, rel=1e-4), (
        "This record no longer reproduces. If a change was meant to alter training, make its record anew; "
        "if not, it is a bug."
    )


def mean_loss(log: list[dict[str, Any]], window: str) -> str:
    """Mean loss of the steps from-to, in nats a word; a dash where not all of them are there."""
    first, last = map(int, window.split("-"))
    losses = {entry["step"]: entry["loss"] for entry in log if entry["kind"] == "step"}
    return f"{fmean(losses[step] for step in range(first, last + 1)):.2f}" if last in losses else "–"


def table_rows(page: str) -> dict[str, list[str]]:
    """Every row of complete table, by its first cell."""
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")
    ]
    return {name: values for name, *values in rows}


def table_of_findings() -> dict[str, list[str]]:
    pages = sorted((ROOT / "docs" / "findings").glob("*.md"))
    return table_rows("\n".join(page.read_text() for page in pages))


def test_the_table_of_the_authors_run_is_what_its_records_hold() -> None:
    """In docs/findings: a column for theirs, then one for each record, by seed."""
    theirs = json.loads((RECORDS / "authors_1250" / "theirs.json").read_text())
    own_runs = runs.below(RECORDS / "authors_1250")
    table = table_of_findings()
    assert len(own_runs) == 3 and table["seed"] == ["theirs", *(str(run.train.seed) for run in own_runs)]
    for window, loss in theirs["loss"].items():
        assert table[f"loss, steps {window}"] == [
            f"{loss:.2f}",
            *(mean_loss(run.log, window) for run in own_runs),
        ]
    for epoch, ppl in theirs["valid_ppl_as_published"].items():
        measured = [
            [
                f"{measured_epoch['valid_ppl_as_published']:.1f}"
                for measured_epoch in run.epochs
                if str(measured_epoch["epoch"]) == epoch
            ]
            for run in own_runs
        ]
        assert table[f"validation, epoch {epoch}"] == [
            str(ppl),
            *("".join(value) or "–" for value in measured),
        ]


def test_the_table_of_word_masks_is_what_its_records_hold() -> None:
    theirs = json.loads((RECORDS / "authors_1250" / "theirs.json").read_text())["loss"]
    table = table_of_findings()
    windows = table["word masks"]
    assert len(windows) == 4 and table["in their log"] == [f"{theirs[window]:.2f}" for window in windows]
    for name, folder in (
        ("by token, seed 3", "authors_1250/s3"),
        ("by type, seed 1, fp32", "precision/lstm_1250-variational_untied-fp32/s1"),
        ("none, seed 3", "authors_1250_without_word_masks/s3"),
    ):
        log = read_log(RECORDS / folder / "log.jsonl")
        assert table[name] == [mean_loss(log, window) for window in windows]
        masks = restore(log[0]["config"]).dropout
        assert (masks.word_mask.name, masks.p_word) == (
            ("token" if "token" in name else "type"),
            0.0 if "none" in name else 0.3,
        )


@pytest.mark.usefixtures("composing")
def test_the_table_of_first_epochs_is_what_its_records_hold() -> None:
    """A row for each medium one but Moon's, with the time of its 39 epochs at the speed of the first."""
    first_epochs, table = runs.below(RECORDS / "medium_first_epoch"), table_of_findings()
    medium = Table1([Size.medium], overrides="schedule.epochs=1").rows
    titles = {row.key: row.labels[0] for row in medium if row.evaluation == Evaluation()}
    assert len(first_epochs) == 4 and all(
        run.train.schedule.epochs == run.result["epochs"] == 1 for run in first_epochs
    )
    for run in first_epochs:
        steps = [record for record in run.log if record["kind"] == "step"]
        speed, words = median(record["words_per_second"] for record in steps), run.epochs[0]["step"] * 20 * 35
        hours = 39 * words / speed / 3600
        assert table[titles[rows.key(run.numbers)]] == [
            f"{run.result['valid_ppl']:.1f}",
            f"{speed:,.0f}",
            f"{hours:.1f}",
        ]


def test_the_table_of_ratings_is_what_its_records_hold() -> None:
    """A row for each run: the epoch that is the best on validation, or on test where there is none, and the
    last one.
    """
    ratings = runs.below(RECORDS / "ratings")
    without_masks = runs.below(RECORDS / "ratings_masks")
    table = table_of_findings()
    names = set()
    for run in [*ratings, *without_masks]:
        train, by = run.train, "valid_rmse" if run.train.task.protocol is SplitProtocol.clean else "test_rmse"
        best, last = min(run.epochs, key=lambda epoch: epoch[by]), run.epochs[-1]
        measured = [
            epoch.get(f"{part}_rmse") for epoch in (best, last) for part in ("train", "valid", "test")
        ]
        cells = ["–" if value is None else f"{value:.4f}" for value in measured]
        name = (
            f"{train.task.protocol} {train.model.cell.name.upper()} {train.dropout.name}, "
            f"{train.schedule.epochs} epochs, seed {train.seed}"
        )
        if run in without_masks:
            name += (
                f", without {' and '.join(p for p in ('p_x', 'p_h', 'p_out') if not vars(train.dropout)[p])}"
            )
        assert table[name] == [str(best["epoch"]), *cells], name
        names.add(name)
    assert names == {name for name in table if name.startswith(("clean ", "paper "))}, (
        "a row without a record, or none"
    )


def mean_and_error(values: list[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f} ± {stdev(values) / len(values) ** 0.5:.{digits}f}"


def test_the_table_of_logits_by_one_product_is_what_its_records_hold() -> None:
    """In docs/speed.md, beside the runs whose logits are exact."""
    own = json.loads((RECORDS / "precision" / "one_product.json").read_text())["runs"]
    authors, small = (
        [run for run in own if name in run["command"]] for name in ("authors_1250", "lstm_small")
    )
    assert len(authors) == len(small) == 3
    exact = runs.below(RECORDS / "authors_1250")
    exact_small = runs.below(RECORDS / "precision" / "lstm_small-variational-bf16")
    assert (
        sorted(run.train.seed for run in exact) == sorted(run.train.seed for run in exact_small) == [1, 2, 3]
    )
    columns = [
        (
            [run.epochs[0]["train_loss"] for run in exact],
            [run["epochs"][0]["train_loss"] for run in authors],
            3,
        ),
        (
            *(
                [epochs[0]["valid_ppl_as_published"] for epochs in arm]
                for arm in ([r.epochs for r in exact], [r["epochs"] for r in authors])
            ),
            1,
        ),
        *(
            ([run.result[name] for run in exact_small], [run["result"][name] for run in small], 2)
            for name in ("valid_ppl", "test_ppl")
        ),
    ]
    table = re.findall(
        r"^\| (?:`experiment=authors_1250`|the same|`model=lstm_small)[^|]*\| ([^|]+) \| ([^|]+) \|$",
        (ROOT / "docs" / "speed.md").read_text(),
        re.MULTILINE,
    )
    assert table == [
        (mean_and_error(one, digits), mean_and_error(two, digits)) for one, two, digits in columns
    ]


def measured(record: str, case: str, cell: str, precision: str) -> dict[str, Any]:
    """Of a record of `vdrop bench`; a case is a size and a part."""
    size, part = case.split()
    (timed,) = (
        timed
        for timed in json.loads((RECORDS / "bench" / f"{record}.json").read_text())["measured"]
        if [timed[name] for name in ("size", "part", "cell", "precision")] == [size, part, cell, precision]
    )
    return dict(timed)


def ratio(record: str, case: str, cell: str, other: str, precision: str) -> float:
    """How many times as fast a cell is as another, by the median over the turns."""
    ours, theirs = (measured(record, case, name, precision)["seconds"] for name in (cell, other))
    return median(there / here for here, there in zip(ours, theirs, strict=True))


def first_tables_of_speed() -> list[list[list[str]]]:
    """The cells of the two tables in front of the first section of docs/speed.md, without their headings."""
    head = (ROOT / "docs" / "speed.md").read_text().partition("\n## ")[0]
    blocks = [block.splitlines() for block in head.split("\n\n") if block.startswith("|")]
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in block[2:]] for block in blocks]


def test_the_speed_of_the_medium_step_is_what_its_records_hold() -> None:
    rows, _ = first_tables_of_speed()
    with_bf16 = (
        "20261128-061728",
        "20261128-065234",
        "20261130-033739",
        "20261125-091906",
        "20261126-070407",
    )
    cases = [(name, precision) for name in with_bf16 for precision in ("fp32", "bf16")]
    cases += [(name, "fp32") for name in ("20261129-194823", "20261129-195734")]
    for (record, precision), row in zip(cases, rows, strict=True):
        _, _, written, *cells = row
        assert written == precision
        step = measured(record, "medium step", "variational", precision)
        expected = [f"{step['words'] / median(step['seconds']):,.0f}"]
        expected.append(f"{ratio(record, 'medium step', 'variational', 'torch_lstm', precision):.2f}")
        if cells[-1] != "–":
            expected.append(f"{ratio(record, 'medium step', 'variational', 'cell_loop', precision):.2f}")
        assert cells == [*expected, "–"][:3], row


def test_the_tables_of_a_processor_with_avx2_are_what_their_record_holds() -> None:
    record = "20261129-194823"
    policies = ["variational", "variational_untied", "naive"]
    rows = {"medium": [*policies, "fused", "products", "torch_lstm"], "small": policies}
    section = (
        (ROOT / "docs" / "speed.md").read_text().partition("## AMD EPYC with AVX2")[2].partition("\n## ")[0]
    )
    for size, table in zip(
        ("medium", "small"), re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE), strict=True
    ):
        seen = []
        for line in table.splitlines()[2:]:
            name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
            cell = "fused" if "backend=fused" in name else name.split("`")[1]
            expected = []
            for part in ("step", "layer") if cell != "products" else ("step",):
                timed = measured(record, f"{size} {part}", cell, "fp32")
                expected.append(f"{timed['words_per_second']:,.0f}")
                expected += [f"{timed['fraction']:.2f}"] if part == "step" else []
                for other in ("torch_lstm", "cell_loop"):
                    expected.append(f"{ratio(record, f'{size} {part}', cell, other, 'fp32'):.2f}")
            assert cells == [*expected, *["–"] * (7 - len(expected))], (size, name)
            seen.append(cell)
        assert seen == rows[size]


def test_the_tables_of_a_processor_with_avx_512_are_what_their_records_hold() -> None:
    record = "20261130-033739"
    rows = ["variational", "variational_untied", "naive", "none", "fused", "torch_lstm"]
    text = (ROOT / "docs" / "speed.md").read_text()
    section = text.partition("## AMD EPYC with AVX-512")[2].partition("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    for size, table in zip(("medium", "small"), tables, strict=True):
        lines = table.splitlines()[2:]
        assert len(lines) == len(rows)
        for cell, line in zip(rows, lines, strict=True):
            name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
            assert cell == ("fused" if "backend=fused" in name else name.split("`")[1])
            expected = []
            for part in ("step", "layer"):
                for precision in ("fp32", "bf16"):
                    if part == "step":
                        timed = measured(record, f"{size} step", cell, precision)
                        expected.append(f"{timed['words_per_second']:,.0f}")
                    expected += [
                        f"{ratio(record, f'{size} {part}', cell, other, precision):.2f}"
                        for other in ("torch_lstm", "cell_loop")
                    ]
            assert cells == expected, (size, cell)
    first = [f"{ratio(record, 'medium step', 'variational', 'torch_lstm', p):.2f}" for p in ("fp32", "bf16")]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"and {first[0]} and {first[1]} times on an AMD EPYC with AVX-512" in readme
    large = [measured("20261130-033832", "large step", "variational", p) for p in ("fp32", "bf16")]
    speeds = [f"{timed['words_per_second']:,.0f}" for timed in large]
    ratios = [
        f"{ratio('20261130-033832', 'large step', 'variational', 'torch_lstm', p):.2f}"
        for p in ("fp32", "bf16")
    ]
    words = " ".join(section.split())
    assert f"reads {speeds[0]} words a second in fp32 and {speeds[1]} in bf16" in words
    assert f"{ratios[0]} and {ratios[1]} times as many" in words


def test_the_table_of_a_gpu_is_what_its_records_hold() -> None:
    text = (ROOT / "docs" / "speed.md").read_text()
    (table,) = re.findall(
        r"(?:^\|.*\n)+", text.partition("## NVIDIA H200")[2].partition("\n## ")[0], re.MULTILINE
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0].split("`")[1] for row in rows] == [
        *("variational", "variational_untied", "none", "torch_lstm", "cell_loop")
    ]
    for name, *cells in rows:
        cell, expected = name.split("`")[1], []
        for record, size in (("20261129-225406", "medium"), ("20261129-225507", "large")):
            case = f"{size} step"
            timed = measured(record, case, cell, "bf16")
            expected += [f"{timed['words_per_second']:,.0f}", f"{timed['step_seconds'] * 1e3:.1f}"]
            expected += [
                f"{ratio(record, case, cell, other, 'bf16'):.2f}" for other in ("torch_lstm", "cell_loop")
            ]
        assert cells == expected, name
    medium, large = (row[1 + 4 * size : 5 + 4 * size] for row in rows[:1] for size in range(2))
    head = " ".join(text.partition("\n## ")[0].split())
    assert f"was {float(medium[3]):.1f} (medium) and {float(large[3]):.1f} (large) times as fast" in head
    assert f"{medium[2]} and {large[2]} times as fast as with `torch.nn.LSTM`" in head
    assert f"was {large[2]} times as fast, and {large[3]} times" in " ".join(
        (ROOT / "README.md").read_text().split()
    )


def test_ratios_in_the_text_on_avx2_are_those_of_their_records() -> None:
    text = " ".join((ROOT / "docs" / "speed.md").read_text().split())
    bf16 = {}
    for size in ("medium", "small"):
        fp32, low = (measured("20261129-202810", f"{size} step", "variational", p) for p in ("fp32", "bf16"))
        bf16[size] = f"{low['step_seconds'] / fp32['step_seconds']:.2f}"
    assert (
        f"takes {bf16['medium']} times as long as in fp32 at the medium size, and {bf16['small']} times"
        in text
    )
    ratings = {
        cell: f"{ratio('20261129-195828', 'sentiment ratings', cell, 'torch_lstm', 'fp32'):.2f}"
        for cell in ("variational", "none", "naive")
    }
    assert (
        f"with `variational` is {ratings['variational']} times as fast as with torch, with `none` "
        f"{ratings['none']} times, with `naive` {ratings['naive']} times" in text
    )


def test_what_is_slower_than_torch_is_what_its_records_hold() -> None:
    _, rows = first_tables_of_speed()
    assert len(rows) == len(SLOWER)
    for (record, case, cell), (name, _, *cells) in zip(SLOWER, rows, strict=True):
        other = "torch_gru" if cell == "gru" else "torch_lstm"
        for precision, written in zip(("fp32", "bf16"), cells, strict=True):
            if written != "–":
                digits = len(written.partition(".")[2])
                assert written == f"{ratio(record, case, cell, other, precision):.{digits}f}", name


def test_records_hold_what_they_are_to() -> None:
    for run in runs.below(RECORDS):
        assert run.log[0]["kind"] == "start" and run.log[-1] == {"kind": "result", **run.result}, run.folder
        assert json.loads((run.folder / "result.json").read_text()) == run.result
        assert [epoch["epoch"] for epoch in run.epochs] == list(range(1, run.result["epochs"] + 1))
