"""The gradients of a training step, on a GPU as one CUDA graph.

Forward and backward pass of a step are some hundred launches, which take the processor longer than the GPU
needs for their work. Where the shapes of a step occur again, all of them are one graph, and one launch. The
graph reads copies of the batch, the state and the masks, and the weights where they are.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vdrop_cli.dropout import ModelMasks
from vdrop_cli.kernels.graphs import Capture, Graph, Graphs, Tensors, capture
from vdrop_cli.kernels.operators import use_graphs
from vdrop_cli.layers import State
from vdrop_cli.optimizer import Optimizer
from vdrop_cli.settings.choices import Backend
from vdrop_cli.tasks.objective import Objective

TOLERANCE = 5e-3  # relative error of the checks, of numbers that are the same but for the order of sums
SMALLEST_NORM = 1e-30  # below which an error counts as if the exact result had this norm
LOSS_AND_NORM = "loss_and_norm"
CHECKED_CALLS = (2, 3)  # the second is captured; the first replay of another batch is the third
GraphFactory = Callable[[Capture], Graphs]


class GradientStep:
    """Computes loss, norm and gradients of a batch, and the state after it.

    `loss` is a function of the tensors of a batch, which is a named tuple, of the state, and of the masks.
    With `graphs` it is captured, so it must neither wait for the GPU nor depend on numbers of the batch. The
    first two replays, of the batch that was captured and of another one, are compared with the same step
    without a graph. Where they differ, steps run without one from then on, with a warning.
    """

    def __init__(
        self,
        loss: Callable[[Any, State, ModelMasks], Objective],
        optimiser: Optimizer,
        graphs: GraphFactory | None = None,
        capture: Capture = capture,
    ) -> None:
        self.loss = loss
        self.optimiser = optimiser
        self.capture = capture
        self.graphs = None if graphs is None else graphs(self.capture_gradients)
        self.calls = 0
        self.batch: Any = None
        self.masks = ModelMasks([])

    @property
    def slow_calls(self) -> int:
        """How many calls take longer than the following ones, because of the capture and its checks."""
        return 0 if self.graphs is None else max(CHECKED_CALLS)

    def close(self) -> None:
        """Frees the graph and its memory; further steps run without one."""
        self.graphs = None

    def __call__(self, batch: Any, state: State, masks: ModelMasks) -> tuple[Tensor, State]:
        """Returns loss and norm, as `Optimizer.differentiate` does, and the state after the batch."""
        if self.graphs is None:
            descended, reported, state = self.loss(batch, state, masks)
            return self.optimiser.differentiate(descended, reported), state
        self.calls += 1
        self.batch, self.masks = batch, masks
        changed = {f"state.{n}": part.clone() for n, part in enumerate(state)}
        filled = {LOSS_AND_NORM: state[0].new_empty(2, dtype=torch.float64)}
        read = {f"batch.{name}": value for name, value in tensors_of(batch).items()} | masks.tensors
        if self.calls in CHECKED_CALLS:
            self.run_and_check(self.graphs, changed, filled, read)
        else:
            self.graphs.run(self.compute, changed, filled, read)
        self.batch, self.masks = None, ModelMasks([])
        return filled[LOSS_AND_NORM], tuple(changed.values())

    def compute(self, **tensors: Tensor | None) -> None:
        """Forward and backward pass on these tensors: writes loss and norm, and the new state over the old
        one.

        Loops over time have no graphs of their own, which would be of no use later.
        """
        state = tuple(t for name, t in tensors.items() if name.startswith("state.") and t is not None)
        batch = self.batch._replace(**{name: tensors[f"batch.{name}"] for name in tensors_of(self.batch)})
        with (
            torch.enable_grad(),  # graphs are captured without gradients
            use_graphs(Graphs(possible=lambda device: False)),
        ):
            descended, reported, new_state = self.loss(batch, state, self.masks.replaced(tensors))
            loss_and_norm_2 = self.optimiser.differentiate(descended, reported)
        result = tensors[LOSS_AND_NORM]
        assert result is not None
        result.copy_(loss_and_norm_2)
        for part, new_part in zip(state, new_state, strict=True):
            part.copy_(new_part)

    def capture_gradients(self, run: Callable[[], None], device: torch.device) -> Graph:
        """Captures the step. Each replay hands the weights their gradients, which are in the graph's
        memory.
        """
        graph = self.capture(run, device)
        gradients = self.get_gradients()

        def replay() -> None:
            graph.replay()
            self.set_gradients(gradients)

        return Graph(replay, graph.bytes)

    def get_gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self.optimiser.parameters]

    def set_gradients(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self.optimiser.parameters, gradients, strict=True):
            parameter.grad = gradient

    def run_and_check(
        self, graphs: Graphs, changed: dict[str, Tensor], filled: dict[str, Tensor], read: Tensors
    ) -> None:
        """A step with and without a graph; where they differ, the results are those without."""
        results = changed | filled
        expected = {name: tensor.clone() for name, tensor in results.items()}
        try:
            self.compute(**expected, **read)
            gradients = [None if g is None else g.clone() for g in self.get_gradients()]
        except torch.OutOfMemoryError:  # beside the graph's memory there is no room for a second step
            self.stop_graphs("the GPU's memory is too small for the check of its graph")
            self.set_gradients([None] * len(self.optimiser.parameters))
            torch.cuda.empty_cache()
            self.compute(**results, **read)
            return
        graphs.run(self.compute, changed, filled, read)
        if not graphs.entries:
            self.graphs = None  # where the capture failed, it said why
            return
        if not expected[LOSS_AND_NORM].isfinite().all():
            return  # training ends with this loss
        error = largest_error(
            [*changed.values(), *filled[LOSS_AND_NORM], *self.get_gradients()],
            [*(expected[name] for name in changed), *expected[LOSS_AND_NORM], *gradients],
        )
        if error < TOLERANCE:
            return
        self.stop_graphs(f"a replay is off by {error:.1g}")
        for name, tensor in results.items():
            tensor.copy_(expected[name])
        self.set_gradients(gradients)

    def stop_graphs(self, reason: str) -> None:
        """Runs steps without a graph from now on, with a warning."""
        self.graphs = None
        warnings.warn(f"a training step runs without a CUDA graph, which is slower: {reason}", stacklevel=3)


def graphs_of_steps(can_be_captured: bool, backend: Backend, device: torch.device) -> GraphFactory | None:
    """Makes the graph of a training step, of one shape; None where steps have none."""
    if not (can_be_captured and backend is Backend.triton and device.type == "cuda"):
        return None
    return lambda capture: Graphs(capture, max_graphs=1, name="a training step")


def tensors_of(batch: Any) -> dict[str, Tensor | None]:
    """The fields of a batch that are tensors, or None."""
    fields: dict[str, Any] = batch._asdict()
    return {name: value for name, value in fields.items() if value is None or isinstance(value, Tensor)}


def largest_error(actual: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """The largest relative error of these tensors; NaN where one of them has one, infinity where one is
    missing on one side alone.
    """
    if [a is None for a in actual] != [e is None for e in expected]:
        return float("inf")
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if a is not None and e is not None]
    errors = [((a - e).norm() / e.norm().clamp(min=SMALLEST_NORM)).double() for a, e in pairs]
    return float(torch.stack(errors).max())  # of torch, which does not pass over NaN
