"""Compare two networks: likeness of their images, difference of their predictions, forward time, parameters and
MACs.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .sampling import channels_last, class_labels, image_shape, place, predict

if TYPE_CHECKING:
    import numpy as np


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of image pairs: 7 × 7 uniform window, per channel, data range 255.

    Args:
        a, b: uint8 [N, H, W, C], N ≥ 1, H and W ≥ 7.

    Returns:
        1.0 for equal images.

    Source: Wang et al. 2004; scikit-image's ``structural_similarity`` with its defaults.
    """
    from skimage.metrics import structural_similarity

    first, second = _pair(a, b)
    if min(first.shape[1:3]) < 7:
        raise UserError(f"SSIM looks at 7 × 7 windows; the images are {first.shape[1]} × {first.shape[2]}.")
    values = [structural_similarity(x, y, data_range=255, channel_axis=-1) for x, y in zip(first, second, strict=True)]
    return float(sum(values) / len(values))


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean peak signal-to-noise ratio of image pairs, 10 log₁₀(255² / MSE) in dB; infinite where a pair is equal.

    Args:
        a, b: uint8 [N, H, W, C], N ≥ 1.
    """
    first, second = _pair(a, b)
    mse = ((first.astype("float64") - second.astype("float64")) ** 2).mean(axis=(1, 2, 3))
    return float(10 * torch.log10(255.0**2 / torch.from_numpy(mse)).mean())


def _pair(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if a.dtype != torch.uint8 or b.dtype != torch.uint8 or a.shape != b.shape or a.dim() != 4 or len(a) == 0:
        raise ValueError(
            f"two equally shaped uint8 [N, H, W, C] are needed, not {a.dtype} {list(a.shape)} and {b.dtype} "
            f"{list(b.shape)}"
        )
    return a.cpu().numpy(), b.cpu().numpy()


@dataclass(frozen=True)
class NoiseError:
    """Difference of two networks' predictions ε: `mse` = mean (ε_b - ε_a)², `relative` = mse / mean ε_a²."""

    mse: float
    relative: float
    samples: int


def noise_mse(
    unet_a: nn.Module,
    unet_b: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    *,
    dtype: torch.dtype | None = None,
) -> NoiseError:
    """Mean squared difference of the predictions of two networks on the same inputs, relative to those of `unet_a` (the
    dense one).

    Args:
        batches: batches of :func:`wanda_fast.calibrate.noised_batches`, or tuples (x_t, t, labels or None).
        dtype: float32, or bfloat16 or float16 for autocast; None for each network's own.

    Raises:
        ValueError: no batches.
    """
    error = energy = torch.zeros((), dtype=torch.float64)
    count = samples = 0
    with torch.no_grad(), channels_last(unet_a), channels_last(unet_b):
        for batch in batches:
            x, t, labels = batch[0], batch[1], batch[-1]
            a = predict(unet_a, x, t, labels, dtype=dtype)
            b = predict(unet_b, x, t, labels, dtype=dtype)
            error = error + (b - a).double().square().sum().cpu()
            energy = energy + a.double().square().sum().cpu()
            count += a.numel()
            samples += len(x)
    if count == 0:
        raise ValueError("the noise error needs at least one batch")
    return NoiseError(mse=float(error) / count, relative=float(error / energy), samples=samples)


# ----------------------------------------------------------------------------------------------------------------- time


def forward_seconds(
    unet: nn.Module,
    batch_size: int = 32,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    repeats: int = 7,
    warmup: int = 2,
) -> float:
    """Median seconds of a forward pass of `batch_size` images in channels-last memory, after `warmup` passes."""
    run, device = _runner(unet, batch_size, device, dtype)
    with torch.no_grad(), channels_last(unet):
        for _ in range(warmup):
            run()
        return statistics.median(_seconds(run, device) for _ in range(repeats))


def paired_forward_seconds(
    unet_a: nn.Module,
    unet_b: nn.Module,
    batch_size: int = 32,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    repeats: int = 7,
    warmup: int = 2,
) -> tuple[float, float]:
    """Median seconds of a forward pass of two networks, measured in turns (A B A B …), so that a machine that becomes
    slower or faster meanwhile treats both alike.
    """
    run_a, device_a = _runner(unet_a, batch_size, device, dtype)
    run_b, device_b = _runner(unet_b, batch_size, device, dtype)
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad(), channels_last(unet_a), channels_last(unet_b):
        for _ in range(warmup):
            run_a()
            run_b()
        for _ in range(repeats):
            times[0].append(_seconds(run_a, device_a))
            times[1].append(_seconds(run_b, device_b))
    return statistics.median(times[0]), statistics.median(times[1])


def _runner(
    unet: nn.Module, batch_size: int, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[Any, torch.device]:
    place_, dtype_ = place(unet, device, dtype)
    unet.eval()
    x = torch.randn(batch_size, *image_shape(unet), generator=torch.Generator().manual_seed(0)).to(place_)
    t = torch.full((batch_size,), 1, device=place_)  # the time does not depend on it
    labels = class_labels(unet, range(batch_size), 0, place_)
    return lambda: predict(unet, x, t, labels, dtype=dtype_), place_


def _seconds(run: Any, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record(torch.cuda.current_stream(device))
    run()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


# ----------------------------------------------------------------------------------------------------------------- size


def count_params(unet: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in unet.parameters())


def count_macs(unet: nn.Module) -> int:
    """Multiply-accumulates of the convolutions and linear layers for one image, without biases, norms and activations.

    The two matrix products inside attention are left out, as in the published figures of pruned diffusion UNets. For
    google/ddpm-cifar10-32 this is 6.054 G; torch-pruning's counter adds one per bias and output element and says 6.064
    G; the products inside attention would add 0.168 G. The network is not run, a copy on the meta device is.
    """
    twin = nn.Module.to(copy.deepcopy(unet), "meta")
    macs = 0

    def add(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        nonlocal macs
        weight: Any = layer.weight
        macs += out[0].numel() * weight[0].numel()

    for layer in twin.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(add)
    x = torch.empty(1, *image_shape(unet), device="meta", dtype=next(twin.parameters()).dtype)
    labels = (
        None if getattr(twin, "class_embedding", None) is None else torch.zeros(1, dtype=torch.int64, device="meta")
    )
    with torch.no_grad():
        twin(x, torch.zeros(1, dtype=torch.int64, device="meta"), class_labels=labels)
    return macs


def peak_memory(device: torch.device | str) -> int | None:
    """Peak bytes that tensors took on a CUDA device since the last ``torch.cuda.reset_peak_memory_stats``; None
    elsewhere.
    """
    device = torch.device(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
