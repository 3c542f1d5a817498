"""Which back end runs."""

import pytest
import torch

from vdrop_cli import kernels


def test_auto_is_fused() -> None:
    assert kernels.choose("auto") == "fused"


def test_a_back_end_that_is_not_there_is_an_error_that_names_those_that_are() -> None:
    with pytest.raises(ValueError, match="choose auto, reference or fused"):
        kernels.choose("cudnn")


def test_a_gru_has_no_cell_state_to_mask() -> None:
    zeros = [torch.zeros(s) for s in ((2, 1, 3), (1, 4), (12, 3), (12, 4), (12,), (12,))]
    with pytest.raises(ValueError, match=r"masks\.c must be None"):
        kernels.gru(*zeros, kernels.Masks(c=torch.ones(1, 1, 4)))
