"""Wanda-Diff channel scores: row_o = Σ_i,k |W[o,i,k]|·n_i and col_i = n_i·Σ_o,k |W[o,i,k]|, with n = ||X||_2, in one read of W.

Layouts: Linear [C_out, C_in] and Conv2d [C_out, C_in / groups, kh, kw], contiguous or channels-last, rows with any stride.
Traffic: each weight is read once (4 or 2 bytes); the partial sums that the second launch adds up are below 4 % of a large fp32 weight.
Sums are fp32, in an order fixed by the shape: no atomics, so results are bitwise repeatable. With a statistics table the norms
n_c = Σ_r row_weight[r]·sqrt(sq[r, c]) are aggregated by a launch of their own: inside the first kernel every program along C_out
would read the table again.

Source: Wanda, Sun et al. 2023, arXiv:2306.11695, equation 1 (S = |W|·||X||_2), summed over both directions of a channel.
"""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Config(NamedTuple):
    """One program reads BLOCK_K columns of ROWS output channels, BLOCK_O at a time."""

    block_o: int
    block_k: int
    rows: int
    num_warps: int
    stages: int = 1


# 8 x 512 values: 64 rows keep the partials at 3 % of an fp32 weight's traffic and still give 900 programs for a 1280 x 2560 x 3 x 3 weight,
# near a whole number for each of 132 multiprocessors. The sum down the rows must stay inside a thread: warps stand side by side, never one
# below the other. In 16 bits one warp is as wide as 256 columns; there tiles three ahead (asynchronous copies) beat more warps.
LARGE = Config(block_o=8, block_k=512, rows=64, num_warps=4)
LARGE_16 = Config(block_o=8, block_k=512, rows=64, num_warps=1, stages=3)
# Weights of a few hundred thousand values: shorter programs, so that all multiprocessors get some.
SMALL = Config(block_o=8, block_k=512, rows=16, num_warps=1)
LARGE_ELEMENTS = 1 << 22


@triton.jit
def _norm_kernel(
    sq_ptr, row_weight_ptr, norm_ptr, R, C, stride_sr, stride_sc, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BEFORE: tl.constexpr
):
    if BEFORE:
        gdc_launch_dependents()
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for first in range(0, R, BLOCK_R):
        offs_r = first + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        weight = tl.load(row_weight_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)
        offsets = offs_r[:, None].to(tl.int64) * stride_sr + offs_c[None, :].to(tl.int64) * stride_sc
        value = tl.load(sq_ptr + offsets, mask=mask_r[:, None] & mask_c[None, :], other=0.0)
        acc += weight[:, None] * tl.sqrt_rn(value)
    tl.store(norm_ptr + offs_c, tl.sum(acc, axis=0), mask=mask_c)


@triton.jit
def _partial_kernel(
    weight_ptr,
    norm_ptr,
    row_partial_ptr,
    col_partial_ptr,
    O,  # noqa: E741
    I,  # noqa: E741
    K,
    stride_wo,
    KK: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    AFTER: tl.constexpr,
    BEFORE: tl.constexpr,
):
    if BEFORE:  # the sums may start to load their code; they wait for this kernel's end before they read
        gdc_launch_dependents()
    pid_k = tl.program_id(0)
    pid_o = tl.program_id(1)
    group = tl.program_id(2)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    channel = offs_k % I if CHANNELS_LAST else offs_k // KK
    if AFTER:
        gdc_wait()
    norm = tl.load(norm_ptr + group * I + channel, mask=mask_k, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_K], dtype=tl.float32)
    for first in tl.range(pid_o * ROWS, pid_o * ROWS + ROWS, BLOCK_O, num_stages=STAGES):
        offs_o = first + tl.arange(0, BLOCK_O)
        mask_o = offs_o < O
        row = group * O + offs_o
        pointers = weight_ptr + row[:, None].to(tl.int64) * stride_wo + offs_k[None, :]
        if EVEN:
            value = tl.load(pointers)
        else:
            value = tl.load(pointers, mask=mask_o[:, None] & mask_k[None, :], other=0.0)
        value = tl.abs(value.to(tl.float32))
        acc += tl.sum(value, axis=0)
        total = tl.sum(value * norm[None, :], axis=1)
        slot = pid_k.to(tl.int64) * (O * tl.num_programs(2)) + row
        tl.store(row_partial_ptr + slot, total, mask=mask_o)
    slot = pid_o.to(tl.int64) * (K * tl.num_programs(2)) + group.to(tl.int64) * K + offs_k
    tl.store(col_partial_ptr + slot, acc, mask=mask_k)


@triton.jit
def _finish_kernel(
    row_partial_ptr,
    col_partial_ptr,
    norm_ptr,
    row_ptr,
    col_ptr,
    C_OUT,
    C_IN,
    I,  # noqa: E741
    K,
    COLUMNS,
    ROW_PROGRAMS,
    ROW_PARTIALS,
    COL_PARTIALS,
    KK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    AFTER: tl.constexpr,
):
    pid = tl.program_id(0)
    if AFTER:
        gdc_wait()
    if pid < ROW_PROGRAMS:
        offs = pid * BLOCK + tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK_P, BLOCK], dtype=tl.float32)
        for first in range(0, ROW_PARTIALS, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            mask = (offs_p < ROW_PARTIALS)[:, None] & (offs < C_OUT)[None, :]
            acc += tl.load(row_partial_ptr + offs_p[:, None].to(tl.int64) * C_OUT + offs[None, :], mask=mask, other=0.0)
        tl.store(row_ptr + offs, tl.sum(acc, axis=0), mask=offs < C_OUT)
    else:
        offs = (pid - ROW_PROGRAMS) * BLOCK + tl.arange(0, BLOCK)
        mask_c = offs < C_IN
        group = offs // I
        channel = offs % I
        acc = tl.zeros([BLOCK_P, BLOCK], dtype=tl.float32)
        for first in range(0, COL_PARTIALS * KK, BLOCK_P):
            offs_p = first + tl.arange(0, BLOCK_P)
            part = offs_p // KK
            tap = offs_p % KK
            if CHANNELS_LAST:
                k = tap[:, None] * I + channel[None, :]
            else:
                k = channel[None, :] * KK + tap[:, None]
            mask = (part < COL_PARTIALS)[:, None] & mask_c[None, :]
            offsets = part[:, None].to(tl.int64) * COLUMNS + group[None, :].to(tl.int64) * K + k
            acc += tl.load(col_partial_ptr + offsets, mask=mask, other=0.0)
        norm = tl.load(norm_ptr + offs, mask=mask_c, other=0.0).to(tl.float32)
        tl.store(col_ptr + offs, norm * tl.sum(acc, axis=0), mask=mask_c)


def _divide(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _guard(device: torch.device) -> Any:
    if device.type == "cpu":
        if not triton.knobs.runtime.interpret:
            raise ValueError("weight is on the CPU: Triton runs there only with TRITON_INTERPRET=1")
        return nullcontext()
    return torch.get_device_module(device).device(device)


def _check_weight(weight: Tensor) -> None:
    if weight.dim() < 2:
        raise ValueError(f"weight must have at least 2 dimensions, got shape {tuple(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight must be float32, float16 or bfloat16, got {weight.dtype}")


def _groups(weight: Tensor, channels: int, name: str) -> int:
    """Groups that follow from `channels` = C_in of the layer and weight.shape[1] = C_in / groups."""
    per_group = weight.shape[1]
    if per_group == 0 or channels == 0:
        if channels != per_group:
            raise ValueError(f"{name} must hold {per_group} channels, got {channels}")
        return 1
    groups, rest = divmod(channels, per_group)
    if rest or groups == 0 or weight.shape[0] % groups:
        raise ValueError(f"{name} has {channels} channels, which does not fit weight of shape {tuple(weight.shape)}")
    return groups


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may start before the one it follows has ended (programmatic dependent launch: NVIDIA's Hopper and later)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def _score(weight: Tensor, norm: Tensor, config: Config | None, after_norm: bool = False) -> tuple[Tensor, Tensor]:
    """`norm` is contiguous and on the weight's device; `after_norm`: the launch before this one, on the same stream, writes it."""
    groups = _groups(weight, norm.numel(), "act_norm")
    c_out, per_group = weight.shape[:2]
    taps = math.prod(weight.shape[2:])
    row = torch.empty(c_out, dtype=torch.float32, device=weight.device)
    col = torch.empty(norm.numel(), dtype=torch.float32, device=weight.device)
    if weight.numel() == 0:
        return row.zero_(), col.zero_()

    row_shape = weight[:1]
    channels_last = False
    if not row_shape.is_contiguous():
        channels_last = weight.dim() == 4 and row_shape.is_contiguous(memory_format=torch.channels_last)
        if not channels_last:
            weight = weight.contiguous()
    rows_per_group, K = c_out // groups, per_group * taps
    if config is None:
        large = LARGE_16 if weight.element_size() == 2 else LARGE
        config = large if weight.numel() >= LARGE_ELEMENTS else SMALL
    block_o = min(config.block_o, _power_of_2(rows_per_group))
    rows = min(config.rows, _divide(rows_per_group, block_o) * block_o)
    block_k = min(config.block_k, max(_power_of_2(K), 16))
    while K % block_k and block_k > 256:  # full blocks need no masks
        block_k //= 2
    num_warps = max(1, min(config.num_warps, block_k * weight.element_size() // 512))
    k_blocks, o_blocks = _divide(K, block_k), _divide(rows_per_group, rows)
    overlap = _overlaps(weight.device)
    extra = {"launch_pdl": True} if overlap else {}
    row_partial = torch.empty(k_blocks * c_out, dtype=torch.float32, device=weight.device)
    col_partial = torch.empty(o_blocks * groups * K, dtype=torch.float32, device=weight.device)
    _partial_kernel[(k_blocks, o_blocks, groups)](
        weight, norm, row_partial, col_partial, rows_per_group, per_group, K, weight.stride(0), KK=taps, ROWS=rows, CHANNELS_LAST=channels_last,
        BLOCK_O=block_o, BLOCK_K=block_k, EVEN=rows_per_group % rows == 0 and rows % block_o == 0 and K % block_k == 0,
        STAGES=config.stages, AFTER=after_norm and overlap, BEFORE=overlap, num_warps=num_warps, **(extra if after_norm else {}),
    )  # fmt: skip
    # Few channels and all partials per program: one round trip to memory instead of a loop of them.
    block = 8
    partials = max(k_blocks, o_blocks * taps)
    row_programs = _divide(c_out, block)
    _finish_kernel[(row_programs + _divide(norm.numel(), block),)](
        row_partial, col_partial, norm, row, col, c_out, norm.numel(), per_group, K, groups * K, row_programs, k_blocks, o_blocks,
        KK=taps, CHANNELS_LAST=channels_last, BLOCK=block, BLOCK_P=max(16, min(256, _power_of_2(partials))), AFTER=overlap,
        num_warps=4, **extra,
    )  # fmt: skip
    return row, col


def wanda_score(weight: Tensor, act_norm: Tensor, *, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """Row scores Σ_i,k |W|·n_i and column scores n_i·Σ_o,k |W| in one read of the weight.

    Args:
        weight: [C_out, C_in / groups, ...]; fp32, fp16 or bf16. Either size may be 0.
        act_norm: [C_in], ||X||_2 per input channel; groups = C_in / weight.shape[1].
        config: tile shape, for tuning; chosen from the size when None.

    Returns:
        (row [C_out], col [C_in]), fp32.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the text names the argument.
    """
    _check_weight(weight)
    if act_norm.dim() != 1 or not act_norm.is_floating_point() or act_norm.device != weight.device:
        raise ValueError(
            f"act_norm must be one-dimensional, floating and on {weight.device}, "
            f"got {act_norm.dtype} of shape {list(act_norm.shape)} on {act_norm.device}"
        )
    with _guard(weight.device):
        return _score(weight, act_norm.to(torch.float32).contiguous(), config)


def wanda_score_stats(
    weight: Tensor, sq: Tensor, row_weight: Tensor, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """The scores of `wanda_score` with the norms aggregated from a statistics table: n_c = Σ_r row_weight[r]·sqrt(sq[r, c]).

    Args:
        weight: as in `wanda_score`.
        sq: [R, C_in] fp32, Σ x² per row of the table.
        row_weight: [R], the weight of each row (1 / R for the mean).
        config: as in `wanda_score`.

    Returns:
        (row [C_out], col [C_in]), fp32.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the text names the argument.
    """
    _check_weight(weight)
    if sq.dim() != 2 or sq.dtype != torch.float32 or sq.device != weight.device:
        raise ValueError(
            f"sq must be float32 of shape [R, C_in] on {weight.device}, got {sq.dtype} {list(sq.shape)} on {sq.device}"
        )
    if row_weight.shape != sq.shape[:1] or not row_weight.is_floating_point() or row_weight.device != weight.device:
        raise ValueError(
            f"row_weight must be floating of shape [{sq.shape[0]}] on {weight.device}, "
            f"got {row_weight.dtype} {list(row_weight.shape)} on {row_weight.device}"
        )
    R, C = sq.shape
    _groups(weight, C, "sq")
    with _guard(weight.device):
        norm = torch.empty(C, dtype=torch.float32, device=weight.device)
        if C:
            _norm_kernel[(_divide(C, 32),)](
                sq,
                row_weight.to(torch.float32).contiguous(),
                norm,
                R,
                C,
                sq.stride(0),
                sq.stride(1),
                BLOCK_R=32,
                BLOCK_C=32,
                BEFORE=_overlaps(weight.device),
                num_warps=4,
            )
        return _score(weight, norm, config, after_norm=C > 0)
