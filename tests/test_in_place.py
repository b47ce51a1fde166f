"""Compaction and repair in a network's own memory, against the plain compaction and the general repair."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conditioned import random_network
from test_inner_slots import make_plan, outputs
from torch import Tensor, nn

from wanda_fast.compact import compact, layer_keep
from wanda_fast.errors import UserError
from wanda_fast.in_place import prune_in_place
from wanda_fast.inputs import Prompts, forward, input_spec
from wanda_fast.repair import repair
from wanda_fast.slots import find_slots


def batches_for(network: nn.Module, count: int = 3, n: int = 8, first: int = 0) -> Any:
    spec = input_spec(network)

    def make() -> Any:
        for b in range(first, first + count):
            g = torch.Generator().manual_seed(b)
            x = torch.randn(n, *spec.shape, generator=g)
            t = torch.randint(1, 1000, (n,), generator=g)
            yield x, t, Prompts().pick(spec, range(b * n, b * n + n), [True] * n, 0, "cpu")

    return make


def error(a: nn.Module, b: nn.Module, batches: Any) -> float:
    off = energy = 0.0
    with torch.no_grad():
        for x, t, condition in batches():
            want, got = forward(a, x, t, condition), forward(b, x, t, condition)
            off += float((got - want).square().sum())
            energy += float((want - want.mean()).square().sum())
    return off / energy


def same(a: nn.Module, b: nn.Module) -> bool:
    mine: dict[str, Tensor] = a.state_dict()
    return all(torch.equal(t, mine[n]) for n, t in b.state_dict().items())


@pytest.mark.parametrize("name", ["sdxl", "dit", "pixart"])
def test_without_repair_it_is_the_plain_compaction(name: str) -> None:
    network = random_network(name)
    plan = make_plan(network)
    want = compact(network, plan)
    got, report = prune_in_place(copy.deepcopy(network), plan, batches_for(network), ridge=())
    assert type(got) is type(want) and same(got, want) and not report.layers
    assert torch.equal(outputs(got), outputs(want))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "dit"])
def test_repair_lowers_the_error(name: str) -> None:
    network = random_network(name)
    plan = make_plan(network)
    plain = compact(network, plan)
    got, report = prune_in_place(copy.deepcopy(network), plan, batches_for(network))
    cut = [n for n, s in find_slots(network).slots.items() if len(plan.keep[n]) < s.width]
    assert len(report.layers) == len(cut) and report.images == 24
    assert all(r.held_after <= r.held_before for r in report.layers)
    unseen = batches_for(network, 1, first=9)
    assert error(network, got, unseen) < 0.7 * error(network, plain, unseen)
    thin = [n for n, p in got.named_parameters() if p.shape != dict(plain.named_parameters())[n].shape]
    assert not thin


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_the_general_repair_carries_these_networks(name: str) -> None:
    network = random_network(name)
    plan = make_plan(network)
    plain = compact(network, plan)
    better = compact(network, plan)
    report = repair(network, better, layer_keep(find_slots(network), plan.keep), batches_for(network))
    assert any(r.accepted for r in report.layers)
    unseen = batches_for(network, 1, first=9)
    assert error(network, better, unseen) < 0.7 * error(network, plain, unseen)


def test_what_is_not_cut_keeps_its_memory() -> None:
    """The untouched tensors of the result are those of the dense network, not copies."""
    network = random_network("sdxl")
    places = {n: t.data_ptr() for n, t in network.state_dict().items()}
    plan = make_plan(network)
    got, _ = prune_in_place(network, plan, batches_for(network, 1))
    touched = layer_keep(find_slots(random_network("sdxl")), plan.keep)
    for name, tensor in got.state_dict().items():
        if name.rpartition(".")[0] not in touched:
            assert tensor.data_ptr() == places[name], name


def test_passes_stay_within_the_limit() -> None:
    network = random_network("dit")
    plan = make_plan(network)
    _, report = prune_in_place(copy.deepcopy(network), plan, batches_for(network, 3, 4), memory_limit=1)
    assert report.images == 4  # one batch is always used
    room = report.settings["pass_bytes"] * 9
    _, report = prune_in_place(copy.deepcopy(network), plan, batches_for(network, 3, 4), memory_limit=room)
    assert report.images == 8


def test_bad_input_is_refused() -> None:
    network = random_network("sd15")
    plan = make_plan(network)
    with pytest.raises(UserError, match="another architecture"):
        prune_in_place(random_network("sd21"), plan, batches_for(network))
    with pytest.raises(ValueError, match="no image"):
        prune_in_place(copy.deepcopy(network), plan, lambda: iter(()))
    layer = "down_blocks.0.resnets.0.conv2"
    broken = copy.deepcopy(network)
    broken.get_submodule("down_blocks.0.resnets.0.conv1").weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=layer):
        prune_in_place(broken, plan, batches_for(network))


def test_the_benchmark_of_the_large_model(tmp_path: Any, monkeypatch: Any) -> None:
    """Its dry run, and the whole of it on a small network."""
    import json
    import sys

    from benchmarks import large_model

    sizes = large_model.dry_run(large_model.SMALL, "60%")
    assert sizes["pruned"]["macs_share"] <= 0.6 < sizes["pruned"]["macs_share"] + 0.1
    out = tmp_path / "result.json"
    words = f"large_model --size small --device cpu --dtype fp32 --calib 4 --batch_size 4 --repair_images 8 --out {out}"
    monkeypatch.setattr(sys, "argv", words.split())
    large_model.main()
    result = json.loads(out.read_text())
    assert sum(stage.get("share", 0) for stage in result["stages"].values()) == pytest.approx(1)
    assert result["repair"]["images"] == 8 and result["repair"]["layers"] == sizes["slots"]
