"""Masked recurrent layers and the command `vdrop`; `from vdrop_cli import LSTM` imports a layer."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdrop_cli.cells import GRUCell, LSTMCell
    from vdrop_cli.layers import GRU, LSTM, Dropout, Masks, ModelMasks
    from vdrop_cli.modules import LockedDropout, WeightDrop, WordDropout
    from vdrop_cli.sampling import mc_dropout, predict_mc

__version__ = "0.1.0"

PACKAGE = Path(__file__).parent
IS_CHECKOUT = not (PACKAGE / "conf").is_dir()  # only an installed package has conf/ inside it
ROOT = PACKAGE.parent.resolve()  # of the checkout, if it is one
CONF = ROOT / "conf" if IS_CHECKOUT else PACKAGE / "conf"
RECORDS = (
    ROOT / "outputs" / "record" if IS_CHECKOUT and (ROOT / "outputs" / "record").is_dir() else None
)  # the folder of the records that come with a checkout; None without it

# The public names of the layer library by module. They are imported when they are first used, since commands
# that need no tensors start faster without torch.
PUBLIC = {
    "cells": ("GRUCell", "LSTMCell"),
    "layers": ("GRU", "LSTM", "Dropout", "Masks", "ModelMasks"),
    "modules": ("LockedDropout", "WeightDrop", "WordDropout"),
    "sampling": ("mc_dropout", "predict_mc"),
}
__all__ = [
    "GRU",
    "LSTM",
    "Dropout",
    "GRUCell",
    "LSTMCell",
    "LockedDropout",
    "Masks",
    "ModelMasks",
    "WeightDrop",
    "WordDropout",
    "mc_dropout",
    "predict_mc",
]


def __getattr__(name: str) -> Any:
    for module, names in PUBLIC.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
