"""Tables and plots of what `bench.py --quality` wrote.

    python -m benchmarks.quality_report         the tables in README.md and `FULL`, and docs/quality-<model>.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.quality import MAIN_BUDGET, OURS, RESULTS, ROOT, WEIGHTED, Row, key, read_results, recipe

CPU_RESULTS = RESULTS.with_name("quality-cpu.json")
LARGE_CPU_RESULTS = RESULTS.with_name("quality-large-cpu.json")  # budgets of the large network, of few images; in `FULL` alone
FULL = ROOT / "benchmarks" / "results" / "quality.md"
# What rows of another split than the default are called. "former": widths by an earlier rule ("The number of norm groups", recipe-h200.md).
SPLITS = {"uniform": "uniform split", "latency": "widths by time", "former": "former widths"}
BEGIN, END = "<!-- quality table: begin -->", "<!-- quality table: end -->"


def _label(row: Row) -> str:
    if row["pruner"] == "dense":
        return "dense"
    method, word, value = recipe(row["repair"])
    extras = [] if method == "lstsq" else [f"repair {method}"]
    extras += [f"{value} experts" if word == "experts" else f"{word} {value}".strip()] if word else []
    extras += [row["layout"]] if row["layout"] != "stock" else []
    extras += [SPLITS[row["split"]]] if row["split"] in SPLITS else []
    return ", ".join([row["pruner"], *extras])


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in nothing but the seed."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key({**row, "seed": "*"}), []).append(row)
    return list(groups.values())


def _spread(rows: Sequence[Row], name: str, form: str, unit: float = 1) -> str:
    values = [row[name] * unit for row in rows if row.get(name) is not None]
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if max(values) == min(values):
        return format(mean, form)
    return f"{format(mean, form)} ± {format((sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5, form)}"


def _mean(rows: Sequence[Row], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def _in_readme(groups: Sequence[list[Row]]) -> dict[int, str]:
    """The groups of a model that README shows, and what to call them: the dense network, wanda-diff in both layouts and without repair, the
    default of the stock layout, the best rival at the main budget, and chance. `FULL` holds the rest.
    """
    from wanda_fast.pruning import PruneOptions

    main = [i for i, g in enumerate(groups) if g[0]["budget"] == MAIN_BUDGET and g[0]["split"] not in SPLITS]
    rivals = [i for i in main if groups[i][0]["pruner"] != OURS and groups[i][0]["repair"] == "lstsq"]
    best = max(rivals, key=lambda i: _mean(groups[i], "ssim"), default=None)
    measured = len({groups[i][0]["pruner"] for i in rivals})
    which = f"the best of {measured} rivals" if measured > 1 else "the only rival measured"
    default = (PruneOptions().usual_pruner, "stock")
    found = {}
    for i, group in enumerate(groups):
        row = group[0]
        ours = i in main and row["pruner"] == OURS and WEIGHTED not in row["repair"]
        chance = i in main and (row["pruner"], row["repair"], row["layout"]) == ("random", "lstsq", "stock")
        usual = i in rivals and (row["pruner"], row["layout"]) == default
        if row["pruner"] == "dense" or ours or chance or usual or i == best:
            remarks = ["the default of the stock layout"] * usual + [which] * (i == best)
            found[i] = _label(row) + (f" ({'; '.join(remarks)})" if remarks else "")
    return found


def _devices(results: dict[str, Any]) -> str:
    """What the rows were measured on; the first run's machine first."""
    env = results["env"]
    first = env.get("gpu") or env.get("cpu")
    others = {row["device"] for row in results["rows"] if row.get("device")} - {first}
    return " and ".join([str(first), *sorted(others)])


def _head(results: dict[str, Any], more: str = "") -> str:
    """Machine and protocol, `more`, and what FD is."""
    env, protocol = results["env"], results["protocol"]
    features, real = protocol["features"], protocol["real"]
    text = (
        f"{_devices(results)}, torch {env['torch']}; {protocol['samples']:,} samples, DDIM-{protocol['steps']}, "
        f"{protocol['precision']}.{more}"
    )
    if features and real:
        text += f" FD: Fréchet distance in {features['features']} features to {real['count']:,} images of {real['source']}."
    return text


def _compiled(rows: Sequence[Row]) -> str:
    dense, fast = rows[0].get("images_per_s_compiled_dense"), rows[0].get("images_per_s_compiled")
    return f"{fast:.0f}, {fast / dense:.2f}×" if fast and dense else "-"


COLUMNS: list[tuple[str, str, Any]] = [
    ("MACs", "---:", lambda rows: f"{rows[0]['macs'] / 1e9:.3g} G"),
    ("parameters", "---:", lambda rows: _spread(rows, "params", ".3g", 1e-6) + " M"),
    ("widths", "---", lambda rows: rows[0]["plan"] if len({r["plan"] for r in rows}) == 1 else "differ"),
    ("seeds", "---:", lambda rows: str(len(rows))),
    ("FD", "---:", lambda rows: _spread(rows, "fd", ".1f")),
    ("SSIM", "---:", lambda rows: _spread(rows, "ssim", ".3f")),
    ("noise MSE", "---:", lambda rows: _spread(rows, "noise_mse", ".5f")),
    ("images/s eager", "---:", lambda rows: _spread(rows[:1], "images_per_s", ".0f")),
    ("compiled, × dense", "---:", _compiled),
    ("prune, s", "---:", lambda rows: _spread([r for r in rows if r["pruner"] != "dense"], "prune_seconds", ".1f")),
]
IN_README = ("MACs", "parameters", "seeds", "FD", "SSIM", "noise MSE")


def _lines(named: Sequence[tuple[str, list[Row]]], first: str, allowed: Sequence[str] = ()) -> list[str]:
    """A table of these groups; columns without a value are left out."""
    columns = [column for column in COLUMNS if not allowed or column[0] in allowed]
    cells = [[make(rows) for _, _, make in columns] for _, rows in named]
    shown = [i for i in range(len(columns)) if any(line[i] != "-" for line in cells)]
    lines = [f"| {first} | {' | '.join(columns[i][0] for i in shown)} |", f"|---|{'|'.join(columns[i][1] for i in shown)}|"]
    return lines + [f"| {name} | {' | '.join(line[i] for i in shown)} |" for (name, _), line in zip(named, cells, strict=True)]


def _by_model(results: dict[str, Any]) -> dict[str, list[list[Row]]]:
    """Groups of rows, the largest budget and the best SSIM first, what is not repaired last."""
    models: dict[str, list[list[Row]]] = {}
    for group in grouped(results["rows"]):
        models.setdefault(group[0]["model"], []).append(group)
    for groups in models.values():
        groups.sort(key=lambda g: (-float(g[0]["budget"].rstrip("%")), g[0]["repair"] == "none", -_mean(g, "ssim")))
    return models


def markdown(results: dict[str, Any]) -> str:
    """One table per model, rows of several seeds as mean ± deviation."""
    more = " SSIM with the dense network's images from the same noise; ± is the deviation over seeds of calibration and repair."
    lines = [_head(results, more)]
    for model, groups in _by_model(results).items():
        lines += ["", f"**{model}**", "", *_lines([(_label(group[0]), group) for group in groups], "criterion")]
    return "\n".join(lines)


def brief(found: Sequence[dict[str, Any]]) -> str:
    """README's table: some rows of every model in one, and below it how they were measured."""
    named, heads = [], []
    for results in found:
        for model, groups in _by_model(results).items():
            named += [(f"{model}, {name}", groups[i]) for i, name in _in_readme(groups).items()]
            heads.append(f"{model}: {_head(results)}")
    file = FULL.relative_to(ROOT).as_posix()
    heads.append(f"[All criteria, other budgets and splits, seconds]({file}).")
    return "\n".join([*_lines(named, "network, criterion", IN_README), "", " ".join(heads)])


def _results(*more: Path) -> list[dict[str, Any]]:
    return [found for file in (RESULTS, CPU_RESULTS, *more) if (found := read_results(file)) is not None]


def content() -> str:
    """What stands between README's markers."""
    return brief(_results())


def full() -> str:
    """The text of `FULL`."""
    tables = "\n\n".join(markdown(found) for found in _results(LARGE_CPU_RESULTS))
    head = "# What pruning leaves of the images: all rows\n\nMade by `python -m benchmarks.quality_report` from `bench.py --quality`."
    return f"{head}\n\n{tables}\n"


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """Quality against multiply-accumulates, one line per method: SSIM, and the Fréchet distance where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for model in dict.fromkeys(row["model"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["model"] == model and WEIGHTED not in row["repair"]]  # one recipe in the picture
        if len({row["budget"] for row in rows}) < 3:  # the dense network and one budget are no frontier
            continue
        panels = [p for p in (("ssim", "SSIM with the dense network's images"), ("fd", "Fréchet distance to real images"))
                  if any(row.get(p[0]) is not None for row in rows)]  # fmt: skip
        figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels) + 2.6, 5), squeeze=False)
        labels = [label for label in dict.fromkeys(_label(row) for row in rows) if label != "dense"]
        for axis, (name, title) in zip(axes[0], panels, strict=True):
            for i, label in enumerate(labels):
                other = "repair" in label or "finetuned" in label
                groups = sorted(grouped([row for row in rows if _label(row) == label]), key=lambda g: g[0]["macs"])
                points = []
                for group in groups:
                    values = [row[name] for row in group if row.get(name) is not None]
                    if values:
                        macs = sum(row["macs"] for row in group) / len(group) / 1e9
                        points.append((macs, sum(values) / len(values), min(values), max(values)))
                if not points:
                    continue
                x, y, low, high = zip(*points, strict=True)
                ours = label.startswith(OURS)
                axis.errorbar(
                    x, y, yerr=[[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]],
                    marker="osD^vP*Xph<>"[i % 12], color=plt.get_cmap("tab20")(i % 20), linestyle=":" if other else "-",
                    linewidth=2 if ours else 1, markersize=6, label=label, capsize=3,
                )  # fmt: skip
            dense = [row for row in rows if row["pruner"] == "dense" and row.get(name) is not None]
            if dense:
                axis.axhline(dense[0][name], color="black", linewidth=0.8, linestyle="--")
                axis.plot([dense[0]["macs"] / 1e9], [dense[0][name]], "k*", markersize=11, label="dense")
            if name == "fd":
                axis.set_yscale("log")
                for one in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                    one("{x:.0f}")
            axis.set_xlabel("GMACs of one forward pass")
            axis.set_ylabel(title)
            axis.grid(alpha=0.3, which="both")
        axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
        protocol = results["protocol"]
        features = f", {protocol['features']['features']} features" if protocol["features"] and len(panels) == 2 else ""
        machine = _devices(results)
        figure.suptitle(f"{model}: {protocol['samples']:,} samples, DDIM-{protocol['steps']}{features}, {machine}", fontsize=10)
        figure.tight_layout()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"quality-{model}.png"
        figure.savefig(path, dpi=100)
        plt.close(figure)
        written.append(path)
    return written


def main() -> int:
    readme = ROOT / "README.md"
    readme.write_text(table.insert(readme.read_text(encoding="utf-8"), content(), BEGIN, END), encoding="utf-8")
    FULL.write_text(full(), encoding="utf-8")
    for found in _results():
        for path in plot(found, ROOT / "docs"):
            print(f"wrote docs/{path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
