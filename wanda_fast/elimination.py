"""Which channels can a slot spare, one after the other, when the others take over after each? Backward elimination.

A layer reads channels with covariance Σ through weights W. When channel i goes and a least-squares refit lets the others
replace it, the output error is h_i / P_ii with P = Σ⁻¹ and h_i = Σ_ok g_o W_oik² (g: what an error at output o costs; kernel
offsets k taken as independent). The refitted network then has

    P ← P - P_:i P_i: / P_ii,    W_:j ← W_:j - W_:i P_ij / P_ii

and the next channel is judged in it. The second update is made on H = Σ_ok g_o W_ok Wᵀ_ok alone, so that one elimination step
costs O(C²) whatever the layer's outputs. Two channels that are copies of one another are each worth nothing while the other is
there; scoring all channels at once would remove both, elimination removes one.

Source: Optimal Brain Surgeon, Hassibi and Stork 1993; for whole structures ZipLM, Kurtic et al. 2023, arXiv:2302.04089.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def precision(covariance: Tensor, ridge: float = 1e-4) -> Tensor:
    """(Σ + λI)⁻¹ in float64, λ = ridge · mean diagonal of Σ."""
    return torch.cholesky_inverse(factor(covariance, ridge * mean_variance(covariance)))


def mean_variance(covariance: Tensor) -> float:
    return float(covariance.diagonal().double().mean().clamp_min(1e-30))


def factor(matrix: Tensor, loading: float) -> Tensor:
    """The Cholesky factor of Σ + λI in float64.

    Sums of few samples made in float32 can be off by more than λ; it is raised tenfold until the matrix is positive definite.

    Raises:
        RuntimeError: Σ is not finite.
    """
    loaded = matrix.double().clone()
    loaded.diagonal().add_(loading)
    while True:
        found, info = torch.linalg.cholesky_ex(loaded)
        if int(info) == 0:
            return found
        added = 9 * max(loading, 1e-9 * mean_variance(matrix))
        if not added < 1e6 * mean_variance(matrix):
            raise RuntimeError("the covariance is not finite")
        loaded.diagonal().add_(added)
        loading += added


def output_energy(weight: Tensor, gain: Tensor) -> Tensor:
    """H = Σ_ok g_o W_ok Wᵀ_ok, [C_in, C_in] float64.

    Args:
        weight: [C_out, C_in] or [C_out, C_in, kh, kw].
        gain: [C_out].
    """
    w = weight.detach().double()
    w = w.flatten(2) if w.ndim == 4 else w[..., None]
    w = (w * gain.double().clamp_min(0).sqrt().view(-1, 1, 1)).permute(0, 2, 1).flatten(0, 1)
    return w.T @ w


def eliminate(layers: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Order of elimination of channels that several layers read.

    Args:
        layers: (P, H) of each layer, [C, C], restricted to the slot's channels; not changed.

    Returns:
        (rank [C] int64: 0 for the channel that goes first; cost [C] float64: output error that its removal adds).
    """
    p, h = (torch.stack([layer[part].double() for layer in layers]) for part in (0, 1))  # [layers, C, C]
    count, device = p.shape[-1], p.device
    rank = torch.zeros(count, dtype=torch.int64, device=device)
    cost = torch.zeros(count, dtype=torch.float64, device=device)
    gone = torch.zeros(count, dtype=torch.bool, device=device)
    for step in range(count):
        price = (h.diagonal(dim1=1, dim2=2).clamp_min(0) / p.diagonal(dim1=1, dim2=2).clamp_min(1e-300)).sum(0)
        i = price.masked_fill(gone, torch.inf).argmin().view(1)
        rank[i], cost[i], gone[i] = step, price[i], True
        mine, energy = p.index_select(2, i), h.index_select(2, i)  # [layers, C, 1]
        column = mine / p.index_select(1, i).index_select(2, i).clamp_min(1e-300)
        own = h.index_select(1, i).index_select(2, i)
        # H + H_ii c cᵀ - H_:i cᵀ - c H_:iᵀ, all layers in one product
        left, right = torch.cat([column, -energy], dim=2), torch.cat([own * column - energy, column], dim=2)
        h.baddbmm_(left, right.transpose(1, 2))
        p.baddbmm_(column, mine.transpose(1, 2), alpha=-1)
        p.index_fill_(1, i, 0.0).index_fill_(2, i, 0.0)
        p[:, i, i] = 1.0
    return rank.cpu(), cost.cpu()
