"""The compacted network against the dense one with the removed channels masked, and index bookkeeping."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from diffusers import UNet2DModel
from networks import CIFAR32, CONFIGS, WIDE256, inputs_for, random_unet
from torch import Tensor, nn

from wanda_fast.checkpoint import load_pipeline
from wanda_fast.compact import compact, cost_model, json_config, layer_keep, new_unet, prepared_copy
from wanda_fast.errors import UserError
from wanda_fast.plan import (
    PruningPlan,
    Target,
    build_plan,
    free_problem,
    stock_problem,
    uniform_widths,
)
from wanda_fast.slots import SlotMap, find_slots, identity_shortcuts


def random_scores(slots: SlotMap, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s.width, generator=g) for n, s in slots.slots.items()}


def make_plan(unet: UNet2DModel, layout: str, policy: str, ratio: float, seed: int = 0, mixed: bool = False) -> PruningPlan:
    """A plan with random scores; `mixed` gives every unit its own random legal width."""
    slots = find_slots(unet)
    costs = cost_model(unet, slots)
    if layout == "stock":
        problem = stock_problem(slots, costs, unet.config, policy, 4, 4)
    else:
        problem = free_problem(slots, costs, policy, 4, 4)
    if mixed:
        draw = random.Random(seed)
        widths = problem.widths({u: draw.randrange(len(o)) for u, o in problem.options.items()})
    else:
        widths = uniform_widths(problem, Target(ratio=ratio))
    return build_plan(slots, widths, random_scores(slots, seed), unet.config, layout=layout, norm_policy=policy)


class PlanNorm(nn.Module):
    """A dense GroupNorm that computes its statistics over the plan's channels and groups, and zeroes the others."""

    def __init__(self, norm: nn.GroupNorm, keep: Tensor | None, groups: int) -> None:
        super().__init__()
        self.norm, self.groups = norm, groups
        self.keep = torch.arange(norm.num_channels) if keep is None else keep

    def forward(self, x: Tensor) -> Tensor:
        kept = F.group_norm(x[:, self.keep], self.groups, self.norm.weight[self.keep], self.norm.bias[self.keep], self.norm.eps)
        return torch.zeros_like(x).index_copy(1, self.keep, kept)


class MaskedNorm(nn.Module):
    """The dense GroupNorm itself, with the removed channels zeroed behind it."""

    def __init__(self, norm: nn.GroupNorm, keep: Tensor | None) -> None:
        super().__init__()
        self.norm = norm
        self.mask = torch.ones(norm.num_channels)
        if keep is not None:
            self.mask = torch.zeros(norm.num_channels).index_fill(0, keep, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.mask.view(1, -1, *[1] * (x.ndim - 2))


def masked_twin(unet: UNet2DModel, plan: PruningPlan, *, plan_statistics: bool) -> UNet2DModel:
    """The dense network with removed channels masked everywhere."""
    twin = prepared_copy(unet, plan.identity_shortcuts)
    slots = find_slots(twin)
    per_layer = layer_keep(slots, plan.keep)
    for name, (out, _) in per_layer.items():
        module = twin.get_submodule(name)
        if isinstance(module, nn.GroupNorm):
            swapped = PlanNorm(module, out, plan.norm_groups[name]) if plan_statistics else MaskedNorm(module, out)
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, swapped)
        elif out is not None:
            dim = 1 if isinstance(module, nn.Embedding) else 0
            mask = torch.zeros(module.weight.shape[dim]).index_fill(0, out, 1.0)
            with torch.no_grad():
                module.weight.mul_(mask if dim else mask.view(-1, *[1] * (module.weight.ndim - 1)))
                if getattr(module, "bias", None) is not None:
                    module.bias.mul_(mask)
    return twin


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def assert_equals_masked(unet: UNet2DModel, plan: PruningPlan, *, plan_statistics: bool = True) -> None:
    pruned = compact(unet, plan)
    given = inputs_for(unet)
    with torch.no_grad():
        expected = masked_twin(unet, plan, plan_statistics=plan_statistics)(**given).sample
        assert relative_error(pruned(**given).sample, expected) < 1e-5


@pytest.fixture(scope="module")
def bundled() -> UNet2DModel:
    return load_pipeline(None).unet


@pytest.mark.parametrize("policy", ["balanced", "free"])
@pytest.mark.parametrize("layout", ["stock", "free"])
def test_bundled_model_equals_masked_network(bundled: UNet2DModel, layout: str, policy: str) -> None:
    plan = make_plan(bundled, layout, policy, 0.3)
    assert sum(plan.widths.values()) < sum(s.width for s in find_slots(bundled).slots.values())
    assert_equals_masked(bundled, plan)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("layout", ["stock", "free"])
@pytest.mark.parametrize("policy", ["balanced", "free", "groups"])
def test_random_configurations_equal_masked_network(name: str, layout: str, policy: str) -> None:
    unet = random_unet(name)
    plan = make_plan(unet, layout, policy, 0.25, seed=3)
    assert any(len(k) < find_slots(unet).slots[n].width for n, k in plan.keep.items())
    assert_equals_masked(unet, plan)


def test_whole_group_plan_is_exact_with_the_dense_statistics(bundled: UNet2DModel) -> None:
    """Plans that keep every norm's groups whole: the surviving groups' statistics are the dense network's."""
    plan = make_plan(bundled, "free", "groups", 0.4, seed=1)
    removed = sum(len(k) < find_slots(bundled).slots[n].width for n, k in plan.keep.items())
    assert removed >= 8
    assert_equals_masked(bundled, plan, plan_statistics=False)


def test_stock_levels_of_equal_width_may_differ_after_pruning(bundled: UNet2DModel) -> None:
    names = identity_shortcuts(bundled)
    assert names == ["down_blocks.2.resnets.0", "down_blocks.3.resnets.0"]
    prepared = prepared_copy(bundled, names)
    given = inputs_for(bundled)
    with torch.no_grad():
        assert relative_error(prepared(**given).sample, bundled(**given).sample) < 1e-6
    slots = find_slots(prepared)
    problem = stock_problem(slots, cost_model(prepared, slots), bundled.config, "balanced", 8, 8)
    new = {"level 0": 64, "level 1": 96, "level 2": 112, "level 3": 64}
    choice = {u: len(o) - 1 for u, o in problem.options.items()}
    for unit, width in new.items():
        choice[unit] = next(i for i, o in enumerate(problem.options[unit]) if set(o.values()) == {width})
    plan = build_plan(
        slots, problem.widths(choice), random_scores(slots, 0), bundled.config,
        layout="stock", norm_policy="balanced", identity_shortcuts=names,
    )  # fmt: skip
    assert plan.config is not None and plan.config["block_out_channels"] == [64, 96, 112, 64]
    assert_equals_masked(bundled, plan)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("config", ["plain", "two_layers_one_channel"])
def test_indices_agree_with_torch_pruning(config: str, seed: int) -> None:
    """Random plans cut by torch-pruning's dependency graph with our indices give the same tensors, bit for bit."""
    unet = random_unet(config)
    plan = make_plan(unet, "free", "free", 0.3, seed=seed, mixed=True)
    slots = find_slots(unet)
    for name, slot in slots.slots.items():
        if slot.kind in ("qk", "v"):  # torch-pruning couples q, k and v with one another; ours are two slots
            plan.keep[name] = torch.arange(slot.width)
    ours = compact(unet, plan).state_dict()
    twin = copy.deepcopy(unet).requires_grad_(True)
    graph = tp.DependencyGraph().build_dependency(twin, example_inputs=inputs_for(unet, 1))
    cut = 0
    for name, slot in slots.slots.items():
        gone = sorted(set(range(slot.width)) - set(plan.keep[name].tolist()))
        if gone:
            layer = twin.get_submodule(name)
            prune = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
            graph.get_pruning_group(layer, prune, idxs=gone).prune()
            cut += 1
    assert cut >= 5
    theirs = twin.state_dict()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("config", ["plain", "heads", "classes", "scale_shift", "resnet_resampling"])
def test_every_tensor_holds_the_indices_of_its_neighbours(config: str, seed: int) -> None:
    """Row and column numbers written into the weights must come out as the plan says, along every edge."""
    unet = random_unet(config)
    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            rows = torch.arange(module.weight.shape[0]).view(-1, 1)
            columns = torch.arange(module.weight.shape[1]).view(1, -1)
            code = (rows * 4096 + columns).float()
            module.weight.data.copy_(code if module.weight.ndim == 2 else code[..., None, None].expand_as(module.weight))
    plan = make_plan(unet, "free", "free", 0.3, seed=seed, mixed=True)
    slots = find_slots(unet)
    pruned = compact(unet, plan)
    for name, module in pruned.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or name.endswith("to_q"):
            continue  # to_q is scaled
        code = (module.weight if module.weight.ndim == 2 else module.weight[..., 0, 0]).long()
        for segment in slots.outputs.get(name, ()):
            keep = plan.keep[segment.slot]
            start = sum(len(plan.keep[s.slot]) for s in slots.outputs[name] if s.offset < segment.offset)
            assert torch.equal(code[start : start + len(keep), 0] // 4096, keep + segment.offset), name
        start = 0
        for segment in slots.inputs.get(name, ()):
            keep = plan.keep[segment.slot]
            assert torch.equal(code[0, start : start + len(keep)] % 4096, keep + segment.offset), name
            start += len(keep)


def test_slot_count_of_the_published_architecture() -> None:
    slots = find_slots(new_unet(CIFAR32)).slots
    times = [s for s in slots.values() if s.kind.startswith("time")]
    assert (len(slots) - len(times), len(times)) == (54, 2)


@pytest.mark.parametrize(
    ("config", "params", "macs"), [(CIFAR32, 35_746_307, 6.06e9), (WIDE256, 113_673_219, None)], ids=["cifar32", "wide256"]
)
def test_cost_model_counts_what_the_network_has(config: dict, params: int, macs: float | None) -> None:
    unet = new_unet(config)
    slots = find_slots(unet)
    costs = cost_model(unet, slots)
    assert costs.sizes({})[0] == params == sum(p.numel() for p in unet.parameters())
    if macs is not None:
        assert costs.sizes({})[1] == pytest.approx(macs, rel=2e-3)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.parametrize("layout", ["stock", "free"])
def test_cost_model_predicts_the_pruned_parameters(name: str, layout: str) -> None:
    unet = random_unet(name)
    slots = find_slots(unet)
    costs = cost_model(unet, slots)
    plan = make_plan(unet, layout, "free", 0.25)
    stock_width = plan.config["block_out_channels"][0] if plan.config and costs.sinusoid_consumers else None
    params, _ = costs.sizes(plan.widths, sinusoid=stock_width)
    pruned = compact(unet, plan)
    assert params == sum(p.numel() for p in pruned.parameters())
    if layout == "stock":
        again = find_slots(pruned)
        assert cost_model(pruned, again).sizes({}) == costs.sizes(plan.widths, sinusoid=stock_width)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtype_and_source_are_kept(dtype: torch.dtype) -> None:
    unet = random_unet("plain").to(dtype)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    pruned = compact(unet, make_plan(unet, "stock", "balanced", 0.25))
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())


def test_sinusoid_refit_reproduces_the_old_embedding(bundled: UNet2DModel) -> None:
    """Level 0 at three quarters: the time embedding stays the old one at every t."""
    plan = make_plan(bundled, "stock", "balanced", 0.25)
    assert plan.config is not None and plan.config["block_out_channels"][0] == 48
    plan.keep = {n: torch.arange(s.width) if s.kind.startswith("time") else plan.keep[n]
                 for n, s in find_slots(bundled).slots.items()}  # fmt: skip
    plan.config["time_embedding_dim"] = 256
    pruned = compact(bundled, plan)
    t = torch.arange(1000)
    with torch.no_grad():
        old = bundled.time_embedding(bundled.time_proj(t))
        new = pruned.time_embedding(pruned.time_proj(t))
    assert relative_error(new, old) < 1e-5


def test_a_plan_of_another_network_is_refused(bundled: UNet2DModel) -> None:
    with pytest.raises(UserError, match="another architecture"):
        compact(bundled, make_plan(random_unet("plain"), "stock", "balanced", 0.25))


def test_illegal_indices_are_refused() -> None:
    unet = random_unet("plain")
    plan = make_plan(unet, "free", "balanced", 0.25)
    name = next(iter(plan.keep))
    plan.keep[name] = torch.tensor([0, 10_000])
    with pytest.raises(UserError, match=r"has .* channels, not 10001"):
        compact(unet, plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ("SkipDownBlock2D",) * 3, "up_block_types": ("SkipUpBlock2D",) * 3}, "SkipDownBlock2D"),
        ({"down_block_types": ("KDownBlock2D",) * 3, "up_block_types": ("KUpBlock2D",) * 3}, "KDownBlock2D"),
    ],
    ids=["skip", "k"],
)
def test_unsupported_blocks_are_refused_by_name(change: dict, message: str) -> None:
    unet = new_unet({**CONFIGS["plain"], **change})
    with pytest.raises(UserError, match=message):
        find_slots(unet)


def test_json_config_has_no_private_entries(bundled: UNet2DModel) -> None:
    assert not [k for k in json_config(bundled) if k.startswith("_")]


def test_the_256_pixel_architecture_equals_its_masked_network() -> None:
    """google/ddpm-celebahq-256 and google/ddpm-church-256 with random weights, run on a smaller picture."""
    unet = random_unet({**WIDE256, "sample_size": 32})
    plan = make_plan(unet, "stock", "free", 0.3)
    assert plan.config is not None and len(set(plan.config["block_out_channels"])) == 3
    assert_equals_masked(unet, plan)
