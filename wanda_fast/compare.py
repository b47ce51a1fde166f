"""Several checkpoints beside each other: sizes, speed, images from the same noise, noise error over t, widths.

:func:`compare` measures; `cli.compare_page` makes one HTML page and one PNG of what it returns.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import evaluation
from .checkpoint import Loaded, load_pipeline
from .errors import UserError
from .experts import count_experts
from .sampling import fast_layout, image_shape, sample

FORMAT = "wanda_fast.comparison/1"
BUNDLED = "bundled"  # the word for the model that comes with the package
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_REPEATS, _WARMUP = 7, 2


def compare(
    models: Sequence[str | os.PathLike[str]],
    *,
    n: int = 16,
    steps: int = 50,
    noise_images: int = 200,
    seed: int = 0,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> tuple[dict[str, Any], list[Tensor]]:
    """Measure two or more checkpoints; the first is what the others are compared with.

    Args:
        models: folders or hub ids; "bundled" is the model that comes with the package.
        n: images drawn by each model from the same noise (DDIM, η = 0).
        noise_images: noised images for the error of the predicted noise over t.
        batch_size: images per pass, of the timed passes too.

    Returns:
        (report, images). The report holds JSON values: ``models`` (one entry each, in order: ``label`` A, B, …, ``name``,
        ``layout``, ``experts`` (sets of weights), ``params``, ``macs``, ``file_bytes``, ``forward_seconds``, ``widths``, and against A
        ``ssim``, ``psnr``, ``noise``), settings and versions. images: uint8 [n, H, W, C] of each model.

    Raises:
        UserError: fewer than two models, one that cannot be opened, image shapes or noise schedules that differ.
    """
    from .pruning import _device_name, check_device

    if not 2 <= len(models) <= len(LETTERS):
        raise UserError(f"a comparison needs 2 to {len(LETTERS)} models, not {len(models)}.")
    if n < 1 or noise_images < 1 or batch_size < 1:
        raise UserError("the numbers of images and the batch size must be at least 1.")
    place = check_device(None if device is None else str(device))
    dtype = dtype or torch.float32
    opened = [_open(model, place) for model in models]
    first = opened[0]
    for other in opened[1:]:
        evaluation._check_pair(first.unet, first.scheduler, (other.unet, other.scheduler, other.name))
    images = [
        sample(m.unet, first.scheduler, n, steps=steps, seed=seed, batch_size=batch_size, device=place, dtype=dtype,
               progress=progress, desc=f"sampling {letter}")
        for letter, m in zip(LETTERS, opened)
    ]  # fmt: skip
    seconds = _forward_seconds([m.unet for m in opened], batch_size, place, dtype)
    total = int(first.scheduler.config.num_train_timesteps)
    entries: list[dict[str, Any]] = []
    for i, m in enumerate(opened):
        entry: dict[str, Any] = {
            "label": LETTERS[i],
            "name": m.name,
            "layout": m.layout,
            "experts": count_experts(m.unet),
            "params": evaluation.count_params(m.unet),
            "macs": evaluation.count_macs(m.unet),
            "file_bytes": _file_bytes(m),
            "forward_seconds": seconds[i],
            "images_per_second": batch_size / (steps * seconds[i]),
            "widths": level_widths(m.unet),
        }
        if i > 0:
            batches = evaluation.held_out_batches(
                first.unet, first.scheduler, images[0], n=noise_images, seed=seed, batch_size=batch_size, device=place
            )
            found = evaluation.errors_over_time(m.unet, first.unet, batches, steps=total, dtype=dtype)
            entry["noise"] = {"over_t": found[:-1], "all": found[-1]}
            if min(images[0].shape[1:3]) >= 7:
                entry["ssim"] = evaluation.ssim(images[0], images[i])
            entry["psnr"] = evaluation.psnr(images[0], images[i])
        entries.append(entry)
    channels, height, width = image_shape(first.unet)
    report: dict[str, Any] = {
        "format": FORMAT,
        "models": entries,
        "image": [height, width, channels],
        "samples": n,
        "steps": steps,
        "noise_images": noise_images,
        "num_train_timesteps": total,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": evaluation._short(dtype),
        "device": _device_name(place),
        "versions": evaluation._versions(),
    }
    return evaluation._finite(report), images


def _open(model: str | os.PathLike[str], device: torch.device) -> Loaded:
    loaded = load_pipeline(None if os.fspath(model) == BUNDLED else model, device=device)
    loaded.unet.requires_grad_(False)
    return loaded


def _file_bytes(loaded: Loaded) -> int:
    from .checkpoint import _find_parts, _weight_files

    return sum(file.stat().st_size for file in _weight_files(_find_parts(Path(loaded.path))[0]))


def _forward_seconds(unets: Sequence[nn.Module], batch_size: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Median seconds of a forward pass of each network, measured in turns."""
    runs = []
    times: list[list[float]] = [[] for _ in unets]
    for unet in unets:
        runs.append(evaluation._runner(unet, batch_size, device, dtype)[0])
    with torch.no_grad():
        contexts = [fast_layout(unet) for unet in unets]
        for context in contexts:
            context.__enter__()
        try:
            for turn in range(_WARMUP + _REPEATS):
                for run, seconds in zip(runs, times, strict=True):
                    took = evaluation._seconds(run, device)
                    if turn >= _WARMUP:
                        seconds.append(took)
        finally:
            for context in contexts:
                context.__exit__(None, None, None)
    return [statistics.median(seconds) for seconds in times]


def level_widths(unet: nn.Module) -> list[dict[str, Any]]:
    """Widths of the resnet convolutions of every resolution level, from full resolution down; [] for networks without
    such levels.

    Returns:
        One entry per level: ``level``, ``least`` and ``most`` output channels, ``channels`` (all of them together).
    """
    levels = len(getattr(unet, "down_blocks", []) or [])
    found: dict[int, list[int]] = {level: [] for level in range(levels)}
    for name, module in unet.named_modules():
        match = re.match(r"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.resnets\.\d+\.conv[12]$", name)
        if match and isinstance(module, nn.Conv2d):
            block = int(match[2] or 0)
            level = {"down_blocks": block, "up_blocks": levels - 1 - block, "mid_block": levels - 1}[match[1]]
            found[level].append(module.out_channels)
    return [
        {"level": level, "least": min(widths), "most": max(widths), "channels": sum(widths)}
        for level, widths in found.items()
        if widths
    ]
