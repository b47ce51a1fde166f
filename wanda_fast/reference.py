"""The operations in plain PyTorch: the definition of correct, for any device and dtype.

Sums run in float32, or in float64 where the inputs are float64: `reference.f(x.double(), ...)` is the truth that every
other implementation is compared with. Nothing is checked here; `wanda_fast.ops` does that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _accumulator(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def channel_sq_norm(x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """Add each sample's channel energy to its row: out[rows[n], c] += sum over positions of x[n, c, ...]^2.

    Args:
        x: [N, C, H, W], [N, L, C] or [N, C].
        rows: [N] int64.
        out: [R, C], changed in place.
    """
    wide = x.to(_accumulator(x))
    if x.dim() == 4:
        energy = wide.square().sum(dim=(2, 3))
    elif x.dim() == 3:
        energy = wide.square().sum(dim=1)
    else:
        energy = wide.square()
    energy = energy.to(out.dtype)
    if out.device.type == "cpu":
        return out.index_add_(0, rows, energy)
    # Sorts the rows before it adds, where index_add_ would use atomics: repeated rows give the same bits every time.
    return out.index_put_((rows,), energy, accumulate=True)


def wanda_score(weight: Tensor, act_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column sums of S = |W| * ||X||_2: row[o] = sum_i,k |W[o, i, k]| n[i] and col[i] = n[i] sum_o,k |W[o, i, k]|.

    Args:
        weight: [C_out, C_in / groups, ...]; output channel o reads the slice of `act_norm` of its group.
        act_norm: [C_in].

    Returns:
        ([C_out], [C_in]) in float32, or float64 where an input is float64.
    """
    dtype = _accumulator(weight, act_norm)
    magnitude = weight.to(dtype).abs()
    if weight.dim() > 2:
        magnitude = magnitude.flatten(2).sum(dim=2)
    rows, channels = magnitude.shape
    groups = act_norm.numel() // channels if channels else 1
    norm = act_norm.to(dtype).reshape(groups, channels)
    magnitude = magnitude.reshape(groups, rows // groups, channels)
    row = (magnitude * norm[:, None, :]).sum(dim=2)
    col = magnitude.sum(dim=1) * norm
    return row.reshape(rows), col.reshape(groups * channels)


def wanda_score_stats(weight: Tensor, sq: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """`wanda_score` with the norms taken from a table of energies: n[c] = sum_r row_weight[r] * sqrt(sq[r, c]).

    Args:
        weight: [C_out, C_in / groups, ...].
        sq: [R, C_in], sums of squares.
        row_weight: [R].
    """
    dtype = _accumulator(sq, row_weight)
    act_norm = (sq.to(dtype).sqrt() * row_weight.to(dtype)[:, None]).sum(dim=0)
    return wanda_score(weight, act_norm)


def memory_format(t: Tensor) -> torch.memory_format:
    """The format that `compact` gives its result: channels-last where `t` is that and not plainly contiguous."""
    if not t.is_contiguous():
        if t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if t.dim() == 5 and t.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def compact_dtype(t: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Dtype that `compact` gives its result: as for `nn.Module.to`, integers and the like keep theirs."""
    return t.dtype if dtype is None or t.dtype not in FLOAT_DTYPES else dtype


def compact(
    tensors: Sequence[Tensor],
    keep_out: Sequence[Tensor | None],
    keep_in: Sequence[Tensor | None],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Keep rows `keep_out[i]` (dimension 0) and columns `keep_in[i]` (dimension 1) of every tensor; None keeps all.

    Args:
        dtype: of the results of floating-point tensors; None keeps each tensor's own.

    Returns:
        New tensors of the same memory format, never views.
    """
    result = []
    for t, rows, columns in zip(tensors, keep_out, keep_in, strict=True):
        kept = t.detach()
        if rows is not None:
            kept = kept.index_select(0, rows)
        if columns is not None:
            kept = kept.index_select(1, columns)
        kept = kept.to(compact_dtype(t, dtype))
        if rows is None and columns is None and kept.dtype == t.dtype:
            kept = kept.clone(memory_format=memory_format(t))
        result.append(kept.contiguous(memory_format=memory_format(t)))
    return result


def conv_gram(
    x: Tensor,
    y: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normal equations of a convolution: XᵀX and XᵀY, X the unfolded patches of x with a column of ones at the end.

    Args:
        x: [N, C, H, W].
        y: [N, C_out, H_out, W_out].
        weight: [N], weight of each sample's rows.

    Returns:
        XᵀX [K + 1, K + 1] and XᵀY [K + 1, C_out], K = kh · kw · C. Columns go tap by tap: column (ky · kw + kx) · C + c.
    """
    dtype = _accumulator(x, y)
    n, channels = x.shape[:2]
    taps = kernel_size[0] * kernel_size[1]
    columns = channels * taps + 1
    xtx = torch.zeros(columns, columns, dtype=dtype, device=x.device)
    xty = torch.zeros(columns, y.shape[1], dtype=dtype, device=x.device)
    step = max(1, (64 << 20) // max(1, columns * y.shape[2] * y.shape[3] * 4))  # patches of about 64 MiB at a time
    if x.numel() == 0 or y.numel() == 0:
        step = max(1, n)
    for i in range(0, n if y.shape[2] * y.shape[3] else 0, step):
        part = x[i : i + step].to(dtype)
        positions = y.shape[2] * y.shape[3]
        rows = torch.ones(len(part), positions, columns, dtype=dtype, device=x.device)
        if channels:
            patches = torch.nn.functional.unfold(part, tuple(kernel_size), padding=tuple(padding), stride=tuple(stride))
            rows[:, :, :-1] = patches.view(len(part), channels, taps, -1).permute(0, 3, 2, 1).flatten(2)
        flat = rows.flatten(0, 1)
        right = y[i : i + step].to(dtype).flatten(2).transpose(1, 2).flatten(0, 1)
        scaled = flat
        if weight is not None:
            scaled = (rows * weight[i : i + step].to(dtype)[:, None, None]).flatten(0, 1)
        xtx += flat.t() @ scaled
        xty += scaled.t() @ right
    return xtx, xty
