"""wanda_score: row and column sums of |W| · ||X||_2 in one read of W; with and without the statistics table."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks import published, shapes
from benchmarks.harness import DTYPE_NAMES, Case

OP = "wanda_score"
TABLE_ROWS = 64


def _make(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, table: bool, generator: torch.Generator
) -> tuple[Any, ...]:
    device = generator.device
    weight = torch.randn(shape, generator=generator, device=device).to(dtype)
    if layout == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    if table:
        sq = torch.rand(TABLE_ROWS, shape[1], generator=generator, device=device)
        return weight, sq, torch.full((TABLE_ROWS,), 1 / TABLE_ROWS, device=device)
    return weight, torch.rand(shape[1], generator=generator, device=device)


def _truth(weight: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return _reference(weight.double(), *[t.double() for t in rest])


def _reference(weight: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    from wanda_fast import reference

    return reference.wanda_score(weight, *rest) if len(rest) == 1 else reference.wanda_score_stats(weight, *rest)


def _ours(backend: str, weight: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    from wanda_fast import ops

    function: Any = ops.wanda_score if len(rest) == 1 else ops.wanda_score_stats
    return function(weight, *rest, backend=backend)


def _published(weight: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    norm = rest[0] if len(rest) == 1 else (rest[0].sqrt() * rest[1][:, None]).sum(dim=0)
    return published.score(weight, norm)


def cases(device: torch.device, size: str) -> list[Case]:
    """All cases of a device; `size` is quick, default or full."""
    on_gpu = device.type == "cuda"
    named: dict[str, tuple[int, ...]] = dict(shapes.CPU_WEIGHTS)
    if on_gpu:
        named = shapes.SDXL_WEIGHTS | shapes.DDPM_WEIGHTS
    elif size == "full":
        named["sdxl 1280x1280x3x3"] = (1280, 1280, 3, 3)
    dtypes = [torch.float32, torch.bfloat16]
    found = []
    for name, shape in named.items():
        for dtype in [*dtypes, torch.float16] if size == "full" and name == "sdxl 1280x2560x3x3" else dtypes:
            layouts = ["contiguous"]
            if len(shape) == 4 and name.startswith(("sdxl 1280", "ddpm 256x512")):
                layouts.append("channels_last")
            for layout in layouts:
                for table in (False, True) if name.startswith(("sdxl 1280x2560", "ddpm 256x512")) else (False,):
                    found.append(_case(name, shape, dtype, layout, table, on_gpu))
    return found


def _case(name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, table: bool, on_gpu: bool) -> Case:
    extra = 4 * shape[1] * (TABLE_ROWS if table else 1)
    return Case(
        op=OP,
        case=name + (f" + table of {TABLE_ROWS} rows" if table else ""),
        dtype=DTYPE_NAMES[dtype],
        layout=layout,
        bytes=math.prod(shape) * dtype.itemsize + extra + 4 * (shape[0] + shape[1]),
        make=functools.partial(_make, shape, dtype, layout, table),
        truth=_truth,
        candidates={
            "reference": _reference,
            "published": _published,
            **{b: functools.partial(_ours, b) for b in (("triton",) if on_gpu else ("cpu",))},
        },
        compile_of=_reference,
        info={"shape": list(shape)},
    )
