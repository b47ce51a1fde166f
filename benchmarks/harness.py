"""Checks, times and describes the cases that the files beside it define; knows nothing of any single operation.

A case gives inputs (several sets, so that the cache is not measured), the float64 truth, and candidates by backend name. A candidate is checked
first; a wrong one gets no time. Times are medians with 20th and 80th percentiles:

- `ms` of a device case is device time: the queue is filled behind a short sleep, so that the host's launch cost is
  hidden, and events stand around several calls. `call_ms` is the same calls with the host included, back to back. Cases
  made of many small pieces set basis="call_ms": there the host is what a user waits for, and `ms` is that; `device_ms`
  keeps the other figure.
- On the CPU both are wall time, or processor time of the process (`use_clock("process")`), which leaves out the time that other
  programs had the core and is the same on an idle machine with one thread.

`copy_fraction` compares with a large copy on the same device in the same run, bytes read and written both counted.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Inputs = tuple[Any, ...]
Run = Callable[..., Any]

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}
_clock = time.perf_counter
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# Together the rotated input sets exceed the largest L2 cache in use (60 MB) four times; on a CPU its last-level cache.
ROTATE_BYTES = {"cuda": 256 << 20, "cpu": 128 << 20}
MAX_SETS = 64
SLEEP_CYCLES_PER_MS = 2_000_000


@dataclass
class Case:
    """One operation on one input shape.

    bytes: the fewest that must move: each input read once, each output written once.
    make: builds one input set from a seeded generator on the device.
    truth: float64 results (a tensor or a sequence of tensors) of one input set.
    candidates: backend name -> function of one input set; each returns what `truth` returns.
    compile_of: the plain PyTorch function whose torch.compile makes the row `compile`; None leaves the row out.
    exact: results must be equal bit for bit, not close.
    rounding: candidate -> relative error that its number format explains, where plain PyTorch's own error is no measure of it.
    """

    op: str
    case: str
    dtype: str
    layout: str
    bytes: int
    make: Callable[[torch.Generator], Inputs]
    truth: Run
    candidates: dict[str, Run]
    compile_of: Run | None = None
    exact: bool = False
    rounding: dict[str, float] = field(default_factory=dict)
    basis: str = "ms"
    unchecked: frozenset[str] = frozenset()  # rows that compute something else on purpose (the published hook keeps no table)
    mutates: tuple[int, ...] = ()  # positions of arguments that a call changes
    info: dict[str, Any] = field(default_factory=dict)


@dataclass
class Timing:
    ms: float
    ms_p20: float
    ms_p80: float
    call_ms: float
    peak_mib: float | None  # of tensors on the device; not measured on a CPU


def use_clock(name: str) -> None:
    """Choose the clock of CPU timings, one of CLOCKS."""
    global _clock
    _clock = CLOCKS[name]


def clock() -> float:
    """Seconds of the chosen clock."""
    return _clock()


def log(text: str) -> None:
    print(text, flush=True)


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(samples)

    def at(q: float) -> float:
        return ordered[min(len(ordered) - 1, max(0, round(q * (len(ordered) - 1))))]

    return statistics.median(ordered), at(0.2), at(0.8)


def time_calls(run: Run, sets: Sequence[Inputs], device: torch.device, *, budget_s: float) -> Timing:
    """Time `run` over the rotated input sets for about `budget_s` seconds."""
    if device.type == "cuda":
        return _time_cuda(run, sets, budget_s)
    for inputs in sets[:2]:
        run(*inputs)
    start = clock()
    run(*sets[0])
    count = int(min(100, max(1, 1e-4 / max(clock() - start, 1e-6))))  # several calls where one takes microseconds
    samples: list[float] = []
    began = time.perf_counter()
    while len(samples) < 5 or (time.perf_counter() - began < budget_s and len(samples) < 2000):
        first = len(samples) * count
        start = clock()
        for k in range(first, first + count):
            run(*sets[k % len(sets)])
        samples.append((clock() - start) * 1e3 / count)
    median, low, high = percentiles(samples)
    return Timing(median, low, high, median, None)


def _time_cuda(run: Run, sets: Sequence[Inputs], budget_s: float) -> Timing:
    for inputs in sets[: min(3, len(sets))]:
        run(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*sets[0])
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20

    step = 0

    def calls(count: int) -> None:
        nonlocal step
        for _ in range(count):
            run(*sets[step % len(sets)])
            step += 1

    probe = 8
    start = time.perf_counter()
    calls(probe)
    queued = (time.perf_counter() - start) * 1e3 / probe
    torch.cuda.synchronize()
    whole = (time.perf_counter() - start) * 1e3 / probe
    count = int(min(50, max(4, 3.0 / max(whole, 1e-3))))
    repeats = int(min(100, max(10, budget_s * 1e3 / (3.0 * count * max(whole, 1e-3)))))

    call_samples = []
    for _ in range(max(5, repeats // 2)):
        start = time.perf_counter()
        calls(count)
        torch.cuda.synchronize()
        call_samples.append((time.perf_counter() - start) * 1e3 / count)
    samples = []
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cycles = int((queued * count * 1.3 + 0.1) * SLEEP_CYCLES_PER_MS)
    for _ in range(repeats):
        torch.cuda._sleep(cycles)
        first.record()
        calls(count)
        last.record()
        last.synchronize()
        samples.append(first.elapsed_time(last) / count)
    median, low, high = percentiles(samples)
    return Timing(median, low, high, statistics.median(call_samples), peak)


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy on the device, bytes read plus bytes written."""
    size = (1 << 30) if device.type == "cuda" else (128 << 20)
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    timing = time_calls(lambda: target.copy_(source), [()], device, budget_s=0.5)
    return 2 * size / timing.ms / 1e6


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _fresh(case: Case, inputs: Inputs) -> Inputs:
    """The inputs with changed arguments copied; the others keep their strides."""
    return tuple(v.clone() if i in case.mutates else v for i, v in enumerate(inputs))


def relative_error(result: Any, truth: Any) -> float:
    """Largest over the tensors of max|result - truth| / max|truth|; NaN and a wrong shape are infinite."""
    worst = 0.0
    got, want = _tensors(result), _tensors(truth)
    if len(got) != len(want):
        return float("inf")
    for a, b in zip(got, want, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel() == 0:
            continue
        difference = float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30))
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def check(case: Case, backend: str, run: Run, inputs: Inputs, reference_error: float | None) -> tuple[bool, float]:
    """(right, error). Right: exact, or a finite error of at most twice that of plain PyTorch in the same dtype plus 1e-6, or of what the
    candidate's number format explains (`Case.rounding`). Plain PyTorch's own row need only be finite.
    """
    truth = case.truth(*_fresh(case, inputs))
    result = run(*_fresh(case, inputs))
    if case.exact:
        got, want = _tensors(result), _tensors(truth)
        same = len(got) == len(want) and all(
            a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b) for a, b in zip(got, want, strict=True)
        )
        return same, 0.0 if same else float("inf")
    error = relative_error(result, truth)
    allowed = max(2 * (reference_error or 0.0) + 1e-6, case.rounding.get(backend, 0.0))
    return math.isfinite(error) and (backend == "reference" or error <= allowed), error


def input_sets(case: Case, device: torch.device, seed: int, quick: bool) -> list[Inputs]:
    generator = torch.Generator(device=device).manual_seed(seed)
    total = ROTATE_BYTES[device.type] // (4 if quick else 1)
    count = max(2, min(MAX_SETS, total // max(case.bytes, 1)))
    return [case.make(generator) for _ in range(count)]


def compiled(function: Run) -> Run:
    """torch.compile with static shapes and no recompile limit in the way of a benchmark with many shapes."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 8192
    return torch.compile(function, dynamic=False)


def run_case(
    case: Case, device: torch.device, copy_gbps: float, *, seed: int, quick: bool, with_compile: bool, budget_s: float
) -> list[dict[str, Any]]:
    """Rows of one case, one per candidate. A wrong candidate has `error` and no time."""
    sets = input_sets(case, device, seed, quick)
    candidates = dict(case.candidates)
    if with_compile and case.compile_of is not None:
        candidates["compile"] = compiled(case.compile_of)
    rows: list[dict[str, Any]] = []
    reference_error: float | None = None
    for backend, run in candidates.items():
        row: dict[str, Any] = {
            "op": case.op, "case": case.case, "dtype": case.dtype, "layout": case.layout, "backend": backend, "bytes": case.bytes, **case.info,
        }  # fmt: skip
        start = time.perf_counter()
        if backend in case.unchecked:
            run(*_fresh(case, sets[0]))
        else:
            right, error = check(case, backend, run, sets[0], reference_error)
            if backend == "reference":
                reference_error = error
            row["rel_error"] = error
            if not right:
                row["error"] = f"wrong result: relative error {error:.3g}, plain PyTorch has {reference_error}"
                log(f"WRONG {case.op} {case.case} {case.dtype} {case.layout} {backend}: {row['error']}")
                rows.append(row)
                continue
        if device.type == "cuda":
            torch.cuda.synchronize()
        # compile and tuning time, for the compiled and Triton rows
        row["first_call_s"] = round(time.perf_counter() - start, 3)
        timing = time_calls(run, sets, device, budget_s=budget_s)
        ms = timing.call_ms if case.basis == "call_ms" else timing.ms
        scale = ms / timing.ms
        row |= {
            "ms": ms, "ms_p20": timing.ms_p20 * scale, "ms_p80": timing.ms_p80 * scale, "call_ms": timing.call_ms, "device_ms": timing.ms,
            "gbps": case.bytes / ms / 1e6, "copy_fraction": case.bytes / ms / 1e6 / copy_gbps,
            "peak_mib": None if timing.peak_mib is None else round(timing.peak_mib, 2),
        }  # fmt: skip
        rows.append(row)
    add_speedups(rows)
    return rows


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """speedup_vs_<baseline> of every timed row of one case; None where the baseline was not run."""
    times = {row["backend"]: row["ms"] for row in rows if "ms" in row}
    for row in rows:
        for baseline in ("reference", "compile", "published"):
            known = "ms" in row and baseline in times and row["backend"] != baseline
            row[f"speedup_vs_{baseline}"] = times[baseline] / row["ms"] if known else None


def environment(device: torch.device, seed: int) -> dict[str, Any]:
    """What a reader needs to compare figures; no host names and no paths."""
    import importlib.util

    env: dict[str, Any] = {
        "device": device.type,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": None,
        "commit": _commit(),
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    if importlib.util.find_spec("triton") is not None:
        import triton

        env["triton"] = triton.__version__
    if importlib.util.find_spec("diffusers") is not None:
        from importlib.metadata import version

        env["diffusers"] = version("diffusers")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        env["gpu"] = properties.name
        env["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        env["multiprocessors"] = properties.multi_processor_count
        env["driver"] = _driver()
    else:
        env["cpu"] = _cpu_name()
    return env


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).resolve().parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _commit() -> str | None:
    """The commit of the code, from git or, in a copy without its history, from WANDA_FAST_COMMIT."""
    if given := os.environ.get("WANDA_FAST_COMMIT"):
        return given
    commit = _first_line(["git", "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return None
    changed = _first_line(["git", "status", "--porcelain", "--untracked-files=no"])
    return commit + ("+changes" if changed else "")


def _driver() -> str | None:
    return _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
