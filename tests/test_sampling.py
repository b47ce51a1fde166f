"""Sampling: equal to diffusers' own loop, independent of the batch size, exactly n images; grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from networks import PLAIN, random_unet
from PIL import Image
from torch import nn

from wanda_fast import sampling
from wanda_fast.errors import UserError
from wanda_fast.sampling import class_labels, generator, make_grid, noise, sample, save_grid, to_float, to_uint8

TINY = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return random_unet(TINY)


@pytest.fixture(scope="module")
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(clip_sample_range=1.5)


def assert_alike(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for single steps of rounding."""
    assert a.shape == b.shape and int((a.int() - b.int()).abs().max()) <= 1


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_images_do_not_depend_on_the_batch_size_or_their_number(
    kind: str, unet: nn.Module, scheduler: DDPMScheduler
) -> None:
    how: dict[str, Any] = {"steps": 3, "kind": kind, "seed": 4}
    seven = sample(unet, scheduler, 7, batch_size=7, **how)
    assert seven.shape == (7, 8, 8, 3) and seven.dtype == torch.uint8
    assert_alike(seven, sample(unet, scheduler, 7, batch_size=3, **how))
    assert_alike(seven[:2], sample(unet, scheduler, 2, batch_size=32, **how))
    other = sample(unet, scheduler, 7, **{**how, "seed": 5})
    assert int((seven.int() - other.int()).abs().max()) > 30
    assert len({image.numpy().tobytes() for image in seven}) == 7


def test_ddim_is_the_textbook_recursion(unet: nn.Module, scheduler: DDPMScheduler) -> None:
    """x_{t'} = √ᾱ' x₀ + √(1-ᾱ') ε with x₀ = clip((x - √(1-ᾱ) ε) / √ᾱ), at t = 750, 500, 250, 0, in float64 outside the
    network.
    """
    x = noise((3, 8, 8), range(2), 9, "image").double()
    alphas = torch.cat([scheduler.alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])
    for t, following in ((750, 500), (500, 250), (250, 0), (0, -1)):
        with torch.no_grad():
            eps = unet(x.float(), torch.tensor([t, t])).sample.double()
        clean = ((x - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()).clamp(-1.5, 1.5)
        x = alphas[following].sqrt() * clean + (1 - alphas[following]).sqrt() * eps
    assert_alike(sample(unet, scheduler, 2, steps=4, seed=9), to_uint8(x))


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_equal_to_the_loop_of_diffusers(kind: str, unet: nn.Module, scheduler: DDPMScheduler) -> None:
    cls = DDIMScheduler if kind == "ddim" else DDPMScheduler
    theirs = cls.from_config(scheduler.config)
    theirs.set_timesteps(5)
    x = noise((3, 8, 8), range(3), 1, "image")
    generators = [generator(1, "ddpm", i) for i in range(3)]
    for t in theirs.timesteps:
        with torch.no_grad():
            x = theirs.step(unet(x, t).sample, t, x, generator=generators).prev_sample
    assert_alike(sample(unet, scheduler, 3, steps=5, kind=kind, seed=1), to_uint8(x))


def test_class_conditional_and_one_channel(scheduler: DDPMScheduler) -> None:
    unet = random_unet({**TINY, "num_class_embeds": 7, "in_channels": 1, "out_channels": 1})
    assert sample(unet, scheduler, 3, steps=2, batch_size=2).shape == (3, 8, 8, 1)
    labels = class_labels(unet, range(200), 0)
    assert labels is not None and labels.unique().tolist() == list(range(7))
    again = class_labels(unet, [5, 3], 0)
    assert again is not None and torch.equal(again, labels[[5, 3]])


def test_labels_like_timesteps_fit_a_learned_embedding() -> None:
    learned = {"class_embed_type": "timestep", "time_embedding_type": "learned", "num_train_timesteps": 10}
    assert sample(random_unet({**TINY, **learned}), DDPMScheduler(num_train_timesteps=10), 16, steps=2).shape == (16, 8, 8, 3)


def test_none_bfloat16_and_the_progress_bar(
    unet: nn.Module, scheduler: DDPMScheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(unet, scheduler, 0, steps=2).shape == (0, 8, 8, 3)
    exact = sample(unet, scheduler, 2, steps=2)
    rough = sample(unet, scheduler, 2, steps=2, dtype=torch.bfloat16, progress=True, desc="drawing")
    assert 0 < (exact.float() - rough.float()).abs().mean() < 8
    shown = capsys.readouterr().err
    assert "drawing" in shown and "2/2" in shown
    assert unet.dtype == torch.float32 and unet.conv_in.weight.is_contiguous()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 1001}, {"kind": "euler"}, {"n": -1}, {"batch_size": 0}])
def test_bad_arguments(wrong: dict[str, Any], unet: nn.Module, scheduler: DDPMScheduler) -> None:
    with pytest.raises(UserError):
        sample(unet, scheduler, **{"n": 1, "steps": 2, **wrong})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_channels": 6}, "6 output channels"),
        ({"class_embed_type": "identity"}, "identity"),
        ({"sample_size": None}, "sample_size"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 100}, "learned embeddings for 100"),
    ],
)
def test_unsupported_networks_are_named(change: dict[str, Any], message: str, scheduler: DDPMScheduler) -> None:
    with pytest.raises(UserError, match=message):
        sample(random_unet({**TINY, **change}), scheduler, 1, steps=1)


def test_noise_of_an_image_is_its_own() -> None:
    together = noise((3, 8, 8), [0, 1, 70_000], 3, "image")
    assert torch.equal(together[2:], noise((3, 8, 8), [70_000], 3, "image"))
    for seed, stream in ((4, "image"), (3, "calibration"), (-3, "image"), (2**40 + 3, "image")):
        assert not torch.equal(together, noise((3, 8, 8), [0, 1, 70_000], seed, stream))
    many = noise((3, 8, 8), range(500), 0, "image").flatten(1)
    assert abs(float(many.mean())) < 0.01 and abs(float(many.std()) - 1) < 0.01
    likeness = torch.corrcoef(many) - torch.eye(500)
    assert float(likeness.abs().max()) < 0.5  # 192 values each: chance stays below 0.4


def test_conversion_there_and_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3).contiguous()
    floats = to_float(images)
    assert floats.shape == (2, 3, 16, 16) and float(floats.min()) == -1 and float(floats.max()) == 1
    assert torch.equal(to_uint8(floats), images)
    assert to_uint8(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_grid_places_every_image(tmp_path: Path) -> None:
    images = torch.randint(0, 255, (5, 4, 6, 3), dtype=torch.uint8)
    grid = make_grid(images, columns=3, padding=2)
    assert grid.shape == (2 * 4 + 2, 3 * 6 + 2 * 2, 3)
    assert (
        torch.equal(grid[6:10, 8:14], images[4])
        and bool((grid[6:, 16:] == 255).all())
        and bool((grid[4:6] == 255).all())
    )
    save_grid(images, tmp_path / "new" / "grid.png", columns=3, scale=3)
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture)[1::3, 1::3], grid.numpy())
    save_grid(images[..., :1], tmp_path / "grey.png")
    with Image.open(tmp_path / "grey.png") as picture:
        assert picture.mode == "L" and picture.height >= 64
    with pytest.raises(UserError, match="at least one image"):
        make_grid(images[:0])
    with pytest.raises(UserError, match="1 or 3 channels"):
        save_grid(images[..., :2], tmp_path / "x.png")


def test_layout_for() -> None:
    assert sampling.layout_for(torch.device("cpu")) is torch.channels_last
    assert sampling.layout_for(torch.device("cuda", 1)) is torch.contiguous_format
    assert sampling.layout_for(torch.device("cuda"), compiled=True) is torch.channels_last


def test_the_layout_is_put_back(unet: nn.Module) -> None:
    before = {n: (p, p.clone()) for n, p in unet.named_parameters()}
    with pytest.raises(RuntimeError), sampling.fast_layout(unet):
        assert not unet.conv_in.weight.is_contiguous()
        raise RuntimeError
    for name, parameter in unet.named_parameters():
        assert parameter is before[name][0] and parameter.is_contiguous() and torch.equal(parameter, before[name][1])


def test_a_network_sampled_in_inference_mode_can_still_be_trained(scheduler: DDPMScheduler) -> None:
    """Its weights are laid out anew on the way, and a tensor made in inference mode refuses gradients for good."""
    unet = random_unet(TINY)
    expected = sample(unet, scheduler, 2, steps=2)
    with torch.inference_mode():
        images = sample(unet, scheduler, 2, steps=2)
    assert torch.equal(images, expected)
    assert not any(p.is_inference() for p in unet.parameters())
    unet.requires_grad_(True)
    unet(torch.randn(1, 3, 8, 8), torch.tensor([3])).sample.sum().backward()
    assert unet.conv_in.weight.grad is not None


def test_dropout_draws_nothing_and_the_modules_keep_their_modes(scheduler: DDPMScheduler) -> None:
    unet = random_unet({**TINY, "dropout": 0.5})
    expected = sample(unet, scheduler, 2, steps=2)
    unet.train()
    unet.mid_block.eval()
    modes = {name: module.training for name, module in unet.named_modules()}
    assert torch.equal(sample(unet, scheduler, 2, steps=2), expected)
    assert {name: module.training for name, module in unet.named_modules()} == modes
