"""Calibration images: the model's own samples, a dataset that is registered here (CIFAR-10), or any folder of images, as uint8
[N, H, W, C] of the model's size.

The bundled model needs no dataset: 256 of its own samples ship as one PNG sheet, made by

    python -c "from wanda_fast.data import make_sample_sheet; make_sample_sheet()"

CIFAR-10 is read from its binary version or from a folder of images. Its Python version is a pickle, which can run code
when opened, and is refused.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import UserError

if TYPE_CHECKING:
    from PIL import Image

SHEET_TILES = 16  # the shipped sheet is 16 × 16 images
SHEET_SEED = 20_000_003  # none that a user is likely to sample with: the grids must show images outside the calibration
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".tga", ".jp2"}
MOST_PIXELS = 1 << 26  # of an image that is read, 8192 x 8192
_CIFAR_BATCH = 64 << 20  # bytes of a file of CIFAR-10, which is half of that
_CIFAR_RECORD = 1 + 3 * 32 * 32  # a label byte, then the red, green and blue planes
_CIFAR_HELP = (
    "put cifar-10-binary.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html, binary version), its unpacked "
    "data_batch_*.bin files "
    "or a folder of images there"
)


class Dataset:
    """Images under a name, for `dataset` of prune, analyze and finetune and for real images of evaluate and fid. Subclass it, give the
    attributes and `load`, and decorate the class with :func:`register`.

    Attributes:
        name: what the user gives.
        count: number of images.
        needs_data_dir: whether it lies in a folder that the user names (`data_dir`).
    """

    name = ""
    count = 0
    needs_data_dir = False

    def check(self, data_dir: Path | None) -> None:
        """Refuse what cannot work, before any model is loaded.

        Raises:
            UserError: the data folder is missing, or given without need.
        """
        if self.needs_data_dir and data_dir is None:
            raise UserError(f"the dataset {self.name} needs a data folder (--data_dir).")
        if not self.needs_data_dir and data_dir is not None:
            raise UserError(f"the dataset {self.name} needs no data folder (--data_dir).")

    def load(self, n: int, size: tuple[int, int] | None, channels: int, data_dir: Path | None) -> Tensor:
        """At most n images, spread over the dataset in a fixed order.

        Args:
            size: (height, width) to resize to, see :func:`fit`; None for the dataset's own.
            channels: 1 or 3.

        Returns:
            uint8 [≤ n, H, W, channels] on the CPU.
        """
        raise NotImplementedError


DATASETS: dict[str, type[Dataset]] = {}


def register(dataset: type[Dataset]) -> type[Dataset]:
    """Class decorator: make a dataset known under its `name`.

    Raises:
        ValueError: the name is empty or taken, or the dataset has no images.
    """
    if not dataset.name or dataset.name == "self" or dataset.name in DATASETS:
        raise ValueError(f"a dataset needs a name of its own, got {dataset.name!r}")
    if dataset.count < 1:
        raise ValueError(f"{dataset.name}: count must be the number of images, got {dataset.count}")
    DATASETS[dataset.name] = dataset
    return dataset


def is_dataset(images: str | os.PathLike[str]) -> bool:
    """Whether this names a registered dataset, and no file or folder that is there."""
    return os.fspath(images) in DATASETS and not Path(images).exists()


def load_dataset(
    name: str, *, n: int, size: tuple[int, int] | None, channels: int, data_dir: str | os.PathLike[str] | None = None
) -> Tensor:
    """At most n images of a registered dataset, see `Dataset.load`.

    Raises:
        UserError: what the dataset refuses.
        ValueError: it gave something else than it was asked for.
    """
    dataset = DATASETS[name]()
    folder = None if data_dir is None else Path(data_dir)
    dataset.check(folder)
    images = dataset.load(n, size, channels, folder)
    fits = images.dtype == torch.uint8 and images.ndim == 4 and 1 <= len(images) <= n and images.shape[3] == channels
    if not fits or (size is not None and tuple(images.shape[1:3]) != size):
        raise ValueError(f"dataset {name}: asked for uint8 [1 to {n}, {size or 'H, W'}, {channels}], got {images.dtype} {list(images.shape)}")
    return images


def load_images(
    spec: str,
    *,
    n: int,
    unet: nn.Module,
    scheduler: Any = None,
    bundled: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    steps: int = 50,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Tensor:
    """At most n images, taken evenly over the whole source in a fixed order.

    Args:
        spec: "self", the name of a registered dataset such as "cifar10", or a folder that is searched with its subfolders.
        unet: gives the size and the number of channels; for "self" it also draws the images.
        scheduler: needed for "self" with a model other than the bundled one.
        bundled: the network is the bundled model, whose samples ship with the package.
        data_dir: where a dataset such as CIFAR-10 lies.
        seed, steps, batch_size, device, dtype: of the sampling for "self", see :func:`wanda_fast.sampling.sample`.

    Returns:
        uint8 [N, H, W, C], 1 ≤ N ≤ n.

    Raises:
        UserError: missing or empty folder, unreadable images (named), a network with other than 1 or 3 channels, n < 1.
    """
    from . import distributed, sampling

    check_source(spec, data_dir=data_dir)
    if n < 1:
        raise UserError(f"the number of calibration images must be at least 1, not {n}.")
    channels, height, width = sampling.image_shape(unet)
    if spec == "self":
        if bundled:
            images = read_sample_sheet()
            return images[_evenly(len(images), n)]
        if scheduler is None:
            raise ValueError("drawing the model's own samples needs its scheduler")
        return distributed.sample(
            unet,
            scheduler,
            n,
            distributed.ranks(),
            steps=steps,
            seed=seed ^ SHEET_SEED,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            progress=progress,
            desc="drawing calibration images",
        )
    if channels not in (1, 3):
        raise UserError(f"the network has {channels} channels; images can be read for 1 or 3. Use the dataset 'self'.")
    if spec in DATASETS:
        return load_dataset(spec, n=n, size=(height, width), channels=channels, data_dir=data_dir)
    return load_folder(spec, n=n, size=(height, width), channels=channels)


def check_source(spec: str, *, data_dir: str | os.PathLike[str] | None = None) -> None:
    """Refuse a source that cannot work, before any model is loaded.

    Raises:
        UserError: see :func:`load_images`.
    """
    if spec in DATASETS:
        DATASETS[spec]().check(None if data_dir is None else Path(data_dir))
        return
    if data_dir is not None:
        known = ", ".join(name for name, dataset in DATASETS.items() if dataset.needs_data_dir)
        raise UserError(f"a data folder (--data_dir) is where {known} lies, and the dataset is {spec}; a folder of images is given as the "
                        "dataset itself.")  # fmt: skip
    if spec == "self":
        return
    _list_images(Path(spec).expanduser())


def load_folder(folder: str | os.PathLike[str], *, n: int, size: tuple[int, int], channels: int) -> Tensor:
    """Up to n images of a folder and its subfolders as uint8 [N, H, W, channels].

    Any size and mode: the image is turned as its EXIF entry says, transparency is laid on white, 16-bit values are
    scaled to 8, the shorter side is resized and the centre cut out.

    Raises:
        UserError: missing or empty folder, or unreadable images, which are named.
    """
    files = _list_images(Path(folder).expanduser())
    images, bad = [], []
    for index in _evenly(len(files), n):
        try:
            images.append(_read_image(files[index], size, channels))
        except Exception as error:  # decoders raise whatever they like on damaged files
            bad.append(f"{files[index]} ({type(error).__name__}: {error})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(f"unreadable images: {'; '.join(bad[:3])}{more}.")
    return torch.from_numpy(np.stack(images))


def _list_images(folder: Path) -> list[Path]:
    if not folder.exists():
        raise UserError(f"{folder}: no such image folder (known datasets: {', '.join(('self', *DATASETS))}).")
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file; give the folder with the images.")
    files = [
        p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file() and not p.name.startswith(".")
    ]
    if not files:
        raise UserError(f"{folder}: holds no images ({', '.join(sorted(_SUFFIXES))}).")
    return sorted(files, key=lambda p: p.relative_to(folder).as_posix())


def _evenly(total: int, n: int) -> list[int]:
    """min(n, total) indices spread over range(total), so that every class of a sorted folder is present."""
    if n >= total:
        return list(range(total))
    return [int(i) for i in np.linspace(0, total - 1, n).round()]


def _read_image(file: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        if opened.width * opened.height > MOST_PIXELS:  # a small file can declare any size
            raise ValueError(f"{opened.width} x {opened.height} pixels")
        picture = _to_8_bit(ImageOps.exif_transpose(opened), channels)
    return fit(picture, size)


def _to_8_bit(picture: Image.Image, channels: int) -> Image.Image:
    from PIL import Image

    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture).astype(np.float64)
        # 16-bit pictures span 0…65535. Floats have no fixed range: 0…1 where none is larger.
        top = 65535.0 if values.max(initial=0) > 255 or picture.mode.startswith("I;16") else 255.0
        top = 1.0 if picture.mode == "F" and values.max(initial=0) <= 1 else top
        picture = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if channels == 1 else "RGB")


def fit(picture: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resize the shorter side and cut out the centre: uint8 [H, W, C]."""
    from PIL import Image, ImageOps

    array = np.asarray(ImageOps.fit(picture, (size[1], size[0]), method=Image.Resampling.BICUBIC))
    return array[:, :, None].copy() if array.ndim == 2 else array.copy()


# ------------------------------------------------------------------------------------------------------------- CIFAR-10


@register
class Cifar10(Dataset):
    """The training images of CIFAR-10, or a folder of images in its place; Krizhevsky 2009."""

    name = "cifar10"
    count = 50_000
    needs_data_dir = True

    def check(self, data_dir: Path | None) -> None:
        if data_dir is None:
            raise UserError(f"cifar10 needs a data folder (--data_dir): {_CIFAR_HELP}.")
        _find_cifar10(data_dir)

    def load(self, n: int, size: tuple[int, int] | None, channels: int, data_dir: Path | None) -> Tensor:
        assert data_dir is not None  # check made sure
        return _load_cifar10(data_dir, n, size or (32, 32), channels)


def _find_cifar10(folder: Path) -> Path | Sequence[Path]:
    """The tar file, the .bin files, or the folder of images."""
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such data folder; for cifar10, {_CIFAR_HELP}.")
    for place in (folder, folder / "cifar-10-batches-bin"):
        batches = sorted(place.glob("data_batch_*.bin"))
        if batches:
            return batches
    archive = folder / "cifar-10-binary.tar.gz"
    if archive.is_file():
        return archive
    for place in (folder / "cifar10", folder):
        if place.is_dir() and any(p.suffix.lower() in _SUFFIXES for p in place.rglob("*")):
            return place
    if (folder / "cifar-10-batches-py").is_dir() or (folder / "cifar-10-python.tar.gz").is_file():
        raise UserError(f"{folder}: holds the Python version of CIFAR-10, a pickle, which is refused; {_CIFAR_HELP}.")
    raise UserError(f"{folder}: holds no CIFAR-10; {_CIFAR_HELP}.")


def _load_cifar10(folder: Path, n: int, size: tuple[int, int], channels: int) -> Tensor:
    found = _find_cifar10(folder)
    if isinstance(found, Path) and found.is_dir():
        return load_folder(found, n=n, size=size, channels=channels)
    blobs: list[tuple[str, bytes]] = []
    try:
        if isinstance(found, Path):
            with tarfile.open(found) as archive:
                members = [m for m in archive.getmembers() if m.isfile() and Path(m.name).match("data_batch_*.bin")]
                for member in sorted(members, key=lambda m: m.name):
                    if member.size > _CIFAR_BATCH:
                        raise UserError(f"{found}:{member.name}: is no file of CIFAR-10 ({member.size} bytes).")
                    stream = archive.extractfile(member)
                    assert stream is not None  # it is a regular file
                    blobs.append((f"{found}:{member.name}", stream.read()))
        else:
            blobs = [(str(p), p.read_bytes()) for p in found]
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: CIFAR-10 cannot be read ({error}).") from error
    if not blobs:
        raise UserError(f"{found}: holds no data_batch_*.bin.")
    for name, blob in blobs:
        if not blob or len(blob) % _CIFAR_RECORD:
            raise UserError(f"{name}: truncated, or not the binary version of CIFAR-10.")
    records = np.concatenate([np.frombuffer(b, np.uint8).reshape(-1, _CIFAR_RECORD) for _, b in blobs])
    chosen = records[_evenly(len(records), n), 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    if size == (32, 32) and channels == 3:
        return torch.from_numpy(chosen.copy())
    from PIL import Image

    return torch.from_numpy(
        np.stack([fit(_to_8_bit(Image.fromarray(np.ascontiguousarray(image)), channels), size) for image in chosen])
    )


# ------------------------------------------------------------------------------------------------------ bundled samples


def read_sample_sheet() -> Tensor:
    """The shipped samples of the bundled model, uint8 [256, 32, 32, 3]."""
    from PIL import Image

    from .checkpoint import BUNDLED_SAMPLES

    with Image.open(BUNDLED_SAMPLES) as picture:
        sheet = np.asarray(picture.convert("RGB"))
    side = sheet.shape[0] // SHEET_TILES
    tiles = sheet.reshape(SHEET_TILES, side, SHEET_TILES, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    return torch.from_numpy(tiles.copy())


def make_sample_sheet(
    path: str | os.PathLike[str] | None = None,
    *,
    steps: int = 50,
    seed: int = SHEET_SEED,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Draw 256 images of the bundled model and write them as one PNG sheet of 16 × 16 tiles without gaps; None for the
    shipped file.
    """
    from . import sampling
    from .checkpoint import BUNDLED_SAMPLES, load_pipeline

    loaded = load_pipeline(None)
    images = sampling.sample(
        loaded.unet,
        loaded.scheduler,
        SHEET_TILES**2,
        steps=steps,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        progress=True,
        desc="sample sheet",
    )
    sampling.save_grid(images, path or BUNDLED_SAMPLES, columns=SHEET_TILES, padding=0, scale=1)
