"""Text-to-image UNets and diffusion transformers: slots inside blocks, compaction against masked networks, loading."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conditioned import CONDITIONED, random_network
from torch import Tensor, nn

import wanda_fast
from wanda_fast import pruned_unet
from wanda_fast.compact import compact, cost_model
from wanda_fast.errors import UserError
from wanda_fast.inputs import Prompts, forward, input_spec
from wanda_fast.plan import PruningPlan, Target, build_plan, free_problem, uniform_widths
from wanda_fast.slots import find_slots

NAMES = sorted(CONDITIONED)


def make_plan(network: nn.Module, ratio: float = 0.4, seed: int = 0, policy: str = "free") -> PruningPlan:
    slots = find_slots(network)
    g = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(s.width, generator=g) for n, s in slots.slots.items()}
    problem = free_problem(slots, cost_model(network, slots), policy, 2, 2)
    widths = uniform_widths(problem, Target(ratio=ratio))
    return build_plan(slots, widths, scores, network.config, layout="free", norm_policy=policy)


def outputs(network: nn.Module, seed: int = 0, n: int = 2) -> Tensor:
    spec = input_spec(network)
    x = torch.randn(n, *spec.shape, generator=torch.Generator().manual_seed(seed))
    t = torch.tensor([17, 803])[:n]
    return forward(network, x, t, Prompts().pick(spec, range(n), [True] * n, seed, "cpu"))


class PlanNorm(nn.Module):
    """A dense GroupNorm whose statistics are those of the kept channels in the plan's groups."""

    def __init__(self, norm: nn.GroupNorm, keep: Tensor, groups: int) -> None:
        super().__init__()
        self.norm, self.keep, self.groups = norm, keep, groups

    def forward(self, x: Tensor) -> Tensor:
        n, k = self.norm, self.keep
        return torch.zeros_like(x).index_copy(1, k, F.group_norm(x[:, k], self.groups, n.weight[k], n.bias[k], n.eps))


def masked(network: nn.Module, plan: PruningPlan) -> nn.Module:
    """The dense network in which the layers behind every slot do not see its removed channels."""
    twin = copy.deepcopy(network)
    for slot, keep in plan.keep.items():
        if slot.endswith(".conv1"):
            block = twin.get_submodule(slot.removesuffix(".conv1"))
            block.norm2 = PlanNorm(block.norm2, keep, plan.norm_groups[slot.replace("conv1", "norm2")])
            reader = block.conv2
        elif slot.endswith(".net.0.proj"):
            reader = twin.get_submodule(slot.replace("net.0.proj", "net.2"))
        else:
            reader = twin.get_submodule(slot.replace("to_q", "to_out.0"))
        gone = torch.ones(reader.weight.shape[1], dtype=torch.bool)
        gone[keep] = False
        reader.weight[:, gone] = 0
    return twin


@pytest.mark.parametrize("policy", ["free", "balanced", "groups"])
@pytest.mark.parametrize("name", NAMES)
def test_compacted_equals_masked(name: str, policy: str) -> None:
    network = random_network(name)
    before = outputs(network)
    plan = make_plan(network, policy=policy)
    pruned = compact(network, plan)
    want, got = outputs(masked(network, plan)), outputs(pruned)
    assert type(pruned).__name__ == f"Pruned{type(network).__name__}"
    assert float((got - want).norm() / want.norm()) < 1e-5
    assert float((want - before).norm() / before.norm()) > 1e-3, "the plan removes nothing that matters"
    assert torch.equal(outputs(network), before), "the dense network was changed"
    kept, whole = plan.widths, find_slots(network).slots
    for kind in {s.kind for s in whole.values()}:
        assert any(kept[n] < s.width for n, s in whole.items() if s.kind == kind), f"no {kind} slot was cut"


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_the_network(name: str) -> None:
    network = random_network(name)
    slots = find_slots(network)
    costs = cost_model(network, slots)
    plan = make_plan(network)
    pruned = compact(network, plan)
    for net, widths in ((network, {}), (pruned, plan.widths)):
        macs = 0

        def count(layer: Any, _: Any, out: Tensor) -> None:
            nonlocal macs
            macs += out.numel() * layer.weight[0].numel()

        handles = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        outputs(net, n=1)
        for handle in handles:
            handle.remove()
        assert costs.sizes(widths) == (sum(p.numel() for p in net.parameters()), macs)


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_whole_and_counted(name: str) -> None:
    network = random_network(name)
    plan = make_plan(network)
    pruned = compact(network, plan)
    seen = 0
    for attention, (slot, _, heads, size) in find_slots(network).attentions.items():
        keep, module = plan.keep[slot].view(-1, size), pruned.get_submodule(attention)
        assert bool((keep == keep[:, :1] + torch.arange(size)).all()) and bool((keep[:, 0] % size == 0).all())
        assert module.heads == len(keep) and module.inner_dim == module.to_v.out_features == keep.numel()
        assert module.to_q.out_features == module.to_out[0].in_features == keep.numel()
        assert module.scale == network.get_submodule(attention).scale  # the head size stays
        seen += len(keep) < heads
    assert seen > 0, "no attention lost a head"


def test_gate_goes_with_its_value() -> None:
    network = random_network("sd15")
    plan = make_plan(network)
    pruned = compact(network, plan)
    slot = next(n for n, s in find_slots(network).slots.items() if s.kind == "feed_forward")
    dense, thin = network.get_submodule(slot), pruned.get_submodule(slot)
    keep, width = plan.keep[slot], dense.out_features // 2
    assert torch.equal(thin.weight, torch.cat([dense.weight[keep], dense.weight[keep + width]]))


@pytest.mark.parametrize("name", ["sdxl", "dit", "pixart"])
def test_save_and_load(name: str, tmp_path: Any) -> None:
    network = random_network(name)
    pruned = compact(network, make_plan(network))
    pruned.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pruning"]["widths"]
    again = getattr(wanda_fast, type(pruned).__name__).from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(pruned))
    for key, tensor in pruned.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_a_plan_is_checked(tmp_path: Any) -> None:
    network = random_network("sd15")
    plan = make_plan(network)
    plan.save(tmp_path / "plan.json")
    assert torch.equal(outputs(compact(network, PruningPlan.load(tmp_path / "plan.json"))), outputs(compact(network, plan)))
    slot = next(iter(find_slots(network).attentions.values()))[0]
    half = {**plan.keep, slot: plan.keep[slot][:3]}
    with pytest.raises(UserError, match="whole heads"):
        compact(network, PruningPlan(**{**plan.__dict__, "keep": half}))
    with pytest.raises(UserError, match="another architecture"):
        compact(random_network("sd21"), plan)
    with pytest.raises(UserError, match="no stock configuration"):
        compact(network, PruningPlan(**{**plan.__dict__, "layout": "stock", "config": {}}))
    record = copy.deepcopy(plan.record)
    record["widths"][slot] -= 1
    with pytest.raises(UserError, match="part of a head"):
        pruned_unet.PrunedUNet2DConditionModel(pruning=record, **plan.dense_config)
    del record["widths"][slot]
    with pytest.raises(UserError, match="slots or widths"):
        pruned_unet.PrunedUNet2DConditionModel(pruning=record, **plan.dense_config)


def test_what_cannot_be_cut_is_named() -> None:
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    def refused(change: Any) -> str:
        network = random_network("sd15")
        change(network)
        with pytest.raises(UserError) as error:
            find_slots(network)
        return str(error.value)

    where = "down_blocks.0.attentions.0.transformer_blocks.0"

    def swap(name: str, module: nn.Module) -> Any:
        def change(network: nn.Module) -> None:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module)

        return change

    assert f"{where}.attn1" in refused(lambda n: n.get_submodule(f"{where}.attn1").set_processor(FusedAttnProcessor2_0()))
    normed = Attention(32, heads=4, dim_head=8, qk_norm="layer_norm")
    assert "norm_q" in refused(swap(f"{where}.attn1", normed))
    grouped = Attention(32, heads=4, kv_heads=2, dim_head=8)
    assert f"{where}.attn2: keys" in refused(swap(f"{where}.attn2", grouped))
    assert f"{where}.attn1.to_v: Identity" in refused(swap(f"{where}.attn1.to_v", nn.Identity()))
    assert f"{where}.ff: the activation Identity" in refused(swap(f"{where}.ff.net.0", nn.Identity()))
    with pytest.raises(UserError, match="VQModel is not supported"):
        import diffusers

        find_slots(diffusers.VQModel())
