"""The gradients of a training step, on a GPU as one CUDA graph.

The forward and backward pass of a step launch some hundred kernels. The processor takes longer to launch them
than the GPU takes to run them. Where the shapes of a step occur again, all kernels are captured as one graph,
which needs one launch. The graph reads copies of the batch, the state and the masks; it reads the weights in
place.
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

TOLERANCE = 5e-3  # relative error in the checks: with and without a graph, only the order of sums differs
SMALLEST_NORM = 1e-30  # the smallest norm by which an error is divided
LOSS_AND_NORM = "loss_and_norm"
CHECKED_CALLS = (2, 3)  # call 2 captures the graph; call 3 is its first replay with another batch
GraphFactory = Callable[[Capture], Graphs]


class GradientStep:
    """Computes loss, norm and gradients of a batch, and the state after it.

    `loss` is a function of the batch (a named tuple), the state and the masks. With `graphs` it is captured,
    so it must not wait for the GPU, and of the batch it may use only the tensors. The first two replays, with
    the captured batch and with another batch, are compared with the same step without a graph. Where the
    results differ, a warning is given, and all further steps run without a graph.
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
        """Frees the graph and its memory, gradients included; further steps run without a graph."""
        if self.graphs is not None:
            self.graphs = None
            self.set_gradients([None] * len(self.optimiser.parameters))

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
        """Runs forward and backward pass on these tensors; writes loss and norm, and overwrites the state.

        The loops over time inside are not captured as graphs of their own, which would never be used again.
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
        """Captures the step as a graph whose replay also sets the gradients of the weights.

        The gradients are tensors in the graph's memory.
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
        """Runs a step with and without a graph; where the results differ, those without a graph are used."""
        results = changed | filled
        expected = {name: tensor.clone() for name, tensor in results.items()}
        is_too_large = False
        try:
            self.compute(**expected, **read)
            gradients = [None if g is None else g.clone() for g in self.get_gradients()]
        except torch.OutOfMemoryError:  # beside the graph's memory there is no room for a second step
            is_too_large = True
        if is_too_large:  # after the `except` block, whose traceback holds the memory of the failed step
            self.stop_graphs("the GPU's memory is too small for the check of its graph")
            graphs.entries.clear()  # frees the graph, which the caller's argument holds, too
            expected.clear()
            self.set_gradients([None] * len(self.optimiser.parameters))
            torch.cuda.empty_cache()
            self.compute(**results, **read)
            return
        graphs.run(self.compute, changed, filled, read)
        if not graphs.entries:
            self.graphs = None  # the capture failed, with a warning that says why
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
    """Returns a factory for the graph of a training step, of one shape; None where steps have no graph."""
    if not (can_be_captured and backend is Backend.triton and device.type == "cuda"):
        return None
    return lambda capture: Graphs(capture, max_graphs=1, name="a training step")


def tensors_of(batch: Any) -> dict[str, Tensor | None]:
    """The fields of a batch that are tensors, or None."""
    fields: dict[str, Any] = batch._asdict()
    return {name: value for name, value in fields.items() if value is None or isinstance(value, Tensor)}


def largest_error(actual: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """Returns the largest relative error of these tensors.

    It is NaN where a tensor contains NaN, and infinity where a tensor is None on one side only.
    """
    if [a is None for a in actual] != [e is None for e in expected]:
        return float("inf")
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if a is not None and e is not None]
    errors = [((a - e).norm() / e.norm().clamp(min=SMALLEST_NORM)).double() for a, e in pairs]
    return float(torch.stack(errors).max())  # torch's maximum is NaN where an error is NaN
