"""Tables and charts of benchmark results. `python -m benchmarks.table` rewrites the table in README.md from the files of `RESULTS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What bench.py wrote: the kernels, and the calibration step and whole prune of an earlier commit.
RESULTS = tuple(ROOT / "benchmarks" / "results" / name for name in ("h200.json", "h200-calibration.json"))
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


def _in_readme(op: str, case: str, dtype: str, layout: str) -> bool:
    """The cases that the targets speak of; the JSON file holds all."""
    if dtype not in ("fp32", "bf16"):
        return False
    if op == "channel_sq_norm":
        return case.startswith("large") or case == "ddpm level 0 skip"
    if op == "wanda_score":
        return case.startswith("sdxl 1280x2560") and layout == "contiguous"
    if op == "compact":
        return layout == "contiguous" and "30 %" in case
    if op == "conv_gram":
        return dtype == "fp32"
    return True


def markdown(result: dict[str, Any]) -> str:
    """The README's table: our rows, with the speed-up over each baseline beside them, the calibration step and the whole prune."""
    env = result["env"]
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in result["rows"]:
        if "ms" in row:
            groups.setdefault(_key(row)[:4], {})[row["backend"]] = row
    lines = [
        f"{env.get('gpu') or env.get('cpu')}, driver {env.get('driver')}, torch {env['torch']}, triton {env['triton']}, "
        f"commit {env['commit']}; copy {env['copy_gbps']:,.0f} GB/s in the same run; medians."
    ]
    if any(op not in ("calibration_step", "whole_prune") for op, *_ in groups):
        lines[0] += " Columns with × are speed-ups of our row over that baseline; rows that lose stay."
        lines += [
            "",
            "| operation | case | dtype, layout | ms | of copy | plain PyTorch | torch.compile | published |",
            "|---|---|---|---:|---:|---:|---:|---:|",
        ]
    for (op, case, dtype, layout), by_backend in groups.items():
        if op in ("calibration_step", "whole_prune") or not _in_readme(op, case, dtype, layout):
            continue
        for backend, row in by_backend.items():
            if backend in BASELINES:
                continue
            speedups = [row.get(f"speedup_vs_{b}") for b in BASELINES[:3]]
            others = " | ".join(f"{value:.2f}×" if value else "-" for value in speedups)
            share = _number(row["copy_fraction"], ".2f") if op != "conv_gram" else "-"  # bound by arithmetic
            lines.append(f"| `{op}` | {case} | {dtype}, {layout} | {_time(row['ms'])} | {share} | {others} |")
    steps = [
        row
        for row in result["rows"]
        if row["op"] == "calibration_step" and "ms" in row and row["layout"] == "contiguous"
    ]
    if steps:
        lines += ["", "| calibration step | dtype, layout | hooks | ms | overhead |", "|---|---|---|---:|---:|"]
        lines += [
            f"| {row['case']} | {row['dtype']}, {row['layout']} | {row['backend']} | {_time(row['ms'])} | {_number(row['overhead'], '+.1%')} |"
            for row in steps
        ]
    stages = [row for row in result["rows"] if row["op"] == "whole_prune" and "ms" in row]
    if stages:
        lines += ["", "| whole prune, stage | by | seconds | share |", "|---|---|---:|---:|"]
        lines += [
            f"| {row['case']} | {row['backend']} | {row['ms'] / 1e3:.3f} | {_number(row.get('share'), '.1%')} |"
            for row in stages
        ]
    return "\n".join(lines)


def insert(readme: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """`readme` with everything between the two markers replaced."""
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"README.md must hold each of the lines {begin} and {end} once")
    head, rest = readme.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def content() -> str:
    """What stands between the markers: the tables of all result files."""
    return "\n\n".join(markdown(json.loads(file.read_text())) for file in RESULTS)


def main() -> int:
    readme = ROOT / "README.md"
    readme.write_text(insert(readme.read_text(), content()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
