"""Plain diffusers opens the result in a process where this package cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from conditioned import CONDITIONED, random_network
from diffusers import DDPMPipeline, DDPMScheduler
from networks import CIFAR32, random_unet
from runs import FAST, script
from runs import one_thread as one_thread

import wanda_fast
from wanda_fast import checkpoint, pruned_unet
from wanda_fast.compact import compact, cost_model
from wanda_fast.plan import Target, build_plan, free_problem, uniform_widths
from wanda_fast.slots import find_slots

# -I leaves out PYTHONPATH and the current folder; None in sys.modules makes the import of an installed package fail too.
STRANGER = """
import sys
sys.modules["wanda_fast"] = None
import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
folder = sys.argv[1]
unet = UNet2DModel.from_pretrained(folder)
pipeline = DDPMPipeline.from_pretrained(folder)
assert type(unet) is UNet2DModel and type(pipeline.unet) is UNet2DModel
images = pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
assert DDIMPipeline.from_pretrained(folder)(num_inference_steps=2, output_type="np").images.shape == images.shape
print(images.shape, sum(p.numel() for p in unet.parameters()), *unet.config["block_out_channels"])
"""


def stranger(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-I", "-c", STRANGER, folder], capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def small() -> DDPMPipeline:
    return DDPMPipeline(unet=random_unet("plain"), scheduler=DDPMScheduler())


def test_stock_layout_opens_without_this_package(tmp_path):
    result = wanda_fast.prune(save_path=tmp_path / "out", ratio=0.3, **{**FAST, "pruner": "wanda-diff"})
    done = stranger(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    widths = result.plan.config["block_out_channels"]
    expected = f"(1, 32, 32, 3) {result.report['pruned']['params']} {' '.join(map(str, widths))}"
    assert done.stdout.split("\n")[-2] == expected
    assert max(widths) < 128


def test_the_stranger_computes_what_was_saved(small, tmp_path):
    """Same weights, same output: nothing of the network is lost in its config."""
    result = wanda_fast.prune(small, save_path=tmp_path / "out", ratio=0.5, **FAST)
    unet = DDPMPipeline.from_pretrained(tmp_path / "out").unet
    mine = result.pipeline.unet
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([5, 900])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t).sample, mine(x, t).sample, rtol=0, atol=1e-5)


def test_sensitivity_split_is_stock_too(tmp_path):
    options = {**FAST, "pruner": "wanda-diff", "split": "sensitivity", "target_macs": "50%"}
    result = wanda_fast.prune(save_path=tmp_path / "out", **options)
    assert result.report["pruned"]["macs"] <= 0.5 * result.report["dense"]["macs"]
    done = stranger(tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_free_layout_says_why_diffusers_cannot_open_it(small, tmp_path):
    folder = tmp_path / "out"
    wanda_fast.prune(small, save_path=folder, layout="free", target_macs="60%", **FAST)
    for open_it, why in (("UNet2DModel", "wanda_fast.load_pruned(folder)"), ("DDPMPipeline", "wanda_fast")):
        code = f'import sys; sys.modules["wanda_fast"] = None; import diffusers; diffusers.{open_it}.from_pretrained(sys.argv[1])'
        done = subprocess.run([sys.executable, "-I", "-c", code, folder], capture_output=True, text=True, timeout=240)
        assert done.returncode == 1 and why in done.stderr.splitlines()[-1], done.stderr
    opened = script(
        "import sys; from diffusers import DDPMPipeline; import wanda_fast;"
        "print(len(wanda_fast.load_pruned(sys.argv[1])(num_inference_steps=1, output_type='np').images));"
        "print(type(DDPMPipeline.from_pretrained(sys.argv[1]).unet).__name__)",
        folder,
    )
    assert opened.stdout.split("\n")[-3:-1] == ["1", "PrunedUNet2DModel"], opened.stderr
    assert "one width per level" in " ".join((folder / "README.md").read_text().split())


@pytest.mark.parametrize("name", sorted(CONDITIONED))
def test_every_stock_class_quotes_the_signpost(name, tmp_path):
    network, kind = random_network(name), CONDITIONED[name][0]
    slots = find_slots(network)
    widths = uniform_widths(free_problem(slots, cost_model(network, slots), "free", 2, 2), Target(ratio=0.4))
    scores = {n: torch.arange(float(slot.width)) for n, slot in slots.slots.items()}
    thin = compact(network, build_plan(slots, widths, scores, network.config, layout="free", norm_policy="free"))
    assert checkpoint.save_folder(tmp_path, thin, DDPMScheduler()) == "free"
    with pytest.raises((ValueError, NotImplementedError), match=r"open it with wanda_fast\.load_pruned"):
        getattr(diffusers, kind).from_pretrained(tmp_path)
    for opened in (wanda_fast.load_pruned(tmp_path), getattr(pruned_unet, f"Pruned{kind}").from_pretrained(tmp_path)):
        assert checkpoint.public_config(opened) == checkpoint.public_config(thin) and "dense" not in opened.config["pruning"]
        opened.save_pretrained(tmp_path / "again")  # by diffusers alone: opens too, without the sentence
        assert type(type(opened).from_pretrained(tmp_path / "again")) is type(opened)


def test_cifar_architecture_lands_at_or_just_under_its_budget():
    pipeline = DDPMPipeline(unet=random_unet(CIFAR32), scheduler=DDPMScheduler())
    result = wanda_fast.prune(pipeline, target_macs="3.41G", dry_run=True, **FAST)
    assert result.report["dense"] == {"params": 35_746_307, "macs": pytest.approx(6.06e9, rel=2e-3)}
    assert 0.97 * 3.41e9 < result.report["pruned"]["macs"] <= 3.41e9
