"""Tables and plots of what `bench.py --quality` wrote.

    python -m benchmarks.quality_report         the tables in README.md and `FULL`, and docs/quality-<model>.png
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.quality import MAIN_BUDGET, OURS, RESULTS, ROOT, Row, key, read_results

CPU_RESULTS = RESULTS.with_name("quality-cpu.json")
FULL = ROOT / "benchmarks" / "results" / "quality.md"
BEGIN, END = "<!-- quality table: begin -->", "<!-- quality table: end -->"


def _label(row: Row) -> str:
    if row["pruner"] == "dense":
        return "dense"
    extras = [] if row["repair"] == "lstsq" else [f"repair {row['repair']}"]
    extras += [row["layout"]] if row["layout"] != "stock" else []
    extras += ["uniform split"] if row["split"] == "uniform" else []
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


def _in_readme(row: Row) -> bool:
    """The dense network, all that is repaired at the main budget, and the default recipe without repair; `FULL` holds the rest."""
    if row["pruner"] in ("dense", OURS):
        return row["budget"] in (MAIN_BUDGET, "100%") and row["split"] != "uniform"
    told = row["repair"] != "none" or row["pruner"].startswith("torch-pruning")
    return told and row["budget"] == MAIN_BUDGET and row["split"] != "uniform"


def markdown(results: dict[str, Any], brief: bool = False) -> str:
    """One table per model, rows of several seeds as mean ± deviation; columns without a value are left out."""
    env, protocol = results["env"], results["protocol"]
    features, real = protocol["features"], protocol["real"]
    lines = [
        f"{env.get('gpu') or env.get('cpu')}, torch {env['torch']}; {protocol['samples']:,} samples, DDIM-{protocol['steps']}, "
        f"{protocol['precision']}. SSIM with the dense network's images from the same noise; ± is the deviation over seeds of calibration "
        "and repair."
    ]
    if features and real:
        lines[0] += f" FD: Fréchet distance in {features['features']} features to {real['count']:,} images of {real['source']}."

    def compiled(rows: Sequence[Row]) -> str:
        dense, fast = rows[0].get("images_per_s_compiled_dense"), rows[0].get("images_per_s_compiled")
        return f"{fast:.0f}, {fast / dense:.2f}×" if fast and dense else "-"

    columns: list[tuple[str, str, Any]] = [
        ("criterion", "---", lambda rows: _label(rows[0])),
        ("MACs", "---:", lambda rows: f"{rows[0]['macs'] / 1e9:.3g} G"),
        ("parameters", "---:", lambda rows: _spread(rows, "params", ".3g", 1e-6) + " M"),
        ("widths", "---", lambda rows: rows[0]["plan"] if len({r["plan"] for r in rows}) == 1 else "differ"),
        ("seeds", "---:", lambda rows: str(len(rows))),
        ("FD", "---:", lambda rows: _spread(rows, "fd", ".1f")),
        ("SSIM", "---:", lambda rows: _spread(rows, "ssim", ".3f")),
        ("noise MSE", "---:", lambda rows: _spread(rows, "noise_mse", ".5f")),
        ("images/s eager", "---:", lambda rows: _spread(rows[:1], "images_per_s", ".0f")),
        ("compiled, × dense", "---:", compiled),
        ("prune, s", "---:", lambda rows: _spread([r for r in rows if r["pruner"] != "dense"], "prune_seconds", ".1f")),
    ]
    for model in dict.fromkeys(row["model"] for row in results["rows"]):
        mine = grouped([row for row in results["rows"] if row["model"] == model and (not brief or _in_readme(row))])
        mine.sort(key=lambda g: (-float(g[0]["budget"].rstrip("%")), g[0]["repair"] == "none", -sum(r["ssim"] for r in g) / len(g)))
        cells = [[make(rows) for _, _, make in columns] for rows in mine]
        shown = [i for i in range(len(columns)) if any(line[i] != "-" for line in cells)]
        lines += ["", f"**{model}**", ""] + [
            "| " + " | ".join(line[i] for i in shown) + " |" for line in ([name for name, *_ in columns], *cells)
        ]  # fmt: skip
        lines.insert(len(lines) - len(cells), "|" + "|".join(columns[i][1] for i in shown) + "|")
    return "\n".join(lines)


def _results() -> list[dict[str, Any]]:
    return [found for file in (RESULTS, CPU_RESULTS) if (found := read_results(file)) is not None]


def content() -> str:
    """What stands between README's markers."""
    file = FULL.relative_to(ROOT).as_posix()
    last = f"All rows, other budgets and without repair: [{file}]({file})."
    return "\n\n".join([*(markdown(found, brief=True) for found in _results()), last])


def full() -> str:
    """The text of `FULL`."""
    tables = "\n\n".join(markdown(found) for found in _results())
    head = "# What pruning leaves of the images: all rows\n\nMade by `python -m benchmarks.quality_report` from `bench.py --quality`."
    return f"{head}\n\n{tables}\n"


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """Quality against multiply-accumulates, one line per method: SSIM, and the Fréchet distance where it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for model in dict.fromkeys(row["model"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["model"] == model]
        if len({row["budget"] for row in rows}) < 3:  # the dense network and one budget are no frontier
            continue
        panels = [p for p in (("ssim", "SSIM with the dense network's images"), ("fd", "Fréchet distance to real images"))
                  if any(row.get(p[0]) is not None for row in rows)]  # fmt: skip
        figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels) + 2.6, 5), squeeze=False)
        labels = [label for label in dict.fromkeys(_label(row) for row in rows) if label != "dense"]
        for axis, (name, title) in zip(axes[0], panels, strict=True):
            for i, label in enumerate(labels):
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
                    marker="osD^vP*Xph<>"[i % 12], color=plt.get_cmap("tab20")(i % 20), linestyle="-" if "repair" not in label else ":",
                    linewidth=2 if ours else 1, markersize=6, label=label, capsize=3,
                )  # fmt: skip
            dense = [row for row in rows if row["pruner"] == "dense" and row.get(name) is not None]
            if dense:
                axis.axhline(dense[0][name], color="black", linewidth=0.8, linestyle="--")
                axis.plot([dense[0]["macs"] / 1e9], [dense[0][name]], "k*", markersize=11, label="dense")
            if name == "fd":
                axis.set_yscale("log")
            axis.set_xlabel("GMACs of one forward pass")
            axis.set_ylabel(title)
            axis.grid(alpha=0.3, which="both")
        axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
        env, protocol = results["env"], results["protocol"]
        features = f", {protocol['features']['features']} features" if protocol["features"] and len(panels) == 2 else ""
        machine = env.get("gpu") or env.get("cpu")
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
