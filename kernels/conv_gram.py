"""Products of two row tables at several shifts, out[s] = Σ_m a[m]ᵀ b[m + shift_s]: the heavy part of `conv_gram`.

a [M, C1] and b [M, C2] are row-major fp32 (maps padded with zeros, channels last), so that a shift of a map in y and x is a shift of
rows, and no patch is ever written. Each program multiplies one tile of channel pairs over one stretch of rows for one shift.
Traffic: the shifts of a stretch run side by side and read it from L2, so DRAM sees a and b about once per tile; 2·S·C1·C2
FLOPs per row. Products are split TF32 ("tf32x3": three tensor-core products, error like fp32), sums run in fp32 over
one stretch and in fp64 over the stretches, in a fixed order: no atomics, bitwise repeatable.

Source: the sums are those of He et al. 2017, arXiv:1707.06168, equation 2; the shift form is this project's.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """One program: BLOCK_1 x BLOCK_2 channel pairs, BLOCK_M rows at a time."""

    block_1: int
    block_2: int
    block_m: int
    num_warps: int
    num_stages: int


# 64 x 64 pairs keep three split products in registers on 4 warps; 32 rows a step fill the tensor cores' depth four times.
WIDE = Config(block_1=64, block_2=64, block_m=32, num_warps=4, num_stages=3)
# For few outputs (the image channels): tiles as small as tl.dot allows.
NARROW = Config(block_1=64, block_2=16, block_m=32, num_warps=4, num_stages=3)
# fp32 sums over more rows would lose digits; also 24 stretches of a 48 MiB chunk, enough programs for every multiprocessor.
STRETCH = 2048
PARTIAL_BYTES = 32 << 20
PRECISION = "tf32x3"


@triton.jit
def _products_kernel(
    a_ptr,
    b_ptr,
    shifts_ptr,
    out_ptr,
    M,
    C1,
    C2,
    S,
    ROWS,
    TILES_2,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Shifts vary fastest: programs that run together read the same rows.
    which = tl.program_id(0)
    tile = tl.program_id(1)
    stretch = tl.program_id(2)
    shift = tl.load(shifts_ptr + which).to(tl.int64)
    offs_1 = (tile // TILES_2) * BLOCK_1 + tl.arange(0, BLOCK_1)
    offs_2 = (tile % TILES_2) * BLOCK_2 + tl.arange(0, BLOCK_2)
    mask_1 = offs_1 < C1
    mask_2 = offs_2 < C2
    acc = tl.zeros([BLOCK_1, BLOCK_2], dtype=tl.float32)
    first = stretch.to(tl.int64) * ROWS
    for step in range(0, ROWS, BLOCK_M):
        inside = step + tl.arange(0, BLOCK_M)
        rows = first + inside
        shifted = rows + shift
        valid = (inside < ROWS) & (rows < M) & (shifted >= 0) & (shifted < M)
        a = tl.load(a_ptr + rows[:, None] * C1 + offs_1[None, :], mask=valid[:, None] & mask_1[None, :], other=0.0)
        b = tl.load(b_ptr + shifted[:, None] * C2 + offs_2[None, :], mask=valid[:, None] & mask_2[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)  # [BLOCK_1, BLOCK_2]
    base = out_ptr + (stretch.to(tl.int64) * S + which) * C1 * C2
    tl.store(base + offs_1[:, None] * C2 + offs_2[None, :], acc, mask=mask_1[:, None] & mask_2[None, :])


def shifted_products(a: Tensor, b: Tensor, shifts: list[int]) -> Tensor:
    """For every shift s the product Σ_m a[m]ᵀ b[m + s] over the rows that both have.

    Args:
        a: [M, C1] fp32, contiguous.
        b: [M, C2] fp32, contiguous, on the same device.
        shifts: S whole numbers, |s| < M or there is nothing to add.

    Returns:
        [S, C1, C2] fp32.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[0]:
        raise ValueError(f"a, b: must be [M, C1] and [M, C2], not {list(a.shape)} and {list(b.shape)}")
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise ValueError(f"a, b: must be float32, not {a.dtype} and {b.dtype}")
    a, b = a.contiguous(), b.contiguous()
    (m, c1), c2, s = a.shape, b.shape[1], len(shifts)
    if not (m and c1 and c2 and s):
        return a.new_zeros(s, c1, c2)
    config = WIDE if c2 > 16 else NARROW
    most = max(1, PARTIAL_BYTES // (4 * s * c1 * c2))
    rows = min(max(STRETCH, triton.cdiv(m, most)), triton.cdiv(m, config.block_m) * config.block_m)
    stretches = triton.cdiv(m, rows)
    partial = torch.empty(stretches, s, c1, c2, dtype=torch.float32, device=a.device)
    table = torch.tensor(shifts, dtype=torch.int64).to(a.device, non_blocking=True)
    tiles_2 = triton.cdiv(c2, config.block_2)
    grid = (s, triton.cdiv(c1, config.block_1) * tiles_2, stretches)
    guard: Any = torch.cuda.device(a.device) if a.device.type == "cuda" else nullcontext()
    with guard:
        _products_kernel[grid](
            a_ptr=a,
            b_ptr=b,
            shifts_ptr=table,
            out_ptr=partial,
            M=m,
            C1=c1,
            C2=c2,
            S=s,
            ROWS=rows,
            TILES_2=tiles_2,
            BLOCK_1=config.block_1,
            BLOCK_2=config.block_2,
            BLOCK_M=config.block_m,
            PRECISION=PRECISION,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return partial.sum(0, dtype=torch.float64).float()
