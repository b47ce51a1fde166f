"""Tables and charts of benchmark results. `python -m benchmarks.table` writes those of README.md and `FULL` from the files of `RESULTS`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What bench.py wrote: the bandwidth-bound kernels, and the operations that were measured again at a later commit.
_FILES = ("h200.json", "h200-conv_gram.json", "h200-calibration_step.json", "h200-whole_prune.json")
RESULTS = tuple(ROOT / "benchmarks" / "results" / name for name in _FILES)
FULL = ROOT / "benchmarks" / "results" / "kernels-h200.md"
BEGIN, END = "<!-- benchmark table: begin -->", "<!-- benchmark table: end -->"
BASELINES = ("reference", "compile", "published", "plain")
Row = dict[str, Any]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row[k]) for k in ("op", "case", "dtype", "layout", "backend"))


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _time(ms: float) -> str:
    return f"{ms:.4f}" if ms < 1 else f"{ms:.3f}" if ms < 100 else f"{ms:.1f}"


def text(rows: list[Row]) -> str:
    """All rows as one plain table."""
    head = [
        "op",
        "case",
        "dtype",
        "layout",
        "backend",
        "ms",
        "p20",
        "p80",
        "call ms",
        "GB/s",
        "of copy",
        "MiB",
        "x ref",
        "x compile",
        "x publ.",
        "overhead",
    ]
    lines = [head]
    for row in rows:
        start = [str(row[k]) for k in ("op", "case", "dtype", "layout", "backend")]
        if "error" in row:
            lines.append([*start, row["error"], *[""] * (len(head) - 6)])
            continue
        lines.append([
            *start, _time(row["ms"]), _time(row["ms_p20"]), _time(row["ms_p80"]), _number(row.get("call_ms"), ".4f"),
            _number(row.get("gbps"), ".0f"), _number(row.get("copy_fraction"), ".2f"), _number(row.get("peak_mib"), ".1f"),
            *(_number(row.get(f"speedup_vs_{b}"), ".2f") for b in ("reference", "compile", "published")), _number(row.get("overhead"), "+.1%"),
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines if len(line) == len(head)) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def comparison(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """Time changes of rows that both runs hold."""
    before = {_key(row): row for row in earlier["rows"] if "ms" in row}
    lines = [f"against {earlier['env'].get('commit')} on {earlier['env'].get('gpu') or earlier['env'].get('cpu')}:"]
    for row in now["rows"]:
        old = before.get(_key(row))
        if old is not None and "ms" in row:
            lines.append(
                f"  {' '.join(_key(row))}: {_time(old['ms'])} -> {_time(row['ms'])} ms ({row['ms'] / old['ms'] - 1:+.1%})"
            )
    if len(lines) == 1:
        lines.append("  no common rows")
    return "\n".join(lines)


def chart_formats() -> list[str]:
    """File name endings that `chart` can write, without the dot."""
    from matplotlib.backend_bases import FigureCanvasBase

    return sorted(FigureCanvasBase.get_supported_filetypes())


def chart(result: dict[str, Any], path: Path) -> None:
    """Bar chart: share of copy bandwidth of every case, one bar per backend."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row.get("copy_fraction") is not None]
    labels = list(dict.fromkeys(f"{r['op']}: {r['case']} {r['dtype']} {r['layout']}" for r in rows))
    backends = list(dict.fromkeys(r["backend"] for r in rows))
    values = {(f"{r['op']}: {r['case']} {r['dtype']} {r['layout']}", r["backend"]): r["copy_fraction"] for r in rows}
    height = 0.8 / max(len(backends), 1)
    figure, axes = plt.subplots(figsize=(10, 1 + 0.35 * len(labels)))
    for i, backend in enumerate(backends):
        places = [y + i * height for y in range(len(labels))]
        axes.barh(places, [values.get((label, backend), 0.0) for label in labels], height, label=backend)
    axes.set_yticks([y + 0.4 - height / 2 for y in range(len(labels))], labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("share of copy bandwidth (bytes that must move / time)")
    axes.set_title(str(result["env"].get("gpu") or result["env"].get("cpu")))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


KERNELS = ("channel_sq_norm", "wanda_score", "compact", "conv_gram")
# README's rows: a large case of every operation, and cases that lose. The file `FULL` holds all.
_BRIEF = {
    ("channel_sq_norm", "large 64x64", "nchw"): ("fp32", "bf16"),
    ("channel_sq_norm", "ddpm time", "nc"): ("fp32",),
    ("wanda_score", "sdxl 1280x2560x3x3", "contiguous"): ("fp32", "bf16"),
    ("compact", "sdxl 1280x2560x3x3, 30 % random", "contiguous"): ("fp32", "bf16"),
    ("conv_gram", "sdxl level 0, 3x3", "nchw"): ("fp32",),
    ("conv_gram", "ddpm shortcut, 1x1", "nchw"): ("fp32",),
}


def _in_readme(row: Row) -> bool:
    told = row["dtype"] in _BRIEF.get((row["op"], row["case"], row["layout"]), ())
    return told and (row["op"] != "conv_gram" or row["backend"] == "triton")


def _machine(env: Row) -> str:
    return f"{env.get('gpu') or env.get('cpu')}, driver {env.get('driver')}, torch {env['torch']}, triton {env['triton']}"


def _kernels(results: Sequence[dict[str, Any]], brief: bool) -> list[str]:
    ours = [row for result in results for row in result["rows"] if row["op"] in KERNELS and "ms" in row and row["backend"] not in BASELINES]
    if brief:
        ours = sorted(filter(_in_readme, ours), key=lambda row: KERNELS.index(row["op"]))
    lines = []
    for row in ours:
        others = [f"{v:.2f}×" if (v := row.get(f"speedup_vs_{b}")) else "-" for b in BASELINES[:3]]
        share = _number(row["copy_fraction"], ".2f") if row["op"] != "conv_gram" else "-"  # bound by arithmetic
        how = [f"{row['dtype']}, {row['layout']}", row["backend"]]
        if brief:
            others, how = others[1:], [row["dtype"]]
        lines.append("| " + " | ".join([f"`{row['op']}`", row["case"], *how, _time(row["ms"]), share, *others]) + " |")
    if not lines:
        return []
    if brief:
        return ["| operation | case | dtype | ms | of copy | torch.compile | published |", "|---|---|---|---:|---:|---:|---:|", *lines]
    return ["| operation | case | dtype, layout | backend | ms | of copy | plain PyTorch | torch.compile | published |",
            "|---|---|---|---|---:|---:|---:|---:|---:|", *lines]  # fmt: skip


def _calibration(results: Sequence[dict[str, Any]]) -> list[str]:
    steps = [row for result in results for row in result["rows"] if row["op"] == "calibration_step" and "ms" in row]
    lines = [
        f"| {row['case']} | {row['dtype']}, {row['layout']} | {row['backend']} | {_time(row['ms'])} | {_number(row['overhead'], '+.1%')} |"
        for row in steps
    ]
    return ["| calibration step | dtype, layout | hooks | ms | over a plain pass |", "|---|---|---|---:|---:|", *lines] if lines else []


def _calibration_in_readme(results: Sequence[dict[str, Any]]) -> list[str]:
    """What the hooks add to a pass: a line per number format, contiguous; ours from a CUDA graph and eager, the published ones eager."""
    steps = [row for result in results for row in result["rows"] if row["op"] == "calibration_step" and row.get("overhead") is not None]
    ways = {"CUDA graph": ("graph", "triton"), "eager": ("eager", "triton"), "eager, published": ("eager", "published")}
    lines = []
    for case, dtype in dict.fromkeys((row["case"].rsplit(" ", 1)[0], row["dtype"]) for row in steps):
        found = {(row["mode"], row["backend"]): row["overhead"] for row in steps
                 if row["case"].startswith(case) and row["dtype"] == dtype and row["layout"] == "contiguous"}  # fmt: skip
        lines.append(f"| {case}, {dtype} | {' | '.join(_number(found.get(way), '+.1%') for way in ways.values())} |")
    return [f"| what hooks add to a pass | {' | '.join(ways)} |", f"|---|{'---:|' * len(ways)}", *lines] if lines else []


def _whole(results: Sequence[dict[str, Any]]) -> list[str]:
    stages = [row for result in results for row in result["rows"] if row["op"] == "whole_prune" and "ms" in row]
    lines = [f"| {row['case']} | {row['backend']} | {row['ms'] / 1e3:.3f} | {_number(row.get('share'), '.1%')} |" for row in stages]
    return ["| prune of the bundled model, stage | by | seconds | share |", "|---|---|---:|---:|", *lines] if lines else []


def markdown(results: Sequence[dict[str, Any]], brief: bool) -> str:
    """Our rows with the speed-up over each baseline beside them, the calibration step and the whole prune; `brief`: README's rows, and no
    whole prune.
    """
    machines = list(dict.fromkeys(_machine(result["env"]) for result in results))
    commits = ", ".join(dict.fromkeys(result["env"]["commit"] for result in results))
    copies = [result["env"]["copy_gbps"] for result in results]
    ratios = "Columns with × are speed-ups of our row over that baseline, in one run; rows that lose stay."
    if brief:
        first = (
            f"{'; '.join(machines)}; medians, checked against float64 first. Of copy: share of the bandwidth of a large copy. {ratios} "
            f"[All rows]({FULL.relative_to(ROOT).as_posix()}), [what limits them](benchmarks/results/notes.md)."
        )
        found = [_kernels(results, True), _calibration_in_readme(results)]
    else:
        first = (
            f"{'; '.join(machines)}; commit {commits}; medians, every result checked against float64 first. "
            f"Copy bandwidth {min(copies):,.0f} to {max(copies):,.0f} GB/s. {ratios}"
        )
        found = [_kernels(results, False), _calibration(results), _whole(results)]
    return "\n\n".join([first, *("\n".join(part) for part in found if part)])


def insert(readme: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """`readme` with everything between the two markers replaced."""
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"README.md must hold each of the lines {begin} and {end} once")
    head, rest = readme.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def content() -> str:
    """What stands between README's markers."""
    return markdown(_results(), brief=True)


def full() -> str:
    """The text of `FULL`."""
    head = "# Kernels and calibration: all rows of our implementations\n\nMade by `python -m benchmarks.table`."
    return f"{head}\n\n{markdown(_results(), brief=False)}\n"


def _results() -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in RESULTS]


def main() -> int:
    readme = ROOT / "README.md"
    readme.write_text(insert(readme.read_text(), content()))
    FULL.write_text(full())
    return 0


if __name__ == "__main__":
    sys.exit(main())
