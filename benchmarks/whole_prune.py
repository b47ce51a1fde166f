"""whole_prune: seconds of every stage of `wanda_fast.prune` on the bundled model, and of the published method's stages.

Both calibrate on the same number of images in the same batches. The published path stops at sliced weights: it has no plan, no
repair and no checkpoint, so only calibration, scoring and slicing have rows; ours are all stages that the report of a run holds,
with their share of the whole. Ours is the first run of the process and includes compiling kernels; the published path is warm.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.harness import log

OP = "whole_prune"
RATIO = 0.3


def _row(stage: str, backend: str, seconds: float, share: float | None, settings: dict[str, Any]) -> dict[str, Any]:
    ms = seconds * 1e3
    return {
        "op": OP, "case": stage, "dtype": "fp32", "layout": "contiguous", "backend": backend, "ms": ms, "ms_p20": ms, "ms_p80": ms,
        "share": share,
        "gbps": None, "copy_fraction": None, "peak_mib": None, "speedup_vs_reference": None, "speedup_vs_compile": None,
        "speedup_vs_published": None, "settings": settings,
    }  # fmt: skip


def _published(device: torch.device, images: int, batch: int, seed: int) -> dict[str, float]:
    """Seconds of the published path's stages: a hook with `.cpu()` per layer, Python scoring per layer, one index_select per dimension."""
    from wanda_fast.calibrate import collect_layers
    from wanda_fast.checkpoint import load_pipeline

    unet = load_pipeline(None, device=device).unet.eval()
    layers = collect_layers(unet)
    size, channels = int(unet.config.sample_size), int(unet.config.in_channels)
    generator = torch.Generator(device=device).manual_seed(seed)
    seconds: dict[str, float] = {}

    def done(stage: str, start: float) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[stage] = time.perf_counter() - start

    start = time.perf_counter()
    hooks = published.NormHooks(unet)
    with torch.no_grad():
        for first in range(0, images, batch):
            count = min(batch, images - first)
            x = torch.randn(count, channels, size, size, generator=generator, device=device)
            unet(x, torch.randint(0, 1000, (count,), generator=generator, device=device))
    hooks.remove()
    done("calibrate", start)
    start = time.perf_counter()
    scores = {
        name: published.score(layer.weight.detach(), published.act_norm(hooks.norms[name]))
        for name, layer in layers.items()
    }
    done("score", start)
    start = time.perf_counter()

    def keep(score: Tensor) -> Tensor:
        return score.topk(max(1, round(len(score) * (1 - RATIO)))).indices.sort().values

    for name, layer in layers.items():
        rows, columns = scores[name]
        published.compact([layer.weight.detach()], [keep(rows)], [keep(columns)])
    done("slice", start)
    return seconds


def rows(device: torch.device, size: str, seed: int) -> list[dict[str, Any]]:
    """One row per stage of ours, one for the whole, and one per stage of the published path."""
    import wanda_fast

    images = 4 if size == "quick" else 256 if device.type == "cuda" else 64
    batch = min(images, 128 if device.type == "cuda" else 16)
    settings: dict[str, Any] = {
        "ratio": RATIO, "calib_steps": images, "repair_images": images, "batch_size": batch,
        "num_samples": 0 if size == "quick" else 8, "num_inference_steps": 10, "seed": seed,
    }  # fmt: skip
    if size == "quick":
        settings |= {"repair": "none", "split": "uniform"}
    # A quick run stops at the plan: on two cores the quality measurement alone takes most of a minute.
    result = wanda_fast.prune(None, device=str(device), dry_run=size == "quick", **settings)
    seconds: dict[str, float] = result.report["seconds"]
    whole = sum(seconds.values())
    found = [_row(stage, "wanda_fast", value, value / whole, settings) for stage, value in seconds.items()]
    found.append(_row("whole", "wanda_fast", whole, 1.0, settings))
    _published(device, batch, batch, seed)  # once without timing: library handles, memory
    theirs = _published(device, images, batch, seed)
    found += [_row(stage, "published", value, None, settings) for stage, value in theirs.items()]
    for row in found:
        share = "" if row["share"] is None else f" ({row['share']:.0%})"
        log(f"  {row['backend']:11} {row['case']:12} {row['ms'] / 1e3:.3f} s{share}")
    return found
