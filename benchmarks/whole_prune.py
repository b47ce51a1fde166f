"""whole_prune: seconds of every stage of `wanda_fast.prune` on the bundled model, and of the published method's whole job.

Both load the same checkpoint, read the same images, noise them to random timesteps and calibrate on the same number in the same batches.
Both are warm: each job is done twice in this process and the second one counts; `first_ms` is the first, with compiling and
loading libraries. (A quick run does each once; its rows say warm: false.)

The published path ends with a masked and sliced network: it has no plan over coupled channels, no repair, no pictures and no measured quality.
Rows of backend `published` are its stages. Those of `wanda_fast` are the default recipe, stage by stage with their share of the whole;
`wanda_fast, no repair` is the part that both have: uniform cuts, no repair, and its `whole` leaves out the measured quality.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import published
from benchmarks.harness import log

OP = "whole_prune"
RATIO = 0.3
SHARED = ("load", "images", "calibrate", "plan", "compact")  # our stages that the published path has in some form


def _row(stage: str, backend: str, seconds: float, first: float | None, share: float | None, settings: dict[str, Any]) -> dict[str, Any]:
    ms = seconds * 1e3
    return {
        "op": OP, "case": stage, "dtype": "fp32", "layout": "contiguous", "backend": backend, "ms": ms, "ms_p20": ms, "ms_p80": ms,
        "share": share, "warm": first is not None, "first_ms": None if first is None else first * 1e3,
        "gbps": None, "copy_fraction": None, "peak_mib": None, "speedup_vs_reference": None, "speedup_vs_compile": None,
        "speedup_vs_published": None, "settings": settings,
    }  # fmt: skip


@torch.no_grad()
def published_job(device: torch.device, images: int, batch: int, seed: int) -> dict[str, float]:
    """Seconds of each stage of the published path: per layer a hook with `.cpu()`, Python scoring, a mask and plain slicing."""
    from wanda_fast.checkpoint import load_pipeline
    from wanda_fast.data import read_sample_sheet

    seconds: dict[str, float] = {}
    start = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal start
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[stage], start = now - start, now

    loaded = load_pipeline(None, device=device)
    unet: Any = loaded.unet.eval()
    done("load")
    clean = read_sample_sheet().permute(0, 3, 1, 2).float() / 127.5 - 1
    done("images")

    alphas = loaded.scheduler.alphas_cumprod
    generator = torch.Generator().manual_seed(seed)
    hooks = published.NormHooks(unet)
    for first in range(0, images, batch):
        x0 = clean[torch.arange(first, min(first + batch, images)) % len(clean)]
        t = torch.randint(0, len(alphas), (len(x0),), generator=generator)
        a = alphas[t].view(-1, 1, 1, 1)
        x = a.sqrt() * x0 + (1 - a).sqrt() * torch.randn(x0.shape, generator=generator)
        unet(x.to(device), t.to(device))
    hooks.remove()
    done("calibrate")

    layers = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    scores = {n: published.score(m.weight.detach(), published.act_norm(hooks.norms[n])) for n, m in layers.items()}
    done("score")

    def keep(score: Tensor) -> Tensor:
        return score.topk(max(1, round(len(score) * (1 - RATIO)))).indices.sort().values

    kept = {n: (keep(rows), keep(columns)) for n, (rows, columns) in scores.items()}
    for name, layer in layers.items():
        mask = torch.zeros_like(layer.weight)
        mask[kept[name][0]] = 1
        layer.weight.mul_(mask)
        if layer.bias is not None:
            layer.bias.mul_(mask.flatten(1)[:, 0])
    done("mask")
    for name, layer in layers.items():
        published.compact([layer.weight], [kept[name][0]], [kept[name][1]])
        if layer.bias is not None:
            published.compact([layer.bias], [kept[name][0]], [None])
    done("compact")
    return seconds


def _twice(job: Callable[[], dict[str, float]], quick: bool) -> tuple[dict[str, float], dict[str, float] | None]:
    """(seconds that count, seconds of the first run before it)."""
    first = job()
    return (first, None) if quick else (job(), first)


def rows(device: torch.device, size: str, seed: int) -> list[dict[str, Any]]:
    """One row per stage and one for the whole, of ours, of ours without repair, and of the published path."""
    import wanda_fast
    from wanda_fast.checkpoint import load_pipeline

    load_pipeline(None, device=device)  # imports, which the first job would pay for
    quick = size == "quick"
    images = 4 if quick else 256 if device.type == "cuda" else 64
    batch = min(images, 128 if device.type == "cuda" else 16)
    settings: dict[str, Any] = {
        "ratio": RATIO, "calib_steps": images, "repair_images": images, "batch_size": batch,
        "num_samples": 0 if quick else 8, "num_inference_steps": 10, "seed": seed,
    }  # fmt: skip
    plain = {**settings, "repair": "none", "split": "uniform", "num_samples": 0}
    if quick:  # stops at the plan: on two cores the quality measurement alone takes most of a minute
        settings = plain

    def ours(**given: Any) -> Callable[[], dict[str, float]]:
        return lambda: dict(wanda_fast.prune(None, device=str(device), dry_run=quick, **given).report["seconds"])

    found = []
    jobs: list[tuple[str, Callable[[], dict[str, float]], dict[str, Any], tuple[str, ...] | None]] = [
        ("wanda_fast", ours(**settings), settings, None),
        ("wanda_fast, no repair", ours(**plain), plain, SHARED),
        ("published", lambda: published_job(device, images, batch, seed), {"calib_steps": images, "batch_size": batch, "seed": seed}, None),
    ]
    for backend, job, given, only in jobs[:: 2 if quick else 1]:
        seconds, first = _twice(job, quick)
        stages = [s for s in seconds if only is None or s in only]
        whole = sum(seconds[s] for s in stages)
        for stage in stages:
            earlier = None if first is None else first.get(stage, 0.0)
            found.append(_row(stage, backend, seconds[stage], earlier, seconds[stage] / whole, given))
        found.append(_row("whole", backend, whole, None if first is None else sum(first.get(s, 0.0) for s in stages), 1.0, given))
    for row in found:
        log(f"  {row['backend']:22} {row['case']:12} {row['ms'] / 1e3:.3f} s ({row['share']:.0%}){'' if row['warm'] else ', first run'}")
    return found
