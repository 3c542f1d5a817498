"""The cells as operators of torch, which `torch.compile` does not trace: shared by the back ends `native` and
`triton`.

An operator returns its outputs and the tensors for its backward pass: the gates (none with `recompute`) and
the states of all steps.

T time  B batch  D input size  H hidden size  G gates (LSTM i f g o; GRU r z n)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vdrop_cli.kernels import reference
from vdrop_cli.kernels.alignment import aligned_size
from vdrop_cli.kernels.derivatives import cell_gradients, needs_reference
from vdrop_cli.kernels.gates import Gates
from vdrop_cli.kernels.graphs import Graphs
from vdrop_cli.kernels.masks import Masks
from vdrop_cli.kernels.products import exact_sums

# The graphs that loops use now; None: those of the back end. A backward pass uses the graphs of its forward
# pass, whichever thread it runs in.
ACTIVE_GRAPHS: ContextVar[Graphs | None] = ContextVar("active_graphs", default=None)


@contextmanager
def use_graphs(graphs: Graphs | None) -> Iterator[None]:
    """Loops over time within the context use these graphs, and so do their backward passes later. None: they
    use the graphs of the back end.
    """
    token = ACTIVE_GRAPHS.set(graphs)
    try:
        yield
    finally:
        ACTIVE_GRAPHS.reset(token)


def exact_on_device(tensor: Tensor) -> ExitStack:
    """A context on the device of the tensor, without a user's autocast, and with sums of products in
    fp32.
    """
    stack = ExitStack()
    stack.enter_context(exact_sums(tensor.device.type))
    stack.enter_context(torch.cuda.device_of(tensor))  # type: ignore[no-untyped-call]
    stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
    return stack


class Layer(NamedTuple):
    """The arguments of an operator besides the first states: first the tensors, which are saved for the
    backward pass. An operator of torch takes them one by one.
    """

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
    cells: bool  # LSTM: whether the cell states of all steps are among the outputs

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self[1:5]

    @property
    def reference_options(self) -> dict[str, Any]:
        """The arguments of `cell_gradients` besides the tensors."""
        masks = Masks(self.mask_x, self.mask_h, self.mask_c)
        return {"masks": masks, "lengths": self.lengths, "compute_dtype": self.compute_dtype}

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:9]

    def gates(self, is_aligned: bool = False) -> Gates:
        """Memory for the gates of all steps, in rows of H elements or in aligned ones."""
        hidden = self.w_hh.shape[1]
        row = aligned_size(hidden, self.compute_dtype) if is_aligned else hidden
        return Gates.allocate(self.x, row, self.w_hh.shape[0] // hidden, Masks(self.mask_x, self.mask_h))

    def loop_masks(self) -> dict[str, Tensor | None]:
        """The masks and lengths as a loop over time reads them, forward and backward."""

        def expand(mask: Tensor | None) -> Tensor | None:
            if mask is None:
                return None
            return mask.expand(*mask.shape[:-2], self.x.shape[1], self.w_hh.shape[1]).contiguous()

        lengths = None if self.lengths is None else self.lengths.contiguous()
        return {"mask_h": expand(self.mask_h), "mask_c": expand(self.mask_c), "lengths": lengths}


HAS_TAGS = "tags" in signature(torch.library.custom_op).parameters  # new in torch 2.7
# A CUDA graph of torch.compile must not contain the graphs of this package.
operator = partial(
    torch.library.custom_op, mutates_args=(), **({"tags": (torch.Tag.cudagraph_unsafe,)} if HAS_TAGS else {})
)
LAYER = (
    "Tensor x, Tensor w_ih, Tensor w_hh, Tensor b_ih, Tensor b_hh, Tensor? mask_x, Tensor? mask_h, Tensor? "
    "mask_c, Tensor? lengths, "
    "ScalarType compute_dtype, bool recompute, bool cells"
)
UPSTREAM = "Tensor? dy, Tensor? dh, Tensor? dc, Tensor? dcells"
GRADIENTS = "Tensor dx, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh"
Tensors = tuple[Tensor, ...]


def empty_contiguous(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def empty_states(first_BH: Tensor, time: int) -> Tensor:
    """Memory for the states of all steps, [T + 1, B, H]: the first ones before the first step."""
    return first_BH.new_empty(time + 1, *first_BH.shape)


def empty_gradients(first: Sequence[Tensor], layer: "Layer", needs_dx: bool) -> Tensors:
    """What a backward pass returns, without values; `first` are the states before the first step."""
    dx = empty_contiguous(layer.x) if needs_dx else layer.x.new_empty(0)
    return *map(empty_contiguous, first), dx, *map(empty_contiguous, layer.weights)


def writable(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A copy of a gradient that may be written to, zeros where no gradient comes."""
    return (
        torch.zeros_like(like) if gradient is None else gradient.clone(memory_format=torch.contiguous_format)
    )


def lstm_operator(
    name: str,
    forward: Callable[[Tensor, Tensor, Layer], Tensors],
    backward: Callable[..., Tensors],
    *,
    is_aligned: bool = False,
) -> Any:
    """Registers the operator `vdrop::<name>`, an LSTM, and returns it.

    `forward(h, c, layer)` returns y, the last h and c, the cell states of all steps (empty without `cells`),
    the gates, and the states h and c of all steps. `backward((dy, dh, dc, dcells), gates, hs, cs, layer,
    needs_dx)` returns the gradients of h, c, x and the weights; upstream gradients may be None. Without
    `needs_dx` that of x is an empty tensor. `is_aligned`: whether the gates have aligned rows.
    """

    @operator(
        f"vdrop::{name}",
        schema=f"(Tensor h, Tensor c, {LAYER}) -> (Tensor y, Tensor h_last, Tensor c_last, Tensor cells, "
        "Tensor a, Tensor hs, Tensor cs)",
    )
    def lstm(h: Tensor, c: Tensor, *arguments: Any) -> Tensors:
        with exact_on_device(h):
            return forward(h, c, Layer(*arguments))

    @lstm.register_fake
    def lstm_fake(h: Tensor, c: Tensor, *arguments: Any) -> Tensors:
        layer = Layer(*arguments)
        hs, cs = (empty_states(state, layer.x.shape[0]) for state in (h, c))
        a = layer.gates(is_aligned).memory
        cells = torch.empty_like(cs[1:]) if layer.cells else c.new_empty(0)
        return (
            torch.empty_like(hs[1:]),
            *map(empty_contiguous, (h, c)),
            cells,
            a.new_empty(0) if layer.recompute else a,
            hs,
            cs,
        )

    @operator(
        f"vdrop::{name}_backward",
        schema=f"({UPSTREAM}, Tensor a, Tensor hs, Tensor cs, {LAYER}, bool needs_dx) -> (Tensor dh, "
        f"Tensor dc, {GRADIENTS})",
    )
    def lstm_backward(*arguments: Any) -> Tensors:
        upstream, (a, hs, cs, *layer, needs_dx) = arguments[:4], arguments[4:]
        with exact_on_device(hs):
            return backward(upstream, a, hs, cs, Layer(*layer), needs_dx)

    @lstm_backward.register_fake
    def lstm_backward_fake(*arguments: Any) -> Tensors:
        hs, cs, *layer, needs_dx = arguments[5:]
        return empty_gradients((hs[0], cs[0]), Layer(*layer), needs_dx)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        layer = Layer(*inputs[2:])
        ctx.save_for_backward(*inputs[:2], *output[4:], *layer.tensors)
        ctx.options, ctx.graphs = layer[len(layer.tensors) :], ACTIVE_GRAPHS.get()
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        h, c, *saved = ctx.saved_tensors
        # torch.compile passes zeros as the gradient of an output that is empty.
        upstream = (*grad_outputs[:3], grad_outputs[3] if ctx.options[-1] else None)
        if needs_reference(upstream):
            layer, is_needed = Layer(*saved[3:], *ctx.options), ctx.needs_input_grad
            with exact_on_device(h):
                dx, dh, dc, *dw = cell_gradients(
                    reference.lstm,
                    2,
                    (layer.x, h, c, *layer.weights),
                    (is_needed[2], *is_needed[:2], *is_needed[3:7]),
                    upstream,
                    cells=layer.cells,
                    **layer.reference_options,
                )
            computed = (dh, dc, dx, *dw)
        else:
            needs_dx = ctx.needs_input_grad[2]
            with use_graphs(ctx.graphs):  # torch may run a backward pass in another thread
                dh, dc, dx, *dw = lstm_backward(*upstream, *saved, *ctx.options, needs_dx)
            computed = (dh, dc, dx if needs_dx else None, *dw)
        return *computed, *[None] * (len(Layer._fields) - 5)

    lstm.register_autograd(gradients, setup_context=save)
    return lstm


def gru_operator(
    name: str,
    forward: Callable[[Tensor, Layer, bool], Tensors],
    backward: Callable[..., Tensors],
    *,
    is_aligned: bool = False,
) -> Any:
    """Registers the operator `vdrop::<name>`, a GRU, and returns it.

    `forward(h, layer, reset_after)` returns y, the last h, the gates, the states of all steps, and with
    `reset_after` the products U_n (m ∘ h) + b of all steps. `backward(dy, dh, gates, hs, inner, layer,
    reset_after, needs_dx)` returns the gradients of h, x and the weights. Without `needs_dx` that of x is an
    empty tensor. `is_aligned`: whether the gates have aligned rows.
    """

    @operator(
        f"vdrop::{name}",
        schema=f"(Tensor h, {LAYER}, bool reset_after) -> (Tensor y, Tensor h_last, Tensor a, Tensor hs, "
        "Tensor inner)",
    )
    def gru(h: Tensor, *arguments: Any) -> Tensors:
        with exact_on_device(h):
            return forward(h, Layer(*arguments[:-1]), arguments[-1])

    @gru.register_fake
    def gru_fake(h: Tensor, *arguments: Any) -> Tensors:
        layer, reset_after = Layer(*arguments[:-1]), arguments[-1]
        hs = empty_states(h, layer.x.shape[0])
        a = layer.gates(is_aligned).memory
        empty = h.new_empty(0)
        saved = (
            (empty, hs, empty)
            if layer.recompute
            else (a, hs, torch.empty_like(hs[1:]) if reset_after else empty)
        )
        return torch.empty_like(hs[1:]), empty_contiguous(h), *saved

    @operator(
        f"vdrop::{name}_backward",
        schema=f"(Tensor? dy, Tensor? dh, Tensor a, Tensor hs, Tensor inner, {LAYER}, bool reset_after, "
        f"bool needs_dx) -> (Tensor dh, {GRADIENTS})",
    )
    def gru_backward(
        dy: Tensor | None, dh: Tensor | None, a: Tensor, hs: Tensor, inner: Tensor, *arguments: Any
    ) -> Tensors:
        *layer, reset_after, needs_dx = arguments
        with exact_on_device(hs):
            return backward(dy, dh, a, hs, inner, Layer(*layer), reset_after, needs_dx)

    @gru_backward.register_fake
    def gru_backward_fake(
        dy: Tensor | None, dh: Tensor | None, a: Tensor, hs: Tensor, inner: Tensor, *arguments: Any
    ) -> Tensors:
        return empty_gradients((hs[0],), Layer(*arguments[:-2]), arguments[-1])

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        layer = Layer(*inputs[1:-1])
        ctx.save_for_backward(inputs[0], *output[2:], *layer.tensors)
        ctx.options, ctx.graphs = (*layer[len(layer.tensors) :], inputs[-1]), ACTIVE_GRAPHS.get()
        ctx.set_materialize_grads(False)

    def gradients(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        h, *saved = ctx.saved_tensors
        if needs_reference((dy, dh)):
            *options, reset_after = ctx.options
            layer, is_needed = Layer(*saved[3:], *options), ctx.needs_input_grad
            with exact_on_device(h):
                dx, dh, *dw = cell_gradients(
                    reference.gru,
                    1,
                    (layer.x, h, *layer.weights),
                    (is_needed[1], is_needed[0], *is_needed[2:6]),
                    (dy, dh),
                    **layer.reference_options,
                    reset_after=reset_after,
                )
            computed = (dh, dx, *dw)
        else:
            needs_dx = ctx.needs_input_grad[1]
            with use_graphs(ctx.graphs):
                dh, dx, *dw = gru_backward(dy, dh, *saved, *ctx.options, needs_dx)
            computed = (dh, dx if needs_dx else None, *dw)
        return *computed, *[None] * (len(Layer._fields) - 5 + 1)

    gru.register_autograd(gradients, setup_context=save)
    return gru
