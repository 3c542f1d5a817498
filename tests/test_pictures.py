"""Pictures: what is drawn is what was measured, and curves differ without colour."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import settings
from vdrop_cli import pictures
from vdrop_cli.errors import ConfigError
from vdrop_cli.pictures import TimedPerplexity
from vdrop_cli.runs import Finished
from vdrop_cli.settings.fields import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def finished(*perplexities: float, dropout: str = "none") -> Finished:
    epochs: list[dict[str, Any]] = [
        {"kind": "epoch", "epoch": number, "valid_ppl_batched": ppl, "train_ppl_dropout": ppl - 1}
        for number, ppl in enumerate(perplexities, 1)
    ]
    return Finished(Path(), plain(settings(f"dropout={dropout}")), epochs, {})


def legend(figure: "Figure") -> list[str]:
    (only,) = figure.legends
    return [text.get_text() for text in only.get_texts()]


def test_a_curve_for_each_run_and_one_more_for_its_training() -> None:
    runs = {"a": finished(9, 8, 7), "b": finished(6, 5)}
    figure = pictures.learning_curves(runs, training=False)
    (axes,) = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[9, 8, 7], [6, 5]]
    assert [list(line.get_xdata()) for line in axes.lines] == [[1, 2, 3], [1, 2]]
    assert len({line.get_marker() for line in axes.lines}) == 2
    assert axes.get_xlabel() == "epoch" and "validation perplexity" in axes.get_ylabel()
    assert legend(figure) == ["a", "b"] and not axes.get_title()
    figure = pictures.learning_curves(runs, training=True, title="Mine")
    (axes,) = figure.axes
    assert legend(figure) == ["a", "b", "validation", "training, dropout on"]
    assert list(axes.lines[1].get_ydata()) == [8, 7, 6] and axes.lines[1].get_linestyle() == ":"
    assert axes.get_title() == "Mine"


def test_runs_of_several_seeds_are_one_curve_with_a_band_over_the_epochs_of_all() -> None:
    figure = pictures.learning_curves({"a": [finished(9, 8, 7), finished(7, 4)]}, training=False)
    (axes,) = figure.axes
    (line,) = axes.lines
    assert list(line.get_ydata()) == [8, 6]
    (band,) = axes.collections
    assert {tuple(corner) for corner in band.get_paths()[0].vertices} == {(1, 7), (2, 4), (2, 8), (1, 9)}
    assert "band" in axes.get_xlabel()


def test_a_policy_has_its_colour_in_every_picture() -> None:
    names = ("none", "zaremba", "naive", "moon", "variational", "variational_untied")
    (axes,) = pictures.learning_curves(
        {name: finished(9, 8, dropout=name) for name in names}, training=False
    ).axes
    colours = [line.get_color() for line in axes.lines]
    assert len(set(colours)) == len(names)
    (axes,) = pictures.learning_curves({"a": finished(9, 8, dropout="naive")}, training=False).axes
    assert axes.lines[0].get_color() == colours[2]


@pytest.mark.parametrize(
    "label", ["short", "a label that is much longer than a legend beside the axes can be"]
)
def test_the_legend_is_outside_the_axes(label: str) -> None:
    figure = pictures.learning_curves({f"{label} {n}": finished(9, 8) for n in range(6)}, training=True)
    figure.draw_without_rendering()
    (box,) = (one.get_window_extent() for one in figure.legends)
    assert not box.overlaps(figure.axes[0].get_window_extent())
    assert figure.bbox.containsx(box.x1) and figure.bbox.containsy(box.y0)


def test_perplexities_can_be_read_off_the_axis() -> None:
    (axes,) = pictures.learning_curves({"a": finished(250, 120, 95)}, training=False).axes
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert {100, 110, 120, 150, 200, 250} <= {round(tick) for tick in shown} and len(shown) < 15
    (axes,) = pictures.learning_curves({"a": finished(9000, 120, 95)}, training=False).axes
    assert len([tick for tick in axes.get_yticks() if 95 <= tick <= 9000]) < 10


def test_errors_on_test_and_training_by_epoch_with_baselines_as_lines() -> None:
    epochs = [
        {"kind": "epoch", "epoch": n, "test_rmse": 0.2 - n / 100, "train_rmse": 0.1 - n / 100}
        for n in (1, 2, 3)
    ]
    run = Finished(Path(), plain(settings("task=sentiment")), epochs, {"test_rmse_of_mean": 0.185})
    figure = pictures.curves({"a": run, "b": run})
    (axes,) = figure.axes
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.19, 0.18, 0.17])
    assert (
        list(axes.lines[1].get_ydata()) == pytest.approx([0.09, 0.08, 0.07])
        and axes.lines[1].get_linestyle() == ":"
    )
    assert [list(line.get_ydata()) for line in axes.lines if list(line.get_xdata()) == [0, 1]] == [
        [0.185, 0.185]
    ]
    assert legend(figure)[:4] == ["a", "b", "test", "training"] and "mean" in legend(figure)[4]
    assert axes.get_ylabel().startswith("RMSE")


def test_mc_by_number_of_passes_with_its_deviation() -> None:
    rows = [{"samples": n, "ppl": 100.0 - n, "deviation": d} for n, d in ((1, 2.0), (5, 1.0), (10, None))]
    (axes,) = pictures.samples_figure({"a": rows}).axes
    assert list(axes.lines[0].get_xdata()) == [1, 5, 10] and list(axes.lines[0].get_ydata()) == [99, 95, 90]
    (bars,) = axes.collections
    ends = [[y for _, y in bar] for bar in bars.get_segments()]  # type: ignore[attr-defined]
    assert ends == [[97, 101], [94, 96], [90, 90]]
    assert axes.get_xscale() == "log"


def test_perplexity_by_hours_measured_and_published() -> None:
    alone, shared = TimedPerplexity(2.0, 70.0, False), TimedPerplexity(3.0, 80.0, True)
    figure = pictures.hours_figure({"a": alone, "b": shared}, {"c": 60.0})
    (axes,) = figure.axes
    *points, line = axes.lines
    assert [(*point.get_xdata(), *point.get_ydata()) for point in points] == [(2.0, 70.0), (3.0, 80.0)]
    assert [point.get_markerfacecolor() == "white" for point in points] == [False, True]
    assert list(line.get_ydata()) == [60.0, 60.0]
    assert axes.get_xlim()[0] == 0.0 and axes.get_ylim()[0] < 60.0
    assert legend(figure) == ["a", "≤ b", "published: c"]


@pytest.mark.parametrize("published", [{}, {"b": 5500.0}])
def test_speeds_measured_and_published(published: dict[str, float]) -> None:
    figure = pictures.speeds({"a": 1000.0}, published)
    (axes,) = figure.axes
    bars = {group.get_label(): [bar.get_width() for bar in group] for group in axes.containers}
    theirs = {"published, a GPU of 2015": [*published.values()]} if published else {}
    assert bars == {"measured": [1000.0], **theirs}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", *published]
    assert "words a second" in axes.get_xlabel()
    assert legend(figure)[0] == "measured"


def test_they_are_written_where_there_is_no_folder_yet(tmp_path: Path) -> None:
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        path = tmp_path / "new" / f"a.{ending}"
        pictures.save(pictures.speeds({"a": 1.0}, {}), path)
        assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_only_drawings_are_overwritten(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    for _ in range(2):
        pictures.save(pictures.speeds({"a": 1.0}, {}), path)
    path.write_bytes(b"%PDF mine")
    with pytest.raises(ConfigError, match=rf"a\.{ending} was not written by vdrop, .*; choose another file"):
        pictures.save(pictures.speeds({"a": 1.0}, {}), path)
    assert path.read_bytes() == b"%PDF mine"


def test_equal_names_become_different() -> None:
    assert pictures.labels(["a", "b", "a"], ["bf16", "bf16", "fp32"]) == ["a (bf16)", "b", "a (fp32)"]


def test_without_the_extra_that_draws_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    for draw in (
        lambda: pictures.learning_curves({"a": finished(9, 8)}, training=False),
        lambda: pictures.samples_figure({}),
    ):
        with pytest.raises(ConfigError, match=r"pictures need matplotlib; pip install 'vdrop\[plot\]'"):
            draw()
