"""S = |W| * ||X||_2, the Wanda score, for Linear and Conv2d weights. The module itself can be called: `wanda_fast.score(w, n)`.

Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695, section 3.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from wanda_fast import ops, reference
from wanda_fast._callable import make_callable

REDUCTIONS = ("none", "rows", "columns")


def score(
    weight: Tensor,
    act_norm: Tensor,
    *,
    reduce: Literal["none", "rows", "columns"] = "none",
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Wanda score of every weight, S[o, i, ...] = |W[o, i, ...]| * n[i], or its sums over rows or columns.

    Args:
        weight: [C_out, C_in] (Linear) or [C_out, C_in / groups, kh, kw] (Conv2d), floating point.
        act_norm: [C_in], ||X||_2 of each input channel over all samples and positions, on the same device.
        reduce: "none": S with the shape of `weight`; "rows": [C_out], sum over everything that output channel o reads;
            "columns": [C_in], sum over everything that reads input channel i.
        groups: of the convolution. Output channel o reads the slice of `act_norm` of its group.
        backend: of the sums, as in `wanda_fast.ops`; "none" is one elementwise product on any device.

    Returns:
        float32, or float64 where `weight` or `act_norm` is float64; sums are float32 from a named backend other than "reference".

    Raises:
        ValueError: shapes, dtypes, devices or `groups` disagree; the text names the argument and the value.
        RuntimeError: the named backend is unavailable.

    Example:
        >>> import torch, wanda_fast
        >>> weight, act_norm = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([10.0, 1.0])
        >>> wanda_fast.score(weight, act_norm)
        tensor([[10.0000,  2.0000],
                [30.0000,  0.5000]])
        >>> wanda_fast.score(weight, act_norm, reduce="columns")
        tensor([40.0000,  2.5000])

    Source: Wanda, Sun et al. 2023, arXiv:2306.11695, section 3.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce: {reduce!r} is not one of {', '.join(REDUCTIONS)}")
    if groups < 1 or (weight.dim() > 0 and weight.shape[0] % groups):
        raise ValueError(f"groups: {groups} does not divide the rows of a weight of shape {list(weight.shape)}")
    ops.check_wanda_score(weight, act_norm, groups=groups)
    weight, act_norm = weight.detach(), act_norm.detach()
    if reduce == "none":
        dtype = torch.promote_types(torch.promote_types(weight.dtype, act_norm.dtype), torch.float32)
        rows, channels = weight.shape[:2]
        norm = act_norm.to(dtype).reshape(groups, 1, channels).expand(groups, rows // groups, channels)
        return weight.to(dtype).abs() * norm.reshape(rows, channels, *[1] * (weight.dim() - 2))
    if torch.float64 in (weight.dtype, act_norm.dtype) and ops.resolve_name(backend) in ("auto", "reference"):
        row, col = reference.wanda_score(weight, act_norm)
    else:
        row, col = ops.wanda_score(weight, act_norm, backend=backend)
    return row if reduce == "rows" else col


make_callable(__name__)
