"""calibration_step: a forward pass of ddpm-cifar10-32 with accumulation hooks, over the plain forward pass in the same mode.

Modes: fp32 and bf16 weights, eager and replayed from a CUDA graph. `overhead` = time / time of the plain pass - 1.
Rows: plain, the project's hooks (wanda_fast.calibrate's own where it offers them), and the published hook, which cannot be captured
(it copies to the CPU in every layer), so its graph rows are absent.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import published, shapes
from benchmarks.harness import log, percentiles

OP = "calibration_step"


class TableHooks:
    """Accumulate Σ x² of every layer's input into one table per layer with `channel_sq_norm`.

    Layers that are handed the same tensor (to_q, to_k and to_v) share one accumulation. The inputs of the time projections are small, many and
    equally shaped: they are kept until the pass ends and added by one launch over their concatenation.
    """

    def __init__(
        self, network: nn.Module, rows: int, device: torch.device, add: Callable[[Tensor, Tensor, Tensor], Any]
    ) -> None:
        self.add = add
        self.rows = torch.arange(rows, device=device)
        self.tables: dict[str, Tensor] = {}
        self._last: Tensor | None = None
        self._small: list[Tensor] = []
        self._handles = []
        small_width = 0
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear) and name.endswith("time_emb_proj"):
                small_width += module.in_features
                self._handles.append(module.register_forward_pre_hook(self._keep))
            elif isinstance(module, nn.Conv2d | nn.Linear):
                channels = module.in_channels if isinstance(module, nn.Conv2d) else module.in_features
                self.tables[name] = torch.zeros(rows, channels, device=device)
                self._handles.append(module.register_forward_pre_hook(self._accumulate(self.tables[name])))
        self.small = torch.zeros(rows, small_width, device=device)

    def _accumulate(self, table: Tensor) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            if x is self._last:
                return
            self._last = x
            self.add(x, self.rows, table)

        return hook

    def _keep(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._small.append(inputs[0])

    def finish(self) -> None:
        """Add what was kept; call it at the end of each pass."""
        self._last = None
        if self._small:
            self.add(torch.cat(self._small, dim=1), self.rows, self.small)
            self._small.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _capture(step: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


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
            start = time.perf_counter()
            for _ in range(per_sample):
                step()
            wait()
            samples[name].append((time.perf_counter() - start) * 1e3 / per_sample)
    return samples


def rows(device: torch.device, size: str, seed: int) -> list[dict[str, Any]]:
    """One row per mode and backend."""
    from wanda_fast import ops

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
            found += _mode_rows(network, x, t, name, layout, device, ops, backend, seconds, on_gpu)
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
    ops: Any,
    backend: str,
    seconds: float,
    on_gpu: bool,
) -> list[dict[str, Any]]:
    def plain() -> None:
        network(x, t, return_dict=False)

    # A module's hooks are part of the module: each variant has its own network object around the same weights.
    import copy

    shared = {id(p): p for p in [*network.parameters(), *network.buffers()]}
    hooked_network = copy.deepcopy(network, memo=dict(shared))
    published_network = copy.deepcopy(network, memo=dict(shared))
    hooks = TableHooks(
        hooked_network, x.shape[0], device, lambda a, r, o: ops.channel_sq_norm(a, r, o, backend=backend)
    )
    norms = published.NormHooks(published_network)

    def ours() -> None:
        hooked_network(x, t, return_dict=False)
        hooks.finish()

    def theirs() -> None:
        published_network(x, t, return_dict=False)
        norms.clear()

    ours()
    error = _table_error(network, x, t, hooks)
    if not error < 1e-2:
        raise RuntimeError(f"calibration_step: the tables are wrong, relative error {error:.3g}")
    modes: dict[str, dict[str, Callable[[], Any]]] = {"eager": {"plain": plain, backend: ours, "published": theirs}}
    if on_gpu:
        modes["graph"] = {"plain": _capture(plain), backend: _capture(ours)}
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
    hooks.remove()
    norms.remove()
    return found


def _table_error(network: nn.Module, x: Tensor, t: Tensor, hooks: TableHooks) -> float:
    """Relative error of two tables after one step against float64 sums of the inputs that the layers really see."""
    seen: dict[str, Tensor] = {}
    modules = dict(network.named_modules())
    names = [n for n in hooks.tables if n.endswith(("conv1", "to_out.0", "conv_out"))][
        :: max(1, len(hooks.tables) // 8)
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
        truth = value.square().sum(dim=(2, 3) if value.dim() == 4 else 1)
        worst = max(worst, float((hooks.tables[n].double() - truth).abs().max() / truth.abs().max()))
    return worst
