"""conv_gram: normal equations XᵀX and XᵀY of a convolution; against the unfolded patches of the whole batch and one product in fp32.

The row `published` is that unfolded form (He et al. 2017, arXiv:1707.06168); `reference` unfolds a few samples at a time. `peak_mib` counts the
results too; `extra_mib` in a row is what the operation takes beyond them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import DTYPE_NAMES, Case

OP = "conv_gram"

# name -> (N, C, H, W, C_out, kernel)
DDPM = {
    "ddpm level 0": (128, 128, 32, 32, 128, 3),
    "ddpm level 0 skip": (64, 256, 32, 32, 128, 3),
    "ddpm level 1": (128, 256, 16, 16, 256, 3),
    "ddpm level 1 skip": (64, 512, 16, 16, 256, 3),
    "ddpm level 2": (128, 256, 8, 8, 256, 3),
    "ddpm level 3": (128, 256, 4, 4, 256, 3),
    "ddpm shortcut": (128, 512, 16, 16, 256, 1),
    "ddpm attention": (128, 256, 16, 16, 256, 1),
}
SDXL = {
    "sdxl level 0": (2, 320, 128, 128, 320, 3),
    "sdxl level 2": (4, 1280, 32, 32, 1280, 3),
}
CPU = {
    "ddpm level 1 b2": (2, 128, 16, 16, 128, 3),
    "ddpm level 2 b4": (4, 128, 8, 8, 128, 3),
    "ddpm shortcut b4": (4, 256, 16, 16, 128, 1),
}


def _make(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    n, c, h, w, c_out, kernel = shape
    x = torch.randn(n, c, h, w, generator=generator, device=generator.device).to(dtype) + 0.3
    y = torch.randn(n, c_out, h, w, generator=generator, device=generator.device).to(dtype)
    return x, y, kernel


def _geometry(kernel: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    return (kernel, kernel), (1, 1), (kernel // 2, kernel // 2)


def _truth(x: Tensor, y: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    from wanda_fast import reference

    return reference.conv_gram(x.double(), y.double(), *_geometry(kernel))


def _ours(backend: str, x: Tensor, y: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    from wanda_fast import ops

    return ops.conv_gram(x, y, *_geometry(kernel), backend=backend)


def unfolded(x: Tensor, y: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    """All patches at once, tap by tap with a column of ones, then XᵀX and XᵀY."""
    size, _, padding = _geometry(kernel)
    n, c = x.shape[:2]
    if kernel == 1:
        rows = x.float().flatten(2).transpose(1, 2).reshape(-1, c)
    else:
        patches = F.unfold(x.float(), size, padding=padding).view(n, c, kernel * kernel, -1)
        rows = patches.permute(0, 3, 2, 1).reshape(-1, kernel * kernel * c)
    rows = F.pad(rows, (0, 1), value=1.0)
    right = y.float().flatten(2).transpose(1, 2).reshape(len(rows), -1)
    return rows.t() @ rows, rows.t() @ right


def cases(device: torch.device, size: str) -> list[Case]:
    """All cases of a device; `size` is quick, default or full."""
    on_gpu = device.type == "cuda"
    named = DDPM | SDXL if on_gpu else CPU
    if size == "quick":
        named = dict(list(named.items())[:2])
    return [_case(name, shape, dtype, on_gpu) for name, shape in named.items() for dtype in (torch.float32, torch.bfloat16)
            if dtype == torch.float32 or (on_gpu and name in ("ddpm level 1", "sdxl level 0"))]  # fmt: skip


def _case(name: str, shape: tuple[int, ...], dtype: torch.dtype, on_gpu: bool) -> Case:
    n, c, h, w, c_out, kernel = shape
    columns = c * kernel * kernel + 1
    results = 4 * columns * (columns + c_out)
    return Case(
        op=OP,
        case=f"{name}, {kernel}x{kernel}",
        dtype=DTYPE_NAMES[dtype],
        layout="nchw",
        bytes=n * h * w * (c + c_out) * dtype.itemsize + results,
        make=functools.partial(_make, shape, dtype),
        truth=_truth,
        candidates={
            "reference": functools.partial(_ours, "reference"),
            "published": unfolded,
            **{b: functools.partial(_ours, b) for b in (("cuda", "triton") if on_gpu else ("cpu",))},
        },
        # One float32 product over all rows: rounding grows with the root of their number. The reference adds up a few samples at a time.
        rounding={"published": 2 * torch.finfo(torch.float32).eps * (n * h * w) ** 0.5},
        info={"shape": list(shape), "result_mib": round(results / 2**20, 2)},
    )
