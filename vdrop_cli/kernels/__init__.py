"""The API of the masked cells: `lstm`, `gru` and `linear_cross_entropy`, one contract for every back end.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)  N tokens  V vocabulary

Weights have the layout of `torch.nn.LSTM` and `torch.nn.GRU`: `w_ih [G·H, D]`, `w_hh [G·H, H]`, `b_ih` and
`b_hh [G·H]`. Masks multiply the inputs of matrix products, never the carried state. The exception is the mask
`c`, which multiplies the cell state because its policy requires that. With `lengths [B]`, the state of a
sequence does not change after its last word, and its output is zero there. Deviation: the authors' code
computes steps of padding like any others.

`compute_dtype` is the type in which matrix products are multiplied; None is the type of the input. Products
are also returned in it, with two exceptions that return float32: `native` with AMX, and every back end on a
CPU that does not multiply bf16. The forward logits of `linear_cross_entropy` do not depend on
`compute_dtype`. Sums, states, gates and losses have the type of the input. States, weights and masks must
have this type, too. A user's autocast changes only `reference`.

With `recompute`, the back end `triton` computes the gates again in the backward pass instead of saving them.
That takes less memory, but two more products. The other back ends ignore `recompute`.

With `create_graph=True`, `reference` computes the gradients for every back end. So second derivatives are
right.
"""

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from vdrop_cli.errors import one_line
from vdrop_cli.kernels import fused, native, native_library, reference
from vdrop_cli.kernels.backend import Backend
from vdrop_cli.kernels.contexts import no_autocast, unsupported_context, without_transforms
from vdrop_cli.kernels.masks import Masks, check_sizes
from vdrop_cli.kernels.packing import zero_padding
from vdrop_cli.kernels.weights import Norms, Weights

__all__ = ["BACKENDS", "Masks", "Norms", "choose", "gru", "linear_cross_entropy", "lstm"]

BACKENDS = ("reference", "fused", "native", "triton")
# `triton` is added when it is first asked for: the package need not be installed.
IMPLEMENTATIONS: dict[str, Backend] = {"reference": reference, "fused": fused, "native": native}


@lru_cache
def triton_import_error() -> str:
    """Why the back end cannot be imported, empty where it can; it is tried once in a process."""
    try:
        from vdrop_cli.kernels import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    except Exception as error:  # of another version of Triton or torch, by many names
        return f"the Triton back end cannot be loaded ({one_line(error)})"
    IMPLEMENTATIONS["triton"] = triton
    return ""


@lru_cache
def triton_device_error(device: torch.device) -> str:
    """Why Triton's programs cannot be used on a device, empty where they can; each is tried once in a
    process.
    """
    from vdrop_cli.kernels import triton

    return triton.unavailable_reason(device)


def with_index(device: torch.device) -> torch.device:
    """The device with its index; `cuda` without one is the current device."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def check_name(backend: str) -> str:
    """The name of a back end, or `auto`. Raises ValueError for any other."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(
            f"backend={backend} is unknown; choose auto, {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}"
        )
    return backend


def check_compute_dtype(compute_dtype: torch.dtype | None) -> torch.dtype | None:
    """The type of products. Raises ValueError unless it is a type of real floating-point numbers, or None."""
    if compute_dtype is None or (isinstance(compute_dtype, torch.dtype) and compute_dtype.is_floating_point):
        return compute_dtype
    raise ValueError(
        f"compute_dtype must be a floating-point type, such as torch.bfloat16, got {compute_dtype!r}"
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def choose(backend: str, device: torch.device) -> str:
    """The back end that `backend` stands for on a device.

    `auto` is `native` on the CPU and `triton` on CUDA. If that one is not available or its self-check fails,
    `auto` is `fused`, with a warning. On any other device it is `fused`. Raises ValueError with the reason if
    the named back end cannot run.
    """
    if check_name(backend) == "auto":
        return fastest_available(with_index(device))
    if reason := unavailable_reason(backend, device):
        raise ValueError(f"backend={backend} cannot run on {device}: {reason}; choose backend=fused")
    return backend


def unavailable_reason(backend: str, device: torch.device) -> str:
    """Why a back end cannot run on a device; empty where it can."""
    if backend == "native":
        return native.unavailable_reason() if device.type == "cpu" else "it is for the CPU"
    if backend == "triton":
        return triton_import_error() or triton_device_error(with_index(device))
    return ""


@lru_cache
def fastest_available(device: torch.device) -> str:
    """The fastest back end that can run on a device; a warning says why it is only `fused`."""
    fastest = {"cpu": "native", "cuda": "triton"}.get(device.type)
    if fastest is None:
        return "fused"
    if reason := unavailable_reason(fastest, device):
        message = f"backend=auto is fused on {device}, which is slower than {fastest}: {reason}"
        warnings.warn(message, stacklevel=2)
        return "fused"
    return fastest


def choose_for_call(
    backend: str,
    x: Tensor,
    compute_dtype: torch.dtype | None,
    *,
    has_norms: bool = False,
    masks: Masks | None = None,
) -> str:
    """The back end for one call.

    `auto` becomes `reference` for what only `reference` supports: transforms and tracers
    (`unsupported_context`), and masks that need a gradient. It becomes `fused` for types that `native` has no
    kernels for, and for layer norm on a GPU. Raises ValueError as `choose` does, and where the named back end
    does not support one of these.
    """
    check_compute_dtype(compute_dtype)
    if has_norms:
        if backend == "triton":
            raise ValueError("backend=triton has no layer norm; use backend=fused, reference or auto")
        backend, compute_dtype = "fused" if backend == "auto" and x.is_cuda else backend, None
    context = unsupported_context()
    needs_gradient = any(mask is not None and mask.requires_grad for mask in masks or ())
    if not context and needs_gradient and torch.is_grad_enabled():
        context = "masks that need a gradient"
    if context and check_name(backend) != "reference":
        if backend == "auto":
            return "reference"
        raise ValueError(f'backend={backend} does not support {context}; use backend="reference" or "auto"')
    name: str = choose(backend, x.device)
    if name != "native" or native_library.supports(x.dtype, compute_dtype):
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
    weights: Weights,
    masks: Masks,
    lengths: Tensor | None,
) -> None:
    """Raises ValueError with the name of an argument whose shape, type or device does not fit."""
    if x_TBD.dim() != 3 or len(x_TBD) == 0:
        raise ValueError(f"x must be [T, B, D] with T ≥ 1, got {list(x_TBD.shape)}")
    check_weights(gates, x_TBD, states, weights)
    check_masks(gates, x_TBD, weights, masks)
    if lengths is not None:
        check_lengths(lengths, x_TBD)
        check_device("lengths", lengths, x_TBD)


def check_weights(gates: int, x_TBD: Tensor, states: tuple[Tensor, ...], weights: Weights) -> None:
    """Raises ValueError for weights and first states that do not fit the input or each other."""
    _, batch, inputs = x_TBD.shape
    w_ih, w_hh, b_ih, b_hh, w_hr, norms = weights
    hidden = w_ih.shape[0] // gates
    state = w_hr.shape[0] if w_hr is not None else hidden  # of h, which a projection makes smaller
    sizes = (("h", state), ("c", hidden))[: len(states)]
    expected = {
        "w_ih": (w_ih, (gates * hidden, inputs)),
        "w_hh": (w_hh, (gates * hidden, state)),
        "b_ih": (b_ih, (gates * hidden,)),
        "b_hh": (b_hh, (gates * hidden,)),
        **({} if w_hr is None else {"w_hr": (w_hr, (state, hidden))}),
        **({} if norms is None else norms_and_shapes(norms, gates, hidden)),
        **{name: (tensor, (batch, size)) for (name, size), tensor in zip(sizes, states, strict=True)},
    }
    if x_TBD.dtype != w_ih.dtype and len({weight.dtype for weight in (w_ih, w_hh, b_ih, b_hh)}) == 1:
        raise ValueError(f"x must be {w_ih.dtype} like the weights, got {x_TBD.dtype}")
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype != x_TBD.dtype:
            raise ValueError(f"{name} must be {x_TBD.dtype} like x, got {tensor.dtype}")
        check_device(name, tensor, x_TBD)


def norms_and_shapes(norms: Norms, gates: int, hidden: int) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """The parameters of layer norm and their shapes. Raises ValueError where the cell has others."""
    sizes = {"ih": gates * hidden, "hh": gates * hidden}
    if gates == 4:
        sizes |= {"c": hidden, "c_bias": hidden}
    if [tensor is not None for tensor in norms] != [True, True, gates == 4, gates == 4]:
        raise ValueError(f"norms must have {', '.join(sizes)}, and nothing else")
    return {f"norms.{name}": (getattr(norms, name), (size,)) for name, size in sizes.items()}


def check_masks(gates: int, x_TBD: Tensor, weights: Weights, masks: Masks) -> None:
    """Raises ValueError for masks that do not fit. Input and weights must have been checked before."""
    for name, mask in zip(("x", "h", "c"), masks, strict=True):
        if mask is None:
            continue
        if mask.dtype != x_TBD.dtype:
            raise ValueError(f"masks.{name} must be {x_TBD.dtype} like x, got {mask.dtype}")
        check_device(f"masks.{name}", mask, x_TBD)
    time, batch, inputs = x_TBD.shape
    hidden, state = weights.w_ih.shape[0] // gates, weights.w_hh.shape[1]
    check_sizes(masks, time, gates, batch, inputs, state, hidden)


def check_lengths(lengths: Tensor, x_TBD: Tensor) -> None:
    """Raises ValueError unless `lengths` has a whole number of at least 0 for each sequence. Negative numbers
    are noticed only where the numbers can be read (`is_readable`).
    """
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be whole numbers, got {lengths.dtype}")
    if lengths.shape != (x_TBD.shape[1],):
        raise ValueError(f"lengths must be [{x_TBD.shape[1]}], got {list(lengths.shape)}")
    if is_readable(lengths) and bool(((numbers := without_transforms(lengths)) < 0).any()):
        raise ValueError(f"lengths must be at least 0, got {int(numbers.min())}")


def is_readable(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor can be read without a wait for a device, and not in compiled code."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got one on {tensor.device}")


def prepare_padding(x_TBD: Tensor, lengths: Tensor | None, name: str) -> tuple[Tensor, Tensor | None]:
    """The input with its padding set to zero, and the lengths as int64.

    Padding may contain NaN. `fused` and `native` never read padding, so they get the input as it is. Lengths
    are compared with step numbers, for which smaller types than int64 can be too small.
    """
    if lengths is None:
        return x_TBD, None
    lengths = lengths.long()
    if name in ("fused", "native"):
        return x_TBD, lengths
    return zero_padding(x_TBD, lengths), lengths


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
    """Computes one LSTM layer over a sequence (Gal & Ghahramani 2016, eq. 5 and 7).

    Returns all hidden states [T, B, H], and the last h and c [B, H]. With `cells`, the fourth output has the
    cell states of all steps [T, B, H], zero beyond the end of a sequence.

    For each gate k of i, f, g and o: a_k = W_k (m_x,k ∘ x_t) + b_ih,k + U_k (m_h,k ∘ h_{t-1}) + b_hh,k. Then
    c_t = [σ(a_f) ∘ c_{t-1} + σ(a_i) ∘ tanh(a_g)] ∘ m_c, and h_t = σ(a_o) ∘ tanh(c_t).

    With `w_hr` [P, H], h_t = W_hr (σ(a_o) ∘ tanh(c_t)) has the size P (Sak et al. 2014); only `reference`
    computes it. `norms` adds layer norm (Ba et al. 2016) to the input products, to the recurrent products,
    and to c_t where it enters h_t. Raises ValueError for arguments that do not fit each other, and for a back
    end that cannot compute them.
    """
    weights = Weights(w_ih, w_hh, b_ih, b_hh, w_hr, norms)
    check(4, x_TBD, (h_BH, c_BH), weights, masks, lengths)
    if w_hr is not None:
        check_compute_dtype(compute_dtype)
        if check_name(backend) not in ("auto", "reference"):
            raise ValueError(
                f"backend={backend} has no projections (proj_size); use backend=reference or auto"
            )
        x_TBD, lengths = prepare_padding(x_TBD, lengths, "reference")
        with no_autocast(x_TBD.device.type):
            return reference.lstm(x_TBD, h_BH, c_BH, weights, masks, lengths, compute_dtype, cells=cells)
    name = choose_for_call(backend, x_TBD, compute_dtype, has_norms=norms is not None, masks=masks)
    x_TBD, lengths = prepare_padding(x_TBD, lengths, name)
    return IMPLEMENTATIONS[name].lstm(
        x_TBD, h_BH, c_BH, weights, masks, lengths, compute_dtype, cells=cells, recompute=recompute
    )


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
    """Computes one GRU layer over a sequence; returns all hidden states [T, B, H] and the last one [B, H].

    By default the reset gate multiplies the input of the candidate's recurrent product, as in the paper: n =
    tanh(W_n (m_x,n ∘ x) + b_ih,n + U_n (r ∘ m_h,n ∘ h) + b_hh,n). With `reset_after` it multiplies the result
    of that product, as in cuDNN and torch: n = tanh(W_n (m_x,n ∘ x) + b_ih,n + r ∘ (U_n (m_h,n ∘ h) +
    b_hh,n)). In both cases h_t = (1 - z) ∘ n + z ∘ h_{t-1}.

    Deviation: the authors' code has a sigmoid instead of the tanh of n. A GRU has no cell state, so `masks.c`
    must be None. `norms` adds layer norm to the input products and to the recurrent products. Raises
    ValueError for arguments that do not fit each other, and for a back end that cannot compute them.
    """
    weights = Weights(w_ih, w_hh, b_ih, b_hh, None, norms)
    check(3, x_TBD, (h_BH,), weights, masks, lengths)
    if masks.c is not None:
        raise ValueError("masks.c must be None: a GRU has no cell state")
    name = choose_for_call(backend, x_TBD, compute_dtype, has_norms=norms is not None, masks=masks)
    x_TBD, lengths = prepare_padding(x_TBD, lengths, name)
    return IMPLEMENTATIONS[name].gru(
        x_TBD, h_BH, weights, masks, lengths, compute_dtype, reset_after=reset_after, recompute=recompute
    )


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

    Only `reference` has all [N, V] logits in memory at once.
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
    name = choose_for_call(backend, w_VD, compute_dtype)
    return IMPLEMENTATIONS[name].linear_cross_entropy(x_ND, w_VD, b_V, targets_N, compute_dtype)
