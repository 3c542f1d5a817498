"""The same functions as `reference` for CUDA: products by cuBLAS, all that lies between two of them in one Triton program.

The input projections of a layer are one product before the loop over time, the weight gradients one after it, as in `fused`; the loop
is a CUDA graph (`graphs`). The cells are operators of torch, `vdrop::lstm` and `vdrop::gru`, so that `torch.compile` takes them whole.
What is kept for the way back is states and gates, or with `recompute` the states alone: two products more give the gates again.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)  K groups of gates: 1, or each for itself
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdrop_cli.kernels import programs, reference
from vdrop_cli.kernels.derivatives import cell_gradients, needs_reference
from vdrop_cli.kernels.fused import linear_cross_entropy
from vdrop_cli.kernels.gates import (
    Gates,
    input_gradient,
    masked_inputs,
    project_inputs,
    sum_over_steps,
    weight_gradient,
)
from vdrop_cli.kernels.graphs import Graphs
from vdrop_cli.kernels.loops import FOUR, ONLY_N, R_AND_Z, THREE, gru_loop, gru_loop_back, lstm_loop, lstm_loop_back
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.products import exact_sums, mm_into

__all__ = ["gru", "linear_cross_entropy", "lstm", "obstacle"]

CHECKED_TO = 5e-3  # relative error of the self-check, under which tf32 products stay
GRAPHS = Graphs()
OF_SELF_CHECK: ContextVar[Graphs | None] = ContextVar("graphs of the self-check that runs here", default=None)


def graphs() -> Graphs:
    """Those that a loop is run by here."""
    return OF_SELF_CHECK.get() or GRAPHS


@contextmanager
def run_by(of_self_check: Graphs | None) -> Iterator[None]:
    """Has loops here run by the graphs of a self-check, or without them by those of all others."""
    before = OF_SELF_CHECK.set(of_self_check)
    try:
        yield
    finally:
        OF_SELF_CHECK.reset(before)


def on_its_own(tensor: Tensor) -> ExitStack:
    """On the device of the tensor, without a user's autocast, which would round what is not to be rounded, and with sums in fp32."""
    stack = ExitStack()
    stack.enter_context(exact_sums(tensor.device.type))
    stack.enter_context(torch.cuda.device_of(tensor))  # type: ignore[no-untyped-call]
    stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
    return stack


class Layer(NamedTuple):
    """What an operator is given besides the first states: the tensors first, which are kept for the way back."""

    x: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor
    mask_x: Tensor | None
    mask_h: Tensor | None
    mask_c: Tensor | None
    lengths: Tensor | None
    compute_dtype: torch.dtype
    recompute: bool

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self[1:5]

    @property
    def for_reference(self) -> dict[str, Any]:
        """What the functions of `reference` take besides input, states and weights."""
        masks = Masks(self.mask_x, self.mask_h, self.mask_c)
        return {"masks": masks, "lengths": self.lengths, "compute_dtype": self.compute_dtype}

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:9]

    def low(self, weights: Tensor) -> Tensor:
        """In the type that is multiplied in."""
        return weights.to(self.compute_dtype)

    def gates(self) -> Gates:
        """Memory for the gates of all steps."""
        hidden = self.w_hh.shape[1]
        return Gates.of(self.x, hidden, self.w_hh.shape[0] // hidden, Masks(self.mask_x, self.mask_h))

    def read_by_loop(self) -> dict[str, Tensor | None]:
        """What a loop over time reads, forward and back."""

        def whole(mask: Tensor | None) -> Tensor | None:
            return None if mask is None else mask.expand(*mask.shape[:-2], self.x.shape[1], self.w_hh.shape[1]).contiguous()

        lengths = None if self.lengths is None else self.lengths.contiguous()
        return {"w_hh": self.low(self.w_hh), "mask_h": whole(self.mask_h), "mask_c": whole(self.mask_c), "lengths": lengths}


# The graphs that torch.compile makes are not to hold ours.
operator = partial(
    torch.library.custom_op,
    mutates_args=(),
    **({"tags": (torch.Tag.cudagraph_unsafe,)} if "tags" in signature(torch.library.custom_op).parameters else {}),
)
LAYER = (
    "Tensor x, Tensor w_ih, Tensor w_hh, Tensor b_ih, Tensor b_hh, Tensor? mask_x, Tensor? mask_h, Tensor? mask_c, Tensor? lengths, "
    "ScalarType compute_dtype, bool recompute"
)


def zeros_or(gradient: Tensor | None, like: Tensor) -> Tensor:
    """The gradient that came from upstream, if one came."""
    return torch.zeros_like(like) if gradient is None else gradient.contiguous()


def own(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Likewise, in memory that may be written to."""
    return torch.zeros_like(like) if gradient is None else gradient.clone(memory_format=torch.contiguous_format)


def states_of_all_steps(first_BH: Tensor, time: int) -> Tensor:
    """Memory for them, [T + 1, B, H]: the first ones before the first step."""
    return first_BH.new_empty(time + 1, *first_BH.shape)


def outputs(hs: Tensor, lengths: Tensor | None) -> Tensor:
    """The states of all steps, zero beyond a sequence's end."""
    if lengths is None:
        return hs[1:].clone()
    alive_TB = torch.arange(len(hs) - 1, device=hs.device)[:, None] < lengths
    return hs[1:] * alive_TB[..., None]


def like_new(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def add_products(gates: Gates, part: slice, w_hh: Tensor, inputs_ND: list[Tensor]) -> None:
    """Adds the recurrent products of all steps at once, as can be done when all states are known."""
    for group, input_ND in zip(gates.groups(part), inputs_ND, strict=True):
        mm_into(gates.matrix(group), input_ND, w_hh[gates.rows(group)].T, add=True)


@operator(
    "vdrop::lstm",
    schema=f"(Tensor h, Tensor c, {LAYER}) -> (Tensor y, Tensor h_last, Tensor c_last, Tensor a, Tensor hs, Tensor cs)",
)
def lstm_operator(h: Tensor, c: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """The outputs, the last states, and what is kept for the way back: the gates (none with `recompute`), states of all steps."""
    layer = Layer(*given)
    with on_its_own(h):
        gates, (hs, cs) = layer.gates(), (states_of_all_steps(state, layer.x.shape[0]) for state in (h, c))
        project_inputs(gates, layer.x, layer.low(layer.w_ih), layer.b_ih + layer.b_hh, layer.mask_x)
        graphs().run(lstm_loop, {"a": gates.memory}, {"h": hs, "c": cs}, {"h_BH": h, "c_BH": c} | layer.read_by_loop())
        kept = (gates.memory.new_empty(0) if layer.recompute else gates.memory, hs, cs)
        return outputs(hs, layer.lengths), hs[-1].clone(), cs[-1].clone(), *kept


@lstm_operator.register_fake
def lstm_fake(h: Tensor, c: Tensor, *given: Any) -> tuple[Tensor, ...]:
    layer = Layer(*given)
    hs, cs = (states_of_all_steps(state, layer.x.shape[0]) for state in (h, c))
    a = layer.gates().memory
    return torch.empty_like(hs[1:]), *map(like_new, (h, c)), a.new_empty(0) if layer.recompute else a, hs, cs


def lstm_gates(layer: Layer, hs: Tensor) -> Gates:
    """The gates of all steps from the states of all steps."""
    gates = layer.gates()
    project_inputs(gates, layer.x, layer.low(layer.w_ih), layer.b_ih + layer.b_hh, layer.mask_x)
    add_products(gates, FOUR, layer.low(layer.w_hh), masked_inputs(gates, FOUR, hs[:-1], layer.compute_dtype, layer.mask_h))
    g_TBH = gates.view_GTBH[2].tanh()
    gates.memory.sigmoid_()
    gates.view_GTBH[2].copy_(g_TBH)
    return gates


GRADIENTS = "Tensor dx, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh"


@operator(
    "vdrop::lstm_backward",
    schema=f"(Tensor? dy, Tensor? dh, Tensor? dc, Tensor a, Tensor hs, Tensor cs, {LAYER}) -> (Tensor dh, Tensor dc, {GRADIENTS})",
)
def lstm_backward_operator(
    dy: Tensor | None, dh: Tensor | None, dc: Tensor | None, a: Tensor, hs: Tensor, cs: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    layer = Layer(*given)
    with on_its_own(hs):
        gates = lstm_gates(layer, hs) if layer.recompute else Gates(a, 4)
        da, dh, dc = gates.another(layer.compute_dtype), own(dh, hs[0]), own(dc, cs[0])
        read = {"a": gates.memory, "c": cs, "dy": zeros_or(dy, hs[1:])} | layer.read_by_loop()
        graphs().run(lstm_loop_back, {"dh": dh, "dc": dc}, {"da": da.memory}, read)
        dw_ih, dw_hh = torch.empty_like(layer.w_ih), torch.empty_like(layer.w_hh)
        weight_gradient(da, FOUR, masked_inputs(da, FOUR, layer.x, layer.compute_dtype, layer.mask_x), dw_ih)
        weight_gradient(da, FOUR, masked_inputs(da, FOUR, hs[:-1], layer.compute_dtype, layer.mask_h), dw_hh)
        db = sum_over_steps(da, layer.b_ih.dtype)
        return dh, dc, input_gradient(da, layer.low(layer.w_ih), layer.mask_x, layer.x.dtype), dw_ih, dw_hh, db, db.clone()


@lstm_backward_operator.register_fake
def lstm_backward_fake(
    dy: Tensor | None, dh: Tensor | None, dc: Tensor | None, a: Tensor, hs: Tensor, cs: Tensor, *given: Any
) -> tuple[Tensor, ...]:
    return tuple(map(like_new, (hs[0], cs[0], *given[:5])))


def keep_for_lstm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    layer = Layer(*inputs[2:])
    ctx.save_for_backward(*inputs[:2], *output[3:], *layer.tensors)
    ctx.options, ctx.graphs = layer[len(layer.tensors) :], OF_SELF_CHECK.get()
    ctx.set_materialize_grads(False)


def lstm_gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None, dc: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    h, c, *saved = ctx.saved_tensors
    if needs_reference((dy, dh, dc)):
        layer, needed = Layer(*saved[3:], *ctx.options), ctx.needs_input_grad
        with on_its_own(h):
            dx, dh, dc, *dw = cell_gradients(
                reference.lstm,
                (layer.x, h, c, *layer.weights),
                (needed[2], *needed[:2], *needed[3:7]),
                (dy, dh, dc),
                **layer.for_reference,
            )
        gradients = (dh, dc, dx, *dw)
    else:
        with run_by(ctx.graphs):  # torch may have another thread go back
            gradients = lstm_backward_operator(dy, dh, dc, *saved, *ctx.options)
    return *gradients, *[None] * (len(Layer._fields) - 5)


lstm_operator.register_autograd(lstm_gradients, setup_context=keep_for_lstm)


def lstm(
    x_TBD: Tensor,
    h_BH: Tensor,
    c_BH: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    masks: Masks,
    lengths: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    y_TBH, h_BH, c_BH, *_ = lstm_operator(
        h_BH, c_BH, x_TBD, w_ih, w_hh, b_ih, b_hh, *masks, lengths, compute_dtype or x_TBD.dtype, recompute
    )
    return y_TBH, h_BH, c_BH


def project_gru(layer: Layer, gates: Gates, reset_after: bool) -> None:
    """The input products with all biases but the candidate's recurrent one where that is inside the reset gate."""
    bias = layer.b_ih + layer.b_hh
    if reset_after:
        bias[2 * gates.hidden :] = layer.b_ih[2 * gates.hidden :]
    project_inputs(gates, layer.x, layer.low(layer.w_ih), bias, layer.mask_x)


def candidate_inputs(layer: Layer, gates: Gates, hs: Tensor, reset_after: bool) -> list[Tensor]:
    """What entered the candidate's recurrent product, at all steps."""
    h_TBH = hs[:-1] if reset_after else hs[:-1] * gates.view_GTBH[0]
    return masked_inputs(gates, ONLY_N, h_TBH, layer.compute_dtype, layer.mask_h)


@operator(
    "vdrop::gru",
    schema=f"(Tensor h, {LAYER}, bool reset_after) -> (Tensor y, Tensor h_last, Tensor a, Tensor hs, Tensor inner)",
)
def gru_operator(h: Tensor, *given: Any) -> tuple[Tensor, ...]:
    """The outputs, the last state, and what is kept for the way back: the gates (none with `recompute`), states, `inner`."""
    layer, reset_after = Layer(*given[:-1]), given[-1]
    with on_its_own(h):
        gates, hs = layer.gates(), states_of_all_steps(h, layer.x.shape[0])
        project_gru(layer, gates, reset_after)
        inner, filled, read = h.new_empty(0), {"h": hs}, {"h_BH": h} | layer.read_by_loop()
        if reset_after:
            filled["inner"] = inner = torch.empty_like(hs[1:])
            read["b_n"] = layer.b_hh[2 * gates.hidden :]
        graphs().run(gru_loop, {"a": gates.memory}, filled, read)
        kept = (h.new_empty(0), hs, h.new_empty(0)) if layer.recompute else (gates.memory, hs, inner)
        return outputs(hs, layer.lengths), hs[-1].clone(), *kept


@gru_operator.register_fake
def gru_fake(h: Tensor, *given: Any) -> tuple[Tensor, ...]:
    layer, reset_after = Layer(*given[:-1]), given[-1]
    hs, a, nothing = states_of_all_steps(h, layer.x.shape[0]), layer.gates().memory, h.new_empty(0)
    kept = (nothing, hs, nothing) if layer.recompute else (a, hs, torch.empty_like(hs[1:]) if reset_after else nothing)
    return torch.empty_like(hs[1:]), like_new(h), *kept


def gru_gates(layer: Layer, hs: Tensor, reset_after: bool) -> tuple[Gates, Tensor]:
    """The gates of all steps, and `inner`, from the states of all steps."""
    gates, w_hh = layer.gates(), layer.low(layer.w_hh)
    project_gru(layer, gates, reset_after)
    add_products(gates, R_AND_Z, w_hh, masked_inputs(gates, R_AND_Z, hs[:-1], w_hh.dtype, layer.mask_h))
    r_TBH, z_TBH, n_TBH = gates.view_GTBH
    r_TBH.sigmoid_()
    z_TBH.sigmoid_()
    (n_input_ND,) = candidate_inputs(layer, gates, hs, reset_after)
    inner_TBH = (n_input_ND @ w_hh[gates.rows(ONLY_N)].T).view_as(n_TBH).to(hs.dtype)
    if reset_after:
        inner_TBH = inner_TBH + layer.b_hh[2 * gates.hidden :]
    n_TBH.add_(r_TBH * inner_TBH if reset_after else inner_TBH).tanh_()
    return gates, inner_TBH


@operator(
    "vdrop::gru_backward",
    schema=f"(Tensor? dy, Tensor? dh, Tensor a, Tensor hs, Tensor inner, {LAYER}, bool reset_after) -> (Tensor dh, {GRADIENTS})",
)
def gru_backward_operator(dy: Tensor | None, dh: Tensor | None, a: Tensor, hs: Tensor, inner: Tensor, *given: Any) -> tuple[Tensor, ...]:
    layer, reset_after = Layer(*given[:-1]), given[-1]
    with on_its_own(hs):
        gates, inner = gru_gates(layer, hs, reset_after) if layer.recompute else (Gates(a, 3), inner)
        da, dh = gates.another(layer.compute_dtype), own(dh, hs[0])
        dp, filled = da, {"da": da.memory}
        read = {"a": gates.memory, "h": hs, "dy": zeros_or(dy, hs[1:])} | layer.read_by_loop()
        if reset_after:
            dp, read["inner"] = da.another(), inner
            filled["dp"] = dp.memory
        graphs().run(gru_loop_back, {"dh": dh}, filled, read)
        dw_ih, dw_hh = torch.empty_like(layer.w_ih), torch.empty_like(layer.w_hh)
        weight_gradient(da, THREE, masked_inputs(da, THREE, layer.x, layer.compute_dtype, layer.mask_x), dw_ih)
        weight_gradient(dp, R_AND_Z, masked_inputs(da, R_AND_Z, hs[:-1], layer.compute_dtype, layer.mask_h), dw_hh)
        weight_gradient(dp, ONLY_N, candidate_inputs(layer, gates, hs, reset_after), dw_hh)
        db_ih, db_hh = (sum_over_steps(of, layer.b_ih.dtype) for of in (da, dp))
        return dh, input_gradient(da, layer.low(layer.w_ih), layer.mask_x, layer.x.dtype), dw_ih, dw_hh, db_ih, db_hh


@gru_backward_operator.register_fake
def gru_backward_fake(dy: Tensor | None, dh: Tensor | None, a: Tensor, hs: Tensor, inner: Tensor, *given: Any) -> tuple[Tensor, ...]:
    return tuple(map(like_new, (hs[0], *given[:5])))


def keep_for_gru(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    layer = Layer(*inputs[1:-1])
    ctx.save_for_backward(inputs[0], *output[2:], *layer.tensors)
    ctx.options, ctx.graphs = (*layer[len(layer.tensors) :], inputs[-1]), OF_SELF_CHECK.get()
    ctx.set_materialize_grads(False)


def gru_gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    h, *saved = ctx.saved_tensors
    if needs_reference((dy, dh)):
        *options, reset_after = ctx.options
        layer, needed = Layer(*saved[3:], *options), ctx.needs_input_grad
        with on_its_own(h):
            dx, dh, *dw = cell_gradients(
                reference.gru,
                (layer.x, h, *layer.weights),
                (needed[1], needed[0], *needed[2:6]),
                (dy, dh),
                **layer.for_reference,
                reset_after=reset_after,
            )
        gradients = (dh, dx, *dw)
    else:
        with run_by(ctx.graphs):
            gradients = gru_backward_operator(dy, dh, *saved, *ctx.options)
    return *gradients, *[None] * (len(Layer._fields) - 5 + 1)


gru_operator.register_autograd(gru_gradients, setup_context=keep_for_gru)


def gru(
    x_TBD: Tensor,
    h_BH: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    masks: Masks,
    lengths: Tensor | None = None,
    reset_after: bool = False,
    compute_dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    y_TBH, h_BH, *_ = gru_operator(
        h_BH, x_TBD, w_ih, w_hh, b_ih, b_hh, *masks, lengths, compute_dtype or x_TBD.dtype, recompute, reset_after
    )
    return y_TBH, h_BH


def obstacle(device: torch.device) -> str:
    """Why the Triton programs cannot be used on a device; empty where they can.

    A forward and a backward of either cell on a few numbers, against the definition.
    """
    if device.type != "cuda" and not programs.INTERPRETED:
        return "Triton's programs are for CUDA devices"
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the first call of a cell on a device checks itself, which a graph cannot hold; call it once before the capture")
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):  # whatever the caller is in
            errors = [self_check(device, cell) for cell in ("lstm", "gru")]
    except Exception as failure:  # of Triton, its compiler or the driver, by many names
        return f"the self-check failed with {type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
    too_large = [error for error in errors if not error < CHECKED_TO]  # or not a number
    return f"the self-check is off by {too_large[0]:.1g}" if too_large else ""


def self_check(device: torch.device, cell: str) -> float:
    """The largest relative error of an output or a gradient; not a number where one of them is not.

    Three passes: one as it is, one whose loops are captured, and one that only replays. A capture that fails is an error. Loops of other
    threads keep their graphs meanwhile.
    """
    time, batch, inputs, hidden = 3, 2, 5, 7
    rows, states = {"lstm": (4 * hidden, 2), "gru": (3 * hidden, 1)}[cell]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, device="cpu", dtype=torch.float32).uniform_(-1, 1, generator=generator).to(device)

    shapes = [(time, batch, inputs), *[(batch, hidden)] * states, (rows, inputs), (rows, hidden), (rows,), (rows,)]
    tensors = [random(*shape).requires_grad_() for shape in shapes]
    masks = Masks(random(1, 1, batch, inputs), random(1, rows // hidden, batch, hidden))
    functions: dict[str, tuple[Callable[..., tuple[Tensor, ...]], ...]] = {"lstm": (lstm, reference.lstm), "gru": (gru, reference.gru)}
    ours, exact = functions[cell]

    def results(function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        y_TBH, *_ = function(*tensors, masks)
        return [y_TBH.detach(), *torch.autograd.grad(y_TBH.square().sum(), tensors)]

    expected = results(exact)
    with run_by(Graphs(GRAPHS.capture, GRAPHS.possible, strict=True)):  # whose memory is given back after it
        found = [results(ours) for _ in range(3)]
    errors = [(f - e).norm() / e.norm() for each in found for f, e in zip(each, expected, strict=True)]
    return torch.stack(errors).max().item()
