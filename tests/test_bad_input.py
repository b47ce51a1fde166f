"""Mistakes end in one plain line and exit code 2, found early, with nothing left behind; so do kills and full disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from networks import random_unet
from PIL import Image
from runs import FAST, TINY, cli, flags, script, tree
from runs import one_thread as one_thread
from safetensors.torch import load_file, save_file

import wanda_fast
from wanda_fast import checkpoint, pruning
from wanda_fast.checkpoint import WEIGHTS


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run the program in an empty folder; it must refuse in one line that holds the given words, and write nothing."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def check(*words: object, says: str | list[str], code: int = 2) -> str:
        before = tree(tmp_path)
        assert cli(*words) == code
        captured = capsys.readouterr()
        assert captured.err.startswith("wanda-fast: error: ") and captured.err.count("\n") == 1, captured.err
        for text in [says] if isinstance(says, str) else says:
            assert text in captured.err
        assert tree(tmp_path) == before and not list(here.iterdir())
        return captured.err

    return check


@pytest.fixture
def no_model(monkeypatch):
    """Nothing is opened: the mistake is found before."""

    def load(*args, **kwargs):
        raise AssertionError("the model was opened")

    monkeypatch.setattr(checkpoint, "load_pipeline", load)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A random network in a folder; tests copy what they damage."""
    folder = tmp_path_factory.mktemp("small") / "model"
    DDPMPipeline(unet=random_unet("plain"), scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory) -> Path:
    """The small network, pruned into a folder."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    wanda_fast.prune(small, save_path=folder, **{**TINY, "calib_steps": 4, "num_samples": 1})
    return folder


@pytest.fixture
def copied(small, tmp_path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copied"))


# ------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("ratio", ["1", "1.5", "-0.1", "nan", "inf", "much", ""])
def test_ratio_out_of_range(refused, no_model, ratio):
    refused(f"--ratio={ratio}", says="0 <= ratio < 1")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--pruner wanda", "unknown pruner 'wanda'; known: "),
        ("--wanda_time_strategy avg", "--wanda_time_strategy: invalid choice: 'avg'"),
        ("--wanda_activation_strategy avg", "--wanda_activation_strategy: invalid choice: 'avg'"),
        ("--split even", "invalid choice"),
        ("--wanda_target_steps often", "timestep range 'often'"),
        ("--wanda_target_steps 500-100", "timestep range '500-100'"),
        ("--wanda_target_steps 100-100", "timestep range '100-100'"),
        ("--wanda_target_steps 100-", "timestep range '100-'"),
        ("--wanda_target_steps=-5-10", "timestep range '-5-10'"),
        ("--wanda_calib_steps 0", "--wanda_calib_steps: must be a whole number of at least 1; got 0"),
        ("--batch_size 1.5", "whole number"),
        ("--num_samples -1", "at least 0"),
        ("--seed -1", "at least 0"),
        ("--seed 99999999999999999999", "whole number"),
        ("--target_macs many", "'many' is neither a number such as 3.4G nor a share such as 56%"),
        ("--target_macs 0", "not a positive number"),
        ("--target_macs 120%", "not a share between"),
        ("--target_params nan", "not a positive number"),
        ("--device tpu9", "device 'tpu9'"),
        ("--device cuda:99", "device 'cuda:99'"),
        ("--dtype int4", "invalid choice"),
        ("--unknown 3", "unrecognized arguments: --unknown 3"),
        ("--seed", "expected one argument"),
        ("--load_stats missing.safetensors", "missing.safetensors does not exist"),
        ("--plan missing.json", "missing.json does not exist"),
        ("--plan .", ". is a folder; give the file in it, pruning.json"),
        ("--dry_run --analyze", "writes nothing"),
    ],
)
def test_bad_argument(refused, no_model, words, says):
    refused(*words.split(), says=says)


@pytest.mark.parametrize("words", ["--align 1000", "--min_width 4000"])
def test_a_ratio_that_would_remove_nothing(refused, words):
    refused(*flags(FAST), *words.split(), "--quiet", says="would remove nothing: widths are multiples of")


def test_a_plan_of_the_other_layout(refused, small, finished):
    refused("--model", small, "--plan", finished / "pruning.json", "--layout", "free", "--quiet", *flags(FAST), says="of the layout stock")


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, []),
        ({"thr": 0.1, "latency_mode": "eager"}, ["thr", "latency_mode"]),
        ({"thr": 0.1, "pruner": "diff-pruning"}, []),
        ({"pruner": "magnitude", "time_strategy": "max", "stats_memory": "1M"}, ["time_strategy", "stats_memory"]),
        ({"plan": "x", "pruner": "magnitude", "align": 4, "repair_images": 8}, ["pruner", "align"]),
        ({"repair": "none", "repair_images": 8, "offload": True}, ["repair_images", "offload"]),
        ({"target_latency": "0.5x", "latency_batch": 4}, []),
    ],
    ids=lambda value: "-".join(value) or "none",
)
def test_options_without_effect_are_named(options, names):
    found = pruning.PruneOptions(**options).idle()
    assert [line.split(" has no effect: ")[0] for line in found] == names


def test_a_run_says_what_has_no_effect(small, capsys):
    assert cli("--model", small, "--dry_run", "--thr", "0.2", *flags(FAST)) == 0
    assert "thr has no effect: it is for the pruner diff-pruning, not magnitude\n" in capsys.readouterr().out


def test_a_range_beyond_the_schedule_is_found_before_the_calibration(refused, monkeypatch):
    from wanda_fast import data

    monkeypatch.setattr(data, "load_images", lambda *a, **k: pytest.fail("images were read"))
    refused("--wanda_target_steps", "900-2000", says=["900-2000", "1000 timesteps"])


def test_an_unreachable_budget_is_refused(refused):
    refused(*flags(FAST), "--target_macs", "0.01%", says=["cannot be reached", "the smallest legal network"])


# ----------------------------------------------------------------------------------------------------------------- images


def test_missing_image_folder(refused, no_model):
    refused("--dataset", "no/such/folder", says=["no/such/folder", "no such image folder"])


def test_empty_image_folder(refused, no_model, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("--dataset", tmp_path / "empty", says="holds no images")


def test_unreadable_images_are_named(refused, small, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 30)).save(tmp_path / "images" / "good.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"not an image")
    refused("--model", small, "--dataset", tmp_path / "images", says=["unreadable images", "bad.png"])


def test_cifar10_without_a_folder(refused, no_model):
    refused("--dataset", "cifar10", says="--data_dir")


def test_pickled_cifar10_is_refused(refused, no_model, tmp_path):
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    refused("--dataset", "cifar10", "--data_dir", tmp_path / "data", says="pickle")


# ----------------------------------------------------------------------------------------------------------------- models


def test_missing_model_folder(refused):
    refused("--model", "./no/such/model", says=["no/such/model", "no such folder"])


def test_hub_id_without_network(tmp_path):
    code = "import sys; from wanda_fast.cli import main; sys.exit(main(['prune', '--model', 'someone/some-model']))"
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    (tmp_path / "here").mkdir()
    done = script(code, env=env, cwd=tmp_path / "here")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("wanda-fast: error: someone/some-model:") and done.stderr.count("\n") == 1, done.stderr
    assert "give that folder" in done.stderr and not list((tmp_path / "here").iterdir())


def test_folder_without_a_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused("--model", tmp_path / "empty", says="no UNet2DModel")


def test_another_class(refused, copied):
    config = json.loads((copied / "unet" / "config.json").read_text())
    (copied / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))
    refused("--model", copied, says="UNet2DConditionModel")


def test_pickle_only_checkpoint(refused, copied):
    (copied / "unet" / WEIGHTS).rename(copied / "unet" / "diffusion_pytorch_model.bin")
    refused("--model", copied, says=["pickled", "refused", "save_pretrained"])


def test_truncated_weights(refused, copied):
    file = copied / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    refused("--model", copied, says=[WEIGHTS, "truncated"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_name_the_tensor(refused, copied, bad):
    file = copied / "unet" / WEIGHTS
    weights = load_file(file)
    weights["mid_block.resnets.0.conv1.weight"][3, 2, 1, 1] = bad
    save_file(weights, file)
    refused("--model", copied, says="mid_block.resnets.0.conv1.weight")


def test_misshapen_weights_name_the_tensor(refused, copied):
    file = copied / "unet" / WEIGHTS
    weights = load_file(file)
    weights["conv_in.weight"] = weights["conv_in.weight"][:8].clone()
    save_file(weights, file)
    refused("--model", copied, says="conv_in.weight")


def test_non_finite_activations_name_the_layer(refused, copied):
    file = copied / "unet" / WEIGHTS
    weights = load_file(file)
    weights["conv_in.weight"] *= 1e38
    save_file(weights, file)
    refused("--model", copied, *flags({**TINY, "calib_steps": 2, "num_inference_steps": 1}), "--quiet", "--dataset",
            images(copied.parent), says=["down_blocks.0", "NaN or Inf"], code=1)  # fmt: skip


def images(parent: Path) -> Path:
    folder = parent / "images"
    folder.mkdir()
    Image.new("RGB", (20, 30), "teal").save(folder / "a.png")
    return folder


def test_a_free_layout_result_is_not_pruned_again(refused, small, tmp_path):
    wanda_fast.prune(small, save_path=tmp_path / "free", layout="free", dataset=str(images(tmp_path)), **FAST)
    refused("--model", tmp_path / "free", says="already pruned")


# ------------------------------------------------------------------------------------------------- statistics and plans


def test_statistics_of_another_model(refused, finished):
    refused(*flags(TINY), "--load_stats", finished / "activation_stats.safetensors", says="another architecture")


def test_statistics_of_other_weights(refused, finished, copied):
    file = copied / "unet" / WEIGHTS
    weights = load_file(file)
    weights["conv_in.weight"] += 1
    save_file(weights, file)
    refused("--model", copied, "--load_stats", finished / "activation_stats.safetensors", says="other weights")


@pytest.mark.parametrize("damage", ["truncated", "other file", "text"])
def test_damaged_statistics(refused, small, finished, tmp_path, damage):
    file = tmp_path / "stats.safetensors"
    source = finished / (WEIGHTS if damage == "other file" else "activation_stats.safetensors")
    blob = source.read_bytes()
    file.write_bytes({"truncated": blob[: len(blob) // 2], "other file": blob, "text": b"hello"}[damage])
    refused("--model", small, "--load_stats", file, says="stats.safetensors")


def test_plan_of_another_model(refused, finished):
    refused(*flags(FAST), "--plan", finished / "pruning.json", says="another")


@pytest.mark.parametrize("damage", ["truncated", "not a plan", "index out of range", "unsorted", "slot missing"])
def test_damaged_plan(refused, small, finished, tmp_path, damage):
    text = (finished / "pruning.json").read_text()
    plan = json.loads(text)["plan"]
    slots = plan["slots"]
    first = next(iter(slots))
    if damage == "index out of range":
        slots[first][-1] = 10**6
    elif damage == "unsorted":
        slots[first].reverse()
    elif damage == "slot missing":
        del slots[first]
    file = tmp_path / "plan.json"
    file.write_text({"truncated": text[:200], "not a plan": '{"a": 1}'}.get(damage, json.dumps(plan)))
    line = refused("--model", small, *flags(FAST), "--plan", file, says="")
    assert first in line or "plan" in line


# ---------------------------------------------------------------------------------------------------------------- targets


def test_target_that_is_not_empty(refused, no_model, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "thesis.txt").write_text("mine")
    refused("--out", tmp_path / "old", says=["not empty", "--overwrite"])


def test_overwrite_replaces_it(tmp_path, small, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "thesis.txt").write_text("mine")
    assert cli("--model", small, "--out", tmp_path / "old", "--overwrite", *flags(FAST)) == 0
    assert not (tmp_path / "old" / "thesis.txt").exists() and (tmp_path / "old" / "pruning.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old"]


def test_target_that_appears_during_the_run(small, tmp_path, monkeypatch, capsys):
    """It is left alone, and the work is not lost either."""
    measure = pruning._Run.measure

    def appear(run, *images):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        measure(run, *images)

    monkeypatch.setattr(pruning._Run, "measure", appear)
    assert cli("--model", small, "--out", tmp_path / "out", *flags(FAST), "--json") == 0
    captured = capsys.readouterr()
    assert f"the result is in {tmp_path / 'out-2'}" in captured.err
    assert json.loads(captured.out)["path"] == str(tmp_path / "out-2")
    assert tree(tmp_path / "out") == ["thesis.txt"] and complete(tmp_path / "out-2")


def test_overwrite_spares_the_current_folder(no_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "keep.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert cli("--out", ".", "--overwrite") == 2
    assert "refusing to overwrite" in capsys.readouterr().err and tree(tmp_path) == ["keep.txt"]


def test_target_below_a_file(refused, no_model, tmp_path):
    (tmp_path / "file").write_text("x")
    refused("--out", tmp_path / "file" / "out", says="file")


def test_target_is_a_file(refused, no_model, tmp_path):
    (tmp_path / "file").write_text("x")
    refused("--out", tmp_path / "file", "--overwrite", says="not a folder")


def test_unwritable_target(refused, no_model, tmp_path):
    if os.geteuid() == 0:
        place = Path("/proc")  # root writes everywhere else
        if not place.is_dir():
            pytest.skip("runs as root on a system without /proc: every place is writable")
    else:
        place = tmp_path / "locked"
        place.mkdir(mode=0o500)
    refused("--out", place / "out", says="cannot write into")


def test_analysis_that_cannot_be_written(refused, no_model, tmp_path):
    (tmp_path / "a.png").write_text("x")
    refused("--save_analysis", tmp_path / "a.png", says=["a.png", "--overwrite"])
    refused("--save_analysis", tmp_path / "a.png" / "b.json", says="not a folder")


# ------------------------------------------------------------------------------------------------------ full disk, kills


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A filesystem of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], capture_output=True, text=True) \
        if shutil.which("mount") else None  # fmt: skip
    if made is None or made.returncode != 0:
        pytest.skip(f"no small filesystem can be mounted here: {made.stderr.strip() if made else 'no mount command'}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_full_disk_is_found_before_any_work(refused, small, tiny_disk, monkeypatch):
    monkeypatch.setattr(pruning._Run, "calibrate", lambda *a: pytest.fail("the calibration began"))
    refused("--model", small, "--out", tiny_disk / "out", *flags(FAST), says="MiB free")


def test_disk_that_fills_up_while_saving(refused, small, tiny_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "saved_bytes", lambda *a, **k: 0)  # as if another program wrote meanwhile
    refused("--model", small, "--out", tiny_disk / "a" / "out", "--dataset", images(tmp_path), *flags(FAST),
            "--quiet", says="writing failed")  # fmt: skip
    assert not list(tiny_disk.iterdir())


def test_file_size_limit(small, tmp_path):
    """The same without a mount: files above a limit cannot be written."""
    code = """
import resource, signal, sys
from wanda_fast.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(main(["prune", *sys.argv[1:]]))
"""
    (tmp_path / "here").mkdir()
    words = ["--model", small, "--out", tmp_path / "here" / "a" / "out", "--quiet", "--dataset", images(tmp_path), *flags(FAST)]
    done = script(code, *words)
    assert done.returncode == 2 and "writing failed" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list((tmp_path / "here").iterdir())


SIGNALS = """
import os, signal, sys
# A background job starts its children with SIGINT ignored; the program is tested as a terminal starts it.
signal.signal(signal.SIGINT, signal.default_int_handler)
import wanda_fast.calibrate, wanda_fast.checkpoint, wanda_fast.model_card, wanda_fast.sampling
from wanda_fast.cli import main
module, name, when, number = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
module = sys.modules[f"wanda_fast.{module}"]
original = getattr(module, name)
def replacement(*args, **kwargs):
    if when == "before":
        os.kill(os.getpid(), number)
    result = original(*args, **kwargs)
    os.kill(os.getpid(), number)
    return result
setattr(module, name, replacement)
sys.exit(main(["prune", *sys.argv[5:]]))
"""
STAGES = [
    ("calibrate", "collect_layers", "before"), ("checkpoint", "save_folder", "after"), ("model_card", "write", "after"),
    ("checkpoint", "_commit", "after"),
]  # fmt: skip


def run_and_signal(small: Path, out: Path, stage: tuple[str, str, str], number: int) -> subprocess.CompletedProcess:
    options = flags({**TINY, "calib_steps": 4, "num_samples": 1, "num_inference_steps": 1})
    return script(SIGNALS, *stage, number, "--model", small, "--out", out, "--overwrite", "--quiet", "--dataset",
                  out.parent.parent / "images", *options)  # fmt: skip


def complete(folder: Path) -> bool:
    """The new result, whole: it opens, and its report agrees with it."""
    report = json.loads((folder / "pruning.json").read_text())
    unet = DDPMPipeline.from_pretrained(folder).unet
    return sum(p.numel() for p in unet.parameters()) == report["pruned"]["params"] and not (folder / "old.txt").exists()


@pytest.mark.parametrize("stage", STAGES, ids="-".join)
def test_kill_leaves_the_old_folder_or_the_new_one(small, tmp_path, stage):
    images(tmp_path)
    place = tmp_path / "place"
    out = place / "out"
    out.mkdir(parents=True)
    (out / "old.txt").write_text("old")
    done = run_and_signal(small, out, stage, signal.SIGKILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if stage[1:] == ("_commit", "after"):
        assert complete(out)
    else:
        assert tree(out) == ["old.txt"]
    # What a killed process could not remove, the next run does.
    assert cli("--model", small, "--out", out, "--overwrite", "--dataset", tmp_path / "images", *flags(FAST)) == 0
    assert [p.name for p in place.iterdir()] == ["out"] and complete(out)


@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [
        (("calibrate", "collect_layers", "after"), signal.SIGINT, 130),
        (("checkpoint", "save_folder", "after"), signal.SIGINT, 130),
        (("model_card", "write", "before"), signal.SIGTERM, 143),
    ],
    ids=["calibration-interrupt", "save-interrupt", "save-terminate"],
)
def test_interrupts_leave_nothing(small, tmp_path, stage, number, code):
    images(tmp_path)
    place = tmp_path / "place"
    place.mkdir()
    done = run_and_signal(small, place / "out", stage, number)
    assert done.returncode == code
    assert "nothing unfinished is left behind" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(place.iterdir())
