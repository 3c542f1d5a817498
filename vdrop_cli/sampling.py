"""MC dropout for any model: passes with dropout on in evaluation mode, their mean and standard deviation.

S passes
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

# By the id of each module that drops: the threads that have changed its mode and will restore it.
SWITCHING: dict[int, list[int]] = {}
LOCK = threading.RLock()  # of SWITCHING; reentrant, as garbage collection may close a context in this thread
# In evaluation mode their fast path skips the dropout of their parts.
WITH_FAST_PATH = (nn.TransformerEncoderLayer, nn.TransformerEncoder)


def drops(module: nn.Module) -> bool:
    """Whether a module itself drops anything in training mode."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase):
        return module.num_layers > 1 and module.dropout > 0
    return isinstance(module, nn.MultiheadAttention) and module.dropout > 0


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Restores the mode of every module, training or evaluation, at the end of the context.

    All threads share the mode of a module. So RuntimeError is raised while another thread is inside this
    context with a module that drops.
    """
    thread, modules = threading.get_ident(), list(model.modules())
    dropping = [module for module in modules if drops(module)]
    with LOCK:
        if any(set(SWITCHING.get(id(module), ())) - {thread} for module in dropping):
            raise RuntimeError(
                f"the dropout of the {type(model).__name__} is on in another thread, where this one would "
                "turn it off; give each thread a copy of the model"
            )
        for module in dropping:
            SWITCHING.setdefault(id(module), []).append(thread)
        modes = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        with LOCK:
            for module, training in modes:
                module.training = training
            for module in dropping:
                SWITCHING[id(module)].pop()
                if not SWITCHING[id(module)]:
                    del SWITCHING[id(module)]


@contextmanager
def mc_dropout(model: nn.Module) -> Iterator[nn.Module]:
    """Turns on the dropout of a model and nothing else; every flag is restored afterwards.

    Batch norm, for example, stays in its mode. The dropout that is turned on is that of `nn.Dropout` and its
    relatives, the layers, cells and modules of this library, `nn.MultiheadAttention`, Transformer layers, and
    `nn.LSTM` between its layers. Calls of `torch.nn.functional.dropout` cannot be turned on. Raises
    ValueError where nothing in the model drops, RuntimeError while another thread has the model's dropout
    turned on.
    """
    modules = list(model.modules())
    if not any(map(drops, modules)):
        raise ValueError(
            f"model must drop something: no module of the {type(model).__name__} has a dropout probability "
            "above 0"
        )
    with restored_modes(model):
        for module in modules:
            skips_dropout = isinstance(module, WITH_FAST_PATH) and any(
                drops(part) for part in module.modules()
            )
            if drops(module) or skips_dropout:
                module.training = True
        yield model


class Prediction(NamedTuple):
    """Mean and standard deviation of S passes, in the shape of the model's output."""

    mean: Tensor
    std: Tensor  # standard deviation over passes, with S - 1; zero for one pass
    samples: Tensor | None = None  # [S, …], with `return_samples`


def drops_weights(name: str, module: nn.Module) -> bool:
    """Whether a module draws masks on weights: by `WeightDrop`, or by `p_weight` of a layer."""
    is_parametrization = "parametrizations" in name and isinstance(module, nn.Dropout)
    return is_parametrization or getattr(module, "drops_weights", False)


@torch.no_grad()
def predict_mc(
    model: nn.Module,
    x: Any,
    samples: int,
    *,
    forward: Callable[[Any], Tensor] | None = None,
    batch: int = 1,
    dim: int | None = None,
    return_samples: bool = False,
) -> Prediction:
    """Returns mean and standard deviation of `samples` passes of MC dropout of `model(x)`.

    A pass is `forward(x)`, by default `model(x)`, and must return one tensor. `forward` is for a model with
    more arguments or another output, as `forward=lambda x: model(x, lengths=lengths)[0]`. `x` can be anything
    that it takes.

    `batch` passes run at once, after a first one alone: the tensor `x` is repeated along `dim`, the dimension
    of the sequences in `x` and in the output (0 where the batch comes first, 1 where time does). This is
    usually faster, with the same distribution if each sequence has its own masks. Modules without dropout are
    in evaluation mode during the passes. Masks come from torch's global random state. Sums are in float64 (on
    MPS, which lacks it, in float32); mean and standard deviation have the type of the output, or float32
    where the output is integers.

    Raises TypeError for a `model` that is no module, for an output that is no tensor, and with `batch` > 1
    for an `x` that is none; ValueError for `batch` > 1 without `dim` or with dropped weights (`WeightDrop`,
    `p_weight`), which all passes of a batch would share, and for an output that with `batch` > 1 has no
    dimension `dim` of the sequences.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; give a function that calls the "
            "model as forward=…"
        )
    if batch > 1 and not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor with batch > 1, got {type(x).__name__}; use batch=1")
    if samples < 1 or batch < 1:
        raise ValueError(f"samples and batch must be at least 1, got {samples} and {batch}")
    if batch > 1 and dim is None:
        raise ValueError(
            "dim is required with batch > 1: the dimension of sequences, 0 where the batch comes first, 1 "
            "where time does"
        )
    if batch > 1 and any(drops_weights(name, module) for name, module in model.named_modules()):
        raise ValueError(
            "batch must be 1 for a model with dropped weights, which all passes of a batch would share"
        )
    forward, dim = forward or model, 0 if dim is None else dim
    size = x.shape[dim] if batch > 1 else 0
    total = squares = first = None
    outputs = []
    with restored_modes(model), mc_dropout(model.eval()):
        # The first pass is made alone. So an output whose dimension `dim` is not that of the sequences is an
        # error, even if one of the two calls returns as many rows there as it should.
        for start in (0, *range(1, samples, batch)):
            passes = min(batch, samples - start) if start else 1
            y = forward(x if passes == 1 else torch.cat([x] * passes, dim))
            if not isinstance(y, Tensor):
                raise TypeError(
                    f"model must return one tensor, got {type(y).__name__}; forward=lambda x: … selects one, "
                    "as model(x)[0]"
                )
            if batch > 1 and (not -y.dim() <= dim < y.dim() or y.shape[dim] != passes * size):
                raise ValueError(
                    f"model must return one tensor with {passes * size} rows in dimension {dim}, that of the "
                    f"sequences in x, for batch > 1, got {list(y.shape)}; use batch=1"
                )
            for one in torch.split(y, size, dim) if batch > 1 else (y,):
                value = one.double() if one.device.type != "mps" else one.float()
                first = value if first is None else first
                difference = value - first  # its sums stay exact where the mean is large
                total = difference if total is None else total + difference
                squares = difference.square() if squares is None else squares + difference.square()
                if return_samples:
                    outputs.append(one)
    assert first is not None and total is not None and squares is not None
    variance = (squares - total.square() / samples).clamp(min=0) / max(1, samples - 1)
    dtype = y.dtype if y.dtype.is_floating_point else torch.float32
    return Prediction(
        (first + total / samples).to(dtype),
        variance.sqrt().to(dtype),
        torch.stack(outputs) if return_samples else None,
    )
