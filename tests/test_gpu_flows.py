"""Every command once on a GPU, as a user types it: bundled model, few images. What the commands compute is tested on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline

import wanda_fast
from wanda_fast.cli import main
from wanda_fast.evaluation import ssim
from wanda_fast.memory import free_gpu_bytes
from wanda_fast.sampling import sample
from wanda_fast.smaller_batches import usual_batch_size

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]

FEW = ("--calib_steps", "64", "--repair_images", "256", "--num_samples", "4", "--num_inference_steps", "4", "--quiet")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at 70 % of its MACs, pruned on the GPU."""
    folder = tmp_path_factory.mktemp("gpu") / "pruned"
    torch.use_deterministic_algorithms(False)
    assert main(["prune", "--target_macs", "70%", "--device", "cuda", "--save_path", str(folder), *FEW]) == 0
    return folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_prune(pruned: Path) -> None:
    report = read(pruned / "pruning.json")
    assert report["pruned"]["macs"] <= 0.7 * report["dense"]["macs"]
    assert report["batch_size"] == usual_batch_size(torch.device("cuda"), 32, 32)
    # of a network that was cut without repair it is some 8 %
    assert report["quality"]["noise_mse_relative"] < 0.02
    pipeline = DDPMPipeline.from_pretrained(pruned)
    with torch.no_grad():
        out = pipeline.unet(torch.randn(2, 3, 32, 32), torch.tensor([10, 900])).sample
    assert torch.isfinite(out).all()


def test_memory_that_pytorch_keeps_of_freed_tensors_is_free() -> None:
    size = 2 << 30
    large = torch.empty(size, dtype=torch.uint8, device="cuda")
    del large
    kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    assert kept >= size
    before = torch.cuda.mem_get_info()[0]  # the driver knows nothing of it
    assert free_gpu_bytes(torch.device("cuda")) >= before + size


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_prune_to_a_latency(tmp_path: Path, mode: str) -> None:
    torch.use_deterministic_algorithms(False)
    found = wanda_fast.prune(
        target_latency="0.9x", latency_mode=mode, latency_batch=32, repair="none", num_samples=0, calib_steps=32, device="cuda",
        save_path=tmp_path / "fast",
    )  # fmt: skip
    latency = found.report["latency"]
    assert latency["rounds"] and latency["mode"].startswith(mode)
    assert found.report["pruned"]["macs"] < found.report["dense"]["macs"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_finetune_and_go_on(pruned: Path, tmp_path: Path, dtype: str) -> None:
    torch.use_deterministic_algorithms(False)
    target = tmp_path / "tuned"
    how = [
        "finetune", "--model", str(pruned), "--teacher", "bundled", "--num_images", "64", "--batch_size", "16", "--warmup", "2",
        "--dtype", dtype, "--feature_weight", "0.1", "--save_every", "2", "--num_samples", "2", "--num_inference_steps", "2", "--quiet",
        "--save_path", str(target),
    ]  # fmt: skip
    assert main([*how, "--steps", "4", "--device", "cuda"]) == 0
    assert read(target / "finetune.json")["steps"] == 4
    before, after = (DDPMPipeline.from_pretrained(f).unet.state_dict() for f in (pruned, target))
    assert all(torch.isfinite(v).all() for v in after.values())
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_sample(pruned: Path, tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(False)
    how = ["sample", "--model", str(pruned), "--num_samples", "6", "--num_inference_steps", "4", "--quiet"]
    assert main([*how, "--save_path", str(tmp_path / "images"), "--device", "cuda"]) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 6
    assert main([*how, "--grid", str(tmp_path / "grid.png"), "--dtype", "bf16"]) == 0
    assert (tmp_path / "grid.png").is_file()


def test_the_gpu_draws_what_the_cpu_draws(pruned: Path) -> None:
    unet, scheduler = (lambda p: (p.unet, p.scheduler))(DDPMPipeline.from_pretrained(pruned))
    one = sample(unet, scheduler, 4, steps=4, device="cpu")
    two = sample(unet.to("cuda"), scheduler, 4, steps=4, device="cuda")
    assert ssim(one, two.cpu()) > 0.99


def test_analyze(tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(False)
    assert main(["analyze", "--num_samples", "32", "--device", "cuda", "--save_path", str(tmp_path / "study"), "--quiet"]) == 0
    assert read(tmp_path / "study" / "analysis.json")


def test_evaluate_and_compare(pruned: Path, tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(False)
    few = ["--num_samples", "8", "--num_inference_steps", "4", "--noise_images", "16", "--device", "cuda", "--quiet"]
    assert main(["evaluate", str(pruned), "--reference", "bundled", *few, "--save_path", str(tmp_path / "evaluation")]) == 0
    found = read(tmp_path / "evaluation" / "evaluation.json")
    assert [s["mode"].split(",")[0] for s in found["speed"]] == ["eager", "compiled"]
    assert 0.5 < found["ssim"] < 1
    assert main(["compare", "bundled", str(pruned), *few, "--save_path", str(tmp_path / "page.html")]) == 0


def test_export(pruned: Path, tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(False)
    assert main(["export", "--model", str(pruned), "--formats", "pt2", "aoti", "--device", "cuda", "--save_path", str(tmp_path / "out"),
                 "--quiet"]) == 0  # fmt: skip
    assert {p.suffix for p in (tmp_path / "out").iterdir()} >= {".pt2"}


def test_experts(tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(False)
    folder = tmp_path / "experts"
    how = ["prune", "--target_macs", "70%", "--layout", "free", "--experts", "2", "--device", "cuda", "--save_path", str(folder), *FEW]
    assert main(how) == 0
    report = read(folder / "pruning.json")
    assert len(report["experts"]["repairs"]) == 2 and report["quality"]["noise_mse_relative"] < 0.02
    few = ["--num_samples", "8", "--num_inference_steps", "4", "--noise_images", "16", "--device", "cuda", "--quiet"]
    assert main(["evaluate", str(folder), "--reference", "bundled", *few, "--save_path", str(tmp_path / "evaluation")]) == 0
    assert read(tmp_path / "evaluation" / "evaluation.json")["ssim"] > 0.8
