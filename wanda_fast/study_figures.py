"""The figures of the activation study, drawn from its report alone (:func:`wanda_fast.study.study`)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .analysis import MISSING, OUTLIERS, draw_heat_map
from .study import NORMAL_SHARE, RULE_OF_THUMB

_BLUE, _GREY, _RED = "#4477aa", "#777777", "#cc3311"
_ROW = 0.17  # inches per layer
_NAMES = 7  # points


def save_figures(report: Mapping[str, Any], folder: Path) -> list[str]:
    """Write `activations.png`, `timesteps.png`, `stability.png` and `removed.png` into a folder; return their names."""
    made = []
    for name, draw in (
        ("activations.png", _activations),
        ("timesteps.png", _timesteps),
        ("stability.png", _stability),
        ("removed.png", _removed),
    ):
        draw(report).savefig(folder / name, format="png")
        made.append(name)
    return made


def _figure(report: Mapping[str, Any], title: str, width: float, height: float) -> Any:
    # No pyplot: it would choose a window system and keep state for a program that only writes a file.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    model = f"{report['model']}: " if report["model"] else ""
    figure.suptitle(f"{model}{title}  ({report['samples']} noised images)", fontsize=14)
    return figure


def _layer_axis(axes: Any, names: list[str], *, labels: bool = True) -> np.ndarray:
    where = np.arange(len(names))
    axes.set_yticks(where, names if labels else [], fontsize=_NAMES)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    return where


def _numbers(values: list[Any]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=float)


# ----------------------------------------------------------------------------------------------------------- activations


def _activations(report: Mapping[str, Any]) -> Any:
    layers = report["activations"]["layers"]
    names = list(layers)
    body = 1.2 + _ROW * len(names)
    figure = _figure(report, "values that enter the layers", 17, 4.6 + body)
    grid = figure.add_gridspec(2, 1, height_ratios=[4.0, body])
    top = grid[0].subgridspec(1, 2, width_ratios=[1, 1])
    _draw_histogram(figure.add_subplot(top[0]), report)
    _draw_words(figure.add_subplot(top[1]), report)
    bottom = grid[1].subgridspec(1, 3, width_ratios=[1, 1, 1.15])
    axes = figure.add_subplot(bottom[0])
    where = _layer_axis(axes, names)
    deviation = _numbers([layers[n]["deviation"] for n in names])
    mean = np.abs(_numbers([layers[n]["mean"] for n in names]))
    axes.barh(where, deviation, color=_BLUE, height=0.8, label="deviation")
    axes.plot(mean, where, "|", color="black", markersize=7, markeredgewidth=1.6, label="|mean|")
    axes.set_xscale("log")
    axes.set_xlim(left=max(deviation[deviation > 0].min(initial=1.0) / 4, 1e-6))
    axes.set_xlabel("size of the values (log scale)")
    axes.set_title("Mean and deviation")
    axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.003), ncols=2)

    axes = figure.add_subplot(bottom[1])
    where = _layer_axis(axes, names, labels=False)
    axes.axvline(0, color="black", linewidth=0.8)
    skewness = _numbers([layers[n]["skewness"] for n in names])
    axes.plot(_numbers([layers[n]["kurtosis"] for n in names]), where, "o", color=_RED, markersize=4.5, label="excess kurtosis")
    axes.plot(skewness, where, "D", color=_BLUE, markersize=4, label="skewness")
    axes.set_xscale("symlog", linthresh=1, linscale=0.6)
    axes.set_xlabel("0: as a normal distribution (log scale beyond 1)")
    axes.set_title("Shape")
    axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.003), ncols=2)

    axes = figure.add_subplot(bottom[2])
    where = _layer_axis(axes, names, labels=False)
    for k, colour in OUTLIERS.items():
        shares = [100 * layers[n][f"beyond_{k}_sigma"] for n in names]
        axes.barh(where, shares, color=colour, height=0.8, label=f"beyond {k}σ")
    axes.axvline(100 * NORMAL_SHARE[2], color="black", linewidth=1, linestyle=":", label="normal distribution, 2σ")
    axes.axvline(100 * RULE_OF_THUMB, color="black", linewidth=1, linestyle="--", label=f"rule of thumb, {RULE_OF_THUMB:.0%}")
    axes.set_xlabel("share of the layer's values, %")
    axes.set_title("Outliers")
    axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.003), ncols=4, columnspacing=1, handlelength=1.5)
    # The legends stand between title and axes, so that no bar is hidden.
    for made in figure.axes[2:]:
        made.set_title(made.get_title(), pad=34)
    return figure


def _draw_histogram(axes: Any, report: Mapping[str, Any]) -> None:
    edges, density = np.array(report["histogram"]["edges"]), np.array(report["histogram"]["density"])
    middle = (edges[1:] + edges[:-1]) / 2
    axes.stairs(np.where(density > 0, density, np.nan), edges, fill=True, color=_BLUE, label="values")
    axes.plot(middle, np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi), color="black", linewidth=1.3, label="normal distribution")
    axes.set_yscale("log")
    axes.set_ylim(max(density[density > 0].min(initial=1.0) / 2, 1e-8), density.max(initial=1.0) * 3)
    for k, colour in OUTLIERS.items():
        for sign in (-1, 1):
            axes.axvline(sign * k, color=colour, linewidth=1.4, label=f"{k}σ" if sign > 0 else None)
    axes.set_xlabel("(value - mean) / deviation, each layer by its own")
    axes.set_ylabel("density (log scale)")
    axes.set_title("How are the values spread?")
    axes.legend(fontsize=9, loc="upper left")


def _draw_words(axes: Any, report: Mapping[str, Any]) -> None:
    values, norms = report["activations"]["global"], report["channel_norms"]["global"]
    lines = [
        f"{'':22}{'values':>12}{'channel norms':>16}",
        f"{'number':22}{values['values']:12.3g}{norms['channels']:16,}",
    ]
    for key, label in (("mean", "mean"), ("deviation", "deviation"), ("skewness", "skewness"), ("kurtosis", "excess kurtosis")):
        lines.append(f"{label:22}{values[key]:12.3g}{norms[key]:16.3g}")
    for k in (2, 3):
        lines.append(f"{f'beyond {k}σ':22}{100 * values[f'beyond_{k}_sigma']:11.2f}%{100 * norms[f'beyond_{k}_sigma']:15.2f}%")
    lines += ["", "All layers together, around the mean of all. Bars below: each layer around its own mean.", ""]
    for line in report["verdict"]["lines"]:
        lines += [*textwrap.wrap(line, 92, subsequent_indent="  "), ""]
    axes.axis("off")
    axes.text(0, 1, "\n".join(lines), va="top", ha="left", fontsize=9, family="monospace", transform=axes.transAxes)


# ------------------------------------------------------------------------------------------------------------- timesteps


def _timesteps(report: Mapping[str, Any]) -> Any:
    names = list(report["heat_map"]["layers"])
    figure = _figure(report, "layers over the diffusion timesteps", 17, 2.2 + _ROW * len(names))
    grid = figure.add_gridspec(1, 2)
    bands = np.array([_numbers(row) for row in report["heat_map"]["layers"].values()])
    draw_heat_map(figure, figure.add_subplot(grid[0]), names, np.array(report["heat_map"]["edges"]), bands)

    axes = figure.add_subplot(grid[1])
    stable = report["stability"]
    rows = np.array([_numbers(v["bands"]) for v in stable["layers"].values()])
    edges = stable["bands"]
    # A layer of three channels can have any ρ; its extremes may saturate, so that the other layers show.
    low = float(np.nanquantile(rows, 0.02)) if np.isfinite(rows).any() else 0.0
    axes.set_facecolor(MISSING)
    picture = axes.imshow(
        rows, aspect="auto", cmap="viridis", vmin=max(-1.0, np.floor(low * 10) / 10), vmax=1.0, interpolation="nearest",
        extent=(edges[0], edges[-1], len(names) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_yticks(np.arange(len(names)), [])
    axes.set_xlabel("diffusion timestep  (0: clean image,  high: pure noise)")
    axes.set_title("Is the order of its channels that of all timesteps together?")
    bar = figure.colorbar(picture, ax=axes, shrink=0.4, pad=0.01, extend="min")
    bar.set_label("rank correlation ρ (1: the same order)")
    return figure


# ------------------------------------------------------------------------------------------------------------- stability


def _stability(report: Mapping[str, Any]) -> Any:
    stable = report["stability"]
    names = list(stable["layers"])
    figure = _figure(report, "how stable is the order of the channels?", 17, max(8.0, 2.4 + _ROW * len(names)))
    grid = figure.add_gridspec(1, 2, width_ratios=[1, 1.25])
    left = grid[0].subgridspec(3, 1, height_ratios=[6.5, 4, max(0.2, figure.get_figheight() - 13)])
    edges = stable["bands"]
    ticks = [f"{a:.0f}-{b:.0f}" for a, b in zip(edges, edges[1:])]
    _matrix(figure, figure.add_subplot(left[0]), np.array(stable["between_bands"]), ticks,
            "Two parts of the schedule: ρ, mean over layers", "timesteps", low=None)  # fmt: skip

    axes = figure.add_subplot(left[1])
    rows = np.array([_numbers(v["bands"]) for v in stable["layers"].values()])
    middle = (np.array(edges[1:]) + np.array(edges[:-1])) / 2
    low, half, high = np.nanquantile(rows, [0.1, 0.5, 0.9], axis=0)
    axes.fill_between(middle, low, high, color=_BLUE, alpha=0.25, label="80 % of the layers")
    axes.plot(middle, half, "o-", color=_BLUE, label="median of the layers")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(top=1.02)
    axes.set_xlabel("diffusion timestep")
    axes.set_ylabel("ρ")
    axes.set_title("One part of the schedule and all timesteps together")
    axes.grid(linewidth=0.5, alpha=0.5)
    axes.legend(fontsize=9, loc="lower right")

    axes = figure.add_subplot(grid[1])
    where = _layer_axis(axes, names)
    for key, colour, marker, label in (
        ("early_late", _RED, "o", "first and last timesteps"),
        ("timesteps", _GREY, "s", "all pairs of parts, mean"),
        ("halves", _BLUE, "D", "two halves of the calibration"),
    ):
        mean = stable["global"][key]
        shown = "" if mean is None else f" (mean {mean:.3f})"
        axes.plot(_numbers([v[key] for v in stable["layers"].values()]), where, marker, color=colour, markersize=5, label=label + shown)
    axes.set_xlim(right=1.02)
    axes.set_xlabel("rank correlation ρ of the layer's input channels (1: the same order)")
    axes.set_title("Per layer", pad=34)
    axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.003), ncols=3, columnspacing=1)
    return figure


def _matrix(figure: Any, axes: Any, values: np.ndarray, ticks: list[str], title: str, label: str, low: float | None) -> None:
    low = float(np.floor(values.min() * 10) / 10) if low is None else low
    picture = axes.imshow(values, cmap="viridis", vmin=min(low, 0.9), vmax=1.0)
    axes.set_xticks(range(len(ticks)), ticks, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(len(ticks)), ticks, fontsize=9)
    axes.set_xlabel(label)
    axes.set_title(title)
    for (i, j), value in np.ndenumerate(values):
        dark = picture.norm(value) < 0.6
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color="white" if dark else "black")
    figure.colorbar(picture, ax=axes, shrink=0.7, pad=0.02)


# --------------------------------------------------------------------------------------------------------------- removed


def _removed(report: Mapping[str, Any]) -> Any:
    removed = report["removed"]
    names = list(removed["slots"])
    ratio = removed["ratio"]
    figure = _figure(report, f"what would leave at ratio {ratio:g}", 17, max(9.5, 2.4 + _ROW * len(names)))
    grid = figure.add_gridspec(1, 2, width_ratios=[1, 1.25])
    spare = max(0.3, figure.get_figheight() - 11.5)
    left = grid[0].subgridspec(3, 1, height_ratios=[5, 5, spare])
    rankings = [r if r != "all" else "all timesteps" for r in removed["rankings"]]
    _matrix(figure, figure.add_subplot(left[0]), np.array(removed["overlap"]), rankings,
            f"Removed by both, share of what each removes (chance: {ratio:.0%})", "", low=ratio)  # fmt: skip
    _matrix(figure, figure.add_subplot(left[1]), np.array(removed["rank_correlation"]), rankings,
            "Rank correlation ρ of the scores, mean over slots", "", low=None)  # fmt: skip

    axes = figure.add_subplot(grid[1])
    where = _layer_axis(axes, names)
    for key, colour, marker, label in (
        ("early_late", _RED, "o", "early and late timesteps"),
        ("weight_alone", _BLUE, "D", "with and without ‖X‖"),
    ):
        axes.plot([100 * v[key] for v in removed["slots"].values()], where, marker, color=colour, markersize=5, label=label)
    axes.axvline(100 * ratio, color="black", linewidth=1, linestyle="--", label="chance")
    axes.set_xlim(-2, 102)
    axes.set_xlabel("share of the removed channels that both would remove, %")
    axes.set_title("Per slot (channels that leave together)", pad=34)
    axes.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.003), ncols=3)
    return figure
