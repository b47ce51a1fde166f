"""Criteria: how important is every output channel (row) and every input channel (column) of a layer?

A criterion is one small class. It gives row and column scores per layer; `slot_scores` combines them over all layers
that write or read a slot. To add one:

    @register
    class MeanMagnitude(Criterion):
        name = "mean-magnitude"

        def layer(self, layer, weight, context):
            size = weight.abs().flatten(2).mean(2) if weight.ndim == 4 else weight.abs()
            return size.mean(1), size.mean(0)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import ops
from .errors import UserError

if TYPE_CHECKING:
    from .slots import SlotMap

COMBINATIONS = ("both", "producers", "consumers")


@dataclass
class Context:
    """What a criterion may use beside the weight.

    Attributes:
        act_norm: layer -> [C_in] fp32 ‖X‖₂ of its inputs; empty unless the criterion has `needs_stats`.
        seed: for criteria that draw numbers.
        backend: backend of the operations.
    """

    act_norm: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    backend: str | None = None


class Criterion:
    """Base class of criteria.

    Attributes:
        name: what `--pruner` calls it.
        needs_stats: whether `Context.act_norm` must be filled by a calibration.
    """

    name: ClassVar[str] = ""
    needs_stats: ClassVar[bool] = False

    def layer(self, layer: str, weight: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(row scores [C_out], column scores [C_in]) of one layer, higher is more important.

        Args:
            layer: qualified name.
            weight: [C_out, C_in] or [C_out, C_in, kh, kw].
            context: see `Context`.
        """
        raise NotImplementedError


CRITERIA: dict[str, type[Criterion]] = {}


def register(criterion: type[Criterion]) -> type[Criterion]:
    """Class decorator: make a criterion known under its `name`.

    Raises:
        ValueError: the name is empty or taken.
    """
    if not criterion.name or criterion.name in CRITERIA:
        raise ValueError(f"a criterion needs a name of its own, got {criterion.name!r}")
    CRITERIA[criterion.name] = criterion
    return criterion


def get_criterion(name: str) -> Criterion:
    """The criterion of this name.

    Raises:
        UserError: unknown name; the text lists the known ones.
    """
    if name not in CRITERIA:
        raise UserError(f"unknown pruner {name!r}; known: {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]()


@register
class WandaDiff(Criterion):
    """S = |W| · ‖X‖₂ with activation norms over diffusion timesteps.

    Source: Wanda, Sun et al. 2023, arXiv:2306.11695, §3; here by rows and columns, for structured pruning.
    """

    name = "wanda-diff"
    needs_stats = True

    def layer(self, layer: str, weight: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        if layer not in context.act_norm:
            raise UserError(f"the activation statistics have no layer {layer}: they belong to another model")
        act_norm = context.act_norm[layer].to(weight.device)
        if act_norm.numel() != weight.shape[1]:
            raise UserError(
                f"the activation statistics of {layer} have {act_norm.numel()} channels, the layer reads "
                f"{weight.shape[1]}: they belong to another model"
            )
        return ops.wanda_score(weight, act_norm, backend=context.backend)


@register
class Magnitude(Criterion):
    """Sum of |W| per row and column: Wanda with all norms equal to one."""

    name = "magnitude"

    def layer(self, layer: str, weight: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        ones = torch.ones(weight.shape[1], device=weight.device)
        return ops.wanda_score(weight, ones, backend=context.backend)


@register
class Random(Criterion):
    """Uniform random scores, a function of the seed and the layer's name alone."""

    name = "random"

    def layer(self, layer: str, weight: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        digest = hashlib.sha256(f"{context.seed}/{layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.rand(weight.shape[0], generator=generator), torch.rand(weight.shape[1], generator=generator)


def slot_scores(
    unet: Any, slots: SlotMap, criterion: Criterion, context: Context, *, combine: str = "both"
) -> dict[str, Tensor]:
    """Importance of every channel of every slot, from all its producers and all its consumers.

    Each layer's scores are divided by their mean over the slot's channels, so that every layer has the same say.
    `combine="both"` averages the mean over the producers (rows) with the mean over the consumers (columns);
    "producers" and "consumers" use one side alone (a slot without that side, such as attention q/k, uses the other).

    Returns:
        slot -> [width] float64 on the CPU, with mean 1 (0 for a slot whose scores are all zero).

    Raises:
        UserError: unknown `combine`.
        RuntimeError: a score is not finite; the text names the layer.
    """
    if combine not in COMBINATIONS:
        raise UserError(f"unknown combination {combine!r}; known: {', '.join(COMBINATIONS)}")
    cache: dict[str, tuple[Tensor, Tensor]] = {}

    def both(layer: str) -> tuple[Tensor, Tensor]:
        if layer not in cache:
            module = unet.get_submodule(layer)
            weight = module.weight.detach()
            if isinstance(module, nn.Embedding):  # [classes, C_out]: its columns are what it writes
                rows = criterion.layer(layer, weight.T.contiguous(), Context(
                    {layer: torch.ones(weight.shape[0])}, context.seed, context.backend))[0]
                pair = rows, torch.empty(0)
            else:
                pair = criterion.layer(layer, weight, context)
            for values in pair:
                if not torch.isfinite(values).all():
                    raise RuntimeError(f"{layer}: the {criterion.name} scores are not finite")
            cache[layer] = pair[0].double().cpu(), pair[1].double().cpu()
        return cache[layer]

    def side(layers: list[tuple[str, int]], which: int, width: int) -> Tensor | None:
        parts = []
        for layer, offset in layers:
            values = both(layer)[which][offset : offset + width]
            mean = values.mean()
            parts.append(values / mean if mean > 0 else torch.zeros(width, dtype=torch.float64))
        return torch.stack(parts).mean(0) if parts else None

    result = {}
    for name, slot in slots.slots.items():
        rows, columns = side(slot.producers, 0, slot.width), side(slot.consumers, 1, slot.width)
        if columns is None or (combine == "producers" and rows is not None):
            score = rows
        elif rows is None or combine == "consumers":
            score = columns
        else:
            score = (rows + columns) / 2
        assert score is not None
        result[name] = score
    return result
