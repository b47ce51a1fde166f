"""More than 2,000 truncated, bit-flipped and rewritten files: each is read, or refused by a UserError. No traceback, no hang, no
memory for what a file merely declares, and nothing is written.
"""

from __future__ import annotations

import io
import json
import random
import resource
import shutil
import struct
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import random_unet
from PIL import Image
from runs import one_thread as one_thread
from safetensors.torch import save_file

from wanda_fast import checkpoint, compact, data
from wanda_fast.calibrate import calibrate
from wanda_fast.checkpoint import WEIGHTS
from wanda_fast.errors import UserError
from wanda_fast.features import FeatureStats
from wanda_fast.inputs import Prompts
from wanda_fast.plan import PruningPlan
from wanda_fast.pruning import prune
from wanda_fast.repair import LayerRepair, RepairReport
from wanda_fast.resume import RepairState, Unfinished
from wanda_fast.slots import find_slots
from wanda_fast.stats import ActivationStats

TINY: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 2,
    "add_attention": False,
}
SECONDS = 20  # for one file, on a busy machine
MEMORY = 600 << 20  # growth of the process over all files of a kind
# Files of each kind: all are read, however the tests are spread over processes.
CASES = {
    "statistics": 420, "plans": 400, "model json": 270, "free config": 90, "weights": 190, "shards": 80, "features": 250,
    "prompts": 150, "images": 96, "cifar10": 80, "unfinished": 480,
}  # fmt: skip

# What is put in the place of a JSON value: wrong types, huge and odd numbers, paths.
ODD = [
    None, True, -1, 0, 10**9, 10**18, 10**400, 1.5, float("inf"), float("nan"), "", "x" * 5000, "../../../etc/passwd", "/tmp/evil",
    "\x00", [], {}, [[[[]]]], [None], [-1], [10**12] * 3, {"a": 1}, "UNet2DModel", "EulerDiscreteScheduler",
]  # fmt: skip


def damaged(blob: bytes, rng: random.Random) -> bytes:
    """Truncated, or with a few bits flipped, or with a run of bytes doubled, cut out or zeroed."""
    out = bytearray(blob)
    kind = rng.randrange(6)
    at = rng.randrange(len(out))
    if kind == 0:
        return bytes(out[:at])
    if kind in (1, 2, 3):
        for _ in range(rng.choice((1, 1, 2, 8))):
            # Half of the flips near the beginning, where headers are.
            place = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 400))
            out[place] ^= 1 << rng.randrange(8)
        return bytes(out)
    end = min(len(out), at + rng.randrange(1, 40))
    if kind == 4:
        return bytes(out[:at] + out[at:end] + out[at:end] + out[end:]) if rng.random() < 0.5 else bytes(out[:at] + out[end:])
    out[at:end] = bytes(end - at)
    return bytes(out)


def rewritten(value: Any, rng: random.Random) -> Any:
    """The JSON value with one of its parts replaced, removed or renamed."""
    paths: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, part in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            paths.append((node, key))
            walk(part)

    value = json.loads(json.dumps(value))
    walk(value)
    node, key = rng.choice(paths)
    action = rng.randrange(4)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[rng.choice(["../x", "/tmp/x", "", "x" * 300, "pruning"])] = node.pop(key)
    else:
        node[key] = rng.choice(ODD)
    return value


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def json_cases(file: Path, count: int, rng: random.Random) -> Iterator[bytes]:
    blob = file.read_bytes()
    value = json.loads(blob)
    for i in range(count):
        yield as_json(rewritten(value, rng)) if i % 3 else damaged(blob, rng)
    yield b"[" * 100_000
    yield b'{"a":' * 50_000
    yield b'{"a": ' + b"9" * 10_000 + b"}"
    yield b"\xff\xfe" + blob
    yield b""


def safetensors_cases(file: Path, count: int, rng: random.Random) -> Iterator[bytes]:
    blob = file.read_bytes()
    size = struct.unpack("<Q", blob[:8])[0]
    header, body = json.loads(blob[8 : 8 + size]), blob[8 + size :]
    for i in range(count):
        if i % 2:
            text = as_json(rewritten(header, rng))
            yield struct.pack("<Q", len(text)) + text + body
        else:
            yield damaged(blob, rng)
    for declared in (0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1):
        yield struct.pack("<Q", declared) + blob[8:]
    for shape in ([2**40], [2**32, 2**32], [0], [-1], [2**62, 4]):
        name = next(n for n in header if n != "__metadata__")
        text = as_json({**header, name: {**header[name], "shape": shape}})
        yield struct.pack("<Q", len(text)) + text + body


def attack(file: Path, cases: Iterator[bytes], read: Callable[[], Any], at_least: int = 1) -> None:
    """Write every case into the file and read it."""
    root = file
    while root.parent.name != "fuzz" and root.parent != root:
        root = root.parent
    before = {p: p.stat().st_size for p in root.parent.rglob("*") if p != file}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good = file.read_bytes()
    refused = 0
    try:
        for number, case in enumerate(cases, start=1):
            file.write_bytes(case)
            start = time.monotonic()
            try:
                read()
            except UserError:
                refused += 1
            except BaseException as error:
                shown = case if len(case) < 2000 else case[:2000] + b"..."
                raise AssertionError(f"case {number} of {file.name}: {type(error).__name__}: {error}\n{shown!r}") from error
            assert time.monotonic() - start < SECONDS, f"case {number} of {file.name} took too long"
    finally:
        file.write_bytes(good)
    read()  # the file itself is fine
    assert number >= at_least
    assert refused > number // 4, f"{refused} of {number} were refused"
    assert {p: p.stat().st_size for p in root.parent.rglob("*") if p != file} == before
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10
    assert grown < MEMORY, f"{file.name}: {grown >> 20} MiB more"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A dense folder, a pruned one in the free layout, statistics of every kind."""
    folder = tmp_path_factory.mktemp("place") / "fuzz"
    folder.mkdir()
    unet = random_unet(TINY)
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=100)).save_pretrained(folder / "dense")
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    (folder / "images").mkdir()
    for i, mode in enumerate(("png", "jpg", "gif", "tiff", "webp", "bmp")):
        Image.fromarray(images[i % 4].numpy()).resize((20 + i, 17)).save(folder / "images" / f"{i}.{mode}")
    how = {"pruner": "magnitude", "ratio": 0.5, "align": 2, "min_width": 2, "repair": "none", "split": "uniform", "num_samples": 0,
           "batch_size": 4, "device": "cpu", "dataset": str(folder / "images")}  # fmt: skip
    prune(str(folder / "dense"), save_path=folder / "stock", **how)
    prune(str(folder / "dense"), save_path=folder / "free", layout="free", **how)
    calibrate(unet, DDPMScheduler(num_train_timesteps=100), images, n=6, batch_size=6, means=True).save(folder / "stats.safetensors")
    x = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    FeatureStats(x.mean(0), torch.cov(x.T), 20, {"features": "f", "resize": "r"}).save(folder / "features.npz")
    save_file({"prompt_embeds": torch.randn(3, 4, 6), "pooled_prompt_embeds": torch.randn(3, 5)}, folder / "prompts.safetensors")
    (folder / "cifar").mkdir()
    records = np.random.default_rng(0).integers(0, 256, (3, 3073), dtype=np.uint8).tobytes()
    with tarfile.open(folder / "cifar" / "cifar-10-binary.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        info.size = len(records)
        archive.addfile(info, io.BytesIO(records))
    return folder


@pytest.fixture
def rng(request) -> random.Random:
    return random.Random(request.node.name)


def test_activation_statistics(place, rng):
    file = place / "stats.safetensors"

    def read() -> None:
        stats = ActivationStats.load(file)
        for layer in stats.tables:  # what was let through can be used
            assert torch.isfinite(stats.act_norm(layer)).all()

    attack(file, safetensors_cases(file, CASES["statistics"], rng), read, CASES["statistics"])


def test_plans(place, rng):
    unet = checkpoint.load_pipeline(place / "dense").unet
    for layout in ("stock", "free"):
        file = place / layout / "pruning.json"
        text = json.loads(file.read_text())
        alone = file.with_name("plan.json")
        alone.write_text(json.dumps(text["plan"]))

        def read(plan_file: Path = alone) -> None:
            plan = PruningPlan.load(plan_file)
            twin = compact.prepared_copy(unet, plan.identity_shortcuts)
            compact.check_plan(plan, unet, find_slots(twin))
            compact.compact(unet, plan)

        attack(alone, json_cases(alone, CASES["plans"] // 2, rng), read, CASES["plans"] // 2)
        alone.unlink()


@pytest.mark.parametrize("name", ["unet/config.json", "model_index.json", "scheduler/scheduler_config.json"])
def test_json_of_a_model(place, rng, name):
    file = place / "dense" / name
    count = CASES["model json"] // 3
    attack(file, json_cases(file, count, rng), lambda: checkpoint.load_pipeline(place / "dense"), count)


def test_config_of_the_free_layout(place, rng):
    file = place / "free" / "config.json"
    count = CASES["free config"]
    attack(file, json_cases(file, count, rng), lambda: checkpoint.load_pipeline(place / "free"), count)


def test_weights(place, rng):
    file = place / "dense" / "unet" / WEIGHTS
    count = CASES["weights"]
    attack(file, safetensors_cases(file, count, rng), lambda: checkpoint.load_pipeline(place / "dense"), count)


def test_index_of_shards(place, rng):
    sharded = Path(shutil.copytree(place / "dense", place / "sharded"))
    whole = sharded / "unet" / WEIGHTS
    whole.rename(whole.with_name("part-1.safetensors"))
    index = whole.with_name(f"{WEIGHTS}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": "part-1.safetensors", "conv_in.bias": "part-1.safetensors"}}))
    attack(index, json_cases(index, CASES["shards"], rng), lambda: checkpoint.load_pipeline(sharded), CASES["shards"])
    for outside in ("../config.json", "../../stock/" + WEIGHTS, "/etc/hostname"):
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": outside}}))
        with pytest.raises(UserError, match="not there"):
            checkpoint.load_pipeline(sharded)
    shutil.rmtree(sharded)


def test_feature_statistics(place, rng):
    file = place / "features.npz"
    blob = file.read_bytes()
    count = CASES["features"]
    attack(file, (damaged(blob, rng) for _ in range(count)), lambda: FeatureStats.load(file), count)


def test_npz_that_declares_much(place):
    """Headers of arrays and archives may say anything about sizes."""
    file = place / "features.npz"
    good = file.read_bytes()
    arrays = dict(np.load(io.BytesIO(good), allow_pickle=False))

    def cases() -> Iterator[bytes]:
        import zipfile

        for shape in ("(1000000000000,)", "(-1,)", "(1000000, 1000000)", "(5,", "()"):
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w") as archive:
                for name in arrays:
                    head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
                    archive.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + b"\0" * 64)
            yield stream.getvalue()
        stream = io.BytesIO()
        np.savez(stream, mean=np.array([{}], dtype=object), cov=np.zeros((1, 1)), protocol=np.zeros(3))  # a pickle
        yield stream.getvalue()
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:  # 300 MB of zeros in a small file
            for name in arrays:
                with archive.open(f"{name}.npy", "w") as member:
                    for _ in range(100):
                        member.write(bytes(1 << 20))
        yield stream.getvalue()
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("../../outside.npy", b"x")
        yield stream.getvalue()

    attack(file, cases(), lambda: FeatureStats.load(file))


def test_prompts(place, rng):
    file = place / "prompts.safetensors"
    attack(file, safetensors_cases(file, CASES["prompts"], rng), lambda: Prompts.load(file), CASES["prompts"])


def test_unfinished_run(place, rng):
    """What `--resume` finds. A bit that flipped in the numbers is found too: it would go into the result."""
    target, key = place / "resumed", {"ratio": 0.5, "seed": 0, "model": {"class": "UNet2DModel", "tensors": 70}, "plan": None}
    unfinished = Unfinished(target, key)
    stats = ActivationStats.load(place / "stats.safetensors")
    unfinished.save_shard(0, 6, stats)
    plan = PruningPlan.load(place / "stock" / "pruning.json")
    unfinished.save_plan(plan, {"trials_report": [{"ssim": 0.9, "taken": True}], "split_report": {"level 0": [0.0, 0.1]}})
    unet = random_unet(TINY)
    modules = dict(unet.named_modules())
    layers = [LayerRepair("conv_in", "refitted", 0.5, 0.1, 0.5, 0.1, 100, 27, 1e-4), LayerRepair("conv_out", "kept")]
    RepairState(unfinished.repair()).save(1, modules, RepairReport("lstsq", layers))
    weight = unet.conv_in.weight.clone()

    def settings() -> None:
        assert Unfinished(target, key).found

    def plans() -> None:
        found, findings = unfinished.load_plan()
        assert found.to_dict() == plan.to_dict() and findings["trials_report"][0]["ssim"] == 0.9

    def shards() -> None:
        (found,) = (unfinished.load_shard(*cut) for cut in Unfinished.shards(0, 6, 6))
        assert found is not None and all(torch.equal(found.tables[n], t) for n, t in stats.tables.items())

    def repairs() -> None:
        report = RepairReport("lstsq")
        assert RepairState(unfinished.repair()).restore(modules, report) == 1
        assert report.layers == layers and torch.equal(unet.conv_in.weight, weight)

    (shard,) = unfinished.folder.glob("calibration-*")
    count = CASES["unfinished"] // 4
    attack(unfinished.folder / "settings.json", json_cases(unfinished.folder / "settings.json", count, rng), settings, count)
    attack(unfinished.plan, json_cases(unfinished.plan, count, rng), plans, count)
    attack(shard, safetensors_cases(shard, count, rng), shards, count)
    attack(unfinished.repair(), safetensors_cases(unfinished.repair(), count, rng), repairs, count)
    unfinished.remove()


def test_images(place, rng):
    for file in sorted((place / "images").iterdir()):
        blob = file.read_bytes()

        def read(one: Path = file) -> None:
            data.load_folder(one.parent, n=10, size=(8, 8), channels=3)

        # Decoders show what they could decode, so fewer are refused: count them with the others.
        cases = [*(damaged(blob, rng) for _ in range(12)), b"", b"not an image", blob[:10], blob[:4] * 5]
        attack(file, iter(cases), read, CASES["images"] // 6)


def test_an_image_that_declares_many_pixels(place):
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    for width, height in ((13_000, 13_000), (2**31 - 1, 2**31 - 1), (1, 2**30)):
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        blob = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
        folder = place / "huge"
        folder.mkdir()
        (folder / "a.png").write_bytes(blob)
        with pytest.raises(UserError, match="unreadable images"):
            data.load_folder(folder, n=1, size=(8, 8), channels=3)
        shutil.rmtree(folder)


def test_cifar10(place, rng):
    file = place / "cifar" / "cifar-10-binary.tar.gz"
    blob = file.read_bytes()
    unet = random_unet(TINY)
    count = CASES["cifar10"]
    cases = (damaged(blob, rng) for _ in range(count))
    attack(file, cases, lambda: data.load_images("cifar10", n=2, unet=unet, data_dir=file.parent), count)


def test_there_are_2000():
    assert sum(CASES.values()) >= 2000
