"""The comparison as one self-contained HTML page (:func:`page`) and as one picture (:func:`save_picture`).

The page holds its pictures, its charts (inline SVG) and its style; it loads nothing, runs no script, and follows the
reader's light or dark setting and the width of the window.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wanda_fast.cli.terminal import change, seconds, si

GAIN = 4  # differences are shown this many times as strong
# Colours that keep apart for colour-blind readers, on white and on black: Okabe and Ito.
COLOURS = ("#777777", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b58900", "#56b4e9")

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1b1f24; --soft: #59636e; --line: #d8dee4; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --text: #e4e8ec; --soft: #9aa4af; --line: #343b43; --card: #1d2127; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.2rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
td small { display: block; color: var(--soft); }
.dot { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .4em; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--card-width), 1fr)); gap: .7rem; }
figure { margin: 0; padding: .5rem; background: var(--card); border-radius: .5rem; }
.tiles { display: flex; gap: .4rem; } .tiles > div { flex: 1; min-width: 0; text-align: center; }
.tiles img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; display: block; border-radius: 3px; }
figcaption, .tiles span { font-size: .8rem; color: var(--soft); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font: 13px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } .legend > span { margin-right: 1.2rem; white-space: nowrap; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; align-items: center; }
.bars .level { grid-column: 1 / -1; margin-top: .6rem; font-weight: 600; }
.track { position: relative; background: var(--card); border-radius: 3px; height: 1.5em; }
.bar { position: absolute; inset: 0 auto 0 0; border-radius: 3px; } .bar.rest { opacity: .4; }
.track span { position: absolute; left: .5em; line-height: 1.5em; font-size: .85rem; color: #fff;
  text-shadow: 0 0 3px #000, 0 0 2px #000; white-space: nowrap; }
.chart { min-width: 600px; }
@media (max-width: 600px) {
  body { padding: .8rem; } th, td { padding: .3rem .35rem; font-size: .85rem; } th { white-space: normal; }
  th:first-child, td:first-child { min-width: 6rem; }
}
details { margin-top: .6rem; } summary { cursor: pointer; color: var(--soft); }
"""


def page(report: Mapping[str, Any], images: Sequence[Tensor]) -> str:
    """The HTML page.

    Args:
        report, images: what :func:`wanda_fast.compare.compare` returns.
    """
    models = report["models"]
    title = " and ".join([", ".join(m["name"] for m in models[:-1]), models[-1]["name"]])
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}: compared</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">Everything is compared with A. Measured on {html.escape(report["device"])}, {report["dtype"]}.</p>',
        "<h2>Size, speed, likeness</h2>",
        _table(report),
        "<h2>Images from the same noise</h2>",
        f'<p class="soft">DDIM, {report["steps"]} steps, seed {report["seed"]}. Differences are {GAIN} times as strong.</p>',
        _cards(report, images),
        "<h2>Error of the predicted noise over the timesteps</h2>",
        f'<p class="soft">Mean squared difference from the noise that A predicts, relative to its energy; '
        f"{report['noise_images']} noised images. Left: nearly clean images, right: nearly pure noise.</p>",
        _chart(report),
        _error_table(report),
    ]
    if any(m["widths"] for m in models):
        parts += [
            "<h2>Widths of the levels</h2>",
            '<p class="soft">Output channels of the resnet convolutions, from full resolution down. Where they differ within a '
            "level, the solid bar ends at the narrowest and the pale one at the widest.</p>",
            _widths(report),
        ]
    versions = ", ".join(f"{html.escape(k)} {html.escape(str(v))}" for k, v in report["versions"].items())
    parts.append(f'<p class="soft" style="margin-top:2.5rem">{versions}</p></body></html>')
    return "\n".join(parts) + "\n"


def _label(model: Mapping[str, Any], index: int) -> str:
    colour = COLOURS[index % len(COLOURS)]
    return f'<span class="dot" style="background:{colour}"></span>{model["label"]}: {html.escape(model["name"])}'


def rows(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[str]]]:
    """(what, value of each model, change against A or "") of the table."""
    models = report["models"]
    first = models[0]

    def sized(key: str, show: Any) -> tuple[list[str], list[str]]:
        return [show(m[key]) for m in models], ["", *(change(first[key], m[key]) for m in models[1:])]

    blank = [""] * len(models)
    faster = ["", *(f"{first['forward_seconds'] / m['forward_seconds']:.2f} x as fast" for m in models[1:])]
    found = [
        ("parameters", *sized("params", lambda v: f"{v:,}")),
        ("multiply-accumulates, one image", *sized("macs", lambda v: f"{v:,}")),
        ("weights on disk", *sized("file_bytes", lambda v: si(v, "B"))),
        (f"forward pass, {report['batch_size']} images", [seconds(m["forward_seconds"]) for m in models], faster),
        (f"images per second, {report['steps']} steps", [f"{m['images_per_second']:.3g}" for m in models], blank),
    ]
    if "ssim" in models[1]:
        found.append(("SSIM of the images", ["1", *(f"{m['ssim']:.3f}" for m in models[1:])], blank))
    psnr = ["", *("equal" if m["psnr"] is None else f"{m['psnr']:.1f} dB" for m in models[1:])]
    found.append(("PSNR of the images", psnr, blank))
    whole = [m["noise"]["all"] for m in models[1:]]
    found.append(("error of the predicted noise", ["0", *(f"{e['mse']:.3g}" for e in whole)],
                  ["", *(f"{e['relative']:.2%} of its energy" for e in whole)]))  # fmt: skip
    experts = [f"{m['experts']} experts" if m["experts"] > 1 else "" for m in models]
    found.append(("layout", [m["layout"] for m in models], experts))
    return found


def _table(report: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{_label(m, i)}</th>" for i, m in enumerate(report["models"]))
    body = []
    for what, values, changes in rows(report):
        cells = "".join(
            f"<td>{html.escape(v)}{f'<small>{html.escape(c)}</small>' if c else ''}</td>"
            for v, c in zip(values, changes, strict=True)
        )
        body.append(f"<tr><td>{html.escape(what)}</td>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


# --------------------------------------------------------------------------------------------------------------- images


def difference(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| · GAIN of uint8 images, uint8."""
    return ((a.int() - b.int()).abs() * GAIN).clamp(max=255).to(torch.uint8)


def _data_uri(image: Tensor) -> str:
    from PIL import Image

    picture = Image.fromarray((image.squeeze(-1) if image.shape[-1] == 1 else image).numpy())
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _cards(report: Mapping[str, Any], images: Sequence[Tensor]) -> str:
    labels = [m["label"] for m in report["models"]]
    tiles_per_card = 2 * len(labels) - 1
    cards = []
    for i in range(len(images[0])):
        tiles = [(images[0][i], labels[0])]
        for drawn, label in zip(images[1:], labels[1:]):
            tiles += [(drawn[i], label), (difference(images[0][i], drawn[i]), f"|{label} - A|")]
        inner = "".join(
            f'<div><img src="{_data_uri(tile)}" alt="image {i} of {html.escape(label)}"><span>{html.escape(label)}</span></div>'
            for tile, label in tiles
        )
        cards.append(f'<figure><div class="tiles">{inner}</div></figure>')
    width = min(150 + 75 * tiles_per_card, 700)
    return f'<div class="cards" style="--card-width:min(100%, {width}px)">{"".join(cards)}</div>'


# ---------------------------------------------------------------------------------------------------------------- charts


def _chart(report: Mapping[str, Any]) -> str:
    """Lines of the relative error over t on a logarithmic axis."""
    width, height, left, bottom, top, right = 900, 350, 70, 50, 12, 20
    others = report["models"][1:]
    values = [e["relative"] for m in others for e in m["noise"]["over_t"] if e["relative"] and e["relative"] > 0]
    if not values:
        return "<p>The predictions are equal.</p>"
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(t: float) -> float:
        return left + (width - left - right) * t / report["num_train_timesteps"]

    def y(value: float) -> float:
        return top + (height - top - bottom) * (high - math.log10(max(value, 10.0**low))) / (high - low)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="relative error over timesteps">']
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        shown = f"{100 * 10.0**power:g} %"
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{shown}</text>')
    for t in range(0, report["num_train_timesteps"] + 1, max(report["num_train_timesteps"] // 5, 1)):
        parts.append(f'<text x="{x(t):.1f}" y="{height - 28}" text-anchor="middle">{t}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 8}" text-anchor="middle">diffusion timestep</text>')
    for i, m in enumerate(others, start=1):
        colour = COLOURS[i % len(COLOURS)]
        points = [(x((e["from"] + e["to"]) / 2), y(e["relative"] or 0), e) for e in m["noise"]["over_t"]]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        for a, b, e in points:
            tip = f"{m['label']}, t {e['from']}-{e['to']}: {e['relative'] or 0:.3%}"
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}"><title>{html.escape(tip)}</title></circle>')
    parts.append("</svg>")
    legend = "".join(f"<span>{_label(m, i)}</span>" for i, m in enumerate(others, start=1))
    return f'<p class="legend">{legend}</p><div class="scroll"><div class="chart">' + "".join(parts) + "</div></div>"


def _error_table(report: Mapping[str, Any]) -> str:
    others = report["models"][1:]
    head = "".join(f"<th>{_label(m, i)}</th>" for i, m in enumerate(others, start=1))
    body = []
    for k, e in enumerate(others[0]["noise"]["over_t"]):
        cells = "".join(
            f"<td>{m['noise']['over_t'][k]['mse']:.3g}<small>{m['noise']['over_t'][k]['relative'] or 0:.3%}</small></td>" for m in others
        )
        body.append(f"<tr><td>t {e['from']}-{e['to']}</td>{cells}</tr>")
    table = f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    return f"<details><summary>the numbers</summary>{table}</details>"


def _widths(report: Mapping[str, Any]) -> str:
    models = report["models"]
    widest = max(level["most"] for m in models for level in m["widths"])
    parts = ['<div class="bars">']
    for k in range(max(len(m["widths"]) for m in models)):
        size = " x ".join(str(max(1, side >> k)) for side in report["image"][:2])
        parts.append(f'<div class="level">level {k} ({size})</div>')
        for i, m in enumerate(models):
            if k >= len(m["widths"]):
                continue
            level = m["widths"][k]
            colour = COLOURS[i % len(COLOURS)]
            pale, solid = (100 * level[key] / widest for key in ("most", "least"))
            parts.append(
                f'<div>{m["label"]}</div><div class="track"><div class="bar rest" style="width:{pale:.1f}%;background:{colour}"></div>'
                f'<div class="bar" style="width:{solid:.1f}%;background:{colour}"></div><span>{_range(level)}</span></div>'
            )
    parts.append("</div>")
    return "".join(parts)


def _range(level: Mapping[str, Any]) -> str:
    return f"{level['least']}" if level["least"] == level["most"] else f"{level['least']}-{level['most']}"


# --------------------------------------------------------------------------------------------------------------- picture


def save_picture(report: Mapping[str, Any], images: Sequence[Tensor], path: str | os.PathLike[str]) -> None:
    """Write the comparison as a PNG: table, first images with differences, error over t, widths."""
    # No pyplot: it would choose a window system and keep state for a program that only writes a file.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from wanda_fast.sampling import make_grid

    models = report["models"]
    strips = [(images[0], "A")]
    for m, drawn in zip(models[1:], images[1:]):
        strips += [(drawn, m["label"]), (difference(images[0], drawn), f"|{m['label']} - A| x {GAIN}")]
    shown = min(12, len(images[0]))
    table = rows(report)
    top, middle = 0.35 * (len(table) + 2), 1.15 * len(strips) + 0.4
    figure = Figure(figsize=(14, top + middle + 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(" / ".join(f"{m['label']}: {m['name']}" for m in models), fontsize=14)
    grid = figure.add_gridspec(3, 1, height_ratios=[top, middle, 4.2])
    axes = figure.add_subplot(grid[0])
    axes.axis("off")
    cells = [[what, *(f"{v}  ({c})" if c else v for v, c in zip(values, changes, strict=True))] for what, values, changes in table]
    drawn_table = axes.table(cells, colLabels=["", *(m["label"] for m in models)], loc="center", cellLoc="right", edges="horizontal")
    drawn_table.auto_set_font_size(False)
    drawn_table.set_fontsize(11)
    drawn_table.scale(1, 1.5)
    for row in range(len(cells) + 1):
        drawn_table[row, 0].get_text().set_horizontalalignment("left")

    strip = grid[1].subgridspec(len(strips), 1)
    for k, (drawn, label) in enumerate(strips):
        axes = figure.add_subplot(strip[k])
        picture = make_grid(drawn[:shown], columns=shown)
        axes.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="equal")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        for spine in axes.spines.values():
            spine.set_visible(False)

    bottom = grid[2].subgridspec(1, 2)
    axes = figure.add_subplot(bottom[0])
    for i, m in enumerate(models[1:], start=1):
        over = m["noise"]["over_t"]
        axes.plot([(e["from"] + e["to"]) / 2 for e in over], [100 * max(e["relative"] or 0, 1e-12) for e in over], "o-",
                  color=COLOURS[i % len(COLOURS)], label=f"{m['label']}: {m['name']}")  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlim(0, report["num_train_timesteps"])
    axes.set_xlabel("diffusion timestep")
    axes.set_ylabel("% of A's energy (log scale)")
    axes.set_title("Error of the predicted noise")
    axes.grid(linewidth=0.5, alpha=0.5)
    axes.legend(fontsize=9)
    axes = figure.add_subplot(bottom[1])
    levels = max(len(m["widths"]) for m in models)
    if levels == 0:
        axes.axis("off")
    else:
        step = 0.8 / len(models)
        for i, m in enumerate(models):
            where = [w["level"] + (i - (len(models) - 1) / 2) * step for w in m["widths"]]
            colour = COLOURS[i % len(COLOURS)]
            axes.barh(where, [w["most"] for w in m["widths"]], height=step * 0.9, color=colour, alpha=0.4)
            axes.barh(where, [w["least"] for w in m["widths"]], height=step * 0.9, color=colour, label=m["label"])
            for at, w in zip(where, m["widths"]):
                axes.text(w["most"], at, f" {_range(w)}", va="center", fontsize=9)
        axes.set_yticks(range(levels), [f"level {k}" for k in range(levels)])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("output channels of the resnet convolutions (pale: up to the widest)")
        axes.set_title("Widths")
        axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, format="png")
