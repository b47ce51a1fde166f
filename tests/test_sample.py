"""`wanda-fast sample`: exactly N images, the same whatever the batch, that a stopped run goes on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from networks import PLAIN, random_unet
from PIL import Image
from runs import ROOT, tree
from runs import one_thread as one_thread

from wanda_fast import checkpoint, sample_folder, sampling
from wanda_fast.cli import main

TINY = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "tiny"
    with checkpoint.atomic_folder(folder) as temp:
        checkpoint.save_folder(temp, random_unet(TINY), DDPMScheduler())
    return folder


def sample(model: Path, *words: object) -> int:
    return main(["sample", "--model", str(model), "--device", "cpu", "--num_inference_steps", "3", *map(str, words)])


def pixels(folder: Path) -> dict[str, bytes]:
    return {p.name: Image.open(p).tobytes() for p in sorted(folder.glob("*.png"))}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_exactly_n_whatever_the_batch_size_bit_for_bit(model, tmp_path, sampler, capsys):
    for batch in (1, 3, 32):
        assert sample(model, "--sampler", sampler, "-n", 11, "--batch_size", batch, "--out", tmp_path / str(batch), "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["images"], report["drawn"], report["kept"]) == (11, 11, 0) and report["images_per_second"] > 0
    one = pixels(tmp_path / "1")
    assert list(one) == [f"{i:06d}.png" for i in range(11)] and len(set(one.values())) == 11
    assert one == pixels(tmp_path / "3") == pixels(tmp_path / "32")
    assert tree(tmp_path / "1") == [*one, "config.yaml", "sample.json"]
    loaded = checkpoint.load_pipeline(model)
    expected = sampling.sample(loaded.unet, loaded.scheduler, 11, steps=3, kind=sampler)
    assert list(one.values()) == [image.numpy().tobytes() for image in expected]


def test_a_stopped_run_goes_on_with_what_is_missing(model, tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert sample(model, "-n", 12, "--out", whole) == 0
    assert sample(model, "-n", 9, "--out", part) == 0
    (part / "000004.png").unlink()
    (part / "000007.png").write_bytes((part / "000007.png").read_bytes()[:-5])  # as after a power cut
    (part / ".000010.png.1.partial").write_bytes(b"half")
    times = {p.name: p.stat().st_mtime_ns for p in part.glob("*.png")}
    capsys.readouterr()
    assert sample(model, "-n", 12, "--out", part, "--batch_size", 2, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["drawn"], report["kept"]) == (5, 7)
    assert pixels(part) == pixels(whole) and tree(part) == tree(whole)
    kept = set(times) - {"000007.png"}
    assert all((part / name).stat().st_mtime_ns == times[name] for name in kept)
    assert sample(model, "-n", 12, "--out", part) == 0
    assert "all 12 images were there" in capsys.readouterr().out


def test_config_yaml_repeats_the_run(model, tmp_path):
    assert sample(model, "-n", 2, "--seed", 4, "--sampler", "ddpm", "--out", tmp_path / "a") == 0
    assert main(["sample", "--config", str(tmp_path / "a" / "config.yaml"), "--save_path", str(tmp_path / "b")]) == 0
    assert pixels(tmp_path / "a") == pixels(tmp_path / "b") and (tmp_path / "a" / "config.yaml").read_text().count("\n") >= 6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--seed", "1"], "another seed: 0 there, 1 asked"),
        (["--sampler", "ddpm"], "another sampler"),
        (["--num_inference_steps", "4"], "another steps: 3 there, 4 asked"),
        (["--dtype", "bf16"], "another dtype"),
        (["-n", "2"], "holds 3 images already, more than the 2"),
        (["--model", "bundled-is-none"], "no such folder"),
        (["--num_inference_steps", "1001"], "must be 1 to 1000"),
        (["--grid", "x.jpg", "--save_path", "y"], "not allowed with"),
        (["--overwrite"], "only ever added to"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_other_settings_are_refused(model, tmp_path, capsys, words, says):
    folder = tmp_path / "out"
    assert sample(model, "-n", 3, "--out", folder) == 0
    before = tree(folder)
    capsys.readouterr()
    place = [] if "--grid" in words else ["--out", folder]
    assert sample(model, "-n", 3, *place, *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("wanda-fast: error: ") and says in error and tree(folder) == before


def test_another_model_and_foreign_folders_are_refused(model, tmp_path, capsys):
    assert sample(model, "-n", 1, "--out", tmp_path / "out") == 0
    with checkpoint.atomic_folder(tmp_path / "other") as temp:
        checkpoint.save_folder(temp, random_unet(TINY, seed=5), DDPMScheduler())
    assert sample(tmp_path / "other", "-n", 1, "--out", tmp_path / "out") == 2
    assert "another model" in capsys.readouterr().err
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("x")
    assert sample(model, "--out", tmp_path / "foreign") == 2
    assert "something other than samples" in capsys.readouterr().err and tree(tmp_path / "foreign") == ["thesis.txt"]
    for text in ("[]", "{", "\xff", "[" * 100_000):
        (tmp_path / "out" / "sample.json").write_text(text, encoding="latin-1")
        assert sample(model, "-n", 1, "--out", tmp_path / "out") == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_grid_bfloat16_one_channel(tmp_path, capsys):
    with checkpoint.atomic_folder(tmp_path / "grey") as temp:
        checkpoint.save_folder(temp, random_unet({**TINY, "in_channels": 1, "out_channels": 1}), DDPMScheduler())
    grid = tmp_path / "new" / "grid.png"
    assert sample(tmp_path / "grey", "-n", 4, "--dtype", "bf16", "--grid", grid) == 0
    assert "images per second" in capsys.readouterr().out
    assert Image.open(grid).mode == "L" and tree(grid.parent) == ["grid.png"]
    assert sample(tmp_path / "grey", "-n", 4, "--grid", grid) == 2
    assert sample(tmp_path / "grey", "-n", 4, "--grid", grid, "--overwrite") == 0
    assert sample(tmp_path / "grey", "-n", 2, "--out", tmp_path / "folder") == 0
    assert Image.open(tmp_path / "folder" / "000001.png").mode == "L"


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(model, tmp_path, capsys, monkeypatch):
    real = sample_folder._write

    def full(file: Path, data: bytes) -> None:
        if file.name == "000005.png":
            raise OSError(28, "No space left on device")
        real(file, data)

    monkeypatch.setattr(sample_folder, "_write", full)
    assert sample(model, "-n", 9, "--batch_size", 8, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in error and "of 9 images are complete" in error
    assert "000005.png" not in tree(tmp_path / "out") and not list((tmp_path / "out").glob(".*"))
    monkeypatch.undo()
    assert sample(model, "-n", 9, "--out", tmp_path / "out") == 0
    assert len(pixels(tmp_path / "out")) == 9


def test_ctrl_c_leaves_complete_images(model, tmp_path):
    """SIGINT in the middle: every PNG opens, nothing unfinished is there, and the folder can be completed."""
    words = ["sample", "--model", model, "--device", "cpu", "--num_inference_steps", "40", "-n", "2000", "--batch_size", "8",
             "--out", tmp_path / "out"]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # The shell of a test run may have set SIGINT to be ignored, which children inherit.
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen([sys.executable, "-m", "wanda_fast", *map(str, words)], stderr=subprocess.PIPE, text=True,
                               cwd=ROOT, env=environment, preexec_fn=restore)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "000010.png").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors and "Traceback" not in errors
    found = pixels(tmp_path / "out")
    assert 11 <= len(found) < 2000 and not list((tmp_path / "out").glob(".*"))


def test_too_little_memory_halves_the_batch(monkeypatch):
    """The GPU's error, raised by the network itself for batches over two."""
    unet, scheduler, notes = random_unet(TINY), DDPMScheduler(), []
    expected = sampling.sample(unet, scheduler, 5, steps=2)
    real = sampling.predict

    def small(net, x, *args, **kwargs):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(net, x, *args, **kwargs)

    monkeypatch.setattr(sampling, "place", lambda unet, device, dtype: (_Cpu(), torch.float32))
    monkeypatch.setattr(sampling, "predict_evenly", small)
    found = list(sampling.draw(unet, scheduler, range(5), steps=2, batch_size=8, note=notes.append))
    assert [list(i) for i, _ in found] == [[0, 1], [2, 3], [4]] and [n.split()[-1] for n in notes] == ["4", "2"]
    assert int((torch.cat([x for _, x in found]).int() - expected.int()).abs().max()) <= 1


class _Cpu(str):
    """Stands for a GPU: not called "cpu", but tensors can be put there."""

    type = "cuda"

    def __new__(cls):
        return super().__new__(cls, "cpu")


def test_filled_up_batches_give_the_same_images():
    unet, scheduler = random_unet(TINY), DDPMScheduler()
    parts = list(sampling.draw(unet, scheduler, [3, 9, 4], steps=2, batch_size=2, even=True))
    expected = sampling.sample(unet, scheduler, 10, steps=2)
    assert torch.equal(torch.cat([x for _, x in parts]), expected[[3, 9, 4]])
