"""Faults of the machine: too little memory on the device, a disk that fills up. The work goes on, or nothing is left behind."""

from __future__ import annotations

import errno
import logging
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import PLAIN, random_unet
from PIL import Image
from runs import flags
from runs import one_thread as one_thread

import wanda_fast
from wanda_fast import checkpoint, data, sampling, study, study_figures
from wanda_fast.cli import main
from wanda_fast.smaller_batches import halves_batches, in_smaller_batches

SMALL = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}
ROOM = 2  # images that fit


def cramped() -> tuple[torch.nn.Module, list[int]]:
    """A network on a device that holds ROOM images: the error comes in the middle of the pass, where hooks have run already."""
    unet = random_unet(SMALL)
    sizes: list[int] = []

    def refuse(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        sizes.append(len(args[0]))
        if len(args[0]) > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory")

    unet.up_blocks[0].resnets[0].conv1.register_forward_pre_hook(refuse)
    return unet, sizes


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (6, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_halving_tries_smaller_batches_and_says_so():
    tried, said = [], []

    def run(size: int) -> int:
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError
        return size

    assert in_smaller_batches(run, 21, what="it", say=said.append) == 3
    assert tried == [21, 11, 6, 3] and said[-1] == "too little memory: it goes on with batches of 3" and len(said) == 3


def test_a_single_image_that_is_too_much_is_an_error():
    def run(size: int) -> None:
        raise torch.OutOfMemoryError("out")

    with pytest.raises(torch.OutOfMemoryError):
        in_smaller_batches(run, 4, what="it", say=lambda line: None)

    @halves_batches("it", default=8)
    def other(*, batch_size: int = 8) -> None:
        raise KeyError("not about memory")

    with pytest.raises(KeyError):
        other()


@pytest.mark.parametrize("rows", ["sample", "bin"])
def test_calibration_is_that_of_the_smaller_batch(images, rows, caplog):
    unet, sizes = cramped()
    how = {"n": 12, "rows": rows, "means": True}
    with caplog.at_level(logging.WARNING, "wanda_fast"):
        got = wanda_fast.calibrate(unet, DDPMScheduler(), images, batch_size=8, **how)
    assert "calibration goes on with batches of 4" in caplog.text and "batches of 2" in caplog.text
    assert sizes[:3] == [8, 4, 2]
    want = wanda_fast.calibrate(random_unet(SMALL), DDPMScheduler(), images, batch_size=2, **how)
    for name in want.tables:  # what the failed passes had added is gone
        assert torch.equal(got.tables[name], want.tables[name]) and torch.equal(got.sums[name], want.sums[name])
    assert torch.equal(got.timesteps, want.timesteps) and torch.equal(got.counts, want.counts)


def test_the_study_goes_on(images):
    unet, _ = cramped()
    got, _ = study.study(unet, DDPMScheduler(), images, n=8, batch_size=4)
    want, _ = study.study(random_unet(SMALL), DDPMScheduler(), images, n=8, batch_size=2)
    assert got == want


def test_pruning_goes_on_and_repairs_as_with_the_smaller_batch(tmp_path):
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "a.png")
    how = {"ratio": 0.4, "calib_steps": 8, "repair_images": 16, "num_samples": 0, "split": "uniform", "align": 4, "min_width": 4,
           "device": "cpu", "dataset": str(tmp_path)}  # fmt: skip
    said: list[str] = []
    unet, _ = cramped()
    got = wanda_fast.prune(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()), batch_size=4, log=said.append, **how)
    want = wanda_fast.prune(DDPMPipeline(unet=random_unet(SMALL), scheduler=DDPMScheduler()), batch_size=2, **how)
    assert any("the repair goes on with batches of 2" in line for line in said), said
    assert got.plan.to_dict() == want.plan.to_dict()
    for (name, a), b in zip(got.pipeline.unet.state_dict().items(), want.pipeline.unet.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert got.report["quality"]["noise_mse"] == pytest.approx(want.report["quality"]["noise_mse"], rel=1e-5)
    assert got.report["quality"]["forward_seconds"]["batch_size"] == ROOM


# ------------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def full(monkeypatch):
    """Make a function write a part of its file and then find the disk full."""

    def fill(module: Any, name: str) -> None:
        def write(first: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            with open(path, "wb") as stream:
                stream.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(module, name, write)

    return fill


@pytest.fixture
def model(tmp_path):
    place = tmp_path / "given"
    DDPMPipeline(unet=random_unet(SMALL), scheduler=DDPMScheduler()).save_pretrained(place / "model")
    (place / "images").mkdir()
    Image.new("RGB", (8, 8), "teal").save(place / "images" / "a.png")
    return place


def test_a_disk_that_fills_up_while_samples_are_saved(model, tmp_path, full, capsys):
    full(sampling, "save_grid")
    how = {"model": model / "model", "pruner": "magnitude", "ratio": 0.4, "repair": "none", "split": "uniform", "num_samples": 2,
           "num_inference_steps": 1, "align": 4, "min_width": 4, "device": "cpu", "dataset": model / "images"}  # fmt: skip
    assert main(["prune", *flags(how), "--save_path", str(tmp_path / "new" / "out"), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert "writing failed (No space left on device)" in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["given"]


def test_a_disk_that_fills_up_while_the_study_is_saved(model, tmp_path, monkeypatch, capsys):
    def stop(report: Any, folder: Any) -> None:
        (folder / "activations.png").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(study_figures, "save_figures", stop)
    words = ["--model", model / "model", "--dataset", model / "images", "--num_samples", 8, "--device", "cpu", "--quiet", "--save_path",
             tmp_path / "out"]  # fmt: skip
    assert main(["analyze", *map(str, words)]) == 2
    assert "writing failed" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["given"]


def test_images_of_mixed_sizes_and_modes(tmp_path):
    for i, (mode, size) in enumerate((("RGB", (8, 8)), ("L", (40, 9)), ("RGBA", (5, 60)), ("P", (13, 13)), ("CMYK", (64, 3)), ("1", (1, 1)))):
        Image.new(mode, size).convert("RGB" if mode == "CMYK" else mode).save(tmp_path / f"{i}.png")
    found = data.load_folder(tmp_path, n=9, size=(8, 8), channels=3)
    assert found.shape == (6, 8, 8, 3)


def test_checkpoint_knows_a_full_disk():
    assert checkpoint._is_disk_error(OSError(errno.ENOSPC, "x")) and not checkpoint._is_disk_error(OSError(errno.EINTR, "x"))
