"""compact: gather the kept rows and columns of all weights of a network; against index_select per dimension and tensor.

The kept indices are a random 70 % per dimension, the worst case for coalescing, or three of every four (`blocks`), which is what the pruner's
norm-aligned plans look like. Networks are timed with the host included (basis call_ms): their tensors are small and many.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks import published, shapes
from benchmarks.harness import DTYPE_NAMES, Case

OP = "compact"
KEPT = 0.7


def _keep(size: int, pattern: str, generator: torch.Generator) -> Tensor | None:
    """Sorted kept indices of a dimension; image channels and single rows are kept whole."""
    device = generator.device
    if size < 8:
        return None
    if pattern == "blocks":
        return torch.arange(size, device=device).reshape(-1, 4)[:, :3].reshape(-1).contiguous()
    return torch.randperm(size, generator=generator, device=device)[: round(size * KEPT)].sort().values


def _make(
    weights: list[tuple[int, ...]], dtype: torch.dtype, layout: str, pattern: str, generator: torch.Generator
) -> tuple[Any, ...]:
    tensors: list[Tensor] = []
    keep_out: list[Tensor | None] = []
    keep_in: list[Tensor | None] = []
    kept: dict[tuple[int, int], Tensor | None] = {}
    for shape in weights:
        t = torch.randn(shape, generator=generator, device=generator.device).to(dtype)
        if layout == "channels_last" and len(shape) == 4:
            t = t.to(memory_format=torch.channels_last)
        tensors.append(t)
        for dim, keeps in ((0, keep_out), (1, keep_in)):
            if dim >= len(shape):
                keeps.append(None)
                continue
            # A slot's indices are one tensor for all layers that share it.
            if (shape[dim], dim) not in kept:
                kept[shape[dim], dim] = _keep(shape[dim], pattern, generator)
            keeps.append(kept[shape[dim], dim])
    return tensors, keep_out, keep_in


def _kept(size: int, pattern: str) -> int:
    if size < 8:
        return size
    return size // 4 * 3 if pattern == "blocks" else round(size * KEPT)


def _truth(tensors: list[Tensor], keep_out: list[Tensor | None], keep_in: list[Tensor | None]) -> list[Tensor]:
    from wanda_fast import reference

    return reference.compact(tensors, keep_out, keep_in)


def _ours(
    backend: str, tensors: list[Tensor], keep_out: list[Tensor | None], keep_in: list[Tensor | None]
) -> list[Tensor]:
    from wanda_fast import ops

    return ops.compact(tensors, keep_out, keep_in, backend=backend)


def cases(device: torch.device, size: str) -> list[Case]:
    """All cases of a device; `size` is quick, default or full."""
    on_gpu = device.type == "cuda"
    dtypes = [torch.float32, torch.bfloat16]
    found = []
    for dtype in dtypes:
        for layout in ("contiguous", "channels_last"):
            for pattern in ("random", "blocks"):
                if size == "quick" and (pattern == "blocks" or layout == "channels_last"):
                    continue
                found.append(
                    _case(
                        "ddpm-cifar10-32, 65 convolutions", shapes.ddpm_convolutions(), dtype, layout, pattern, on_gpu
                    )
                )
                if on_gpu:
                    found.append(
                        _case("sdxl 1280x2560x3x3", [(1280, 2560, 3, 3)], dtype, layout, pattern, on_gpu, basis="ms")
                    )
        if size != "quick":
            found.append(
                _case(
                    "ddpm-cifar10-32, 328 parameters", shapes.ddpm_parameters(), dtype, "contiguous", "random", on_gpu
                )
            )
    if on_gpu and size == "full":
        sdxl = [shape for shape, count in shapes.SDXL_NETWORK for _ in range(count)]
        for pattern in ("random", "blocks"):
            found.append(_case(f"sdxl, {len(sdxl)} weights", sdxl, torch.bfloat16, "contiguous", pattern, on_gpu))
    return found


def _case(
    name: str,
    weights: list[tuple[int, ...]],
    dtype: torch.dtype,
    layout: str,
    pattern: str,
    on_gpu: bool,
    basis: str = "call_ms",
) -> Case:
    moved = (
        sum(math.prod((*(_kept(s, pattern) for s in shape[:2]), *shape[2:])) for shape in weights) * dtype.itemsize * 2
    )
    return Case(
        op=OP,
        case=f"{name}, {'30 % random' if pattern == 'random' else '1 of 4'}",
        dtype=DTYPE_NAMES[dtype],
        layout=layout,
        bytes=moved,
        make=functools.partial(_make, weights, dtype, layout, pattern),
        truth=_truth,
        candidates={
            "reference": _truth,
            "published": published.compact,
            **{b: functools.partial(_ours, b) for b in (("cuda",) if on_gpu else ("cpu",))},
        },
        compile_of=_truth if len(weights) == 1 else None,  # 65 tensors take torch.compile minutes; the single weight has the row
        exact=True,
        basis=basis,
        unchecked=frozenset({"published"}),
        info={"tensors": len(weights)},
    )
