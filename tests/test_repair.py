"""Closed-form repair: what it improves, what it leaves alone, and what it says about inputs that cannot be fitted."""

from __future__ import annotations

import copy
import importlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from networks import PLAIN, random_unet
from torch import Tensor, nn

from wanda_fast.compact import compact, cost_model, layer_keep, prepared_copy
from wanda_fast.least_squares import Sums, solve_ridge
from wanda_fast.lockstep import Hooked, Walk, peak_bytes
from wanda_fast.plan import Target, build_plan, free_problem, stock_problem, uniform_widths
from wanda_fast.repair import repair
from wanda_fast.slots import find_slots

module = importlib.import_module("wanda_fast.repair")
Batches = Callable[[], Iterable[Any]]
SMALL: dict[str, Any] = {
    **PLAIN,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks are so small that more threads only wait for each other, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prune(
    unet: UNet2DModel, layout: str = "free", ratio: float = 0.25
) -> tuple[UNet2DModel, UNet2DModel, dict[str, Any]]:
    """(dense twin, pruned network, kept channels of every layer), channels chosen by the size of what reads and writes them."""
    slots = find_slots(unet)
    costs = cost_model(unet, slots)
    if layout == "stock":
        problem = stock_problem(slots, costs, unet.config, "balanced", 4, 4)
    else:
        problem = free_problem(slots, costs, "balanced", 4, 4)
    g = torch.Generator().manual_seed(5)
    scores = {n: torch.rand(s.width, generator=g) for n, s in slots.slots.items()}
    widths = uniform_widths(problem, Target(ratio=ratio))
    plan = build_plan(slots, widths, scores, unet.config, layout=layout, norm_policy="balanced")
    return prepared_copy(unet, plan.identity_shortcuts), compact(unet, plan), layer_keep(slots, plan.keep)


def noise(unet: UNet2DModel, n: int, seed: int, batch: int = 8) -> Batches:
    """Random network inputs, the same at every call."""
    g = torch.Generator().manual_seed(seed)
    size, steps = unet.config["sample_size"], unet.config.get("num_train_timesteps") or 1000
    # smooth maps: neighbouring positions of images are related
    x = F.interpolate(torch.randn(n, unet.config["in_channels"], size // 2, size // 2, generator=g), scale_factor=2)
    x = x + 0.5 * torch.randn(x.shape, generator=g)
    t = torch.randint(0, steps, (n,), generator=g)
    labels = torch.arange(n) % 5 if unet.class_embedding is not None else None
    parts = [slice(i, i + batch) for i in range(0, n, batch)]
    return lambda: [(x[p], t[p], None if labels is None else labels[p]) for p in parts]


@torch.no_grad()
def difference(dense: nn.Module, pruned: nn.Module, batches: Batches) -> float:
    """Squared error of the prediction relative to the dense one's square."""
    error = total = 0.0
    for x, t, labels in batches():
        a, b = (m(x, t, class_labels=labels).sample for m in (dense, pruned))
        error += float((a - b).square().sum())
        total += float(a.square().sum())
    return error / total


@pytest.mark.parametrize("layout", ["free", "stock"])
@pytest.mark.parametrize("goal", ["block", "layer"])
def test_lowers_every_error_it_accepts_and_the_networks(layout: str, goal: str) -> None:
    unet = random_unet("plain")
    dense, pruned, keep = prune(unet, layout)
    held = noise(unet, 16, seed=9)
    before = difference(dense, pruned, held)
    weights = copy.deepcopy(dense.state_dict())
    report = repair(dense, pruned, keep, noise(unet, 48, seed=1), target=goal)
    after = difference(dense, pruned, held)
    assert after < 0.5 * before
    done = [r for r in report.layers if r.accepted]
    assert len(done) > 20
    for r in done:
        assert r.error_before is not None and r.error_after is not None and r.error_after < r.error_before
        assert r.held_before is not None and r.held_after is not None and r.held_after < r.held_before
    assert all(torch.equal(v, weights[k]) for k, v in dense.state_dict().items())
    names = {n for n, m in pruned.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert names <= {r.layer for r in report.layers}
    assert report.images == 48 and report.replayed_images == 0
    json.dumps(report.to_dict())
    assert f"{len(done)} of {len(report.layers)}" in report.summary()


@pytest.mark.parametrize("name", ["heads", "classes", "scale_shift", "resnet_resampling", "two_layers_one_channel"])
def test_other_architectures(name: str) -> None:
    unet = random_unet(name)
    dense, pruned, keep = prune(unet)
    held = noise(unet, 8, seed=9)
    before = difference(dense, pruned, held)
    report = repair(dense, pruned, keep, noise(unet, 32, seed=1))
    assert difference(dense, pruned, held) < 0.8 * before
    assert not [r for r in report.layers if r.status == "skipped"]


def test_the_bundled_model() -> None:
    from wanda_fast.checkpoint import load_pipeline
    from wanda_fast.data import load_images

    loaded = load_pipeline(None, dtype=torch.float32, device="cpu")
    unet, scheduler = loaded.unet.eval(), loaded.scheduler
    found = load_images("self", n=48, unet=unet, scheduler=scheduler, bundled=True)
    images = found.permute(0, 3, 1, 2).float() / 127.5 - 1
    g = torch.Generator().manual_seed(0)
    t = torch.randint(0, 1000, (48,), generator=g)
    x = scheduler.add_noise(images, torch.randn(images.shape, generator=g), t)
    dense, pruned, keep = prune(unet, "stock")
    held: Batches = lambda: [(x[40:], t[40:], None)]  # noqa: E731
    before = difference(dense, pruned, held)
    repair(
        dense,
        pruned,
        keep,
        lambda: [(x[i : i + 8], t[i : i + 8], None) for i in range(0, 40, 8)],
        max_rows=4096,
        ridge=1e-2,
    )
    assert difference(dense, pruned, held) < 0.3 * before


def test_nothing_pruned_nothing_changed() -> None:
    unet = random_unet(SMALL)
    pruned = copy.deepcopy(unet)
    report = repair(unet, pruned, {}, noise(unet, 16, seed=1))
    assert {r.status for r in report.layers} == {"exact"}
    assert all(torch.equal(v, unet.state_dict()[k]) for k, v in pruned.state_dict().items())


def test_memory_bound_gives_the_same_weights() -> None:
    unet = random_unet(SMALL)
    dense, pruned, keep = prune(unet)
    other = copy.deepcopy(pruned)
    batches = noise(unet, 24, seed=1)
    assert repair(dense, pruned, keep, batches).replayed_images == 0
    report = repair(dense, other, keep, batches, memory_limit=1)
    assert report.replayed_images == 16 and report.images == 24
    assert "24 images, 16 of them passed anew for every layer, for lack of memory, in " in report.summary()
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in pruned.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_networks(dtype: torch.dtype) -> None:
    unet = random_unet(SMALL)
    dense, pruned, keep = prune(unet)
    held = noise(unet, 16, seed=9)
    before = difference(dense, pruned, held)
    small = [nn.Module.to(copy.deepcopy(m), dtype=dtype) for m in (dense, pruned)]
    repair(small[0], small[1], keep, noise(unet, 32, seed=1), dtype=torch.bfloat16)
    assert {p.dtype for p in small[1].parameters()} == {dtype}
    assert difference(dense, nn.Module.to(small[1], dtype=torch.float32), held) < 0.7 * before


def test_too_few_images() -> None:
    unet = random_unet(SMALL)
    dense, pruned, keep = prune(unet)
    held = noise(unet, 16, seed=9)
    before = difference(dense, pruned, held)
    report = repair(dense, pruned, keep, noise(unet, 2, seed=1))
    after = difference(dense, pruned, held)
    assert math.isfinite(after) and after < before
    assert [r for r in report.layers if "rows for" in r.remark]
    assert all(r.held_before is None for r in report.layers)


def test_the_summary_says_which_images_judge() -> None:
    unet = random_unet(SMALL)
    for images, where in ((7, "the images of the fit"), (8, "held-out images")):
        dense, pruned, keep = prune(unet)
        text = repair(dense, pruned, keep, noise(unet, images, seed=1)).summary()
        assert text.endswith(f"on {where}") and " 0 -> 0 " not in text


def test_bias_moves_the_mean_alone() -> None:
    unet = random_unet(SMALL)
    dense, pruned, keep = prune(unet)
    held, before = noise(unet, 16, seed=9), copy.deepcopy(pruned.state_dict())
    report = repair(dense, pruned, keep, noise(unet, 32, seed=1), method="bias")
    changed = {k for k, v in pruned.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.endswith("bias") for k in changed)
    assert changed <= {f"{r.layer}.bias" for r in report.layers}
    assert math.isfinite(difference(dense, pruned, held))
    assert "biases" in report.summary()


def test_bias_is_taken_back_where_the_network_gets_worse() -> None:
    """Means put back in every layer raise the error of the output here: none of them is kept."""
    from wanda_fast.checkpoint import load_pipeline
    from wanda_fast.data import load_images

    loaded = load_pipeline(None, dtype=torch.float32, device="cpu")
    unet = loaded.unet.eval()
    images = load_images("self", n=16, unet=unet, scheduler=loaded.scheduler, bundled=True)
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    t = torch.arange(16) * 62
    noised = loaded.scheduler.add_noise(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), t)
    dense, pruned, keep = prune(unet, "stock")
    before = copy.deepcopy(pruned.state_dict())
    report = repair(dense, pruned, keep, lambda: [(noised, t, None)], method="bias")
    assert all(torch.equal(v, before[k]) for k, v in pruned.state_dict().items())
    kept = [r for r in report.layers if "would have risen" in r.remark]
    assert kept and {r.status for r in kept} == {"kept"} and not [r for r in report.layers if r.accepted]


def test_the_picture_of_a_repair(tmp_path: Path) -> None:
    """One line per layer that had an error; the dots are where the report says."""
    from PIL import Image

    unet = random_unet(SMALL)
    dense, pruned, keep = prune(unet)
    report = repair(dense, pruned, keep, noise(unet, 24, seed=1))
    few = copy.deepcopy(report)
    few.layers = [r for r in few.layers if r.accepted][:2]
    module.save_picture(report, tmp_path / "new" / "repair.png", title="small")
    module.save_picture(few, tmp_path / "few.png")
    few.layers = []
    module.save_picture(few, tmp_path / "none.png")
    sizes = [Image.open(tmp_path / name).size for name in ("new/repair.png", "few.png", "none.png")]
    assert sizes[0][1] > 2 * sizes[1][1] and sizes[1] == sizes[2]
    colours = [len(Image.open(tmp_path / name).convert("RGB").getcolors(1 << 24)) for name in ("few.png", "none.png")]
    assert colours[0] > colours[1]


@pytest.mark.parametrize(("images", "weakest"), [(16, 1e-2), (64, 1e-5)])
def test_ridges_are_tried_down_to_the_best(images: int, weakest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without noise want no ridge at all, the search goes to the end; noisy ones want a strong one, it stops early."""
    tried = []

    def watch(xtx: Tensor, xtr: Tensor, ridge: float, **options: bool) -> tuple[Tensor, float, str]:
        tried.append(ridge)
        return solve_ridge(xtx, xtr, ridge, **options)

    monkeypatch.setattr(module, "solve_ridge", watch)
    dense, pruned, keep = chain([0, 2, 3, 5])
    if weakest == 1e-5:  # what the removed channels wrote can be predicted exactly
        for part in ("weight", "bias"):
            for gone, stays in ((1, 0), (4, 2)):
                getattr(dense.first, part)[gone] = getattr(dense.first, part)[stays]
        rows = math.inf
    else:
        rows = 1e-9
        monkeypatch.setattr(module, "_MIN_ROWS", 48)
    report = repair(dense, pruned, keep, inputs(images), rows_per_unknown=rows)
    second = next(r for r in report.layers if r.layer == "second")
    assert tried == sorted(tried, reverse=True) and tried[-1] <= (second.ridge or 0)
    assert (second.ridge == 1e-5 and len(tried) == 5) if weakest == 1e-5 else len(tried) < 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("layout", ["free", "stock"])
def test_gpu_and_cpu_agree(layout: str) -> None:
    """The same sums and solutions: weights as near to those of a CPU as the network lets them be, of a layer within 1e-3 of float64's.

    Some layers of a random network hardly determine their weights: after attention its `to_out` moves by 1e-3 when the images move by 3e-7,
    one rounding. So the CPU repairs once more from such images, and a GPU may be a few times as far off as that.
    """
    unet = random_unet(SMALL)
    batches = noise(unet, 48, seed=1)
    rounded = [(x * (1 + 3e-7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5))), *rest) for x, *rest in batches()]
    held = noise(unet, 16, seed=9)
    weights, errors = [], []
    for device, images in (("cpu", batches), ("cpu", lambda: iter(rounded)), ("cuda", batches)):
        dense, pruned, keep = prune(unet, layout)
        report = repair(dense, pruned, keep, images, device=device, ridge=1e-2, rows_per_unknown=math.inf)
        weights.append({k: v.double() for k, v in pruned.state_dict().items() if k.endswith("weight")})
        errors.append((difference(dense, pruned, held), [r.status for r in report.layers]))
    assert errors[0][1] == errors[2][1] and errors[2][0] == pytest.approx(errors[0][0], rel=1e-2)
    for name, want in weights[0].items():
        moved, error = (float((weights[i][name] - want).norm() / want.norm()) for i in (1, 2))
        assert error < max(1e-3, 5 * moved), (name, error, moved)
    dense_chain, pruned_chain, keep_chain = chain([0, 2, 3, 5])
    sliced = second_layer(pruned_chain)
    repair(dense_chain, pruned_chain, keep_chain, inputs(), device="cuda", ridge=1e-3)
    x, goal, _ = rows_of(dense_chain, pruned_chain, inputs())
    spread = (x - x.mean(0)).square().sum(0)[:-1].mean()
    penalty = torch.full((x.shape[1],), 1e-3 * float(spread), dtype=torch.float64)
    penalty[-1] = 0
    want = torch.linalg.solve(x.t() @ x + penalty.diag(), x.t() @ goal + penalty[:, None] * sliced)
    assert float((second_layer(pruned_chain) - want).norm() / want.norm()) < 1e-3


def test_none_changes_nothing() -> None:
    unet = random_unet(SMALL)
    dense, pruned, keep = prune(unet)
    before = copy.deepcopy(pruned.state_dict())
    assert repair(dense, pruned, keep, noise(unet, 8, seed=1), method="none").layers == []
    assert all(torch.equal(v, before[k]) for k, v in pruned.state_dict().items())


# ---- a network small enough to be solved by hand


class Chain(nn.Module):
    """Two convolutions; called like a UNet."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x)) * (1 + t[:, None, None, None] / 1000))


def chain(keep_channels: list[int]) -> tuple[Chain, Chain, dict[str, Any]]:
    torch.manual_seed(3)
    dense = Chain().requires_grad_(False)
    kept = torch.tensor(keep_channels)
    pruned = Chain(len(keep_channels)).requires_grad_(False)
    pruned.first.weight.copy_(dense.first.weight[kept])
    pruned.first.bias.copy_(dense.first.bias[kept])  # type: ignore[union-attr, index]
    pruned.second.weight.copy_(dense.second.weight[:, kept])
    pruned.second.bias.copy_(dense.second.bias)  # type: ignore[union-attr, arg-type]
    return dense, pruned, {"first": (kept, None), "second": (None, kept)}


def rows_of(dense: Chain, pruned: Chain, batches: Batches) -> tuple[Tensor, Tensor, Tensor]:
    """What the pruned second layer sees (patches and ones), the dense outputs and t, row by row, of the images of the fit."""
    x = torch.cat([b[0] for b in batches()]).double()
    t = torch.cat([b[1] for b in batches()]).double()
    fit = torch.arange(len(x)) % 8 != 7
    x, t = x[fit], t[fit]
    a, b = (copy.deepcopy(m).double() for m in (dense, pruned))
    hidden = F.silu(b.first(x)) * (1 + t[:, None, None, None] / 1000)
    patches = F.unfold(hidden, 3, padding=1).transpose(1, 2).flatten(0, 1)
    rows = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], dim=1)
    return rows, a(x, t).flatten(2).transpose(1, 2).flatten(0, 1), t.repeat_interleave(64)


def inputs(n: int = 32, seed: int = 0) -> Batches:
    g = torch.Generator().manual_seed(seed)
    x, t = torch.randn(n, 3, 8, 8, generator=g), torch.randint(0, 1000, (n,), generator=g)
    return lambda: [(x[i : i + 8], t[i : i + 8], None) for i in range(0, n, 8)]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("rows", [math.inf, 1e6], ids=["whole_maps", "rows"])
def test_equals_a_float64_ridge_regression(
    ridge: float, weighted: bool, rows: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows != math.inf:  # all positions, taken as rows
        monkeypatch.setattr(module, "_WHOLE_FROM", 2.0)
    dense, pruned, keep = chain([0, 2, 3, 5])
    sliced = second_layer(pruned)
    steer = (lambda t: torch.where(t < 300, 4.0, 0.5)) if weighted else None
    report = repair(dense, pruned, keep, inputs(), ridge=ridge, rows_per_unknown=rows, timestep_weight=steer)
    x, goal, t = rows_of(dense, pruned, inputs())
    w = torch.ones(len(t)) if steer is None else steer(t)
    w = w.double()[:, None]
    n, mean = w.sum(), (w * x).sum(0) / w.sum()
    # λ counts the spread around the mean and leaves the bias free
    penalty = torch.full(
        (x.shape[1],), ridge * float((w * (x - mean).square()).sum(0)[:-1].mean()), dtype=torch.float64
    )
    penalty[-1] = 0
    want = torch.linalg.solve((w * x).t() @ x + penalty.diag(), (w * x).t() @ goal + penalty[:, None] * sliced)
    got = second_layer(pruned)
    assert float((got - want).norm() / want.norm()) < 1e-5
    second = next(r for r in report.layers if r.layer == "second")
    spread = (w * (goal - (w * goal).sum(0) / n).square()).sum()
    errors = [float((w * (goal - x @ v).square()).sum() / spread) for v in (sliced, want)]
    assert [second.error_before, second.error_after] == pytest.approx(errors, rel=1e-4)
    assert second.rows == len(x) and second.unknowns == x.shape[1] - 1


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_a_layer_without_a_bias_is_fitted_without_one(ridge: float) -> None:
    """Its error is the one that is reported: no constant is fitted that the layer cannot add."""
    dense, pruned, keep = chain([0, 2, 3, 5])
    for m in (dense, pruned):
        m.second.bias = None
        m.first.bias += 2  # inputs far from a mean of zero
    sliced = pruned.second.weight.flatten(1).t().double()
    report = repair(dense, pruned, keep, inputs(), ridge=ridge, rows_per_unknown=math.inf)
    x, goal, _ = rows_of(dense, pruned, inputs())
    x = x[:, :-1]
    penalty = ridge * float(x.square().sum(0).mean())
    gram = x.t() @ x
    gram.diagonal().add_(penalty)
    want = torch.linalg.solve(gram, x.t() @ goal + penalty * sliced)
    got = pruned.second.weight.flatten(1).t().double()
    assert float((got - want).norm() / want.norm()) < 1e-5
    second = next(r for r in report.layers if r.layer == "second")
    spread = (goal - goal.mean(0)).square().sum()
    errors = [float((goal - x @ v).square().sum() / spread) for v in (sliced, got)]
    assert [second.error_before, second.error_after] == pytest.approx(errors, rel=1e-4)


def second_layer(model: Chain) -> Tensor:
    """Weight and bias of the second layer as the matrix [K + 1, C_out] of its patches, in float64."""
    assert model.second.bias is not None
    return torch.cat([model.second.weight.flatten(1), model.second.bias[:, None]], dim=1).t().double()


def test_drawn_positions_come_close_to_all() -> None:
    results = []
    for limit in (math.inf, 600):
        dense, pruned, keep = chain([0, 2, 3, 5])
        repair(
            dense,
            pruned,
            keep,
            inputs(64),
            ridge=1e-4,
            rows_per_unknown=math.inf,
            max_rows=None if limit == math.inf else 600,
        )
        rows, goal, _ = rows_of(dense, pruned, inputs(32, seed=1))
        results.append(float((goal - rows @ second_layer(pruned)).square().sum()))
    assert results[0] <= results[1] < 1.2 * results[0]


def test_constant_and_repeated_channels_are_reported() -> None:
    dense, pruned, keep = chain([0, 1, 2, 3])
    for m in (dense, pruned):
        m.first.weight[1] = 0  # a channel that is zero everywhere
        m.first.bias[1] = 0  # type: ignore[index]
        m.first.weight[2], m.first.bias[2] = m.first.weight[0], m.first.bias[0]  # type: ignore[index]
    report = repair(dense, pruned, keep, inputs(), ridge=0.0, rows_per_unknown=math.inf)
    second = next(r for r in report.layers if r.layer == "second")
    assert "rank-deficient: ridge raised" in second.remark and "constant inputs" in second.remark
    assert second.accepted and all(torch.isfinite(p).all() for p in pruned.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["lstsq", "bias"])
def test_non_finite_values_stop_with_the_layers_name(bad: float, method: str) -> None:
    dense, pruned, keep = chain([0, 2, 3, 5])
    (dense if method == "bias" else pruned).first.bias[0] = bad  # type: ignore[index]
    keep["first"] = (torch.tensor([0, 2, 3, 5]), None)
    before = copy.deepcopy(pruned.state_dict())
    with pytest.raises(RuntimeError, match=r"non-finite values .* layer (first|second)"):
        repair(dense, pruned, keep, inputs(), method=method)
    assert all(torch.equal(v, before[k]) or not torch.isfinite(v).all() for k, v in pruned.state_dict().items())
    assert not [t for t in threading.enumerate() if t.name == "wanda_fast walk"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "method must be one of"),
        ({"target": "network"}, "target must be one of"),
        ({"ridge": -1.0}, "ridge must be"),
        ({"ridge": ()}, "ridge must be"),
        ({"keep": {}}, "first.*6 output channels, the layer has 4"),
        ({"batches": lambda: []}, "no image"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    dense, pruned, keep = chain([0, 2, 3, 5])
    arguments: dict[str, Any] = {"keep": keep, "batches": inputs(), **change}
    with pytest.raises(ValueError, match=message):
        repair(dense, pruned, arguments.pop("keep"), arguments.pop("batches"), **arguments)


def test_layers_that_cannot_be_fitted_are_named() -> None:
    class Odd(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.grouped(super().forward(x, t))

    dense = Odd().requires_grad_(False)
    report = repair(dense, copy.deepcopy(dense), {}, inputs(8))
    remarks = {r.layer: r.remark for r in report.layers if r.status == "skipped"}
    assert remarks == {"grouped": "grouped convolution", "unused": "not reached by the forward pass"}


# ---- the solver and the passes


def test_solve_ridge_of_a_singular_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=g, dtype=torch.float64)
    x = torch.cat([x, x[:, :2], torch.ones(50, 1, dtype=torch.float64)], dim=1)  # two columns twice
    r = torch.randn(50, 3, generator=g, dtype=torch.float64)
    delta, used, remark = solve_ridge(x.t() @ x, x.t() @ r, 0.0)
    assert used > 0 and "rank-deficient" in remark
    best = torch.linalg.lstsq(x, r, driver="gelsd").solution
    torch.testing.assert_close(x @ delta, x @ best, rtol=1e-6, atol=1e-6)
    delta, used, remark = solve_ridge(
        torch.zeros(3, 3, dtype=torch.float64) + torch.eye(3)[2].diag(), torch.ones(3, 1).double(), 1e-3
    )
    assert float(delta[:2].abs().max()) == 0 and "2 constant inputs" in remark


def test_a_walk_stops_and_goes_on() -> None:
    model = Chain().requires_grad_(False)
    ran = []
    model.second.register_forward_hook(lambda *_: ran.append("second"))
    x, t, _ = next(iter(inputs()()))
    with Hooked(model, ["first", "second"]) as hooked:
        walk = Walk(hooked, lambda m: m(x, t), sticky=[("first", "in")])
        walk.advance([("second", "in")])
        assert not ran and walk.take(("first", "in")) is x
        model.second.weight.zero_()  # seen by the rest of the pass
        walk.advance([("second", "out")])
        expected = model.second.bias[None, :, None, None].expand(8, 4, 8, 8)  # type: ignore[index]
        torch.testing.assert_close(walk.take(("second", "out")), expected)
        with pytest.raises(RuntimeError, match="ended before"):
            walk.advance([("first", "out")])
        walk.close()
        stopped = Walk(hooked, lambda m: m(x, t))
        stopped.advance([("first", "in")])
        stopped.close()
        assert ran == ["second"]
        broken = Walk(hooked, lambda m: m(x[:, :2], t))
        with pytest.raises(RuntimeError, match="channels"):
            broken.advance([("second", "in")])
        broken.close()
    assert not model.first._forward_hooks and not model.first._forward_pre_hooks
    assert not [t for t in threading.enumerate() if t.name == "wanda_fast walk"]


def test_peak_bytes_counts_what_is_alive() -> None:
    x = torch.zeros(1000)

    def call() -> None:
        a = x + 1
        b = a.view(10, 100) + 1  # the view is no new memory
        del a
        c = b + 1
        del b, c

    assert peak_bytes(call) == 8000


def test_rows_held_out_count_by_their_weight() -> None:
    g = torch.Generator().manual_seed(3)
    x, r = torch.cat([torch.randn(40, 3, generator=g), torch.ones(40, 1)], 1), torch.randn(40, 2, generator=g)
    y, w, delta = torch.randn(40, 2, generator=g), torch.rand(40, generator=g), torch.randn(4, 2, generator=g).double()
    sums = Sums(3, 2, torch.device("cpu"))
    sums.hold_out(x[:15], r[:15], y[:15], w[:15])
    sums.hold_out(x[15:], r[15:], y[15:], w[15:])
    left, goal, share = r.double() - x.double() @ delta, y.double(), w.double()[:, None]
    spread = (share * (goal - (share * goal).sum(0) / share.sum()).square()).sum()
    assert sums.held_error(delta, slice(None)) == pytest.approx(float((share * left.square()).sum() / spread), rel=1e-5)
