"""Where the gates of all steps lie, and the products over all steps at once."""

import pytest
import torch

from vdrop_cli.kernels.gates import (
    Gates,
    input_gradient,
    masked_inputs,
    project_inputs,
    sum_over_steps,
    weight_gradient,
)
from vdrop_cli.kernels.masks import Masks

TIME = 3
BATCH = 2
INPUT = 5
HIDDEN = 4
GATES = 3
EVERY = slice(0, GATES)


@pytest.mark.parametrize("untied", [False, True])
def test_products_over_all_steps_are_those_of_each_step_and_gate(untied: bool) -> None:
    """Whichever way the gates lie: forward, and the gradients of inputs, weights and biases by the chain rule
    written out.
    """
    generator = torch.Generator().manual_seed(0)
    x, w, b, d = (
        torch.randn(s, generator=generator, dtype=torch.float64)
        for s in (
            (TIME, BATCH, INPUT),
            (GATES * HIDDEN, INPUT),
            (GATES * HIDDEN,),
            (GATES, TIME, BATCH, HIDDEN),
        )
    )
    mask = torch.rand(1, GATES if untied else 1, BATCH, INPUT, generator=generator, dtype=torch.float64)
    gates = Gates.allocate(x, HIDDEN, GATES, Masks(x=mask))
    assert gates.by_gate is untied
    inputs = project_inputs(gates, x, w, b, mask)
    w_GHD, m_GBD = w.view(GATES, HIDDEN, INPUT), mask[0].expand(GATES, -1, -1)
    expected = torch.einsum("ghd,gbd,tbd->gtbh", w_GHD, m_GBD, x) + b.view(GATES, 1, 1, HIDDEN)
    torch.testing.assert_close(gates.view_GTBR, expected)
    again = masked_inputs(gates, EVERY, x, torch.float64, mask)
    assert all(torch.equal(a, b) for a, b in zip(again, inputs, strict=True))

    da, dw = gates.empty_like(), torch.empty_like(w)
    da.view_GTBR.copy_(d)
    weight_gradient(da, EVERY, inputs, dw)
    torch.testing.assert_close(dw.view_as(w_GHD), torch.einsum("gtbh,gbd,tbd->ghd", d, m_GBD, x))
    torch.testing.assert_close(
        input_gradient(da, w, mask, x.dtype), torch.einsum("gtbh,ghd,gbd->tbd", d, w_GHD, m_GBD)
    )
    torch.testing.assert_close(sum_over_steps(da), d.sum((1, 2)).flatten())


@pytest.mark.parametrize("untied", [False, True])
def test_biases_are_summed_in_the_type_that_is_asked_for(untied: bool) -> None:
    """4096 gradients of 1/256 in bf16: summed in it, they would stop to add up at 1."""
    shape = (1, 4096, 1, 1) if untied else (4096, 1, 1)
    da = Gates(torch.full(shape, 1 / 256, dtype=torch.bfloat16), 1)
    assert sum_over_steps(da, torch.float32).item() == 16
