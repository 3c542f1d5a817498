"""The smaller tables of docs/findings are what the records say; tests/test_records.py has the larger ones."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from tests.conftest import settings
from tests.processes import ROOT
from vdrop_cli import evaluation_files, published, runs, sinks, stored
from vdrop_cli.runs import Finished, Unfinished

RECORDS = ROOT / "outputs" / "record"
READINGS = {
    "validation, read in 128 columns": "valid_ppl_batched",
    "validation, read as one text": "valid_ppl",
    "test, read as one text": "test_ppl",
}
SEEDS = {1: " (one seed)", 2: " (two seeds)", 3: ""}


def tables(page: str, heading: str) -> list[dict[str, list[str]]]:
    """The tables of a page whose first heading is this: their rows by the first cell."""
    begin = f"\n| {heading} |"
    texts = (ROOT / "docs" / "findings" / f"{page}.md").read_text().split(begin)[1:]
    return [
        {name: values for name, *values in map(cells, text.partition("\n\n")[0].splitlines()[2:])}
        for text in texts
    ]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def recorded(folder: str) -> Finished:
    (run,) = runs.below(RECORDS / folder)
    return run


def spread(values: list[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def errors(folder: str) -> str:
    """The test error of all seeds in the clean protocol, as the page writes it."""
    values = [
        run.result["test_rmse"] for run in runs.below(RECORDS / "ratings" / f"clean_{folder}-bf16-amd_epyc")
    ]
    return spread(values, 4) + SEEDS[len(values)]


def test_errors_of_film_reviews() -> None:
    policies, masks = (
        tables("film_reviews", "test error"),
        tables("film_reviews", "test error, clean protocol"),
    )
    assert policies == [
        {
            "GRU": [errors("gru_none-12"), errors("gru_naive-24"), errors("gru_variational-100")],
            "LSTM": [errors("lstm_none-60"), errors("lstm_naive-60"), errors("lstm_variational-60")],
        }
    ]
    assert masks == [
        {
            "LSTM, naive masks": [errors("lstm_naive-60"), errors("lstm_naive_word-40")],
            "LSTM, variational masks": [errors("lstm_variational_no_word-40"), errors("lstm_variational-60")],
            "GRU, naive masks": [errors("gru_naive-24"), errors("gru_naive_word-40")],
            "GRU, variational masks": ["–", errors("gru_variational-100")],
        }
    ]


def passes_of(folder: str) -> float:
    """The test error with 50 passes."""
    (passes,) = (RECORDS / folder).glob("s1/eval*")
    return float(evaluation_files.read(passes)["metrics"]["test_rmse_mc50"])


def test_the_authors_epochs_of_variational_dropout() -> None:
    """In the paper's protocol, and the other runs of it."""
    names = {
        "LSTM": ("none-60", "naive-60", "variational-60", "variational-250"),
        "GRU": ("none-12", "naive-12", "variational-40", "variational-250"),
    }
    (table,) = tables("film_reviews", "run")[-1:]
    results = {}
    for cell, runs_of in names.items():
        for name in runs_of:
            folder = f"ratings/paper_{cell.lower()}_{name}-bf16-amd_epyc"
            run, (policy, epochs) = recorded(folder), name.split("-")
            by_number = {epoch["epoch"]: epoch for epoch in run.epochs}
            best = run.result["epoch_chosen_on_test"]
            expected = [str(best)]
            for epoch in (by_number[best], by_number[int(epochs)]):
                expected += [f"{epoch['train_rmse']:.4f}", "–", f"{epoch['test_rmse']:.4f}"]
            assert table[f"paper {cell} {policy}, {epochs} epochs, seed 1"] == expected
            results[cell, name] = run.result
    lstm, gru = (results[cell, "variational-250"] for cell in names)
    text = words_of("film_reviews")
    error, best = lstm["test_rmse"], lstm["test_rmse_chosen_on_test"]
    mc, gru_mc, short_mc = (
        passes_of(f"ratings/paper_{name}-bf16-amd_epyc")
        for name in ("lstm_variational-250", "gru_variational-250", "gru_variational-40")
    )
    assert f"has {error:.4f} there, and {mc:.4f} with 50 MC passes.** Its best epoch" in text
    assert f"is the {lstm['epoch_chosen_on_test']}th ({best:.4f})" in text
    others = [results["LSTM", name] for name in ("none-60", "naive-60")]
    assert error < min(result["test_rmse_chosen_on_test"] for result in others)
    assert (
        f"the LSTM then has a test error of {error:.4f} and the GRU {gru['test_rmse']:.4f} (one seed)" in text
    )
    assert f"{short_mc:.4f} (40 epochs) and {gru_mc:.4f} (250) with 50" in text
    ridge, chosen = gru["test_rmse_of_ridge"], gru["test_rmse_chosen_on_test"]
    assert f"clean protocol, {ridge:.4f} in the paper's" in text and f"is ahead there ({chosen:.4f})" in text
    assert chosen < ridge < min(result["test_rmse"] for result in results.values())
    none, naive = (result["test_rmse"] for result in others)
    last_ten = {
        name: [
            epoch["test_rmse"]
            for epoch in recorded(f"ratings/paper_lstm_{name}-60-bf16-amd_epyc").epochs
            if epoch["epoch"] > 50
        ]
        for name in ("none", "naive", "variational")
    }
    means = ", ".join(f"{fmean(last_ten[name]):.4f} ({name})" for name in ("none", "naive"))
    said = f"over the last ten, the mean is {means} and {fmean(last_ten['variational']):.4f} (variational)"
    assert said in text and {round(stdev(ten), 3) for ten in last_ten.values()} == {0.002, 0.004}
    short = results["LSTM", "variational-60"]["test_rmse"]
    assert f"with dropout off, variational ({short:.4f}) is behind naive ({naive:.4f})" in text
    for page in ("findings/index.md", "ratings.md"):
        words = " ".join((ROOT / "docs" / page).read_text().split())
        assert f"{error:.4f}" in words and f"{none:.4f} and naive {naive:.4f} after 60" in words


MEDIUM = {  # name on the page: row in conf/published/table1.yaml and record
    "none, epoch 3": ("none", "table1/medium_none-bf16-nvidia_h200"),
    "Moon": ("moon", "table1/medium_moon-bf16-intel_xeon"),
    "Moon with word dropout": ("moon_word", "table1/medium_moon_word-bf16-intel_xeon"),
    "Zaremba": ("zaremba", "table1/medium_zaremba-bf16-nvidia_h200"),
    "variational (tied)": ("variational", "table1/medium_variational-bf16-nvidia_h200"),
    "variational (untied)": ("untied", "table1/medium_untied-bf16-intel_xeon"),
}
TIED_MC = "variational (tied), 1,000 MC passes"
REPRODUCED = 1.0  # from the published test perplexity


def words_of(page: str) -> str:
    """The text of a page in one line."""
    return " ".join((ROOT / "docs" / "findings" / f"{page}.md").read_text().split())


def published_ppl(size: str, row: str, name: str) -> tuple[float, str]:
    """A published perplexity, and how a page writes it."""
    content = published.sizes()[size]["rows"][row]
    value, *std = content[name] if isinstance(content[name], list) else [content[name]]
    mark = "" if content.get("confirmed", True) else "†"
    return value, " ± ".join(map(str, [value, *std])) + mark


def by_epoch(folder: str) -> dict[int, float]:
    """Validation perplexity as published, of a record that may be unfinished."""
    log = sinks.read_log(RECORDS / folder / "log.jsonl")
    return {entry["epoch"]: entry["valid_ppl_as_published"] for entry in log if entry["kind"] == "epoch"}


def medium_mc() -> dict[str, Any]:
    """The 1,000 MC passes of the tied row."""
    return evaluation_files.read(
        RECORDS / "table1/medium_variational-bf16-nvidia_h200/s1/eval-0039-mc1000-s1.json"
    )


def test_the_medium_rows() -> None:
    (table,) = tables("medium_rows", "medium row")
    expected, differences = {}, {}
    tests = dict[str, list[float]]()  # test perplexities of the seeds
    for name, (row, folder) in MEDIUM.items():
        results = [run.result for run in runs.below(RECORDS / folder)]
        assert len(results) == (2 if name == "variational (untied)" else 1)
        (_, valid), (value, test) = (published_ppl("medium", row, part) for part in ("valid", "test"))
        valid_ppls, tests[name] = (
            [result[key] for result in results] for key in ("valid_ppl_as_published", "test_ppl")
        )
        differences[name] = fmean(tests[name]) - value
        trained = fmean(result["train_ppl"] for result in results)
        expected[name] = [
            *(spread(valid_ppls, 2), valid, spread(tests[name], 2), test),
            *(f"{differences[name]:+.2f}", f"{trained:.1f}"),
        ]
    value, test = published_ppl("medium", "variational_mc", "test")
    mc_ppl = medium_mc()["metrics"]["test_ppl_mc1000"]
    differences[TIED_MC] = mc_ppl - value
    expected[TIED_MC] = ["–", "–", f"{mc_ppl:.2f}", test, f"{differences[TIED_MC]:+.2f}", "–"]
    assert table == expected
    assert f"{differences.pop('none, epoch 3'):.1f} above" in words_of("medium_rows")
    both = [f"{-differences.pop(name):.1f}" for name in ("Moon", "Moon with word dropout")]
    below = f"{both[0]} below"
    moon, moon_word = (recorded(MEDIUM[name][1]) for name in ("Moon", "Moon with word dropout"))
    word = f"{moon_word.result['test_ppl']:.2f}"
    assert f"it has {word}, {both[1]} below the published 86.5†" in words_of("medium_rows")
    change = moon_word.result["test_ppl"] - moon.result["test_ppl"]
    how = f"{'worse' if change > 0 else 'better'} by {abs(change):.2f}"
    assert f"So word dropout makes it {how} (one seed each), while" in words_of("medium_rows")
    trained = f"{moon_word.result['train_ppl']:.1f} with it and {moon.result['train_ppl']:.1f} without"
    assert trained in words_of("medium_rows")
    curve = [epoch["valid_ppl_as_published"] for epoch in moon_word.epochs]
    assert len(curve) == 39 and curve == sorted(curve, reverse=True), "Validation falls in all 39 epochs"
    assert f"[Moon's two](#moons-rows) are {both[0]} and {both[1]} below others" in words_of("medium_rows")
    assert f"test perplexity of {moon.result['test_ppl']:.2f}, {below} the published 97.0†" in words_of(
        "medium_rows"
    )
    moons_rows = (
        f"Moon's has {moon.result['test_ppl']:.2f}, with word dropout {word}, {both[0]} and {both[1]} below"
    )
    assert moons_rows in words_of("index")
    assert moon.train.dropout.p_c == 0.5
    assert all(-REPRODUCED <= difference < 0 for difference in differences.values())
    variational = [-difference for name, difference in differences.items() if name != "Zaremba"]
    smallest, largest = f"{min(variational):.1f}", f"{max(variational):.1f}"
    assert f"rows are {smallest} to {largest} better than published" in words_of("medium_rows")
    zaremba, tied, untied = (fmean(tests[name]) for name in list(MEDIUM)[3:])
    both_untied = tests["variational (untied)"]
    gains = f"{zaremba - tied:.1f} to {zaremba - untied:.1f}"
    assert f"rows are {gains} ahead of Zaremba's dropout (published: 3.0)" in words_of("medium_rows")
    measured = (
        f"{zaremba:.2f} (Zaremba), {tied:.2f} (tied), {mc_ppl:.2f} (tied, 1,000 MC passes) and {untied:.2f}"
    )
    assert f"test perplexity {measured} (untied, two seeds)" in words_of("index")
    each = f"{both_untied[0]:.2f} and {both_untied[1]:.2f}"
    assert f"untied {each} (two seeds), tied {tied:.2f}" in words_of("medium_rows")
    deviation = f"{stdev(both_untied):.2f}"
    assert f"that of the two untied runs is {deviation}" in words_of("medium_rows")
    reproduce = (ROOT / "docs" / "reproduce.md").read_text()
    assert f"of two seeds of the medium untied row: {deviation} |" in reproduce
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"1,000 passes takes the medium tied row to {mc_ppl:.2f} (published {value})" in text
    with_passes = f"with 1,000 passes of MC dropout {mc_ppl:.2f}, published {value}"
    assert f"variational (tied) {tied:.2f}, published 79.7; {with_passes}" in text
    assert f"so {moon.result['test_ppl']:.2f} and {word} [are no reproduction]" in text


def test_mc_passes_of_the_medium_tied_row() -> None:
    (table,) = tables("medium_rows", "passes")
    evaluation = medium_mc()
    rows = {row["samples"]: row for row in evaluation["mc"]}
    assert table == {
        str(samples): [f"{row['ppl']:.2f}", "–" if row["deviation"] is None else f"{row['deviation']:.2f}"]
        for samples, row in rows.items()
    }
    off, last = evaluation["metrics"]["test_ppl"], rows[1000]["ppl"]
    text = words_of("medium_rows")
    assert f"from {off:.2f} to {last:.2f}, a gain of {off - last:.2f} (published: 0.7)" in text
    assert rows[20]["ppl"] > off > rows[50]["ppl"]
    shares = {samples: f"{100 * (off - rows[samples]['ppl']) / (off - last):.0f} %" for samples in (100, 200)}
    assert f"A hundred passes have {shares[100]} of the gain, two hundred {shares[200]}" in text


def test_the_medium_rows_by_epoch() -> None:
    curves = [by_epoch(f"{folder}/s1") for _, folder in MEDIUM.values()]
    *_, xeon = curves
    curves.append(by_epoch(f"{MEDIUM['variational (untied)'][1]}/s2"))
    stopped = by_epoch("medium_unfinished/untied")
    (table,) = tables("medium_rows", "epoch")
    assert table == {
        epoch: [f"{curve[int(epoch)]:.1f}" if int(epoch) in curve else "–" for curve in (*curves, stopped)]
        for epoch in table
    }
    assert {"1", "20", "39"} <= set(table)
    text = words_of("medium_rows")
    assert f"stopped after {len(stopped)} of 39 epochs" in text
    gap = stopped[20] - xeon[20]
    assert f"After epoch 20 its validation perplexity was {gap:.1f} above that of seed 1 on the Xeon" in text
    tied = by_epoch(f"{MEDIUM['variational (tied)'][1]}/s1")
    ahead = [f"{stopped[epoch] - tied[epoch]:.1f}" for epoch in (20, 23)]
    assert len(stopped) == 23 and f"was {ahead[0]} ahead of it then, and {ahead[1]} after epoch 23" in text


@pytest.mark.parametrize("size", ["medium", "large"])
def test_the_rows_without_dropout(size: str) -> None:
    run = recorded(f"table1/{size}_none-bf16-nvidia_h200")
    text, curve = words_of(f"{size}_rows"), {e["epoch"]: e["valid_ppl_as_published"] for e in run.epochs}
    best = run.result["epoch"]
    assert curve[best] == min(curve.values()) and len(curve) == best + 5
    near = min(best - 1, best + 1, key=lambda epoch: curve[epoch])
    both = f"epoch {best} and nearly the same after epoch {near} ({curve[best]:.2f}, {curve[near]:.2f})"
    assert f"lowest after {both}" in text
    assert f"It is {curve[best + 5]:.1f} when training stops after epoch {best + 5}" in text
    if size == "medium":
        assert f"training perplexity falls to {run.epochs[-1]['train_ppl_dropout']:.1f}." in text
        assert f"test perplexity of {run.result['test_ppl']:.2f}, published 121.7†" in text
        return
    assert f"training perplexity of {run.result['train_ppl']:.1f} after epoch {best}" in text
    (value, test), (_, valid) = (published_ppl(size, "none", name) for name in ("test", "valid"))
    (table,) = tables("large_rows", "large row without dropout")
    assert table == {
        "validation, as published": [f"{run.result['valid_ppl_as_published']:.2f}", valid],
        "test": [f"{run.result['test_ppl']:.2f}", test],
    }
    above = f"{run.result['test_ppl'] - value:.1f} above"
    assert f"test perplexity {run.result['test_ppl']:.2f} (one seed), {above}" in text
    assert f"without dropout has {run.result['test_ppl']:.2f} on test, {above}" in words_of("index")


LARGE = {  # name on the page: row in conf/published/table1.yaml
    "untied, seed 1": "untied",
    "tied, seed 2": "variational",
    "Zaremba, seed 1": "zaremba",
}


def test_the_unfinished_large_rows() -> None:
    """They are no runs of a row, which RESULTS.md would show."""
    folder = RECORDS / "large_unfinished"
    assert not runs.below(folder) and not runs.stuck_below(folder)
    curves = {name: by_epoch(f"large_unfinished/{row}") for name, row in LARGE.items()}
    valid = {name: published_ppl("large", row, "valid") for name, row in LARGE.items()}
    (table,) = tables("large_rows", "large row")
    for name, curve in curves.items():
        run = runs.read_any(folder / LARGE[name])
        assert isinstance(run, Unfinished) and run.state == "unfinished"
        assert (run.train.seed, run.train.schedule.epochs) == (int(name[-1]), 55)
        best = min(curve, key=lambda epoch: curve[epoch])
        epochs = [record for record in run.log if record["kind"] == "epoch"]
        assert table[name] == [
            *(str(len(curve)), f"{curve[len(curve)]:.2f}", f"{curve[best]:.2f} (epoch {best})"),
            *(valid[name][1], f"{epochs[-1]['train_ppl_dropout']:.1f}"),
        ]
    theirs = json.loads((RECORDS / "authors_1250" / "theirs.json").read_text())
    log = theirs["valid_ppl_as_published"] | theirs["later_valid_ppl_as_published"]
    (table,) = tables("large_rows", "epoch")
    last = table.pop("55, published")
    assert last == [*(text for _, text in valid.values()), str(log["55"])]
    assert list(table) == ["1", "2", "3", "4", "5", "10", "20", "30", "40"]
    for epoch, values in table.items():
        assert values == [*(f"{curve[int(epoch)]:.1f}" for curve in curves.values()), str(log[epoch])], epoch
    untied, tied, zaremba = curves.values()
    assert [epoch for epoch in table if untied[int(epoch)] > log[epoch]] == ["1", "2", "4", "5"]
    text = words_of("large_rows")
    assert f"still falling, by {tied[38] - tied[43]:.2f} in its last five epochs" in text and len(tied) == 43
    assert f"end value with {55 - len(untied)} epochs to go" in text
    below = f"{valid['Zaremba, seed 1'][0] - zaremba[45]:.1f} below it with {55 - len(zaremba)} epochs to go"
    assert below in text
    ends = f"{len(untied)}, {len(tied)} and {len(zaremba)} of"
    assert ends in text and ends in words_of("index")


def test_the_stuck_starts_of_large_rows() -> None:
    none, tied = runs.stuck_below(RECORDS / "table1")
    assert [run.train.dropout.name for run in (none, tied)] == ["none", "variational"]
    assert none.train.seed == tied.train.seed == 1 and none.start.step == tied.start.step == 200
    losses = f"{none.start.loss:.2f} and {tied.start.loss:.2f} nats a word, above the limit of 7."
    assert f"over steps 151 to 200 is {losses}" in words_of("large_rows")


def test_runs_that_shared_a_device_have_no_speed() -> None:
    on_the_gpu = [run for run in runs.below(RECORDS) if run.environment["device_type"] == "cuda"]
    assert len(on_the_gpu) == 4 and all(run.words_per_second is None for run in on_the_gpu)


def test_the_small_tied_model() -> None:
    run = recorded("baselines/quick_tied-bf16-amd_epyc")
    (table,) = tables("quick_tied", "perplexity")
    assert [table[name][0] for name in (*READINGS, "training, with dropout, last epoch")] == [
        *(f"{run.result[metric]:.2f}" for metric in READINGS.values()),
        f"{run.epochs[-1]['train_ppl_dropout']:.2f}",
    ]
    assert run.result["epochs"] == 30
    by_epoch = {epoch["epoch"]: (f"{epoch['valid_ppl_batched']:.1f}", epoch["lr"]) for epoch in run.epochs}
    assert by_epoch[1][0] == "207.8"
    (first,) = [
        record
        for record in sinks.read_log(RECORDS / "baselines/quick_tied_uniform_start/s1/log.jsonl")
        if record["kind"] == "epoch"
    ]
    page = (ROOT / "docs" / "findings" / "quick_tied.md").read_text()
    assert f"validation is {first['valid_ppl_batched']:.1f} after the first epoch" in page
    columns = json.loads((RECORDS / "baselines/quick_tied-bf16-amd_epyc/columns.json").read_text())
    assert columns["valid"] == pytest.approx(run.result["valid_ppl_batched"])
    assert table["test, read in 128 columns"][0] == f"{columns['test']:.2f}"
    assert [by_epoch[epoch] for epoch in (19, 20)] == [("92.1", 0.01), ("81.4", 0.0025)]
    assert [by_epoch[epoch] for epoch in (26, 27)] == [("78.1", 0.0025), ("77.2", 0.000625)]
    text = (ROOT / "docs" / "baselines.md").read_text()
    in_columns = f"{columns['valid']:.1f} / {columns['test']:.2f} read in 128 columns"
    as_one_text = f"{run.result['valid_ppl']:.1f} / {run.result['test_ppl']:.2f} as one text ("
    assert f"| 76.2 / 73.27, after 30 epochs, read in 128 columns | {in_columns}; {as_one_text}" in text


def epochs_of(record: str) -> dict[int, dict[str, Any]]:
    log = sinks.read_log(RECORDS / "baselines" / record / "s1" / "log.jsonl")
    return {entry["epoch"]: entry for entry in log if entry["kind"] == "epoch"}


def test_new_masks_on_the_recurrence() -> None:
    """Of `ptb_3h`, each with one seed."""
    names = [f"{name}-bf16-amd_epyc" for name in ("ptb_3h", "ptb_3h_new_recurrent")]
    fixed, new = (recorded(f"baselines/{name}") for name in names)
    (ends,) = tables("ptb_3h", "mask on the recurrence")
    for values, run in zip(ends.values(), (fixed, new), strict=True):
        result = run.result
        assert values == [
            f"{result['valid_ppl']:.2f}",
            f"{result['test_ppl']:.2f}",
            f"{result['train_ppl']:.1f}",
        ]
    page = words_of("ptb_3h")
    assert f"gives a test perplexity of {new.result['test_ppl']:.2f}" in page
    assert f"one {fixed.result['test_ppl']:.2f} (46 epochs, one seed each)" in page
    fixed_log, new_log = (epochs_of(name) for name in names)
    (curves,) = tables("ptb_3h", "after epoch")
    assert len(new_log) == len(fixed_log) == max(map(int, curves)) == 46
    for epoch, values in curves.items():
        assert values == [
            f"{log[int(epoch)][metric]:.1f}"
            for log in (fixed_log, new_log)
            for metric in ("valid_ppl_batched", "train_ppl_dropout")
        ], epoch
    above, lower = (
        [sign * (new_log[epoch][metric] - fixed_log[epoch][metric]) for epoch in range(10, 47)]
        for metric, sign in (("valid_ppl_batched", 1), ("train_ppl_dropout", -1))
    )
    assert [round(x, 1) for x in (min(above), max(above), fmean(above), above[-1])] == [-0.1, 0.6, 0.2, 0.1]
    assert [round(x, 1) for x in (min(lower), max(lower))] == [0.7, 1.6]
    old, changed = map(recorded_config, names)
    assert changed["dropout"]["new_each_step"] == ["p_x", "p_between", "p_h", "p_out"]
    assert old["dropout"]["new_each_step"] == ["p_x", "p_between", "p_out"]
    for group in ("model", "dropout", "task", "schedule"):
        for key in old[group].keys() - {"name", "new_each_step"}:
            assert changed[group][key] == old[group][key], key


def recorded_config(record: str) -> dict[str, Any]:
    return stored.read_yaml(RECORDS / "baselines" / record / "s1" / "config.yaml")


def test_the_advice_on_dropout_has_the_numbers_of_the_records() -> None:
    text = " ".join((ROOT / "docs" / "choose.md").read_text().split())

    def test_ppl(name: str) -> str:
        return f"{fmean(run.result['test_ppl'] for run in runs.below(RECORDS / name)):.2f}"

    medium, small = (
        {row: test_ppl(folder) for row, folder in folders.items()}
        for folders in (
            {name.partition(",")[0]: folder for name, (_, folder) in MEDIUM.items()},
            {
                row: f"table1/small_{row}-bf16-amd_epyc"
                for row in ("moon_word", "zaremba", "variational", "none")
            },
        )
    )
    tied = medium["variational (tied)"]
    assert f"{tied}; Zaremba's {medium['Zaremba']}, none {medium['none']} (one seed each)" in text
    less = f"`moon_word` {small['moon_word']} (one seed), Zaremba's {small['zaremba']}, none {small['none']}"
    assert f"with 0.25 everywhere {small['variational']}; {less} |" in text
    assert f"{test_ppl('baselines/ptb_3h-bf16-amd_epyc')} (one seed)" in text
    rated = {
        name: errors(name).split(" ")[0]
        for name in (
            "gru_variational-100",
            "gru_none-12",
            "lstm_naive_word-40",
            "lstm_none-60",
            "lstm_variational-60",
        )
    }
    assert f"{rated['gru_variational-100']}; none {rated['gru_none-12']} |" in text
    others = f"none {rated['lstm_none-60']}, variational {rated['lstm_variational-60']}"
    assert f"{rated['lstm_naive_word-40']} (two seeds); {others} |" in text
    (passes,) = tables("medium_rows", "passes")
    assert f"a hundred passes take the variational row from {tied} to {passes['100'][0]}" in text
    assert float(passes["20"][0]) > float(tied) > float(passes["50"][0])
    (medium_row, large_row) = (
        recorded(f"table1/{size}_variational-bf16-nvidia_h200")
        if size == "medium"
        else runs.read_any(RECORDS / "large_unfinished/variational")
        for size in ("medium", "large")
    )
    probabilities = [run.train.dropout for run in (medium_row, large_row)]
    assert [(one.p_word, one.p_h, one.p_x, one.p_out) for one in probabilities] == [
        (0.2, 0.2, 0.35, 0.35),
        (0.3, 0.3, 0.5, 0.5),
    ]


def test_the_small_model_in_three_hours() -> None:
    run = recorded("baselines/ptb_3h-bf16-amd_epyc")
    result = run.result
    test, hours = f"{result['test_ppl']:.2f}", f"{result['seconds'] / 3600:.1f}"
    assert (result["epochs"], result["seconds"] <= 3 * 3600) == (46, True)
    (table,) = tables("ptb_3h", "perplexity")
    measured = [f"{result['valid_ppl']:.2f}", test, f"{run.epochs[-1]['train_ppl_dropout']:.2f}"]
    assert [values[0] for values in table.values()] == measured
    (tried,) = tables("ptb_3h", "record")
    records = [name.strip("`") for name in tried]
    names = {path.name for path in (RECORDS / "baselines").glob("ptb_3h*")}
    assert set(records) == {name for name in names if "-" not in name or name.startswith("ptb_3h-")}
    logs = {record: epochs_of(record) for record in records}
    for record, (*_, epochs, last) in zip(records, tried.values(), strict=True):
        log = logs[record]
        assert epochs.split(" of ")[0] == (str(len(log)) if log else "0"), record
        assert last == (f"{log[len(log)]['valid_ppl_batched']:.1f}" if log else "–"), record
    (curves,) = tables("ptb_3h", "epoch")
    assert {"17", "46"} <= set(curves)
    for epoch, values in curves.items():
        assert values == [
            f"{logs[record][int(epoch)][metric]:.1f}" if int(epoch) in logs[record] else "–"
            for record in records[:3]
            for metric in ("valid_ppl_batched", "train_ppl_dropout")
        ], epoch
    page = (ROOT / "docs" / "findings" / "ptb_3h.md").read_text()
    assert f"reaches a test perplexity of {test} in {hours} hours of training on two cores" in page
    assert f"training perplexity is {result['train_ppl']:.1f} at the end" in page
    recipe = (ROOT / "conf" / "experiment" / "ptb_3h.yaml").read_text()
    assert f"validation {result['valid_ppl']:.2f}, test {test}, in {hours} hours on two cores" in recipe
    text = (ROOT / "docs" / "baselines.md").read_text()
    assert f"| `ptb_3h` | 9.8 million | this project's own | {result['valid_ppl']:.1f} / {test} (" in text
    index = (ROOT / "docs" / "findings" / "index.md").read_text()
    assert f"10 million parameters reach a test perplexity of {test} in {hours} hours on two cores" in index
    readme = (ROOT / "README.md").read_text()
    assert f"10 million parameters, test perplexity {result['test_ppl']:.1f} in {hours} hours" in readme


def test_times_of_recorded_runs() -> None:
    text = (ROOT / "docs" / "reproduce.md").read_text()
    for what, pattern in (
        ("a small row, 39 epochs", "table1/small_*"),
        ("`table1_medium_untied`", "table1/medium_untied-bf16-intel_xeon"),
        ("`quick_tied`, 30 epochs", "baselines/quick_tied-bf16-amd_epyc"),
        ("`ptb_3h`, 46 epochs", "baselines/ptb_3h-bf16-amd_epyc"),
        ("variational LSTM on film reviews, 60 epochs", "ratings/*_lstm_variational-60-bf16-amd_epyc"),
    ):
        recorded_runs = [run for folder in RECORDS.glob(pattern) for run in runs.below(folder)]
        minutes = sorted(
            run.result["seconds"] / 60
            for run in recorded_runs
            if run.result["epochs"] == run.train.schedule.epochs  # all but those that stopped early
        )
        shortest, longest = clock(minutes[0]), clock(minutes[-1])
        time = longest if shortest == longest else f"{shortest} to {longest}"
        (row, *_) = [line for line in text.splitlines() if line.startswith(f"| {what} |")]
        assert row.split(" | ")[2].startswith(time), (what, time)


def clock(minutes: float) -> str:
    hours, rest = divmod(round(minutes), 60)
    return f"{hours} h {rest} min" if hours else f"{rest} min"


def test_the_small_rows() -> None:
    (table,) = tables("small_rows", "row")
    folders = ["none", "moon_word", "moon", "variational", "zaremba"]
    means = [
        fmean(run.result["test_ppl"] for run in runs.below(RECORDS / "table1" / f"small_{row}-bf16-amd_epyc"))
        for row in folders
    ]
    assert [row[0] for row in table.values()] == [f"{ppl:.1f}" for ppl in means]
    tied = runs.below(RECORDS / "table1" / "small_variational-bf16-amd_epyc")
    zaremba = runs.below(RECORDS / "table1" / "small_zaremba-bf16-amd_epyc")
    valid, test = (fmean(run.result[name] for run in tied) for name in ("valid_ppl", "test_ppl"))
    text = words_of("small_rows")
    assert (
        f"{valid - 92.6:.1f} and {test - 87.3:.1f} below the tied row here ({valid:.1f}, {test:.1f})" in text
    )
    trained = [fmean(run.result["train_ppl"] for run in one) for one in (tied, zaremba)]
    assert f"without dropout {trained[0]:.1f}, Zaremba's {trained[1]:.1f} (means of three seeds)" in text


def mean_of(runs_of_seeds: Sequence[Finished], metric: str) -> float:
    return fmean(run.result[metric] for run in runs_of_seeds)


def test_the_probabilities_of_the_small_variational_row() -> None:
    def epoch_13(run: Finished) -> tuple[float, float]:
        (epoch,) = (epoch for epoch in run.epochs if epoch["epoch"] == 13)
        return epoch["valid_ppl_batched"], epoch["train_ppl_dropout"]

    def probabilities(run: Finished) -> str:
        dropout = run.train.dropout
        assert (dropout.p_word, dropout.p_x) == (dropout.p_h, dropout.p_out)
        return f"{dropout.p_h:g}; {dropout.p_x:g}"

    (table,) = tables("small_rows", "`p_word`, `p_h`; `p_x`, `p_out`")
    *_, (last, row_values) = table.items()
    assert last.startswith("0.25; 0.25")
    tried, tier = {}, settings("experiment=small_tier", "schedule.epochs=13")
    for run in runs.below(RECORDS / "small_probabilities"):
        assert (run.train.schedule, run.train.model, run.train.seed) == (tier.schedule, tier.model, 1)
        tried[probabilities(run)] = epoch_13(run)
    rounded = {name: [f"{value:.1f}" for value in values] for name, values in tried.items()}
    assert {name: values for name, values in table.items() if name != last} == rounded and len(tried) == 8
    row, zaremba = (
        runs.below(RECORDS / "table1" / f"small_{name}-bf16-amd_epyc") for name in ("variational", "zaremba")
    )
    means = [f"{fmean(values):.1f}" for values in zip(*map(epoch_13, row), strict=True)]
    assert len(row) == len(zaremba) == 3 and row_values == means

    (table,) = tables("small_rows", "after 39 epochs")
    (less,) = runs.below(RECORDS / "small_probabilities_39" / "0.05_0.2")
    chosen = runs.below(RECORDS / "small_probabilities_39" / "0.1_0.2")
    tier = settings("experiment=small_tier")
    for run in (less, *chosen):
        assert (run.train.schedule, run.train.model) == (tier.schedule, tier.model)
    assert sorted(run.train.seed for run in chosen) == [1, 2, 3]
    for (name, values), one in zip(table.items(), ([less], chosen, row), strict=True):
        valid, test, trained = (mean_of(one, metric) for metric in ("valid_ppl", "test_ppl", "train_ppl"))
        spread = f" ± {stdev(run.result['test_ppl'] for run in one):.1f}" if one is chosen else ""
        assert name.startswith(probabilities(one[0]))
        assert values == [f"{valid:.1f}", f"{test:.1f}{spread}", f"{trained:.1f}"]
    best = sorted(tried, key=lambda name: tried[name][0])[:2]
    assert best == [probabilities(less), probabilities(chosen[0])], "the best two were trained to the end"

    valid, test = (mean_of(chosen, metric) for metric in ("valid_ppl", "test_ppl"))
    assert abs(valid - 92.6) < REPRODUCED and abs(test - 87.3) < REPRODUCED
    small = [run for folder in (RECORDS / "table1").glob("small_*") for run in runs.below(folder)]
    assert len(small) > 6 and test < min(run.result["test_ppl"] for run in small), "the best of this size"
    text = words_of("small_rows")
    assert f"this one has {valid:.1f} and {test:.1f}, within 1.0 of both" in text
    assert f"the model here has {valid:.1f} and {test:.1f}" in text
    moon, after = recorded("table1/small_moon_word-bf16-amd_epyc"), mean_of(zaremba, "test_ppl")
    below = f"{moon.result['test_ppl'] - test:.1f} below Moon's row with word dropout (one seed)"
    below += f" and {after - test:.1f} below Zaremba's"
    assert f"of this size: {test:.1f} on test, mean of three seeds, {below}." in text
    one, two, three = (
        f"{run.result['test_ppl']:.1f}" for run in sorted(chosen, key=lambda run: run.train.seed)
    )
    assert f"The three seeds have {one}, {two} and {three} on test" in text
    assert f"the variational model has {test:.1f} on test (mean of three seeds)" in text
    (first,) = (run for run in chosen if run.train.seed == 1)
    ahead = tried["0.1; 0.2"][0] - tried["0.05; 0.2"][0]
    behind = less.result["valid_ppl"] - first.result["valid_ppl"]
    assert f"{ahead:.1f} ahead of 0.1; 0.2 on validation after 13 epochs, and {behind:.1f} behind" in text
    before = fmean(epoch_13(run)[0] for run in zaremba)
    assert f"has {before:.1f} on validation after 13 epochs, and {after:.1f} on test after 39" in text
    with_row = mean_of(row, "test_ppl")
    assert f"{test:.1f} on test (three seeds). With the 0.25 of the authors' script" in words_of("index")
    assert f"it has {with_row:.1f}, behind Zaremba's {after:.1f}" in words_of("index")
    advice, readme = (" ".join((ROOT / name).read_text().split()) for name in ("docs/choose.md", "README.md"))
    assert f"{test:.2f} (three seeds), with 0.25 everywhere {with_row:.2f}; `moon_word`" in advice
    assert f"the variational model has {test:.2f} (three seeds; Inan et al. 2017 publish 87.3" in readme


def test_mc_dropout_of_the_small_variational_models() -> None:
    def read(folder: Path) -> dict[str, Any]:
        return evaluation_files.read(folder / "eval-0039-mc100-s1.json")

    chosen = [read(run.folder) for run in runs.below(RECORDS / "small_probabilities_39" / "0.1_0.2")]
    pairs = [(one["metrics"]["test_ppl"], one["metrics"]["test_ppl_mc100"]) for one in chosen]
    off, mc = map(fmean, zip(*pairs, strict=True))
    (table,) = tables("small_rows", "passes of the small model")
    by_passes = {row["samples"]: [] for row in chosen[0]["mc"]}
    for one in chosen:
        for row in one["mc"]:
            by_passes[row["samples"]].append(row["ppl"])
    expected = {str(samples): [f"{fmean(values):.1f}"] for samples, values in by_passes.items()}
    assert table == expected | {"dropout off": [f"{off:.1f}"]} and len(chosen) == 3
    text, gains = words_of("small_rows"), sorted(before - after for before, after in pairs)
    seeds = f"(means of three seeds; each seed gains {gains[0]:.1f} to {gains[-1]:.1f})"
    assert f"from {off:.1f} to {mc:.1f} {seeds}" in text
    row = [read(run.folder) for run in runs.below(RECORDS / "table1" / "small_variational-bf16-amd_epyc")]
    worse = [fmean(one["metrics"][name] for one in row) for name in ("test_ppl_mc100", "test_ppl")]
    assert f"{worse[0]:.1f} and {worse[1]:.1f} with dropout off (tied, means of three seeds)" in text
    page, advice, readme = (
        " ".join((ROOT / name).read_text().split())
        for name in ("docs/uncertainty.md", "docs/choose.md", "README.md")
    )
    assert f"a hundred passes help: {mc:.1f}, and {off:.1f} with the standard approximation" in page
    assert f"from {off:.2f} to {mc:.2f} (three seeds)" in advice
    assert f"the best of its size, and {mc:.2f} with 100 passes" in readme
    assert f"a hundred MC passes take the first to {mc:.1f} and make the second worse" in words_of("index")


def test_mc_dropout_of_the_small_models_moons_rows() -> None:
    text = " ".join((ROOT / "docs" / "uncertainty.md").read_text().split())
    pairs = []
    for p_c in (0.1, 0.25):
        (path,) = (RECORDS / f"choices/moon/dropout.p_c/{p_c}").glob("eval-0013-mc20-*.json")
        metrics = evaluation_files.read(path)["metrics"]
        pairs.append((metrics["test_ppl_mc20"], metrics["test_ppl"]))
    (mc, off), (mc_more, off_more) = pairs
    assert mc < off and mc_more > off_more
    said = f"20 passes have {mc:.2f}, dropout off {off:.2f} (13 epochs, one seed; with 0.25 {mc_more:.2f} and"
    assert f"{said} {off_more:.2f}," in text


def test_the_starts_of_the_authors_run_in_fp32() -> None:
    """Also the one that is stuck by the setting of the large rows."""

    def late_loss(seed: int) -> float:
        log = sinks.read_log(RECORDS / f"precision/authors_1250-fp32/s{seed}/log.jsonl")
        return fmean(
            entry["loss"] for entry in log if entry["kind"] == "step" and 151 <= entry["step"] <= 200
        )

    first, stuck, third = map(late_loss, (1, 2, 3))
    text, limit = words_of("authors_log"), settings("experiment=table1_large_untied").stuck.loss
    assert f"({first:.2f} and {third:.2f} in steps 151-200), and seed 2 is at {stuck:.2f}, above" in text
    assert first < limit < stuck and f"above the limit of {limit:g} for a stuck start" in text


def test_the_error_of_the_variational_gru_by_passes_and_without_dropout() -> None:
    off = [run.result["test_rmse"] for run in runs.below(RECORDS / "uncertainty" / "gru_variational-100")]
    assert f"with dropout off it is {spread(off, 4)}" in words_of("uncertainty")


def test_the_small_row_moons_rows() -> None:
    plain, with_words = (
        recorded(f"table1/{row}-bf16-amd_epyc").result for row in ("small_moon", "small_moon_word")
    )
    said = (
        f"Table 1 has {plain['test_ppl']:.2f} on test, with word dropout of 0.1 {with_words['test_ppl']:.2f}"
    )
    assert said in words_of("moon")
    rises = f"rises from {plain['train_ppl']:.1f} to {with_words['train_ppl']:.1f}"
    takes = f"Moon's row from {plain['test_ppl']:.1f} to {with_words['test_ppl']:.1f}"
    assert rises in words_of("small_rows") and takes in words_of("small_rows")


def test_weight_decay() -> None:
    (table,) = tables("small_rows", "`schedule.weight_decay`")
    for value, name in (("1e-5", "1e-05"), ("1e-6", "1e-06"), ("1e-7", "1e-07")):
        run = recorded(f"choices/variational/schedule.weight_decay/{name}")
        lowest = min(run.epochs, key=lambda epoch: epoch["valid_ppl_batched"])
        ends_lowest = lowest["epoch"] == run.result["epochs"]
        assert table[value] == [
            f"{lowest['valid_ppl_batched']:.1f}" + ("" if ends_lowest else f" (epoch {lowest['epoch']})"),
            f"{run.result['valid_ppl_batched']:.1f}",
            f"{run.result['train_ppl']:.1f}",
            f"{run.result['test_ppl']:.1f}",
        ]


def test_the_choice_of_the_mask_on_the_cell_state() -> None:
    (table,) = tables("moon", "`dropout.p_c`")
    folder = RECORDS / "choices" / "moon" / "dropout.p_c"
    assert set(table) == {path.name for path in folder.iterdir()}
    for p_c, values in table.items():
        run = recorded(f"choices/moon/dropout.p_c/{p_c}")
        assert run.train.dropout.p_c == float(p_c) and run.result["epochs"] == 13
        assert values == [f"{run.result['valid_ppl']:.1f}", f"{run.epochs[-1]['train_ppl_dropout']:.1f}"]
    (with_words,) = tables("moon", "`dropout.p_word`")
    assert set(with_words) == {path.name for path in (RECORDS / "choices/moon_word/dropout.p_word").iterdir()}
    chosen = recorded(f"choices/moon/dropout.p_c/{min(table, key=lambda p_c: table[p_c][0])}")
    for p_word, values in with_words.items():
        run = recorded(f"choices/moon_word/dropout.p_word/{p_word}")
        assert (run.train.dropout.p_word, run.result["epochs"]) == (float(p_word), 13)
        assert run.train.dropout.p_c == chosen.train.dropout.p_c == 0.15
        assert values == [f"{run.result['valid_ppl']:.1f}", f"{run.epochs[-1]['train_ppl_dropout']:.1f}"]
        if p_word == "0.1":
            gain = chosen.result["valid_ppl"] - run.result["valid_ppl"]
            rows = (
                recorded(f"table1/{row}-bf16-amd_epyc").result for row in ("small_moon", "small_moon_word")
            )
            plain, dropped = (result["valid_ppl"] for result in rows)
            said = f"It is {gain:.1f} better than none, and {plain - dropped:.1f} better after 39 epochs"
            assert said in words_of("moon")
    earlier = {
        p_c: sinks.read_result(RECORDS / "moon_every_step" / f"small_13_epochs_{p_c}")["valid_ppl"]
        for p_c in ("0.1", "0.25")
    }
    said = " and ".join(f"{ppl:.1f} for {p_c}" for p_c, ppl in earlier.items())
    assert f"the same choice was {said}" in words_of("moon")


def test_where_the_mean_of_the_mask_on_the_cell_state_is_taken() -> None:
    (table,) = tables("moon", "`p_c` of the model")
    rules = json.loads((RECORDS / "moon_every_step" / "rules.json").read_text())["measured"]
    assert [float(p_c) for p_c in table] == [rule["p_c"] for rule in rules]
    costs = []
    for rule, values in zip(rules, table.values(), strict=True):
        folder = RECORDS / "choices" / "moon" / "dropout.p_c" / str(rule["p_c"])
        evaluated = evaluation_files.read(folder / "eval-0013-mc20-s1.json")["metrics"]
        assert rule["hidden_state"] == pytest.approx(evaluated["test_ppl"], rel=1e-6)
        passes = evaluated["test_ppl_mc20"]
        assert values == [
            f"{ppl:.2f}" for ppl in (rule["hidden_state"], rule["cell_state_every_step"], passes)
        ]
        assert abs(rule["hidden_state"] / passes - 1) < 0.02 < rule["cell_state_every_step"] / passes - 1
        costs.append(round(100 * (rule["cell_state_every_step"] / rule["hidden_state"] - 1)))
    small, large = costs
    text = words_of("moon")
    assert f"costs {small} % of test perplexity with a probability of 0.1, and {large} % with 0.25" in text


def test_the_mask_on_the_cell_state_at_650_units() -> None:
    names = ("0.1", "0.25", "0.5")
    folders = [RECORDS / "moon_every_step" / f"medium_{name}" for name in names]
    assert [stored.read_yaml(folder / "config.yaml")["dropout"]["p_c"] for folder in folders] == [
        float(name) for name in names
    ]
    curves = [
        {entry["epoch"]: entry for entry in sinks.read_log(folder / "log.jsonl") if entry["kind"] == "epoch"}
        for folder in folders
    ]
    assert [max(curve) for curve in curves] == [10, 8, 4]
    (table,) = tables("moon", "epoch")
    for epoch, values in table.items():
        entries = [curve.get(int(epoch)) for curve in curves]
        assert values == [
            "–" if entry is None else f"{entry[name]:.1f}"
            for entry in entries
            for name in ("valid_ppl_batched", "train_ppl_dropout")
        ]
    best = [min(curve, key=lambda e, curve=curve: curve[e]["valid_ppl_batched"]) for curve in curves]
    assert best == [5, 8, 4]


UNCERTAINTY = RECORDS / "uncertainty"
LEVELS = (50, 80, 90, 95)


def evaluated(
    row: str, kind: str, seed: int = 1, *, last: bool = False, in_pieces: bool = False
) -> dict[str, Any]:
    """The evaluation of a record: `mc50-s1`, `standard`, or of an ensemble; of the epoch that is reported, or
    of the last one. `in_pieces`: by passes in which each piece of a review had masks of its own, where there
    are others, too.
    """
    folder = UNCERTAINTY / row / f"s{seed}"
    result = sinks.read_result(folder)
    earlier = RECORDS / "ratings_pieces" / f"uncertainty_{row}" / f"s{seed}"
    (path,) = (earlier if in_pieces and earlier.exists() else folder).glob(
        f"eval-{result['epochs' if last else 'epoch']:04}-{kind}.json"
    )
    return evaluation_files.read(path)


def coverages(results: dict[str, Any], kind: str) -> list[float]:
    by_level = {row["level"]: row[kind] for row in results["tables"]["calibration"]}
    return [100 * by_level[level] for level in LEVELS]


INTERVALS = {  # name on the page: record and evaluation
    "LSTM, none": ("lstm_none-12", "standard"),
    "LSTM, naive": ("lstm_naive-12", "mc50-s1"),
    "LSTM, variational": ("lstm_variational-40", "mc50-s1"),
    "GRU, none": ("gru_none-12", "standard"),
    "GRU, naive": ("gru_naive-24", "mc50-s1"),
    "GRU, variational": ("gru_variational-100", "mc50-s1"),
}


SPLITS = dict.fromkeys(INTERVALS, 5) | {"GRU, variational": 4}  # its training takes the longest
LAST_EPOCHS = 4  # splits whose runs are evaluated at their last epoch, too


def over_splits(name: str, *, last: bool = False) -> list[dict[str, Any]]:
    """The evaluations of a model on every split."""
    row, how = INTERVALS[name]
    rows = [row, *(f"{row}-split{split}" for split in range(1, LAST_EPOCHS if last else SPLITS[name]))]
    return [evaluated(one, how, last=last, in_pieces=True) for one in rows]


def coverage_line(evaluations: list[dict[str, Any]], kind: str) -> list[str]:
    columns = zip(*(coverages(one, kind) for one in evaluations), strict=True)
    return [spread(list(column), 1) for column in columns]


def width(results: dict[str, Any], kind: str) -> float:
    return next(row["width_95"] for row in results["tables"]["intervals"] if row["intervals"] == kind)


def test_coverage_of_intervals() -> None:
    """All means are within three percentage points of their level, those of conformal intervals below it."""
    (table,) = tables("uncertainty", "mean over splits")
    expected = {}
    for name in INTERVALS:
        evaluations = over_splits(name)
        for kind in ("gaussian", "conformal"):
            mean_width = fmean(width(one, kind) for one in evaluations)
            expected[f"{name}: {kind}"] = [*coverage_line(evaluations, kind), f"{mean_width:.3f}"]
    assert table == expected
    distances = {
        name: [float(value.partition(" ")[0]) - level for value, level in zip(values, LEVELS, strict=False)]
        for name, values in table.items()
    }
    assert all(abs(distance) <= 3 for row in distances.values() for distance in row)
    conformal = [d for name, row in distances.items() if name.endswith("conformal") for d in row]
    assert [f"{extreme:.1f}" for extreme in (max(conformal), min(conformal))] == ["-0.3", "-2.7"]
    variational = [round(-distance, 1) for distance in distances["LSTM, variational: gaussian"]]
    said = f"they cover {min(variational)} to {max(variational)} points less"
    assert said in words_of("film_reviews")


def test_quantile_intervals_are_nearly_the_gaussian_ones() -> None:
    """By at most 0.4 percentage points at every level, as the page says, and by that somewhere."""
    tables_of = [one["tables"]["calibration"] for name in INTERVALS for one in over_splits(name)]
    differences = [100 * abs(row["quantile"] - row["gaussian"]) for table in tables_of for row in table]
    assert f"{max(differences):.1f}" == "0.4"


def test_coverage_of_the_last_epoch() -> None:
    (table,) = tables("uncertainty", "conformal, last epoch")
    names = [name for name in INTERVALS if not name.endswith("naive")]
    assert table == {name: coverage_line(over_splits(name, last=True), "conformal") for name in names}
    gains = [
        fmean(
            fmean(coverages(one, "conformal")[place] for one in over_splits(name, last=True))
            - fmean(coverages(one, "conformal")[place] for one in over_splits(name)[:LAST_EPOCHS])
            for name in names
        )
        for place in range(len(LEVELS))
    ]
    assert [f"{extreme:.1f}" for extreme in (min(gains), max(gains))] == ["0.1", "0.7"]


def test_coverage_of_single_splits() -> None:
    (table,) = tables("uncertainty", "split")
    rows = ["gru_none-12", *(f"gru_none-12-split{split}" for split in range(1, 5))]
    shares = [coverages(evaluated(row, "standard"), "conformal") for row in rows]
    assert table == {str(split): [f"{share:.1f}" for share in row] for split, row in enumerate(shares)}


def test_selective_prediction() -> None:
    (table,) = tables("uncertainty", "uncertainty from")
    passes = [evaluated("gru_variational-100", "mc50-s1", seed) for seed in (1, 2, 3)]
    ensembles = {
        f"ensemble of three, {name}": evaluated(row, "ensemble3-*")
        for name, row in (("variational", "gru_variational-100"), ("none", "gru_none-12"))
    }

    def line(evaluations: list[dict[str, Any]], order: str) -> list[str]:
        curves = [one["tables"]["selective"] for one in evaluations]
        by_share = [{row["share"]: row for row in curve} for curve in curves]
        return [spread([rows[share][order] for rows in by_share], 4) for share in (100, 50, "area")]

    expected = {"50 MC passes": line(passes, "std"), "length, of the same": line(passes, "length")}
    for name, results in ensembles.items():
        expected[name] = line([results], "std")
    assert table == expected


def change_of_the_half(results: dict[str, Any], order: str = "std") -> float:
    """The error of the half that is the most certain, against that of all reviews, in %."""
    errors = {row["share"]: row[order] for row in results["tables"]["selective"]}
    return 100 * (errors[50] / errors[100] - 1)


def test_the_most_certain_half_on_every_split() -> None:
    """For the variational GRU it is the better one on each, for the others the worse one on one or two."""
    (table,) = tables("uncertainty", "most certain half")
    models = ["GRU, variational", "LSTM, variational", "LSTM, naive", "GRU, naive"]
    changes, longer_half = {}, {}
    for name in models:
        row, how = INTERVALS[name]
        rows = [row, *(f"{row}-split{split}" for split in range(1, SPLITS[name]))]
        seeds = [(1, 2, 3) if name == models[0] and one == row else (1,) for one in rows]
        for order, result in (("std", changes), ("length", longer_half)):
            result[name] = [
                [change_of_the_half(evaluated(one, how, seed), order) for seed in some]
                for one, some in zip(rows, seeds, strict=True)
            ]
    means = {name: [fmean(some) for some in row] for name, row in changes.items()}
    assert table == {
        name: [f"{value:+.1f}" for value in row] + ["–"] * (5 - len(row)) for name, row in means.items()
    }
    gru, *others = ([value for some in row for value in some] for row in changes.values())
    assert [f"{value:.0f}" for value in (max(gru), min(gru))] == ["-5", "-10"]
    assert [f"{value:.0f}" for value in (min(map(min, others)), max(map(max, others)))] == ["-6", "8"]
    assert sorted(sum(value > 0 for value in row) for row in others) == [1, 2, 2]
    longer = [f"{fmean(some):.1f}" for some in longer_half[models[0]]]
    assert longer == ["5.0", "0.6", "-1.3", "4.2"]


def test_what_the_masks_of_a_chunk_change() -> None:
    """The models are the same to the bit, as the standard approximation shows."""
    (table,) = tables("uncertainty", "mean over three seeds")
    ways = [
        [evaluated("gru_variational-100", "mc50-s1", seed, in_pieces=in_pieces) for seed in (1, 2, 3)]
        for in_pieces in (True, False)
    ]
    for one, other in zip(*ways, strict=True):
        assert one["metrics"]["test_rmse"] == other["metrics"]["test_rmse"]

    def half(results: dict[str, Any]) -> float:
        return float(next(row["std"] for row in results["tables"]["selective"] if row["share"] == 50))

    measures: dict[str, tuple[Callable[[dict[str, Any]], float], int]] = {
        "error, all reviews": (lambda results: results["metrics"]["test_rmse_mc50"], 4),
        "error, most certain half": (half, 4),
        "error, mean over shares": (lambda results: results["metrics"]["test_aurc_mc50"], 4),
    }
    for level in LEVELS:
        name = f"test_coverage_{level}_mc50"
        measures[f"coverage at {level} %"] = (lambda results, name=name: 100 * results["metrics"][name], 1)
    measures["noise"] = (lambda results: results["metrics"]["noise_mc50"], 4)
    assert table == {
        name: [spread([value(results) for results in way], digits) for way in ways]
        for name, (value, digits) in measures.items()
    }

    def differences(name: str) -> list[float]:
        value, _ = measures[name]
        return [abs(value(one) - value(other)) for one, other in zip(*ways, strict=True)]

    coverage = max(max(differences(f"coverage at {level} %")) for level in LEVELS)
    errors = max(differences("error, most certain half"))
    assert f"by at most {coverage:.1f} percentage points and the error" in words_of("uncertainty")
    assert f"most certain half by {errors:.3f}, in either" in words_of("uncertainty")


def test_the_medium_row_moons_rows_does_not_over_fit() -> None:
    moon = recorded("table1/medium_moon-bf16-intel_xeon")
    curve = [epoch["valid_ppl_as_published"] for epoch in moon.epochs]
    text, last = words_of("moon"), moon.epochs[-1]
    rises = {n: curve[n - 1] - curve[n - 2] for n in range(2, 40) if curve[n - 1] > curve[n - 2]}
    assert list(rises) == [32, 36] and max(rises.values()) < 0.05
    assert f"from {curve[0]:.1f} to {curve[-1]:.1f}; training perplexity ends at" in text
    ends = f"{last['train_ppl_dropout']:.1f} with dropout and at {moon.result['train_ppl']:.1f} without"
    assert ends in text and f"Test is {moon.result['test_ppl']:.2f}" in text
