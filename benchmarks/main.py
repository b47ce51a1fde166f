"""The command line of bench.py: choose operations and a device, run, print one table, write and compare JSON.

A new operation is one file in this folder with `OP` and either `cases(device, size) -> list[Case]` or `rows(device, size, seed) -> list[dict]`;
its name goes into OPERATIONS. `rows` may also take the keywords `with_compile`, `limit_s` and `save`, which gets the rows so far.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import table
from benchmarks.harness import CLOCKS, copy_bandwidth, environment, log, run_case, use_clock
from wanda_fast.checkpoint import atomic_file, check_file
from wanda_fast.errors import UserError

OPERATIONS = ("channel_sq_norm", "wanda_score", "compact", "conv_gram", "calibration_step", "whole_prune", "images_per_s")
ON_REQUEST = ("images_per_s",)  # minutes of compiling: only where --op names it
FOLDER = Path(__file__).resolve().parent


def operations() -> list[str]:
    """Operations whose file is here."""
    return [name for name in OPERATIONS if (FOLDER / f"{name}.py").exists()]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="bench.py",
        description="python bench.py --quick\n\n"
        "Check every operation against float64 plain PyTorch, then time it beside plain PyTorch, torch.compile\n"
        "and the published method's code. A wrong result gets no time and makes the exit code 1.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument(
        "--op", action="append", choices=operations(), help=f"operation to run; may be repeated (default: all but {', '.join(ON_REQUEST)})",
    )
    p.add_argument("--device", default=None, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    size = p.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few shapes; under a minute on two CPU cores")
    size.add_argument("--full", action="store_true", help="every shape, dtype and layout; some minutes on a GPU")
    p.add_argument(
        "--no-compile", action="store_true", help="leave out the torch.compile rows, which take seconds each to build"
    )
    p.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall",
        help="of CPU timings: wall, or process for this process's processor time, on a machine that others use (one thread only)",
    )  # fmt: skip
    p.add_argument(
        "--limit", type=float, default=270.0, metavar="SECONDS", help="images_per_s: begin no batch size after this long (default: 270)"
    )  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="seed of all inputs (default: 0)")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="write environment and rows")
    p.add_argument("--compare", type=Path, metavar="FILE", help="show changes against an earlier --out file")
    p.add_argument("--quality", action="store_true",
        help="measure what pruning leaves of the images instead; options of its own: bench.py --quality --help")  # fmt: skip
    p.add_argument("--chart", type=Path, metavar="FILE.png", help="draw a bar chart of the share of copy bandwidth")
    return p


def run(
    ops: list[str],
    device: torch.device,
    size: str,
    *,
    seed: int,
    with_compile: bool,
    clock_name: str = "wall",
    limit_s: float = 270.0,
    save: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Environment and rows of the chosen operations; `save` gets what there is after each of them, and more often from long ones."""
    torch.manual_seed(seed)
    env = environment(device, seed)
    env["size"] = size
    env["clock"] = clock_name
    log("  ".join(f"{k} {v}" for k, v in env.items() if v is not None))
    copy_gbps = copy_bandwidth(device)
    env["copy_gbps"] = round(copy_gbps, 1)
    log(f"copy bandwidth {copy_gbps:.0f} GB/s (bytes read and written)")
    rows: list[dict[str, Any]] = []
    budget = {"quick": 0.1, "default": 0.2, "full": 0.1}[size]
    for op in ops:
        start = time.perf_counter()
        module = importlib.import_module(f"benchmarks.{op}")
        if hasattr(module, "rows"):

            def keep(new: list[dict[str, Any]], before: list[dict[str, Any]] = list(rows)) -> None:  # noqa: B006
                if save is not None:
                    save({"env": env, "rows": [*before, *new]})

            offered: dict[str, Any] = {"with_compile": with_compile, "limit_s": limit_s, "save": keep}
            wanted = inspect.signature(module.rows).parameters
            rows += module.rows(device, size, seed, **{name: value for name, value in offered.items() if name in wanted})
        else:
            cases = module.cases(device, size)
            compile_ops = with_compile and (size != "quick" or device.type == "cuda")
            for case in cases:
                new = run_case(
                    case, device, copy_gbps, seed=seed, quick=size == "quick", with_compile=compile_ops, budget_s=budget
                )
                rows += new
        log(f"{op}: {time.perf_counter() - start:.1f} s")
        if save is not None:
            save({"env": env, "rows": rows})
    return {"env": env, "rows": rows}


def read_results(file: Path) -> dict[str, Any]:
    """What `--out` wrote.

    Raises:
        OSError, ValueError: no such file, or of another form.
    """
    found = json.loads(file.read_text())
    form = isinstance(found, dict) and isinstance(found.get("env"), dict) and isinstance(found.get("rows"), list)
    if not form or not all(isinstance(row, dict) and row.keys() >= {"op", "case", "dtype", "layout", "backend"} for row in found["rows"]):
        raise ValueError("not a file that --out wrote")
    for row in found["rows"]:
        if "ms" in row and (type(row["ms"]) not in (int, float) or not row["ms"] > 0):
            raise ValueError(f"not a file that --out wrote: a row has the time {row['ms']!r}")
    return found


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if "--quality" in words:
        from benchmarks import quality

        return quality.main(words)
    p = parser()
    args = p.parse_args(argv)
    earlier = None
    if args.compare is not None:
        try:
            earlier = read_results(args.compare)
        except (OSError, ValueError) as error:
            p.exit(2, f"bench.py: cannot read {args.compare}: {error}\n")
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        p.exit(2, f"bench.py: --device {name} is no device\n")
    if device.type not in ("cpu", "cuda"):
        p.exit(2, f"bench.py: --device {name}: only cpu and cuda are timed\n")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            p.exit(2, "bench.py: --device cuda: no CUDA GPU is visible\n")
        device = torch.device("cuda", device.index or 0)
        if device.index >= torch.cuda.device_count():
            p.exit(2, f"bench.py: --device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0\n")
        torch.cuda.set_device(device)
    for option, file in (("--out", args.out), ("--chart", args.chart)):
        if file is None:
            continue
        if not file.resolve().parent.is_dir():
            p.exit(2, f"bench.py: {option} {file}: its folder does not exist\n")
        try:
            check_file(file, overwrite=True)
        except UserError as error:
            p.exit(2, f"bench.py: {option} {error}\n")
    if args.chart is not None and args.chart.suffix[1:].lower() not in table.chart_formats():
        p.exit(2, f"bench.py: --chart {args.chart}: the name must end in one of {', '.join(table.chart_formats())}\n")
    if not -(2**63) <= args.seed < 2**64:
        p.exit(2, f"bench.py: --seed {args.seed}: must fit 64 bits\n")
    if args.clock == "process" and (device.type != "cpu" or torch.get_num_threads() != 1):
        p.exit(2, "bench.py: --clock process: only on the CPU with one thread (OMP_NUM_THREADS=1)\n")
    use_clock(args.clock)
    size = "quick" if args.quick else "full" if args.full else "default"

    def save(found: dict[str, Any]) -> None:
        if args.out is not None:
            with atomic_file(args.out) as temp:  # a run may be stopped at any time
                temp.write_text(json.dumps(found, indent=1) + "\n")

    result = run(
        args.op or [name for name in operations() if name not in ON_REQUEST], device, size, seed=args.seed, with_compile=not args.no_compile,
        clock_name=args.clock, limit_s=args.limit, save=save,
    )  # fmt: skip
    log("")
    log(table.text(result["rows"]))
    if args.out is not None:
        log(f"wrote {args.out}")
    if earlier is not None:
        log(table.comparison(earlier, result))
    if args.chart is not None:
        table.chart(result, args.chart)
        log(f"wrote {args.chart}")
    wrong = [row for row in result["rows"] if "error" in row]
    if wrong:
        log(f"{len(wrong)} rows have no time: a wrong result, or the reason that they give")
    return 1 if wrong else 0
