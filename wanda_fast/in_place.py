"""Compaction and repair of a network in its own memory, block by block: for networks too large to be held twice.

The noised images run through the network as paused forward passes (`wanda_fast.lockstep`), each of them twice: once as the
dense and once as the pruned network, which are the same modules at different times. At every block

1. the dense passes run through the layer that reads the slot, and their outputs are kept,
2. the block is cut, and its dense weights are freed,
3. the pruned passes run up to that layer, and it is refitted to the outputs kept: (XᵀX + λI) W' = XᵀY + λW.

So the peak is the dense network, the paused passes (`memory_limit`) and the sums of one layer. In place of every layer
(`wanda_fast.repair`) only those are refitted that read a slot: the second convolution of a resnet, the output projections
of feed-forward layers and attentions. What a block adds to the residual stream is fitted together with the error that the
stream has piled up before, where the block adds it as it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .compact import adopt, build_free, check_plan, layer_keep
from .conv_gram import map_rows, patch_rows, rows_weight
from .inner_slots import base_class
from .inputs import forward, select, to_device
from .least_squares import Sums, solve_ridge
from .lockstep import Event, Hooked, Walk, peak_bytes
from .plan import PruningPlan
from .repair import HELD_OUT, Batch, LayerRepair, RepairReport, _full_precision
from .slots import SlotMap, find_slots, follow_attributes

_HELD_ROWS = 4096  # rows of held-out images that judge a layer's fit


def prune_in_place(
    model: nn.Module,
    plan: PruningPlan,
    batches: Callable[[], Iterable[Batch]],
    *,
    ridge: Sequence[float] = (1e-3, 1e-2, 1e-1),
    memory_limit: int = 4 << 30,
    backend: str | None = None,
    progress: bool = False,
) -> tuple[nn.Module, RepairReport]:
    """Compact and repair a network of `wanda_fast.inner_slots` in its own memory.

    Args:
        model: the dense network, in any dtype; it is used up, and holds pruned weights afterwards.
        plan: for this network, free layout.
        batches: makes the iterable of (x_t, t, conditioning); passes beyond `memory_limit` are left out.
        ridge: λ in units of the mean diagonal of the centred XᵀX; the best on every 8th image is taken. Empty for no repair.
        memory_limit: bytes that the paused passes may hold; at least one batch is used.
        backend: of the operations.
        progress: show a progress bar.

    Returns:
        (the pruned network, the report). `settings` of the report holds the seconds of the cuts and the bytes of a pass.

    Raises:
        UserError: the plan does not fit the network.
        RuntimeError: non-finite values; the text names the layer.
    """
    from tqdm.auto import tqdm

    started = time.perf_counter()
    slots = find_slots(model)
    check_plan(plan, model, slots)
    report = RepairReport("lstsq" if ridge else "none")
    work = _InPlace(model, slots, plan, backend)
    order: list[str] = []
    per_image = 0
    cut = [n for n, s in slots.slots.items() if len(plan.keep[n]) < s.width]
    readers = {slots.slots[n].consumers[0][0]: n for n in cut}
    streams = {reader: _stream(model, reader) for reader in readers}
    watched = {*readers, *(event[0] for event, _ in filter(None, streams.values()))}
    with Hooked(model, watched) as hooked, torch.no_grad(), _full_precision():
        walks: list[tuple[Walk, Walk]] = []
        try:
            images = 0
            for batch in batches() if ridge else ():
                call = _call(batch, next(model.parameters()))
                if not walks:
                    one = (batch[0][:1], batch[1][:1], select(batch[2], slice(1)))
                    run_one = _call(one, next(model.parameters()))
                    hooked.listen(run_one, lambda e, _: order.append(e[0]) if e[1] == "in" and e[0] in readers else None)
                    per_image = 2 * peak_bytes(partial(run_one, model))
                elif (images + len(batch[0])) * per_image > memory_limit:
                    break
                walks.append((Walk(hooked, call), Walk(hooked, call)))
                images += len(batch[0])
            report.images = images
            if ridge and not walks:
                raise ValueError("batches: there is no image to repair with")
            if ridge and (sorted(order) != sorted(readers)):
                odd = sorted(n for n in readers if order.count(n) != 1)[0]
                raise RuntimeError(f"{odd} is called {order.count(odd)} times in a forward pass; it cannot be repaired in place")
            for reader in tqdm(order if ridge else list(readers), desc="cut and repair", unit="layer", disable=not progress):
                stream = streams[reader]
                goals = [work.goal(dense, reader, stream) for dense, _ in walks]
                work.cut(readers[reader])
                if walks:
                    begun = time.perf_counter()
                    done = work.fit(reader, stream, [p for _, p in walks], goals, tuple(ridge), images)
                    report.layers.append(replace(done, seconds=time.perf_counter() - begun))
                del goals
        finally:
            for pair in walks:
                for walk in pair:
                    walk.close()
    pruned = build_free(plan.dense_config, plan.record, base=base_class(model))
    adopt(pruned, model.state_dict(), model)
    report.settings = {"ridge": list(ridge), "memory_limit": memory_limit, "cut_seconds": work.seconds, "pass_bytes": per_image}
    report.seconds = time.perf_counter() - started - work.seconds
    return pruned, report


def _call(batch: Batch, like: Tensor) -> Callable[[nn.Module], Any]:
    x, t = batch[0].to(like), batch[1].to(like.device)
    condition = to_device(batch[2], like.device)

    def run(model: nn.Module) -> None:
        if like.device.type == "cuda":
            torch.cuda.set_device(like.device)
        with torch.no_grad():
            forward(model, x, t, condition)

    return run


def _stream(model: nn.Module, reader: str) -> tuple[Event, Any] | None:
    """(event that shows the residual stream a layer's output is added to, convolution on the way or None); None where the
    block does something else with the output.
    """
    parent, _, leaf = reader.rpartition(".")
    block: Any = model.get_submodule(parent)
    if leaf == "conv2":
        if block.upsample is not None or block.downsample is not None:
            return None
        return (parent, "in"), block.conv_shortcut
    home, _, part = parent.removesuffix(".to_out").removesuffix(".net").rpartition(".")
    owner: Any = model.get_submodule(home)
    norm = {"attn1": "norm1", "attn2": "norm2", "ff": "norm3"}.get(part)
    if getattr(owner, "norm_type", None) != "layer_norm" or norm is None or getattr(owner, norm, None) is None:
        return None
    inner = getattr(owner, part)
    if getattr(inner, "residual_connection", False) or getattr(inner, "rescale_output_factor", 1.0) != 1.0:
        return None
    return (f"{home}.{norm}", "in"), None


def _as_map(value: Tensor, module: nn.Module) -> Tensor:
    """A layer's input or output as [N, C, H, W] float32; a Linear layer is a 1 x 1 convolution."""
    if isinstance(module, nn.Linear):
        value = value.reshape(value.shape[0], -1, value.shape[-1]).transpose(1, 2).unsqueeze(-1)
    return value if value.dtype == torch.float64 else value.float()


class _InPlace:
    def __init__(self, model: nn.Module, slots: SlotMap, plan: PruningPlan, backend: str | None) -> None:
        self.model, self.slots, self.plan, self.backend = model, slots, plan, backend
        self.keep = layer_keep(slots, plan.keep)
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.widths: dict[str, int] = {}
        self.seconds = 0.0

    def base(self, walk: Walk, reader: str, stream: tuple[Event, Any] | None) -> Tensor | float:
        """What the block adds to the layer's output, taken from a pass."""
        if stream is None:
            return 0.0
        event, shortcut = stream
        value = walk.take(event)
        return _as_map(value if shortcut is None else shortcut(value), self.modules[reader])

    def goal(self, walk: Walk, reader: str, stream: tuple[Event, Any] | None) -> Tensor:
        """The dense network's output of a layer, and the stream it is added to."""
        walk.advance([(reader, "out"), *([stream[0]] if stream else [])])
        return _as_map(walk.take((reader, "out")), self.modules[reader]) + self.base(walk, reader, stream)

    def cut(self, name: str) -> None:
        """Cut the layers of one slot and free what they held."""
        started = time.perf_counter()
        slot = self.slots.slots[name]
        self.widths[name] = len(self.plan.keep[name])
        for layer in dict.fromkeys(n for n, _ in (*slot.producers, *slot.norms, *slot.consumers)):
            module = self.modules[layer]
            device = module.weight.device
            out, read = (None if k is None else k.to(device) for k in self.keep[layer])
            tensors = [t for t in (module.weight, module.bias) if t is not None]
            new = ops.compact(
                [t.detach() for t in tensors], [out] * len(tensors),
                [read if t.dim() > 1 else None for t in tensors], backend=self.backend,
            )  # fmt: skip
            for part, tensor in zip(("weight", "bias"), new):
                # each in memory of its own, so that what is freed later is freed
                setattr(module, part, nn.Parameter(tensor.clone(), requires_grad=False))
            _set_widths(module, self.plan.norm_groups.get(layer))
        follow_attributes(self.model, self.slots, self.widths)
        self.seconds += time.perf_counter() - started

    def fit(
        self, reader: str, stream: tuple[Event, Any] | None, walks: list[Walk], goals: list[Tensor],
        ridges: tuple[float, ...], images: int,
    ) -> LayerRepair:  # fmt: skip
        """Refit one layer; it changes only where the error falls, on the images of the fit and on those held out."""
        module = self.modules[reader]
        is_conv = isinstance(module, nn.Conv2d)
        geometry = (module.kernel_size, module.stride, module.padding) if is_conv else ((1, 1), (1, 1), (0, 0))
        unknowns, outputs = module.weight[0].numel(), module.weight.shape[0]
        sums = Sums(unknowns, outputs, module.weight.device)
        weight = module.weight.float() if module.weight.dtype != torch.float64 else module.weight
        kernel = weight if is_conv else weight[:, :, None, None]
        bias = None if module.bias is None else module.bias.to(weight)
        held_images = max(1, images // HELD_OUT)
        seen = 0
        for number, (walk, goal) in enumerate(zip(walks, goals)):
            walk.advance([(reader, "in"), *([stream[0]] if stream else [])])
            x = _as_map(walk.take((reader, "in")), module)
            y = goal - self.base(walk, reader, stream)
            r = y - F.conv2d(x, kernel, bias, geometry[1], geometry[2])
            held = (torch.arange(seen, seen + len(x), device=x.device) % HELD_OUT) == HELD_OUT - 1
            seen += len(x)
            if bool(held.any()):
                positions = _positions(int(held.sum()), y[0, 0].numel(), math.ceil(_HELD_ROWS / held_images), number, x.device)
                rows = patch_rows(x[held], geometry[0], geometry[1], geometry[2], positions)
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
                sums.hold_out(rows, map_rows(r[held], positions), map_rows(y[held], positions))
            if bool((~held).any()):
                x, y, r = x[~held], y[~held], r[~held]
                sums.add(*ops.conv_gram(x, r, *geometry, backend=self.backend), r, y, (0, 2, 3))
        if not sums.finite():
            raise RuntimeError(f"non-finite values in the input or output of layer {reader}: the repair cannot continue")
        every = slice(0, outputs)
        before, held_before = sums.error(None, every), sums.held_error(None, every)
        best: tuple[float, Tensor | None, float, float | None, float | None, str] = (math.inf, None, before, held_before, None, "")
        for ridge in ridges:
            delta, used, remark = solve_ridge(sums.xtx, sums.xtr, ridge, bias=bias is not None)
            after, held_after = sums.error(delta, every), sums.held_error(delta, every)
            judge = after if held_after is None else held_after
            if judge < best[0]:
                best = (judge, delta, after, held_after, used, remark)
        _, delta_best, after, held_after, used_best, remark = best
        better = delta_best is not None and after < before and (
            held_after is None or held_before is None or held_after < held_before
        )
        if better and delta_best is not None:
            module.weight += rows_weight(delta_best[:-1], module.weight.shape).to(module.weight)
            if module.bias is not None:
                module.bias += delta_best[-1].to(module.bias)
        else:
            after, held_after, remark = before, held_before, "no fit was better"
        status = "refitted" if better else "kept"
        return LayerRepair(reader, status, before, after, held_before, held_after, sums.rows, unknowns, used_best, remark=remark)


def _positions(n: int, size: int, count: int, seed: int, device: torch.device) -> Tensor | None:
    """[n, count] positions of each image, drawn without repeats; None takes all."""
    if count >= size:
        return None
    order = torch.rand(n, size, generator=torch.Generator().manual_seed(seed)).topk(count, dim=1).indices
    return order.sort(dim=1).values.to(device)


def _set_widths(module: Any, groups: int | None) -> None:
    """Attributes that say how wide a layer is, from its tensors."""
    if isinstance(module, nn.GroupNorm):
        module.num_channels, module.num_groups = module.weight.shape[0], int(groups or module.num_groups)
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[:2]
    else:
        module.out_features, module.in_features = module.weight.shape
