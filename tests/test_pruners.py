"""Every criterion end to end on a tiny network, with and without repair; the criteria that draw or centre something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from networks import CONFIGS, random_unet
from runs import cli
from runs import one_thread as one_thread
from torch import nn

import wanda_fast
from wanda_fast import reference, sensitivity
from wanda_fast.errors import UserError
from wanda_fast.importance import CRITERIA, Context, draw_anew, get_criterion, slot_scores
from wanda_fast.pruning import PruneOptions, PruneResult
from wanda_fast.slots import find_slots
from wanda_fast.stats import ActivationStats

OPTIONS: dict[str, Any] = {
    "device": "cpu", "split": "uniform", "ratio": 0.4, "align": 4, "calib_steps": 16, "num_samples": 0, "num_inference_steps": 2,
    "repair_images": 32, "batch_size": 16,
}  # fmt: skip
SMALL = {**CONFIGS["plain"], "sample_size": 8, "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline() -> DDPMPipeline:
    return DDPMPipeline(unet=random_unet(SMALL), scheduler=DDPMScheduler())


def keep_of(result: PruneResult) -> dict[str, list[int]]:
    return {n: k.tolist() for n, k in result.plan.keep.items()}


@pytest.mark.parametrize("pruner", sorted(CRITERIA))
def test_every_pruner_in_both_layouts_with_and_without_repair(pruner: str, pipeline: DDPMPipeline) -> None:
    weights = {n: p.clone() for n, p in pipeline.unet.named_parameters()}
    layout = ("stock", "free")[sorted(CRITERIA).index(pruner) % 2]
    plain, repaired, again = (
        wanda_fast.prune(pipeline, pruner=pruner, layout=layout, repair=repair, **OPTIONS) for repair in ("none", "lstsq", "lstsq")
    )
    other = wanda_fast.prune(pipeline, pruner=pruner, layout="free" if layout == "stock" else "stock", dry_run=True, **OPTIONS)
    assert other.report["pruned"]["macs"] < other.report["dense"]["macs"]
    assert keep_of(plain) == keep_of(repaired) == keep_of(again)
    assert all(torch.equal(a, b) for a, b in zip(repaired.pipeline.unet.parameters(), again.pipeline.unet.parameters()))
    errors = [r.report["quality"]["noise_mse_relative"] for r in (plain, repaired)]
    assert 0 < errors[1] < 0.7 * errors[0]
    assert ("criterion" in plain.report) == (pruner in ("taylor", "diff-pruning"))
    for n, p in pipeline.unet.named_parameters():
        assert torch.equal(p, weights[n]) and p.grad is None


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "lstsq-residual"), ({"layout": "free"}, "wanda-diff"), ({"repair": "none"}, "wanda-diff"), ({"repair": "bias"}, "wanda-diff"),
        ({"time_strategy": "max"}, "wanda-diff"), ({"activation_strategy": "max"}, "wanda-diff"), ({"stats_memory": "1M"}, "wanda-diff"),
        ({"load_stats": "file"}, "wanda-diff"), ({"pruner": "random"}, "random"), ({"pruner": "wanda-diff"}, "wanda-diff"),
    ],
)  # fmt: skip
def test_the_default_criterion_is_the_best_of_its_layout(options: dict[str, Any], name: str) -> None:
    assert PruneOptions(**options).usual_pruner == name


def test_the_default_criterion_is_reported_by_name(pipeline: DDPMPipeline) -> None:
    lines: list[str] = []
    default = wanda_fast.prune(pipeline, repair="lstsq", dry_run=True, log=lines.append, **OPTIONS)
    assert any(line.startswith("criterion: lstsq-residual (the default here") for line in lines)
    named = wanda_fast.prune(pipeline, pruner="lstsq-residual", repair="lstsq", dry_run=True, **OPTIONS)
    assert default.report["settings"]["pruner"] == "lstsq-residual" and default.stats is None
    assert keep_of(default) == keep_of(named)


def test_scoring_takes_smaller_batches_where_memory_is_short(pipeline: DDPMPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward passes of lstsq-residual need far more of it than the calibration's forward passes."""
    whole, sizes = sensitivity.study_layers, []

    def short(unet: Any, batches: Any, layers: Any, **more: Any) -> Any:
        kept = list(batches)
        sizes.append(len(kept[0][0]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError("too much")
        return whole(unet, kept, layers, **more)

    monkeypatch.setattr(sensitivity, "study_layers", short)
    lines: list[str] = []
    how = {**OPTIONS, "pruner": "lstsq-residual", "dry_run": True, "split": "uniform"}
    small = wanda_fast.prune(pipeline, **{**how, "batch_size": 16}, log=lines.append)
    assert sizes == [16, 8, 4] and sum("the scoring" in line for line in lines) == 2
    assert keep_of(small) == keep_of(wanda_fast.prune(pipeline, **{**how, "batch_size": 4}))


def test_pruners_choose_differently(pipeline: DDPMPipeline) -> None:
    chosen = {
        p: str(keep_of(wanda_fast.prune(pipeline, pruner=p, dry_run=True, **OPTIONS))) for p in CRITERIA if p != "reinit"
    }
    assert len(set(chosen.values())) == len(chosen)


def test_sensitivity_split_puts_in_shortcuts_that_no_criterion_is_asked_about(pipeline: DDPMPipeline) -> None:
    config = {**CONFIGS["plain"], "sample_size": 8, "block_out_channels": (32, 32)}
    config |= {k: SMALL[k] for k in ("down_block_types", "up_block_types")}
    model = DDPMPipeline(unet=random_unet(config), scheduler=DDPMScheduler())
    for pruner in ("taylor", "lstsq-residual", "wanda-fluctuation"):
        result = wanda_fast.prune(
            model, pruner=pruner, **{**OPTIONS, "split": "sensitivity", "repair": "none", "norm_policy": "free", "ratio": 0.3}
        )
        assert result.report["pruned"]["macs"] < result.report["dense"]["macs"]


def test_the_threshold_of_a_run_is_the_one_asked_for(pipeline: DDPMPipeline) -> None:
    runs = {
        thr: wanda_fast.prune(pipeline, pruner="diff-pruning", thr=thr, dry_run=True, **OPTIONS).report["criterion"]
        for thr in (0.0, 0.999)
    }
    assert runs[0.0]["timesteps"] == 16 and runs[0.0]["stopped_at"] is None
    assert runs[0.999]["timesteps"] < 16 and runs[0.999]["stopped_at"] > runs[0.999]["last"]
    all_of_them = wanda_fast.prune(pipeline, pruner="taylor", thr=0.999, dry_run=True, **OPTIONS).report["criterion"]
    assert all_of_them["timesteps"] == 16  # taylor has no threshold
    late = wanda_fast.prune(pipeline, pruner="taylor", target_steps="late", dry_run=True, **OPTIONS).report["criterion"]
    assert late["first"] == 0 and 250 < late["last"] < 300


@pytest.mark.parametrize("thr", ["1", "-0.1", "nan"])
def test_thresholds_out_of_range_are_refused(thr: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("--pruner", "diff-pruning", "--thr", thr, "--save_path", tmp_path / "x") == 2
    assert "the threshold is a share of the largest loss, 0 <= thr < 1" in capsys.readouterr().err
    with pytest.raises(UserError, match="0 <= thr < 1"):
        wanda_fast.prune(thr=float(thr))


# ------------------------------------------------------------------------------------------------------------ redrawing


def test_reinit_is_the_plan_of_wanda_diff_with_fresh_weights(pipeline: DDPMPipeline) -> None:
    options = {**OPTIONS, "repair": "none"}
    ours = wanda_fast.prune(pipeline, pruner="wanda-diff", **options)
    fresh, again = (wanda_fast.prune(pipeline, pruner="reinit", **options) for _ in range(2))
    other = wanda_fast.prune(pipeline, pruner="reinit", **{**options, "seed": 1})
    assert keep_of(ours) == keep_of(fresh)
    a, b, c, d = (dict(r.pipeline.unet.named_parameters()) for r in (ours, fresh, again, other))
    for name in a:
        assert torch.equal(b[name], c[name])
        if "norm" in name:
            assert torch.equal(b[name], torch.full_like(b[name], float(name.endswith("weight"))))
        else:
            assert not torch.equal(a[name], b[name]) and not torch.equal(b[name], d[name])
    layer = fresh.pipeline.unet.mid_block.resnets[0].conv1
    assert float(layer.weight.abs().max()) <= (layer.in_channels * 9) ** -0.5  # torch's own initialisation


def test_drawing_anew_disturbs_no_random_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (random_unet("classes", seed=s).requires_grad_(False) for s in (1, 2))
    torch.set_rng_state(before)
    draw_anew(first, 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    draw_anew(nn.Module.to(second, torch.float64), 7)
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a.double(), b) and not a.requires_grad


# ------------------------------------------------------------------------------------------------- wanda on fluctuations


def statistics(inputs: dict[str, torch.Tensor]) -> ActivationStats:
    """Statistics of inputs [samples, positions, C_in] per layer."""
    n = len(next(iter(inputs.values())))
    return ActivationStats(
        tables={k: x.square().sum(1) for k, x in inputs.items()}, positions={k: x.shape[1] for k, x in inputs.items()},
        timesteps=torch.arange(n), counts=torch.ones(n, dtype=torch.int64), samples=torch.arange(n), num_train_timesteps=1000,
        model={}, sums={k: x.double().sum((0, 1)) for k, x in inputs.items()},
    )  # fmt: skip


def test_fluctuation_leaves_out_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 5, 6) + torch.tensor([0.0, 3.0, -1.0, 0.5, 0.0, 0.0])
    x[..., 4] = 2.5  # a constant channel
    x[..., 5] = 0.0
    weight = torch.randn(4, 6, 3, 3)
    stats = statistics({"layer": x})
    context = Context(stats=stats, act_norm={"layer": stats.act_norm("layer")}, score_tables={"layer": stats.score_table("layer")})
    rows, columns = get_criterion("wanda-fluctuation").layer("layer", weight, context)
    centred = (x - x.mean((0, 1))).square().mean((0, 1)).sqrt()
    norm = stats.act_norm("layer") * centred / x.square().mean((0, 1)).sqrt().clamp_min(1e-9)
    expected = reference.wanda_score(weight, norm)
    torch.testing.assert_close(rows, expected[0], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(columns, expected[1], rtol=1e-3, atol=1e-2)
    plain = get_criterion("wanda-diff").layer("layer", weight, context)[1]
    assert float(columns[4]) < 1e-2 * float(plain[4]) and float(columns[5]) == 0.0


def test_fluctuation_needs_means() -> None:
    unet = random_unet("classes")
    slots = find_slots(unet)
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    stats = statistics({n: torch.rand(3, 2, m.weight.shape[1]) for n, m in layers.items()})
    norms = {n: stats.act_norm(n) for n in stats.tables}
    criterion = get_criterion("wanda-fluctuation")
    scores = slot_scores(unet, slots, criterion, Context(stats=stats, act_norm=norms))
    assert all(bool(torch.isfinite(s).all()) for s in scores.values())
    stats.sums = {}
    with pytest.raises(UserError, match="hold no means"):
        slot_scores(unet, slots, criterion, Context(stats=stats, act_norm=norms))
    with pytest.raises(UserError, match="another model"):
        criterion.layer("elsewhere", torch.zeros(1, 1), Context(stats=stats, act_norm=norms))
