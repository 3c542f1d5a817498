"""Where the reset gate of a GRU acts, as `layers.GRU` and `cells.GRUCell` store and check it."""

import inspect
import warnings
from typing import Any, ClassVar

from torch import nn

NAME = "reset_after"  # in the metadata of a state_dict


class GRUVariant(nn.Module):
    """Adds `reset_after` to a GRU, and notes it in the metadata of its `state_dict`.

    Both variants, and `torch.nn`'s GRU, have weights of the same names and shapes. `load_state_dict` warns
    where the metadata says that the weights are of another variant. Metadata survive `torch.save`. A plain
    dictionary and a safetensors file have none, so nothing is known of their weights.
    """

    __signature__: ClassVar[inspect.Signature | None]

    def __init__(self, *args: Any, reset_after: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.reset_after = reset_after

    def __init_subclass__(cls, **options: Any) -> None:
        """Gives a class without `__init__` of its own the signature of its other base, with `reset_after`."""
        super().__init_subclass__(**options)
        cls.__signature__ = None  # subclasses with an `__init__` of their own must not inherit it
        if cls.__init__ is GRUVariant.__init__:
            base = inspect.signature(super().__init__)
            own = inspect.signature(GRUVariant.__init__).parameters[NAME]
            parameters = [*base.parameters.values(), own]
            cls.__signature__ = base.replace(parameters=parameters[1:])  # without self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        metadata.setdefault(prefix[:-1], {})[NAME] = self.reset_after

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # torch.nn's GRUs have metadata without this name, and reset after the product
        stored = local_metadata.get(NAME, True) if "version" in local_metadata else self.reset_after
        if stored != self.reset_after and any(name.startswith(f"{prefix}weight_") for name in state_dict):
            doubt = (
                ""
                if NAME in local_metadata
                else "; they are taken for torch.nn's, since no variant is noted in them. Versions of vdrop "
                "until November 2026 noted none, either: ignore this for weights of their GRU"
            )
            warnings.warn(
                f"{prefix[:-1] or type(self).__name__}: these weights are of a GRU with "
                f"reset_after={stored}, and this one has reset_after={self.reset_after}, which computes "
                f"something else{doubt}",
                stacklevel=2,
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reset_after={self.reset_after}"
