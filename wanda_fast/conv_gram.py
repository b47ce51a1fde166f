"""Normal equations of a convolution: XᵀX and XᵀY of unfolded patches, without unfolding the whole batch.

Columns are ordered tap by tap, channel by channel within a tap (column = tap · C + c, tap = ky · kw + kx), and a column
of ones comes last. `weight_rows` and `rows_weight` convert a weight to that order and back.
"""

from __future__ import annotations

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
    table = padded.permute(0, 2, 3, 1).reshape(-1, c)  # [N·H·W, C]
    first = (positions // w_out) * (sh * width) + (positions % w_out) * sw
    first = first + torch.arange(n, device=x.device)[:, None] * (height * width)
    taps = (torch.arange(kh, device=x.device)[:, None] * width + torch.arange(kw, device=x.device)).flatten()
    index = first[..., None] + taps  # [N, P, kh·kw]
    return table.index_select(0, index.flatten()).view(-1, kh * kw * c)


def map_rows(y: Tensor, positions: Tensor | None) -> Tensor:
    """Values of a map y [N, C, H, W] at flat positions [N, P], as rows [N·P, C]."""
    n, c = y.shape[:2]
    table = y.flatten(2).transpose(1, 2)  # [N, H·W, C]
    if positions is None:
        return table.reshape(-1, c)
    index = positions + torch.arange(n, device=y.device)[:, None] * table.shape[1]
    return table.reshape(-1, c).index_select(0, index.flatten())


def conv_gram_unfold(
    x: Tensor,
    y: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    chunk_bytes: int = 64 << 20,
) -> tuple[Tensor, Tensor]:
    """XᵀX [K+1, K+1] and XᵀY [K+1, C_out] of all patches of x [N, C, H, W] against y [N, C_out, H_out, W_out].

    The definition: patches of a few samples at a time, one matrix product each, sums in float64.
    """
    k = x.shape[1] * kernel_size[0] * kernel_size[1]
    step = max(1, chunk_bytes // max(1, (k + 1) * y.shape[2] * y.shape[3] * x.element_size()))
    xtx = torch.zeros(k + 1, k + 1, dtype=torch.float64, device=x.device)
    xty = torch.zeros(k + 1, y.shape[1], dtype=torch.float64, device=x.device)
    for i in range(0, len(x), step):
        rows = F.pad(patch_rows(x[i : i + step], kernel_size, stride, padding, None), (0, 1), value=1.0)
        xtx += (rows.t() @ rows).double()
        xty += (rows.t() @ map_rows(y[i : i + step], None)).double()
    return xtx, xty


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
        for lo, hi in zip(edges, edges[1:]):
            xtx[lo:hi, lo:] = x[:, lo:hi].t() @ x[:, lo:]
            xtx[hi:, lo:hi] = xtx[lo:hi, hi:].t()
    return xtx, x.t() @ y


# Offset differences (dy, dx) between two taps of a 3 x 3 kernel, one of each pair ±(dy, dx).
_OFFSETS = [(0, 0), (0, 1), (0, 2)] + [(dy, dx) for dy in (1, 2) for dx in (-2, -1, 0, 1, 2)]


def conv_gram_shift(x: Tensor, y: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same sums for a 3 x 3 convolution of stride 1 and padding 1, from 13 products instead of 45.

    An entry of XᵀX for taps d1, d2 is Σ_q x[q] x[q + d2 - d1] over the window that d1 sees. x is zero outside its map, so all
    windows give the sum over the whole map, which depends on d2 - d1 alone, except where d1 and d2 both look past the
    same border: there the opposite border row (column) of the map is outside both windows and is taken off again,
    and its corner pixels, taken off twice, are added.

    Args:
        x: [N, C, H, W].
        y: [N, C_out, H, W].
        weight: [N] weight of each sample's rows, or None.

    Returns:
        XᵀX [9C + 1, 9C + 1], XᵀY [9C + 1, C_out], in x's dtype.
    """
    n, c, h, w = x.shape
    width = w + 2
    # one zero column each side and one zero row above and below: no shift by up to two taps ever meets another row's values
    z = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).contiguous()  # [N, H + 2, W + 2, C]
    v = F.pad(torch.cat([y, y.new_ones(n, 1, h, w)], dim=1), (1, 1, 1, 1)).permute(0, 2, 3, 1).contiguous()
    right = z
    if weight is not None:
        right = z * weight[:, None, None, None]
        v = v * weight[:, None, None, None]
    flat, other, rows = z.view(-1, c), right.view(-1, c), v.view(-1, v.shape[-1])
    m = len(flat)

    full: dict[tuple[int, int], Tensor] = {}
    for dy, dx in _OFFSETS:
        s = dy * width + dx
        full[dy, dx] = flat[: m - s].t() @ other[s:]
        full[-dy, -dx] = full[dy, dx].t()

    def strip(a: Tensor, b: Tensor, shift: int) -> Tensor:
        """Σ over a border line: a, b [N, length, C], b read `shift` places further on."""
        length = a.shape[1] - shift
        return a[:, :length].reshape(-1, c).t() @ b[:, shift:].reshape(-1, c)

    # keyed by the tap coordinate that looks past the border: -1 never sees the last line, +1 never the first
    lines = {
        "y": {-1: (z[:, h], right[:, h]), 1: (z[:, 1], right[:, 1])},
        "x": {-1: (z[:, :, w], right[:, :, w]), 1: (z[:, :, 1], right[:, :, 1])},
    }
    border = {
        axis: {d: [strip(a, b, shift) for shift in range(3)] for d, (a, b) in sides.items()} for axis, sides in lines.items()
    }
    corner = {
        (dy, dx): z[:, h if dy < 0 else 1, w if dx < 0 else 1].t() @ right[:, h if dy < 0 else 1, w if dx < 0 else 1]
        for dy in (-1, 1)
        for dx in (-1, 1)
    }

    def line(axis: str, d: int, shift: int) -> Tensor:
        return border[axis][d][shift] if shift >= 0 else border[axis][d][-shift].t()

    taps = [(ty, tx) for ty in (-1, 0, 1) for tx in (-1, 0, 1)]
    xtx = x.new_empty(9 * c + 1, 9 * c + 1)
    for i, (ay, ax) in enumerate(taps):
        for j, (by, bx) in enumerate(taps[i:], start=i):
            block = full[by - ay, bx - ax]
            if ay == by and ay:
                block = block - line("y", ay, bx - ax)
            if ax == bx and ax:
                block = block - line("x", ax, by - ay)
            if (ay, ax) == (by, bx) and ay and ax:
                block = block + corner[ay, ax]
            xtx[i * c : (i + 1) * c, j * c : (j + 1) * c] = block
            if i != j:
                xtx[j * c : (j + 1) * c, i * c : (i + 1) * c] = block.t()
    xty = x.new_empty(9 * c + 1, rows.shape[1])
    for i, (ty, tx) in enumerate(taps):
        s = ty * width + tx
        xty[i * c : (i + 1) * c] = flat[max(s, 0) : m + min(s, 0)].t() @ rows[max(-s, 0) : m - max(s, 0)]
    xty[-1] = rows.sum(0)
    xtx[:-1, -1] = xtx[-1, :-1] = xty[:-1, -1]
    xtx[-1, -1] = xty[-1, -1]
    return xtx, xty[:, :-1].contiguous()
