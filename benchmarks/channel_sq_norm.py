"""channel_sq_norm: Σ x² per sample and channel, added to a table; against plain PyTorch, its torch.compile and the published hook's norm."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks import published, shapes
from benchmarks.harness import DTYPE_NAMES, Case

OP = "channel_sq_norm"


def _make(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, repeat: bool, generator: torch.Generator
) -> tuple[Any, ...]:
    device = generator.device
    wide = list(shape)
    if layout == "sliced":
        wide[1] += 32
    x = torch.randn(wide, generator=generator, device=device, dtype=torch.float32).to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x[:, 16 : 16 + shape[1]]
    samples = shape[0]
    channels = shape[1] if len(shape) == 4 else shape[-1]
    rows = torch.arange(samples, device=device)
    if repeat:
        rows = rows % max(samples // 8, 1)
    return x, rows, torch.zeros(samples, channels, device=device)


def _truth(x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    from wanda_fast import reference

    return reference.channel_sq_norm(x.double(), rows, out.double())


def _reference(x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    from wanda_fast import reference

    return reference.channel_sq_norm(x, rows, out)


def _ours(backend: str, x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    from wanda_fast import ops

    return ops.channel_sq_norm(x, rows, out, backend=backend)


def _published(x: Tensor, _rows: Tensor, _out: Tensor) -> Tensor:
    return published.activation_norm(x)


def cases(device: torch.device, size: str) -> list[Case]:
    """All cases of a device; `size` is quick, default or full."""
    on_gpu = device.type == "cuda"
    named: dict[str, tuple[int, ...]] = {}
    if on_gpu:
        named |= shapes.LARGE_ACTIVATIONS | shapes.DDPM_ACTIVATIONS
        if size != "quick":
            named |= shapes.SDXL_ACTIVATIONS
    else:
        named |= shapes.CPU_ACTIVATIONS
        if size == "full":
            named |= {"sdxl level 2 b2": (2, 1280, 32, 32), "sdxl feed-forward 2": (2, 1024, 5120)}
    dtypes = [torch.float32, torch.bfloat16] if size != "full" else list(DTYPE_NAMES)
    found = []
    for name, shape in named.items():
        layouts = ["nchw", "channels_last"] if len(shape) == 4 else ["nlc" if len(shape) == 3 else "nc"]
        if len(shape) == 4 and name.startswith("large"):
            layouts.append("sliced")
        if size == "quick" and not on_gpu:
            layouts = layouts[:1]
        for dtype in dtypes:
            if dtype == torch.float16 and not name.startswith("large"):
                continue
            for layout in layouts:
                repeats = (False, True) if name == "large 64x64" and layout == "nchw" else (False,)
                for repeat in repeats:
                    found.append(_case(name, shape, dtype, layout, repeat, on_gpu))
    return found


def _case(name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, repeat: bool, on_gpu: bool) -> Case:
    channels = shape[1] if len(shape) == 4 else shape[-1]
    return Case(
        op=OP,
        case=name + (" repeated rows" if repeat else ""),
        dtype=DTYPE_NAMES[dtype],
        layout=layout,
        bytes=math.prod(shape) * dtype.itemsize + 8 * shape[0] * channels,
        make=functools.partial(_make, shape, dtype, layout, repeat),
        truth=_truth,
        candidates={
            "reference": _reference,
            "published": _published,
            **{b: functools.partial(_ours, b) for b in (("triton",) if on_gpu else ("cpu",))},
        },
        compile_of=_reference,
        unchecked=frozenset({"published"}),
        mutates=(2,),
        info={"shape": list(shape)},
    )
