"""Committed records: the same command still gives their losses. On the real corpus, and the kind of machine
they were made on.
"""

import importlib.util
import json
import re
import sys
from itertools import islice
from pathlib import Path
from statistics import fmean, median, stdev
from types import ModuleType
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

SHORT_IN_FP32 = "precision/lstm_small-variational-fp32/s2"
SHORT = (  # each task, cell and precision once, and one of another processor; the others are long
    "precision/lstm_small-variational-bf16/s3",
    SHORT_IN_FP32,
    "small_probabilities/0.1_0.2",
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


def test_the_first_steps_of_a_record_in_fp32_are_the_same_on_every_processor(
    real_data: Path, tmp_path: Path
) -> None:
    """The test above leaves out the records of other processors, which is all of its short form on some."""
    record, device = runs.read(RECORDS / SHORT_IN_FP32), torch.device("cpu")
    configure_process(device)
    run = Run(record.train, tasks.load(record.train, device), tmp_path)
    losses = {step.step: step.loss for step in islice(run.train_epoch(), STEPS_OF_SHORT)}
    recorded = {entry["step"]: entry["loss"] for entry in record.log if entry["kind"] == "step"}
    assert record.train.precision is Precision.fp32 and len(losses) == STEPS_OF_SHORT
    assert losses[STEPS_OF_SHORT] == pytest.approx(recorded[STEPS_OF_SHORT], rel=1e-3)


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


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    """The script that writes the tables of docs/speed.md."""
    spec = importlib.util.spec_from_file_location("write_speed", ROOT / "docs" / "write_speed.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_speed_are_those_of_their_records(speed: ModuleType) -> None:
    """Every table of numbers there, but for those of precision, is between its mark and the next text."""
    pages = {page: page.read_text() for page in speed.PAGES}
    assert {page: speed.with_tables(page) for page in pages} == pages, "run `make docs-speed`"
    marked = {name for text in pages.values() for _, name in speed.MARK.findall(text)}
    # all but the first have nothing but what is in the head
    machines = set(speed.MACHINES) - {"h200", "avx2_later", "xeon_starts", "xeon_configured"}
    assert {
        "head",
        "readme",
        "h200",
        "cell_steps",
        "imported",
        *(f"{key}_torch" for key in machines),
    } <= marked, "no slow case is left out"


def range_of_layers(speed: ModuleType, precision: str) -> str:
    """The least and the largest ratio of one layer of 650 units with variational dropout to torch's."""
    measured_ratios = [
        speed.ratio(key, "medium", "layer", "variational", "torch_lstm", precision)
        for key, machine in speed.MACHINES.items()
        if precision in machine.precisions
    ]
    numbers = sorted(ratio for ratio in measured_ratios if ratio != "–")
    return f"{numbers[0]} to {numbers[-1]}"


def test_the_speeds_in_the_text_are_those_of_the_tables(speed: ModuleType) -> None:
    readme, page = (" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/speed.md"))
    step = {
        key: [
            [speed.ratio(key, "medium", "step", "variational", other, p) for p in speed.PRECISIONS]
            for other in ("torch_lstm", "cell_loop")
        ]
        for key in speed.HEAD
    }
    (_, slow_loop), (_, fair_loop) = step["slow_epyc"], step["slow_epyc_configured"]
    again, again_loop = step["avx2_later"]
    with_avx512_keys = ("xeon", "xeon_later", "xeon_starts", "epyc", "slow_epyc")
    with_avx512 = [ratio for key in with_avx512_keys for ratio in step[key][0]]
    without = [step["avx2"][0][0], again[0]]
    assert f"is {min(with_avx512)} to {max(with_avx512)} times as fast as the usual one with" in readme
    assert f"and {min(without)} to {max(without)} times on one without" in readme
    fair = sorted(ratio for key in ("xeon_configured", "slow_epyc_configured") for ratio in step[key][0])
    assert f"({fair[0]} to {fair[-1]} times where torch has vdrop's [process settings]" in readme
    assert f"is {fair_loop[0]} times as fast as the loop with them, and {slow_loop[0]} times without" in page
    assert f"{again[0]} times as fast as torch, {again_loop[0]} times as fast as the loop" in page
    xeon_loop = " and ".join(step["xeon_configured"][1])
    fp32, bf16 = step["xeon_configured"][0]
    assert (
        f"On the Xeon the step is {fp32} (fp32) and {bf16} (bf16) times as fast as torch's with them" in page
    )
    assert f"and {xeon_loop} times as fast as the loop's" in page
    words = 39 * 929_589
    hours = [
        "{} h {} min".format(*divmod(round(words / timed.words_per_second / 60), 60))
        for timed, _ in (
            speed.measurements(speed.MACHINES[key])["medium", "step", "variational", "bf16"]
            for key in ("slow_epyc", "epyc")
        )
    ]
    times = " ".join((ROOT / "docs" / "reproduce.md").read_text().split())
    assert f"take {hours[0]} on the slower one and {hours[1]} on the [faster one]" in times
    fp32, bf16 = (range_of_layers(speed, precision) for precision in speed.PRECISIONS)
    assert f"is {fp32} times as fast as torch's layer without dropout in fp32, and {bf16} times" in page
    lstm, gru = (
        speed.imported_ratios(speed.AS_IMPORTED, *cells, "medium").split(" / ")
        for cells in (("variational", "torch_lstm"), ("gru", "torch_gru"))
    )
    assert f"one `LSTM` has {' / '.join(lstm)} and `GRU` {' / '.join(gru)} beside torch's" in readme
    assert f"`LSTM` is {lstm[0]} (fp32) and {lstm[1]} (bf16) times as fast as torch's at 650 units" in page
    assert f"and `GRU` {gru[0]} and {gru[1]} times" in page
    gpu = {
        size: [
            speed.ratio("h200", size, "step", "variational", o, "bf16") for o in ("torch_lstm", "cell_loop")
        ]
        for size in ("medium", "large")
    }
    (torch_medium, loop_medium), (torch_large, loop_large) = gpu.values()
    assert f"{float(loop_medium):.1f} (medium) and {float(loop_large):.1f} (large) times as fast" in page
    assert f"{torch_medium} and {torch_large} times as fast as with `torch.nn.LSTM`" in page
    assert f"was {torch_large} times as fast as torch's, and {loop_large} times as fast as the loop" in readme
    assert f"without dropout: at most {torch_medium} and {torch_large} times as fast" in readme


def test_the_spread_of_layers_after_an_import(speed: ModuleType) -> None:
    """Of three starts of five turns each."""
    starts, medians = {}, {}
    imported, configured = (machine.records[0] for machine in (speed.AS_IMPORTED, speed.CONFIGURED))
    for name in (imported, configured):
        content = speed.record(name)
        assert (content["settings"]["starts"], content["settings"]["turns"]) == (3, 5)
        assert content["settings"]["as_imported"] is (name == imported)
        by_case = {(m["size"], m["cell"], m["precision"]): m["seconds"] for m in content["measured"]}
        for size in ("small", "medium"):
            for cell, other in (("variational", "torch_lstm"), ("gru", "torch_gru")):
                for precision in speed.PRECISIONS:
                    ours, theirs = by_case[size, cell, precision], by_case[size, other, precision]
                    turns = [there / here for here, there in zip(ours, theirs, strict=True)]
                    starts[name, size, cell, precision] = [median(turns[n : n + 5]) for n in (0, 5, 10)]
                    medians[name, size, cell, precision] = median(turns)
    page = " ".join((ROOT / "docs" / "speed.md").read_text().split())
    gains = [
        medians[configured, *case] - medians[name, *case]
        for name, *case in medians
        if name == imported and case[0] == "medium"
    ]
    assert f"ratios with them are {min(gains):.2f} to {max(gains):.2f} higher" in page
    spread = max(max(s) - min(s) for (_, size, *_), s in starts.items() if size == "medium")
    assert f"medians of the three starts differ by at most {spread:.2f}" in page
    small = [starts[name, "small", "variational", "fp32"] for name in (imported, configured)]
    (low, high), (low_again, high_again) = ((f"{min(s):.2f}", f"{max(s):.2f}") for s in small)
    assert f"starts of {low} and of {high} after an import, {low_again} to {high_again} with" in page


def test_what_the_head_of_the_page_says_of_starts_and_of_the_rest_of_a_step(speed: ModuleType) -> None:
    """The rest of a step is the step without its two layers, as they were measured alone."""
    page = " ".join((ROOT / "docs" / "speed.md").read_text().split())
    (three,) = speed.MACHINES["avx2_later"].records
    content = speed.record(three)
    seconds = {m["cell"]: m["seconds"] for m in content["measured"]}
    turns = [t / o for o, t in zip(seconds["variational"], seconds["torch_lstm"], strict=True)]
    count = content["settings"]["turns"]
    starts = [f"{median(turns[n : n + count]):.2f}" for n in range(0, len(turns), count)]
    assert f"Three starts of one step had {starts[0]}, {starts[1]} and {starts[2]}, so" in page
    longer = []
    for key in ("slow_epyc", "slow_epyc_configured"):
        by_case = speed.measurements(speed.MACHINES[key])
        rests = []
        for cell in ("variational", "torch_lstm"):
            step, layer = (by_case["medium", part, cell, "bf16"][0] for part in ("step", "layer"))
            rests.append(step.step_seconds - 2 * layer.step_seconds)
        longer.append(f"{1e3 * (rests[0] - rests[1]):.0f}")
    assert f"takes {min(longer)} to {max(longer)} ms longer than torch's" in page


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


def test_records_hold_what_they_are_to() -> None:
    finished = runs.below(RECORDS)
    results = {path.parent for path in RECORDS.rglob("result.json")}
    assert {run.folder for run in finished} == results, "one that cannot be read is left out"
    for run in finished:
        assert run.log[0]["kind"] == "start" and run.log[-1] == {"kind": "result", **run.result}, run.folder
        assert json.loads((run.folder / "result.json").read_text()) == run.result
        assert [epoch["epoch"] for epoch in run.epochs] == list(range(1, run.result["epochs"] + 1))
