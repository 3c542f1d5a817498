"""Pictures: what is drawn is what was measured, and can be told apart without colour."""

from pathlib import Path
from typing import Any

import pytest

from vdrop_cli import pictures
from vdrop_cli.errors import ConfigError
from vdrop_cli.runs import Finished


def finished(*perplexities: float) -> Finished:
    epochs: list[dict[str, Any]] = [
        {"kind": "epoch", "epoch": number, "valid_ppl_batched": ppl, "train_ppl_dropout": ppl - 1}
        for number, ppl in enumerate(perplexities, 1)
    ]
    return Finished(Path(), {}, epochs, {})


def test_a_curve_for_each_run_and_one_more_for_its_training() -> None:
    runs = {"a": finished(9, 8, 7), "b": finished(6, 5)}
    (axes,) = pictures.learning_curves(runs, training=False).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[9, 8, 7], [6, 5]]
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2, 3], [1, 2]]
    assert len({line.get_marker() for line in axes.lines}) == 2
    assert (axes.get_xlabel(), axes.get_ylabel()) == (
        "epoch",
        "validation perplexity, in batches (log scale)",
    )
    (axes,) = pictures.learning_curves(runs, training=True).axes
    assert [line.get_label() for line in axes.lines] == [
        "a: validation",
        "a: training, dropout on",
        "b: validation",
        "b: training, dropout on",
    ]
    assert list(axes.lines[1].get_ydata()) == [8, 7, 6] and axes.lines[1].get_linestyle() == ":"


def test_perplexities_can_be_read_off_the_axis() -> None:
    (axes,) = pictures.learning_curves({"a": finished(250, 120, 95)}, training=False).axes
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert {100, 110, 120, 150, 200, 250} <= {round(tick) for tick in shown} and len(shown) < 15
    (axes,) = pictures.learning_curves({"a": finished(9000, 120, 95)}, training=False).axes
    assert len([tick for tick in axes.get_yticks() if 95 <= tick <= 9000]) < 10


def test_errors_on_test_and_training_by_epoch() -> None:
    epochs = [
        {"kind": "epoch", "epoch": n, "test_rmse": 0.2 - n / 100, "train_rmse": 0.1 - n / 100}
        for n in (1, 2, 3)
    ]
    (axes,) = pictures.error_curves({"a": Finished(Path(), {}, epochs, {})}).axes
    assert [line.get_label() for line in axes.lines] == ["a: test", "a: training"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.19, 0.18, 0.17])
    assert (
        list(axes.lines[1].get_ydata()) == pytest.approx([0.09, 0.08, 0.07])
        and axes.lines[1].get_linestyle() == ":"
    )
    assert "rating units" in axes.get_ylabel()


def test_mc_by_number_of_passes_with_its_deviation() -> None:
    rows = [{"samples": n, "ppl": 100.0 - n, "deviation": d} for n, d in ((1, 2.0), (5, 1.0), (10, None))]
    (axes,) = pictures.by_samples({"a": rows}).axes
    assert list(axes.lines[0].get_xdata()) == [1, 5, 10] and list(axes.lines[0].get_ydata()) == [99, 95, 90]
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize("published", [{}, {"b": 5500.0}])
def test_speeds_measured_and_published(published: dict[str, float]) -> None:
    figure = pictures.speeds({"a": 1000.0}, published, ["a CPU", "a GPU"])
    (axes,) = figure.axes
    assert sorted(bar.get_width() for bar in axes.patches) == sorted([1000.0, *published.values()])  # type: ignore[attr-defined]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", *published]
    assert "words a second" in axes.get_xlabel()
    assert figure.legends[0].get_texts()[0].get_text() == "measured, a CPU, a GPU"


def test_they_are_written_where_there_is_no_folder_yet(tmp_path: Path) -> None:
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        path = tmp_path / "new" / f"a.{ending}"
        pictures.save(pictures.speeds({"a": 1.0}, {}, ["x"]), path)
        assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_only_drawings_are_overwritten(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    for _ in range(2):
        pictures.save(pictures.speeds({"a": 1.0}, {}, ["x"]), path)
    path.write_bytes(b"%PDF mine")
    with pytest.raises(ConfigError, match=rf"a\.{ending} was not written by vdrop, .*; choose another file"):
        pictures.save(pictures.speeds({"a": 1.0}, {}, ["x"]), path)
    assert path.read_bytes() == b"%PDF mine"


def test_names_that_are_there_twice_are_told_apart() -> None:
    assert pictures.labels(["a", "b", "a"], ["bf16", "bf16", "fp32"]) == ["a (bf16)", "b", "a (fp32)"]


def test_what_draws_is_an_extra_whose_lack_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    for draw in (
        lambda: pictures.learning_curves({"a": finished(9, 8)}, training=False),
        lambda: pictures.by_samples({}),
    ):
        with pytest.raises(ConfigError, match=r"pictures need matplotlib; pip install 'vdrop\[plot\]'"):
            draw()
