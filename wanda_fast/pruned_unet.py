"""Networks of the free layout, which stock diffusers has no configuration for.

Each is its diffusers class with one more entry in the configuration, `pruning` (kept channels per slot, `num_groups` per
norm, inserted identity shortcuts). `from_pretrained` of the class, and of every pipeline whose folder names it, opens it
wherever wanda_fast can be imported.
"""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import (
    DiTTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from .checkpoint import without_signpost
from .errors import UserError
from .plan import record_of
from .slots import find_slots, insert_identity_shortcut, resize

__all__ = [
    "ModelMixin",
    "PrunedDiTTransformer2DModel",
    "PrunedPixArtTransformer2DModel",
    "PrunedUNet2DConditionModel",
    "PrunedUNet2DModel",
]


def _shrink(network: Any, pruning: dict[str, Any]) -> None:
    """Give a freshly built dense network the widths of a pruning record.

    Raises:
        UserError: the record does not fit the configuration.
    """
    widths, groups, shortcuts = record_of(pruning)
    try:
        for name in shortcuts:
            insert_identity_shortcut(network, name)
    except AttributeError:
        raise UserError(f"the pruning record does not fit the configuration: there is no {name}") from None
    slots = find_slots(network)
    if set(widths) != set(slots.slots) or any(not 0 < widths[n] <= s.width for n, s in slots.slots.items()):
        raise UserError("the pruning record does not fit the configuration: its slots or widths differ")
    if any(widths[n] % s.unit for n, s in slots.slots.items()):
        raise UserError("the pruning record does not fit the configuration: an attention keeps a part of a head")
    if set(groups) != set(slots.norms):
        raise UserError("the pruning record does not fit the configuration: its norms differ")
    resize(network, slots, widths, groups)
    network.register_to_config(pruning=pruning)


def _parts(pruning: dict[str, Any], config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Pruning record and dense configuration, as they are in memory or as they stand in config.json."""
    found = without_signpost({**config, "pruning": pruning})
    return found.pop("pruning"), found


def _signature(dense: type) -> inspect.Signature:
    """diffusers reads the signature to tell which configuration entries belong to the constructor."""
    return inspect.Signature(
        [
            *inspect.signature(dense.__init__).parameters.values(),  # type: ignore[misc]
            inspect.Parameter("pruning", inspect.Parameter.KEYWORD_ONLY),
        ]
    )


class PrunedUNet2DModel(UNet2DModel):
    """A UNet2DModel with its own width for every channel slot.

    Args:
        pruning: the pruning record, see `PruningPlan.record`.
        **dense: the configuration of the network before pruning.

    Raises:
        UserError: the record does not fit the configuration.
    """

    def __init__(self, pruning: dict[str, Any], **dense: Any) -> None:
        pruning, dense = _parts(pruning, dense)
        super().__init__(**dense)
        _shrink(self, pruning)

    __init__.__signature__ = _signature(UNet2DModel)  # type: ignore[attr-defined]


class PrunedUNet2DConditionModel(UNet2DConditionModel):
    """A UNet2DConditionModel with fewer inner channels, feed-forward neurons and heads; see `PrunedUNet2DModel`."""

    def __init__(self, pruning: dict[str, Any], **dense: Any) -> None:
        pruning, dense = _parts(pruning, dense)
        super().__init__(**dense)
        _shrink(self, pruning)

    __init__.__signature__ = _signature(UNet2DConditionModel)  # type: ignore[attr-defined]


class PrunedDiTTransformer2DModel(DiTTransformer2DModel):
    """A DiTTransformer2DModel with fewer feed-forward neurons and heads; see `PrunedUNet2DModel`."""

    def __init__(self, pruning: dict[str, Any], **dense: Any) -> None:
        pruning, dense = _parts(pruning, dense)
        super().__init__(**dense)
        _shrink(self, pruning)

    __init__.__signature__ = _signature(DiTTransformer2DModel)  # type: ignore[attr-defined]


class PrunedPixArtTransformer2DModel(PixArtTransformer2DModel):
    """A PixArtTransformer2DModel with fewer feed-forward neurons and heads; see `PrunedUNet2DModel`."""

    def __init__(self, pruning: dict[str, Any], **dense: Any) -> None:
        pruning, dense = _parts(pruning, dense)
        super().__init__(**dense)
        _shrink(self, pruning)

    __init__.__signature__ = _signature(PixArtTransformer2DModel)  # type: ignore[attr-defined]
