"""Selections of other programs that the quality benchmark compares with."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from networks import CONFIGS, inputs_for, random_unet
from runs import one_thread as one_thread
from torch import nn

from benchmarks import rivals
from wanda_fast.evaluation import count_macs

SCHEDULER = DDPMScheduler()
SMALL = {**CONFIGS["plain"], "sample_size": 8, "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}  # fmt: skip


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer ratios than the benchmark tries: each builds a graph."""
    monkeypatch.setattr(rivals, "_PERCENT", range(10, 91, 20))


def test_torch_pruning_reaches_the_budget_and_its_selections_differ() -> None:
    unet = random_unet(SMALL)
    before = {n: p.clone() for n, p in unet.named_parameters()}
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    budget = int(count_macs(unet) * 0.6)

    def batches():
        return rivals.noised_batches(unet, SCHEDULER, images, n=16, batch_size=8)

    outputs = []
    for importance, source in zip(rivals.IMPORTANCES, (None, batches, None)):
        network, macs = rivals.torch_pruning(unet, SCHEDULER, source, target_macs=budget, importance=importance)
        assert macs == count_macs(network) and 0.2 * budget < macs <= 1.02 * budget
        outputs.append(network(**inputs_for(unet)).sample)
        assert outputs[-1].shape == (2, 3, 8, 8) and bool(torch.isfinite(outputs[-1]).all())
        assert not network.training and not any(p.requires_grad or p.grad is not None for p in network.parameters())
        assert network.conv_out.out_channels == 3 and network.conv_in.out_channels < 32
    assert len({float(out.sum()) for out in outputs}) == 3
    torch.manual_seed(5)  # what was drawn elsewhere does not matter, the seed does
    again, other = (
        rivals.torch_pruning(unet, SCHEDULER, target_macs=budget, importance="random", seed=s)[0] for s in (0, 1)
    )
    assert torch.equal(again(**inputs_for(unet)).sample, outputs[2])
    assert not torch.equal(other(**inputs_for(unet)).sample, outputs[2])
    assert all(torch.equal(p, before[n]) and p.grad is None and not p.requires_grad for n, p in unet.named_parameters())


def test_batches_are_those_of_the_criterion() -> None:
    """Gradients of our own sum over timesteps and of the batches are the same, up to the number of batches."""
    from wanda_fast.taylor import NoisedImages, loss_gradients

    unet = random_unet(SMALL)
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    ours = loss_gradients(unet, NoisedImages(unet, SCHEDULER, images, seed=2), images=32, batch_size=2)
    unet.requires_grad_(True)
    rivals._accumulate(unet, rivals.noised_batches(unet, SCHEDULER, images, n=32, batch_size=2, seed=2))
    for name, module in unet.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            torch.testing.assert_close(module.weight.grad, ours.gradients[name], rtol=1e-3, atol=1e-6)


def test_mistakes_are_named() -> None:
    unet = random_unet(SMALL)
    with pytest.raises(ValueError, match="'sorcery' is not one of magnitude, taylor, random"):
        rivals.torch_pruning(unet, SCHEDULER, target_macs=10, importance="sorcery")
    with pytest.raises(ValueError, match="taylor needs batches"):
        rivals.torch_pruning(unet, SCHEDULER, target_macs=10**9, importance="taylor")
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="taylor needs batches"):
        rivals.torch_pruning(unet, SCHEDULER, [(x, torch.zeros(1), None)], target_macs=10**9, importance="taylor")


def test_a_budget_that_no_ratio_reaches() -> None:
    unet = random_unet(SMALL)
    with pytest.raises(ValueError, match=r"torch-pruning reaches \d+ MACs at the least, the budget is 10$"):
        rivals.torch_pruning(unet, SCHEDULER, target_macs=10)
