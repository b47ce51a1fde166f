"""What the activation norms look like: figures as numbers (:func:`analyse`) and as one picture
(:func:`save_picture`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .stats import ActivationStats

_BANDS = 20  # columns of the heat map
MISSING = "#bbbbbb"  # no sample fell here
OUTLIERS = {2: "#ee9966", 3: "#cc3311"}  # beyond 2σ, beyond 3σ


def analyse(stats: ActivationStats, *, target_steps: str | tuple[int, int] = "all") -> dict[str, Any]:
    """Distribution of the channel norms ‖X‖₂ / √positions (so layers of different resolution compare), root mean square
    over samples.

    Returns:
        JSON-ready: ``global`` over all channels of all layers, ``layers`` by name; each with ``channels``, ``mean``,
        ``deviation`` (population), ``skewness``, ``kurtosis`` (excess: 0 for a normal distribution), ``beyond_2_sigma``
        and ``beyond_3_sigma`` (shares of channels further than 2 and 3 deviations from the mean of their own group),
        ``min`` and ``max``.
    """
    norms = _norms(stats, target_steps)
    return {
        "global": _moments(torch.cat(list(norms.values()))),
        "layers": {name: _moments(values) for name, values in norms.items()},
        "target_steps": target_steps if isinstance(target_steps, str) else list(target_steps),
        "rows": len(stats.timesteps),
        "samples": int(stats.counts.sum()),
    }


def _norms(stats: ActivationStats, target_steps: str | tuple[int, int]) -> dict[str, Tensor]:
    """Layer → [C_in] float64, root mean square of a channel's values."""
    return {n: stats.act_norm(n, target_steps=target_steps).double() / stats.positions[n] ** 0.5 for n in stats.tables}


def _moments(values: Tensor) -> dict[str, float | int]:
    mean, deviation = values.mean(), values.std(correction=0)
    # A layer whose channels are all alike has no shape; its deviation is zero up to rounding.
    flat = bool(deviation <= 1e-12 * mean.abs())
    z = torch.zeros_like(values) if flat else (values - mean) / deviation
    return {
        "channels": len(values),
        "mean": float(mean),
        "deviation": float(deviation),
        "skewness": float((z**3).mean()),
        "kurtosis": 0.0 if flat else float((z**4).mean() - 3),
        "beyond_2_sigma": float((z.abs() > 2).double().mean()),
        "beyond_3_sigma": float((z.abs() > 3).double().mean()),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def save_picture(
    stats: ActivationStats,
    path: str | os.PathLike[str],
    *,
    title: str = "",
    target_steps: str | tuple[int, int] = "all",
) -> dict[str, Any]:
    """Write the analysis as a PNG (distribution of norms, outliers per layer, layer × timestep heat map); return the
    numbers.

    Every layer is named on the axis. The folder of `path` is made.
    """
    # No pyplot: it would choose a window system and keep state for a program that only writes a file.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    report = analyse(stats, target_steps=target_steps)
    names = list(stats.tables)
    figure = Figure(figsize=(17, max(9.0, 4.6 + 0.17 * len(names))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    top_height = 4.2
    grid = figure.add_gridspec(
        2, 2, height_ratios=[top_height, figure.get_figheight() - top_height], width_ratios=[1, 1.25]
    )
    figure.suptitle(
        f"Activation norms{': ' + title if title else ''}  ({len(names)} layers, {report['samples']} noised images)",
        fontsize=14,
    )
    _draw_distribution(figure.add_subplot(grid[0, 0]), stats, report, target_steps)
    _draw_words(figure.add_subplot(grid[0, 1]), report)
    _draw_outliers(figure.add_subplot(grid[1, 0]), report, names)
    _draw_heat_map(figure, figure.add_subplot(grid[1, 1]), stats, names, target_steps)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return report


def _draw_distribution(
    axes: Any, stats: ActivationStats, report: dict[str, Any], target_steps: str | tuple[int, int]
) -> None:
    values = torch.cat(list(_norms(stats, target_steps).values())).numpy()
    positive = values[values > 0]
    dead = len(values) - len(positive)
    if len(positive):
        low, high = positive.min(), positive.max() * 1.0001
        axes.hist(positive, bins=np.geomspace(low * 0.9999, high, 60).tolist(), color="#4477aa")
        axes.set_xscale("log")
    whole = report["global"]
    axes.axvline(whole["mean"], color="black", linewidth=1.2, label=f"mean {whole['mean']:.3g}")
    for k, style in ((2, "--"), (3, ":")):
        edge = whole["mean"] + k * whole["deviation"]
        share = 100 * whole[f"beyond_{k}_sigma"]
        axes.axvline(
            edge,
            color="#cc3311",
            linestyle=style,
            label=f"mean + {k}σ = {edge:.3g}  ({share:.1f} % of channels beyond {k}σ)",
        )
    axes.set_xlabel("norm of an input channel: root mean square of its values (log scale)")
    axes.set_ylabel("number of channels")
    axes.set_title("How strong are the channels?" + (f"  ({dead} silent channels not shown)" if dead else ""))
    axes.margins(y=0.35)
    axes.legend(fontsize=9, loc="upper left")


def _draw_words(axes: Any, report: dict[str, Any]) -> None:
    """The numbers in sentences, for a reader who does not know the code."""
    whole, layers = report["global"], report["layers"]
    # Layers that read the same tensor have the same numbers; one of them speaks for all.
    distinct = list({(v["mean"], v["deviation"]): n for n, v in reversed(layers.items())}.values())
    spread = sorted(distinct, key=lambda n: layers[n]["deviation"] / max(layers[n]["mean"], 1e-30), reverse=True)
    strongest = sorted(distinct, key=lambda n: layers[n]["mean"], reverse=True)
    lines = [
        f"All {whole['channels']} input channels: mean {whole['mean']:.4g}, deviation {whole['deviation']:.4g},",
        f"skewness {whole['skewness']:.2f}, excess kurtosis {whole['kurtosis']:.2f}, from {whole['min']:.3g} to "
        f"{whole['max']:.3g}.",
        f"Timesteps: {report['target_steps']}; {report['samples']} noised images.",
        "",
        "Strongest layers (mean norm of a channel):",
        *[f"   {layers[n]['mean']:10.4g}   {n}" for n in strongest[:4]],
        "",
        "Most uneven layers (deviation / mean): candidates for pruning, since few channels carry most",
        *[f"   {layers[n]['deviation'] / max(layers[n]['mean'], 1e-30):10.2f}   {n}" for n in spread[:4]],
        "",
        "Norm: root mean square of a channel's values over images and positions. Outlier: a channel",
        "further than 2σ (3σ) from the mean of its layer; a normal distribution has 4.6 % (0.3 %).",
        "Heat map: blue, weaker than the layer's mean over time; red, stronger.",
    ]
    axes.axis("off")
    axes.text(
        0.0, 1.0, "\n".join(lines), va="top", ha="left", fontsize=10, family="monospace", transform=axes.transAxes
    )


def _draw_outliers(axes: Any, report: dict[str, Any], names: list[str]) -> None:
    where = np.arange(len(names))
    for k, colour in OUTLIERS.items():
        shares = [100 * report["layers"][n][f"beyond_{k}_sigma"] for n in names]
        axes.barh(where, shares, color=colour, height=0.8, label=f"beyond {k}σ")
    axes.axvline(4.55, color="black", linewidth=0.8, linestyle="--", label="normal distribution, 2σ")
    axes.set_yticks(where, names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("share of the layer's input channels, %")
    axes.set_title("Outlier channels per layer, in order of execution")
    axes.set_xlim(right=1.45 * max(axes.get_xlim()[1], 5))
    axes.legend(fontsize=9, loc="upper right")


def _draw_heat_map(
    figure: Any, axes: Any, stats: ActivationStats, names: list[str], target_steps: str | tuple[int, int]
) -> None:
    edges, bands = heat_map(stats, target_steps)
    draw_heat_map(figure, axes, names, edges, bands)


def draw_heat_map(figure: Any, axes: Any, names: list[str], edges: np.ndarray, bands: np.ndarray) -> None:
    """Layer × timestep map of the output of :func:`heat_map`."""
    # The time embedding moves far more than all else: its extremes may saturate, so that the other layers show.
    limit = float(np.nanquantile(np.abs(bands), 0.95)) if np.isfinite(bands).any() else 1.0
    limit = min(max(limit, 0.1), 2.0)
    axes.set_facecolor(MISSING)
    picture = axes.imshow(
        bands,
        aspect="auto",
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
        extent=(edges[0], edges[-1], len(names) - 0.5, -0.5),
    )
    axes.set_yticks(np.arange(len(names)), names, fontsize=7)
    axes.set_xlabel("diffusion timestep  (0: clean image,  high: pure noise)")
    axes.set_title("How strongly is each layer used at each timestep?")
    bar = figure.colorbar(picture, ax=axes, shrink=0.4, pad=0.01, extend="both")
    ticks = np.linspace(-limit, limit, 5)
    bar.set_ticks(ticks.tolist(), labels=[f"× {2.0**v:.2f}" for v in ticks])
    bar.set_label("norm relative to the layer's mean over time")


def heat_map(
    stats: ActivationStats, target_steps: str | tuple[int, int] = "all"
) -> tuple[np.ndarray, np.ndarray]:
    """(edges [B + 1], log₂ of a layer's norm over its mean over time [layers, B]); NaN where no sample fell."""
    names = list(stats.tables)
    when, _ = stats.grouped(names[0], target_steps=target_steps)
    t = when.numpy()
    low, high = (0, stats.num_train_timesteps) if len(t) == 1 else (t.min(), t.max() + 1)
    edges = np.linspace(low, high, min(_BANDS, len(t)) + 1)
    place = np.clip(np.searchsorted(edges, t, side="right") - 1, 0, len(edges) - 2)
    bands = np.full((len(names), len(edges) - 1), np.nan)
    for row, name in enumerate(names):
        _, norms = stats.grouped(name, target_steps=target_steps)
        level = norms.double().square().mean(1).sqrt().numpy()  # one number per timestep group
        relative = np.log2(np.maximum(level, 1e-30) / max(level.mean(), 1e-30))
        for band in range(bands.shape[1]):
            if (place == band).any():
                bands[row, band] = relative[place == band].mean()
    return edges, bands
