"""The steps do the work that their names say: products are counted, and models learn."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import require_torch_lstm, settings
from vdrop_cli.bench.cases import Case
from vdrop_cli.bench.steps import (
    MC_WORDS,
    build,
    mc_step,
    products_step,
    random_ratings,
    ratings_step,
    words_per_time_step,
)
from vdrop_cli.settings.choices import BenchCell, BenchPart, BenchSize, Precision


def test_products_alone_are_all_the_products_that_the_limit_counts() -> None:
    """6 operations a parameter and word, as torch counts them."""
    train = settings(
        "device=cpu",
        "model=lstm_small",
        "model.hidden_size=24",
        "task.bptt=3",
        "task.batch_size=2",
        "dropout=variational",
    )
    with FlopCounterMode(display=False) as counter:
        products_step(train, Precision.fp32, words_per_time_step(train, BenchPart.step), 10_000)()
    words, parameters = 3 * 2, 2 * 8 * 24**2 + 10_000 * 24
    assert counter.get_total_flops() == 6 * words * parameters


def test_products_of_a_step_of_ratings_are_of_all_words_but_no_padding() -> None:
    train = settings(
        "device=cpu", "task=sentiment", "model.hidden_size=24", "task.batch_size=8", "task.chunk_words=9"
    )
    rows = words_per_time_step(train, BenchPart.ratings)
    assert rows[0] == 8 and rows[-1] == 5 and rows == sorted(rows, reverse=True)
    with FlopCounterMode(display=False) as counter:
        products_step(train, Precision.fp32, rows, 0)()
    assert counter.get_total_flops() == 6 * int(random_ratings(train)[1].sum()) * 8 * 24**2


def test_a_ratings_step_reads_texts_like_the_reviews_and_learns() -> None:
    train = settings(
        "device=cpu",
        "task=sentiment",
        "model.hidden_size=24",
        "task.batch_size=8",
        "task.chunk_words=9",
        "dropout=none",
    )
    ids_TB, lengths_B, targets_B = random_ratings(train)
    assert (
        ids_TB.shape == (9, 8)
        and lengths_B.tolist()[:5] == [9] * 5
        and all(1 <= length < 9 for length in lengths_B[5:])
    )
    assert int(ids_TB.max()) + 1 == 20_002 and targets_B.shape == (8,)
    (before, after) = (ratings_step(train, Precision.fp32)().read() for _ in range(2))  # type: ignore[attr-defined]
    assert before == after, "the same start"
    step = ratings_step(train, Precision.fp32)
    losses = [step().read()[0] for _ in range(30)]  # type: ignore[attr-defined]
    assert losses[-1] < losses[0], "it learns"


def test_mc_evaluation_reads_the_text_with_all_passes() -> None:
    """Products forward only, of every pass and word. torch counts no products that add to their output: the
    recurrent ones.
    """
    train = settings(
        "device=cpu", "backend=fused", "model=lstm_small", "model.hidden_size=24", "dropout=variational"
    )
    with FlopCounterMode(display=False) as counter:
        mc_step(train, Precision.fp32, passes=7)()
    assert counter.get_total_flops() == 2 * MC_WORDS["cpu"] * 7 * (2 * 4 * 24**2 + 10_000 * 24)


@pytest.fixture
def gradients_restored() -> Iterator[None]:
    """A step of a cell switches gradients off, as its process does nothing else."""
    yield
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("gradients_restored")
@pytest.mark.parametrize(
    ("part", "cell"),
    [
        ("step", "variational"),
        ("step", "torch_lstm"),
        ("step", "products"),
        ("layer", "variational"),
        ("layer", "cell_loop"),
        ("mc", "variational"),
        ("checkpoint", "variational"),
        ("directions", "bidirectional_gru"),
        ("directions", "torch_gru"),
        ("ratings", "none"),
        ("ratings", "cell_loop"),
        ("cell_step", "variational"),
        ("cell_step", "torch_gru"),
    ],
)
def test_every_part_has_a_step_that_runs_again_and_again(part: str, cell: str, tmp_path: Path) -> None:
    require_torch_lstm(cell, Precision.bf16)
    size = BenchSize.sentiment if part == "ratings" else BenchSize.small
    overrides = ["task=sentiment", "task.chunk_words=9"] if part == "ratings" else ["task.bptt=3"]
    overrides += ["model.hidden_size=16", "task.batch_size=4", "dropout=variational", "device=cpu"]
    train = replace(settings(*overrides), outputs=str(tmp_path))
    case = Case(size, BenchPart[part], BenchCell[cell], Precision.bf16)
    step = build(case, train, mc_passes=3)
    for _ in range(2):
        step()
    written = list(tmp_path.rglob("checkpoint-*.pt"))
    assert bool(written) == (part == "checkpoint")
    del step
    assert not list(tmp_path.rglob("checkpoint-*.pt")), "the folder is removed with the step"
