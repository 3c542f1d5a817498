"""The doors to the masked cells: `lstm`, `gru` and `linear_cross_entropy`, one contract for every back end.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)  N tokens  V vocabulary

Weights have the layout of `torch.nn.LSTM` and `torch.nn.GRU`: `w_ih [G·H, D]`, `w_hh [G·H, H]`, `b_ih`, `b_hh
[G·H]`. Masks act on what enters a matrix product, never on the carried state (the cell mask `c` excepted,
which is part of its policy). Sequences with `lengths [B]` keep their state after their last word, and their
output is zero there. Deviation: the authors run padding through.

`compute_dtype` (None: that of the input) is the type in which matrix products are multiplied and given (by
AMX in `native` they are given in float32), the forward logits of `linear_cross_entropy` excepted; sums,
states, gates and losses keep the type of the input, which is that of states, weights and masks, too. A user's
autocast changes nothing but in `reference`. `recompute` has the back end `triton` compute the gates again in
the backward pass instead of saving them: less memory, two products more; the other back ends ignore it.

With `create_graph=True` the gradients of every back end are computed by `reference`, so that second
derivatives are right.
"""

import warnings
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from vdrop_cli.kernels import fused, native, normed, reference
from vdrop_cli.kernels.derivatives import unsupported_context
from vdrop_cli.kernels.layout import zero_padding
from vdrop_cli.kernels.masks import Masks, Norms, check_sizes

__all__ = ["BACKENDS", "Masks", "Norms", "choose", "gru", "linear_cross_entropy", "lstm"]

BACKENDS = ("reference", "fused", "native", "triton")
MODULES: dict[str, ModuleType] = {
    "reference": reference,
    "fused": fused,
    "native": native,
}  # triton when it is asked for: Triton is not everywhere


@lru_cache
def import_error_of_triton() -> str:
    """Why the back end cannot be imported; empty where it can. It is tried once in a process."""
    try:
        from vdrop_cli.kernels import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    except Exception as error:  # of another version of Triton or torch, by many names
        return f"the Triton back end cannot be loaded ({type(error).__name__}: {first_line(error)})"
    MODULES["triton"] = triton
    return ""


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def obstacle_to_triton(device: torch.device) -> str:
    """Why Triton's programs cannot be used on a device; empty where they can. Each device is tried once in a
    process.
    """
    return import_error_of_triton() or self_check_of_triton(with_index(device))


@lru_cache
def self_check_of_triton(device: torch.device) -> str:
    obstacle: str = MODULES["triton"].obstacle(device)
    return obstacle


def with_index(device: torch.device) -> torch.device:
    """`cuda` is the current one of the devices `cuda:0`, `cuda:1`, …"""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def known(backend: str) -> str:
    """The name, if it is one; a ValueError otherwise."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"backend={backend} is unknown; choose auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}"
        )
    return backend


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(backend: str, device: torch.device) -> str:
    """The back end that `backend` stands for on a device.

    `auto` is `native` on the CPU and `triton` on CUDA, once their self-checks have passed there; otherwise
    `fused`, with a warning. One that was asked for and cannot run is a ValueError that says why.
    """
    if known(backend) == "auto":
        return auto(with_index(device))
    if why := unavailable_reason(backend, device):
        raise ValueError(f"backend={backend} cannot run on {device}: {why}; choose backend=fused")
    return backend


def unavailable_reason(backend: str, device: torch.device) -> str:
    """Why a back end cannot run on a device; empty where it can."""
    if backend == "native":
        return native.unavailable_reason() if device.type == "cpu" else "it is for the CPU"
    return obstacle_to_triton(device) if backend == "triton" else ""


@lru_cache
def auto(device: torch.device) -> str:
    fastest = {"cpu": "native", "cuda": "triton"}.get(device.type)
    if fastest is None:
        return "fused"
    if why := unavailable_reason(fastest, device):
        warnings.warn(
            f"backend=auto is fused on {device}, which is slower than {fastest}: {why}", stacklevel=2
        )
        return "fused"
    return fastest


def choose_for_call(backend: str, x: Tensor, compute_dtype: torch.dtype | None) -> str:
    """The back end for one call. `auto` is `fused` for types that `native` has no kernels for.

    Raises ValueError inside a transform of `torch.func`, which only `reference` supports, and where `native`
    lacks the type.
    """
    if known(backend) != "reference" and (where := unsupported_context()):
        raise ValueError(f'backend={backend} does not support {where}; use backend="reference"')
    name: str = choose(backend, x.device)
    if name != "native" or native.supports(x.dtype, compute_dtype):
        return name
    if backend == "native":
        types = f"{x.dtype} with products in {compute_dtype or x.dtype}"
        raise ValueError(
            f"backend=native has no kernels for {types}; use float32 (products in float32 or bfloat16), "
            "float64, or backend=fused"
        )
    return "fused"


def check(
    gates: int,
    x_TBD: Tensor,
    states: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    masks: Masks,
    lengths: Tensor | None,
    w_hr: Tensor | None = None,
) -> None:
    """Refuses shapes that do not fit, by name, before any arithmetic."""
    if x_TBD.dim() != 3 or len(x_TBD) == 0:
        raise ValueError(f"x must be [T, B, D] with T ≥ 1, got {list(x_TBD.shape)}")
    time, batch, inputs = x_TBD.shape
    hidden = weights[0].shape[0] // gates
    state = w_hr.shape[0] if w_hr is not None else hidden  # of h, which a projection makes smaller
    sizes = (("h", state), ("c", hidden))[: len(states)]
    wanted = {
        "w_ih": (weights[0], (gates * hidden, inputs)),
        "w_hh": (weights[1], (gates * hidden, state)),
        "b_ih": (weights[2], (gates * hidden,)),
        "b_hh": (weights[3], (gates * hidden,)),
        **({} if w_hr is None else {"w_hr": (w_hr, (state, hidden))}),
        **{name: (tensor, (batch, size)) for (name, size), tensor in zip(sizes, states, strict=True)},
    }
    if x_TBD.dtype != weights[0].dtype and len({weight.dtype for weight in weights}) == 1:
        raise ValueError(f"x must be {weights[0].dtype} like the weights, got {x_TBD.dtype}")
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != x_TBD.dtype:
            raise ValueError(f"{name} must be {x_TBD.dtype} like x, got {tensor.dtype}")
        check_device(name, tensor, x_TBD)
    for name, mask in zip(("x", "h", "c"), masks, strict=True):
        if mask is None:
            continue
        if mask.requires_grad or mask.dtype != x_TBD.dtype:
            raise ValueError(
                f"masks.{name} must be {x_TBD.dtype} like x and need no gradient: masks are data"
            )
        check_device(f"masks.{name}", mask, x_TBD)
    check_sizes(masks, time, gates, batch, inputs, state, hidden)
    if lengths is not None:
        if lengths.shape != (batch,):
            raise ValueError(f"lengths must be [{batch}], got {list(lengths.shape)}")
        if lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise ValueError(f"lengths must be whole numbers, got {lengths.dtype}")
        check_device("lengths", lengths, x_TBD)
        if (
            not lengths.is_cuda and not torch.compiler.is_compiling() and bool((lengths < 0).any())
        ):  # a GPU would be waited for
            raise ValueError(f"lengths must be at least 0, got {int(lengths.min())}")


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got one on {tensor.device}")


def settled(x_TBD: Tensor, lengths: Tensor | None, name: str) -> tuple[Tensor, Tensor | None]:
    """Input and lengths as every back end can take them: zeros for padding, where what stands there may be no
    number, and int64.

    `fused` and `native` never read padding. Smaller types than int64 cannot hold the number of every step
    that lengths are compared with.
    """
    if lengths is None:
        return x_TBD, None
    lengths = lengths.long()
    if name in ("fused", "native"):
        return x_TBD, lengths
    return zero_padding(x_TBD, lengths), lengths


def choose_with_norm(backend: str, x: Tensor) -> str:
    """The back end for one call of a cell with layer norm. `auto` on a GPU is `fused`; what torch.compile
    traces into, too.
    """
    if backend == "triton":
        raise ValueError("backend=triton has no layer norm; use backend=fused, reference or auto")
    name = choose_for_call("fused" if backend == "auto" and x.is_cuda else backend, x, None)
    return "fused" if name == "native" and torch.compiler.is_compiling() else name


def lstm(
    x_TBD: Tensor,
    h_BH: Tensor,
    c_BH: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    masks: Masks,
    *,
    w_hr: Tensor | None = None,
    norms: Norms | None = None,
    cells: bool = False,
    lengths: Tensor | None = None,
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> tuple[Tensor, ...]:
    """One LSTM layer over a sequence (Gal & Ghahramani 2016, eq. 5 and 7): all hidden states [T, B, H], the
    last h and c [B, H].

    a_g = W_g (m_x,g ∘ x_t) + b_ih,g + U_g (m_h,g ∘ h_{t-1}) + b_hh,g for each gate g of i f g o,
    c_t = [σ(a_f) ∘ c_{t-1} + σ(a_i) ∘ tanh(a_g)] ∘ m_c, and h_t = σ(a_o) ∘ tanh(c_t).
    With `w_hr` [P, H] it is h_t = W_hr (σ(a_o) ∘ tanh(c_t)) of size P (Sak et al. 2014), computed by
    `reference`. `norms` is layer norm (Ba et al. 2016) of the input products, the recurrent products and the
    c_t in h_t. With `cells` the cell states of all steps [T, B, H] are a fourth output, zero beyond the end
    of a sequence.
    """
    check(4, x_TBD, (h_BH, c_BH), (w_ih, w_hh, b_ih, b_hh), masks, lengths, w_hr)
    if w_hr is not None:
        if known(backend) not in ("auto", "reference"):
            raise ValueError(
                f"backend={backend} has no projections (proj_size); use backend=reference or auto"
            )
        x_TBD, lengths = settled(x_TBD, lengths, "reference")
        with torch.autocast(x_TBD.device.type, enabled=False):
            return reference.lstm(
                x_TBD, h_BH, c_BH, w_ih, w_hh, b_ih, b_hh, masks, lengths, compute_dtype, w_hr, cells, norms
            )
    if norms is not None:
        name = choose_with_norm(backend, x_TBD)
        x_TBD, lengths = settled(x_TBD, lengths, name)
        if name == "reference":
            return reference.lstm(
                x_TBD, h_BH, c_BH, w_ih, w_hh, b_ih, b_hh, masks, lengths, compute_dtype, None, cells, norms
            )
        tensors = (x_TBD, h_BH, c_BH, w_ih, w_hh, b_ih, b_hh)
        return normed.lstm(tensors, norms, masks, lengths, compute_dtype or x_TBD.dtype, cells, name)
    name = choose_for_call(backend, x_TBD, compute_dtype)
    options = {"recompute": recompute} if name == "triton" else {}
    x_TBD, lengths = settled(x_TBD, lengths, name)
    outputs: tuple[Tensor, ...] = MODULES[name].lstm(
        x_TBD, h_BH, c_BH, w_ih, w_hh, b_ih, b_hh, masks, lengths, compute_dtype, cells=cells, **options
    )
    return outputs


def gru(
    x_TBD: Tensor,
    h_BH: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    masks: Masks,
    *,
    norms: Norms | None = None,
    lengths: Tensor | None = None,
    reset_after: bool = False,
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """One GRU layer over a sequence: all hidden states [T, B, H] and the last one [B, H].

    The reset gate acts before the recurrent product of the candidate, as in the paper, or after it, as in
    cuDNN and torch: n = tanh(W_n (m_x,n ∘ x) + b_ih,n + U_n (r ∘ m_h,n ∘ h) + b_hh,n), or tanh(W_n (m_x,n ∘
    x) + b_ih,n + r ∘ (U_n (m_h,n ∘ h) + b_hh,n)). h_t = (1 - z) ∘ n + z ∘ h_{t-1}. Deviation: the authors'
    code has a sigmoid for the tanh of n. A GRU has no cell state: `masks.c` must be None. `norms` is layer
    norm.
    """
    check(3, x_TBD, (h_BH,), (w_ih, w_hh, b_ih, b_hh), masks, lengths)
    if masks.c is not None:
        raise ValueError("masks.c must be None: a GRU has no cell state")
    if norms is not None:
        name = choose_with_norm(backend, x_TBD)
        x_TBD, lengths = settled(x_TBD, lengths, name)
        if name == "reference":
            return reference.gru(
                x_TBD, h_BH, w_ih, w_hh, b_ih, b_hh, masks, lengths, reset_after, compute_dtype, norms
            )
        tensors = (x_TBD, h_BH, w_ih, w_hh, b_ih, b_hh)
        return normed.gru(tensors, norms, masks, lengths, reset_after, compute_dtype or x_TBD.dtype, name)
    name = choose_for_call(backend, x_TBD, compute_dtype)
    options = {"recompute": recompute} if name == "triton" else {}
    x_TBD, lengths = settled(x_TBD, lengths, name)
    outputs: tuple[Tensor, Tensor] = MODULES[name].gru(
        x_TBD, h_BH, w_ih, w_hh, b_ih, b_hh, masks, lengths, reset_after, compute_dtype, **options
    )
    return outputs


def linear_cross_entropy(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    targets_N: Tensor,
    *,
    backend: str = "auto",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Negative log-likelihood in nats of each target [N] under softmax(x Wᵀ + b).

    But for `reference`, the [N, V] logits are never all in memory.
    """
    if x_ND.dim() != 2 or targets_N.shape != x_ND.shape[:1] or len(targets_N) == 0:
        raise ValueError(
            f"x must be [N, D] and targets [N] with N ≥ 1, got {list(x_ND.shape)} and {list(targets_N.shape)}"
        )
    words, size = len(b_V), x_ND.shape[1]
    for name, tensor, shape in (("w", w_VD, (words, size)), ("b", b_V, (words,))):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        check_device(name, tensor, x_ND)
    if b_V.dtype != w_VD.dtype:
        raise ValueError(f"b must be {w_VD.dtype} like w, got {b_V.dtype}")
    if targets_N.dtype != torch.int64:
        raise ValueError(f"targets must be torch.int64, got {targets_N.dtype}")
    check_device("targets", targets_N, x_ND)
    nll_N: Tensor = MODULES[choose_for_call(backend, w_VD, compute_dtype)].linear_cross_entropy(
        x_ND, w_VD, b_V, targets_N, compute_dtype
    )
    return nll_N
