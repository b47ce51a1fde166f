"""The table of images per second. `python -m benchmarks.speed_table` rewrites it from `RESULT`: the largest batch in README.md, between its
own two markers, all of it in `FULL`.

    python bench.py --op images_per_s --full --out benchmarks/results/h200-speed.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.table import ROOT, insert

RESULT = ROOT / "benchmarks" / "results" / "h200-speed.json"
FULL = ROOT / "benchmarks" / "results" / "speed-h200.md"
BEGIN, END = "<!-- speed table: begin -->", "<!-- speed table: end -->"
MODES = ("eager", "eager graph", "compiled", "compiled graph")
BRIEF = 256, ("eager", "compiled", "compiled graph")  # README's batch and modes


def markdown(result: dict[str, Any], brief: bool = False) -> str:
    """Images per second: a line per network and batch, a column per mode, in brackets times the dense network's; reasons for gaps below.
    `brief`: README's batch and modes alone.
    """
    env = result["env"]
    groups: dict[tuple[str, int, str], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["op"] == "images_per_s" and (not brief or (row["batch_size"] == BRIEF[0] and row["mode"] in BRIEF[1])):
            groups.setdefault((row["model"], row["batch_size"], row["network"]), {})[row["mode"]] = row
    modes = [m for m in MODES if any(m in by_mode for by_mode in groups.values())]
    dtypes = sorted({row["dtype"] for by_mode in groups.values() for row in by_mode.values()})
    head = (
        f"{env.get('gpu') or env.get('cpu')}, torch {env['torch']}, triton {env['triton']}, commit {env['commit']}; "
        f"{', '.join(dtypes)}, channels-last; batch / (50 · median of a forward pass), networks in turns; (×): times the dense network's."
    )
    if brief:
        head += f" [Batches of 1 and 16, and CUDA graphs without the compiler]({FULL.relative_to(ROOT).as_posix()})."
    lines = [head, "", f"| architecture, widths per level | MACs | batch | {' | '.join(modes)} |", f"|---|---:|---:|{'---:|' * len(modes)}"]
    gaps: dict[str, list[str]] = {}
    models = [model for model, *_ in groups]
    for (model, batch, network), by_mode in sorted(groups.items(), key=lambda item: (models.index(item[0][0]), -item[0][1])):
        settings = next(iter(by_mode.values()))["settings"]
        cells = []
        for mode in modes:
            row = by_mode.get(mode)
            if row is None or "error" in row:
                cells.append("-")
                if row is not None:
                    gaps.setdefault(row["error"], []).append(f"{model} b{batch} {network} {mode}")
                continue
            faster = f" ({row['times_as_fast']:.2f}×)" if row["times_as_fast"] else ""
            cells.append(f"{row['images_per_s']:,.2f}{faster}" if row["images_per_s"] < 10 else f"{row['images_per_s']:,.1f}{faster}")
        macs = "-" if settings["macs"] is None else f"{settings['macs'] / 1e9:,.2f} G"
        free = ", free layout" if settings.get("layout") == "free" else ""
        lines.append(f"| {model}{free}, ({', '.join(map(str, settings['widths']))}) | {macs} | {batch} | {' | '.join(cells)} |")
    lines += ["", *(f"No time: {'; '.join(where)}: {why}." for why, where in gaps.items())] if gaps else []
    return "\n".join(lines)


def content(result: dict[str, Any]) -> str:
    """What stands between README's markers."""
    return markdown(result, brief=True)


def full(result: dict[str, Any]) -> str:
    """The text of `FULL`."""
    return f"# Images per second, dense against pruned\n\nMade by `python -m benchmarks.speed_table`.\n\n{markdown(result)}\n"


def main() -> int:
    readme, result = ROOT / "README.md", json.loads(RESULT.read_text())
    readme.write_text(insert(readme.read_text(), content(result), BEGIN, END))
    FULL.write_text(full(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
