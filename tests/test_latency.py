"""Widths by measured time: the table, its formula, and the search that believes measurements alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import PLAIN, random_unet
from torch import nn

from wanda_fast import latency
from wanda_fast.compact import compact, cost_model
from wanda_fast.errors import UserError
from wanda_fast.latency import measure_layers, parse_latency, search
from wanda_fast.pruning import prune
from wanda_fast.slots import find_slots

SMALL: dict[str, Any] = {**PLAIN, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}


def time(module: Any, shape: torch.Size, c_in: int, c_out: int, *_: Any) -> float:
    """Seconds of a layer by a formula."""
    area = shape[2:].numel() if len(shape) == 4 else 1
    if isinstance(module, nn.GroupNorm):
        return 1e-6 * (1 + c_in * area)
    return 1e-6 * (5 + c_in + 2 * c_out + c_in * c_out * area)


@pytest.fixture
def formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take what the formula says: the real times of layers this small are noise beside other processes."""
    monkeypatch.setattr(latency, "_time", time)


def test_the_fit_finds_the_formula() -> None:
    points = [(i, o, 1e-6 * (3 + 0.1 * i + 0.2 * o + 0.01 * i * o)) for i in (8, 16, 32) for o in (8, 24, 64)]
    assert latency._fit(points) == pytest.approx((3e-6, 1e-7, 2e-7, 1e-8), rel=1e-6)
    assert latency._fit([(8, 8, 2e-6), (16, 16, 3e-6)]) == pytest.approx((1e-6, 1.25e-7, 0, 0), rel=1e-6)  # a norm
    assert latency._fit([(3, 16, 1e-6), (3, 32, 2e-6)])[1] == 0  # inputs of one width tell nothing about them


@pytest.mark.usefixtures("formula")
def test_the_model_adds_up_what_a_thinner_network_has() -> None:
    """With times that follow a formula, predicted equals the sum over the layers of the network that was really cut."""
    unet = random_unet(SMALL)
    slots = find_slots(unet)
    costs = cost_model(unet, slots)
    x, t = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    model = measure_layers(unet, slots, costs, lambda u: u(x, t), dtype=torch.float32)
    plan = prune(
        _pipeline(unet), ratio=0.3, align=4, min_width=4, layout="free", split="uniform", pruner="magnitude", calib_steps=8,
        num_inference_steps=2, dry_run=True,
    ).plan  # fmt: skip
    thin = compact(unet, plan)
    total = 0.0

    def add(module: nn.Module, args: tuple[Any, ...], out: torch.Tensor) -> None:
        nonlocal total
        shape = args[0].shape
        c_in = shape[1] if len(shape) == 4 or isinstance(module, nn.GroupNorm) else shape[-1]
        c_out = out.shape[1] if len(shape) == 4 or isinstance(module, nn.GroupNorm) else out.shape[-1]
        total += time(module, shape, c_in, c_out)

    for m in thin.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.GroupNorm)):
            m.register_forward_hook(add)
    with torch.no_grad():
        thin(x, t)
    assert model.seconds(plan.widths) == pytest.approx(total, rel=1e-6)
    assert model.sizes(plan.widths)[0] == sum(p.numel() for p in thin.parameters())
    assert model.seconds({}) > model.seconds(plan.widths)


def test_norms_of_a_compiled_network_are_timed_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only they are, at two to four widths of each map, and each is really compiled: no shape falls back to eager code."""
    from torch._dynamo.utils import counters

    unet = random_unet(SMALL)
    slots = find_slots(unet)
    x, t = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    real, asked, graphs = latency._time, [], []

    def watched(module: Any, shape: Any, c_in: int, c_out: int, *rest: Any) -> float:
        counters.clear()
        seconds = real(module, shape, c_in, c_out, *rest)
        asked.append((isinstance(module, nn.GroupNorm), rest[-1]))
        if rest[-1]:
            graphs.append(counters["stats"]["unique_graphs"])
        return seconds

    monkeypatch.setattr(latency, "_time", watched)
    model = measure_layers(unet, slots, cost_model(unet, slots), lambda u: u(x, t), dtype=torch.float32, fused_norms=True, repeats=1)
    assert asked and all(norm == compiled for norm, compiled in asked)
    assert graphs and set(graphs) == {1}
    norms = {kind: points for kind, points in model.table.items() if kind.startswith("norm")}
    assert len(norms) >= 3 and all(2 <= len(points) <= 4 for points in norms.values())
    assert all(seconds > 0 for points in norms.values() for *_, seconds in points)


def test_every_kind_of_layer_is_timed() -> None:
    unet = random_unet(SMALL)
    slots = find_slots(unet)
    x, t = torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    table = measure_layers(unet, slots, cost_model(unet, slots), lambda u: u(x, t), dtype=torch.float32).table
    assert {kind.split()[0] for kind in table} == {"conv", "linear", "norm"}
    assert all(seconds > 0 for points in table.values() for *_, seconds in points)


def _pipeline(unet: Any) -> DDPMPipeline:
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


def test_the_search_corrects_its_budget_by_what_it_measures() -> None:
    """Layers promise 0.6, the network takes 0.1 + 0.9 of what they promise: the budget must end near 5/9."""
    asked_for: list[int] = []

    def choose(budget: int) -> int:
        asked_for.append(budget)
        return budget

    best, found = search(0.6, 1_000_000, choose, lambda budget: 0.1 + 0.9 * budget / 1_000_000)
    assert found.met and 0.6 * (1 - latency.TOLERANCE) <= found.share <= 0.6
    assert best == asked_for[-1] < asked_for[0] and len(found.rounds) == len(asked_for) <= latency.ROUNDS


def test_a_target_that_is_missed_says_by_how_much() -> None:
    best, found = search(0.5, 100, lambda budget: budget, lambda budget: 0.8 + budget / 1000)
    assert not found.met and best == min(int(r["budget"] * 100) for r in found.rounds)
    assert f"misses the target by {found.share / 0.5 - 1:.1%}" in found.describe()

    def nothing(budget: int) -> int:
        raise UserError("cannot be reached")

    with pytest.raises(UserError, match="cannot be reached"):
        search(0.1, 100, nothing, lambda _: 1.0)


def test_a_budget_too_small_for_the_layout_keeps_the_best_before() -> None:
    def choose(budget: int) -> int:
        if budget < 50:
            raise UserError("cannot be reached")
        return budget

    best, found = search(0.5, 100, choose, lambda budget: 0.9)
    assert best == 50 and not found.met


@pytest.mark.usefixtures("formula")
def test_prune_meets_a_latency_or_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    result = prune(
        _pipeline(random_unet(SMALL)), save_path=tmp_path / "out", target_latency="0.9x", latency_mode="eager", latency_batch=2, align=4,
        min_width=4, split="uniform", pruner="magnitude", repair="none", num_samples=0, num_inference_steps=2, calib_steps=8, device="cpu",
        log=lines.append,
    )  # fmt: skip
    report = result.report["latency"]
    assert report["asked"] == 0.9 and report["met"] == (report["measured"] <= 0.9)
    assert report["layers"] and all(seconds > 0 for points in report["layers"].values() for *_, seconds in points)
    assert any("of the dense network's, asked at most 0.9x" in line for line in lines)
    assert result.report["pruned"]["macs"] < result.report["dense"]["macs"]


@pytest.mark.usefixtures("formula")
def test_a_share_that_no_legal_network_reaches_is_refused_in_shares() -> None:
    with pytest.raises(UserError, match=r"target_latency 0.001x: .* takes 0\.\d\dx of the dense network's time"):
        prune(
            _pipeline(random_unet(SMALL)), target_latency="0.001x", latency_mode="eager", latency_batch=2, align=4, min_width=4,
            split="uniform", pruner="magnitude", calib_steps=8, repair="none", num_samples=0, num_inference_steps=2,
        )  # fmt: skip


@pytest.mark.parametrize("text", ["0x", "1.2", "-3", "fast", "nan", "0%", "120%"])
def test_shares_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="no share of the dense network's time"):
        parse_latency(text)


def test_shares() -> None:
    assert parse_latency("0.6x") == parse_latency(0.6) == parse_latency("60%") == 0.6
