"""Backward elimination of channels against least squares done by brute force."""

from __future__ import annotations

import pytest
import torch
from runs import one_thread as one_thread
from torch import Tensor

from wanda_fast.elimination import eliminate, output_energy, precision


def layer(seed: int, width: int = 7, outputs: int = 5, kernel: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=g, dtype=torch.float64)
    weight = torch.randn(outputs, width, *([kernel, kernel] if kernel > 1 else []), generator=g, dtype=torch.float64)
    return mix @ mix.T, weight, torch.rand(outputs, generator=g, dtype=torch.float64)


def refit_error(covariance: Tensor, weight: Tensor, gain: Tensor, removed: list[int]) -> float:
    """Output error of the best linear use of the channels that stay, by solving for it."""
    stay = [i for i in range(len(covariance)) if i not in removed]
    total = 0.0
    for w in (weight.flatten(2) if weight.ndim == 4 else weight[..., None]).unbind(2):
        new = torch.linalg.solve(covariance[stay][:, stay], covariance[stay] @ w.T).T if stay else w[:, :0]
        change = w.clone()
        change[:, stay] -= new
        total += float((gain * torch.einsum("oi,ij,oj->o", change, covariance, change)).sum())
    return total


@pytest.mark.parametrize("kernel", [1, 3])
def test_costs_add_up_to_the_refit_error(kernel: int) -> None:
    """After k steps the summed costs are the error of one refit without all k channels, over both layers."""
    layers = [layer(s, kernel=kernel) for s in (0, 1)]
    parts = [(precision(c, 0.0), output_energy(w, g)) for c, w, g in layers]
    before = [(p.clone(), h.clone()) for p, h in parts]
    rank, cost = eliminate(parts)
    order = rank.argsort().tolist()
    assert sorted(rank.tolist()) == list(range(7))
    for k in range(1, 8):
        expected = sum(refit_error(c, w, g, order[:k]) for c, w, g in layers)
        assert float(cost[order[:k]].sum()) == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(a, b) for part, old in zip(parts, before) for a, b in zip(part, old))


def test_each_step_takes_the_cheapest() -> None:
    covariance, weight, gain = layer(2)
    rank, _ = eliminate([(precision(covariance, 0.0), output_energy(weight, gain))])
    gone: list[int] = []
    for i in rank.argsort().tolist()[:5]:
        errors = {j: refit_error(covariance, weight, gain, [*gone, j]) for j in range(7) if j not in gone}
        assert min(errors, key=errors.__getitem__) == i
        gone.append(i)


def test_of_two_copies_one_goes_first_and_one_stays() -> None:
    covariance, weight, gain = layer(3)
    twin = [0, 1, 2, 3, 4, 5, 6, 3]  # channel 7 is channel 3 once more
    covariance, weight = covariance[twin][:, twin], weight[:, twin] * 3
    rank, cost = eliminate([(precision(covariance, 1e-9), output_energy(weight, gain))])
    assert rank[3] == 0 or rank[7] == 0
    assert min(cost[3], cost[7]) < 1e-6 * cost.sum() < max(cost[3], cost[7])
    # On its own, each looks like nothing at all.
    inverse = precision(covariance, 1e-9)
    alone = output_energy(weight, gain).diagonal() / inverse.diagonal()
    assert set(alone.argsort()[:2].tolist()) == {3, 7}


def test_a_ridge_keeps_constant_channels_in_order() -> None:
    covariance, weight, gain = layer(4)
    covariance[2], covariance[:, 2] = 0, 0
    rank, cost = eliminate([(precision(covariance), output_energy(weight, gain))])
    assert rank[2] == 0 and bool(torch.isfinite(cost).all())
