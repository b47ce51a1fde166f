"""Normal equations of a convolution, XᵀX and XᵀY of its unfolded patches, from products of two row tables at several shifts.

A map padded with zeros, channels last, is a table of rows [M, C], so that a shift of the map in y and x is a shift of rows: the sums of
a 3 x 3 convolution are Σ_m a[m]ᵀ b[m + s] for 13 shifts (x with x) and 9 (x with y) and a few over the border, and no patch is ever written.
The tables hold each value as two float16 halves, v = high + low / 2^11 with 22 bits of mantissa, scaled by a power of two per map so that the
largest is near 2^13; high · high and the two mixed products run on tensor cores with fp32 sums, and low · low is below fp32's own
rounding. high · high and the rest have accumulators of their own, and long sums are taken in pieces of SUB rows, since tensor cores do
not round their sums to nearest.
Traffic: packing reads x and y once and writes 4 bytes per value; the shifts of a stretch run side by side and read it from L2.
No atomics: every program owns its partial sums, in a fixed order. Bitwise repeatable.

Source: the sums are those of He et al. 2017, arXiv:1707.06168, equation 2; the shift form is this project's.
"""

from __future__ import annotations

import functools
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


# Two accumulators of 128 x 128 take half of the registers of 8 warps; four operand tiles of 32 rows, three stages, 96 KiB of shared memory.
WIDE = Config(block_1=128, block_2=128, block_m=32, num_warps=8, num_stages=3)
MIDDLE = Config(block_1=64, block_2=64, block_m=32, num_warps=4, num_stages=3)
# For few outputs (the image channels): tiles as small as tl.dot allows.
NARROW = Config(block_1=64, block_2=16, block_m=32, num_warps=4, num_stages=3)
SUB = 256  # rows that one accumulator sums
CHUNK_BYTES = 24 << 20  # of the packed tables
PARTIAL_BYTES = 18 << 20  # of the partial sums, each of the two sets
MAX_STRETCHES = 64
# N·H·W·C² below which launches cost more than the products save, on an H200 with a slow host: small ones go to cuBLAS.
LEAST_WORK = 1 << 29
LEAST_WORK_1X1 = 1 << 34
PROGRAMS = 132  # of the wide tile that run at once: one per multiprocessor of an H100 or H200
LOW = tl.constexpr(2048.0)  # scale of the low halves


@triton.jit
def _scale(largest_ptr):
    """The power of two that brings max|x| to between 2^12 and 2^13; 1 where it is 0, not finite or a subnormal."""
    exponent = (tl.load(largest_ptr).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF
    usable = (exponent > 12) & (exponent < 255)
    return tl.where(usable, 266 - exponent, 127)


@triton.jit
def _power(exponent):
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _back(largest_1_ptr, largest_2_ptr, most_ptr, WEIGHTED: tl.constexpr):
    """What a sum of products of two packed maps is multiplied with."""
    back = _power(254 - _scale(largest_1_ptr)) * _power(254 - _scale(largest_2_ptr))
    if WEIGHTED:
        back = back * tl.load(most_ptr)
    return back


# Numbers that no access's alignment depends on are not specialised: each variant that Triton compiles takes a first run a second or two.
@triton.jit(do_not_specialize=["H", "HP", "WP", "PAD_H", "PAD_W"])
def _pack_kernel(
    x_ptr,
    weight_ptr,
    most_ptr,
    largest_ptr,
    out_ptr,
    C,
    H,
    W,
    HP,
    WP,
    PAD_H,
    PAD_W,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    WEIGHTED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """One line of a padded map: out[(n, y, x), 0:C] the high halves of its channels, [C:2C] the low ones."""
    line = tl.program_id(0).to(tl.int64)
    n = line // HP
    y = (line % HP).to(tl.int32) - PAD_H
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    x = column - PAD_W
    inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
    source = x_ptr + n * stride_xn + y.to(tl.int64) * stride_xh
    pointers = source + offs_c[:, None].to(tl.int64) * stride_xc + x[None, :].to(tl.int64) * stride_xw
    value = tl.load(pointers, mask=(offs_c < C)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if WEIGHTED:
        value = value * (tl.load(weight_ptr + n) / tl.load(most_ptr))
    value = tl.trans(value * _power(_scale(largest_ptr)))  # [BLOCK_W, BLOCK_C]
    high = value.to(tl.float16)
    low = (value - high.to(tl.float32)) * LOW
    target = out_ptr + (line * WP + column[:, None]) * (2 * C) + offs_c[None, :]
    mask = (column < WP)[:, None] & (offs_c < C)[None, :]
    tl.store(target, high, mask=mask)
    tl.store(target + C, low.to(tl.float16), mask=mask)


@triton.jit(do_not_specialize=["M", "S", "ROWS", "TILES_2"])
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
    SUB: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDEN: tl.constexpr,
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
    base = out_ptr + (stretch.to(tl.int64) * S + which) * C1 * C2
    targets = base + offs_1[:, None].to(tl.int64) * C2 + offs_2[None, :]
    mask = mask_1[:, None] & mask_2[None, :]
    first = stretch.to(tl.int64) * ROWS
    last = tl.minimum(first + ROWS, M)
    for start in range(0, ROWS, SUB):
        high = tl.zeros([BLOCK_1, BLOCK_2], dtype=tl.float32)
        low = tl.zeros([BLOCK_1, BLOCK_2], dtype=tl.float32)
        for step in range(0, SUB, BLOCK_M):
            rows = first + start + step + tl.arange(0, BLOCK_M)
            shifted = rows + shift
            valid_a = (rows < last)[:, None] & mask_1[None, :]
            valid_b = ((rows < last) & (shifted >= 0) & (shifted < M))[:, None] & mask_2[None, :]
            a = a_ptr + rows[:, None] * (2 * C1) + offs_1[None, :]
            b = b_ptr + shifted[:, None] * (2 * C2) + offs_2[None, :]
            a_high = tl.trans(tl.load(a, mask=valid_a, other=0.0))
            b_high = tl.load(b, mask=valid_b, other=0.0)
            a_low = tl.trans(tl.load(a + C1, mask=valid_a, other=0.0))
            b_low = tl.load(b + C2, mask=valid_b, other=0.0)
            if WIDEN:  # Triton's interpreter has no product of 16-bit values summed in fp32
                a_high, a_low = a_high.to(tl.float32), a_low.to(tl.float32)
                b_high, b_low = b_high.to(tl.float32), b_low.to(tl.float32)
            high = tl.dot(a_high, b_high, high)
            low = tl.dot(a_high, b_low, low)
            low = tl.dot(a_low, b_high, low)
        before = tl.load(targets, mask=mask, other=0.0)
        tl.store(targets, before + (high + low / LOW), mask=mask)


@triton.jit(do_not_specialize=["STRETCHES"])
def _sum_kernel(
    partial_ptr,
    largest_1_ptr,
    largest_2_ptr,
    most_ptr,
    out_ptr,
    STRETCHES,
    SIZE,
    COLUMNS,
    stride_or,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The partial sums added and scaled back, as a matrix of rows stride_or apart."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < SIZE
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    source = partial_ptr + offs
    for _ in range(0, STRETCHES):
        acc += tl.load(source, mask=mask, other=0.0)
        source += SIZE
    target = out_ptr + (offs // COLUMNS) * stride_or + offs % COLUMNS
    tl.store(target, acc * _back(largest_1_ptr, largest_2_ptr, most_ptr, WEIGHTED), mask=mask)


@triton.jit
def _load_block(base, which, transposed, offs_r, offs_q, C, mask):
    """[r, q] of a [C, C] block, or of its transpose."""
    step_r = tl.where(transposed, 1, C)
    step_q = tl.where(transposed, C, 1)
    return tl.load(base + which.to(tl.int64) * C * C + offs_r[:, None] * step_r + offs_q[None, :] * step_q, mask=mask, other=0.0)


@triton.jit
def _assemble_kernel(
    full_ptr, lines_ptr, corners_ptr, largest_ptr, most_ptr, out_ptr, C, stride_or, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """Block (i, j) of XᵀX: the sum over the whole map for that difference of taps, without what the window does not see."""
    i = tl.program_id(0) // 9
    j = tl.program_id(0) % 9
    tiles = tl.cdiv(C, BLOCK)
    offs_r = (tl.program_id(1) // tiles) * BLOCK + tl.arange(0, BLOCK)
    offs_q = (tl.program_id(1) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = (offs_r < C)[:, None] & (offs_q < C)[None, :]
    ay = i // 3 - 1
    ax = i % 3 - 1
    dy = j // 3 - i // 3
    dx = j % 3 - i % 3
    flip = (dy < 0) | ((dy == 0) & (dx < 0))
    fy = tl.where(flip, -dy, dy)
    fx = tl.where(flip, -dx, dx)
    which = tl.where(fy == 0, fx, 3 + (fy - 1) * 5 + fx + 2)
    value = _load_block(full_ptr, which, flip, offs_r, offs_q, C, mask)
    if dy == 0 and ay != 0:
        which = tl.where(ay < 0, 0, 3) + tl.abs(dx)
        value -= _load_block(lines_ptr, which, dx < 0, offs_r, offs_q, C, mask)
    if dx == 0 and ax != 0:
        which = tl.where(ax < 0, 6, 9) + tl.abs(dy)
        value -= _load_block(lines_ptr, which, dy < 0, offs_r, offs_q, C, mask)
    if i == j and ay != 0 and ax != 0:
        which = tl.where(ay < 0, 0, 2) + tl.where(ax < 0, 0, 1)
        value += _load_block(corners_ptr, which, dy < 0, offs_r, offs_q, C, mask)
    row = i * C + offs_r
    value = value * _back(largest_ptr, largest_ptr, most_ptr, WEIGHTED)
    tl.store(out_ptr + row[:, None].to(tl.int64) * stride_or + (j * C + offs_q)[None, :], value, mask=mask)


def _guard(device: torch.device) -> Any:
    if device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(device).device(device)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


_built: dict[tuple[Any, ...], Any] = {}


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 3, **constants: Any) -> None:
    """Launch, and keep what Triton built: its analysis of the arguments takes the host ten times as long as a launch."""
    device = args[0].device
    if device.type != "cuda":
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
        return
    kinds = tuple((a.dtype, a.data_ptr() & 15) if isinstance(a, Tensor) else a for a in args)
    key = (kernel, device.index, kinds, tuple(constants.values()), num_warps, num_stages)
    built = _built.get(key)
    if built is None:
        if len(_built) >= 4096:
            _built.clear()
        _built[key] = kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
    else:
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        built[(*grid, 1, 1)[:3]](*args, *constants.values(), stream=stream)


def largest_of(x: Tensor) -> Tensor:
    """max|x|, which decides the scale of its table."""
    return torch.linalg.vector_norm(x, float("inf"))


def pack(
    x: Tensor, largest: Tensor, pad_h: int = 0, pad_w: int = 0, weight: Tensor | None = None, most: Tensor | None = None
) -> Tensor:
    """Rows [N·(H + 2·pad_h)·(W + 2·pad_w), 2C] float16 of a map [N, C, H, W], scaled: high halves, then low halves.

    Args:
        largest: `largest_of` a map that x is a part of.
        weight: [N], a factor of each sample, at most `most`.
    """
    n, c, h, w = x.shape
    hp, wp = h + 2 * pad_h, w + 2 * pad_w
    out = torch.empty(n * hp * wp, 2 * c, dtype=torch.float16, device=x.device)
    if out.numel() == 0:
        return out
    block_w = min(max(_power_of_2(wp), 4), 64)
    block_c = min(max(_power_of_2(c), 4), 2048 // block_w, 128)
    _launch(
        _pack_kernel, (n * hp, triton.cdiv(c, block_c), triton.cdiv(wp, block_w)), x, largest if weight is None else weight,
        largest if most is None else most, largest, out, c, h, w, hp, wp, pad_h, pad_w, *x.stride(),
        WEIGHTED=weight is not None, BLOCK_C=block_c, BLOCK_W=block_w, num_warps=4,
    )  # fmt: skip
    return out


@functools.lru_cache(maxsize=64)
def _shifts(shifts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(shifts, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=16)
def _windows(h: int, w: int, taps: int, device: torch.device) -> Tensor:
    """[H·W, taps]: which positions each tap sees; a tap of -1 never sees the last line, one of +1 never the first."""
    if taps == 1:
        return torch.ones(h * w, 1, dtype=torch.float64, device=device)
    seen = torch.zeros(9, h, w, dtype=torch.float64)
    for tap in range(9):
        ty, tx = tap // 3 - 1, tap % 3 - 1
        seen[tap, max(ty, 0) : h + min(ty, 0), max(tx, 0) : w + min(tx, 0)] = 1
    return seen.flatten(1).t().contiguous().to(device)


class Sums:
    """out[s] = Σ_m a[m]ᵀ b[m + shift_s] over the rows that both have, added up over several tables."""

    def __init__(self, c1: int, c2: int, shifts: list[int], rows: int, device: torch.device, partial: Tensor | None = None) -> None:
        """
        Args:
            rows: of the longest table, which decides over how many stretches its sums are spread.
            partial: [L, S, C1, C2] zeros to add to: the table is L of equal length, one stretch each.
        """
        self.shifts = _shifts(tuple(shifts), device)
        self.config = WIDE if min(c1, c2) > 64 else MIDDLE if c2 > 16 else NARROW
        tiles = len(shifts) * triton.cdiv(c1, self.config.block_1) * triton.cdiv(c2, self.config.block_2)
        self.sub = min(SUB, max(_power_of_2(rows), self.config.block_m))
        pieces = max(triton.cdiv(rows, self.sub), 1)
        most = max(1, min(PARTIAL_BYTES // max(4 * len(shifts) * c1 * c2, 1), MAX_STRETCHES, pieces))

        def work(stretches: int) -> int:
            """Time of the launch in pieces per multiprocessor: programs run in waves of one per multiprocessor."""
            return triton.cdiv(tiles * stretches, PROGRAMS) * triton.cdiv(pieces, stretches)

        if partial is not None:
            self.rows, self.partial = max(rows // len(partial), 1), partial
            return
        self.rows = triton.cdiv(pieces, min(range(1, most + 1), key=work)) * self.sub
        count = max(triton.cdiv(rows, self.rows), 1)
        self.partial = torch.zeros(count, len(shifts), c1, c2, dtype=torch.float32, device=device)

    def add(self, a: Tensor, b: Tensor) -> None:
        """Tables of `pack`, [M, 2·C1] and [M, 2·C2]."""
        stretches, s, c1, c2 = self.partial.shape
        m = len(a)
        if not (m and c1 and c2):
            return
        config = self.config
        tiles_2 = triton.cdiv(c2, config.block_2)
        grid = (s, triton.cdiv(c1, config.block_1) * tiles_2, min(stretches, triton.cdiv(m, self.rows)))
        _launch(
            _products_kernel, grid, a, b, self.shifts, self.partial, m, c1, c2, s, self.rows, tiles_2, SUB=self.sub,
            BLOCK_1=config.block_1, BLOCK_2=config.block_2, BLOCK_M=self.sub if a.device.type == "cpu" else config.block_m,
            WIDEN=a.device.type == "cpu",
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    def result(self) -> Tensor:
        """[S, C1, C2] fp32, of the scaled maps."""
        return self.partial.sum(0) if len(self.partial) > 1 else self.partial[0]

    def write(self, out: Tensor, largest_1: Tensor, largest_2: Tensor, most: Tensor | None) -> None:
        """The sums, scaled back, as the rows [S·C1, C2] of out."""
        size = self.partial[0].numel()
        if size:
            _launch(
                _sum_kernel, (triton.cdiv(size, 1024),), self.partial, largest_1, largest_2, largest_1 if most is None else most, out,
                len(self.partial), size, self.partial.shape[-1], out.stride(0), WEIGHTED=most is not None, BLOCK=1024, num_warps=4,
            )  # fmt: skip


def shifted_products(a: Tensor, b: Tensor, shifts: list[int]) -> Tensor:
    """For every shift s the product Σ_m a[m]ᵀ b[m + s] over the rows that both have: [S, C1, C2] fp32.

    Args:
        a: [M, C1], b: [M, C2], floating point, any strides, on one device.
        shifts: S whole numbers.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[0]:
        raise ValueError(f"a, b: must be [M, C1] and [M, C2], not {list(a.shape)} and {list(b.shape)}")
    if not a.is_floating_point() or not b.is_floating_point() or torch.float64 in (a.dtype, b.dtype):
        raise ValueError(f"a, b: must be float32, float16 or bfloat16, not {a.dtype} and {b.dtype}")
    with _guard(a.device):
        (c1, c2), s = (a.shape[1], b.shape[1]), len(shifts)
        out = torch.zeros(s * c1, c2, dtype=torch.float32, device=a.device)
        if a.numel() and b.numel() and s:
            # A table is a map of one line: columns are its rows.
            most_a = largest_of(a)
            most_b = most_a if b is a else largest_of(b)
            packed = pack(a.t()[None, :, None], most_a)
            sums = Sums(c1, c2, shifts, len(a), a.device)
            sums.add(packed, packed if b is a else pack(b.t()[None, :, None], most_b))
            sums.write(out, most_a, most_b, None)
        return out.view(s, c1, c2)


def _ones(x: Tensor, windows: Tensor, weight: Tensor | None) -> Tensor:
    """What a column of ones meets: Σ_n,p weight[n]·x[n, c, p]·windows[p, t] as [C, T] in float64, some channels at a time."""
    n, c, h, w = x.shape
    step = max(1, (16 << 20) // (8 * h * w * (1 if weight is None else n)))
    parts = []
    for i in range(0, c, step):
        part = x[:, i : i + step]
        part = part.sum(0, dtype=torch.float32) if weight is None else (part * weight[:, None, None, None]).sum(0)
        parts.append(part.double().flatten(1) @ windows)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def conv_gram(
    x: Tensor,
    y: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """XᵀX [K + 1, K + 1] and XᵀY [K + 1, C_out] in float32; see `wanda_fast.ops.conv_gram`.

    Large 3 x 3 convolutions of stride 1 and padding 1 take the shift form, large 1 x 1 ones one product; others unfold a few samples at a time.
    Beyond the results it takes about 64 MiB, or the 29 products [C, C] that XᵀX is put together from, which are 3/8 of XᵀX in all.
    """
    from wanda_fast import conv_gram as plain

    geometry = (*kernel_size, *stride, *padding)
    shift = geometry in ((3, 3, 1, 1, 1, 1), (1, 1, 1, 1, 0, 0)) and x.numel() and y.numel() and torch.float64 not in (x.dtype, y.dtype)
    work = x.numel() * x.shape[1]
    if x.is_cuda and work < (LEAST_WORK if kernel_size[0] == 3 else LEAST_WORK_1X1):
        return plain.conv_gram(x.float(), y.float(), kernel_size, stride, padding, weight)  # the products of cuBLAS
    if not shift:
        return plain.conv_gram(x.float(), y.float(), kernel_size, stride, padding, weight, products=shifted_products)
    (n, c, h, w), c_out = x.shape, y.shape[1]
    if h == 1 and w == 1 and n > 1 and kernel_size == (1, 1) and weight is None:
        # A Linear layer's input: one map of N columns packs better than N maps of one.
        x, y = x[:, :, 0, 0].t()[None, :, None], y[:, :, 0, 0].t()[None, :, None]
        n, w = 1, n
    weight = None if weight is None else weight.float().contiguous()
    taps = kernel_size[0] * kernel_size[1]
    pad = kernel_size[0] // 2
    width = w + 2 * pad
    per_map = (h + 2 * pad) * width
    step = max(1, CHUNK_BYTES // (4 * per_map * ((1 if weight is None else 2) * c + c_out)))
    if step < n:
        step = triton.cdiv(n, triton.cdiv(n, step))
    inner = plain._OFFSETS if taps == 9 else [(0, 0)]
    outer = plain._TAPS if taps == 9 else [(0, 0)]
    device = x.device
    with _guard(device):
        full = Sums(c, c, [dy * width + dx for dy, dx in inner], min(step, n) * per_map, device)
        # Σ_p x[p + tap] y[p]: the rows of y lie `tap` before those of x
        cross = Sums(c, c_out, [-(ty * width + tx) for ty, tx in outer], min(step, n) * per_map, device)
        largest_x, largest_y = largest_of(x), largest_of(y)
        # Weights are not negative; packed they are at most 1.
        most = None if weight is None else weight.max().clamp_min(torch.finfo(torch.float32).tiny)
        for i in range(0, n, step):
            part, target = x[i : i + step], y[i : i + step]
            scale = None if weight is None else weight[i : i + step]
            left = pack(part, largest_x, pad, pad)
            right = left if scale is None else pack(part, largest_x, pad, pad, scale, most)
            full.add(left, right)
            del right
            packed = pack(target, largest_y, pad, pad, scale, most)
            cross.add(left, packed)
            del left, packed
        xtx = torch.empty(c * taps + 1, c * taps + 1, dtype=torch.float32, device=device)
        xty = torch.empty(c * taps + 1, c_out, dtype=torch.float32, device=device)
        cross.write(xty, largest_x, largest_y, most)
        del cross
        windows = _windows(h, w, taps, device)
        ones = _ones(x, windows, weight).t().flatten()
        xty[-1] = _ones(y, windows[:, taps // 2 : taps // 2 + 1], weight)[:, 0]  # the middle tap sees everything
        if taps == 1:
            full.write(xtx, largest_x, largest_x, most)
        else:
            lines, corners = _border(x, largest_x, weight, most)
            tiles = triton.cdiv(c, 64)
            _launch(
                _assemble_kernel, (81, tiles * tiles), full.result(), lines, corners, largest_x, largest_x if most is None else most, xtx,
                c, xtx.stride(0), WEIGHTED=most is not None, BLOCK=64, num_warps=4,
            )  # fmt: skip
        xtx[:-1, -1] = ones
        xtx[-1, :-1] = ones
        xtx[-1, -1] = (n if weight is None else weight.sum()) * (h * w)
    return xtx, xty


def _border(x: Tensor, largest: Tensor, weight: Tensor | None, most: Tensor | None) -> tuple[Tensor, Tensor]:
    """Products [12, C, C] along the last and first row and the last and first column at shifts 0, 1, 2, and [4, C, C] of the corners, all of
    scaled maps."""
    c, (h, w) = x.shape[1], x.shape[2:]
    lines = torch.zeros(4, 3, c, c, dtype=torch.float32, device=x.device)
    corners = torch.zeros(4, 1, c, c, dtype=torch.float32, device=x.device)
    weights = None if weight is None else weight.repeat(2)
    pairs = ((x[:, :, h - 1 :], x[:, :, :1]), (x[..., w - 1 :].transpose(2, 3), x[..., :1].transpose(2, 3)))
    for i, pair in enumerate(pairs):
        both = torch.cat(pair)
        packed = pack(both, largest, 0, 1)  # a zero on each side: two between the lines of neighbouring samples
        sums = Sums(c, c, [0, 1, 2], len(packed), x.device, lines[2 * i : 2 * i + 2])
        sums.add(packed, packed if weight is None else pack(both, largest, 0, 1, weights, most))
    points = torch.cat([x[:, :, i, j] for i in (h - 1, 0) for j in (w - 1, 0)])[:, :, None, None]  # [4N, C, 1, 1]
    # Without weights one map of 4N columns: it packs faster than 4N maps of one.
    packed = pack(points[:, :, 0, 0].t()[None, :, None], largest)
    weights = None if weight is None else weight.repeat(4)
    sums = Sums(c, c, [0], len(packed), x.device, corners)
    sums.add(packed, packed if weights is None else pack(points, largest, 0, 0, weights, most))
    return lines, corners
