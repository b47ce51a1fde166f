"""`evaluate` and `fid`, as functions and as commands, on a tiny network."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import PLAIN, random_unet
from PIL import Image
from runs import one_thread as one_thread
from test_features import folder_of, pictures

from wanda_fast import checkpoint, evaluate, evaluation, sampling
from wanda_fast.cli import main
from wanda_fast.errors import UserError
from wanda_fast.evaluation import errors_over_time, held_out_batches, ssim

TINY = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}
FAST: dict[str, Any] = {"n": 6, "steps": 2, "noise_images": 20, "batch_size": 4, "device": "cpu", "compiled": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense network and one that differs by a bias of 0.1 in every output channel."""
    folders = tmp_path_factory.mktemp("models") / "dense", tmp_path_factory.mktemp("models") / "changed"
    for i, folder in enumerate(folders):
        unet = random_unet(TINY)
        with torch.no_grad():
            unet.conv_out.bias += 0.1 * i
        with checkpoint.atomic_folder(folder) as target:
            checkpoint.save_folder(target, unet, DDPMScheduler())
    return folders


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main([str(w) for w in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ----------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_equals_scikit_image(channels: int) -> None:
    from skimage.metrics import structural_similarity

    a = torch.randint(0, 256, (300, 11, 9, channels), dtype=torch.uint8)  # more than one batch of 256
    b = (a.float() + 30 * torch.randn(a.shape)).clamp(0, 255).to(torch.uint8)
    expected = [structural_similarity(x, y, data_range=255, channel_axis=-1) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert ssim(a, b) == pytest.approx(sum(expected) / len(expected), abs=1e-6)


def test_images_are_the_same_bit_for_bit_whatever_the_batch_size() -> None:
    unet, scheduler = random_unet(TINY), DDPMScheduler()
    whole = sampling.sample(unet, scheduler, 19, steps=3, batch_size=32)
    for batch_size in (1, 2, 5, 8, 19):
        assert torch.equal(sampling.sample(unet, scheduler, 19, steps=3, batch_size=batch_size), whole)
    assert torch.equal(sampling.sample(unet, scheduler, 3, steps=3, batch_size=2), whole[:3])


def test_predictions_do_not_depend_on_the_batch() -> None:
    """In float32, before the rounding to pixels."""
    unet = random_unet("classes")
    x, t, labels = torch.randn(11, 3, 16, 16), torch.arange(11), torch.arange(11) % 5
    with torch.no_grad():
        whole = sampling.predict_evenly(unet, x, t, labels)
        parts = [sampling.predict_evenly(unet, x[i : i + 8], t[i : i + 8], labels[i : i + 8]) for i in (0, 8)]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.allclose(sampling.predict(unet, x, t, labels), whole, atol=1e-4)


def test_held_out_timesteps_and_targets() -> None:
    unet, scheduler = random_unet(TINY), DDPMScheduler(num_train_timesteps=40)
    images = pictures(3, 8)
    batches = list(held_out_batches(unet, scheduler, images, n=40, batch_size=7))
    t = torch.cat([b[1] for b in batches])
    assert sorted(t.tolist()) == list(range(40)) and t.tolist() != sorted(t.tolist())
    again = next(iter(held_out_batches(unet, scheduler, images, n=40, batch_size=40)))
    assert torch.equal(torch.cat([b[0] for b in batches]), again[0]) and torch.equal(torch.cat([b[3] for b in batches]), again[3])
    a = scheduler.alphas_cumprod[again[1]].view(-1, 1, 1, 1)
    clean = sampling.to_float(images)[[i % 3 for i in range(40)]]
    assert torch.allclose(again[0], a.sqrt() * clean + (1 - a).sqrt() * again[3], atol=1e-6)
    v = DDPMScheduler(num_train_timesteps=40, prediction_type="v_prediction")
    (x, _, _, target) = next(iter(held_out_batches(unet, v, images, n=40, batch_size=40)))
    assert torch.allclose(target, a.sqrt() * again[3] - (1 - a).sqrt() * clean, atol=1e-6) and torch.equal(x, again[0])


def test_errors_over_time_of_a_known_difference() -> None:
    unet, other = random_unet(TINY), random_unet(TINY)
    with torch.no_grad():
        other.conv_out.bias[1] += 0.5
    batches = list(held_out_batches(unet, DDPMScheduler(), pictures(3, 8), n=20, batch_size=6))
    table = errors_over_time(other, unet, batches, steps=1000, bins=10)
    assert [(e["from"], e["to"], e["samples"]) for e in table] == [(100 * i, 100 * (i + 1), 2) for i in range(10)] + [(0, 1000, 20)]
    assert all(e["mse"] == pytest.approx(0.25 / 3, rel=1e-4) for e in table)
    with torch.no_grad():
        loss = sum(float((unet(x, t).sample - target).square().mean((1, 2, 3)).sum()) for x, t, _, target in batches) / 20
    assert table[-1]["loss_reference"] == pytest.approx(loss, rel=1e-4)
    assert table[-1]["relative"] > 0 and "mse" not in errors_over_time(other, None, batches)[0]


# -------------------------------------------------------------------------------------------------------------- evaluate


def test_everything_beside_a_reference(models: tuple[Path, Path], tmp_path: Path) -> None:
    dense, changed = models
    real = folder_of(pictures(5, 8), tmp_path / "real")
    found = evaluate(changed, dense, real=real, features="efficientnet-lite0", save_path=tmp_path / "out", **FAST)
    json.dumps(found, allow_nan=False)
    assert found["model"]["params"] == found["reference"]["params"] and found["model"]["name"] == "changed"
    assert found["noise"]["all"]["mse"] == pytest.approx(0.01, rel=1e-3) and len(found["noise"]["over_t"]) == 10
    assert found["noise"]["images"] == "real: real"
    assert 0 < found["ssim"] < 1 and 0 < found["psnr"] < 60 and found["feature_distance"]["value"] > 0
    assert "not LPIPS" in found["feature_distance"]["kind"]
    assert found["fd"]["model"] > 0 and found["fd"]["reference"] > 0 and found["fd"]["real_images"] == 5
    assert found["features"]["features"] == "efficientnet-lite0"
    assert found["sampling"]["spacing"] == "leading: 500, 0 of 1000" and found["sampling"]["dtype"] == "fp32"
    (speed,) = found["speed"]
    assert speed["images_per_s"] > 0 and speed["times_as_fast"] > 0 and "eager" in speed["mode"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.yaml", "evaluation.json", "evaluation.png"]
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["ssim"] == found["ssim"]


def test_a_network_beside_itself_is_equal(models: tuple[Path, Path]) -> None:
    pipeline = DDPMPipeline(random_unet(TINY), DDPMScheduler())
    found = evaluate(pipeline, models[0], **{**FAST, "noise_images": 4})
    assert found["ssim"] == pytest.approx(1, abs=1e-12) and found["psnr"] == math.inf and found["noise"]["all"]["mse"] == 0
    assert found["noise"]["images"] == "drawn by the reference" and "fd" not in found and "features" not in found


def test_alone_and_without_samples(models: tuple[Path, Path]) -> None:
    found = evaluate(models[0], **{**FAST, "n": 0, "noise_images": 5})
    assert "ssim" not in found and found["reference"] is None and "loss_reference" not in found["noise"]["all"]


def test_compiled_speed_is_of_the_compiled_network(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile is asked once per network; its own work is not under test here."""
    asked = []

    def compile_(network: Any, **options: Any) -> Any:
        asked.append(options)
        return network

    monkeypatch.setattr(torch, "compile", compile_)
    found = evaluate(models[0], models[1], **{**FAST, "n": 0, "noise_images": 0, "compiled": True})
    assert asked == [{"mode": "reduce-overhead", "dynamic": False}] * 2
    assert [s["mode"].split(",")[0] for s in found["speed"]] == ["eager", "compiled"]


def test_what_cannot_be_evaluated(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="different shapes"):
        evaluate(models[0], None if False else DDPMPipeline(random_unet("plain"), DDPMScheduler()), **FAST)
    other = DDPMPipeline(random_unet(TINY), DDPMScheduler(num_train_timesteps=500))
    with pytest.raises(UserError, match="different noise schedules"):
        evaluate(models[0], other, **FAST)
    with pytest.raises(UserError, match="at least two images"):
        evaluate(models[0], real=folder_of(pictures(2, 8), tmp_path / "r"), **{**FAST, "n": 1})
    with pytest.raises(UserError, match="no such file"):
        evaluate(models[0], real=tmp_path / "none.npz", **FAST)
    with pytest.raises(UserError, match="unknown dtype"):
        evaluate(models[0], dtype="fp8", **FAST)


def test_samples_with_too_little_memory_go_on_in_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def sample(*args: Any, batch_size: int, **options: Any) -> str:
        seen.append(batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "images"

    monkeypatch.setattr(evaluation, "sample", sample)
    said: list[str] = []
    device = torch.device("cpu")
    found: Any = evaluation._draw(random_unet(TINY), DDPMScheduler(), 9, 2, 0, 8, device, torch.float32, False, "model", said.append)
    assert found == "images" and seen == [8, 4, 2] and said[-1].endswith("batch size of 2")


def test_command(models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", models[1], "--reference", models[0], "--num_samples", 4, "--num_inference_steps", 2, "--noise_images", 10,
             "--device", "cpu", "--batch-size", 4, "--quiet"]  # fmt: skip
    code, text, _ = run(capsys, *words)
    assert code == 0
    for line in ("SSIM of same-noise images", "squared error of the predicted noise", "images per second, eager, fp32", "leading: 500"):
        assert line in text
    code, text, _ = run(capsys, *words, "--json", "--save_path", tmp_path / "out")
    assert code == 0 and json.loads(text)["model"]["name"] == "changed"
    code, text, _ = run(capsys, "evaluate", "--config", tmp_path / "out" / "config.yaml", "--json", "--quiet", "--device", "cpu")
    assert code == 0 and json.loads(text)["ssim"] == json.loads((tmp_path / "out" / "evaluation.json").read_text())["ssim"]
    code, _, error = run(capsys, "evaluate", models[0], "--model", models[0])
    assert code == 2 and error.count("\n") == 1
    code, _, error = run(capsys, "evaluate", tmp_path / "nowhere")
    assert code == 2 and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------------- fid


def test_both_forms_of_the_guide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from wanda_fast.features import FeatureStats, feature_stats, frechet_distance, get_features

    real, drawn = (folder_of(pictures(5, 16, seed), tmp_path / name) for seed, name in enumerate(("real", "drawn")))
    extractor = get_features("efficientnet-lite0")
    words = ["--features", "efficientnet-lite0", "--device", "cpu", "--quiet"]
    code, text, _ = run(capsys, "fid", "--save-stats", real, tmp_path / "real.npz", *words)
    assert code == 0 and "efficientnet-lite0 (1280 features" in text and "5 images of real (16x16)" in text
    expected = frechet_distance(feature_stats(extractor, pictures(5, 16, 1)), FeatureStats.load(tmp_path / "real.npz"))
    code, text, _ = run(capsys, "fid", drawn, tmp_path / "real.npz", "--device", "cpu", "--json", "--quiet")
    found = json.loads(text)
    assert code == 0 and found["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    assert found["features"] == "efficientnet-lite0" and found["real"] == {"source": "real", "count": 5, "sizes": ["16x16"]}
    code, text, _ = run(capsys, "fid", drawn, real, *words)
    assert code == 0 and f"{expected:.2f}"[:-1] in text and "5 images of drawn to 5 of real" in text
    code, _, error = run(capsys, "fid", "--save-stats", real, tmp_path / "real.npz", *words)
    assert code == 2 and "--overwrite" in error


def test_what_fid_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from cleanfid import downloads_helper

    monkeypatch.setenv("WANDA_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(downloads_helper, "inception_url", "http://127.0.0.1:9/inception.pt")
    images = folder_of(pictures(3, 16), tmp_path / "images")
    Image.new("RGB", (64, 64)).save(tmp_path / "grid.png")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    words = ["--features", "efficientnet-lite0", "--device", "cpu", "--quiet"]
    assert run(capsys, "fid", "--save-stats", images, tmp_path / "ok.npz", *words)[0] == 0
    cases = {
        ("fid",): "give either",
        ("fid", images): "two places",
        ("fid", tmp_path / "grid.png", tmp_path / "ok.npz"): "wanda-fast sample",
        ("fid", images, tmp_path / "broken.npz"): "broken.npz",
        ("fid", images, tmp_path / "none.npz"): "no such file",
        ("fid", images, tmp_path / "grid.png"): "no npz file",
        ("fid", images, tmp_path / "ok.npz", "--features", "inception"): str(tmp_path / "cache" / "inception-2015-12-05.pt"),
        ("fid", images, images): "inception-2015-12-05.pt",
        ("fid", tmp_path / "nowhere", tmp_path / "ok.npz"): "no such image folder",
        ("fid", "--save-stats", images, tmp_path / "out.txt"): "must end in .npz",
        ("fid", "--save-stats", tmp_path / "grid.png", tmp_path / "out.npz"): "wanda-fast sample",
    }
    for line, words_in in cases.items():
        code, out, error = run(capsys, *line, "--device", "cpu", "--quiet")
        assert (code, out) == (2, "") and words_in in error and error.count("\n") == 1, (line, error)
    assert not (tmp_path / "out.npz").exists()


def test_statistics_of_other_features_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_features import Pooled

    images = folder_of(pictures(3, 16), tmp_path / "images")
    torch.jit.save(torch.jit.script(Pooled()), str(tmp_path / "pooled.pt"))
    assert run(capsys, "fid", "--save-stats", images, tmp_path / "p.npz", "--features", tmp_path / "pooled.pt", "--quiet")[0] == 0
    code, _, error = run(capsys, "fid", images, tmp_path / "p.npz", "--features", "efficientnet-lite0", "--quiet")
    assert code == 2 and "torchscript pooled.pt" in error and "efficientnet-lite0" in error
    code, _, error = run(capsys, "fid", images, tmp_path / "p.npz", "--quiet")
    assert code == 2 and "name that file with --features" in error
    code, text, _ = run(capsys, "fid", images, tmp_path / "p.npz", "--features", tmp_path / "pooled.pt", "--json", "--quiet")
    assert code == 0 and json.loads(text)["frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_commands_of_the_guide_parse() -> None:
    import re
    import shlex

    from wanda_fast.cli import evaluate as evaluate_command
    from wanda_fast.cli import fid as fid_command
    from wanda_fast.cli.parser import Parser

    found = 0
    for name, module in (("evaluate", evaluate_command), ("fid", fid_command)):
        parser = Parser(f"wanda-fast {name}", module.EXAMPLES)
        module.add_arguments(parser)
        text = (Path(__file__).parent.parent / "docs" / "guide.md").read_text(encoding="utf-8")
        lines = re.findall(rf"^wanda-fast {name} (.*)$", text, re.MULTILINE)
        for line in [*lines, *re.findall(rf"^wanda-fast {name} (\S.*?)(?:\s{{2,}}.*)?$", module.EXAMPLES, re.MULTILINE)]:
            parser.parse_args(shlex.split(line))
            found += 1
    assert found >= 10
