"""Comparisons of networks and images against hand-made values and independent counters."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from networks import CIFAR32, CONFIGS, PLAIN, random_unet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wanda_fast import evaluation
from wanda_fast.calibrate import noised_batches
from wanda_fast.checkpoint import load_pipeline
from wanda_fast.errors import UserError
from wanda_fast.evaluation import (
    count_macs,
    count_params,
    forward_seconds,
    noise_mse,
    paired_forward_seconds,
    peak_memory,
    psnr,
    ssim,
)

TINY = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}


def pictures(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, 16, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def ssim_by_hand(a: Tensor, b: Tensor) -> float:
    """Wang et al. 2004 with a 7 × 7 box and sample (co)variances, in float64, from box filters."""
    x, y = (v.permute(0, 3, 1, 2).double() for v in (a, b))

    def box(v: Tensor) -> Tensor:
        return F.avg_pool2d(v, 7, stride=1)

    unbiased = 49 / 48
    mx, my = box(x), box(y)
    vx, vy, vxy = ((box(p) - m) * unbiased for p, m in ((x * x, mx * mx), (y * y, my * my), (x * y, mx * my)))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def test_ssim_follows_its_definition() -> None:
    a = pictures()
    b = (a.float() + 40 * torch.randn(a.shape)).clamp(0, 255).to(torch.uint8)
    assert ssim(a, a) == pytest.approx(1, abs=1e-12)
    assert ssim(a, b) == pytest.approx(ssim_by_hand(a, b), abs=1e-9)
    assert 0.3 < ssim(a, b) < 0.99 and abs(ssim(a, pictures(1))) < 0.2
    assert ssim(a[..., :1], b[..., :1]) == pytest.approx(ssim_by_hand(a[..., :1], b[..., :1]), abs=1e-9)


def test_psnr() -> None:
    a = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    assert psnr(a, a + 10) == pytest.approx(20 * math.log10(25.5))
    assert psnr(a, a) == math.inf


def test_pairs_must_match() -> None:
    a = pictures()
    for wrong in (a[:2], a.float(), a[0]):
        with pytest.raises(ValueError, match="equally shaped"):
            ssim(a, wrong)
    with pytest.raises(ValueError, match="equally shaped"):
        psnr(a[:0], a[:0])
    with pytest.raises(UserError, match="7 × 7"):
        ssim(a[:, :6], a[:, :6])


def test_noise_mse_of_a_known_difference() -> None:
    """A bias of 0.5 on one of three output channels is an error of 0.25 / 3."""
    unet, other = random_unet(TINY), random_unet(TINY)
    with torch.no_grad():
        other.conv_out.bias[1] += 0.5
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    batches = list(noised_batches(unet, DDPMScheduler(), images, n=10, batch_size=4))
    error = noise_mse(unet, other, batches)
    assert error.mse == pytest.approx(0.25 / 3, rel=1e-5) and error.samples == 10
    with torch.no_grad():
        energy = torch.cat([unet(b.x, b.t).sample for b in batches]).square().mean()
    assert error.relative == pytest.approx(error.mse / float(energy), rel=1e-4)
    assert noise_mse(unet, unet, [(b.x, b.t, b.labels) for b in batches]).mse == 0
    with pytest.raises(ValueError, match="at least one batch"):
        noise_mse(unet, other, [])


def test_published_sizes() -> None:
    with torch.device("meta"):
        cifar = UNet2DModel(**CIFAR32)
    assert count_params(cifar) == 35_746_307
    assert count_macs(cifar) == pytest.approx(6.06e9, rel=0.002)
    small = load_pipeline(None).unet
    assert (count_params(small), round(count_macs(small) / 1e9, 2)) == (6_079_811, 1.03)


@pytest.mark.parametrize("config", CONFIGS)
def test_macs_agree_with_torchs_counter(config: str) -> None:
    """torch counts two operations per product, and the products inside attention, which are its only batched ones."""
    unet = random_unet(config)
    size = unet.config.sample_size
    inputs: dict[str, Any] = {
        "sample": torch.randn(1, unet.config.in_channels, size, size),
        "timestep": torch.tensor([1]),
    }
    if unet.class_embedding is not None:
        inputs["class_labels"] = torch.tensor([1])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**inputs)
    flops = counter.get_flop_counts()["Global"]
    kept = sum(v for k, v in flops.items() if "bmm" not in str(k) and "attention" not in str(k))
    assert count_macs(unet) == kept // 2
    assert not any(m._forward_hooks for m in unet.modules()) and next(unet.parameters()).device.type == "cpu"


def test_time_is_measured_on_each_network() -> None:
    unet, calls = random_unet(TINY), {"a": 0, "b": 0}
    other = copy.deepcopy(unet)
    order: list[str] = []
    for name, network in (("a", unet), ("b", other)):

        def count(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
            calls[name] += 1
            order.append(name)

        network.register_forward_hook(count)
    assert forward_seconds(unet, 2, repeats=3, warmup=1) > 0 and calls == {"a": 4, "b": 0}
    order.clear()
    times = paired_forward_seconds(unet, other, 2, repeats=3, warmup=1)
    assert min(times) > 0 and order == ["a", "b"] * 4


def test_measuring_leaves_a_network_in_its_mode_and_draws_no_dropout() -> None:
    unet, other = random_unet({**TINY, "dropout": 0.5}), random_unet(TINY, seed=1)
    batch = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), None
    expected = noise_mse(unet, other, [batch])
    unet.train()
    assert noise_mse(unet, other, [batch]) == expected
    table = [evaluation.errors_over_time(unet, other, [(*batch, batch[0])]) for _ in range(2)]
    assert table[0] == table[1]
    forward_seconds(unet, 1, repeats=1, warmup=0)
    paired_forward_seconds(unet, other, 1, repeats=1, warmup=0)
    assert all(module.training for module in unet.modules()) and not other.training


def test_the_median_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([5.0, 1.0, 2.0, 9.0, 3.0, 4.0])
    monkeypatch.setattr(evaluation, "_seconds", lambda run, device: next(ticks))
    unet = random_unet(TINY)
    assert paired_forward_seconds(unet, unet, 1, repeats=3, warmup=0) == (3.0, 4.0)


def test_peak_memory_is_a_gpu_figure() -> None:
    assert peak_memory("cpu") is None
