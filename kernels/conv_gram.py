"""Normal equations of a convolution, XᵀX and XᵀY of its unfolded patches, from products of two row tables at several shifts.

A map padded with zeros, channels last, is a table of rows, so that a shift of the map in y and x is a shift of rows: the sums of
a 3 x 3 convolution are Σ_m a[m]ᵀ b[m + s] for 13 shifts (x with x) and 9 (x with y), less a few along the borders, and no patch is ever
written. All of them are tiles of one launch, whose programs read from a list which rows and columns are theirs.
The table holds x and y side by side, each value as two float16 halves, v = high + low / 2^11 with 22 bits of mantissa, scaled by a power of
two per map so that the largest is near 2^13; high · high and the two mixed products run on tensor cores with fp32 sums, and low · low is below
fp32's own rounding. high · high and the rest have accumulators of their own, and the first is added to a third one after every SUB rows, since
tensor cores do not round their sums to nearest.
Traffic: packing reads x and y once and writes 4 bytes per value; the shifts of a stretch run side by side and read it from L2.
No atomics: every program owns its partial sums, in a fixed order. Bitwise repeatable.

Source: the sums are those of He et al. 2017, arXiv:1707.06168, equation 2; the shift form is this project's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from wanda_fast import conv_gram as plain


class Config(NamedTuple):
    """One program: BLOCK x BLOCK channel pairs, BLOCK_M rows at a time."""

    block: int
    block_m: int
    num_warps: int
    num_stages: int


# Three accumulators of 128 x 128 take three quarters of the registers of 8 warps; four operand tiles of 32 rows in three stages take 96 KiB of
# shared memory.
WIDE = Config(block=128, block_m=32, num_warps=8, num_stages=3)
NARROW = Config(block=64, block_m=32, num_warps=4, num_stages=3)
SUB = 256  # rows that one accumulator sums
CHUNK_BYTES = 32 << 20  # of the packed tables
PARTIAL_BYTES = 24 << 20  # of the partial sums
MAX_STRETCHES = 64
PROGRAMS = 132  # of the wide tile that run at once: one per multiprocessor of an H100 or H200
ALIGN = 16  # columns: y starts at a multiple of it, as a row does
LOW = tl.constexpr(2048.0)  # scale of the low halves
ITEM = tl.constexpr(9)  # numbers that tell a program its work


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


@triton.jit
def _read(map_ptr, n, position, offs_c, C, HW, W, stride_n, stride_c, stride_h, stride_w, FLAT: tl.constexpr):
    """[BLOCK_C, BLOCK_P] values of sample n at these positions of the map."""
    if FLAT:  # lines follow each other
        offset = position.to(tl.int64) * stride_w
    else:
        offset = (position // W).to(tl.int64) * stride_h + (position % W).to(tl.int64) * stride_w
    pointers = map_ptr + n * stride_n + offs_c[:, None].to(tl.int64) * stride_c + offset[None, :]
    return tl.load(pointers, mask=(offs_c < C)[:, None] & (position < HW)[None, :], other=0.0).to(tl.float32)


# Numbers that no access's alignment depends on are not specialised: each variant that Triton compiles takes a first run a second or two.
@triton.jit(do_not_specialize=["H", "W", "PAD", "X_BLOCKS"])
def _pack_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    most_ptr,
    largest_x_ptr,
    largest_y_ptr,
    out_ptr,
    C,
    C_OUT,
    CY,
    CT,
    H,
    W,
    HW,
    PAD,
    X_BLOCKS,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    WEIGHTED: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Some positions of a map: out[(n, y, x), 0:CT] the high halves of the channels of x and, from CY on, of y, [CT:2·CT] the low ones.

    The table begins with PAD lines of zeros. Columns up to the next multiple of 16 are zeros too.
    """
    n = tl.program_id(0).to(tl.int64)
    position = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    block = tl.program_id(1)
    if block < X_BLOCKS:
        offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
        value = _read(x_ptr, n, position, offs_c, C, HW, W, stride_xn, stride_xc, stride_xh, stride_xw, FLAT)
        value = value * _power(_scale(largest_x_ptr))
        start = 0
        stop = CY
    else:
        offs_c = (block - X_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
        value = _read(y_ptr, n, position, offs_c, C_OUT, HW, W, stride_yn, stride_yc, stride_yh, stride_yw, FLAT)
        value = value * _power(_scale(largest_y_ptr))
        start = CY
        stop = CT - CY
    if WEIGHTED:
        value = value * (tl.load(weight_ptr + n) / tl.load(most_ptr))
    value = tl.trans(value)  # [BLOCK_P, BLOCK_C]
    high = value.to(tl.float16)
    low = (value - high.to(tl.float32)) * LOW
    width = W + 2 * PAD
    row = (n * (H + 2 * PAD) + 2 * PAD + position // W) * width + PAD + position % W
    target = out_ptr + row[:, None] * (2 * CT) + tl.multiple_of(start, 16) + offs_c[None, :]
    mask = (position < HW)[:, None] & (offs_c < tl.multiple_of(stop, 16))[None, :]
    tl.store(target, high, mask=mask)
    tl.store(target + CT, low.to(tl.float16), mask=mask)


@triton.jit(do_not_specialize=["N", "PER", "FRONT", "ADD"])
def _products_kernel(
    left_ptr,
    right_ptr,
    items_ptr,
    partial_ptr,
    N,
    PER,
    FRONT,
    CT,
    ADD,
    SUB: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One item: partial[slot] = Σ_m left[m, columns]ᵀ right[m + shift, columns], added to what is there if ADD.

    Its rows m are numbered through: number r is row base + (r % unit) · stride of sample r // unit.
    Columns and rows are read past what is needed, and past the map, rather than masked: what they give is never read, or is multiplied by 0.
    """
    item = items_ptr + tl.program_id(0).to(tl.int64) * ITEM
    left_column = tl.multiple_of(tl.load(item), 16)
    right_column = tl.multiple_of(tl.load(item + 1), 16)
    slot = tl.load(item + 2).to(tl.int64)
    first = tl.load(item + 3)
    last = tl.load(item + 4)
    unit = tl.load(item + 5)
    base = tl.load(item + 6)
    stride = tl.load(item + 7)
    shift = tl.load(item + 8).to(tl.int64)
    last = tl.minimum(last, N * unit)
    offs = tl.arange(0, BLOCK)
    targets = partial_ptr + slot * (BLOCK * BLOCK) + offs[:, None] * BLOCK + offs[None, :]
    left = left_ptr + left_column + offs[None, :]
    right = right_ptr + shift * (2 * CT) + right_column + offs[None, :]
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    low = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for start in range(first, last, SUB):
        high = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        for step in range(start, tl.minimum(start + SUB, last), BLOCK_M):
            number = step + tl.arange(0, BLOCK_M)
            valid = (number < last)[:, None]
            number = tl.minimum(number, last - 1)
            row = FRONT + base + (number // unit) * PER + (number % unit) * stride
            offset = row[:, None].to(tl.int64) * (2 * CT)
            a_high = tl.trans(tl.load(left + offset, mask=valid, other=0.0))
            b_high = tl.load(right + offset)
            a_low = tl.trans(tl.load(left + offset + CT, mask=valid, other=0.0))
            b_low = tl.load(right + offset + CT)
            if WIDEN:  # Triton's interpreter has no product of 16-bit values summed in fp32
                a_high, a_low = a_high.to(tl.float32), a_low.to(tl.float32)
                b_high, b_low = b_high.to(tl.float32), b_low.to(tl.float32)
            high = tl.dot(a_high, b_high, high)
            low = tl.dot(a_high, b_low, low)
            low = tl.dot(a_low, b_high, low)
        total += high
    before = tl.load(targets, mask=(offs >= 0)[:, None] & (ADD != 0), other=0.0)
    tl.store(targets, before + (total + low / LOW))


@triton.jit
def _tile(partial_ptr, slots_ptr, product, row_block, column_block, offs_r, offs_q, COLUMNS, STRETCHES, BLOCK: tl.constexpr):
    """[r, q] of a tile of a product, summed over its stretches."""
    slot = tl.load(slots_ptr + (product * COLUMNS + row_block) * COLUMNS + column_block)
    source = partial_ptr + slot.to(tl.int64) * (BLOCK * BLOCK) + offs_r[:, None] * BLOCK + offs_q[None, :]
    value = tl.load(source)
    for _ in range(1, STRETCHES):
        source += BLOCK * BLOCK
        value += tl.load(source)
    return value


@triton.jit(do_not_specialize=["C", "COLUMNS", "STRETCHES"])
def _assemble_kernel(
    partial_ptr,
    slots_ptr,
    tiles_ptr,
    largest_ptr,
    most_ptr,
    out_ptr,
    C,
    stride_or,
    COLUMNS,
    STRETCHES,
    WEIGHTED: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Blocks (i, j) and (j, i) of XᵀX: the sum over the whole map for that difference of taps, without what the window does not see."""
    i = tl.program_id(0) // TAPS
    j = tl.program_id(0) % TAPS
    parts: tl.constexpr = BLOCK // PART
    tile = tl.program_id(1) // (parts * parts)
    part = tl.program_id(1) % (parts * parts)
    row_block = tl.load(tiles_ptr + 2 * tile)
    column_block = tl.load(tiles_ptr + 2 * tile + 1)
    # What lies below the diagonal is written from above it: no difference of taps is negative there.
    if (i < j) | ((i == j) & (row_block <= column_block)):
        offs_r = (part // parts) * PART + tl.arange(0, PART)
        offs_q = (part % parts) * PART + tl.arange(0, PART)
        if TAPS == 1:
            value = _tile(partial_ptr, slots_ptr, 0, row_block, column_block, offs_r, offs_q, COLUMNS, STRETCHES, BLOCK)
        else:
            ay = i // 3 - 1
            ax = i % 3 - 1
            dy = j // 3 - i // 3
            dx = j % 3 - i % 3
            which = tl.where(dy == 0, dx, 3 + (dy - 1) * 5 + dx + 2)
            value = _tile(partial_ptr, slots_ptr, which, row_block, column_block, offs_r, offs_q, COLUMNS, STRETCHES, BLOCK)
            if dy == 0 and ay != 0:
                which = 13 + tl.where(ay < 0, 0, 3) + dx
                value -= _tile(partial_ptr, slots_ptr, which, row_block, column_block, offs_r, offs_q, COLUMNS, 1, BLOCK)
            if dx == 0 and ax != 0:
                which = 13 + tl.where(ax < 0, 6, 9) + dy
                value -= _tile(partial_ptr, slots_ptr, which, row_block, column_block, offs_r, offs_q, COLUMNS, 1, BLOCK)
            if i == j and ay != 0 and ax != 0:
                which = 25 + tl.where(ay < 0, 0, 2) + tl.where(ax < 0, 0, 1)
                value += _tile(partial_ptr, slots_ptr, which, row_block, column_block, offs_r, offs_q, COLUMNS, 1, BLOCK)
        value = value * _back(largest_ptr, largest_ptr, most_ptr, WEIGHTED)
        row = row_block * BLOCK + offs_r
        column = column_block * BLOCK + offs_q
        target = out_ptr + (i * C + row)[:, None].to(tl.int64) * stride_or + (j * C + column)[None, :]
        tl.store(target, value, mask=(row < C)[:, None] & (column < C)[None, :])
        if (i < j) | (row_block < column_block):
            target = out_ptr + (j * C + column)[:, None].to(tl.int64) * stride_or + (i * C + row)[None, :]
            tl.store(target, tl.trans(value), mask=(column < C)[:, None] & (row < C)[None, :])


@triton.jit(do_not_specialize=["C", "C_OUT", "COLUMNS", "STRETCHES", "FIRST"])
def _cross_kernel(
    partial_ptr,
    slots_ptr,
    tiles_ptr,
    largest_x_ptr,
    largest_y_ptr,
    most_ptr,
    out_ptr,
    C,
    C_OUT,
    COLUMNS,
    STRETCHES,
    FIRST,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Rows of one tap of XᵀY."""
    tap = tl.program_id(0)
    parts: tl.constexpr = BLOCK // PART
    tile = tl.program_id(1) // (parts * parts)
    part = tl.program_id(1) % (parts * parts)
    row_block = tl.load(tiles_ptr + 2 * tile)
    column_block = tl.load(tiles_ptr + 2 * tile + 1)
    offs_r = (part // parts) * PART + tl.arange(0, PART)
    offs_q = (part % parts) * PART + tl.arange(0, PART)
    value = _tile(partial_ptr, slots_ptr, FIRST + tap, row_block, column_block, offs_r, offs_q, COLUMNS, STRETCHES, BLOCK)
    value = value * _back(largest_x_ptr, largest_y_ptr, most_ptr, WEIGHTED)
    row = row_block * BLOCK + offs_r
    column = column_block * BLOCK + offs_q
    target = out_ptr + (tap * C + row)[:, None].to(tl.int64) * C_OUT + column[None, :]
    tl.store(target, value, mask=(row < C)[:, None] & (column < C_OUT)[None, :])


@triton.jit(do_not_specialize=["C", "C_OUT", "X_BLOCKS", "COUNT"])
def _ones_kernel(
    x_ptr,
    y_ptr,
    xtx_ptr,
    xty_ptr,
    C,
    C_OUT,
    H,
    W,
    X_BLOCKS,
    COUNT,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What the column of ones meets: sums of x [C, H·W] over what each tap sees, those of y [C_OUT, H·W], and itself. In float64."""
    tap = tl.program_id(1)
    block = tl.program_id(0)
    is_x = block < X_BLOCKS
    channel = tl.where(is_x, block, block - X_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    # A tap of -1 never sees the last line, one of +1 never the first; the middle tap, y's, sees everything.
    ty = tl.where(is_x & (TAPS > 1), tap // 3 - 1, 0)
    tx = tl.where(is_x & (TAPS > 1), tap % 3 - 1, 0)
    acc = tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float64)
    for start in range(0, H * W, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        y = position // W
        x = position % W
        seen = (y >= ty) & (y < H + ty) & (x >= tx) & (x < W + tx) & (position < H * W)
        offset = channel[:, None].to(tl.int64) * (H * W) + position[None, :]
        if is_x:
            value = tl.load(x_ptr + offset, mask=(channel < C)[:, None] & seen[None, :], other=0.0)
        else:
            value = tl.load(y_ptr + offset, mask=(channel < C_OUT)[:, None] & seen[None, :], other=0.0)
        acc += value.to(tl.float64)
    sums = tl.sum(acc, axis=1).to(tl.float32)
    last = (TAPS * C).to(tl.int64)
    width = last + 1
    if is_x:
        column = tap * C + channel
        tl.store(xtx_ptr + last * width + column, sums, mask=channel < C)
        tl.store(xtx_ptr + column.to(tl.int64) * width + last, sums, mask=channel < C)
    elif tap == 0:
        tl.store(xty_ptr + last * C_OUT + channel, sums, mask=channel < C_OUT)
    if block == 0 and tap == 0:
        tl.store(xtx_ptr + last * width + last, COUNT)


def _guard(device: torch.device) -> Any:
    if device.type == "cpu":
        return nullcontext()
    return torch.get_device_module(device).device(device)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _up(n: int) -> int:
    return triton.cdiv(n, ALIGN) * ALIGN


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
    """max|x|, which decides the scale of its halves."""
    return torch.linalg.vector_norm(x, float("inf"))


class Table(NamedTuple):
    """Where the rows and columns of a packed table lie."""

    h: int
    w: int
    c: int
    c_out: int
    pad: int

    @property
    def width(self) -> int:
        return self.w + 2 * self.pad

    @property
    def rows(self) -> int:
        """Of one sample."""
        return (self.h + 2 * self.pad) * self.width

    @property
    def front(self) -> int:
        """Rows of zeros before the first sample: as far as a shift reaches back. Twice as many follow the last."""
        return self.pad * self.width

    @property
    def y(self) -> int:
        """First column of y."""
        return _up(self.c)

    @property
    def columns(self) -> int:
        """Of the high halves, and of the low ones after them."""
        return _up(self.y + self.c_out)


def pack(
    x: Tensor, y: Tensor, table: Table, largest_x: Tensor, largest_y: Tensor, weight: Tensor | None = None, most: Tensor | None = None
) -> Tensor:
    """Rows [3·front + N·rows, 2·columns] float16 of maps x [N, C, H, W] and y [N, C_out, H, W], and some values more that no result depends on.

    Args:
        largest_x, largest_y: `largest_of` maps that x and y are a part of.
        weight: [N] float32, a factor of each sample, at most `most`.
    """
    (n, c, h, w), c_out = x.shape, y.shape[1]
    size = 2 * table.columns * (n * table.rows + 3 * table.front) + WIDE.block
    out = (torch.zeros if table.pad else torch.empty)(size, dtype=torch.float16, device=x.device)
    block_p = min(max(_power_of_2(h * w), 4), 64)
    block_c = min(max(_power_of_2(max(c, c_out)), 4), 4096 // block_p, 128)
    x_blocks = triton.cdiv(table.y, block_c)
    _launch(
        _pack_kernel, (n, x_blocks + triton.cdiv(table.columns - table.y, block_c), triton.cdiv(h * w, block_p)),
        x, y, largest_x if weight is None else weight, largest_x if most is None else most, largest_x, largest_y, out,
        c, c_out, table.y, table.columns, h, w, h * w, table.pad, x_blocks, *x.stride(), *y.stride(),
        WEIGHTED=weight is not None, FLAT=all(t.stride(2) == w * t.stride(3) for t in (x, y)), BLOCK_C=block_c, BLOCK_P=block_p, num_warps=4,
    )  # fmt: skip
    return out


class Product(NamedTuple):
    """Σ_m a[m]ᵀ b[m + shift] over rows base + u · step of every sample, u < unit."""

    unit: int
    base: int
    step: int
    shift: int
    cross: bool = False  # x with y

    @property
    def symmetric(self) -> bool:
        return self.shift == 0 and not self.cross


def products(table: Table, taps: int) -> list[Product]:
    """What the sums of a 3 x 3 convolution (9 taps) or a 1 x 1 one are put together from, in the order that `_assemble_kernel` knows.

    For nine taps: 13 over the map, 12 along its last and first row and its last and first column, 4 of its corners, and 9 of x with y.
    """
    h, w, width = table.h, table.w, table.width
    if taps == 1:
        return [Product(table.rows, 0, 1, 0), Product(table.rows, 0, 1, 0, cross=True)]
    inner = (h * width, width, 1)  # lines 1 to h of the padded map
    found = [Product(*inner, dy * width + dx) for dy, dx in plain.OFFSETS]
    found += [Product(w, y * width + 1, 1, shift) for y in (h, 1) for shift in range(3)]
    found += [Product(h, width + x, width, shift * width) for x in (w, 1) for shift in range(3)]
    found += [Product(1, y * width + x, 1, 0) for y in (h, 1) for x in (w, 1)]
    # Σ_p x[p + tap] y[p]: the rows of y lie `tap` before those of x
    return found + [Product(*inner, -(ty * width + tx), cross=True) for ty, tx in plain.TAPS]


@dataclass
class Group:
    """Tiles that are summed in one launch and then written to the results."""

    items: Tensor  # [P, 9] int32, see `_products_kernel`
    slots: Tensor  # [products, columns, columns] int32: first partial sum of a tile of a product
    tiles: Tensor  # [T, 2] int32: blocks of rows and columns of XᵀX
    cross: Tensor  # [T, 2] int32: of XᵀY
    columns: int
    partials: int
    stretches: int  # of the long products


@functools.lru_cache(maxsize=256)
def plan(table: Table, taps: int, n: int, device: torch.device) -> list[Group]:
    """Launches for chunks of at most n samples. Their partial sums stay within PARTIAL_BYTES each, or within those of one pair of blocks."""
    config = config_of(table)
    blocks, y_blocks = triton.cdiv(table.c, config.block), triton.cdiv(table.c_out, config.block)
    known = products(table, taps)
    most = max(1, PARTIAL_BYTES // (4 * config.block**2))

    def units() -> Iterator[tuple[bool, list[tuple[int, int, int]]]]:
        """Tiles (product, row, column) that belong together: of a pair of blocks, and of XᵀY."""
        for r in range(blocks):
            for q in range(r, blocks):
                mine = [(d, r, q) for d, p in enumerate(known) if not p.cross]
                yield False, mine + [(d, q, r) for d, p in enumerate(known) if not p.cross and not p.symmetric and q > r]
        for r in range(blocks):
            for q in range(y_blocks):
                yield True, [(d, r, q) for d, p in enumerate(known) if p.cross]

    groups: list[list[tuple[bool, list[tuple[int, int, int]]]]] = [[]]
    count = 0
    for unit in units():
        if count and count + len(unit[1]) > most:
            groups.append([])
            count = 0
        groups[-1].append(unit)
        count += len(unit[1])
    return [_group(table, known, group, n, config, most, max(blocks, y_blocks), device) for group in groups if group]


def _group(
    table: Table, known: list[Product], units: list[tuple[bool, list[tuple[int, int, int]]]], n: int, config: Config, most: int, columns: int,
    device: torch.device,
) -> Group:  # fmt: skip
    longest = max(p.unit for p in known)
    wanted = [tile for _, tiles in units for tile in tiles]
    long = sum(known[d].unit == longest for d, _, _ in wanted)
    pieces = triton.cdiv(n * longest, SUB)

    def work(stretches: int) -> int:
        """Time of the launch in pieces per multiprocessor: programs run in waves of one per multiprocessor."""
        return triton.cdiv(long * stretches, PROGRAMS) * triton.cdiv(pieces, stretches)

    stretches = min(range(1, max(1, min((most - len(wanted)) // max(long, 1) + 1, MAX_STRETCHES, pieces)) + 1), key=work)
    rows = triton.cdiv(pieces, stretches) * SUB
    stretches = triton.cdiv(n * longest, rows)
    slots = torch.full((len(known), columns, columns), -1, dtype=torch.int32)
    place = 0
    items = []
    # Programs that run together read the same rows: shifts vary fastest, then tiles, then stretches. The short ones come last.
    for d, r, q in sorted(wanted, key=lambda tile: (known[tile[0]].unit != longest, tile[1:], tile[0])):
        product = known[d]
        slots[d, r, q] = place
        right = (table.y if product.cross else 0) + q * config.block
        for i in range(stretches if product.unit == longest else 1):
            first, last = (i * rows, (i + 1) * rows) if product.unit == longest else (0, n * product.unit)
            items.append((r * config.block, right, place, first, last, *product[:4]))
            place += 1
    items.sort(key=lambda item: (item[5] != longest, item[3]))  # a stable sort
    parts = [
        torch.tensor(items, dtype=torch.int32),
        slots,
        torch.tensor(_pairs(units, cross=False), dtype=torch.int32).view(-1, 2),
        torch.tensor(_pairs(units, cross=True), dtype=torch.int32).view(-1, 2),
    ]
    sent = [part.to(device) for part in parts]
    return Group(*sent, columns=columns, partials=place, stretches=stretches)


def _pairs(units: list[tuple[bool, list[tuple[int, int, int]]]], *, cross: bool) -> list[tuple[int, int]]:
    """Blocks (row, column) of the results that these units make up, (q, r) with (r, q)."""
    found = []
    for of_y, tiles in units:
        if of_y is cross:
            r, q = tiles[0][1:]
            found += [(r, q)] if cross or r == q else [(r, q), (q, r)]
    return found


def config_of(table: Table) -> Config:
    return WIDE if table.c > NARROW.block else NARROW


def _total(x: Tensor, weight: Tensor | None) -> Tensor:
    """Σ_n weight[n]·x[n] as [C, H·W] float32, some channels at a time where there are weights."""
    if weight is None:
        return x.sum(0, dtype=torch.float32).flatten(1).contiguous()
    n, c, h, w = x.shape
    step = max(1, (16 << 20) // (4 * n * h * w))
    return torch.cat([(x[:, i : i + step] * weight[:, None, None, None]).sum(0) for i in range(0, c, step)]).flatten(1).contiguous()


def _gram(x: Tensor, y: Tensor, taps: int, weight: Tensor | None, *, ones: bool = True) -> tuple[Tensor, Tensor]:
    """XᵀX and XᵀY of maps x [N, C, H, W] and y [N, C_out, H, W], none of them empty, with the row and column of ones if asked for."""
    n, c, h, w = x.shape
    c_out = y.shape[1]
    table = Table(h, w, c, c_out, pad=1 if taps == 9 else 0)
    step = max(1, CHUNK_BYTES // (4 * table.rows * table.columns * (1 if weight is None else 2)))
    if step < n:
        step = triton.cdiv(n, triton.cdiv(n, step))
    step = min(step, n)
    config, device = config_of(table), x.device
    with _guard(device):
        groups = plan(table, taps, step, device)
        largest_x, largest_y = largest_of(x), largest_of(y)
        # Weights are not negative; packed they are at most 1.
        most = None if weight is None else weight.max().clamp_min(torch.finfo(torch.float32).tiny)
        scales = (largest_x, largest_y, largest_x if most is None else most)
        size = taps * c + ones
        xtx = torch.empty(size, size, dtype=torch.float32, device=device)
        xty = torch.empty(size, c_out, dtype=torch.float32, device=device)
        partial = torch.empty(max(g.partials for g in groups), config.block, config.block, dtype=torch.float32, device=device)
        part = min(config.block, 64)
        packed: tuple[int, Tensor, Tensor] | None = None
        for group in groups:
            for i in range(0, n, step):
                mine = slice(i, i + step)
                if packed is None or packed[0] != i:
                    packed = None  # before the next one is made
                    left = pack(x[mine], y[mine], table, largest_x, largest_y)
                    right = left if weight is None else pack(x[mine], y[mine], table, largest_x, largest_y, weight[mine], most)
                    packed = (i, left, right)
                    del left, right
                _launch(
                    _products_kernel, (len(group.items),), packed[1], packed[2], group.items, partial, len(x[mine]), table.rows, table.front,
                    table.columns, int(i > 0), SUB=SUB, BLOCK=config.block, BLOCK_M=SUB if device.type == "cpu" else config.block_m,
                    WIDEN=device.type == "cpu", num_warps=config.num_warps, num_stages=config.num_stages,
                )  # fmt: skip
            parts = (config.block // part) ** 2
            if len(group.tiles):
                _launch(
                    _assemble_kernel, (taps * taps, len(group.tiles) * parts), partial, group.slots, group.tiles, scales[0], scales[2], xtx,
                    c, xtx.stride(0), group.columns, group.stretches, WEIGHTED=most is not None, TAPS=taps, BLOCK=config.block, PART=part,
                    num_warps=4,
                )  # fmt: skip
            if len(group.cross):
                _launch(
                    _cross_kernel, (taps, len(group.cross) * parts), partial, group.slots, group.cross, *scales, xty, c, c_out,
                    group.columns, group.stretches, len(group.slots) - taps, WEIGHTED=most is not None, BLOCK=config.block, PART=part,
                    num_warps=4,
                )  # fmt: skip
        del packed, partial
        if ones:
            count = float(n * h * w)
            block_p = min(max(_power_of_2(h * w), 4), 512)
            block_c = 2048 // block_p
            x_blocks = triton.cdiv(c, block_c)
            _launch(
                _ones_kernel, (x_blocks + triton.cdiv(c_out, block_c), taps), _total(x, weight), _total(y, weight), xtx, xty, c, c_out, h, w,
                x_blocks, count, TAPS=taps, BLOCK_C=block_c, BLOCK_P=block_p, num_warps=4,
            )  # fmt: skip
            if weight is not None:
                xtx[-1, -1] = weight.sum() * (h * w)
    return xtx, xty


def row_gram(rows: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """XᵀX [K, K] and XᵀY [K, C_out] float32 of rows [M, K] and right [M, C_out]; no column of ones is added.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    if rows.dim() != 2 or right.dim() != 2 or len(rows) != len(right):
        raise ValueError(f"rows, right: must be [M, K] and [M, C_out], not {list(rows.shape)} and {list(right.shape)}")
    if not rows.is_floating_point() or not right.is_floating_point() or torch.float64 in (rows.dtype, right.dtype):
        raise ValueError(f"rows, right: must be float32, float16 or bfloat16, not {rows.dtype} and {right.dtype}")
    if not rows.numel() or not right.numel():
        rows, right = rows.float(), right.float()
        return rows.t() @ rows, rows.t() @ right
    # Rows are a map of one line: they are its columns.
    return _gram(rows.t()[None, :, None], right.t()[None, :, None], 1, None, ones=False)


def conv_gram(
    x: Tensor,
    y: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """XᵀX [K + 1, K + 1] and XᵀY [K + 1, C_out] in float32; see `wanda_fast.ops.conv_gram`.

    3 x 3 convolutions of stride 1 and padding 1 take the shift form, 1 x 1 ones one product; others unfold a few samples at a time.
    Beyond the results it takes about 64 MiB, or what one sample needs.
    """
    geometry = (*kernel_size, *stride, *padding)
    shift = geometry in ((3, 3, 1, 1, 1, 1), (1, 1, 1, 1, 0, 0)) and x.numel() and y.numel() and torch.float64 not in (x.dtype, y.dtype)
    if not shift:
        return plain.conv_gram(x.float(), y.float(), kernel_size, stride, padding, weight, gram=row_gram)
    weight = None if weight is None else weight.float().contiguous()
    if kernel_size == (1, 1):
        n, _, h, w = x.shape
        if h == 1 and w == 1 and n > 1 and weight is None:
            # A Linear layer's input: one map of N columns packs better than N maps of one.
            x, y = x[:, :, 0, 0].t()[None, :, None], y[:, :, 0, 0].t()[None, :, None]
    return _gram(x, y, kernel_size[0] * kernel_size[1], weight)
