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
from vdrop_cli.layers import State
from vdrop_cli.optimizer import Optimizer
from vdrop_cli.tasks.objective import Objective

TOLERANCE = 1e-3  # relative error of the check, of gradients that are the same but for the order of sums
SMALLEST_NORM = 1e-30  # below which an error counts as if the exact result had this norm
LOSS_AND_NORM = "loss_and_norm"


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
        graphs: Callable[[Capture], Graphs] | None = None,
        capture: Capture = capture,
    ) -> None:
        self.loss = loss
        self.optimiser = optimiser
        self.capture = capture
        self.graphs = None if graphs is None else graphs(self.capture_gradients)
        self.is_captured, self.checks_left = False, 2
        self.batch: Any = None
        self.masks = ModelMasks([])

    def __call__(self, batch: Any, state: State, masks: ModelMasks) -> tuple[Tensor, State]:
        """Returns loss and norm, as `Optimizer.differentiate` does, and the state after the batch."""
        if self.graphs is None:
            descended, reported, state = self.loss(batch, state, masks)
            return self.optimiser.differentiate(descended, reported), state
        self.batch, self.masks = batch, masks
        changed = {f"state.{n}": part.clone() for n, part in enumerate(state)}
        filled = {LOSS_AND_NORM: state[0].new_empty(2, dtype=torch.float64)}
        read = {f"batch.{name}": value for name, value in tensors_of(batch).items()} | masks.tensors
        if self.checks_left:
            self.run_and_check(self.graphs, changed, filled, read)
        else:
            self.graphs.run(self.compute, changed, filled, read)
        return filled[LOSS_AND_NORM], tuple(changed.values())

    def compute(self, **tensors: Tensor | None) -> None:
        """Forward and backward pass on these tensors: writes loss and norm, and the new state over the old
        one.
        """
        state = tuple(t for name, t in tensors.items() if name.startswith("state.") and t is not None)
        batch = self.batch._replace(**{name: tensors[f"batch.{name}"] for name in tensors_of(self.batch)})
        with torch.enable_grad():  # graphs are captured without gradients
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
        self.is_captured = True
        gradients = self.parameter_gradients()

        def replay() -> None:
            graph.replay()
            self.set_gradients(gradients)

        return Graph(replay, graph.bytes)

    def parameter_gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self.optimiser.parameters]

    def set_gradients(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self.optimiser.parameters, gradients, strict=True):
            parameter.grad = gradient

    def run_and_check(
        self, graphs: Graphs, changed: dict[str, Tensor], filled: dict[str, Tensor], read: Tensors
    ) -> None:
        """A step with and without a graph; where they differ, the results are those without."""
        without = {name: tensor.clone() for name, tensor in (changed | filled).items()}
        self.compute(**without, **read)
        gradients = [
            None if gradient is None else gradient.clone() for gradient in self.parameter_gradients()
        ]
        graphs.run(self.compute, changed, filled, read)
        if graphs.failed:  # it said why
            self.graphs = None
        if not (self.is_captured and without[LOSS_AND_NORM].isfinite().all()):
            return
        results = changed | filled
        pairs = [(results[name], without[name]) for name in results]
        pairs += [
            (a, e)
            for a, e in zip(self.parameter_gradients(), gradients, strict=True)
            if a is not None and e is not None
        ]
        error = max(float((a - e).norm() / e.norm().clamp(min=SMALLEST_NORM)) for a, e in pairs)
        self.checks_left -= 1
        if not error < TOLERANCE:  # or NaN
            warnings.warn(
                f"training steps run without a CUDA graph, which is slower: a replay is off by {error:.1g}",
                stacklevel=2,
            )
            self.graphs = None
            for name, tensor in results.items():
                tensor.copy_(without[name])
            self.set_gradients(gradients)


def graphs_of_steps(capture: Capture) -> Graphs:
    """The graph of a training step, for one shape of batches."""
    return Graphs(capture, max_graphs=1, name="a training step")


def tensors_of(batch: Any) -> dict[str, Tensor | None]:
    """The fields of a batch that are tensors, or None."""
    fields: dict[str, Any] = batch._asdict()
    return {name: value for name, value in fields.items() if value is None or isinstance(value, Tensor)}
