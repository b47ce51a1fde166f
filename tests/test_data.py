"""Calibration images from every source, of every mode, and what is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from networks import PLAIN, random_unet
from PIL import Image
from torch import nn

from wanda_fast import data, features
from wanda_fast.checkpoint import BUNDLED_SAMPLES, load_pipeline
from wanda_fast.data import check_source, load_folder, load_images, read_sample_sheet
from wanda_fast.errors import UserError
from wanda_fast.sampling import sample

TINY = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return random_unet(TINY)


def test_the_sheet_holds_samples_of_the_bundled_model() -> None:
    """Drawn again with the documented settings, the first images are those of the sheet (which was drawn in
    bfloat16).
    """
    assert BUNDLED_SAMPLES.stat().st_size < 1_000_000
    sheet = read_sample_sheet()
    assert sheet.shape == (256, 32, 32, 3) and sheet.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in sheet}) == 256
    loaded = load_pipeline(None)
    again = sample(loaded.unet, loaded.scheduler, 1, steps=50, seed=data.SHEET_SEED)[0].float()
    distance = (sheet.float() - again).abs().mean((1, 2, 3))
    assert float(distance[0]) < 0.3 * float(distance[1:].min())


def test_self_of_the_bundled_model_reads_the_sheet_evenly(unet: nn.Module) -> None:
    sheet = read_sample_sheet()
    assert torch.equal(load_images("self", n=1000, unet=unet, bundled=True), sheet)
    assert torch.equal(load_images("self", n=3, unet=unet, bundled=True), sheet[[0, 128, 255]])


def test_self_of_another_model_draws(unet: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    how: dict[str, Any] = {"unet": unet, "scheduler": DDPMScheduler(), "steps": 2, "progress": True}
    images = load_images("self", n=3, **how)
    assert images.shape == (3, 8, 8, 3) and "drawing calibration images" in capsys.readouterr().err
    assert torch.equal(load_images("self", n=3, **how), images)
    with pytest.raises(ValueError, match="scheduler"):
        load_images("self", n=3, unet=unet)


def gradient(mode: str, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A picture of this mode that shows the same ramp from dark to bright."""
    ramp = np.linspace(0, 255, size[0]).round()[None].repeat(size[1], 0)
    if mode == "I;16":
        return Image.fromarray((ramp * 257).astype(np.uint16))
    if mode == "I":
        return Image.fromarray((ramp * 257).astype(np.int32))
    if mode == "F":
        return Image.fromarray((ramp / 255).astype(np.float32))
    grey = Image.fromarray(ramp.astype(np.uint8))
    if mode == "P":
        return grey.quantize(64)
    if mode in ("RGBA", "LA"):
        picture = grey.convert(mode)
        picture.putalpha(255)
        return picture
    return grey.convert(mode)


SUFFIX = {"CMYK": "jpg", "F": "tiff", "I": "tiff"}


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK", "I;16", "I", "F", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_converted(mode: str, channels: int, tmp_path: Path) -> None:
    gradient(mode).save(tmp_path / f"x.{SUFFIX.get(mode, 'png')}")
    (image,) = load_folder(tmp_path, n=5, size=(10, 12), channels=channels)
    assert image.shape == (10, 12, channels)
    if mode != "1":  # dithered: the ramp is there only on average
        expected = np.linspace(0, 255, 12)[None, :, None]
        assert np.abs(image.numpy() - expected).max() < 9
    assert image[:, -3:].float().mean() - image[:, :3].float().mean() > 150


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] * 256)
    palette.save(tmp_path / "palette.gif", transparency=0)
    assert bool((load_folder(tmp_path, n=2, size=(8, 8), channels=3) == 255).all())


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    picture = gradient("RGB", (8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    picture.save(tmp_path / "x.jpg", exif=exif, quality=95)
    (image,) = load_folder(tmp_path, n=1, size=(8, 8), channels=1)
    assert image[-1].float().mean() > 200 > 50 > image[0].float().mean()


@pytest.mark.parametrize("size", [(8, 8), (40, 8), (7, 100), (1, 1), (31, 64)])
def test_the_centre_is_cut_out(size: tuple[int, int], tmp_path: Path) -> None:
    picture = Image.new("RGB", size, "red")
    side = min(size)
    picture.paste("blue", ((size[0] - side) // 2, (size[1] - side) // 2, (size[0] + side) // 2, (size[1] + side) // 2))
    picture.save(tmp_path / "x.png")
    (image,) = load_folder(tmp_path, n=1, size=(8, 8), channels=3)
    assert image.shape == (8, 8, 3)
    assert image[2:6, 2:6].float().mean((0, 1)).tolist() == [0, 0, 255]


def test_right_size_is_untouched_sorted_recursive_and_even(tmp_path: Path, unet: nn.Module) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
    for i in reversed(range(10)):
        folder = tmp_path / f"class{i // 5}" / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(folder / f"{i}.{'PNG' if i % 2 else 'bmp'}", format="PNG" if i % 2 else "BMP")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image")
    assert np.array_equal(load_images(str(tmp_path), n=99, unet=unet).numpy(), pixels)
    assert np.array_equal(load_images(str(tmp_path), n=4, unet=unet).numpy(), pixels[[0, 3, 6, 9]])


def test_unreadable_images_are_named(tmp_path: Path, unet: nn.Module) -> None:
    gradient("RGB").save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(UserError, match=r"unreadable images: .*cut\.png.*text\.jpg") as caught:
        load_images(str(tmp_path), n=9, unet=unet)
    assert "good.png" not in str(caught.value)


def test_folders_that_cannot_work(tmp_path: Path, unet: nn.Module) -> None:
    (tmp_path / "file.png").write_text("x")
    (tmp_path / "empty").mkdir()
    cases = {"absent": "no such image folder", "file.png": "is a file", "empty": "holds no images"}
    for name, message in cases.items():
        for refuse in (check_source, lambda spec: load_images(spec, n=1, unet=unet)):
            with pytest.raises(UserError, match=message):
                refuse(str(tmp_path / name))
    with pytest.raises(UserError, match="at least 1"):
        load_images("self", n=0, unet=unet)
    gradient("L").save(tmp_path / "empty" / "x.png")
    four = random_unet({**TINY, "in_channels": 4, "out_channels": 4})
    with pytest.raises(UserError, match="4 channels"):
        load_images(str(tmp_path / "empty"), n=1, unet=four)
    check_source("self")


# ------------------------------------------------------------------------------------------------------------- CIFAR-10


def binary_batches(folder: Path, count: int = 5) -> np.ndarray:
    """Two data batches of random images in the binary format; returns the images [2 count, 32, 32, 3]."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (2 * count, 32, 32, 3), dtype=np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for b in range(2):
        planes = images[b * count : (b + 1) * count].transpose(0, 3, 1, 2).reshape(count, -1)
        labels = rng.integers(0, 10, (count, 1), dtype=np.uint8)
        (folder / f"data_batch_{b + 1}.bin").write_bytes(np.concatenate([labels, planes], 1).tobytes())
    (folder / "test_batch.bin").write_bytes(b"not for calibration")
    return images


def test_cifar10_binary_version_unpacked_and_packed(tmp_path: Path) -> None:
    unet = random_unet({**TINY, "sample_size": 32})
    images = binary_batches(tmp_path / "cifar-10-batches-bin")
    got = load_images("cifar10", n=4, unet=unet, data_dir=tmp_path)
    assert np.array_equal(got.numpy(), images[[0, 3, 6, 9]])
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "cifar-10-binary.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
        archive.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    assert torch.equal(load_images("cifar10", n=4, unet=unet, data_dir=packed), got)
    assert load_images("cifar10", n=4, unet=random_unet({**TINY, "in_channels": 1, "out_channels": 1}),
                       data_dir=packed).shape == (4, 8, 8, 1)  # fmt: skip


def test_cifar10_as_a_folder_of_images(tmp_path: Path, unet: nn.Module) -> None:
    (tmp_path / "cifar10").mkdir()
    gradient("RGB", (32, 32)).save(tmp_path / "cifar10" / "x.png")
    assert load_images("cifar10", n=4, unet=unet, data_dir=tmp_path).shape == (1, 8, 8, 3)


def test_cifar10_that_cannot_be_read(tmp_path: Path, unet: nn.Module) -> None:
    with pytest.raises(UserError, match="needs a data folder"):
        check_source("cifar10")
    with pytest.raises(UserError, match=r"no such data folder.*cifar-10-binary"):
        check_source("cifar10", data_dir=tmp_path / "absent")
    with pytest.raises(UserError, match="holds no CIFAR-10"):
        check_source("cifar10", data_dir=tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UserError, match="a pickle, which is refused"):
        check_source("cifar10", data_dir=tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(5000))
    with pytest.raises(UserError, match=r"data_batch_1\.bin: truncated"):
        load_images("cifar10", n=1, unet=unet, data_dir=tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "cifar-10-binary.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read"):
        load_images("cifar10", n=1, unet=unet, data_dir=broken)


# ----------------------------------------------------------------------------------------------------------- own datasets


class Ramps(data.Dataset):
    name = "ramps"
    count = 6

    def load(self, n: int, size: tuple[int, int] | None, channels: int, data_dir: Path | None) -> torch.Tensor:
        h, w = size or (5, 7)
        return torch.arange(self.count, dtype=torch.uint8)[:n, None, None, None].expand(-1, h, w, channels)


def test_a_dataset_of_ones_own(unet: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "DATASETS", dict(data.DATASETS))
    data.register(Ramps)
    images = load_images("ramps", n=4, unet=unet)
    assert images.shape == (4, 8, 8, 3) and images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    batches = list(features.image_batches("ramps", batch_size=4))
    assert [b.shape for b in batches] == [(4, 5, 7, 3), (2, 5, 7, 3)] and features.count_images("ramps", n=9) == 6
    with pytest.raises(UserError, match="ramps needs no data folder"):
        check_source("ramps", data_dir=tmp_path)
    with pytest.raises(UserError, match=r"known datasets: self, cifar10, (\w+, )*ramps"):
        check_source("ramp")
    with pytest.raises(ValueError, match="name of its own, got 'ramps'"):
        data.register(Ramps)
    with pytest.raises(ValueError, match="empty: count must be"):
        data.register(type("Empty", (Ramps,), {"name": "empty", "count": 0}))
    data.register(type("Grey", (Ramps,), {"name": "grey", "load": lambda self, n, size, channels, folder: torch.zeros(n, 8, 8)}))
    with pytest.raises(ValueError, match=r"dataset grey: asked for uint8 \[1 to 4, \(8, 8\), 3\], got torch.float32 \[4, 8, 8\]"):
        load_images("grey", n=4, unet=unet)
