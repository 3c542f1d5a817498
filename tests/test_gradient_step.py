"""What is copied, handed on and checked around the graph of a step. The calls that capture and replay one are
stood in for by the step itself, which writes into the same memory; tests/test_gpu.py has real ones.
"""

import gc
import sys
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
from vdrop_cli.gradient_step import GradientStep, graphs_of_steps
from vdrop_cli.kernels.graphs import Capture, Graph, Graphs
from vdrop_cli.layers import State
from vdrop_cli.settings.choices import Backend
from vdrop_cli.settings.train import Train
from vdrop_cli.tasks import LanguageModelling
from vdrop_cli.tasks.objective import Objective
from vdrop_cli.training import Run


class Recorder:
    """A `Capture` whose graphs repeat the step with the batch and the masks of the capture, as a graph
    repeats what it does not read from its memory. `spoil` changes what a replay has written.
    """

    def __init__(self, spoil: Callable[[GradientStep], None] = lambda step: None) -> None:
        self.step: GradientStep
        self.spoil = spoil
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], None], device: torch.device) -> Graph:
        self.captures += 1
        run()  # as `graphs.capture` does; what it writes must not be seen
        run()
        step = self.step
        parameters, batch, masks = step.optimiser.parameters, step.batch, step.masks
        gradients = [parameter.grad for parameter in parameters]

        def replay() -> None:
            self.replays += 1
            step.batch, step.masks = batch, masks
            run()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    assert parameter.grad is not None
                    gradient.copy_(parameter.grad)
                parameter.grad = None  # no replay sets it
            self.spoil(step)

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


def falls_back(graphed: Run, plain: Run, message: str, replays: int) -> None:
    """Steps have the results of those without a graph, and there is one warning."""
    capture = graphed.gradient_step.capture
    assert isinstance(capture, Recorder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = numbers(graphed, 8)
    assert [str(warning.message) for warning in caught] == [
        f"a training step runs without a CUDA graph, which is slower: {message}"
    ]
    assert actual == numbers(plain, 8) and capture.replays == replays
    for a, b in zip(graphed.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


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

    falls_back(with_graph(numbered_run(), Recorder()), numbered_run(), "a replay is off by 0.3", 2)


def spoilt(name: str, place: Any, value: float) -> Callable[[GradientStep], None]:
    """Sets a number of a result of each replay, or of the gradient of a parameter."""

    def spoil(step: GradientStep) -> None:
        assert step.graphs is not None
        (captured,) = step.graphs.entries.values()
        tensor = captured.tensors[name]
        assert tensor is not None
        tensor[place] = tensor[place] * value

    return spoil


@pytest.mark.parametrize("value", [1.05, torch.nan])
@pytest.mark.parametrize(("name", "place"), [("loss_and_norm", 0), ("loss_and_norm", 1), ("state.0", ...)])
def test_a_replay_that_is_off_is_found_out(name: str, place: Any, value: float, tmp_path: Path) -> None:
    """In the loss, in the small norm beside it, and in the state; NaN, too."""
    graphed = with_graph(run_of(tmp_path, "dropout=variational"), Recorder(spoilt(name, place, value)))
    message = "a replay is off by " + ("nan" if value != value else "0.05")
    falls_back(graphed, run_of(tmp_path, "dropout=variational"), message, 1)


@pytest.mark.parametrize("gradient", [None, torch.nan])
def test_a_gradient_that_is_missing_or_not_a_number_is_found_out(
    gradient: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphed = with_graph(run_of(tmp_path, "dropout=variational"), Recorder())
    step = graphed.gradient_step
    set_gradients = step.set_gradients

    def spoil(gradients: list[Any]) -> None:
        last = gradients[-1]
        is_replay = step.graphs is not None
        spoilt = [*gradients[:-1], None if gradient is None else last * gradient]
        set_gradients(spoilt if is_replay else gradients)

    monkeypatch.setattr(step, "set_gradients", spoil)
    message = f"a replay is off by {'inf' if gradient is None else 'nan'}"
    falls_back(graphed, run_of(tmp_path, "dropout=variational"), message, 1)


def test_where_memory_is_too_small_for_the_check_steps_run_without_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphed = with_graph(run_of(tmp_path, "dropout=variational"), Recorder())
    step = graphed.gradient_step
    compute, emptied = step.compute, []

    def computing(**tensors: Any) -> None:
        if step.calls == 3 and step.graphs is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert sys.exc_info()[0] is None, "a traceback holds the memory of the failed step"
        compute(**tensors)

    graphs = step.graphs
    monkeypatch.setattr(step, "compute", computing)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append((step.graphs, [*graphs.entries])))
    message = "the GPU's memory is too small for the check of its graph"
    falls_back(graphed, run_of(tmp_path, "dropout=variational"), message, 1)
    assert emptied == [(None, [])], "once the graph is gone"


def test_a_closed_step_runs_without_its_graph(tmp_path: Path) -> None:
    plain, capture = run_of(tmp_path, "dropout=variational"), Recorder()
    graphed = with_graph(run_of(tmp_path, "dropout=variational"), capture)
    steps = graphed.train_epoch()
    first = [(step.loss, step.grad_norm) for step in islice(steps, 5)]
    assert graphed.gradient_step.slow_calls == 3 and plain.gradient_step.slow_calls == 0
    graphed.gradient_step.close()
    assert all(parameter.grad is None for parameter in graphed.model.parameters())
    rest = [(step.loss, step.grad_norm) for step in islice(steps, 4)]
    assert first + rest == numbers(plain, 9) and capture.replays == 4


def test_nothing_of_a_step_outlives_it(tmp_path: Path) -> None:
    """The nodes that accumulate gradients: a capture fails if one is left of a step on another stream."""
    run = with_graph(run_of(tmp_path, "dropout=variational", "task.ar=2"), Recorder())
    inner = run.gradient_step.loss

    def node(parameter: torch.Tensor) -> Any:
        (accumulated, _), *_ = parameter.view_as(parameter).grad_fn.next_functions  # type: ignore[union-attr]
        return accumulated

    def marking(batch: Any, state: State, masks: ModelMasks) -> Objective:
        objective = inner(batch, state, masks)
        for parameter in run.optimiser.parameters:
            node(parameter).metadata["step"] = True
            assert node(parameter).metadata, "alive within the step"
        return objective

    run.gradient_step.loss = marking
    gc.collect()
    gc.disable()
    try:
        numbers(run, 4)
        assert not any(node(parameter).metadata for parameter in run.optimiser.parameters)
    finally:
        gc.enable()


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
    """It is found in the step that is captured."""
    capture = Recorder()
    run = with_graph(run_of(tmp_path, "dropout=none"), capture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(training.Diverged, match="the loss is nan"):
            for step in run.train_epoch():
                assert step.step == 1
                with torch.no_grad():
                    run.model.embedding.fill_(torch.nan)
    assert capture.captures == 1 and run.gradient_step.graphs is not None


@pytest.mark.parametrize(
    ("overrides", "can_be_captured"),
    [
        ([], True),
        (["task.random_length=true", "task.bptt=10"], False),
        (["task.augmented_loss=1", "task.augmented_temperature=2", "model.tie_embeddings=true"], False),
    ],
)
def test_losses_that_repeat_their_shapes_and_do_not_wait_can_be_captured(
    overrides: list[str], can_be_captured: bool, tmp_path: Path
) -> None:
    run = run_of(tmp_path, "dropout=none", *overrides)
    assert run.task.can_be_captured is can_be_captured
    assert run.gradient_step.graphs is None, "a CPU has no graphs"


def test_steps_of_triton_on_a_gpu_have_graphs() -> None:
    cuda, cpu = torch.device("cuda:1"), torch.device("cpu")
    assert isinstance((graphs_of_steps(True, Backend.triton, cuda) or pytest.fail)(Recorder()), Graphs)
    for arguments in (
        (False, Backend.triton, cuda),
        (True, Backend.fused, cuda),
        (True, Backend.triton, cpu),
    ):
        assert graphs_of_steps(*arguments) is None
