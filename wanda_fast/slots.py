"""Coupled channel sets ("slots") of a diffusers UNet2DModel, and where every tensor is cut.

(Text-to-image UNets and transformers have slots of the same form, found by `wanda_fast.inner_slots`.)

A slot is one set of channels that can only be removed together: every layer that writes it (producers), every layer
that reads it (consumers) and every norm that sees it. Residual additions join the slots of their two operands,
concatenations put several slots side by side. The module tree of the network is walked once, in execution order;
no tensor is touched and no forward pass is run, so it works on the meta device as well.

`google/ddpm-cifar10-32` has 54 channel slots and 2 time-embedding slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from .errors import UserError
from .experts import refuse_experts

if TYPE_CHECKING:
    from diffusers import UNet2DModel

SUPPORTED_BLOCKS = {
    "AttnDownBlock2D",
    "AttnUpBlock2D",
    "DownBlock2D",
    "ResnetDownsampleBlock2D",
    "ResnetUpsampleBlock2D",
    "UNetMidBlock2D",
    "UpBlock2D",
}


@dataclass(frozen=True)
class Segment:
    """A run of channels of one tensor dimension: all channels of `slot`, from `offset` on (dense numbering)."""

    slot: str
    offset: int


@dataclass
class Slot:
    """One set of channels that is removed together.

    Attributes:
        name: the first layer that writes it, such as "down_blocks.0.resnets.0.conv1".
        width: channels in the dense network.
        kind: "stream" (residual stream), "inner" (inside a resnet), "qk" or "v" (attention with one head),
            "heads" (attention with several heads), "feed_forward" (hidden neurons), "time_hidden" or "time" (the time
            embedding's two widths).
        levels: resolution levels whose width this slot has; empty for the time embedding.
        unit: channels that go together, the head size for "heads", 1 otherwise.
        prunable: False when the width is given from outside (an identity class embedding).
        producers: (layer, offset in its output dimension).
        consumers: (layer, offset in its input dimension).
        norms: (norm, offset in its channel dimension).
    """

    name: str
    width: int
    kind: str
    levels: tuple[int, ...] = ()
    unit: int = 1
    prunable: bool = True
    producers: list[tuple[str, int]] = field(default_factory=list)
    consumers: list[tuple[str, int]] = field(default_factory=list)
    norms: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class SlotMap:
    """All slots of a network and, per layer, the slots along each of its channel dimensions.

    Attributes:
        slots: by name, in execution order.
        outputs: layer -> segments of its output channels. A layer that is absent keeps all of them.
        inputs: layer or norm -> segments of its input channels.
        norms: names of the norms, with their (num_groups, num_channels).
        ties: tuples of slots that must keep equally many channels (q/k with v, the time embedding's two widths).
        attentions: attention module -> (slot of q and k, slot of v, heads, head size).
        levels: number of resolution levels.
    """

    slots: dict[str, Slot]
    outputs: dict[str, tuple[Segment, ...]]
    inputs: dict[str, tuple[Segment, ...]]
    norms: dict[str, tuple[int, int]]
    ties: list[tuple[str, ...]]
    attentions: dict[str, tuple[str, str, int, int]]
    levels: int


def check_supported(unet: nn.Module) -> None:
    """Refuse by name what the slot walk cannot follow.

    Raises:
        UserError: the network is not a UNet2DModel, or has a block or option that is not supported.
    """
    if type(unet).__name__ not in ("UNet2DModel", "PrunedUNet2DModel"):
        from .inner_slots import INNER_CLASSES

        known = ", ".join(("UNet2DModel", *INNER_CLASSES))
        raise UserError(f"{type(unet).__name__} is not supported: only {known} can be pruned")
    refuse_experts(unet, "finding its channel slots")
    blocks = [*unet.down_blocks, *unet.up_blocks]  # type: ignore[misc]
    if unet.mid_block is not None:
        blocks.append(unet.mid_block)
    for block in blocks:
        kind = type(block).__name__
        if kind not in SUPPORTED_BLOCKS:
            known = ", ".join(sorted(SUPPORTED_BLOCKS))
            raise UserError(f"block type {kind} is not supported; supported: {known}")
    for name, module in unet.named_modules():
        kind = type(module).__name__
        if kind == "ResnetBlockCondNorm2D":
            raise UserError(f"{name}: resnet_time_scale_shift='spatial' is not supported")
        if kind == "Attention" and (module.spatial_norm is not None or module.norm_q is not None):
            raise UserError(f"{name}: attention with spatial or q/k norms is not supported")
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            raise UserError(f"{name}: grouped convolutions are not supported")


class _Walk:
    """Symbolic execution: an activation is a list of channel-set ids, one per concatenated part."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.facts: list[Slot] = []
        self.outputs: dict[str, list[tuple[int, int]]] = {}
        self.inputs: dict[str, list[tuple[int, int]]] = {}
        self.norms: dict[str, tuple[int, int]] = {}
        self.ties: list[tuple[int, ...]] = []
        self.attentions: dict[str, tuple[int, int, int, int]] = {}

    def new(self, name: str, width: int, kind: str, level: int | None = None, unit: int = 1) -> int:
        self.parent.append(len(self.parent))
        self.facts.append(Slot(name, width, kind, () if level is None else (level,), unit))
        return len(self.parent) - 1

    def root(self, i: int) -> int:
        while self.parent[i] != i:
            i = self.parent[i]
        return i

    def join(self, a: int, b: int) -> int:
        a, b = sorted((self.root(a), self.root(b)))
        if a == b:
            return a
        keep, gone = self.facts[a], self.facts[b]
        if keep.width != gone.width:
            raise UserError(f"{keep.name} ({keep.width}) and {gone.name} ({gone.width}) are added but differ in width")
        keep.levels = tuple(sorted({*keep.levels, *gone.levels}))
        keep.prunable = keep.prunable and gone.prunable
        self.parent[b] = a
        return a

    def segments(self, parts: list[int]) -> list[tuple[int, int]]:
        found, offset = [], 0
        for i in parts:
            found.append((i, offset))
            offset += self.facts[self.root(i)].width
        return found

    def reads(self, layer: str, parts: list[int]) -> None:
        self.inputs[layer] = self.segments(parts)

    def writes(self, layer: str, parts: list[int]) -> None:
        self.outputs[layer] = self.segments(parts)

    def norm(self, name: str, module: nn.GroupNorm | None, parts: list[int]) -> None:
        if module is not None:
            self.norms[name] = (module.num_groups, module.num_channels)
            self.reads(name, parts)

    def resnet(self, name: str, module: nn.Module, x: list[int], time: int, level: int) -> list[int]:
        self.norm(f"{name}.norm1", module.norm1, x)  # type: ignore[arg-type]
        inner = self.new(f"{name}.conv1", module.conv1.out_channels, "inner", level)  # type: ignore[union-attr, arg-type]
        self.reads(f"{name}.conv1", x)
        self.writes(f"{name}.conv1", [inner])
        if module.time_emb_proj is not None:
            self.reads(f"{name}.time_emb_proj", [time])
            # With scale_shift the projection holds scales, then shifts, of the same channels.
            twice = module.time_embedding_norm == "scale_shift"
            self.writes(f"{name}.time_emb_proj", [inner, inner] if twice else [inner])
        self.norm(f"{name}.norm2", module.norm2, [inner])  # type: ignore[arg-type]
        self.reads(f"{name}.conv2", [inner])
        out = self.new(f"{name}.conv2", module.conv2.out_channels, "stream", level)  # type: ignore[union-attr, arg-type]
        self.writes(f"{name}.conv2", [out])
        if module.conv_shortcut is not None:
            self.reads(f"{name}.conv_shortcut", x)
            self.writes(f"{name}.conv_shortcut", [out])
        elif len(x) == 1:
            out = self.join(x[0], out)
        else:
            raise UserError(f"{name}: an identity shortcut over a concatenation is not supported")
        return [out]

    def attention(self, name: str, module: nn.Module, x: list[int], level: int) -> list[int]:
        self.norm(f"{name}.group_norm", module.group_norm, x)  # type: ignore[arg-type]
        heads, inner = int(module.heads), int(module.to_q.out_features)  # type: ignore[arg-type, union-attr]
        if heads > 1:
            q = v = self.new(f"{name}.to_q", inner, "heads", level, unit=inner // heads)
        else:
            q = self.new(f"{name}.to_q", inner, "qk", level)
            v = self.new(f"{name}.to_v", inner, "v", level)
            self.ties.append((q, v))
        for part, slot in (("to_q", q), ("to_k", q), ("to_v", v)):
            self.reads(f"{name}.{part}", x)
            self.writes(f"{name}.{part}", [slot])
        self.attentions[name] = (q, v, heads, inner // heads)
        self.reads(f"{name}.to_out.0", [v])
        out = self.new(f"{name}.to_out.0", module.to_out[0].out_features, "stream", level)  # type: ignore[index, union-attr]
        self.writes(f"{name}.to_out.0", [out])
        if module.residual_connection:
            out = self.join(x[0], out)
        return [out]

    def block(self, name: str, block: nn.Module, x: list[int], time: int, level: int, skips: list[int] | None):
        """Resnets with their attentions; returns the output and what a down block hands to the up path."""
        handed: list[int] = []
        attentions = getattr(block, "attentions", None)
        for i, resnet in enumerate(block.resnets):  # type: ignore[arg-type]
            if skips is not None:
                x = [*x, skips.pop()]
            x = self.resnet(f"{name}.resnets.{i}", resnet, x, time, level)
            if attentions is not None and i < len(attentions) and attentions[i] is not None:
                x = self.attention(f"{name}.attentions.{i}", attentions[i], x, level)
            handed.append(x[0])
        return x, handed

    def resample(self, name: str, modules: nn.ModuleList | None, x: list[int], time: int, level: int) -> list[int]:
        for i, module in enumerate(modules or ()):
            if hasattr(module, "conv1"):  # a ResnetBlock2D that changes the resolution
                x = self.resnet(f"{name}.{i}", module, x, time, level)
            elif getattr(module, "conv", None) is not None and isinstance(module.conv, nn.Conv2d):
                self.reads(f"{name}.{i}.conv", x)
                x = [self.new(f"{name}.{i}.conv", module.conv.out_channels, "stream", level)]
                self.writes(f"{name}.{i}.conv", x)
        return x


def find_slots(unet: UNet2DModel) -> SlotMap:
    """Walk a network and return its channel slots: all of a UNet2DModel, those inside the blocks of the classes that
    `wanda_fast.inner_slots` knows.

    Raises:
        UserError: a block or option that is not supported, by name.
    """
    from .inner_slots import find_inner_slots, is_inner

    if is_inner(unet):
        return find_inner_slots(unet)
    check_supported(unet)
    walk = _Walk()
    embedding = unet.time_embedding
    hidden = walk.new("time_embedding.linear_1", embedding.linear_1.out_features, "time_hidden")
    walk.writes("time_embedding.linear_1", [hidden])
    walk.reads("time_embedding.linear_2", [hidden])
    time = walk.new("time_embedding.linear_2", embedding.linear_2.out_features, "time")
    walk.writes("time_embedding.linear_2", [time])
    walk.ties.append((hidden, time))
    classes = unet.class_embedding
    if isinstance(classes, nn.Embedding):
        walk.writes("class_embedding", [time])
    elif isinstance(classes, nn.Identity):
        walk.facts[time].prunable = walk.facts[hidden].prunable = False
    elif classes is not None:
        class_hidden = walk.new("class_embedding.linear_1", classes.linear_1.out_features, "time_hidden")
        walk.writes("class_embedding.linear_1", [class_hidden])
        walk.reads("class_embedding.linear_2", [class_hidden])
        walk.writes("class_embedding.linear_2", [time])
        walk.ties[-1] = (hidden, time, class_hidden)

    x = [walk.new("conv_in", unet.conv_in.out_channels, "stream", 0)]
    walk.writes("conv_in", x)
    skips = [x[0]]
    for level, block in enumerate(unet.down_blocks):
        name = f"down_blocks.{level}"
        x, handed = walk.block(name, block, x, time, level, None)
        skips += handed
        if block.downsamplers is not None:
            x = walk.resample(f"{name}.downsamplers", block.downsamplers, x, time, level)
            skips.append(x[0])
    levels = len(unet.down_blocks)
    if unet.mid_block is not None:
        mid, last = unet.mid_block, levels - 1
        x = walk.resnet("mid_block.resnets.0", mid.resnets[0], x, time, last)
        for i, resnet in enumerate(list(mid.resnets)[1:]):
            if mid.attentions[i] is not None:
                x = walk.attention(f"mid_block.attentions.{i}", mid.attentions[i], x, last)
            x = walk.resnet(f"mid_block.resnets.{i + 1}", resnet, x, time, last)
    for i, block in enumerate(unet.up_blocks):
        name, level = f"up_blocks.{i}", levels - 1 - i
        x, _ = walk.block(name, block, x, time, level, skips)
        if block.upsamplers is not None:
            x = walk.resample(f"{name}.upsamplers", block.upsamplers, x, time, level)
    walk.norm("conv_norm_out", unet.conv_norm_out, x)
    walk.reads("conv_out", x)
    return _finish(walk, levels)


def _finish(walk: _Walk, levels: int) -> SlotMap:
    """Resolve joined ids to slot names and list producers, consumers and norms per slot."""
    slots = {s.name: s for i, s in enumerate(walk.facts) if walk.root(i) == i}

    def name_of(i: int) -> str:
        return walk.facts[walk.root(i)].name

    def resolve(table: dict[str, list[tuple[int, int]]]) -> dict[str, tuple[Segment, ...]]:
        return {layer: tuple(Segment(name_of(i), o) for i, o in parts) for layer, parts in table.items()}

    outputs, inputs = resolve(walk.outputs), resolve(walk.inputs)
    for layer, segments in outputs.items():
        for s in segments:
            slots[s.slot].producers.append((layer, s.offset))
    for layer, segments in inputs.items():
        for s in segments:
            readers = slots[s.slot].norms if layer in walk.norms else slots[s.slot].consumers
            readers.append((layer, s.offset))
    ties = [tuple(dict.fromkeys(name_of(i) for i in tie)) for tie in walk.ties]
    attentions = {n: (name_of(q), name_of(v), h, d) for n, (q, v, h, d) in walk.attentions.items()}
    return SlotMap(slots, outputs, inputs, walk.norms, [t for t in ties if len(t) > 1], attentions, levels)


def identity_shortcuts(unet: UNet2DModel) -> list[str]:
    """First resnets of down levels whose input has the level's own width, so that they have no `conv_shortcut`.

    In the stock layout two neighbouring levels of equal width can only get different widths when such a resnet gets
    an explicit 1x1 identity convolution (see `insert_identity_shortcut`).
    """
    names = []
    for level, block in enumerate(unet.down_blocks):
        if level > 0 and block.resnets[0].conv_shortcut is None:
            names.append(f"down_blocks.{level}.resnets.0")
    return names


def insert_identity_shortcut(unet: UNet2DModel, name: str) -> None:
    """Give a resnet an explicit 1x1 `conv_shortcut` that is the identity (one-hot weight, zero bias): exact.

    The module is changed in place; the slots before and after it become independent.
    """
    resnet = unet.get_submodule(name)
    if resnet.conv_shortcut is not None:
        return
    like = resnet.conv2.weight
    width = resnet.conv2.out_channels
    conv = nn.Conv2d(width, width, 1, device=like.device, dtype=like.dtype)
    if like.device.type != "meta":
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    resnet.conv_shortcut = conv
    resnet.use_in_shortcut = True


def resize(unet: UNet2DModel, slots: SlotMap, widths: Mapping[str, int], norm_groups: Mapping[str, int]) -> None:
    """Give every module the shape it has after pruning (values are left undefined); the free layout's skeleton.

    Args:
        unet: network of the dense configuration with identity shortcuts inserted; changed in place.
        widths: kept channels per slot.
        norm_groups: `num_groups` per norm.
    """

    def total(segments: tuple) -> int:
        return sum(widths.get(s.slot, slots.slots[s.slot].width) for s in segments)

    def fresh(module: nn.Module, kind: str, shape: tuple[int, ...]) -> None:
        old = getattr(module, kind)
        if old is not None and tuple(old.shape) != shape:
            empty = torch.empty(shape, dtype=old.dtype, device=old.device)
            setattr(module, kind, nn.Parameter(empty, requires_grad=old.requires_grad))

    for name in {**slots.inputs, **slots.outputs}:
        module = unet.get_submodule(name)
        c_in = total(slots.inputs[name]) if name in slots.inputs else None
        c_out = total(slots.outputs[name]) if name in slots.outputs else None
        if isinstance(module, nn.GroupNorm):
            module.num_channels, module.num_groups = int(c_in or 0), norm_groups[name]
            fresh(module, "weight", (module.num_channels,))
            fresh(module, "bias", (module.num_channels,))
        elif isinstance(module, nn.Conv2d):
            module.in_channels = c_in if c_in is not None else module.in_channels
            module.out_channels = c_out if c_out is not None else module.out_channels
            fresh(module, "weight", (module.out_channels, module.in_channels, *module.kernel_size))
            fresh(module, "bias", (module.out_channels,))
        elif isinstance(module, nn.Linear):
            module.in_features = c_in if c_in is not None else module.in_features
            module.out_features = c_out if c_out is not None else module.out_features
            fresh(module, "weight", (module.out_features, module.in_features))
            fresh(module, "bias", (module.out_features,))
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = int(c_out or module.embedding_dim)
            fresh(module, "weight", (module.num_embeddings, module.embedding_dim))
        else:
            raise TypeError(f"{name}: {type(module).__name__} cannot be resized")
    follow_attributes(unet, slots, widths)


def follow_attributes(unet: UNet2DModel, slots: SlotMap, widths: Mapping[str, int]) -> None:
    """Attributes that the forward passes of diffusers check or use: channel counts, heads, softmax scale."""
    for name, module in unet.named_modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
            for sampler in (module.upsample, module.downsample):
                if isinstance(sampler, nn.Module):
                    sampler.channels = sampler.out_channels = module.in_channels
        elif kind in ("Upsample2D", "Downsample2D") and isinstance(getattr(module, "conv", None), nn.Conv2d):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
        elif kind == "Attention":
            q, _, heads, size = slots.attentions[name]
            inner = widths.get(q, slots.slots[q].width)
            module.inner_dim = module.inner_kv_dim = inner
            module.query_dim, module.cross_attention_dim = module.to_q.in_features, module.to_k.in_features
            module.out_dim = module.out_context_dim = module.to_out[0].out_features
            if heads == 1:
                module.scale = inner**-0.5
            else:
                module.heads = module.sliceable_head_dim = inner // size
