"""Trials of width allocations: the search alone, and as part of a prune."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import PLAIN, random_unet
from runs import one_thread as one_thread

from wanda_fast import PruningPlan, UserError, prune, pruning
from wanda_fast.checkpoint import load_pruned
from wanda_fast.compact import cost_model
from wanda_fast.plan import free_problem, stock_problem
from wanda_fast.slots import find_slots, identity_shortcuts, insert_identity_shortcut
from wanda_fast.trials import FACTOR, LEAST_SHARES, Trial, emphasised, search

SMALL: dict[str, Any] = {**PLAIN, "block_out_channels": (16, 32, 32), "norm_num_groups": 4}
OPTIONS: dict[str, Any] = {
    "target_macs": "56%", "align": 4, "min_width": 4, "calib_steps": 16, "repair_images": 16, "num_samples": 2,
    "num_inference_steps": 3, "device": "cpu", "batch_size": 8,
}  # fmt: skip


def _pipeline() -> DDPMPipeline:
    return DDPMPipeline(unet=random_unet(SMALL), scheduler=DDPMScheduler())


def _judge(score: Callable[[int], float], asked: list[int]) -> Callable[[dict[str, int]], Trial]:
    def measure(widths: dict[str, int]) -> Trial:
        asked.append(widths["a"])
        return Trial([score(widths["a"]) + d for d in (-0.1, 0.1)], 0, {}, {})

    return measure


def _by_share(least: float | None, emphasis: Mapping[int, float]) -> dict[str, int]:
    """Widths that say where they come from: the split's own 40, 100 · share otherwise, plus 1 for each emphasis."""
    return {"a": (40 if least is None else int(100 * least)) + len(emphasis)}


def test_the_first_trial_is_the_estimate() -> None:
    asked: list[int] = []
    best, trials = search(_by_share, _judge(lambda width: 0.9, asked), [], 1)
    assert best == {"a": 40} and asked == [40] and trials[0].taken


def test_the_best_share_wins_and_its_levels_are_varied() -> None:
    asked: list[int] = []
    best, trials = search(_by_share, _judge(lambda width: 0.95 if width == 51 else 0.9 if width == 50 else 0.8, asked), [0, 1], 99)
    assert asked[:5] == [40, *(int(100 * s) for s in LEAST_SHARES)]
    assert best == {"a": 51} and asked[5] == 51  # one level emphasised, at the share that was best
    assert [t.taken for t in trials].count(True) == 1 and max(trials, key=lambda t: t.mean).taken
    assert max(trials, key=lambda t: t.mean).emphasis == {"level 0": FACTOR}


@pytest.mark.parametrize(
    ("gains", "better"),
    [([0.02, 0.02, 0.02], True), ([0.05, 0.03, 0.04], True), ([0.1, -0.05, 0.02], False), ([-0.1, -0.1, -0.1], False), ([0.0] * 3, False)],
)
def test_a_later_candidate_must_be_better_beyond_doubt(gains: list[float], better: bool) -> None:
    first = [0.9, 0.5, 0.7]  # images differ far more than candidates do: they are compared one by one
    later = Trial([a + g for a, g in zip(first, gains)], 0, {}, {})
    assert later.better_than(Trial(first, 0, {}, {})) == better
    best, trials = search(_by_share, lambda widths: Trial(first, 0, {}, {}) if widths["a"] == 40 else later, [], 2)
    assert (best == {"a": 25}) == better and trials[1].taken == better and trials[0].taken != better


@pytest.mark.parametrize("limit", [1, 3, 4])
def test_no_more_than_asked(limit: int) -> None:
    asked: list[int] = []
    search(_by_share, _judge(lambda width: width / 100, asked), range(4), limit)
    assert len(asked) == limit


def test_equal_widths_are_tried_once_and_impossible_ones_not_at_all() -> None:
    def widths_for(least: float | None, emphasis: Mapping[int, float]) -> dict[str, int]:
        if least == 0.625:
            raise UserError("cannot be reached")
        return {"a": 40}

    asked: list[int] = []
    search(widths_for, _judge(lambda width: 0.9, asked), range(3), 99)
    assert asked == [40]


def test_a_target_that_no_widths_meet_is_refused() -> None:
    def widths_for(least: float | None, emphasis: Mapping[int, float]) -> dict[str, int]:
        raise UserError("cannot be reached")

    with pytest.raises(UserError, match="cannot be reached"):
        search(widths_for, _judge(lambda width: 0.9, []), range(3), 99)


@pytest.mark.parametrize("layout", ["stock", "free"])
def test_emphasis_is_of_the_level_alone(layout: str) -> None:
    unet = random_unet(SMALL)
    if layout == "stock":
        for name in identity_shortcuts(unet):
            insert_identity_shortcut(unet, name)
    slots = find_slots(unet)
    costs = cost_model(unet, slots)
    problem = stock_problem(slots, costs, unet.config, "free", 4, 4) if layout == "stock" else free_problem(slots, costs, "free", 4, 4)
    plain = {unit: [1.0] * len(options) for unit, options in problem.options.items()}
    found = emphasised(problem, plain, {1: 4.0})
    levels = {unit: slots.slots[next(iter(options[0]))].levels for unit, options in problem.options.items()}
    expected = {unit: 4.0 if at == (1,) else 2.0 if set(at) in ({0, 1}, {1, 2}) else 1.0 for unit, at in levels.items()}
    assert {unit: row[0] for unit, row in found.items()} == pytest.approx(expected)
    assert 4.0 in expected.values() and 1.0 in expected.values()


@pytest.mark.parametrize("layout", ["stock", "free"])
def test_prune_takes_the_best_trial(layout: str, tmp_path: Path) -> None:
    lines: list[str] = []
    result = prune(_pipeline(), trials=4, layout=layout, save_path=tmp_path / "out", log=lines.append, **OPTIONS)
    report = json.loads((tmp_path / "out" / "pruning.json").read_text(encoding="utf-8"))
    trials = report["trials"]
    assert 2 <= len(trials) <= 4 and report["settings"]["trials"] == 4
    (taken,) = (t for t in trials if t["taken"])
    assert taken["ssim"] >= trials[0]["ssim"]
    assert taken["macs"] == report["pruned"]["macs"] <= 0.56 * report["dense"]["macs"]
    assert taken["widths"] == {n: [w["pruned"][0], w["pruned"][-1]] for n, w in report["widths"].items()}
    assert sum(line.startswith("trial: ") for line in lines) == len(trials)
    # the repair of a trial leaves no trace: the same plan gives the same network without them
    again = prune(_pipeline(), plan=str(tmp_path / "out" / "pruning.json"), layout=layout, **OPTIONS)
    for name, tensor in result.network.state_dict().items():
        torch.testing.assert_close(again.network.state_dict()[name], tensor, rtol=0, atol=0)
    assert load_pruned(tmp_path / "out").unet.conv_in.weight.shape == result.network.conv_in.weight.shape


def test_a_resumed_run_still_lists_its_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**OPTIONS, "num_samples": 0, "repair": "none", "trials": 2}

    def stop(run: pruning._Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pruning._Run, "compact", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(_pipeline(), save_path=tmp_path / "out", resume=True, **options)
    monkeypatch.setattr(pruning._Run, "_choose_plan", lambda run: pytest.fail("it is planned again"))
    result = prune(_pipeline(), save_path=tmp_path / "out", resume=True, **options)
    (taken,) = (t for t in result.report["trials"] if t["taken"])
    assert taken["macs"] == result.report["pruned"]["macs"]
    assert set(result.report["sensitivity"]) and not (tmp_path / "out.unfinished").exists()


def test_one_trial_is_the_plan_without_trials() -> None:
    plain, one = (prune(_pipeline(), trials=n, dry_run=True, **OPTIONS) for n in (0, 1))
    assert one.plan.to_dict() == plain.plan.to_dict()
    assert "trials" not in plain.report and len(one.report["trials"]) == 1
    assert isinstance(PruningPlan.from_dict(one.plan.to_dict()), PruningPlan)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"split": "uniform"}, "the split is uniform"),
        ({"target_latency": "0.5x", "target_macs": None}, "trials and target_latency"),
        ({"plan": "plan.json"}, "trials and plan"),
        ({"offload": True}, "trials and offload"),
        ({"trials": -1}, "trials must be a whole number"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_does_not_go_together(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        prune(_pipeline(), **{**OPTIONS, "trials": 2, **options})
