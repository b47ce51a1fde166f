"""PrunedUNet2DModel: the UNet of the free layout, which stock diffusers has no configuration for.

It is a UNet2DModel whose configuration has one more entry, `pruning` (kept channels per slot, `num_groups` per norm,
inserted identity shortcuts). `DDPMPipeline.from_pretrained` opens a folder that names this class wherever
wanda_fast can be imported.
"""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import ModelMixin, UNet2DModel

from .errors import UserError
from .plan import record_of
from .slots import find_slots, insert_identity_shortcut, resize

__all__ = ["ModelMixin", "PrunedUNet2DModel"]


class PrunedUNet2DModel(UNet2DModel):
    """A UNet2DModel with its own width for every channel slot.

    Args:
        pruning: the pruning record, see `PruningPlan.record`.
        **dense: the configuration of the network before pruning.

    Raises:
        UserError: the record does not fit the configuration.
    """

    def __init__(self, pruning: dict[str, Any], **dense: Any) -> None:
        super().__init__(**dense)
        widths, groups, shortcuts = record_of(pruning)
        try:
            for name in shortcuts:
                insert_identity_shortcut(self, name)
        except AttributeError:
            raise UserError(f"the pruning record does not fit the configuration: there is no {name}") from None
        slots = find_slots(self)
        if set(widths) != set(slots.slots) or any(not 0 < widths[n] <= s.width for n, s in slots.slots.items()):
            raise UserError("the pruning record does not fit the configuration: its slots or widths differ")
        if set(groups) != set(slots.norms):
            raise UserError("the pruning record does not fit the configuration: its norms differ")
        resize(self, slots, widths, groups)
        self.register_to_config(pruning=pruning)

    # diffusers reads the signature to tell which configuration entries belong to the constructor.
    __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            *inspect.signature(UNet2DModel.__init__).parameters.values(),
            inspect.Parameter("pruning", inspect.Parameter.KEYWORD_ONLY),
        ]
    )
