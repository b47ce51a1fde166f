"""Plan → smaller network: physical compaction of every tensor of a network, and its new configuration.

The pruned network is a plain UNet2DModel in the `stock` layout. In the `free` layout it is a PrunedUNet2DModel (or
PrunedUNet2DConditionModel, ...): the same forward pass over modules whose widths a stock configuration cannot express.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import ops
from .errors import UserError
from .inner_slots import base_class, is_inner
from .plan import CostModel, LayerCost, PruningPlan, architecture_fingerprint, stock_config
from .slots import SlotMap, find_slots, insert_identity_shortcut

if TYPE_CHECKING:
    from diffusers import UNet2DModel

Keep = tuple[Tensor | None, Tensor | None]


@contextmanager
def _quiet_diffusers():
    """Silence the notice that diffusers prints for every attention layer built without `attention_head_dim`."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def new_unet(
    config: Mapping[str, Any], device: str | torch.device = "meta", base: str = "UNet2DModel"
) -> UNet2DModel:
    """A network of this configuration and diffusers class; on the meta device by default, which costs no memory."""
    import diffusers

    with torch.device(device), _quiet_diffusers():
        return getattr(diffusers, base).from_config({k: v for k, v in config.items() if not k.startswith("_")})


def prepared_copy(unet: UNet2DModel, identity_shortcuts: list[str]) -> UNet2DModel:
    """The dense network with the plan's identity shortcuts inserted: computes the same function.

    A copy, except for networks that are pruned inside their blocks: nothing is ever inserted there, so they are given
    back as they are.
    """
    if is_inner(unet):
        if identity_shortcuts:
            raise UserError(f"the plan does not fit this network: {type(unet).__name__} takes no identity shortcuts")
        return unet
    twin = copy.deepcopy(unet)
    modules = dict(twin.named_modules())
    for name in identity_shortcuts:
        if not hasattr(modules.get(name), "conv_shortcut"):
            raise UserError(f"the plan does not fit this network: there is no resnet {name[:80]}")
        insert_identity_shortcut(twin, name)
    return twin


def _side(slots: SlotMap, keep: Mapping[str, Tensor], segments: tuple) -> Tensor | None:
    """Kept indices along a dimension made of segments; None where every channel stays."""
    if not segments or all(len(keep[s.slot]) == slots.slots[s.slot].width for s in segments):
        return None
    return torch.cat([keep[s.slot] + s.offset for s in segments])


def layer_keep(slots: SlotMap, keep: Mapping[str, Tensor]) -> dict[str, Keep]:
    """Layer or norm -> (kept output channels, kept input channels) of the dense layer; None means all.

    Norms have their channels on both sides. Layers that no slot touches are absent.
    """
    found: dict[str, Keep] = {}
    for name in [*slots.inputs, *slots.outputs]:
        read = _side(slots, keep, slots.inputs.get(name, ()))
        found[name] = (read if name in slots.norms else _side(slots, keep, slots.outputs.get(name, ())), read)
    return found


def plan_keep(slots: SlotMap, plan: PruningPlan) -> dict[str, Keep]:
    """`layer_keep` of a plan, with the input of the timestep MLPs where the sinusoidal embedding became narrower.

    The frequencies that stay are the first ones, in its sine half and in its cosine half alike.
    """
    found = layer_keep(slots, plan.keep)
    if plan.config is None or plan.config.get("time_embedding_type", "positional") != "positional":
        return found
    old, new = (int(c["block_out_channels"][0]) // 2 for c in (plan.dense_config, plan.config))
    if old != new:
        halves = torch.cat([torch.arange(new), old + torch.arange(new)])
        for layer in ("time_embedding.linear_1", "class_embedding.linear_1"):
            if layer in found:
                found[layer] = (found[layer][0], halves)
    return found


def gather_state(unet: UNet2DModel, slots: SlotMap, plan: PruningPlan, *, backend: str | None = None) -> dict[str, Tensor]:
    """State dict of the compacted network: kept rows and columns of every tensor, gathered by one `ops.compact` call.

    With a single attention head the softmax scale follows the head size, so sqrt(d_new / d_old) is folded into `to_q`.
    """
    names, tensors, keep_out, keep_in = [], [], [], []
    per_layer = layer_keep(slots, plan.keep)
    device = next(unet.parameters()).device
    moved = {
        n: tuple(None if k is None else k.to(device) for k in pair) for n, pair in per_layer.items()
    }
    state = unet.state_dict()
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        out, read = moved.get(layer, (None, None))
        if kind == "weight" and tensor.ndim >= 2 and isinstance(unet.get_submodule(layer), nn.Embedding):
            out, read = None, out  # an embedding writes its columns
        names.append(key)
        tensors.append(tensor.detach())
        keep_out.append(out)
        keep_in.append(read if tensor.ndim >= 2 else None)
    gathered = dict(zip(names, ops.compact(tensors, keep_out, keep_in, backend=backend)))
    for name, (q, _, heads, _) in slots.attentions.items():
        old, new = slots.slots[q].width, len(plan.keep[q])
        if heads == 1 and new != old:
            for kind in ("weight", "bias"):
                key = f"{name}.to_q.{kind}"
                if key in gathered:
                    gathered[key] = gathered[key] * math.sqrt(new / old)
    return gathered


def refit_sinusoid(dense: UNet2DModel, pruned_config: Mapping[str, Any], rows: Tensor | None, *, layer: str) -> Tensor:
    """New input weights of a timestep MLP whose sinusoidal input became narrower.

    With `freq_shift' = freq_shift - (C0 - C0')/2` the new frequencies are exactly the first C0'/2 old ones. The weight
    is refitted by ridge least squares in float64 over every t = 0..T-1, so that the layer's output stays.

    Args:
        dense: the dense network.
        pruned_config: configuration with the new `block_out_channels[0]` and `freq_shift`.
        rows: kept rows of `layer`, or None.
        layer: "time_embedding.linear_1" or "class_embedding.linear_1".

    Returns:
        [C_out', C0'] in the dense weight's dtype.
    """
    from diffusers.models.embeddings import get_timestep_embedding

    config = dense.config
    weight = dense.get_parameter(f"{layer}.weight").detach().double().cpu()
    if rows is not None:
        weight = weight[rows.cpu()]
    t = torch.arange(int(config.get("num_train_timesteps") or 1000), dtype=torch.float64)

    def sinusoid(width: int, shift: float) -> Tensor:
        flip = bool(config["flip_sin_to_cos"])
        return get_timestep_embedding(t, width, flip_sin_to_cos=flip, downscale_freq_shift=shift).double()

    old = sinusoid(int(config["block_out_channels"][0]), config["freq_shift"])
    new = sinusoid(int(pruned_config["block_out_channels"][0]), pruned_config["freq_shift"])
    gram = new.T @ new
    ridge = 1e-10 * gram.diagonal().mean()
    gram.diagonal().add_(ridge)
    fitted = torch.linalg.solve(gram, new.T @ (old @ weight.T)).T
    like = dense.get_parameter(f"{layer}.weight")
    return fitted.to(dtype=like.dtype, device=like.device).contiguous()


def check_plan(plan: PruningPlan, unet: UNet2DModel, slots: SlotMap) -> None:
    """Compare a plan with the network it is to be applied to.

    Raises:
        UserError: the plan belongs to another architecture, or its indices do not fit.
    """
    if plan.architecture != architecture_fingerprint(json_config(unet)):
        raise UserError("the plan was made for another architecture (its configuration differs from this model's)")
    if architecture_fingerprint(plan.dense_config) != plan.architecture:
        raise UserError("the plan is damaged: its dense configuration is not that of its architecture")
    missing, unknown = set(slots.slots) - set(plan.keep), set(plan.keep) - set(slots.slots)
    if missing or unknown:
        raise UserError(f"the plan does not fit this network: slot {sorted(missing | unknown)[0]} does not match")
    for name, keep in plan.keep.items():
        width = slots.slots[name].width
        if int(keep[-1]) >= width:
            raise UserError(f"the plan does not fit this network: slot {name} has {width} channels, not {int(keep[-1]) + 1}")
    for name in slots.norms:
        if name not in plan.norm_groups:
            raise UserError(f"the plan does not fit this network: it has no num_groups for {name}")
        new = sum(len(plan.keep[s.slot]) for s in slots.inputs[name])
        if plan.norm_groups[name] < 1 or new % plan.norm_groups[name]:
            raise UserError(f"the plan is not legal: {plan.norm_groups[name]} groups do not divide {new} channels at {name}")
    for tie in slots.ties:
        if len({len(plan.keep[n]) for n in tie}) > 1:
            raise UserError(f"the plan is not legal: {' and '.join(tie)} must keep equally many channels")
    for slot in slots.slots.values():
        if slot.unit > 1:
            heads = plan.keep[slot.name].view(-1, slot.unit) if len(plan.keep[slot.name]) % slot.unit == 0 else None
            whole = heads is not None and bool((heads == heads[:, :1] + torch.arange(slot.unit)).all())
            if not whole or heads is None or bool((heads[:, 0] % slot.unit).any()):
                raise UserError(f"the plan is not legal: {slot.name} must keep whole heads of {slot.unit} channels")
    if plan.layout == "stock" and not is_inner(unet):
        dense = json.loads(json.dumps(json_config(unet)))
        if plan.config != stock_config(slots, plan.widths, dense, plan.norm_policy):
            raise UserError("the plan is damaged: its configuration is not that of the channels it keeps")


def json_config(unet: UNet2DModel) -> dict[str, Any]:
    """The network's configuration without private entries (`_name_or_path` would leak the source folder)."""
    return {k: v for k, v in dict(unet.config).items() if not k.startswith("_")}


def compact(unet: UNet2DModel, plan: PruningPlan, *, backend: str | None = None) -> UNet2DModel:
    """Apply a plan: a new, smaller network with the kept channels of every tensor; `unet` is left as it is.

    Returns:
        UNet2DModel (stock layout) or PrunedUNet2DModel (free layout), same device and dtype, in eval mode.

    Raises:
        UserError: the plan does not fit the network.
    """
    dense = prepared_copy(unet, plan.identity_shortcuts)
    slots = find_slots(dense)
    check_plan(plan, unet, slots)
    if is_inner(unet):
        return _compact_inner(unet, slots, plan, backend=backend)
    state = gather_state(dense, slots, plan, backend=backend)
    if plan.layout == "stock":
        if plan.config is None:
            raise UserError("the plan has the stock layout but no configuration")
        if plan.config["block_out_channels"][0] != dense.config["block_out_channels"][0]:
            per_layer = layer_keep(slots, plan.keep)
            for layer in sinusoid_consumers(dense):
                state[f"{layer}.weight"] = refit_sinusoid(dense, plan.config, per_layer[layer][0], layer=layer)
        pruned = new_unet(plan.config)
    else:
        pruned = build_free(plan.dense_config, plan.record)
    try:
        pruned.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"the plan does not fit this network: {str(error).splitlines()[-1].strip()}") from None
    return pruned.requires_grad_(False).eval()


def _compact_inner(unet: Any, slots: SlotMap, plan: PruningPlan, *, backend: str | None = None) -> Any:
    """`compact` of a network that is pruned inside its blocks; layers that no slot touches are copied."""
    if plan.layout != "free":
        raise UserError(f"the plan does not fit this network: no stock configuration of {base_class(unet)} can express it")
    pruned = build_free(plan.dense_config, plan.record, base=base_class(unet))
    adopt(pruned, gather_state(unet, slots, plan, backend=backend), unet)
    return pruned


def adopt(pruned: nn.Module, state: Mapping[str, Tensor], dense: nn.Module) -> None:
    """Give an empty network these tensors, and the buffers that are no part of a state dict (position embeddings).

    Raises:
        UserError: names or shapes differ.
    """
    try:
        pruned.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"the plan does not fit this network: {str(error).splitlines()[-1].strip()}") from None
    modules = dict(pruned.named_modules())
    for name, buffer in dense.named_buffers():
        parent, _, child = name.rpartition(".")
        if name not in state:
            modules[parent].register_buffer(child, buffer.clone(), persistent=False)
    pruned.requires_grad_(False).eval()


def sinusoid_consumers(unet: UNet2DModel) -> tuple[str, ...]:
    """Layers that read the sinusoidal timestep embedding, whose width a stock configuration ties to level 0."""
    if unet.config.get("time_embedding_type", "positional") != "positional":
        return ()
    by_class = unet.config.get("class_embed_type") == "timestep"
    return ("time_embedding.linear_1", "class_embedding.linear_1") if by_class else ("time_embedding.linear_1",)


def build_free(
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    device: str | torch.device = "meta",
    base: str = "UNet2DModel",
) -> UNet2DModel:
    """An empty free-layout network from the dense configuration, its diffusers class and a pruning record.

    Raises:
        UserError: the record does not fit the configuration.
    """
    from . import pruned_unet

    with torch.device(device), _quiet_diffusers():
        return getattr(pruned_unet, f"Pruned{base}")(pruning=dict(record), **{k: v for k, v in config.items() if not k.startswith("_")})


def cost_model(unet: UNet2DModel, slots: SlotMap) -> CostModel:
    """Parameters and MACs as a function of the slots' widths, for one image of the configuration's sample size.

    The number of output positions of every layer is read off a forward pass on the meta device.

    Raises:
        UserError: the network cannot run on images of that size.
    """
    if is_inner(unet):
        return _inner_costs(unet, slots)
    twin = new_unet(unet.config)
    for name, module in unet.named_modules():
        if type(module).__name__ == "ResnetBlock2D" and module.conv_shortcut is not None:
            insert_identity_shortcut(twin, name)
    layers: list[LayerCost] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            if isinstance(module, nn.Conv2d):
                kernel = math.prod(module.kernel_size)
                c_in, c_out, positions = module.in_channels, module.out_channels, math.prod(out.shape[2:])
            else:
                kernel, c_in, c_out = 1, module.in_features, module.out_features  # type: ignore[assignment]
                positions = out.numel() // out.shape[-1]
            vector = 0 if module.bias is None else 1
            layers.append(LayerCost(name, c_in, c_out, kernel, vector, kernel * positions))

        handles.append(module.register_forward_hook(hook))

    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            watch(name, module)
    size = unet.config["sample_size"] or 32
    height, width = size if isinstance(size, list | tuple) else (size, size)
    with torch.no_grad():
        sample = torch.empty(1, unet.config["in_channels"], height, width, device="meta")
        labels = None
        if twin.class_embedding is not None:
            labels = torch.zeros(1, dtype=torch.int64, device="meta")
            if isinstance(twin.class_embedding, nn.Identity):
                labels = torch.empty(1, twin.time_embedding.linear_2.out_features, device="meta")
        try:
            twin(sample, torch.zeros(1, dtype=torch.int64, device="meta"), class_labels=labels)
        except RuntimeError as error:  # such as a size that does not come back after halving and doubling
            why = str(error).splitlines()[0]
            raise UserError(f"the network does not run on images of its own sample_size, {height} x {width}: {why}") from None
    for handle in handles:
        handle.remove()
    norms = {name: channels for name, (_, channels) in slots.norms.items()}
    for name, module in twin.named_modules():
        if isinstance(module, nn.Embedding):
            layers.append(LayerCost(name, module.num_embeddings, module.embedding_dim, 1, 0, 0))
        elif type(module).__name__ == "GaussianFourierProjection":
            layers.append(LayerCost(name, 1, module.weight.numel(), 1, 0, 0))
    return CostModel(layers, slots, norms, sinusoid_consumers(unet))


def _inner_costs(unet: Any, slots: SlotMap) -> CostModel:
    """`cost_model` of a network that is pruned inside its blocks; layers that are called twice count twice."""
    from .inputs import Prompts, forward, input_spec

    twin = new_unet(unet.config, base=base_class(unet))
    positions: dict[str, int] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            count = math.prod(out.shape[2:]) if isinstance(module, nn.Conv2d) else out.numel() // out.shape[-1]
            positions[name] = positions.get(name, 0) + count

        module.register_forward_hook(hook)

    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            watch(name, module)
    spec = input_spec(unet)
    with torch.no_grad():
        condition = {k: v.to("meta") for k, v in Prompts().pick(spec, [0], [True], 0, "cpu").items()}
        time = torch.zeros(1, dtype=torch.int64, device="meta")
        forward(twin.eval(), torch.empty(1, *spec.shape, device="meta"), time, condition)
    layers, counted = [], 0
    for name, module in twin.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            rows, columns = module.weight.shape[:2]
            kernel = module.weight[0, 0].numel()
            cost = LayerCost(name, columns, rows, kernel, int(module.bias is not None), kernel * positions.get(name, 0))
            layers.append(cost)
            counted += cost.kernel * rows * columns + cost.vector * rows
    norms = {name: channels for name, (_, channels) in slots.norms.items()}
    counted += 2 * sum(norms.values())
    rest = sum(p.numel() for p in twin.parameters()) - counted
    return CostModel(layers, slots, norms, constant=rest)
