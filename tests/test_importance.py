"""Criteria and how their layer scores become slot scores."""

from __future__ import annotations

import pytest
import torch
from networks import random_unet
from torch import Tensor

from wanda_fast.errors import UserError
from wanda_fast.importance import CRITERIA, Context, Criterion, get_criterion, register, slot_scores
from wanda_fast.slots import find_slots


def norms_for(unet, value: float = 1.0) -> dict[str, Tensor]:
    return {
        n: torch.full((m.weight.shape[1],), value)
        for n, m in unet.named_modules()
        if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)
    }


def test_slot_score_is_the_mean_of_all_producers_and_consumers() -> None:
    """Against a plain loop over one slot with several producers, several consumers and offsets."""
    unet = random_unet("plain")
    slots = find_slots(unet)
    generator = torch.Generator().manual_seed(0)
    norms = {n: torch.rand(v.shape, generator=generator) + 0.1 for n, v in norms_for(unet).items()}
    scores = slot_scores(unet, slots, get_criterion("wanda-diff"), Context(norms))
    slot = slots.slots["conv_in"]
    assert len(slot.producers) >= 2 and len(slot.consumers) >= 4 and any(o > 0 for _, o in slot.consumers)
    sides = []
    for layers, dim in ((slot.producers, 0), (slot.consumers, 1)):
        parts = []
        for layer, offset in layers:
            weight = unet.get_submodule(layer).weight.detach().double()
            shape = (1, -1, *[1] * (weight.ndim - 2))
            s = weight.abs() * norms[layer].double().view(shape)
            s = s.sum(dim=[d for d in range(s.ndim) if d != dim])[offset : offset + slot.width]
            parts.append(s / s.mean())
        sides.append(torch.stack(parts).mean(0))
    torch.testing.assert_close(scores["conv_in"], (sides[0] + sides[1]) / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("combine", ["producers", "consumers"])
def test_one_side_alone_differs_from_both(combine: str) -> None:
    unet = random_unet("plain")
    slots = find_slots(unet)
    both = slot_scores(unet, slots, get_criterion("magnitude"), Context())
    one = slot_scores(unet, slots, get_criterion("magnitude"), Context(), combine=combine)
    assert not torch.equal(both["conv_in"], one["conv_in"])
    q = next(n for n, s in slots.slots.items() if s.kind == "qk")  # it has producers only
    assert torch.equal(both[q], one[q])


def test_magnitude_is_wanda_with_equal_norms() -> None:
    unet = random_unet("classes")
    slots = find_slots(unet)
    a = slot_scores(unet, slots, get_criterion("magnitude"), Context())
    b = slot_scores(unet, slots, get_criterion("wanda-diff"), Context(norms_for(unet, 3.0)))
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_random_depends_on_the_seed_alone() -> None:
    unet = random_unet("plain")
    slots = find_slots(unet)
    runs = [slot_scores(unet, slots, get_criterion("random"), Context(seed=s))["conv_in"] for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_new_criterion_is_one_small_class() -> None:
    class MeanMagnitude(Criterion):
        name = "mean-magnitude-of-a-test"

        def layer(self, layer: str, weight: Tensor, context: Context) -> tuple[Tensor, Tensor]:
            size = weight.abs().flatten(2).mean(2) if weight.ndim == 4 else weight.abs()
            return size.mean(1), size.mean(0)

    register(MeanMagnitude)
    try:
        unet = random_unet("plain")
        scores = slot_scores(unet, find_slots(unet), get_criterion(MeanMagnitude.name), Context())
        assert scores["conv_in"].mean() == pytest.approx(1.0)
        with pytest.raises(ValueError, match="name of its own"):
            register(MeanMagnitude)
    finally:
        del CRITERIA[MeanMagnitude.name]


def test_mistakes_are_named() -> None:
    unet = random_unet("plain")
    slots = find_slots(unet)
    with pytest.raises(UserError, match=r"unknown pruner 'sorcery'; known: .*wanda-diff"):
        get_criterion("sorcery")
    with pytest.raises(UserError, match="unknown combination"):
        slot_scores(unet, slots, get_criterion("magnitude"), Context(), combine="neither")
    with pytest.raises(UserError, match=r"no layer .*another model"):
        slot_scores(unet, slots, get_criterion("wanda-diff"), Context({}))
    wrong = norms_for(unet)
    wrong["conv_out"] = torch.ones(7)
    with pytest.raises(UserError, match="conv_out have 7 channels"):
        slot_scores(unet, slots, get_criterion("wanda-diff"), Context(wrong))
    unet.conv_in.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="conv_in: the magnitude scores are not finite"):
        slot_scores(unet, slots, get_criterion("magnitude"), Context())
