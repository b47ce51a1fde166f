"""calibration_step: a forward pass of ddpm-cifar10-32 with accumulation hooks, over the plain forward pass in the same mode.

Modes: fp32 and bf16 weights, eager and replayed from a CUDA graph. `overhead` = time / time of the plain pass - 1.
Rows: plain, the hooks and the graph capture of `wanda_fast.calibrate` itself, and the published hook, which cannot be captured
(it copies to the CPU in every layer), so its graph rows are absent. `capture_s` is what recording the graph took.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import published, shapes
from benchmarks.harness import clock, log, percentiles

OP = "calibration_step"


def _time(steps: dict[str, Callable[[], Any]], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Milliseconds per call of each step, taken in turns so that all see the same clocks."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for step in steps.values():
        for _ in range(2 if device.type == "cuda" else 1):
            step()
        wait()
    samples: dict[str, list[float]] = {name: [] for name in steps}
    began = time.perf_counter()
    per_sample = 4 if device.type == "cuda" else 1
    while time.perf_counter() - began < seconds or len(next(iter(samples.values()))) < 3:
        for name, step in steps.items():
            start = clock()
            for _ in range(per_sample):
                step()
            wait()
            samples[name].append((clock() - start) * 1e3 / per_sample)
    return samples


def rows(device: torch.device, size: str, seed: int) -> list[dict[str, Any]]:
    """One row per mode and backend."""
    on_gpu = device.type == "cuda"
    batch = 128 if on_gpu else (1 if size == "quick" else 8)
    seconds = {"quick": 0.5, "default": 3.0, "full": 4.0}[size]
    backend = "triton" if on_gpu else "cpu"
    found = []
    torch.manual_seed(seed)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")) if on_gpu else ((torch.float32, "fp32"),):
        for layout in ("contiguous", "channels_last") if on_gpu and size == "full" else ("contiguous",):
            network = shapes.ddpm_unet().to(device=device, dtype=dtype).eval().requires_grad_(False)
            x = torch.randn(batch, 3, 32, 32, device=device, dtype=dtype)
            if layout == "channels_last":
                network = network.to(memory_format=torch.channels_last)
                x = x.to(memory_format=torch.channels_last)
            t = torch.randint(0, 1000, (batch,), device=device)
            found += _mode_rows(network, x, t, name, layout, device, backend, seconds, on_gpu)
            del network
    return found


@torch.no_grad()
def _mode_rows(
    network: nn.Module,
    x: Tensor,
    t: Tensor,
    dtype: str,
    layout: str,
    device: torch.device,
    backend: str,
    seconds: float,
    on_gpu: bool,
) -> list[dict[str, Any]]:
    def plain() -> None:
        network(x, t, return_dict=False)

    # A module's hooks are part of the module: each variant has its own network object around the same weights.
    import copy

    from wanda_fast.calibrate import Collector, collect_layers
    from wanda_fast.graphs import CudaCapture

    shared = {id(p): p for p in [*network.parameters(), *network.buffers()]}
    hooked_network = copy.deepcopy(network, memo=dict(shared))
    published_network = copy.deepcopy(network, memo=dict(shared))
    hooks = Collector(collect_layers(hooked_network), x.shape[0], device, backend=backend).__enter__()
    table_rows = torch.arange(x.shape[0], device=device)
    norms = published.NormHooks(published_network)

    def ours() -> None:
        with hooks.record(table_rows):
            hooked_network(x, t, return_dict=False)

    def theirs() -> None:
        published_network(x, t, return_dict=False)
        norms.clear()

    ours()
    if hooks.restart():
        ours()
    error = _table_error(network, x, t, hooks.tables())
    if not error < 1e-2:
        raise RuntimeError(f"calibration_step: the tables are wrong, relative error {error:.3g}")
    modes: dict[str, dict[str, Callable[[], Any]]] = {"eager": {"plain": plain, backend: ours, "published": theirs}}
    capture_s: dict[str, float] = {}
    if on_gpu:
        modes["graph"] = {}
        for name, step in (("plain", plain), (backend, ours)):
            start = time.perf_counter()
            modes["graph"][name] = CudaCapture(device)(step)
            capture_s[name] = round(time.perf_counter() - start, 3)
    found = []
    for mode, steps in modes.items():
        samples = _time(steps, device, seconds)
        base = statistics.median(samples["plain"])
        for name, values in samples.items():
            median, low, high = percentiles(values)
            # The steps are timed in turns: the overhead is the median over pairs of neighbours, which share their clocks.
            overhead = statistics.median(v / p - 1 for v, p in zip(values, samples["plain"], strict=True))
            found.append({
                "op": OP, "case": f"ddpm-cifar10-32 b{x.shape[0]} {mode}", "dtype": dtype, "layout": layout, "backend": name, "mode": mode,
                "capture_s": capture_s.get(name) if mode == "graph" else None,
                "ms": median, "ms_p20": low, "ms_p80": high, "overhead": None if name == "plain" else overhead,
                "overhead_of_medians": None if name == "plain" else median / base - 1, "rel_error": error if name == backend else None,
                "gbps": None, "copy_fraction": None, "peak_mib": None,
                **{
                    f"speedup_vs_{b}": statistics.median(samples[b]) / median if b in samples and b != name else None
                    for b in ("reference", "compile", "published")
                },
            })  # fmt: skip
            log(
                f"  {found[-1]['case']} {dtype} {layout} {name}: {median:.3f} ms, overhead {found[-1]['overhead'] or 0:+.1%}"
            )
    hooks.__exit__()
    norms.remove()
    return found


def _table_error(network: nn.Module, x: Tensor, t: Tensor, tables: dict[str, Tensor]) -> float:
    """Relative error of two tables after one step against float64 sums of the inputs that the layers really see."""
    seen: dict[str, Tensor] = {}
    modules = dict(network.named_modules())
    names = [n for n in tables if n.endswith(("conv1", "to_out.0", "conv_out"))][
        :: max(1, len(tables) // 8)
    ]
    handles = [
        modules[n].register_forward_pre_hook(lambda _m, inputs, n=n: seen.__setitem__(n, inputs[0].double()))
        for n in names
    ]
    network(x, t, return_dict=False)
    for handle in handles:
        handle.remove()
    worst = 0.0
    for n in names:
        value = seen[n]
        truth = value.square().sum(dim=(2, 3) if value.dim() == 4 else 1).cpu()
        worst = max(worst, float((tables[n].double() - truth).abs().max() / truth.abs().max()))
    return worst
