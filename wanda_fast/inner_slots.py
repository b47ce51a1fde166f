"""Channel slots inside the blocks of text-to-image UNets and diffusion transformers.

What is cut: the inner channels of resnets (conv1, norm2, the time projection, conv2), the hidden neurons of feed-forward
layers (of a gated one the value and its gate together) and whole attention heads (their rows of q, k and v and their
columns of the output projection), of self and cross attention alike.

What stays: the residual streams (`block_out_channels` of a UNet, the hidden size of a transformer), and with them
position embeddings, layer norms, skip connections and resampling. Every slot therefore lies inside one block: no two
slots depend on each other, and modules of unknown types simply stay whole.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import UserError
from .slots import Segment, Slot, SlotMap

INNER_CLASSES = ("UNet2DConditionModel", "DiTTransformer2DModel", "PixArtTransformer2DModel")

# Gated activations hold the values first, then the gates; both of a neuron go together.
_GATED = ("GEGLU", "SwiGLU")
_PLAIN = ("GELU", "ApproximateGELU", "LinearActivation")
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")


def is_inner(model: nn.Module) -> bool:
    """Whether a network is one of those that are pruned inside their blocks, pruned already or not."""
    return base_class(model) in INNER_CLASSES


def base_class(model: nn.Module) -> str:
    """Name of the diffusers class of a network, whether it is pruned or compiled or not."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    return type(model).__name__.removeprefix("Pruned")


def find_inner_slots(model: nn.Module) -> SlotMap:
    """Slots inside the blocks of a network, in the order of its modules.

    Raises:
        UserError: an attention, feed-forward or resnet module that cannot be cut, by name, or nothing to cut at all.
    """
    found = _Finder(len(getattr(model, "down_blocks", ())))
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind.startswith("ResnetBlock"):
            found.resnet(name, module)
        elif kind == "FeedForward":
            found.feed_forward(name, module)
        elif kind == "Attention" or (hasattr(module, "to_q") and hasattr(module, "to_out")):
            found.attention(name, module)
    if not found.map.slots:
        raise UserError(f"{type(model).__name__} has no resnet, feed-forward or attention module that could be cut")
    for table, which in ((found.map.outputs, "producers"), (found.map.inputs, "consumers")):
        for layer, segments in table.items():
            for s in segments:
                side = "norms" if layer in found.map.norms else which
                getattr(found.map.slots[s.slot], side).append((layer, s.offset))
    return found.map


class _Finder:
    def __init__(self, levels: int) -> None:
        self.map = SlotMap({}, {}, {}, {}, [], {}, levels)

    def level(self, name: str) -> tuple[int, ...]:
        part, _, rest = name.partition(".")
        levels = self.map.levels
        if part == "mid_block":
            return (levels - 1,)
        if part in ("down_blocks", "up_blocks"):
            i = int(rest.split(".")[0])
            return (i if part == "down_blocks" else levels - 1 - i,)
        return ()

    def new(self, name: str, width: int, kind: str, unit: int = 1) -> str:
        # A single head cannot go: nothing would be left of the module.
        self.map.slots[name] = Slot(name, width, kind, self.level(name), unit, prunable=unit < width)
        return name

    def resnet(self, name: str, module: Any) -> None:
        if type(module).__name__ != "ResnetBlock2D":
            raise UserError(f"{name}: {type(module).__name__} is not supported")
        _check_layers(name, module, ("conv1", "conv2"), nn.Conv2d)
        if module.conv1.groups != 1 or module.conv2.groups != 1:
            raise UserError(f"{name}: grouped convolutions are not supported")
        width = module.conv1.out_channels
        slot = self.new(f"{name}.conv1", width, "inner")
        m = self.map
        m.outputs[slot] = (Segment(slot, 0),)
        if module.time_emb_proj is not None:
            # With scale_shift the projection holds scales, then shifts, of the same channels.
            twice = module.time_embedding_norm == "scale_shift"
            m.outputs[f"{name}.time_emb_proj"] = (Segment(slot, 0), *((Segment(slot, width),) if twice else ()))
        if not isinstance(module.norm2, nn.GroupNorm):
            raise UserError(f"{name}.norm2: {type(module.norm2).__name__} is not supported")
        m.norms[f"{name}.norm2"] = (module.norm2.num_groups, module.norm2.num_channels)
        m.inputs[f"{name}.norm2"] = m.inputs[f"{name}.conv2"] = (Segment(slot, 0),)

    def feed_forward(self, name: str, module: Any) -> None:
        first = module.net[0]
        kind = type(first).__name__
        if kind not in (*_GATED, *_PLAIN):
            raise UserError(f"{name}: the activation {kind} is not supported")
        out = next((i for i, m in enumerate(module.net) if i > 0 and isinstance(m, nn.Linear)), None)
        if out is None or not isinstance(first.proj, nn.Linear):
            raise UserError(f"{name}: its layers are not plain Linear layers (adapters must be merged before)")
        width = module.net[out].in_features
        slot = self.new(f"{name}.net.0.proj", width, "feed_forward")
        gate = (Segment(slot, width),) if kind in _GATED else ()
        self.map.outputs[slot] = (Segment(slot, 0), *gate)
        self.map.inputs[f"{name}.net.{out}"] = (Segment(slot, 0),)

    def attention(self, name: str, module: Any) -> None:
        processor = type(getattr(module, "processor", None)).__name__
        if type(module).__name__ != "Attention" or processor not in _PROCESSORS:
            raise UserError(f"{name}: {type(module).__name__} with {processor} is not supported")
        for part in ("add_q_proj", "add_k_proj", "norm_q", "norm_k", "spatial_norm"):
            if getattr(module, part, None) is not None:
                raise UserError(f"{name}: attention with {part} is not supported")
        if module.to_k is None or module.to_v is None:
            raise UserError(f"{name}: attention without its own keys and values is not supported")
        _check_layers(name, module, ("to_q", "to_k", "to_v"), nn.Linear)
        inner, heads = module.to_q.out_features, int(module.heads)
        if not module.to_k.out_features == module.to_v.out_features == module.to_out[0].in_features == inner:
            raise UserError(f"{name}: keys or values of another width than the queries are not supported")
        slot = self.new(f"{name}.to_q", inner, "heads", unit=inner // heads)
        for part in ("to_q", "to_k", "to_v"):
            self.map.outputs[f"{name}.{part}"] = (Segment(slot, 0),)
        self.map.inputs[f"{name}.to_out.0"] = (Segment(slot, 0),)
        self.map.attentions[name] = (slot, slot, heads, inner // heads)


def _check_layers(name: str, module: nn.Module, parts: tuple[str, ...], kind: type[nn.Module]) -> None:
    for part in parts:
        layer = getattr(module, part)
        if type(layer) is not kind:
            raise UserError(f"{name}.{part}: {type(layer).__name__} is not supported (adapters must be merged before)")
