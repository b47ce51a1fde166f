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


# README's cases: those that the targets speak of, whether they win or lose. The file `FULL` holds all.
_BRIEF = {
    "channel_sq_norm": ("large 64x64", "ddpm level 0 skip"),
    "wanda_score": ("sdxl 1280x2560x3x3",),
    "compact": ("ddpm-cifar10-32, 65 convolutions, 30 % random", "sdxl 1280x2560x3x3, 30 % random"),
    "conv_gram": ("ddpm level 0, 3x3", "ddpm level 0 skip, 3x3", "ddpm level 2, 3x3", "ddpm shortcut, 1x1", "sdxl level 0, 3x3"),
}


def _in_readme(row: Row) -> bool:
    if row["case"] not in _BRIEF[row["op"]]:
        return False
    if row["op"] == "conv_gram":
        return row["dtype"] == "fp32" and row["backend"] == "triton"
    layouts = ("nchw", "channels_last") if row["case"].startswith("large") else ("nchw", "contiguous")
    return row["dtype"] in ("fp32", "bf16") and row["layout"] in layouts


def _machine(env: Row) -> str:
    return f"{env.get('gpu') or env.get('cpu')}, driver {env.get('driver')}, torch {env['torch']}, triton {env['triton']}"


def _kernels(results: Sequence[dict[str, Any]], brief: bool) -> list[str]:
    lines = []
    for row in (row for result in results for row in result["rows"] if row["op"] in _BRIEF and "ms" in row):
        if row["backend"] in BASELINES or (brief and not _in_readme(row)):
            continue
        others = " | ".join(f"{v:.2f}×" if (v := row.get(f"speedup_vs_{b}")) else "-" for b in BASELINES[:3])
        share = _number(row["copy_fraction"], ".2f") if row["op"] != "conv_gram" else "-"  # bound by arithmetic
        backend = "" if brief else f" {row['backend']} |"
        lines.append(f"| `{row['op']}` | {row['case']} | {row['dtype']}, {row['layout']} |{backend} {_time(row['ms'])} | {share} | {others} |")
    if not lines:
        return []
    head = ["| operation | case | dtype, layout | ms | of copy | plain PyTorch | torch.compile | published |",
            "|---|---|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    if not brief:
        head = ["| operation | case | dtype, layout | backend | ms | of copy | plain PyTorch | torch.compile | published |",
                "|---|---|---|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    return [*head, *lines]


def _calibration(results: Sequence[dict[str, Any]], brief: bool) -> list[str]:
    steps = [row for result in results for row in result["rows"] if row["op"] == "calibration_step" and "ms" in row]
    if brief:
        steps = [row for row in steps if row["layout"] == "contiguous" and (row["backend"] == "published" or "graph" in row["case"])]
    lines = [
        f"| {row['case']} | {row['dtype']}, {row['layout']} | {row['backend']} | {_time(row['ms'])} | {_number(row['overhead'], '+.1%')} |"
        for row in steps
        if not brief or row["backend"] != "plain"
    ]
    return ["| calibration step | dtype, layout | hooks | ms | over a plain pass |", "|---|---|---|---:|---:|", *lines] if lines else []


def _whole(results: Sequence[dict[str, Any]], brief: bool) -> list[str]:
    stages = [row for result in results for row in result["rows"] if row["op"] == "whole_prune" and "ms" in row]
    lines = [
        f"| {row['case']} | {row['backend']} | {row['ms'] / 1e3:.3f} | {_number(row.get('share'), '.1%')} |"
        for row in stages
        if not brief or row["case"] == "whole"
    ]
    return ["| prune of the bundled model, stage | by | seconds | share |", "|---|---|---:|---:|", *lines] if lines else []


def markdown(results: Sequence[dict[str, Any]], brief: bool) -> str:
    """Our rows with the speed-up over each baseline beside them, the calibration step and the whole prune; `brief`: README's cases."""
    machines = list(dict.fromkeys(_machine(result["env"]) for result in results))
    commits = ", ".join(dict.fromkeys(result["env"]["commit"] for result in results))
    copies = [result["env"]["copy_gbps"] for result in results]
    first = (
        f"{'; '.join(machines)}; commit {commits}; medians, every result checked against float64 first. "
        f"Copy bandwidth {min(copies):,.0f} to {max(copies):,.0f} GB/s. Columns with × are speed-ups of our row "
        "over that baseline, in one run; rows that lose stay."
    )
    parts = [part for make in (_kernels, _calibration, _whole) if (part := make(results, brief))]
    return "\n\n".join([first, *("\n".join(part) for part in parts)])


def insert(readme: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """`readme` with everything between the two markers replaced."""
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"README.md must hold each of the lines {begin} and {end} once")
    head, rest = readme.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def content() -> str:
    """What stands between README's markers."""
    brief = markdown(_results(), brief=True)
    file = FULL.relative_to(ROOT).as_posix()
    return f"{brief}\n\nAll rows: [{file}]({file}); what limits them: [notes](benchmarks/results/notes.md)."


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
