"""The activation study: statistics without pruning, as numbers (:func:`study`); `study_figures` draws them.

What is looked at, and of what:

- *activations*: the single values that enter a Conv2d or Linear layer, over all noised images, channels and positions;
- *channel norms*: one number per input channel, the ‖X‖₂ that scores are made of (:func:`wanda_fast.analysis.analyse`);
- *rankings*: the order of a layer's input channels by that norm, and of a slot's channels by their score.

Memory is bounded. A first run over the noised images collects Σ x and Σ x² (the calibration itself); a second run over
the same inputs, which then knows mean and deviation, adds up the powers of (x - mean) / deviation in float64 and counts
what lies beyond 2 and 3 deviations. No activation is kept.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .analysis import analyse, heat_map
from .calibrate import calibrate, collect_layers, noised_batches
from .errors import UserError
from .importance import Context, get_criterion, slot_scores
from .plan import select
from .sampling import evaluating, fast_layout, place, predict
from .slots import find_slots
from .smaller_batches import in_smaller_batches
from .stats import ActivationStats

FORMAT = "wanda_fast.analysis/1"
LEAST = 8  # noised images: fewer leave one of early, middle and late empty
RULE_OF_THUMB = 0.05  # share beyond 2σ from which activation-aware scores are said to pay
NORMAL_SHARE = {2: 0.0455, 3: 0.0027}  # of a normal distribution
RANGES = ("early", "middle", "late")
WEIGHT_ALONE = "|W| alone"
_BANDS = 10  # of the ranking over timesteps
_BINS, _REACH = 120, 6.0  # of the pooled histogram, in deviations
_OTHER_HALF = 11  # added to the seed for the second half of the calibration
_CHUNK = 1 << 24  # histc counts in float32, which is exact up to here


def study(
    unet: nn.Module,
    scheduler: Any,
    images: Tensor,
    *,
    n: int = 1024,
    ratio: float = 0.3,
    mode: str = "random",
    batch_size: int = 32,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    dataset: str = "",
    name: str = "",
    progress: bool = False,
) -> tuple[dict[str, Any], ActivationStats]:
    """Run n noised images through the network twice and describe what its layers see.

    The images are dealt into two halves (every other one) with noise of their own, so that what both halves agree on is
    no accident of the images.

    Args:
        images: uint8 [N, H, W, C].
        n: number of noised images, at least 8.
        ratio: share of every slot's channels that the comparison of removed sets takes away.
        mode, batch_size, seed, device, dtype, dataset: as for :func:`wanda_fast.calibrate.calibrate`.
        name: of the model, for the titles.

    Returns:
        (report, statistics). The report holds JSON values: ``activations`` and ``channel_norms`` (``global`` and
        ``layers``), ``histogram``, ``heat_map``, ``stability``, ``removed``, ``verdict``. The statistics can be given to
        `prune` (``load_stats``).

    Raises:
        UserError: n < 8, or as :func:`wanda_fast.calibrate.calibrate`.
    """
    if n < LEAST:
        raise UserError(f"the study needs at least {LEAST} noised images, not {n}.")
    if not 0 < ratio < 1:
        raise UserError(f"the ratio of the study must lie between 0 and 1, not {ratio}.")
    device, dtype = place(unet, device, dtype)
    halves = _halves(images, n, seed)
    parts = [
        calibrate(
            unet, scheduler, half.images, n=half.n, mode=mode, batch_size=batch_size, seed=half.seed, device=device,
            dtype=dtype, means=True, dataset=dataset, progress=progress, rows="sample" if n < 256 else "auto",
        )
        for half in halves
    ]  # fmt: skip
    stats = parts[0].merge(parts[1])
    total = int(scheduler.config.num_train_timesteps)

    def second_run(size: int) -> _Shapes:
        made = _Shapes(unet, stats, device)
        for half in halves:
            made.run(unet, _inputs(unet, scheduler, half, mode, (0, total), size, device, dtype), dtype, half.n, progress)
        return made

    shapes = in_smaller_batches(second_run, batch_size, what="the study")
    edges, bands = heat_map(stats)
    scores = _scores(unet, stats, seed)
    report: dict[str, Any] = {
        "format": FORMAT,
        "model": name,
        "dataset": dataset,
        "samples": n,
        "images": len(images),
        "timesteps": mode,
        "seed": seed,
        "num_train_timesteps": total,
        "activations": shapes.report(),
        "histogram": shapes.histogram_report(),
        "channel_norms": {k: v for k, v in analyse(stats).items() if k in ("global", "layers")},
        "heat_map": {"edges": edges.tolist(), "layers": {k: r.tolist() for k, r in zip(stats.tables, bands, strict=True)}},
        "stability": stability(stats, parts),
        "removed": removed_sets(scores, ratio),
    }
    report["verdict"] = verdict(report)
    return _plain(report), stats


# --------------------------------------------------------------------------------------------------------------- inputs


@dataclass
class _Half:
    images: Tensor
    n: int
    seed: int


def _halves(images: Tensor, n: int, seed: int) -> list[_Half]:
    odd = images[1::2] if len(images) > 1 else images
    return [_Half(images[0::2], n - n // 2, seed), _Half(odd, n // 2, seed + _OTHER_HALF)]


def _inputs(
    unet: nn.Module,
    scheduler: Any,
    half: _Half,
    mode: str,
    target: tuple[int, int],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    return noised_batches(
        unet, scheduler, half.images, n=half.n, mode=mode, target=target, batch_size=batch_size, seed=half.seed,
        device=device, dtype=dtype,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------- shapes of the values


class _Shapes:
    """Powers and tail counts of the standardised inputs of every layer."""

    def __init__(self, unet: nn.Module, stats: ActivationStats, device: torch.device) -> None:
        self._layers = {n: m for n, m in collect_layers(unet).items() if n in stats.tables}
        samples = int(stats.counts.sum())
        self.values = {n: samples * stats.positions[n] * stats.tables[n].shape[1] for n in stats.tables}
        sums = {n: float(stats.sums[n].sum()) for n in stats.tables}
        squares = {n: float(stats.tables[n].double().sum()) for n in stats.tables}
        self.centre = {n: _centre(sums[n], squares[n], self.values[n]) for n in stats.tables}
        self.whole = _centre(sum(sums.values()), sum(squares.values()), sum(self.values.values()))
        self.powers = {n: torch.zeros(4, dtype=torch.float64, device=device) for n in stats.tables}
        self.beyond = {n: torch.zeros(4, dtype=torch.int64, device=device) for n in stats.tables}  # own 2σ, 3σ; global
        self.histogram = torch.zeros(_BINS, dtype=torch.float64, device=device)
        self._order = list(stats.tables)
        self._shared: dict[str, str] = {}  # layer → the layer before it that is given the same tensor
        self._last: tuple[Tensor, int, str] | None = None
        self._recording = False

    def run(self, unet: nn.Module, batches: Any, dtype: torch.dtype, n: int, progress: bool) -> None:
        """Send every batch through the network with the hooks in place."""
        from tqdm import tqdm

        handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in self._layers.items()]
        out: Tensor | None = None
        try:
            bar = tqdm(total=n, desc="shapes", unit="image", disable=not progress)
            with torch.no_grad(), evaluating(unet), fast_layout(unet), bar:
                while True:
                    try:
                        # Trajectories run the network inside the generator too; those passes are not counted.
                        batch = batches.send(out)
                    except StopIteration:
                        break
                    self._recording = True
                    out = predict(unet, batch.x, batch.t, batch.labels, dtype=dtype)
                    self._recording, self._last = False, None
                    bar.update(len(batch.x))
        finally:
            self._recording, self._last = False, None
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._recording:
                return
            x: Tensor = args[0]
            last = self._last
            if last is not None and last[0] is x and last[1] == x._version:  # queries, keys and values read one tensor
                self._shared[name] = last[2]
                return
            self._last = (x, x._version, name)
            self._add(name, x)

        return hook

    def _add(self, name: str, x: Tensor) -> None:
        x = x.float()
        mean, deviation = self.centre[name]
        whole_mean, whole_deviation = self.whole
        distance = (x - whole_mean).abs_()
        far = [(distance > k * whole_deviation).sum() for k in (2, 3)]
        z = (x - mean).mul_(1 / deviation if deviation > 0 else 0.0)
        square = z * z
        own = [(square > k * k).sum() for k in (2, 3)]
        powers = [z.sum(dtype=torch.float64), square.sum(dtype=torch.float64),
                  (square * z).sum(dtype=torch.float64), square.square().sum(dtype=torch.float64)]  # fmt: skip
        self.powers[name] += torch.stack(powers)
        self.beyond[name] += torch.stack([*own, *far])
        for part in z.flatten().split(_CHUNK):
            self.histogram += torch.histc(part, _BINS, -_REACH, _REACH).double()

    def report(self) -> dict[str, Any]:
        """Mean, deviation, skewness, excess kurtosis and tail shares, of each layer's values and of all values."""
        layers: dict[str, dict[str, float | int]] = {}
        moments: dict[str, tuple[float, float, float, float]] = {}
        counts = {}
        for name in self._order:
            owner = self._shared.get(name, name)
            mean, deviation = self.centre[owner]
            size = self.values[owner]
            m = [float(p) / size for p in self.powers[owner].cpu()]
            central = _central(*m)
            moments[name] = (
                mean + deviation * m[0],
                deviation**2 * central[0],
                deviation**3 * central[1],
                deviation**4 * central[2],
            )
            counts[name] = self.beyond[owner].cpu().tolist()
            layers[name] = {
                "values": size,
                **_described(*moments[name]),
                "beyond_2_sigma": counts[name][0] / size,
                "beyond_3_sigma": counts[name][1] / size,
            }
        total = sum(self.values[n] for n in self._order)
        pooled = _pool({n: (self.values[n], *moments[n]) for n in self._order})
        whole = {
            "values": total,
            **_described(*pooled),
            "beyond_2_sigma": sum(counts[n][2] for n in self._order) / total,
            "beyond_3_sigma": sum(counts[n][3] for n in self._order) / total,
        }
        return {"of": "single values that enter a layer", "global": whole, "layers": layers}

    def histogram_report(self) -> dict[str, Any]:
        """Pooled histogram of (x - mean) / deviation, each layer by its own; density per bin, for distinct inputs."""
        counts = self.histogram.cpu()
        inputs = [n for n in self._order if n not in self._shared]
        total = sum(self.values[n] for n in inputs)
        width = 2 * _REACH / _BINS
        edges = np.linspace(-_REACH, _REACH, _BINS + 1)
        return {
            "edges": edges.tolist(),
            "density": (counts / (total * width)).tolist(),
            "outside": max(0.0, 1 - float(counts.sum()) / total),
        }


def _centre(total: float, squares: float, count: int) -> tuple[float, float]:
    mean = total / count
    return mean, math.sqrt(max(squares / count - mean * mean, 0.0))


def _central(m1: float, m2: float, m3: float, m4: float) -> tuple[float, float, float]:
    """Central moments 2, 3 and 4 from raw ones."""
    return (
        max(m2 - m1**2, 0.0),
        m3 - 3 * m1 * m2 + 2 * m1**3,
        m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4,
    )


def _pool(parts: Mapping[str, tuple[int, float, float, float, float]]) -> tuple[float, float, float, float]:
    """Mean and central moments of a union of groups (size, mean, central moments 2, 3, 4)."""
    total = sum(p[0] for p in parts.values())
    mean = sum(p[0] * p[1] for p in parts.values()) / total
    m2 = m3 = m4 = 0.0
    for size, centre, c2, c3, c4 in parts.values():
        d = centre - mean
        m2 += size * (c2 + d**2)
        m3 += size * (c3 + 3 * d * c2 + d**3)
        m4 += size * (c4 + 4 * d * c3 + 6 * d**2 * c2 + d**4)
    return mean, m2 / total, m3 / total, m4 / total


def _described(mean: float, m2: float, m3: float, m4: float) -> dict[str, float]:
    flat = m2 <= 1e-20 * mean * mean or m2 == 0
    return {
        "mean": mean,
        "deviation": math.sqrt(m2),
        "skewness": 0.0 if flat else m3 / m2**1.5,
        "kurtosis": 0.0 if flat else m4 / m2**2 - 3,
    }


# -------------------------------------------------------------------------------------------------------------- rankings


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation ρ of two lists, ties sharing their mean rank; NaN where one of them is constant.

    Source: Spearman 1904.
    """
    from scipy.stats import rankdata

    x, y = rankdata(a), rankdata(b)
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else math.nan


def stability(stats: ActivationStats, halves: list[ActivationStats]) -> dict[str, Any]:
    """How far the order of a layer's channels depends on the timestep and on the calibration images.

    Returns:
        ``bands`` (edges in timesteps), ``between_bands`` [B][B] (ρ of two bands, mean over layers), ``layers``: name →
        ``halves`` (ρ of the two halves), ``timesteps`` (mean ρ of all pairs of bands), ``early_late`` (ρ of the first and
        the last band), ``bands`` (ρ of each band with all timesteps together); ``global``: their means over layers.
    """
    edges, place = _bands(stats)
    count = len(edges) - 1
    layers: dict[str, dict[str, Any]] = {}
    between = []
    for name in stats.tables:
        _, norms = stats.grouped(name)
        rows = [norms[torch.from_numpy(place == b)].double().mean(0).numpy() for b in range(count)]
        matrix = np.array([[spearman(x, y) for y in rows] for x in rows])
        whole = stats.act_norm(name).numpy()
        pairs = matrix[np.triu_indices(count, 1)]
        between.append(matrix)
        layers[name] = {
            "halves": spearman(halves[0].act_norm(name).numpy(), halves[1].act_norm(name).numpy()),
            "timesteps": _mean(pairs) if count > 1 else 1.0,
            "early_late": float(matrix[0, -1]),
            "bands": [spearman(row, whole) for row in rows],
        }
    stacked = np.array(between)
    with np.errstate(all="ignore"):
        known = np.isfinite(stacked)
        average = np.where(known, stacked, 0).sum(0) / np.maximum(known.sum(0), 1)
    return {
        "bands": edges.tolist(),
        "between_bands": average.tolist(),
        "global": {k: _mean(np.array([v[k] for v in layers.values()])) for k in ("halves", "timesteps", "early_late")},
        "layers": layers,
    }


def _bands(stats: ActivationStats) -> tuple[np.ndarray, np.ndarray]:
    """(edges [B + 1] of equal bands that all hold samples, band of each timestep group)."""
    when, _ = stats.grouped(next(iter(stats.tables)))
    t = when.numpy()
    for count in range(min(_BANDS, len(t)), 0, -1):
        edges = np.linspace(0, stats.num_train_timesteps, count + 1)
        place = np.clip(np.searchsorted(edges, t, side="right") - 1, 0, count - 1)
        if len(np.unique(place)) == count:
            break
    return edges, place


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _scores(unet: nn.Module, stats: ActivationStats, seed: int) -> dict[str, dict[str, tuple[Tensor, int]]]:
    """slot → (ranking → scores [width], unit): all timesteps, early, middle, late, and |W| alone."""
    slots = find_slots(unet)
    found: dict[str, dict[str, Tensor]] = {}
    for steps in ("all", *RANGES):
        norms = {layer: stats.act_norm(layer, target_steps=steps) for layer in stats.tables}
        found[steps] = slot_scores(unet, slots, get_criterion("wanda-diff"), Context(norms, seed))
    found[WEIGHT_ALONE] = slot_scores(unet, slots, get_criterion("magnitude"), Context({}, seed))
    return {
        name: {ranking: (scores[name], slot.unit) for ranking, scores in found.items()}
        for name, slot in slots.slots.items()
        if slot.prunable
    }


def removed_sets(scores: Mapping[str, Mapping[str, tuple[Tensor, int]]], ratio: float) -> dict[str, Any]:
    """What each ranking would take out of every slot at one ratio, and how far the choices agree.

    Returns:
        ``rankings``; ``overlap`` [k][k]: share of the channels that one ranking removes which the other removes as well,
        over all slots (two unrelated rankings share about `ratio`); ``rank_correlation`` [k][k]: mean Spearman ρ over
        slots, by width; ``slots``: name → ``channels``, ``removed``, and for pairs overlap and ρ.
    """
    rankings = list(next(iter(scores.values())))
    k = len(rankings)
    shared, removed = np.zeros((k, k)), 0
    correlation, weight = np.zeros((k, k)), np.zeros((k, k))
    slots: dict[str, Any] = {}
    for name, of in scores.items():
        values = [of[r][0].numpy() for r in rankings]
        width, unit = len(values[0]), of[rankings[0]][1]
        gone = round(ratio * width / unit) * unit
        if gone == 0 or gone >= width:
            continue
        sets = []
        for ranking in rankings:
            keep = select(of[ranking][0], width - gone, unit=unit)
            mask = np.ones(width, dtype=bool)
            mask[keep.numpy()] = False
            sets.append(mask)
        together = np.array([[int((a & b).sum()) for b in sets] for a in sets])
        rho = np.array([[spearman(a, b) for b in values] for a in values])
        known = np.isfinite(rho)
        correlation += np.where(known, rho, 0) * width
        weight += known * width
        shared += together
        removed += gone
        index = {r: i for i, r in enumerate(rankings)}
        slots[name] = {
            "channels": width,
            "removed": gone,
            "early_late": together[index["early"], index["late"]] / gone,
            "early_middle": together[index["early"], index["middle"]] / gone,
            "middle_late": together[index["middle"], index["late"]] / gone,
            "weight_alone": together[index["all"], index[WEIGHT_ALONE]] / gone,
            "weight_alone_rank_correlation": float(rho[index["all"], index[WEIGHT_ALONE]]),
        }
    if not slots:
        raise UserError(f"at a ratio of {ratio} no slot of this network loses a channel.")
    return {
        "ratio": ratio,
        "rankings": rankings,
        "channels_removed": removed,
        "overlap": (shared / removed).tolist(),
        "rank_correlation": (correlation / np.maximum(weight, 1)).tolist(),
        "slots": slots,
    }


# --------------------------------------------------------------------------------------------------------------- verdict


def verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that decide, and what they mean in sentences (``lines``)."""
    removed, stable, whole = report["removed"], report["stability"]["global"], report["activations"]["global"]
    index = {r: i for i, r in enumerate(removed["rankings"])}
    overlap, rho = (removed[m][index["all"]][index[WEIGHT_ALONE]] for m in ("overlap", "rank_correlation"))
    early_late = removed["overlap"][index["early"]][index["late"]]
    share, chance = whole["beyond_2_sigma"], removed["ratio"]
    strength = "hardly changes" if overlap >= 0.9 else "changes" if overlap >= 0.6 else "strongly changes"
    lines = [
        f"||X|| {strength} the ranking of |W| alone: of the channels that go at ratio {chance:g}, {overlap:.0%} are the "
        f"same with and without ||X|| (chance: {chance:.0%}); rank correlation {rho:.2f}.",
        f"Rule of thumb: {share:.1%} of all activations lie beyond 2 sigma, "
        + (f"above the {RULE_OF_THUMB:.0%} from which" if share > RULE_OF_THUMB else f"not above the {RULE_OF_THUMB:.0%} from which")
        + " activation-aware scores are said to pay (a normal distribution has 4.6%); "
        f"{whole['beyond_3_sigma']:.1%} lie beyond 3 sigma (0.3%).",
        f"Timesteps: early and late would remove {early_late:.0%} of the same channels (chance: {chance:.0%}); the "
        f"rankings of the first and last timesteps correlate by {stable['early_late']:.2f}.",
        f"Calibration: the rankings of its two halves correlate by {stable['halves']:.3f}; "
        + ("more images would hardly change them." if stable["halves"] >= 0.98 else "use more images."),
    ]
    return {
        "overlap_with_weight_alone": overlap,
        "rank_correlation_with_weight_alone": rho,
        "outlier_share": share,
        "rule_of_thumb": RULE_OF_THUMB,
        "above_rule_of_thumb": share > RULE_OF_THUMB,
        "early_late_overlap": early_late,
        "lines": lines,
    }


# ---------------------------------------------------------------------------------------------------------------- tables


def tables(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(file name, text) of the report's tables as CSV with a head line; empty cells are values that do not exist."""
    values, norms = report["activations"], report["channel_norms"]
    fields = ("mean", "deviation", "skewness", "kurtosis", "beyond_2_sigma", "beyond_3_sigma")
    ranks = report["stability"]["layers"]
    head = ["layer", "values", *fields, "channels", *(f"norm_{f}" for f in fields),
            "rank_halves", "rank_timesteps", "rank_early_late"]  # fmt: skip
    rows = []
    for name in ["", *values["layers"]]:
        a, c = (part["layers"][name] if name else part["global"] for part in (values, norms))
        r = ranks[name] if name else report["stability"]["global"]
        rows.append([name or "(all)", a["values"], *(a[f] for f in fields), c["channels"], *(c[f] for f in fields),
                     r["halves"], r["timesteps"], r["early_late"]])  # fmt: skip
    yield "layers.csv", _csv(head, rows)
    edges = report["heat_map"]["edges"]
    bands = [f"t {a:g}-{b:g}" for a, b in zip(edges, edges[1:])]
    yield "timesteps.csv", _csv(["layer", *bands], [[n, *v] for n, v in report["heat_map"]["layers"].items()])
    edges = report["stability"]["bands"]
    bands = [f"t {a:g}-{b:g}" for a, b in zip(edges, edges[1:])]
    yield "stability.csv", _csv(["", *bands], [[b, *v] for b, v in zip(bands, report["stability"]["between_bands"], strict=True)])
    slots = report["removed"]["slots"]
    keys = list(next(iter(slots.values())))
    yield "slots.csv", _csv(["slot", *keys], [[n, *(v[k] for k in keys)] for n, v in slots.items()])


def _csv(head: list[str], rows: list[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow(["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in row])
    return text.getvalue()


def _plain(value: Any) -> Any:
    """Python numbers alone; NaN, which JSON lacks, becomes None."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.floating, float)):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
