"""Networks of the free layout, which stock diffusers has no configuration for.

Each is its diffusers class with one more entry in the configuration, `pruning` (kept channels per slot, `num_groups` per
norm, inserted identity shortcuts). `from_pretrained` of the class, and of every pipeline whose folder names it, opens it
wherever wanda_fast can be imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from diffusers import (
    DiTTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from .checkpoint import without_signpost
from .errors import UserError
from .experts import add_experts, dispatch, read_record
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
    """A UNet2DModel with its own width for every channel slot, and with several sets of weights where it was made with `experts`.

    Args:
        pruning: the pruning record, see `PruningPlan.record`; its entry `experts` says where the later ranges of timesteps begin
            and which layers have weights of their own there, see `wanda_fast.experts`.
        **dense: the configuration of the network before pruning.

    Attributes:
        expert_starts: first timesteps of the second and later ranges; () with one set of weights.
        expert_twins: networks of these ranges, whose shared layers are this network's.

    Raises:
        UserError: the record does not fit the configuration.
    """

    expert_starts: tuple[int, ...] = ()
    expert_twins: Sequence[PrunedUNet2DModel] = ()

    def __init__(self, pruning: dict[str, Any], **dense: Any) -> None:
        pruning, dense = _parts(pruning, dense)
        super().__init__(**dense)
        experts = pruning.get("experts")
        _shrink(self, {key: value for key, value in pruning.items() if key != "experts"})
        if experts is not None:
            add_experts(self, *read_record(experts))

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """As `UNet2DModel.forward`; each sample goes through the weights of its timestep."""
        plain = super().forward
        if not self.expert_starts:
            return plain(sample, timestep, class_labels, return_dict)
        out = dispatch([plain, *self.expert_twins], self.expert_starts, sample, timestep, class_labels)
        return UNet2DOutput(sample=out) if return_dict else (out,)

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
