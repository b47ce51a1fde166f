"""Weights of their own for ranges of timesteps: structure, dispatch by timestep, fitting, files, and what refuses them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import CONFIGS, PLAIN, inputs_for, random_unet
from PIL import Image
from safetensors.torch import load_file

import wanda_fast
from wanda_fast import checkpoint, data, evaluation, sampling
from wanda_fast.calibrate import noised_batches
from wanda_fast.cli.compare_page import rows
from wanda_fast.compact import compact, cost_model, plan_keep
from wanda_fast.compare import compare
from wanda_fast.errors import UserError
from wanda_fast.experts import MOST, add_experts, has_experts, join, own_layers, parse_experts, read_record
from wanda_fast.export import export
from wanda_fast.finetune import finetune
from wanda_fast.plan import Target, build_plan, free_problem, uniform_widths
from wanda_fast.repair import repair
from wanda_fast.slots import find_slots

STARTS = (300, 600)
OPTIONS: dict[str, Any] = {
    "ratio": 0.3, "align": 4, "min_width": 4, "calib_steps": 32, "repair_images": 64, "num_samples": 0, "batch_size": 16,
    "layout": "free", "device": "cpu", "split": "uniform",
}  # fmt: skip


def thin_of(config: str | dict[str, Any]) -> Any:
    """A pruned network of the free layout with random weights."""
    unet = random_unet(config)
    slots = find_slots(unet)
    widths = uniform_widths(free_problem(slots, cost_model(unet, slots), "free", 4, 4), Target(ratio=0.25))
    scores = {name: torch.rand(slot.width) for name, slot in slots.slots.items()}
    return compact(unet, build_plan(slots, widths, scores, unet.config, layout="free", norm_policy="free"))


def changed(network: Any, layers: list[str], seed: int) -> Any:
    """A copy whose chosen layers have other weights."""
    other, generator = copy.deepcopy(network), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in layers:
            for parameter in other.get_submodule(name).parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return other


def with_experts(config: str | dict[str, Any] = PLAIN) -> tuple[Any, list[Any]]:
    """(a network with three experts, networks with the weights of each)."""
    thin = thin_of(config)
    own = own_layers(thin)
    parts = [thin, changed(thin, own, 1), changed(thin, own, 2)]
    return join([copy.deepcopy(p) for p in parts], STARTS, own), parts


# -------------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "value, starts",
    [(1, ()), ("1", ()), (2, (354,)), (3, (192, 544)), ("300,600", (300, 600)), ("0,500", (500,)), ("0, 10, 20", (10, 20))],
)
def test_ranges_by_number_or_by_their_beginnings(value: int | str, starts: tuple[int, ...]) -> None:
    assert parse_experts(value, 1000) == starts


@pytest.mark.parametrize("value", [0, -1, MOST + 1, "500", "600,300", "300,300", "300,1000", "300,", "two", "", "1.5", "-5,300", None])
def test_other_ranges_are_refused(value: Any) -> None:
    with pytest.raises(UserError, match="experts"):
        parse_experts(value, 1000)


def test_more_ranges_than_timesteps_are_refused() -> None:
    with pytest.raises(UserError, match="rising numbers from 1 to 3"):
        parse_experts(8, 4)


def test_what_has_one_set_of_weights_refuses_several(tmp_path: Path) -> None:
    for wrong, why in (({"layout": "stock"}, "layout free"), ({"repair": "bias"}, "repair lstsq"), ({"experts": "x"}, "experts")):
        with pytest.raises(UserError, match=why):
            wanda_fast.prune(**{**OPTIONS, "experts": 2, **wrong})
    folder = tmp_path / "experts"
    network, _ = with_experts()
    folder.mkdir()
    checkpoint.save_folder(folder, network, DDPMScheduler())
    images = torch.zeros(4, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(UserError, match="one set of weights; this one has 3"):
        wanda_fast.calibrate(network, DDPMScheduler(), images, n=4, batch_size=2)
    with pytest.raises(UserError, match="already pruned"):
        wanda_fast.prune(folder)
    for option, why in ({"feature_weight": 0.1}, "feature_weight"), ({"compile": True}, "compile"):
        with pytest.raises(UserError, match=f"experts split a batch by timestep.*{why}|{why}.*experts split"):
            finetune(folder, teacher=str(folder), save_path=tmp_path / "tuned", steps=1, device="cpu", **option)
    with pytest.raises(UserError, match="one set of weights; this one has 3"):
        export(folder, save_path=tmp_path / "exported", device="cpu")
    with pytest.raises(UserError, match="one set of weights; this one has 3"):
        find_slots(network)


# -------------------------------------------------------------------------------------------------------------- structure


def test_convolutions_on_small_maps_are_shared() -> None:
    own = set(own_layers(random_unet(PLAIN)))  # 16, 8 and 4 pixels
    assert {"conv_in", "conv_out", "conv_norm_out", "time_embedding.linear_1", "down_blocks.1.resnets.0.conv1"} <= own
    assert {"down_blocks.2.resnets.0.time_emb_proj", "mid_block.resnets.0.time_emb_proj", "up_blocks.2.resnets.0.norm1"} <= own
    assert not {"down_blocks.2.resnets.0.conv1", "mid_block.resnets.0.conv1", "up_blocks.0.resnets.0.norm1"} & own


@pytest.mark.parametrize("config", ["plain", "heads", "classes", "class_timestep", "scale_shift", "resnet_resampling", "no_mid", "learned"])
@torch.no_grad()
def test_each_sample_goes_through_the_weights_of_its_timestep(config: str) -> None:
    whole, parts = with_experts(CONFIGS[config])
    last = CONFIGS[config].get("num_train_timesteps") or 1000
    if last < 1000:
        whole.expert_starts = (30, 60)
    inputs = inputs_for(whole, 3)
    first, second = whole.expert_starts
    mixed = torch.tensor([last - 1, first - 1, second - 1])  # not in the order of the ranges
    out = whole(**{**inputs, "timestep": mixed}).sample
    for row, part in zip(range(3), (parts[2], parts[0], parts[1]), strict=True):
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        alone = part(**{**one, "timestep": mixed[row : row + 1]}).sample
        torch.testing.assert_close(out[row : row + 1], alone, rtol=1e-4, atol=1e-5)
        others = [p(**{**one, "timestep": mixed[row : row + 1]}).sample for p in parts if p is not part]
        assert all((o - alone).abs().max() > 1e-3 for o in others)
    for at, part in ((first - 1, parts[0]), (first, parts[1]), (second - 1, parts[1]), (second, parts[2])):
        labels = inputs.get("class_labels")
        want = part(inputs["sample"], torch.full((3,), at), class_labels=labels).sample
        for timestep in (at, torch.tensor(at), torch.tensor([at]), torch.full((3,), at)):
            tuple_ = whole(inputs["sample"], timestep, class_labels=labels, return_dict=False)
            torch.testing.assert_close(tuple_[0], want, rtol=1e-4, atol=1e-5)


def test_shared_layers_are_one_module_and_every_tensor_is_stored_once() -> None:
    thin = thin_of(PLAIN)
    own = own_layers(thin)
    whole = copy.deepcopy(thin)
    add_experts(whole, STARTS, own)
    for network in (whole, copy.deepcopy(whole)):
        for number, twin in enumerate(network.expert_twins):
            assert twin.mid_block.resnets[0].conv1 is network.mid_block.resnets[0].conv1
            assert twin.conv_in is network.experts[number].conv_in is not network.conv_in
    state = whole.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    extra = sum(p.numel() for name in own for p in thin.get_submodule(name).parameters())
    assert evaluation.count_params(whole) == evaluation.count_params(thin) + 2 * extra
    assert evaluation.count_macs(whole) == evaluation.count_macs(thin)
    assert has_experts(whole) and not has_experts(thin) and "experts" not in thin.config["pruning"]
    double = whole.double()
    assert all(p.dtype == torch.float64 for twin in double.expert_twins for p in twin.parameters())


def test_gradients_reach_the_weights_of_the_sample_s_range_alone() -> None:
    whole, _ = with_experts()
    whole.requires_grad_(True)
    whole(torch.randn(2, 3, 16, 16), torch.tensor([10, 400])).sample.square().sum().backward()
    assert whole.conv_in.weight.grad is not None and whole.experts[0].conv_in.weight.grad is not None
    assert whole.experts[1].conv_in.weight.grad is None and whole.mid_block.resnets[0].conv1.weight.grad is not None


@torch.no_grad()
def test_compiled_it_takes_the_same_weights() -> None:
    whole, parts = with_experts()
    fast = torch.compile(copy.deepcopy(whole), backend="eager", dynamic=False)
    x = torch.randn(2, 3, 16, 16)
    for at, part in ((10, parts[0]), (400, parts[1]), (900, parts[2]), (20, parts[0])):
        t = torch.full((2,), at)
        torch.testing.assert_close(fast(x, t).sample, part(x, t).sample, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------------ files


@torch.no_grad()
def test_a_folder_opens_as_it_was_saved(tmp_path: Path) -> None:
    whole, _ = with_experts()
    with checkpoint.atomic_folder(tmp_path / "out") as folder:
        checkpoint.save_folder(folder, whole, DDPMScheduler())
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([10, 400, 900])
    want = whole(x, t).sample
    for network in (wanda_fast.load_pruned(tmp_path / "out").unet, DDPMPipeline.from_pretrained(tmp_path / "out").unet):
        assert network.expert_starts == STARTS
        assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), whole.state_dict().values(), strict=True))
        torch.testing.assert_close(network(x, t).sample, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "entry, why",
    [
        ({}, "damaged"), ([], "damaged"), ({"starts": [300]}, "damaged"), ({"starts": [600, 300], "layers": ["conv_in"]}, "rising"),
        ({"starts": [], "layers": ["conv_in"]}, "rising"), ({"starts": [0], "layers": ["conv_in"]}, "rising"),
        ({"starts": list(range(1, MOST + 1)), "layers": ["conv_in"]}, "rising"), ({"starts": [1e400], "layers": ["conv_in"]}, "damaged"),
        ({"starts": [300], "layers": []}, "different layers"), ({"starts": [300], "layers": ["conv_in"] * 2}, "different layers"),
        ({"starts": [300], "layers": ["nowhere"]}, "no layer nowhere"), ({"starts": [300], "layers": ["mid_block"]}, "no layer mid_block"),
    ],
)  # fmt: skip
def test_damaged_records_are_refused(tmp_path: Path, entry: Any, why: str) -> None:
    whole, _ = with_experts()
    with checkpoint.atomic_folder(tmp_path / "out") as folder:
        checkpoint.save_folder(folder, whole, DDPMScheduler())
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    config["pruning"]["experts"] = entry
    file.write_text(json.dumps(config).replace("Infinity", "1e400"))
    with pytest.raises(UserError, match=why) as caught:
        checkpoint.load_pipeline(tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_record_says_ranges_and_layers() -> None:
    whole, _ = with_experts()
    record = whole.config["pruning"]["experts"]
    assert read_record(record) == (STARTS, own_layers(thin_of(PLAIN)))
    assert json.loads(json.dumps(record)) == record


# ---------------------------------------------------------------------------------------------------------------- fitting


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    DDPMPipeline(unet=random_unet(PLAIN), scheduler=DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of prune, with images to calibrate on: soft blobs, which are drawn faster than samples."""
    folder, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(3)
    coarse = torch.rand(64, 3, 4, 4, generator=generator)
    for i, image in enumerate(torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    return {**OPTIONS, "dataset": str(folder)}


@pytest.fixture(scope="module")
def made(model: Path, options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("experts") / "out"
    return wanda_fast.prune(model, save_path=folder, experts="300,600", **options)


def batches_of(loaded: Any, options: dict[str, Any], **how: Any) -> list[Any]:
    images = data.load_images(options["dataset"], n=64, unet=loaded.unet, scheduler=loaded.scheduler)
    found = noised_batches(loaded.unet, loaded.scheduler, images, n=64, batch_size=16, **how)
    return [(x, t, labels) for x, t, _, labels in found]


def errors(model: Path, options: dict[str, Any], network: Any, low: int, high: int) -> float:
    """Squared error of the predicted noise on noise and timesteps of a range that no fit has seen."""
    loaded = checkpoint.load_pipeline(model)
    return evaluation.noise_mse(loaded.unet, network, batches_of(loaded, options, target=(low, high), seed=991)).mse


def test_every_range_gets_nearer_to_the_dense_network(model: Path, options: dict[str, Any], made: Any) -> None:
    single = wanda_fast.prune(model, **options)
    assert single.plan.to_dict() == made.plan.to_dict()
    for low, high in ((0, 300), (300, 600), (600, 1000)):
        assert errors(model, options, made.network, low, high) < errors(model, options, single.network, low, high), low


def test_the_report_tells_what_was_fitted(made: Any) -> None:
    report = made.report
    assert report["experts"]["ranges"] == [[0, 300], [300, 600], [600, 1000]]
    assert report["experts"]["own_layers"] == own_layers(made.network.expert_twins[0])
    assert report["pruned"]["params"] == evaluation.count_params(made.network)
    assert report["pruned"]["macs"] == evaluation.count_macs(made.network)
    names = set(report["experts"]["own_layers"])
    for fit in report["experts"]["repairs"]:
        told = {r["layer"] for r in fit["layers"]}
        assert told and told <= names and fit["images"] == OPTIONS["repair_images"]
    shared = made.network.mid_block.resnets[0].conv1
    assert all(twin.mid_block.resnets[0].conv1 is shared for twin in made.network.expert_twins)
    assert {p.name for p in (made.path / "vis").iterdir()} == {"repair.png", *(f"repair_t{low:04d}.png" for low in (0, 300, 600))}
    assert "Each of 3 ranges of timesteps (from 0, 300, 600)" in (made.path / "README.md").read_text()


def test_a_dry_run_counts_every_set_of_weights(model: Path, options: dict[str, Any], made: Any) -> None:
    dry = wanda_fast.prune(model, dry_run=True, experts="300,600", **options)
    assert dry.report["pruned"] == made.report["pruned"]
    budget = int(0.8 * made.report["pruned"]["params"])
    within = wanda_fast.prune(model, dry_run=True, experts="300,600", **{**options, "target_params": budget})
    assert within.report["pruned"]["params"] <= budget < 1.4 * within.report["pruned"]["params"]


def test_with_nothing_removed_one_set_of_weights_is_enough(model: Path, options: dict[str, Any]) -> None:
    result = wanda_fast.prune(model, experts=2, **{**options, "ratio": 0.0})
    assert not has_experts(result.network) and "experts" not in result.report
    assert result.report["pruned"] == result.report["dense"]


def test_a_saved_plan_and_an_unfinished_run_give_the_same(model: Path, options: dict[str, Any], made: Any, tmp_path: Path) -> None:
    again = wanda_fast.prune(
        model, save_path=tmp_path / "again", plan=str(made.path / "pruning.json"), resume=True, experts="300,600", **options
    )
    one, two = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (made.path, again.path))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert any(k.startswith("experts.1.") for k in one) and not list(tmp_path.glob("*.unfinished"))


def test_samples_do_not_depend_on_the_batch(made: Any) -> None:
    loaded = checkpoint.load_pipeline(made.path)
    draw = [sampling.sample(loaded.unet, loaded.scheduler, 5, steps=4, batch_size=size) for size in (2, 8)]
    assert torch.equal(*draw)
    images = wanda_fast.load_pruned(made.path)(batch_size=1, num_inference_steps=3, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_evaluation_and_comparison_take_experts(model: Path, made: Any) -> None:
    found = evaluation.evaluate(made.path, model, n=4, steps=2, noise_images=8, batch_size=4, device="cpu")
    assert found["model"]["params"] == evaluation.count_params(made.network)
    report, _ = compare([model, made.path], n=2, steps=2, noise_images=4, batch_size=2, device="cpu")
    assert [m["experts"] for m in report["models"]] == [1, 3]
    (layout,) = (line for line in rows(report) if line[0] == "layout")
    assert layout[1:] == (["stock", "free"], ["", "3 experts"])


def test_training_reaches_every_expert_and_keeps_them(model: Path, options: dict[str, Any], made: Any, tmp_path: Path) -> None:
    """One image a step: each step trains the range of its timestep alone."""
    result = finetune(
        made.path, teacher=str(model), dataset=options["dataset"], save_path=tmp_path / "tuned", steps=6, batch_size=1, warmup=0, lr=1e-2,
        ema_decay=0.0, weight_decay=0.0, num_samples=1, num_inference_steps=2, validate_every=6, save_every=1, device="cpu",
    )  # fmt: skip
    before, after = (load_file(p / checkpoint.WEIGHTS) for p in (made.path, result.path))
    assert before.keys() == after.keys()
    for name in ("conv_in.weight", "experts.0.conv_in.weight", "experts.1.conv_in.weight", "mid_block.resnets.0.conv1.weight"):
        assert not torch.equal(before[name], after[name]), name
    assert has_experts(wanda_fast.load_pruned(result.path).unet)


def test_the_repair_of_chosen_layers_leaves_the_others(model: Path, options: dict[str, Any]) -> None:
    loaded = checkpoint.load_pipeline(model)
    result = wanda_fast.prune(model, **{**options, "repair": "none"})
    thin, before = result.network, copy.deepcopy(result.network.state_dict())
    batches = batches_of(loaded, options)
    keep = plan_keep(find_slots(loaded.unet), result.plan)
    chosen = {"up_blocks.2.resnets.0.conv1", "up_blocks.2.resnets.0.norm2", "conv_out"}
    report = repair(loaded.unet, thin, keep, lambda: batches, layers=chosen)
    assert {r.layer for r in report.layers} == chosen
    differ = {name.rpartition(".")[0] for name, t in thin.state_dict().items() if not torch.equal(t, before[name])}
    assert "conv_out" in differ and differ <= chosen
    with pytest.raises(ValueError, match="no nowhere"):
        repair(loaded.unet, thin, keep, lambda: batches, layers=["nowhere"])
