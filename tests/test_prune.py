"""The whole recipe on the bundled model: what is written, that it can be repeated, and that every option is honoured."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from networks import PLAIN, random_unet
from PIL import Image
from runs import FAST, ROOT, TINY, tree
from runs import one_thread as one_thread
from safetensors import safe_open
from safetensors.torch import load_file

import wanda_fast
from wanda_fast import checkpoint, importance, model_card, pruning
from wanda_fast.errors import UserError
from wanda_fast.stats import ActivationStats

FILES = [  # the list under "Formats", with an analysis
    "README.md",
    "activation_stats.safetensors",
    "config.json",
    "config.yaml",
    "diffusion_pytorch_model.safetensors",
    "model_index.json",
    "pruning.json",
    "scheduler/scheduler_config.json",
    "vis/after_pruning.png",
    "vis/before_pruning.png",
    "wanda_analysis.png",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pruning.PruneResult:
    """A pruned folder. 96 calibration images: enough that a bin of timesteps holds several samples."""
    folder = tmp_path_factory.mktemp("prune") / "out"
    return wanda_fast.prune(save_path=folder, analyse=True, ratio=0.3, **{**TINY, "calib_steps": 96})


@pytest.fixture(scope="module")
def stats_file(made: pruning.PruneResult) -> str:
    return str(folder_of(made) / "activation_stats.safetensors")


@pytest.fixture(scope="module")
def bundled() -> DDPMPipeline:
    loaded = checkpoint.load_pipeline(None)
    return DDPMPipeline(unet=loaded.unet, scheduler=loaded.scheduler)


@pytest.fixture(scope="module")
def small() -> DDPMPipeline:
    """A network so small that whole runs are cheap."""
    from networks import random_unet

    return DDPMPipeline(unet=random_unet("plain"), scheduler=DDPMScheduler())


def folder_of(result: pruning.PruneResult) -> Path:
    assert result.path is not None
    return result.path


def weights(result: pruning.PruneResult) -> dict[str, torch.Tensor]:
    assert result.pipeline is not None
    return result.pipeline.unet.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def kept(result: pruning.PruneResult) -> dict[str, list[int]]:
    return {name: k.tolist() for name, k in result.plan.keep.items()}


# ------------------------------------------------------------------------------------------------------------ the folder


def test_the_folder_holds_exactly_the_documented_files(made):
    assert tree(folder_of(made)) == FILES
    assert tree(folder_of(made).parent) == [f"out/{name}" for name in FILES]  # nothing beside it


def test_pruning_json(made):
    report = json.loads((folder_of(made) / "pruning.json").read_text())
    assert report["asked"] == {"ratio": 0.3}
    assert 0.2 < report["reached"]["ratio"] < 0.4
    unet = DDPMPipeline.from_pretrained(folder_of(made)).unet
    assert report["pruned"]["params"] == sum(p.numel() for p in unet.parameters())
    assert report["dense"] == {"params": 6_079_811, "macs": 1_025_605_632}
    assert report["pruned"]["macs"] < report["dense"]["macs"]
    assert report["plan"]["slots"] == kept(made)
    assert report["seed"] == 0 and report["settings"]["calib_steps"] == 96
    assert set(report["settings"]) == {f.name for f in dataclasses.fields(pruning.PruneOptions)}
    assert report["versions"]["torch"] == torch.__version__ and report["versions"]["wanda_fast"] == wanda_fast.__version__
    quality = report["quality"]
    assert 0 < quality["ssim"] < 1 and quality["psnr"] > 0 and quality["noise_mse"] > 0
    assert quality["file_bytes"]["pruned"] == (folder_of(made) / checkpoint.WEIGHTS).stat().st_size
    assert all(quality["forward_seconds"][which] > 0 for which in ("dense", "pruned"))
    assert {"load", "calibrate", "plan", "compact", "sample", "measure"} <= set(report["seconds"])


def test_the_sizes_agree_with_a_count(made, bundled):
    from wanda_fast import evaluation

    unet = made.pipeline.unet
    assert made.report["pruned"] == {"params": evaluation.count_params(unet), "macs": evaluation.count_macs(unet)}
    assert made.report["dense"]["macs"] == evaluation.count_macs(bundled.unet)


def test_weights_on_disk_are_those_in_memory(made):
    on_disk = load_file(folder_of(made) / checkpoint.WEIGHTS)
    assert same(on_disk, weights(made))
    assert {t.dtype for t in on_disk.values()} == {torch.float16}  # as the bundled model's own


def test_nothing_written_names_a_path_of_this_machine(made):
    private = [str(folder_of(made).parent), str(ROOT), str(Path.home())]
    for name in tree(folder_of(made)):
        blob = (folder_of(made) / name).read_bytes()
        assert not any(p.encode() in blob for p in private if len(p) > 5), name


def test_every_file_can_be_read_by_others(made):
    modes = {name: (folder_of(made) / name).stat().st_mode & 0o777 for name in FILES}
    assert len(set(modes.values())) == 1, modes


def test_pictures(made):
    before, after = (np.asarray(Image.open(folder_of(made) / "vis" / f"{w}_pruning.png")) for w in ("before", "after"))
    assert before.shape == after.shape and before.std() > 20 and (before != after).any()
    figure = Image.open(folder_of(made) / "wanda_analysis.png")
    assert min(figure.size) > 600


def test_the_analysis_covers_every_layer(made):
    assert made.stats is not None
    assert set(made.report["analysis"]["layers"]) == set(made.stats.tables)


def test_statistics_on_disk_are_those_in_memory(made, stats_file):
    read = ActivationStats.load(stats_file)
    assert read.tables.keys() == made.stats.tables.keys()
    assert all(torch.equal(read.tables[n], made.stats.tables[n]) for n in read.tables)
    assert len(read.timesteps) == 96


def test_safetensors_headers_hold_no_code(made):
    with safe_open(folder_of(made) / checkpoint.WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


# --------------------------------------------------------------------------------------------------------- the model card


def test_model_card(made):
    from huggingface_hub import ModelCard

    card = ModelCard((folder_of(made) / "README.md").read_text())
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "unconditional-image-generation"
    assert [m["type"] for m in data["model-index"][0]["results"][0]["metrics"]] == ["ssim", "psnr", "mse"]
    assert "6,079,811" in card.text and f"{made.report['pruned']['params']:,}" in card.text
    assert "DDPMPipeline.from_pretrained" in card.text


def test_model_card_command_asks_for_the_same(made):
    from wanda_fast.cli import prune as command
    from wanda_fast.cli.parser import Parser

    words = shlex.split(model_card.command(made.report))
    assert words[:2] == ["wanda-fast", "prune"]
    parser = Parser("wanda-fast prune", "")
    command.add_arguments(parser)
    args = vars(parser.parse_args(words[2:]))
    assert {k: v for k, v in made.report["settings"].items() if args[k] != v} == {}
    assert args["model"] is None


def test_model_card_of_a_hub_model_names_its_base(made):
    report = {**made.report, "source": "hub", "model": "x", "base_model": "someone/x"}
    report["plan"] = {**report["plan"], "layout": "free"}
    text = model_card.text(report)
    assert "base_model: someone/x\n" in text and "--model someone/x" in text
    assert "load_pruned" in text and "library_name: wanda_fast" in text


# ------------------------------------------------------------------------------------------------------------ repeating


def test_replaying_a_plan_gives_the_same_weights(made):
    options = {**TINY, "calib_steps": 96, "num_samples": 0}  # the settings of `made`
    again = wanda_fast.prune(plan=str(folder_of(made) / "pruning.json"), **options)
    assert kept(again) == kept(made) and again.stats is None
    assert same(weights(again), weights(made))


def test_a_replayed_plan_is_repaired_alike(small, tmp_path):
    options = {**TINY, "repair": "lstsq", "num_samples": 0}
    first = wanda_fast.prune(small, save_path=tmp_path / "out", **options)
    again = wanda_fast.prune(small, plan=str(tmp_path / "out" / "pruning.json"), **options)
    assert first.report["repair"]["layers"] and same(weights(again), weights(first))


def test_the_same_seed_gives_the_same_result(small):
    one, other = (wanda_fast.prune(small, **{**TINY, "repair": "lstsq"}) for _ in range(2))
    assert kept(one) == kept(other) and same(weights(one), weights(other))
    assert one.report["quality"]["ssim"] == other.report["quality"]["ssim"]


def test_another_seed_gives_another_random_choice():
    plans = [kept(wanda_fast.prune(dry_run=True, **{**FAST, "pruner": "random", "seed": seed})) for seed in (0, 1, 0)]
    assert plans[0] != plans[1] and plans[0] == plans[2]


def test_saved_statistics_give_the_plan_of_a_calibration(stats_file):
    for strategy in ("mean", "max"):
        saved = wanda_fast.prune(dry_run=True, load_stats=stats_file, time_strategy=strategy, **TINY)
        fresh = wanda_fast.prune(dry_run=True, **{**TINY, "calib_steps": 96, "time_strategy": strategy})
        assert kept(saved) == kept(fresh)


# ------------------------------------------------------------------------------------------------------------ strategies


def slot_scores(stats: ActivationStats, unet: Any, **strategy: str) -> dict[str, torch.Tensor]:
    from wanda_fast.slots import find_slots

    norms = {layer: stats.act_norm(layer, **strategy) for layer in stats.tables}
    context = importance.Context(norms)
    return importance.slot_scores(unet, find_slots(unet), importance.get_criterion("wanda-diff"), context)


@pytest.mark.parametrize(
    ("which", "values"),
    [
        ("time_strategy", ["mean", "max", "median", "weighted_mean"]),
        ("activation_strategy", ["mean", "max", "median"]),
        ("target_steps", ["all", "early", "late", "middle", "300-400"]),
    ],
)
def test_every_strategy_gives_its_own_score_table(made, bundled, which, values):
    tables = {v: slot_scores(made.stats, bundled.unet, **{which: v}) for v in values}
    for one, other in itertools.combinations(values, 2):
        assert any(not torch.equal(tables[one][n], tables[other][n]) for n in tables[one]), (one, other)


def test_target_steps_bound_the_calibration():
    result = wanda_fast.prune(dry_run=True, **{**TINY, "target_steps": "300-400"})
    assert result.stats is not None
    assert 300 <= int(result.stats.timesteps.min()) and int(result.stats.timesteps.max()) < 400


def test_trajectory_mode(small):
    result = wanda_fast.prune(small, timesteps="trajectory", **{**TINY, "repair": "bias", "num_samples": 0})
    assert result.stats is not None
    assert result.stats.info["mode"] == "trajectory" and len(result.stats.timesteps) == 16
    assert result.report["repair"]["images"] == 16


OPTIONS = [
    {"pruner": "magnitude"}, {"pruner": "random"}, {"combine": "producers"}, {"combine": "consumers"},
    {"norm_policy": "balanced"}, {"norm_policy": "groups"}, {"align": 32}, {"min_width": 56},
    {"ratio": 0.5}, {"split": "sensitivity"}, {"target_macs": "50%"}, {"target_params": "2M"},
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: "-".join(f"{k}-{v}" for k, v in o.items()))
def test_every_option_changes_the_plan(made, stats_file, option):
    result = wanda_fast.prune(dry_run=True, load_stats=stats_file, **{**TINY, **option})
    assert kept(result) != kept(made) or result.plan.record != made.plan.record
    assert result.report["pruned"]["params"] < result.report["dense"]["params"]


def test_least_squares_repair_lowers_the_error_of_the_predicted_noise(made):
    options = {**TINY, "calib_steps": 96, "plan": str(folder_of(made) / "pruning.json"), "num_samples": 0}
    repaired = wanda_fast.prune(**{**options, "repair": "lstsq", "repair_images": 32})
    assert repaired.report["quality"]["noise_mse"] < 0.5 * made.report["quality"]["noise_mse"]
    assert repaired.repair.method == "lstsq" and made.repair is None


def test_a_network_of_four_channels_is_pruned_without_pictures(tmp_path):
    """A picture of its samples cannot be saved, and that must not come out at the very end."""
    unet = random_unet({**PLAIN, "sample_size": 8, "in_channels": 4, "out_channels": 4})
    said: list[str] = []
    options = {**TINY, "num_samples": 2, "calib_steps": 2}
    result = wanda_fast.prune(DDPMPipeline(unet=unet, scheduler=DDPMScheduler()), save_path=tmp_path / "out", log=said.append, **options)
    assert "no sample grids: a picture has 1 or 3 channels, this network has 4" in said
    assert not list((tmp_path / "out" / "vis").iterdir()) and result.report["reached"]["ratio"] > 0


def test_networks_and_schedulers_that_cannot_be_run_are_refused_in_one_line():
    odd = DDPMPipeline(unet=random_unet({**PLAIN, "sample_size": 9}), scheduler=DDPMScheduler())
    with pytest.raises(UserError, match="does not run on images of its own sample_size, 9 x 9"):
        wanda_fast.prune(odd, **FAST)
    flow = DDPMPipeline(unet=random_unet({**PLAIN, "sample_size": 8}), scheduler=FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler has no alphas_cumprod"):
        wanda_fast.prune(flow, **FAST)


@pytest.mark.parametrize("pruner", ["wanda-diff", "lstsq-residual"])
def test_a_network_with_a_timestep_like_class_embedding(pruner):
    pipeline = DDPMPipeline(unet=random_unet({**PLAIN, "sample_size": 8, "class_embed_type": "timestep"}), scheduler=DDPMScheduler())
    options = {**TINY, "num_samples": 0, "split": "sensitivity", "pruner": pruner, "calib_steps": 4, "repair": "lstsq", "repair_images": 8}
    result = wanda_fast.prune(pipeline, **options)
    assert len(result.plan.keep["class_embedding.linear_1"]) == len(result.plan.keep["time_embedding.linear_1"])
    assert "class_embedding.linear_2" in {r.layer for r in result.repair.layers if r.accepted}


def test_works_inside_inference_mode(small):
    options = {**TINY, "num_samples": 0, "split": "sensitivity"}
    with torch.inference_mode():
        inside = weights(wanda_fast.prune(small, **options))
    outside = weights(wanda_fast.prune(small, **options))
    assert not any(t.is_inference() for t in inside.values())
    assert inside.keys() == outside.keys() and all(torch.equal(t, outside[n]) for n, t in inside.items())


def test_repair_weighting_says_whose_fit_counts_timesteps(small):
    options = {**TINY, "num_samples": 0, "repair": "lstsq", "repair_images": 32}
    none, last, every = (weights(wanda_fast.prune(small, **options, repair_weighting=w)) for w in ("none", "last", "all"))
    assert {n.rpartition(".")[0] for n, t in none.items() if not torch.equal(t, last[n])} == {"conv_out"}
    assert len({n for n, t in none.items() if not torch.equal(t, every[n])}) > 10


def test_bias_repair_moves_biases_alone(small):
    plain, repaired = (wanda_fast.prune(small, **{**TINY, "num_samples": 0, "repair": method}) for method in ("none", "bias"))
    changed = {n for n, t in weights(plain).items() if not torch.equal(t, weights(repaired)[n])}
    assert changed and all(name.endswith(".bias") for name in changed)


# --------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(("asked", "least"), [("57%", 0.9), ("30%", 0.8), ("600M", 0.9), (0.6e9, 0.9)])
def test_a_macs_target_is_kept(asked, least):
    result = wanda_fast.prune(dry_run=True, target_macs=asked, **FAST)
    target = result.report["asked"]["target_macs"]
    assert least * target <= result.report["pruned"]["macs"] <= target
    assert result.report["asked"]["given_as"] == str(asked)


def test_a_parameter_target_is_kept():
    result = wanda_fast.prune(dry_run=True, target_params="4M", **FAST)
    assert 0.8 * 4e6 <= result.report["pruned"]["params"] <= 4e6


def test_ratio_zero_changes_nothing(bundled):
    result = wanda_fast.prune(ratio=0, **{**TINY, "repair": "lstsq", "num_samples": 1})
    expected = {n: t.half() for n, t in bundled.unet.state_dict().items()}
    assert same(weights(result), expected)
    assert result.report["quality"]["noise_mse"] == 0 and result.report["quality"]["ssim"] == 1
    assert result.report["pruned"] == result.report["dense"]


def test_a_budget_that_cannot_be_met_is_refused():
    with pytest.raises(UserError, match="cannot be reached"):
        wanda_fast.prune(dry_run=True, target_macs="0.1%", **FAST)


# ---------------------------------------------------------------------------------------------------------- free layout


def test_free_layout_opens_with_load_pruned(small, tmp_path):
    result = wanda_fast.prune(small, save_path=tmp_path / "free", layout="free", target_macs="60%", **{**TINY, "num_samples": 0})
    pipeline = wanda_fast.load_pruned(tmp_path / "free")
    assert same(pipeline.unet.state_dict(), weights(result))
    assert len(pipeline(num_inference_steps=2, output_type="np").images) == 1
    sizes = result.report["slots"].values()
    assert len({round(s["kept"] / s["dense"], 3) for s in sizes}) > 1  # its point: widths that differ


# ------------------------------------------------------------------------------------------------------------- in memory


def test_pruning_in_memory_leaves_the_pipeline_as_it_was(small):
    before = {n: t.clone() for n, t in small.unet.state_dict().items()}
    result = wanda_fast.prune(small, **TINY)
    assert result.path is None and result.pipeline is not small
    assert same(before, small.unet.state_dict())
    assert {p.dtype for p in result.pipeline.unet.parameters()} == {torch.float32}
    assert result.pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


def test_a_small_random_network_from_a_folder(tmp_path):
    """One channel, no bundled images: calibration draws its own; and a stock folder comes out."""
    from networks import random_unet

    DDPMPipeline(unet=random_unet("two_layers_one_channel"), scheduler=DDPMScheduler()).save_pretrained(tmp_path / "model")
    notes: list[str] = []
    result = wanda_fast.prune(tmp_path / "model", save_path=tmp_path / "out", log=notes.append, **{**TINY, "calib_steps": 4})
    assert "the model's own samples" in " ".join(notes)
    assert result.report["model"] == "model" and result.report["source"] == "folder"
    assert DDPMPipeline.from_pretrained(tmp_path / "out")(num_inference_steps=2, output_type="np").images.shape[-1] == 1


def test_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = wanda_fast.prune(save_path="out", dry_run=True, **FAST)
    assert result.path is None and result.pipeline is None and tree(tmp_path) == []


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="calib_step"):
        wanda_fast.prune(calib_step=3)


def test_a_backend_is_for_one_call_and_said_where_it_is_lacking(monkeypatch):
    from wanda_fast import ops

    lines: list[str] = []
    before = ops.get_backend()
    wanda_fast.prune(ratio=0.3, pruner="magnitude", split="uniform", dry_run=True, backend="reference", log=lines.append)
    assert ops.get_backend() == before
    assert not any("not written for" in line for line in lines)
    monkeypatch.setattr(ops, "homes", lambda operation: () if operation == "compact" else ("cpu", "triton"))
    if not ops.available_backends("cpu")["cpu"]:
        wanda_fast.prune(ratio=0.3, pruner="magnitude", split="uniform", dry_run=True, backend="cpu", log=lines.append)
        assert "backend cpu: not written for compact, which run on the best there is" in lines


def test_the_seconds_of_a_stage_inside_another_count_once(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr(pruning.time, "perf_counter", lambda: next(clock))
    stages = pruning._Stages(torch.device("cpu"))
    with stages("repair"), stages("images"):
        pass
    assert stages.seconds == {"images": 3.0, "repair": 7.0}


def test_bins_that_hold_one_image_each_are_still_bins():
    report = wanda_fast.prune(ratio=0.3, split="uniform", calib_steps=6, batch_size=4, stats_memory="1K", repair="none", dry_run=True).report
    assert report["reached"]["ratio"] > 0.2


@pytest.mark.parametrize(("images", "repair", "drawn"), [(None, "lstsq", 512), (4096, "lstsq", 2048), (4096, "none", 512), (64, "lstsq", 512)])
def test_how_many_calibration_images_are_drawn(monkeypatch, images, repair, drawn):
    asked = {}

    class Enough(Exception):
        pass

    def draw(spec: str, **options: Any) -> None:
        asked.update(options)
        raise Enough

    monkeypatch.setattr("wanda_fast.data.load_images", draw)
    model = DDPMPipeline(unet=random_unet(PLAIN), scheduler=DDPMScheduler())
    with pytest.raises(Enough):
        wanda_fast.prune(model, repair=repair, repair_images=images, num_samples=0, device="cpu", dtype="fp32")
    assert (asked["n"], asked["dtype"]) == (drawn, torch.float32)
