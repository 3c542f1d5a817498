"""The picture of an evaluation: what is drawn is what was measured."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import settings
from tests.test_assessment import assessed
from vdrop_cli import evaluation_pictures, pictures
from vdrop_cli.errors import ConfigError
from vdrop_cli.evaluation_pictures import language_model, require_writable

MC = [{"samples": n, "ppl": 100.0 - n, "deviation": d} for n, d in ((1, 2.0), (5, 1.0), (10, None))]
RELIABILITY = [
    {"probability": "0.00 to 0.07", "tokens": 30, "confidence": 0.05, "accuracy": 0.1},
    {"probability": "0.93 to 1.00", "tokens": 10, "confidence": 1.0, "accuracy": 0.75},
]
METRICS = {"test_ppl": 95.0}


def evaluation(*overrides: str) -> Any:
    return settings("checkpoint=a", *overrides, command="eval")


def test_perplexity_by_number_of_passes_and_the_standard_approximation_as_a_line() -> None:
    (axes,) = language_model({"metrics": METRICS, "mc": MC}).axes
    curve, line = axes.lines[0], axes.lines[-1]
    assert [list(curve.get_xdata()), list(curve.get_ydata())] == [[1, 5, 10], [99, 95, 90]]
    assert set(line.get_ydata()) == {95} and line.get_label() == "standard approximation"
    (bars,) = [c for c in axes.collections if len(c.get_paths()) == 3]
    heights = [path.vertices[:, 1].tolist() for path in bars.get_paths()]
    assert heights == [[97, 101], [94, 96], [90, 90]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "5", "10"]
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "test perplexity"


def test_a_reliability_diagram_for_each_way_to_predict() -> None:
    averaged = [row | {"accuracy": row["accuracy"] / 2} for row in RELIABILITY]
    tables = {"reliability": RELIABILITY, "reliability_mc": averaged}
    _, axes = language_model({"metrics": METRICS, "mc": MC, "tables": tables}).axes
    diagonal, standard, mean = axes.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    assert [list(standard.get_xdata()), list(standard.get_ydata())] == [[0.05, 1], [0.1, 0.75]]
    assert list(mean.get_ydata()) == [0.05, 0.375]
    assert standard.get_linestyle() != mean.get_linestyle()
    shares = [(bar.get_x(), bar.get_height()) for bar in axes.patches]  # type: ignore[attr-defined]
    assert shares == [(pytest.approx(0), 0.75), (pytest.approx(14 / 15), 0.25)]
    (alone,) = language_model({"metrics": METRICS, "tables": {"reliability": RELIABILITY}}).axes
    assert len(alone.lines) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["picture=a.gif", "mc_samples=3"], r"^picture must end in \.png, \.svg, \.pdf, got a\.gif"),
        (["picture=a", "mc_samples=3"], r"^picture must end in "),
        (["picture=mine.png", "mc_samples=3"], r"mine\.png was not written by vdrop, .*choose another file"),
    ],
)
def test_a_file_that_cannot_be_written_is_an_error_before_anything_is_evaluated(
    overrides: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.png").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=message):
        require_writable(evaluation(*overrides))


def test_without_the_extra_that_draws_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    require_writable(evaluation("mc_samples=3"))
    with pytest.raises(ConfigError, match=r"pictures need matplotlib; pip install 'vdrop\[plot\]'"):
        require_writable(evaluation("picture=a.png", "mc_samples=3"))


@pytest.mark.parametrize("ending", evaluation_pictures.pictures.ENDINGS)
def test_a_picture_is_written_where_the_settings_name_a_file(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    chosen = evaluation(f"picture={path}", "mc_samples=3")
    for _ in range(2):
        require_writable(chosen)
        evaluation_pictures.write({"metrics": METRICS, "mc": MC}, None, chosen)
    assert pictures.is_drawing(path.read_bytes())


def test_of_ratings_the_assessment_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    evaluation_pictures.write(
        {"metrics": {}}, assessed(), evaluation(f"picture={path}", "interval=conformal")
    )
    assert pictures.is_drawing(path.read_bytes())
