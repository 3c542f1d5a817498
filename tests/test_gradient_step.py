"""What is copied, handed on and checked around the graph of a step. The calls that capture and replay one are
stood in for by the step itself, which writes into the same memory; tests/test_gpu.py has real ones.
"""

import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, settings
from vdrop_cli import training
from vdrop_cli.corpora import Corpus
from vdrop_cli.dropout import ModelMasks
from vdrop_cli.gradient_step import GradientStep
from vdrop_cli.kernels.graphs import Capture, Graph, Graphs
from vdrop_cli.layers import State
from vdrop_cli.settings.train import Train
from vdrop_cli.tasks import LanguageModelling
from vdrop_cli.tasks.objective import Objective
from vdrop_cli.training import Run


class Recorder:
    """A `Capture` whose graphs repeat the step: with the batch and masks of the capture where it is `stale`,
    as a graph repeats what it does not read from its memory.
    """

    def __init__(self, *, is_stale: bool = False) -> None:
        self.step: GradientStep
        self.is_stale = is_stale
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], None], device: torch.device) -> Graph:
        self.captures += 1
        run()  # as `graphs.capture` does; what it writes must not be seen
        run()
        parameters, batch = self.step.optimiser.parameters, self.step.batch
        gradients = [parameter.grad for parameter in parameters]

        def replay() -> None:
            self.replays += 1
            if self.is_stale:
                self.step.batch = batch
            run()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    assert parameter.grad is not None
                    gradient.copy_(parameter.grad)
                parameter.grad = None  # no replay sets it

        return Graph(replay, 0)


def graphs_anywhere(capture: Capture) -> Graphs:
    return Graphs(capture, possible=lambda device: True, max_graphs=1, name="a training step")


def run_of(folder: Path, *overrides: str) -> Run:
    words = [(i * i + i // 7) % 23 for i in range(600)]
    ids = {word: number for number, word in enumerate(dict.fromkeys(words))}
    train_N, short_N = (torch.tensor([ids[word] for word in words[:length]]) for length in (600, 60))
    corpus = Corpus([str(word) for word in ids], train_N, short_N, short_N, "here", "f")
    config: Train = settings(*TINY, *overrides)
    return Run(config, LanguageModelling(config.task, corpus, torch.device("cpu")), folder)


def with_graph(run: Run, capture: Recorder) -> Run:
    """The same run with a graph of its steps."""
    step = GradientStep(run.gradient_step.loss, run.optimiser, graphs_anywhere, capture)
    run.gradient_step = capture.step = step
    return run


def numbers(run: Run, steps: int) -> list[tuple[float, float]]:
    return [(step.loss, step.grad_norm) for step in islice(run.train_epoch(), steps)]


@pytest.mark.parametrize(
    "overrides",
    [
        ["dropout=none"],
        ["dropout=variational", "model.tie_embeddings=true", "dropout.word_mask=token"],
        ["dropout=variational_untied", "task.reset=0.5", "task.ar=2", "task.tar=1"],
        ["dropout=naive_word", "schedule=zaremba", "schedule.optimiser=adam", "schedule.lr=0.01"],
        [
            "dropout=variational",
            "dropout.p_weight=0.4",
            "dropout.p_h=0",
            "schedule.average_decay=0.9",
            "schedule.average_from=0",
        ],
        ["dropout=moon_word"],
        ["model=gru_small", "dropout=variational", "model.hidden_size=8"],
        ["dropout=variational", "model.tie_embeddings=true", "model.embedding_size=6", "dropout.p_head=0.3"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_a_graph_of_the_step_changes_nothing(overrides: list[str], tmp_path: Path) -> None:
    """Neither losses nor norms nor weights nor the carried state; each batch and its masks are read."""
    plain = run_of(tmp_path, *overrides)
    capture = Recorder()
    graphed = with_graph(run_of(tmp_path, *overrides), capture)
    assert numbers(graphed, 12) == numbers(plain, 12)
    assert (capture.captures, capture.replays) == (1, 11)
    for actual, expected in zip(
        [*graphed.model.parameters(), *graphed.state], [*plain.model.parameters(), *plain.state], strict=True
    ):
        assert torch.equal(actual, expected)


def test_a_state_that_was_returned_stays(tmp_path: Path) -> None:
    run = with_graph(run_of(tmp_path, "dropout=variational"), Recorder())
    steps = run.train_epoch()
    list(islice(steps, 4))
    state = run.state
    before = [part.clone() for part in state]
    list(islice(steps, 2))
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_a_loss_that_depends_on_more_than_tensors_is_found_out(tmp_path: Path) -> None:
    """A graph would repeat what it was at the capture."""

    def numbered_run() -> Run:
        run = run_of(tmp_path, "dropout=variational")
        task_loss = run.gradient_step.loss

        def numbered(batch: Any, state: State, masks: ModelMasks) -> Objective:
            descended, reported, state = task_loss(batch, state, masks)
            return Objective(descended * (1 + batch.number), reported, state)

        run.gradient_step.loss = numbered
        return run

    plain, capture = numbered_run(), Recorder(is_stale=True)
    graphed = with_graph(numbered_run(), capture)
    with pytest.warns(
        UserWarning, match=r"^training steps run without a CUDA graph.*a replay is off by 0\.\d"
    ):
        actual = numbers(graphed, 8)
    assert actual == numbers(plain, 8) and capture.replays == 2
    for a, b in zip(graphed.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_where_the_capture_fails_steps_run_without_a_graph_and_say_so_once(tmp_path: Path) -> None:
    def failing(run: Callable[[], None], device: torch.device) -> Graph:
        run()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    plain = run_of(tmp_path, "dropout=variational")
    graphed = run_of(tmp_path, "dropout=variational")
    graphed.gradient_step = GradientStep(
        graphed.gradient_step.loss, graphed.optimiser, graphs_anywhere, failing
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = numbers(graphed, 6)
    assert actual == numbers(plain, 6) and graphed.gradient_step.graphs is None
    assert [str(warning.message) for warning in caught] == [
        "a training step runs without a CUDA graph, which is slower: the capture failed with RuntimeError: "
        "operation not permitted when stream is capturing"
    ]


def test_a_loss_that_is_not_finite_says_nothing_of_the_graph(tmp_path: Path) -> None:
    run = with_graph(run_of(tmp_path, "dropout=none"), Recorder())
    with torch.no_grad():
        run.model.embedding.fill_(torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(training.Diverged, match="the loss is nan"):
            numbers(run, 3)


@pytest.mark.parametrize(
    ("overrides", "repeats"),
    [
        ([], True),
        (["task.random_length=true", "task.bptt=10"], False),
        (["task.augmented_loss=1", "task.augmented_temperature=2", "model.tie_embeddings=true"], False),
    ],
)
def test_only_steps_that_repeat_their_shapes_and_do_not_wait_are_captured(
    overrides: list[str], repeats: bool, tmp_path: Path
) -> None:
    run = run_of(tmp_path, "dropout=none", *overrides)
    assert run.task.repeats_shapes is repeats
    assert run.gradient_step.graphs is None, "a CPU has no graphs"
