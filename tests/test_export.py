"""Exports: equal to the network for any batch, free of pickles, and open where wanda_fast and diffusers are not there."""

from __future__ import annotations

import ast
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from networks import PLAIN, random_unet
from runs import one_thread as one_thread
from runs import script, tree

import wanda_fast
from wanda_fast import checkpoint, export, sampling
from wanda_fast.cli import main
from wanda_fast.errors import UserError

TINY = {
    **PLAIN,
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
# Runs in a process where importing either package fails; prints the largest difference from the saved outputs.
READER = """
import sys

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("wanda_fast", "diffusers"):
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Gone())
import numpy as np
import onnxruntime
import torch

folder, values = sys.argv[1:]
data = np.load(values, allow_pickle=False)
session = onnxruntime.InferenceSession(folder + "/unet.onnx")
compiled = torch._inductor.aoti_load_package(folder + "/unet-aoti.pt2")
program = torch.export.load(folder + "/unet.pt2").module()
worst = {"onnx": 0.0, "aoti": 0.0, "pt2": 0.0}
for n in (1, 4, 70):
    x, t, y = (data[f"{k}{n}"] for k in "xty")
    found = {"onnx": session.run(None, {"sample": x, "timestep": t})[0]}
    for form, net in (("aoti", compiled), ("pt2", program)):
        found[form] = net(torch.from_numpy(x), torch.from_numpy(t)).detach().numpy()
    for form, out in found.items():
        worst[form] = max(worst[form], float(abs(out - y).max()))
assert not {"wanda_fast", "diffusers"} & set(sys.modules)
print(worst)
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "dense"
    with checkpoint.atomic_folder(folder) as temp:
        checkpoint.save_folder(temp, random_unet(TINY), DDPMScheduler())
    return folder


@pytest.fixture(scope="module")
def pruned(dense) -> Path:
    """Free layout, the one that plain diffusers cannot open."""
    made = wanda_fast.prune(dense, pruner="magnitude", split="uniform", layout="free", ratio=0.3, align=4, min_width=4, repair="none",
                            num_samples=0, num_inference_steps=2, calib_steps=8, device="cpu", save_path=dense.parent / "pruned")  # fmt: skip
    assert made.path is not None
    return made.path


@pytest.fixture(scope="module")
def exported(pruned) -> Path:
    out = pruned.parent / "exported"
    words = ["export", "--model", pruned, "--out", out, "--device", "cpu", "--formats", "pt2", "onnx", "aoti", "--quiet", "--repeats", "2"]
    assert main([str(w) for w in words]) == 0
    return out


@pytest.fixture(scope="module")
def values(pruned) -> Path:
    """Inputs and outputs for 1, 4 and 70 images (diffusers treats batches from 64 on differently)."""
    unet = checkpoint.load_pipeline(pruned).unet
    data: dict[str, Any] = {}
    for n in (1, 4, 70):
        x, t = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)), torch.arange(n) * 14
        with torch.no_grad():
            y = unet(x, t, return_dict=False)[0]
        data |= {f"x{n}": x.numpy(), f"t{n}": t.numpy(), f"y{n}": y.numpy()}
    np.savez(pruned.parent / "values.npz", **data)
    return pruned.parent / "values.npz"


def test_all_forms_open_without_wanda_fast_and_diffusers(exported, values, tmp_path):
    done = script(READER, exported, values, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    worst = ast.literal_eval(done.stdout.splitlines()[-1])
    assert set(worst) == {"onnx", "aoti", "pt2"} and max(worst.values()) < 2e-5, worst


def test_folder_and_report(exported, pruned):
    assert tree(exported) == ["config.yaml", "export.json", "scheduler/scheduler_config.json", "unet-aoti.pt2", "unet.onnx", "unet.pt2"]
    report = json.loads((exported / "export.json").read_text())
    assert report["inputs"] == {"sample": "fp32 [N, 3, 8, 8]", "timestep": "int64 [N]"} and report["tolerance"] == 1e-4
    assert set(report["forms"]) == {"pt2", "onnx", "aoti"} and report["largest_batch"] == 4096
    for entry in report["forms"].values():
        assert set(entry["differences"]) == {"1", "2", "5"} and max(entry["differences"].values()) <= 1e-4
        assert entry["seconds"] > 0 and entry["eager_seconds"] > 0 and entry["bytes"] > 10_000
    assert DDPMScheduler.from_pretrained(exported / "scheduler").config["num_train_timesteps"] == 1000


def test_no_pickle_in_the_program(exported):
    assert export.uses_pickle(exported / "unet.pt2") == [] == export.uses_pickle(exported / "unet-aoti.pt2")
    with zipfile.ZipFile(exported / "unet.pt2") as archive:
        assert archive.testzip() is None
        for name in archive.namelist():
            if not Path(name).name.startswith("weight_"):  # raw numbers may begin with any byte
                assert archive.read(name)[:2] not in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"), name


def test_pickles_elsewhere_in_the_file_are_refused(exported, tmp_path):
    with zipfile.ZipFile(tmp_path / "raw.pt2", "w") as archive:
        archive.writestr("x/data/constants/tensor_0.pt", b"\x80\x02}q\x00.")
    with pytest.raises(RuntimeError, match=r"pickles x/data/constants/tensor_0\.pt"):
        export.drop_pickles(tmp_path / "raw.pt2", tmp_path / "out.pt2")


def test_the_network_is_left_as_it_was(dense):
    unet = checkpoint.load_pipeline(dense).unet
    before = [m.__dict__.keys() for m in unet.modules()]
    with export._any_batch(unet):
        x, t = sampling.noise((3, 8, 8), range(3), 0, "image"), torch.tensor([1, 2, 3])
        inside = unet(x, t).sample
    assert [m.__dict__.keys() for m in unet.modules()] == before and torch.equal(unet(x, t).sample, inside)


def test_class_labels_and_half_precision(tmp_path, capsys):
    with checkpoint.atomic_folder(tmp_path / "classes") as temp:
        checkpoint.save_folder(temp, random_unet({**TINY, "num_class_embeds": 3}), DDPMScheduler())
    report = export.export(tmp_path / "classes", save_path=tmp_path / "out", forms=["pt2"], device="cpu", dtype="bf16", repeats=1)
    assert report["inputs"]["class_labels"] == "int64 [N]" and report["inputs"]["sample"].startswith("bf16")
    net = torch.export.load(tmp_path / "out" / "unet.pt2").module()
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    one, two = (net(x, torch.tensor([5, 5]), torch.tensor([k, k])) for k in (0, 1))
    assert one.dtype == torch.bfloat16 and not torch.equal(one, two)


def test_a_form_that_differs_is_not_written(dense, tmp_path, monkeypatch):
    unet = checkpoint.load_pipeline(dense).unet
    monkeypatch.setattr(export, "_program", lambda *a: None)
    monkeypatch.setitem(export._WRITERS, "pt2", lambda *a: a[-1].write_bytes(b"x"))
    monkeypatch.setattr(export, "_open", lambda *a: (lambda x, t: unet(x, t, return_dict=False)[0] * 1.01, "cpu"))
    with pytest.raises(RuntimeError, match=r"unet\.pt2: differs from the network by 0\.01"):
        export.export(dense, save_path=tmp_path / "out", forms=["pt2"], device="cpu")
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"forms": []}, "each form once"),
        ({"forms": ["pt2", "pt2"]}, "each form once"),
        ({"forms": ["tflite"]}, "unknown form"),
        ({"dtype": "bf16"}, "fp32 only"),
        ({"batch_size": 0}, "at least 1"),
        ({"device": "nowhere"}, "cannot be used"),
    ],
    ids=str,
)
def test_bad_arguments(dense, tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        export.export(dense, save_path=tmp_path / "out", **{"device": "cpu", **options})
    assert tree(tmp_path) == []


def test_a_missing_package_is_named(dense, tmp_path, monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else real(name, *a))
    assert main(["export", "--model", str(dense), "--out", str(tmp_path / "out")]) == 2
    assert "onnxscript: pip install 'wanda-fast[export]'" in capsys.readouterr().err
