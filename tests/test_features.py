"""Extractors against the libraries they come from, Fréchet distances against closed forms, and files that are not what they should be."""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import one_thread as one_thread
from torch import Tensor, nn

from wanda_fast import features
from wanda_fast.errors import UserError
from wanda_fast.features import FeatureExtractor, FeatureStats, feature_stats, frechet_distance, gaussian, get_features


def pictures(n: int = 6, size: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def folder_of(images: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images.numpy()):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


class Colours(FeatureExtractor):
    """Mean and deviation per channel: a stand-in for a network."""

    name = "colours"
    dim = 6
    resize = "none"

    def features(self, images: Tensor) -> Tensor:
        x = images.double()
        return torch.cat([x.mean((1, 2)), x.std((1, 2))], 1)


# --------------------------------------------------------------------------------------------------------- the distance


def stats(mean: Tensor, cov: Tensor, **protocol: object) -> FeatureStats:
    return FeatureStats(mean.double(), cov.double(), 100, dict(protocol))


def test_distance_of_analytic_gaussians() -> None:
    """Commuting covariances: |μ|² + Σ (√a - √b)²."""
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.0]), torch.tensor([4.0, 4.0, 1.0, 2.0])
    mean = torch.tensor([3.0, 0.0, -1.0, 0.5])
    expected = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    turn = lambda d: q @ torch.diag(d.double()) @ q.T  # noqa: E731
    assert frechet_distance(stats(mean, turn(a)), stats(torch.zeros(4), turn(b))) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(stats(mean, turn(a)), stats(mean, turn(a))) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("n", "dim"), [(400, 20), (15, 20)], ids=["regular", "fewer images than features"])
def test_distance_equals_scipy(n: int, dim: int) -> None:
    from scipy import linalg

    g = torch.Generator().manual_seed(n)
    mix = torch.randn(dim, dim, generator=g)
    a, b = (gaussian(torch.randn(n, dim, generator=g) @ mix + i) for i in range(2))
    eps = 0 if n > dim else 1e-9  # scipy's root of a singular product needs help, ours does not
    product = (a.cov + eps * torch.eye(dim)) @ (b.cov + eps * torch.eye(dim))
    root = np.trace(linalg.sqrtm(product.numpy()).real)
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * float(root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6 if n > dim else 1e-3)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert frechet_distance(a, a) < 1e-6 * float(a.cov.trace())


def test_gaussian_is_numpys() -> None:
    x = torch.randn(50, 7)
    found = gaussian(x)
    assert np.allclose(found.mean, x.double().mean(0)) and np.allclose(found.cov, np.cov(x.double().numpy(), rowvar=False))
    with pytest.raises(UserError, match="at least two"):
        gaussian(x[:1])
    with pytest.raises(UserError, match="NaN"):
        gaussian(torch.full((3, 2), math.nan))


# ------------------------------------------------------------------------------------------------------------ extractors


def test_efficientnet_follows_the_protocol() -> None:
    """Bicubic with antialias to 224, (x - 127) / 128, the mean of `extract_features`, computed step by step beside it."""
    extractor = get_features("efficientnet-lite0")
    images = pictures(2, 32)
    x = F.interpolate(images.permute(0, 3, 1, 2).float(), (224, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        expected = extractor.network.extract_features((x - 127) / 128).mean((2, 3))
    found = extractor(images)
    assert found.shape == (2, 1280) and torch.allclose(found, expected.double(), atol=1e-5)
    maps = extractor.layers(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 112, 112), (24, 56, 56), (40, 28, 28), (112, 14, 14), (1280, 7, 7)]
    assert torch.allclose(maps[-1].mean((2, 3)).double(), expected.double(), atol=1e-5)
    assert extractor.protocol()["weights"].startswith("57934424")
    same, count = features.feature_distance(extractor, images, images)
    other, _ = features.feature_distance(extractor, images, pictures(2, 32, seed=1))
    assert same == 0 and count == 5 and 0.01 < other < 4


class FakeInception(nn.Module):
    """What clean-fid expects of its file: `layers` gives 2048 features of 299 × 299 images."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2048))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture
def inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDA_FAST_CACHE", str(tmp_path / "cache"))
    file = features.inception_file()
    file.parent.mkdir()
    torch.manual_seed(0)
    torch.jit.save(torch.jit.script(FakeInception().eval()), str(file))
    return file


def test_inception_equals_clean_fid(inception: Path, tmp_path: Path) -> None:
    """Same file, same folder: the features and the distance of clean-fid's own functions."""
    from cleanfid.fid import frechet_distance as theirs
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    a, b = (folder_of(pictures(5, 20, seed), tmp_path / str(seed)) for seed in range(2))
    network = InceptionV3W(str(inception.parent), download=False)
    expected = [
        get_folder_features(str(f), network, num_workers=0, device=torch.device("cpu"), verbose=False) for f in (a, b)
    ]
    extractor = get_features("inception")
    found = [extractor(torch.cat(list(features.image_batches(f)))) for f in (a, b)]
    for x, y in zip(found, expected, strict=True):
        assert np.allclose(x.numpy(), y, rtol=1e-4, atol=1e-4)
    # three of the 2048 features: clean-fid's root of a singular product is not reliable
    parts = [y[:, :3].astype("float64") for y in expected]
    value = frechet_distance(*(gaussian(x[:, :3]) for x in found))
    try:
        reference = theirs(parts[0].mean(0), np.cov(parts[0], rowvar=False), parts[1].mean(0), np.cov(parts[1], rowvar=False))
    except (TypeError, ValueError):  # newer scipy: sqrtm without `disp` returns one value
        reference = None
    if reference is not None:
        assert value == pytest.approx(reference, rel=1e-3, abs=1e-3)


def test_inception_without_its_file_says_where_it_must_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cleanfid import downloads_helper

    monkeypatch.setenv("WANDA_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(downloads_helper, "inception_url", "http://127.0.0.1:9/inception.pt")
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt") as error:
        get_features("inception")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    features.inception_file().write_bytes(b"no program")
    with pytest.raises(UserError, match="truncated, or not the Inception"):
        get_features("inception")


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x / 255, 2)


def test_torchscript_file(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(Pooled()), str(tmp_path / "pooled.pt"))
    extractor = get_features(tmp_path / "pooled.pt")
    images = pictures(3, 8)
    assert torch.allclose(extractor(images), images.double().mean((1, 2)) / 255, atol=1e-6)
    assert extractor.protocol()["features"] == "torchscript pooled.pt" and extractor.protocol()["dim"] == 3
    (tmp_path / "text.pt").write_text("no program")
    with pytest.raises(UserError, match="not a TorchScript file"):
        get_features(tmp_path / "text.pt")
    with pytest.raises(UserError, match="unknown features 'nothing'; known: efficientnet-lite0, inception"):
        get_features("nothing")
    with pytest.raises(UserError, match="does not take images"):
        extractor(pictures(2, 1))


def test_an_extractor_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "FEATURES", dict(features.FEATURES))
    features.register(Colours)
    assert get_features("colours")(pictures(2)).shape == (2, 6)
    with pytest.raises(ValueError, match="name of its own"):
        features.register(Colours)


# -------------------------------------------------------------------------------------------------------------- sources


def test_folder_tensor_and_batches_agree(tmp_path: Path) -> None:
    images = pictures(7)
    folder = folder_of(images, tmp_path / "images")
    whole = feature_stats(Colours(), images)
    for other in (feature_stats(Colours(), folder, batch_size=3), feature_stats(Colours(), images, batch_size=2)):
        assert torch.allclose(whole.mean, other.mean) and torch.allclose(whole.cov, other.cov) and other.n == 7
    assert feature_stats(Colours(), folder).protocol["source"] == "images"
    assert feature_stats(Colours(), folder, n=3).n == 3


def test_mixed_sizes_grey_and_transparent_images(tmp_path: Path) -> None:
    folder = folder_of(pictures(3, 10), tmp_path / "mixed")
    for i, size in enumerate((9, 10, 31)):
        Image.new("L", (size, size + i), 77).save(folder / f"grey{i}.png")
    found = feature_stats(Colours(), folder, batch_size=2)
    assert found.n == 6 and len(found.protocol["sizes"]) == 4


def test_cifar10_binaries(tmp_path: Path) -> None:
    records = np.random.default_rng(0).integers(0, 256, (5, 3073), dtype=np.uint8)
    (tmp_path / "data_batch_1.bin").write_bytes(records.tobytes())
    found = feature_stats(Colours(), "cifar10", data_dir=tmp_path)
    images = torch.from_numpy(records[:, 1:].reshape(5, 3, 32, 32).transpose(0, 2, 3, 1).copy())
    assert torch.allclose(found.mean, feature_stats(Colours(), images).mean)


def test_what_is_no_set_of_images(tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    Image.new("RGB", (40, 40)).save(grid)
    with pytest.raises(UserError, match="wanda-fast sample"):
        feature_stats(Colours(), grid)
    alone = folder_of(pictures(1), tmp_path / "alone")
    with pytest.raises(UserError, match="wanda-fast sample"):
        feature_stats(Colours(), alone)
    (alone / "bad.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"bad\.png: unreadable"):
        feature_stats(Colours(), alone)
    with pytest.raises(UserError, match="no such image folder"):
        feature_stats(Colours(), tmp_path / "nowhere")


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hungry(Colours):
        seen: list[int] = []  # noqa: RUF012

        def features(self, images: Tensor) -> Tensor:
            self.seen.append(len(images))
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().features(images)

    found = feature_stats(Hungry(), pictures(7), batch_size=7)
    assert torch.allclose(found.mean, feature_stats(Colours(), pictures(7)).mean) and max(Hungry.seen) == 7


# ----------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "stats.npz"
    feature_stats(Colours(), pictures(7)).save(path)
    return path


def test_save_and_load(file: Path) -> None:
    made, read = feature_stats(Colours(), pictures(7)), FeatureStats.load(file)
    assert torch.equal(read.mean, made.mean) and torch.equal(read.cov, made.cov) and read.n == 7
    assert {k: read.protocol[k] for k in made.protocol} == made.protocol and read.protocol["count"] == 7
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_protocols_are_not_mixed(file: Path) -> None:
    mine = FeatureStats.load(file)
    other = FeatureStats.load(file)
    other.protocol = {**other.protocol, "features": "inception", "resize": "299"}
    with pytest.raises(UserError, match=r"colours \(6 features, none\).*inception \(6 features, 299\)"):
        frechet_distance(mine, other)
    other.protocol = {**mine.protocol, "versions": {"torch": "0"}}  # another version is no other protocol
    assert frechet_distance(mine, other) == pytest.approx(0, abs=1e-9)


def test_foreign_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "cleanfid.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(UserError, match="without a protocol"):
        FeatureStats.load(tmp_path / "cleanfid.npz")
    np.savez(tmp_path / "other.npz", images=np.zeros(4))
    with pytest.raises(UserError, match=r"no feature statistics \(it holds images\)"):
        FeatureStats.load(tmp_path / "other.npz")
    np.savez(tmp_path / "pickle.npz", mean=np.array([{}], dtype=object), cov=np.eye(1), protocol=np.zeros(1))
    with pytest.raises(UserError, match="pickle, which is refused"):
        FeatureStats.load(tmp_path / "pickle.npz")
    text = np.frombuffer(json.dumps({"format": features.FORMAT, "count": 5}).encode(), np.uint8)
    for name, mean, cov in (("shape", np.zeros(3), np.eye(2)), ("nan", np.zeros(2), np.full((2, 2), np.nan)),
                            ("dtype", np.zeros(2, "float32"), np.eye(2))):  # fmt: skip
        np.savez(tmp_path / f"{name}.npz", mean=mean, cov=cov, protocol=text)
        with pytest.raises(UserError, match=r"damaged|NaN"):
            FeatureStats.load(tmp_path / f"{name}.npz")
    with pytest.raises(UserError, match="no such file"):
        FeatureStats.load(tmp_path / "nothing.npz")
    with pytest.raises(UserError, match="is a folder"):
        FeatureStats.load(tmp_path)


def test_a_header_cannot_ask_for_memory(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as archive:
        archive.writestr("mean.npy", header.getvalue())
    with pytest.raises(UserError, match="its header asks for"):
        FeatureStats.load(tmp_path / "bomb.npz")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_files_end_in_one_line(file: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Truncated anywhere, or with flipped bits: a UserError of one line, or (where the zip's checksums hold) the same values."""
    blob = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        blob = blob[: data.draw(st.integers(0, len(blob) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged = tmp_path_factory.getbasetemp() / "damaged.npz"
    damaged.write_bytes(bytes(blob))
    try:
        found = FeatureStats.load(damaged)
    except UserError as error:
        assert "\n" not in str(error) and "damaged.npz" in str(error)
    else:
        assert torch.equal(found.mean, FeatureStats.load(file).mean)


def test_lite0_weights_are_read_by_their_place_in_the_file() -> None:
    """The blocks behind the file's pickle, in the order of the table, each as TensorFlow lays weights out."""
    from wanda_fast import lite0_weights

    efficientnet = pytest.importorskip("efficientnet_lite_pytorch")
    like = efficientnet.EfficientNet.from_name("efficientnet-lite0").state_dict()
    blocks: dict[int, bytes] = {}
    for block, value in zip(lite0_weights._BLOCK, like.values(), strict=True):
        stored = value
        if value.dim() == 4:
            depthwise = value.shape[1] == 1 and value.shape[2] > 1
            stored = value.permute(2, 3, 0, 1) if depthwise else value.permute(2, 3, 1, 0)
        elif value.dim() == 2:
            stored = value.t()
        blocks[block] = value.numel().to_bytes(8, "little") + stored.contiguous().numpy().tobytes()
    blob = b"whatever stands before" + b"".join(blocks[i] for i in range(len(blocks)))
    read = lite0_weights.read(blob, like)
    assert list(read) == list(like) and all(torch.equal(read[name], like[name]) for name in like)
    with pytest.raises(ValueError, match="has not the size"):
        lite0_weights.read(blob[:-1], like)
