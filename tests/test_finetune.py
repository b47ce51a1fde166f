"""Recovery training: exact resumption after SIGKILL, losses, distillation, EMA, training from nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import PLAIN, random_unet
from PIL import Image
from runs import ROOT, tree
from runs import one_thread as one_thread
from safetensors.torch import load_file

import wanda_fast
from wanda_fast import checkpoint, finetune
from wanda_fast.cli import finetune as command
from wanda_fast.cli import main
from wanda_fast.cli.parser import Parser
from wanda_fast.errors import UserError

TINY = {**PLAIN, "sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}
FAST: dict[str, Any] = {"device": "cpu", "batch_size": 4, "steps": 4, "warmup": 2, "num_samples": 0, "save_every": 2, "lr": 1e-3}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """dense/, pruned/ (stock), free/ and images/ of random blobs."""
    home = tmp_path_factory.mktemp("finetune")
    (home / "images").mkdir()
    draws = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(draws.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(home / "images" / f"{i:02d}.png")
    with checkpoint.atomic_folder(home / "dense") as temp:
        checkpoint.save_folder(temp, random_unet(TINY), DDPMScheduler())
    cheap = {"device": "cpu", "pruner": "magnitude", "split": "uniform", "repair": "none", "num_samples": 0, "ratio": 0.3,
             "align": 4, "min_width": 4, "batch_size": 8, "dataset": str(home / "images")}  # fmt: skip
    wanda_fast.prune(home / "dense", save_path=home / "pruned", **cheap)
    wanda_fast.prune(home / "dense", save_path=home / "free", layout="free", **cheap)
    return home


def train(made: Path, out: Path, model: str = "pruned", **options: Any) -> finetune.FinetuneResult:
    return finetune.finetune(made / model, save_path=out, **{**FAST, "dataset": str(made / "images"), **options})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / checkpoint.WEIGHTS)


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


# ----------------------------------------------------------------------------------------------------------- resumption


def words(made: Path, out: Path, *more: str) -> list[str]:
    found = ["finetune", "--model", made / "pruned", "--teacher", made / "dense", "--dataset", made / "images", "--out", out,
             "--device", "cpu", "--batch_size", "6", "--accumulate", "2", "--steps", "24", "--save_every", "4", "--warmup", "3",
             "--feature_weight", "0.1", "--num_samples", "1", "--num_inference_steps", "2", "--validate_every", "8",
             "--quiet", "--json", *more]  # fmt: skip
    return [str(word) for word in found]


def test_killed_and_resumed_is_unbroken_bit_for_bit(made, tmp_path, capsys):
    """SIGKILL somewhere after step 8 of 24; the resumed run ends with the very weights, log and validations."""
    killed = subprocess.Popen(
        [sys.executable, "-m", "wanda_fast", *words(made, tmp_path / "killed")], cwd=ROOT, text=True, stderr=subprocess.PIPE,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (tmp_path / "killed.train" / "step-00000008").is_dir():
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed").exists()
    reports = []
    for more in ([tmp_path / "unbroken"], [tmp_path / "killed", "--resume"]):
        assert main(words(made, *more, "--tensorboard")) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert same(tmp_path / "killed", tmp_path / "unbroken")
    assert reports[0]["validation"] == reports[1]["validation"] and len(reports[0]["validation"]) == 4
    lines = [[json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("killed", "unbroken")]
    assert [x["step"] for x in lines[0]] == [x["step"] for x in lines[1]]
    assert [x["step"] for x in lines[1] if x["kind"] == "validation"] == [0, 8, 16, 24]
    for name in ("killed", "unbroken"):
        assert len(list((tmp_path / f"{name}.train" / "tensorboard").iterdir())) >= 1
        kept = [p for p in tree(tmp_path / f"{name}.train") if p.startswith("step-")]
        files = ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
        assert kept == [f"step-{s:08d}/{f}" for s in (20, 24) for f in files]
        assert not [p for p in (tmp_path / f"{name}.train").iterdir() if p.name.startswith(".")]


def test_stop_writes_a_checkpoint_that_goes_on(made, tmp_path):
    train(made, tmp_path / "whole", save_every=0)
    calls = iter([False, True])
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(made / "pruned", save_path=tmp_path / "part", stop=lambda: next(calls), dataset=str(made / "images"),
                          **{**FAST, "save_every": 0})  # fmt: skip
    assert (tmp_path / "part.train" / "step-00000002").is_dir() and not (tmp_path / "part").exists()
    train(made, tmp_path / "part", resume=True, save_every=0)
    assert same(tmp_path / "part", tmp_path / "whole")


def test_what_a_resumed_run_refuses(made, tmp_path, capsys):
    out = tmp_path / "out"
    train(made, out)
    shutil.rmtree(out)
    with pytest.raises(UserError, match="holds an earlier training"):
        train(made, out)
    with pytest.raises(UserError, match=r"another lr \(0.001, not 0.002\)"):
        train(made, out, resume=True, lr=2e-3)
    with pytest.raises(UserError, match="another steps"):  # the cosine ends elsewhere
        train(made, out, resume=True, steps=8)
    newest = tmp_path / "out.train" / "step-00000004"
    data = bytearray((newest / "model.safetensors").read_bytes())
    (newest / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        train(made, out, resume=True)
    (newest / "state.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        train(made, out, resume=True)
    train(made, out, overwrite=True)
    assert (out / "finetune.json").is_file()


def test_a_constant_rate_can_be_trained_longer(made, tmp_path):
    train(made, tmp_path / "long", lr_schedule="constant", steps=6)
    train(made, tmp_path / "short", lr_schedule="constant", steps=4)
    shutil.move(tmp_path / "short.train", tmp_path / "more.train")
    train(made, tmp_path / "more", lr_schedule="constant", steps=6, resume=True)
    assert same(tmp_path / "more", tmp_path / "long") and not same(tmp_path / "short", tmp_path / "long")


def test_nothing_pickled(made, tmp_path):
    train(made, tmp_path / "out")
    suffixes = {Path(p).suffix for p in tree(tmp_path)}
    assert suffixes <= {".safetensors", ".json", ".jsonl", ".yaml", ".png"}


# ------------------------------------------------------------------------------------------------------------- training


def test_accumulation_does_not_change_the_step(made, tmp_path):
    for parts in (1, 2, 4):
        train(made, tmp_path / str(parts), accumulate=parts, ema_decay=0.0)
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    start = weights(made / "pruned")
    moved = max(float((one[n] - start[n]).abs().max()) for n in one)
    apart = max(float((one[n] - four[n]).abs().max()) for n in one)
    assert 1e-3 < moved and apart < 0.1 * moved


def test_one_step_is_the_textbook_step(made, tmp_path):
    """AdamW of a hand-written gradient: first step = learning rate times the sign, up to epsilon."""
    train(made, tmp_path / "out", steps=1, warmup=0, ema_decay=0.0, grad_clip=0.0, lr_schedule="constant", flip=False)
    before, after = weights(made / "pruned"), weights(tmp_path / "out")
    step = (after["conv_in.weight"] - before["conv_in.weight"]).abs()
    assert float(step.median()) == pytest.approx(1e-3, rel=1e-2) and float(step.max()) <= 1.001e-3


def test_distillation_brings_the_network_to_its_teacher(made, tmp_path):
    result = train(made, tmp_path / "out", teacher=str(made / "dense"), noise_weight=0.0, steps=40, warmup=0, lr=2e-3, batch_size=8,
                   ema_decay=0.5, dataset=str(made / "images"), validation_images=2, save_every=0)  # fmt: skip
    first, last = result.report["validation"][0], result.report["validation"][-1]
    assert last["teacher_error_relative"] < 0.5 * first["teacher_error_relative"]


def test_the_average_is_what_is_saved(made, tmp_path):
    slow = train(made, tmp_path / "slow", ema_decay=0.999, save_every=4)
    state = load_file(tmp_path / "slow.train" / "step-00000004" / "ema.safetensors")
    assert all(torch.equal(v, state[n]) for n, v in weights(tmp_path / "slow").items())
    assert slow.pipeline.unet.dtype == torch.float32
    train(made, tmp_path / "none", ema_decay=0.0)
    assert not same(tmp_path / "slow", tmp_path / "none")


def test_learning_rate():
    run = finetune._Training(finetune.FinetuneOptions(steps=100, warmup=10, lr=1.0), Path(), Path(), False, print, bool)
    rates = [run.learning_rate(s) for s in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)]) and rates[55] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_every_epoch_is_a_permutation_of_its_own():
    run = finetune._Training(finetune.FinetuneOptions(batch_size=4), Path(), Path(), False, print, bool)
    run.device, run.images = torch.device("cpu"), torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    seen = torch.cat([((run._pick(s) + 1) * 127.5).round().flatten() for s in range(5)]).int().tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    run._order = None  # as after a resumption in the middle of an epoch
    assert ((run._pick(3) + 1) * 127.5).round().flatten().int().tolist() == seen[12:16]


def test_attention_loss():
    a = torch.randn(2, 4, 3, 3)
    assert float(finetune.attention_loss([a], [a])) == pytest.approx(0, abs=1e-9)
    assert float(finetune.attention_loss([a], [torch.cat([a, -a], 1)])) == pytest.approx(0, abs=1e-6)  # twice the width, same map
    assert float(finetune.attention_loss([a], [torch.randn(2, 7, 3, 3)])) > 0.01


def test_velocity_and_clean_image_targets():
    run = finetune._Training(finetune.FinetuneOptions(), Path(), Path(), False, print, bool)
    scheduler = DDPMScheduler()
    alphas = scheduler.alphas_cumprod
    run.signal, run.noise = alphas.sqrt(), (1 - alphas).sqrt()
    clean, noise, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0, 500, 999])
    for kind, expected in (("epsilon", noise), ("sample", clean), ("v_prediction", scheduler.get_velocity(clean, noise, t))):
        run.prediction = kind
        x, target = run._target(clean, noise, t)
        assert torch.allclose(target, expected, atol=1e-6) and torch.allclose(x, scheduler.add_noise(clean, noise, t), atol=1e-6)


def test_free_layout_and_bfloat16(made, tmp_path):
    train(made, tmp_path / "out", model="free", dtype="bf16", teacher=str(made / "dense"), feature_weight=0.1, steps=2)
    pipeline = wanda_fast.load_pruned(tmp_path / "out")
    assert type(pipeline.unet).__name__ == "PrunedUNet2DModel"
    assert (tmp_path / "out" / "pruning.json").read_bytes() == (made / "free" / "pruning.json").read_bytes()


def test_from_scratch_draws_every_weight_of_the_free_layout(made):
    """Layers that are cut to their widths hold whatever lay in memory before; the fixture fills that with NaN."""
    one, other = (finetune._fresh(made / "free", seed)[0].state_dict() for seed in (0, 0))
    assert all(torch.isfinite(value).all() and torch.equal(value, other[name]) for name, value in one.items())
    assert not torch.equal(one["conv_in.weight"], finetune._fresh(made / "free", 1)[0].state_dict()["conv_in.weight"])
    assert one["conv_in.weight"].shape == weights(made / "free")["conv_in.weight"].shape


def test_a_finished_training_has_nothing_to_go_on_with(made, tmp_path):
    train(made, tmp_path / "out")
    with pytest.raises(UserError, match="this training is finished"):
        train(made, tmp_path / "out", resume=True)


def test_from_scratch_needs_a_configuration_alone(made, tmp_path):
    shutil.copytree(made / "dense", tmp_path / "bare")
    (tmp_path / "bare" / checkpoint.WEIGHTS).unlink()
    how = {**FAST, "dataset": str(made / "images"), "from_scratch": True}
    for out in ("one", "two"):
        finetune.finetune(tmp_path / "bare", save_path=tmp_path / out, **how)
    assert same(tmp_path / "one", tmp_path / "two") and not same(tmp_path / "one", made / "dense")
    assert DDPMPipeline.from_pretrained(tmp_path / "one").unet.config["block_out_channels"] == [16, 32, 32]


def test_own_samples_of_the_teacher_are_the_default(made, tmp_path):
    result = finetune.finetune(made / "pruned", save_path=tmp_path / "out", teacher=str(made / "dense"), num_images=10, **FAST)
    assert result.report["images"] == {"training": 9, "held_out": 1}


def test_compiled_runs_train_alike(made, tmp_path, monkeypatch):
    """The backend that traces but generates no code: what is tested is that hooks, accumulation and validation survive it."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: original(self, **{**kw, "backend": "eager"}))
    how = {"teacher": str(made / "dense"), "feature_weight": 0.1, "steps": 1, "warmup": 0, "ema_decay": 0.0}
    train(made, tmp_path / "eager", **how)
    train(made, tmp_path / "compiled", compile=True, **how)
    one, two = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert all(torch.allclose(one[n], two[n], atol=1e-4) for n in one)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps must be a whole number"),
        ({"lr": float("nan")}, "lr must be a number"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"accumulate": 3}, "must divide the batch size"),
        ({"distill_weight": 1.0}, "needs a teacher"),
        ({"noise_weight": 0.0}, "the loss is empty"),
        ({"dtype": "fp16"}, "needs a GPU"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"lr_schedule": "step"}, "unknown lr_schedule"),
        ({"dataset": "nowhere"}, "no such image folder"),
        ({"dataset": "self", "from_scratch": True}, "needs images"),
        ({"teacher": "nowhere"}, "no such folder"),
        ({"num_inference_steps": 1001}, "must be 1 to 1000"),
    ],
    ids=str,
)
def test_bad_arguments(made, tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        train(made, tmp_path / "out", **options)
    assert tree(tmp_path) == []


def test_teachers_that_do_not_fit(made, tmp_path):
    for change, says in (({"sample_size": 16}, "draws"), ({"num_class_embeds": 3}, "num_class_embeds")):
        with checkpoint.atomic_folder(tmp_path / says) as temp:
            checkpoint.save_folder(temp, random_unet({**TINY, **change}), DDPMScheduler())
        with pytest.raises(UserError, match=says):
            train(made, tmp_path / "out", teacher=str(tmp_path / says))
    with checkpoint.atomic_folder(tmp_path / "schedule") as temp:
        checkpoint.save_folder(temp, random_unet(TINY), DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    with pytest.raises(UserError, match="different noise schedules"):
        train(made, tmp_path / "out", teacher=str(tmp_path / "schedule"))
    with pytest.raises(UserError, match="class-conditional"):
        finetune.finetune(tmp_path / "num_class_embeds", save_path=tmp_path / "out", **{**FAST, "dataset": str(made / "images")})


def test_a_loss_that_is_not_finite_names_the_step(made, tmp_path):
    with pytest.raises(RuntimeError, match=r"NaN or infinite before step 2; lower the learning rate"):
        train(made, tmp_path / "out", lr=1e30, warmup=0, grad_clip=0.0)
    assert not (tmp_path / "out").exists() and not list((tmp_path / "out.train").glob("step-*"))


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 1, "save_dtype": "fp16", "lr": 1e6, "validation_images": 0}])
def test_weights_that_are_not_finite_are_not_saved(made, tmp_path, options):
    """The loss of the last step is that of the weights before it."""
    with pytest.raises(RuntimeError, match=r"NaN or infinite after step 1|too large for torch\.float16"):
        train(made, tmp_path / "out", **{"lr": 1e30, "warmup": 0, "ema_decay": 0.0, **options})
    assert not (tmp_path / "out").exists()


def test_no_checkpoint_of_weights_that_are_not_finite(made, tmp_path):
    with pytest.raises(RuntimeError, match="weights became NaN or infinite"):
        train(made, tmp_path / "out", lr=3e38, weight_decay=3e38, warmup=0, save_every=1, validation_images=0)
    assert not list((tmp_path / "out.train").glob("step-*"))


@pytest.mark.parametrize("name", ["images", "pruned"])
def test_overwrite_spares_what_is_read(made, tmp_path, name):
    shutil.copytree(made / name, tmp_path / name)
    before = tree(tmp_path)
    where = {"dataset": str(tmp_path / name)} if name == "images" else {"teacher": str(tmp_path / name)}
    with pytest.raises(UserError, match="refusing to overwrite what this run reads"):
        train(made, tmp_path / name, overwrite=True, **where)
    assert tree(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------- command line


def test_sigterm_writes_a_checkpoint_and_says_so(made, tmp_path, capsys, monkeypatch):
    step = finetune._Training._step
    monkeypatch.setattr(finetune._Training, "_step", lambda self: (os.kill(os.getpid(), signal.SIGTERM), step(self))[1])
    words = ["finetune", "--model", made / "pruned", "--dataset", made / "images", "--device", "cpu", "--batch_size", 4, "--steps", 9,
             "--num_samples", 0, "--quiet", "--out", tmp_path / "out"]  # fmt: skip
    assert main([str(w) for w in words]) == 128 + signal.SIGTERM
    error = capsys.readouterr().err.splitlines()
    assert error == ["wanda-fast: terminated; the checkpoints that are complete stay, and --resume goes on from the newest"]
    assert (tmp_path / "out.train" / "step-00000001").is_dir()


def test_defaults_of_the_command_are_those_of_the_function():
    parser = Parser("wanda-fast finetune", command.EXAMPLES)
    command.add_arguments(parser)
    args = vars(parser.parse_args([]))
    for name, field in finetune.FinetuneOptions.__dataclass_fields__.items():
        assert args[name] == field.default, name
    for action in parser._actions:
        if action.nargs != 0 and action.dest not in ("data_dir", "teacher", "config"):
            assert "(default: " in action.help, action.dest


def test_command_and_its_config(made, tmp_path, capsys):
    words = ["finetune", "--model", str(made / "pruned"), "--dataset", str(made / "images"), "--device", "cpu", "--batch_size", "4",
             "--steps", "3", "--num_samples", "2", "--num_inference_steps", "2"]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    text = capsys.readouterr().out
    assert "noise error" in text and f"written to {tmp_path / 'one'}" in text
    assert tree(tmp_path / "one") == ["config.json", "config.yaml", checkpoint.WEIGHTS, "finetune.json", "log.jsonl", "model_index.json",
                                      "pruning.json", "scheduler/scheduler_config.json", "vis/after_finetuning.png",
                                      "vis/before_finetuning.png"]  # fmt: skip
    assert main(["finetune", "--config", str(tmp_path / "one" / "config.yaml"), "--out", str(tmp_path / "two")]) == 0
    assert same(tmp_path / "one", tmp_path / "two")
    assert main([*words, "--out", str(tmp_path / "one")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
