"""ActivationStats: strategies against plain loops, merging, files."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import random_unet

from wanda_fast.errors import UserError
from wanda_fast.stats import (
    ACTIVATION_STRATEGIES,
    TIME_STRATEGIES,
    WEIGHTED,
    ActivationStats,
    fingerprint,
    parse_target_steps,
)


def make(rows: int = 24, *, distinct: int = 5, seed: int = 0, info: dict | None = None) -> ActivationStats:
    """Statistics with `rows` samples at `distinct` timesteps of 1000."""
    rng = torch.Generator().manual_seed(seed)
    timesteps = torch.linspace(3, 990, distinct).long()[torch.arange(rows) % distinct]
    shared = torch.rand(rows, 6, generator=rng) * 9
    return ActivationStats(
        tables={"a": torch.rand(rows, 4, generator=rng) * 5, "to_q": shared, "to_k": shared.clone()},
        positions={"a": 16, "to_q": 4, "to_k": 4},
        timesteps=timesteps,
        counts=torch.ones(rows, dtype=torch.int64),
        samples=torch.arange(rows),
        num_train_timesteps=1000,
        model={"architecture": "x", "weights": "y"},
        info={"seed": seed} if info is None else info,
    )


def by_hand(stats: ActivationStats, layer: str, activation: str, time: str, low: int, high: int) -> np.ndarray:
    """The documented formulas in numpy, float64, one loop per group."""
    t = stats.timesteps.numpy()
    inside = (t >= low) & (t < high)
    t, sq = t[inside], stats.tables[layer].double().numpy()[inside]
    key = t if len(set(t)) <= 64 else (t - low) * 32 // (high - low)
    norms, when = [], []
    for k in sorted(set(key)):
        group = sq[key == k]
        when.append(t[key == k].mean())
        reduce = {
            "mean": lambda g: np.sqrt(g.mean(0)),
            "max": lambda g: np.sqrt(g).max(0),
            "median": lambda g: np.median(np.sqrt(g), 0),
        }
        norms.append(reduce[activation](group))
    values = np.stack(norms)
    weights = 0.5 + (high - 1 - np.array(when)) / (high - 1 - low)
    return {
        "mean": lambda: values.mean(0),
        "max": lambda: values.max(0),
        "median": lambda: np.median(values, 0),
        "weighted_mean": lambda: (weights[:, None] * values).sum(0) / weights.sum(),
    }[time]()


@pytest.mark.parametrize("steps", [(0, 1000), (200, 800)])
@pytest.mark.parametrize("distinct", [5, 200], ids=["exact-groups", "bins"])
@pytest.mark.parametrize(("activation", "time"), list(itertools.product(ACTIVATION_STRATEGIES, TIME_STRATEGIES)))
def test_strategies_follow_their_formula(activation: str, time: str, distinct: int, steps: tuple[int, int]) -> None:
    stats = make(400 if distinct > 64 else 24, distinct=distinct)
    got = stats.act_norm("a", time_strategy=time, activation_strategy=activation, target_steps=steps)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), by_hand(stats, "a", activation, time, *steps), rtol=2e-6)
    strategy = {"time_strategy": time, "activation_strategy": activation, "target_steps": steps}
    assert torch.equal(stats.norms(**strategy)["a"], got)
    tables = stats.score_tables(**strategy)
    if time not in WEIGHTED:
        assert not tables and tables.get("a") is None
        with pytest.raises(UserError, match=f"time strategy '{time}'"):
            stats.score_table("a", **strategy)
        return
    assert list(tables) == list(stats.tables)
    sq, weight = tables["a"]
    assert sq.dtype == weight.dtype == torch.float32 and sq.shape == (len(weight), len(got))
    torch.testing.assert_close((weight[:, None] * sq.sqrt()).sum(0), got, rtol=2e-6, atol=0)


def test_weights_run_from_half_at_the_noisiest_to_one_and_a_half_at_the_cleanest() -> None:
    stats = make(2, distinct=2)
    stats.timesteps[:] = torch.tensor([0, 999])
    clean, noisy = stats.tables["a"].sqrt()
    torch.testing.assert_close(stats.act_norm("a", time_strategy="weighted_mean"), (1.5 * clean + 0.5 * noisy) / 2)


def test_one_timestep_makes_all_time_strategies_agree() -> None:
    stats = make(6, distinct=1)
    norms = [stats.act_norm("a", time_strategy=s, target_steps=(3, 4)) for s in TIME_STRATEGIES]
    for other in norms[1:]:
        torch.testing.assert_close(other, norms[0])


@pytest.mark.parametrize(
    ("text", "total", "expected"),
    [("all", 1000, (0, 1000)), ("early", 1000, (700, 1000)), ("late", 1000, (0, 300)), ("middle", 1000, (300, 700)),
     ("early", 25, (18, 25)), ("late", 25, (0, 8)), ("0-1", 10, (0, 1)), (" 100-900 ", 1000, (100, 900))],
)  # fmt: skip
def test_target_steps(text: str, total: int, expected: tuple[int, int]) -> None:
    assert parse_target_steps(text, total) == expected


@pytest.mark.parametrize("text", ["900-2000", "500-100", "5-5", "", "noon", "-5-10", "1-2-3", "10", "a-b", "1.5-3"])
def test_bad_target_steps_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="timestep range"):
        parse_target_steps(text, 1000)


def test_unknown_names_and_empty_targets_are_refused() -> None:
    stats = make()
    with pytest.raises(UserError, match="time strategy 'mode'"):
        stats.act_norm("a", time_strategy="mode")
    with pytest.raises(UserError, match="activation strategy 'mode'"):
        stats.act_norm("a", activation_strategy="mode")
    with pytest.raises(UserError, match="no layer b"):
        stats.act_norm("b")
    with pytest.raises(UserError, match="no samples in timesteps 4-200"):
        stats.act_norm("a", target_steps="4-200")


def test_halves_merge_to_the_whole_in_any_order() -> None:
    whole = make(24)

    def part(rows: slice) -> ActivationStats:
        return dataclasses.replace(
            whole, tables={n: t[rows] for n, t in whole.tables.items()}, timesteps=whole.timesteps[rows],
            counts=whole.counts[rows], samples=whole.samples[rows],
        )  # fmt: skip

    merged = part(slice(16, 24)).merge(part(slice(0, 7)), part(slice(7, 16)))
    assert all(torch.equal(merged.tables[n], whole.tables[n]) for n in whole.tables)
    assert torch.equal(merged.timesteps, whole.timesteps) and torch.equal(merged.samples, whole.samples)
    assert merged.info == whole.info
    with pytest.raises(UserError, match="same samples"):
        part(slice(0, 7)).merge(part(slice(6, 8)))


def test_other_runs_are_appended_and_both_remembered() -> None:
    one, two = make(8, seed=1), make(6, seed=2)
    merged = one.merge(two)
    assert torch.equal(merged.tables["a"], torch.cat([one.tables["a"], two.tables["a"]]))
    assert merged.info == {"runs": [{"seed": 1}, {"seed": 2}]}


def test_bins_are_added_and_refuse_what_needs_samples() -> None:
    stats = make(4, distinct=4)
    bins = dataclasses.replace(stats, counts=torch.tensor([3, 2, 5, 1]), samples=torch.full((4,), -1))
    merged = bins.merge(bins)
    assert torch.equal(merged.counts, 2 * bins.counts)
    torch.testing.assert_close(merged.act_norm("a"), bins.act_norm("a"))
    assert merged.act_norm("a", time_strategy="max").shape == (4,)
    with pytest.raises(UserError, match="one row per sample"):
        bins.act_norm("a", activation_strategy="median")
    with pytest.raises(UserError, match="cannot be merged"):
        bins.merge(stats)


def test_strangers_do_not_merge() -> None:
    stats = make()
    with pytest.raises(UserError, match="different networks"):
        stats.merge(dataclasses.replace(stats, model={"architecture": "x", "weights": "z"}))
    with pytest.raises(UserError, match="different layers"):
        stats.merge(dataclasses.replace(stats, tables={"a": stats.tables["a"]}))


def test_file_holds_everything_and_equal_tables_once(tmp_path: Path) -> None:
    stats = make(200)
    stats.sums = {"a": torch.rand(4, dtype=torch.float64)}
    file = tmp_path / "stats.safetensors"
    stats.save(file)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]
    assert file.stat().st_size < 4 * 200 * (4 + 2 * 6) + 3 * 8 * 200  # to_k costs nothing
    again = ActivationStats.load(file)
    for name in ("tables", "sums"):
        ours, theirs = getattr(stats, name), getattr(again, name)
        assert list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)
    for name in ("timesteps", "counts", "samples"):
        assert torch.equal(getattr(stats, name), getattr(again, name))
    for name in ("positions", "num_train_timesteps", "model", "info"):
        assert getattr(stats, name) == getattr(again, name)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    good = tmp_path / "good"
    make().save(good)
    data = good.read_bytes()
    cases = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "text": b"no statistics at all",
        "flipped": b"\xff" * 64 + data[64:],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            ActivationStats.load(tmp_path / name)
    save_file({"weight": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(UserError, match="holds no activation statistics"):
        ActivationStats.load(tmp_path / "foreign")
    with pytest.raises(UserError, match="no such file"):
        ActivationStats.load(tmp_path / "absent")


def test_fingerprint_sees_weights_and_shape_but_not_the_dtype() -> None:
    unet = random_unet("plain")
    unet.bfloat16().float()  # rounded once, so that the next cast changes nothing
    before = fingerprint(unet)
    assert fingerprint(unet.to(torch.bfloat16)) == before
    unet.float()
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] += 1
    after = fingerprint(unet)
    assert after["architecture"] == before["architecture"] and after["weights"] != before["weights"]
    assert fingerprint(random_unet("heads"))["architecture"] != before["architecture"]


def test_statistics_of_another_model_are_refused() -> None:
    unet = random_unet("plain")
    stats = dataclasses.replace(make(), model=fingerprint(unet))
    stats.check_model(unet)
    with pytest.raises(UserError, match="another architecture"):
        stats.check_model(random_unet("heads"))
    with pytest.raises(UserError, match="other weights"):
        stats.check_model(random_unet("plain", seed=1))


def test_scores_from_tables_choose_the_same_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation that sums over time on its way gives the plan that the separate sum gives, and `act_norm` is not asked for."""
    from wanda_fast import ops
    from wanda_fast.calibrate import collect_layers
    from wanda_fast.importance import Context, get_criterion, slot_scores
    from wanda_fast.slots import find_slots

    unet = random_unet("plain")
    rng = torch.Generator().manual_seed(4)
    tables = {n: torch.rand(40, m.weight.shape[1], generator=rng) * 100 for n, m in collect_layers(unet).items()}
    stats = ActivationStats(
        tables, dict.fromkeys(tables, 4), torch.arange(40) // 4, torch.ones(40, dtype=torch.int64), torch.arange(40), 1000, {}
    )
    fused, asked = [], []
    original = ops.wanda_score_stats
    monkeypatch.setattr(ops, "wanda_score_stats", lambda *a, **k: fused.append(a) or original(*a, **k))
    monkeypatch.setattr(ActivationStats, "act_norm", lambda self, layer, **k: asked.append(layer))
    strategy = {"time_strategy": "weighted_mean", "target_steps": (0, 8)}
    criterion, slots = get_criterion("wanda-diff"), find_slots(unet)
    context = Context(stats.norms(**strategy), score_tables=stats.score_tables(**strategy))
    scores = slot_scores(unet, slots, criterion, context)
    assert fused and not asked
    monkeypatch.undo()
    plain = slot_scores(unet, slots, criterion, Context(stats.norms(**strategy)))
    for name, expected in plain.items():
        torch.testing.assert_close(scores[name], expected, rtol=2e-6, atol=0)
        half = len(expected) // 2
        assert torch.equal(scores[name].topk(half).indices.sort().values, expected.topk(half).indices.sort().values), name
