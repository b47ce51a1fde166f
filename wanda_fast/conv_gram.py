"""Normal equations of a convolution: XᵀX and XᵀY of unfolded patches, without unfolding the whole batch.

Columns are ordered tap by tap, channel by channel within a tap (column = tap · C + c, tap = ky · kw + kx), and a column
of ones comes last. `weight_rows` and `rows_weight` convert a weight to that order and back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def weight_rows(weight: Tensor) -> Tensor:
    """Weight [C_out, C_in(, kh, kw)] as the matrix [K, C_out] that patch rows are multiplied with."""
    if weight.dim() == 2:
        return weight.t()
    return weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0])


def rows_weight(rows: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `weight_rows`: matrix [K, C_out] as a weight of the given shape."""
    if len(shape) == 2:
        return rows.t().contiguous()
    c_out, c_in, kh, kw = shape
    return rows.reshape(kh, kw, c_in, c_out).permute(3, 2, 0, 1).contiguous()


def output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def patch_rows(
    x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], positions: Tensor | None
) -> Tensor:
    """Patches of x as rows [N·P, K], tap by tap.

    Args:
        x: [N, C, H, W].
        positions: [N, P] int64, flat output positions (y · W_out + x) taken from each sample; None takes all.
    """
    n, c, h, w = x.shape
    (kh, kw), (sh, sw), (ph, pw) = kernel_size, stride, padding
    w_out = output_size(w, kw, sw, pw)
    if positions is None:
        positions = torch.arange(output_size(h, kh, sh, ph) * w_out, device=x.device).expand(n, -1)
    if (kh, kw, sh, sw, ph, pw) == (1, 1, 1, 1, 0, 0):
        return map_rows(x, positions)
    padded = F.pad(x, (pw, pw, ph, ph)) if ph or pw else x
    height, width = padded.shape[-2:]
    table = padded.permute(0, 2, 3, 1).reshape(n * height * width, c)
    first = (positions // w_out) * (sh * width) + (positions % w_out) * sw
    first = first + torch.arange(n, device=x.device)[:, None] * (height * width)
    taps = (torch.arange(kh, device=x.device)[:, None] * width + torch.arange(kw, device=x.device)).flatten()
    index = first[..., None] + taps  # [N, P, kh·kw]
    return table.index_select(0, index.flatten()).view(positions.numel(), kh * kw * c)


def map_rows(y: Tensor, positions: Tensor | None) -> Tensor:
    """Values of a map y [N, C, H, W] at flat positions [N, P], as rows [N·P, C]."""
    n, c = y.shape[:2]
    table = y.flatten(2).transpose(1, 2)  # [N, H·W, C]
    if positions is None:
        return table.reshape(n * table.shape[1], c)
    index = positions + torch.arange(n, device=y.device)[:, None] * table.shape[1]
    return table.reshape(n * table.shape[1], c).index_select(0, index.flatten())


def row_gram(x: Tensor, y: Tensor, blocks: int = 4) -> tuple[Tensor, Tensor]:
    """XᵀX and XᵀY of rows x [M, K] (no column of ones is added) and y [M, C_out].

    Only blocks on and above the diagonal are multiplied (62.5 % of the work with 4 x 4 blocks).
    """
    k = x.shape[1]
    if k < 256:
        xtx = x.t() @ x
    else:
        xtx = x.new_empty(k, k)
        edges = [k * i // blocks for i in range(blocks + 1)]
        for lo, hi in itertools.pairwise(edges):
            xtx[lo:hi, lo:] = x[:, lo:hi].t() @ x[:, lo:]
            xtx[hi:, lo:hi] = xtx[lo:hi, hi:].t()
    return xtx, x.t() @ y


# Offset differences (dy, dx) between two taps of a 3 x 3 kernel, one of each pair ±(dy, dx).
OFFSETS = [(0, 0), (0, 1), (0, 2)] + [(dy, dx) for dy in (1, 2) for dx in (-2, -1, 0, 1, 2)]
TAPS = [(ty, tx) for ty in (-1, 0, 1) for tx in (-1, 0, 1)]
_CHUNK_BYTES = 48 << 20  # of the copies that are made of a few samples at a time

Gram = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor]"]
Sums = Callable[[Tensor, Tensor, "Tensor | None"], "tuple[Tensor, Tensor, Tensor, Tensor]"]


def shifted_products(a: Tensor, b: Tensor, shifts: list[int]) -> Tensor:
    """For every shift s the product Σ_m a[m]ᵀ b[m + s] over the rows that both have: [S, C1, C2] from a [M, C1], b [M, C2]."""
    m = len(a)
    return torch.stack([a[max(-s, 0) : m - max(s, 0)].t() @ b[max(s, 0) : m + min(s, 0)] for s in shifts])


def conv_gram_shift(x: Tensor, y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """XᵀX and XᵀY for a 3 x 3 convolution of stride 1 and padding 1, from 13 products of [C, C] instead of 45.

    An entry of XᵀX for taps d1, d2 is Σ_q x[q] x[q + d2 - d1] over the window that d1 sees. x is zero outside its map, so
    all windows give the sum over the whole map, which depends on d2 - d1 alone, except where d1 and d2 both look past the
    same border: there the opposite border row (column) of the map is outside both windows and is taken off again,
    and its corner pixels, taken off twice, are added.

    Args:
        x: [N, C, H, W], float32 or float64.
        y: [N, C_out, H, W], the same dtype.
        weight: [N] weight of each sample's rows, or None.

    Returns:
        XᵀX [9C + 1, 9C + 1] with an unwritten last row and column, and XᵀY [9C + 1, C_out + 1] with an unwritten last row and
        Xᵀ1 as last column, in x's dtype. Beyond them it takes about 64 MiB, or what one sample needs.
    """
    n, c, h, w = x.shape
    per_sample = (c * (1 if weight is None else 2) + y.shape[1] + 1) * (h + 2) * (w + 2) * x.element_size()
    step = max(1, _CHUNK_BYTES // per_sample)
    total: list[Tensor] = []
    for i in range(0, max(n, 1), step):
        part = _shift_sums(x[i : i + step], y[i : i + step], None if weight is None else weight[i : i + step])
        total = [t + p for t, p in zip(total, part, strict=True)] if total else part
    return _assemble(*total)


def shift_sums(x: Tensor, y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_shift_sums` gives, for any number of samples and in float32: the definition of the operation that C++ has for CPUs."""
    dtype = torch.float64 if torch.float64 in (x.dtype, y.dtype) else torch.float32
    weight = None if weight is None else weight.to(dtype)
    full, lines, corners, cross = _shift_sums(x.to(dtype), y.to(dtype), weight)
    return full.float(), lines.float(), corners.float(), cross.float()


def _shift_sums(x: Tensor, y: Tensor, weight: Tensor | None) -> list[Tensor]:
    """Sums over a few samples: [13, C, C] over the map, [12, C, C] over border lines, [4, C, C] over corners, [9, C, C_out + 1]."""
    n, c, h, w = x.shape
    width = w + 2
    # One zero column each side and one zero row above and below: no shift by up to two taps meets another row's values.
    z = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).contiguous()  # [N, H + 2, W + 2, C]
    v = F.pad(torch.cat([y, y.new_ones(n, 1, h, w)], dim=1), (1, 1, 1, 1)).permute(0, 2, 3, 1).contiguous()
    right = z
    if weight is not None:
        right = z * weight[:, None, None, None]
        v = v * weight[:, None, None, None]
    flat = z.view(-1, c)
    full = shifted_products(flat, right.view(-1, c), [dy * width + dx for dy, dx in OFFSETS])
    # Σ_p x[p + tap] y[p]: the rows of y lie `tap` before those of x
    cross = shifted_products(flat, v.view(-1, v.shape[-1]), [-(ty * width + tx) for ty, tx in TAPS])
    lines = []
    # A tap of -1 never sees the last line, one of +1 never the first. Last row, first row, last column, first column.
    for a, b in (
        (z[:, h], right[:, h]),
        (z[:, 1], right[:, 1]),
        (z[:, :, w], right[:, :, w]),
        (z[:, :, 1], right[:, :, 1]),
    ):
        for shift in range(3):
            length = a.shape[1] - shift
            lines.append(a[:, :length].reshape(-1, c).t() @ b[:, shift:].reshape(-1, c))
    corners = [z[:, i, j].t() @ right[:, i, j] for i in (h, 1) for j in (w, 1)]
    return [full, torch.stack(lines), torch.stack(corners), cross]


def _assemble(full: Tensor, lines: Tensor, corners: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    c = full.shape[1]
    table = {}
    for (dy, dx), block in zip(OFFSETS, full, strict=True):
        table[dy, dx], table[-dy, -dx] = block, block.t()

    def line(first: int, tap: int, shift: int) -> Tensor:
        block = lines[first + (0 if tap < 0 else 3) + abs(shift)]
        return block if shift >= 0 else block.t()

    xtx = full.new_empty(9 * c + 1, 9 * c + 1)
    for i, (ay, ax) in enumerate(TAPS):
        for j, (by, bx) in enumerate(TAPS[i:], start=i):
            block = table[by - ay, bx - ax]
            if ay == by and ay:
                block = block - line(0, ay, bx - ax)
            if ax == bx and ax:
                block = block - line(6, ax, by - ay)
            if i == j and ay and ax:
                block = block + corners[(0 if ay < 0 else 2) + (0 if ax < 0 else 1)]
            xtx[i * c : (i + 1) * c, j * c : (j + 1) * c] = block
            if i != j:
                xtx[j * c : (j + 1) * c, i * c : (i + 1) * c] = block.t()
    xty = full.new_empty(9 * c + 1, cross.shape[2])
    xty[:-1] = cross.reshape(9 * c, -1)
    return xtx, xty


def conv_gram_rows(
    x: Tensor,
    y: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    weight: Tensor | None = None,
    gram: Gram = row_gram,
) -> tuple[Tensor, Tensor]:
    """The same sums for any convolution: patches of a few samples at a time, then one product."""
    k = x.shape[1] * kernel_size[0] * kernel_size[1]
    step = max(1, _CHUNK_BYTES // ((k + y.shape[1] + 1) * y.shape[2] * y.shape[3] * x.element_size() or 1))
    xtx, xty = x.new_zeros(k + 1, k + 1), x.new_zeros(k + 1, y.shape[1])
    for i in range(0, len(x), step):
        rows = F.pad(patch_rows(x[i : i + step], kernel_size, stride, padding, None), (0, 1), value=1.0)
        right = map_rows(y[i : i + step], None)
        if weight is not None:
            root = weight[i : i + step].sqrt().repeat_interleave(len(rows) // len(x[i : i + step]))[:, None]
            rows, right = rows * root, right * root
        part = gram(rows, right)
        xtx += part[0]
        xty += part[1]
    return xtx, xty


def conv_gram(
    x: Tensor,
    y: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    weight: Tensor | None = None,
    gram: Gram = row_gram,
    sums: Sums | None = None,
) -> tuple[Tensor, Tensor]:
    """XᵀX [K+1, K+1] and XᵀY [K+1, C_out] by the cheapest way for this convolution; see `wanda_fast.ops.conv_gram`.

    Args:
        gram: what multiplies rows of patches, `row_gram` or a faster equal.
        sums: takes x and y as they are and gives what `shift_sums` gives; None for products of matrices.
    """
    shiftable = (*kernel_size, *stride, *padding) == (3, 3, 1, 1, 1, 1) and x.numel() > 0 and y.numel() > 0
    if shiftable and sums is not None:
        weight = None if weight is None else weight.float()
        return _with_ones(*_assemble(*sums(x, y, weight)), x, y, weight)
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    y = y.to(x.dtype)
    weight = None if weight is None else weight.to(x.dtype)
    if shiftable:
        return _with_ones(*conv_gram_shift(x, y, weight), x, y, weight)
    return conv_gram_rows(x, y, kernel_size, stride, padding, weight, gram)


def _with_ones(xtx: Tensor, xty: Tensor, x: Tensor, y: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """The results of `conv_gram_shift` with the row and column of ones in their places."""
    xtx[:-1, -1] = xtx[-1, :-1] = xty[:-1, -1]
    # the column of ones against itself and against y: no patch is involved
    ones = xtx.new_ones(len(x)) if weight is None else weight
    xtx[-1, -1] = ones.sum() * (x.shape[2] * x.shape[3])
    xty = xty[:, :-1].contiguous()
    xty[-1] = (y.sum((2, 3), dtype=xtx.dtype) * ones[:, None]).sum(0)
    return xtx, xty
