"""Compare networks: likeness of their images, distance to real images, difference of their predictions, speed, memory, size.

:func:`evaluate` does all of it for a checkpoint, alone or beside a reference; the functions below are its parts.
"""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .sampling import (
    class_labels,
    evaluating,
    fast_layout,
    image_shape,
    make_stepper,
    noise,
    place,
    predict,
    predict_evenly,
    prediction_target,
    sample,
    to_float,
    watch_shapes,
)
from .smaller_batches import usual_batch_size

if TYPE_CHECKING:
    from diffusers import DDPMPipeline

    from .features import FeatureExtractor, FeatureStats

FORMAT = "wanda_fast.evaluation/1"
HELD_OUT_SEED = 2_000_003  # added to the seed: noise that neither calibration nor repair has seen


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of image pairs: 7 × 7 uniform window, per channel, data range 255.

    Args:
        a, b: uint8 [N, H, W, C], N ≥ 1, H and W ≥ 7.

    Returns:
        1.0 for equal images.

    Computed in float64 on the images' device, in batches.

    Source: Wang et al. 2004; equal to scikit-image's ``structural_similarity`` with its defaults.
    """
    first, second = _pair(a, b)
    if min(first.shape[1:3]) < 7:
        raise UserError(f"SSIM looks at 7 × 7 windows; the images are {first.shape[1]} × {first.shape[2]}.")
    total = 0.0
    for start in range(0, len(first), 256):
        x, y = (v[start : start + 256].permute(0, 3, 1, 2).double() for v in (first, second))
        mean_x, mean_y, xx, yy, xy = (F.avg_pool2d(v, 7, stride=1) for v in (x, y, x * x, y * y, x * y))
        unbiased = 49 / 48  # scikit-image's covariances have the divisor n - 1
        variances = (xx - mean_x**2 + yy - mean_y**2) * unbiased
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        likeness = (2 * mean_x * mean_y + c1) * (2 * unbiased * (xy - mean_x * mean_y) + c2)
        likeness /= (mean_x**2 + mean_y**2 + c1) * (variances + c2)
        total += float(likeness.mean((1, 2, 3)).sum())
    return total / len(first)


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean peak signal-to-noise ratio of image pairs, 10 log₁₀(255² / MSE) in dB; infinite where a pair is equal.

    Args:
        a, b: uint8 [N, H, W, C], N ≥ 1.
    """
    first, second = _pair(a, b)
    mse = (first.double() - second.double()).square().mean((1, 2, 3))
    return float(10 * torch.log10(255.0**2 / mse).mean())


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.dtype != torch.uint8 or b.dtype != torch.uint8 or a.shape != b.shape or a.dim() != 4 or len(a) == 0:
        raise ValueError(
            f"two equally shaped uint8 [N, H, W, C] are needed, not {a.dtype} {list(a.shape)} and {b.dtype} "
            f"{list(b.shape)}"
        )
    return a, b.to(a.device)


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
    with torch.no_grad(), evaluating(unet_a, unet_b), fast_layout(unet_a), fast_layout(unet_b):
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
    """Median seconds of a forward pass of `batch_size` images, in the layout of `sampling.layout_for`, after `warmup` passes."""
    run, device = _runner(unet, batch_size, device, dtype)
    with torch.no_grad(), evaluating(unet), fast_layout(unet):
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
    with torch.no_grad(), evaluating(unet_a, unet_b), fast_layout(unet_a), fast_layout(unet_b):
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
    macs = 0

    def add(_: str, layer: nn.Module, out: Tensor) -> None:
        nonlocal macs
        weight: Any = layer.weight
        macs += out[0].numel() * weight[0].numel()

    watch_shapes(unet, (nn.Conv2d, nn.Linear), add)
    return macs


def peak_memory(device: torch.device | str) -> int | None:
    """Peak bytes that tensors took on a CUDA device since the last ``torch.cuda.reset_peak_memory_stats``; None elsewhere."""
    device = torch.device(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


# ----------------------------------------------------------------------------------------------------------- noise over t


def held_out_batches(
    unet: nn.Module,
    scheduler: Any,
    images: Tensor,
    *,
    n: int,
    seed: int = 0,
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> Iterator[tuple[Tensor, Tensor, Any, Tensor]]:
    """(x_t, t, labels, target) for n noised images: sample i is images[i % N] at t = ⌊(p_i + ½) T / n⌋ with a fixed permutation p (images
    may be sorted by class), with noise that depends on (seed, i) alone and that calibration and repair do not use.

    `target` is what the network was trained to give there: ε, or v or x₀ as the scheduler's `prediction_type` says.
    """
    place_ = next(unet.parameters()).device if device is None else torch.device(device)
    total = int(scheduler.config.num_train_timesteps)
    alphas = scheduler.alphas_cumprod.to(place_, torch.float32)
    kind = scheduler.config.get("prediction_type", "epsilon")
    clean = to_float(images)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, n, batch_size):
        indices = range(start, min(start + batch_size, n))
        t = torch.tensor([(2 * order[i] + 1) * total // (2 * n) for i in indices], device=place_)
        eps = noise(clean.shape[1:], indices, seed + HELD_OUT_SEED, "calibration").to(place_)
        x0 = clean[[i % len(clean) for i in indices]].to(place_)
        a = alphas[t].sqrt().view(-1, 1, 1, 1)
        s = (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        target = prediction_target(kind, x0, eps, a, s)
        labels = class_labels(unet, indices, seed + HELD_OUT_SEED, place_)
        yield a * x0 + s * eps, t, labels, target


def errors_over_time(
    unet: nn.Module,
    reference: nn.Module | None,
    batches: Iterable[tuple[Tensor, Tensor, Any, Tensor]],
    *,
    steps: int = 1000,
    bins: int = 10,
    dtype: torch.dtype | None = None,
) -> list[dict[str, Any]]:
    """Per bin of timesteps and, as the last entry, over all of them: the denoising loss of each network (mean (prediction - target)²) and the
    squared difference of their predictions, absolute (`mse`) and relative to the reference's energy (`relative`).

    Args:
        batches: of :func:`held_out_batches`.
        steps: T, the number of training steps.
    """
    sums = torch.zeros(bins, 5, dtype=torch.float64)  # samples, difference, energy, loss, loss of the reference
    networks = [unet] if reference is None else [unet, reference]
    with torch.no_grad(), evaluating(*networks), fast_layout(unet), fast_layout(networks[-1]):
        for x, t, labels, target in batches:
            out = predict_evenly(unet, x, t, labels, dtype=dtype).double()
            other = out if reference is None else predict_evenly(reference, x, t, labels, dtype=dtype).double()
            rows = [torch.ones(len(x)), *((v.square().mean((1, 2, 3))).cpu() for v in (
                out - other, other, out - target, other - target))]  # fmt: skip
            sums.index_add_(0, (t * bins // steps).cpu(), torch.stack([r.double() for r in rows], 1))
    if float(sums[:, 0].sum()) == 0:
        raise ValueError("errors over time need at least one batch")
    found = []
    for i, row in enumerate([*sums, sums.sum(0)]):
        count = int(row[0])
        if count == 0:
            continue
        whole = i == bins
        entry: dict[str, Any] = {
            "from": 0 if whole else -(-i * steps // bins),
            "to": steps if whole else -(-(i + 1) * steps // bins),
            "samples": count,
            "loss": float(row[3]) / count,
        }
        if reference is not None:
            entry |= {"mse": float(row[1]) / count, "relative": float(row[1] / row[2]), "loss_reference": float(row[4]) / count}
        found.append(entry)
    return found


# ------------------------------------------------------------------------------------------------------------------ speed


def speed(
    unet: nn.Module,
    reference: nn.Module | None = None,
    *,
    steps: int = 50,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
    repeats: int = 7,
) -> dict[str, Any]:
    """Images per second of `steps` forward passes each, weights held in `dtype` and channels-last; with a reference both in turns.

    images/s = batch size / (steps · median seconds of a forward pass). The arithmetic of the sampler between the passes is not in it.

    Args:
        dtype: None: bfloat16 on a GPU, the network's own on a CPU.
        compiled: under torch.compile(mode="reduce-overhead", dynamic=False): fused kernels, and CUDA graphs on a GPU. Takes some 40 s and more
            for each network.
    """
    device = next(unet.parameters()).device
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else next(unet.parameters()).dtype)
    if compiled:
        forget_compiled()
    ready = [SpeedRun(n, batch_size, dtype, compiled) for n in ([unet] if reference is None else [unet, reference])]
    medians = in_turns(ready, repeats)
    found: dict[str, Any] = {
        "mode": f"{'compiled' if compiled else 'eager'}, {_short(dtype)}, channels-last",
        "batch_size": batch_size,
        "steps": steps,
        "images_per_s": batch_size / (steps * medians[0]),
        "forward_seconds": medians[0],
        "peak_bytes": ready[0].peak_bytes,
    }
    if compiled:
        found["compile_seconds"] = round(sum(r.seconds for r in ready), 1)
    if reference is not None:
        found |= {
            "images_per_s_reference": batch_size / (steps * medians[1]),
            "forward_seconds_reference": medians[1],
            "peak_bytes_reference": ready[1].peak_bytes,
            "times_as_fast": medians[1] / medians[0],
        }
    return found


def forget_compiled() -> None:
    """Drop what torch.compile keeps of earlier networks: it counts towards a limit, past which later ones run eagerly."""
    from torch import _dynamo

    _dynamo.reset()


class SpeedRun:
    """A copy of a network that is ready to be timed: weights in `dtype`, channels-last, compiled if asked, warmed up.

    Attributes:
        run: one forward pass of a fixed batch.
        peak_bytes: most memory of its tensors, weights included, on a CUDA device; None elsewhere.
        seconds: that copying, compiling and the first passes took.
    """

    def __init__(self, network: nn.Module, batch_size: int, dtype: torch.dtype, compiled: bool) -> None:
        begin = time.perf_counter()
        self.device = device = next(network.parameters()).device
        on_gpu = device.type == "cuda"
        twin: Any = nn.Module.to(copy.deepcopy(network), dtype=dtype).eval()
        twin = nn.Module.to(twin, memory_format=torch.channels_last)
        if compiled:
            twin = torch.compile(twin, mode="reduce-overhead", dynamic=False)
        self.run = _speed_run(twin, network, batch_size, device, dtype)
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if on_gpu else 0
        with warnings.catch_warnings():
            # diffusers caches the comparison of torch's version; what dynamo says about it helps nobody here
            warnings.filterwarnings("ignore", message=".*lru_cache")
            for _ in range(3):
                self.run()
        if on_gpu:
            torch.cuda.synchronize(device)
        peak = peak_memory(device)
        weights = sum(p.numel() * dtype.itemsize for p in network.parameters())
        self.peak_bytes = None if peak is None else peak - before + weights
        self.seconds = time.perf_counter() - begin


def in_turns(runs: Sequence[SpeedRun], repeats: int = 7) -> list[float]:
    """Median seconds of a pass of each, timed in turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for one, seconds in zip(runs, times, strict=True):
            seconds.append(_seconds(one.run, one.device))
    return [statistics.median(seconds) for seconds in times]


def _speed_run(
    twin: Any, network: nn.Module, batch_size: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    x = torch.randn(batch_size, *image_shape(network), generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
    t = torch.full((batch_size,), 1, device=device)
    labels = class_labels(network, range(batch_size), 0, device)

    def run() -> None:
        with torch.no_grad():
            if device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            if isinstance(labels, dict):
                predict(twin, x, t, labels)
            else:
                twin(x, t, class_labels=labels, return_dict=False)

    return run


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype)[6:])


# --------------------------------------------------------------------------------------------------------------- evaluate


def evaluate(
    model: str | Path | DDPMPipeline | None = None,
    reference: str | Path | DDPMPipeline | None = None,
    *,
    real: str | Path | Tensor | None = None,
    features: str | None = None,
    n: int = 1000,
    steps: int = 50,
    noise_images: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: str | torch.dtype | None = None,
    compiled: bool | None = None,
    data_dir: str | Path | None = None,
    save_path: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Everything that can be measured about a checkpoint, alone or beside a reference (the dense network it came from).

    Args:
        model: folder, hub id, pipeline (left as it is), or None for the bundled model.
        reference: likewise; None for no comparison.
        real: real images: a folder, "cifar10" (with `data_dir`), uint8 [N, H, W, C], or a statistics file of `wanda-fast fid
            --save-stats`. The Fréchet distance needs it.
        features: extractor, see `wanda_fast.features`; None for "inception" where `real` is given (or what its statistics name),
            and no features otherwise.
        n: images drawn from each network, from the same noise; 0 for none.
        steps: DDIM steps (η = 0, "leading" spacing).
        noise_images: noised images for the noise error over t and the denoising loss: real ones where `real` has images, else drawn ones.
        batch_size: images per pass, of the timed passes too; None for 32 on a CPU and 32 to 256 on a GPU, by their size.
        dtype: of sampling and errors: float32, or bfloat16 or float16 for autocast; of both networks.
        compiled: measure speed under torch.compile too; None: on a GPU.
        save_path: folder for `evaluation.json` and `evaluation.png`.

    Returns:
        JSON values, see the guide's section "Evaluation".

    Raises:
        UserError: bad arguments, a model or images that cannot be read, features whose weights are not there, networks that do not fit.

    Example:
        >>> import wanda_fast
        >>> found = wanda_fast.evaluate(n=0, noise_images=2, batch_size=1, compiled=False)
        >>> found["model"]["params"]
        6079811
    """
    from . import checkpoint, run_config
    from .pruning import _DTYPE_NAMES, DTYPES, _device_name, check_device

    log = log or (lambda line: None)
    begin = time.perf_counter()
    if n < 0 or noise_images < 0 or (batch_size is not None and batch_size < 1):
        raise UserError("the numbers of images must be at least 0 and the batch size at least 1.")
    if not isinstance(dtype, torch.dtype):
        if dtype is not None and dtype not in _DTYPE_NAMES:
            raise UserError(f"unknown dtype {dtype!r}; known: {', '.join(_DTYPE_NAMES)}")
        dtype = DTYPES[_DTYPE_NAMES[dtype or "fp32"]]
    place_ = check_device(None if device is None else str(device))
    if save_path is not None:
        checkpoint.check_target(save_path, overwrite, reads=[model, reference, real, data_dir, features])
    known, extractor = _real_and_features(real, features, n, data_dir, place_)
    unet, scheduler, name = _open(model, place_)
    other = None if reference is None else _open(reference, place_)
    _check_pair(unet, scheduler, other)
    batch_size = batch_size or usual_batch_size(place_, *image_shape(unet)[1:])
    if known is None and real is not None and extractor is not None:
        from .features import feature_stats

        known = feature_stats(extractor, real, batch_size=batch_size, data_dir=data_dir, progress=progress)
    stepper = make_stepper(scheduler, steps)
    result: dict[str, Any] = {
        "format": FORMAT,
        "model": {"name": name, "params": count_params(unet), "macs": count_macs(unet)},
        "reference": None if other is None else {
            "name": other[2], "params": count_params(other[0]), "macs": count_macs(other[0])},
        "sampling": {
            "images": n,
            "sampler": "DDIM, eta 0",
            "steps": steps,
            "spacing": f"leading: {_listed(stepper.timesteps.tolist())} of {scheduler.config.num_train_timesteps}",
            "seed": seed,
            "dtype": _short(dtype),
            "tf32_convolutions": place_.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32,
        },
        "device": _device_name(place_),
        "versions": _versions(),
    }  # fmt: skip
    networks = [unet] if other is None else [unet, other[0]]
    images: list[Tensor] = []
    if n > 0:
        for network, which in zip(networks, ("model", "reference")):
            images.append(_draw(network, scheduler, n, steps, seed, batch_size, place_, dtype, progress, which, log))
        if other is not None:
            result["ssim"] = ssim(images[0], images[1]) if min(images[0].shape[1:3]) >= 7 else None
            result["psnr"] = psnr(images[0], images[1])
        if extractor is not None:
            result |= _feature_figures(extractor, known, images, batch_size, log)
    if noise_images > 0:
        held_out, source = _held_out_images(real, images, unet, scheduler, noise_images, data_dir,
            bundled=model in (None, "bundled"), steps=steps, seed=seed, batch_size=batch_size, dtype=dtype)  # fmt: skip
        batches = held_out_batches(unet, scheduler, held_out, n=noise_images, seed=seed, batch_size=batch_size, device=place_)
        total = int(scheduler.config.num_train_timesteps)
        table = errors_over_time(unet, None if other is None else other[0], batches, steps=total, dtype=dtype)
        result["noise"] = {"images": source, "over_t": table[:-1], "all": table[-1]}
    result["speed"] = [speed(unet, None if other is None else other[0], steps=steps, batch_size=batch_size)]
    if compiled or (compiled is None and place_.type == "cuda"):
        log("compiling for the speed measurement")
        result["speed"].append(
            speed(unet, None if other is None else other[0], steps=steps, batch_size=batch_size, compiled=True)
        )
    result["seconds"] = round(time.perf_counter() - begin, 1)
    if save_path is not None:
        path = Path(save_path)

        def instead(other_path: Path) -> None:
            nonlocal path
            path = other_path
            log(f"{save_path} was taken by something else meanwhile; the result is in {path}")

        with checkpoint.atomic_folder(save_path, overwrite, instead=instead) as folder:
            text = json.dumps(_finite(result), indent=1, allow_nan=False)
            (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
            asked = {
                "model": model, "reference": reference, "real": real, "data_dir": data_dir, "features": features, "num_samples": n,
                "num_inference_steps": steps, "noise_images": noise_images, "compile": compiled, "dtype": _short(dtype),
                "batch_size": batch_size, "seed": seed,
            }  # fmt: skip
            options = {k: v for k, v in asked.items() if isinstance(v, (str, int, os.PathLike))}
            lost = [k for k, v in asked.items() if v is not None and k not in options]
            run_config.write(folder, "evaluate", options, f"from memory, not here: {', '.join(lost)}" if lost else "")
            save_picture(result, images, folder / "evaluation.png")
        result["path"] = str(path)
    return result


def _real_and_features(
    real: Any, features: str | None, n: int, data_dir: Any, device: torch.device
) -> tuple[FeatureStats | None, FeatureExtractor | None]:
    """Statistics that were given as a file, and the extractor; everything about them that can fail early does."""
    from .features import FEATURES, FeatureStats, count_images, get_features

    known = None
    if real is not None and not isinstance(real, Tensor):
        if os.fspath(real).endswith(".npz"):
            known = FeatureStats.load(real)
            named = str(known.protocol.get("features"))
            if features is None and named not in FEATURES:
                raise UserError(f"{real}: made with {named}; name that file with --features.")
            features = features or named
        else:
            count_images(real, data_dir=data_dir)
    if real is not None and n < 2:
        raise UserError(f"a Fréchet distance needs at least two images, not {n} (--num_samples).")
    if features is None and real is None:
        return None, None
    extractor = get_features(features or "inception", device)
    if known is not None:
        for key in ("features", "resize", "weights"):
            mine = extractor.protocol()[key]
            if mine != known.protocol.get(key):
                from .features import describe

                raise UserError(f"{real}: made with {describe(known.protocol)}, asked for are {describe(extractor.protocol())}.")
    return known, extractor


def _open(model: Any, device: torch.device) -> tuple[nn.Module, Any, str]:
    from . import checkpoint

    if model is None or isinstance(model, (str, os.PathLike)):
        loaded = checkpoint.load_pipeline(model, dtype=torch.float32, device=device)
        return loaded.unet.requires_grad_(False), loaded.scheduler, loaded.name
    unet = getattr(model, "unet", None)
    if unet is None or getattr(model, "scheduler", None) is None:
        raise UserError(f"{type(model).__name__} is not a pipeline with a unet and a scheduler")
    unet = nn.Module.to(copy.deepcopy(unet), device=device, dtype=torch.float32).eval().requires_grad_(False)
    return unet, model.scheduler, "model in memory"


def _check_pair(unet: nn.Module, scheduler: Any, other: tuple[nn.Module, Any, str] | None) -> None:
    if other is None:
        return
    if image_shape(unet) != image_shape(other[0]):
        raise UserError(
            f"the networks draw images of different shapes, {list(image_shape(unet))} and {list(image_shape(other[0]))}."
        )
    mine, theirs = scheduler.alphas_cumprod, other[1].alphas_cumprod
    if mine.shape != theirs.shape or not torch.allclose(mine, theirs):
        raise UserError("the two models have different noise schedules, so that nothing about them can be compared.")


def _draw(
    unet: nn.Module, scheduler: Any, n: int, steps: int, seed: int, batch_size: int, device: torch.device, dtype: torch.dtype,
    progress: bool, which: str, log: Callable[[str], None],
) -> Tensor:  # fmt: skip
    """Samples; in smaller batches where the GPU has too little memory."""
    while True:
        try:
            return sample(
                unet, scheduler, n, steps=steps, seed=seed, batch_size=batch_size, device=device, dtype=dtype,
                progress=progress, desc=f"sampling {which}",
            )  # fmt: skip
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        torch.cuda.empty_cache()
        batch_size //= 2
        log(f"out of memory: going on with a batch size of {batch_size}")


def _feature_figures(
    extractor: FeatureExtractor, known: FeatureStats | None, images: list[Tensor], batch_size: int, log: Callable[[str], None]
) -> dict[str, Any]:
    from .features import feature_distance, feature_stats, frechet_distance

    found: dict[str, Any] = {"features": extractor.protocol()}
    if known is not None:
        names = ("model", "reference")[: len(images)]
        stats = [feature_stats(extractor, x, batch_size=batch_size, source="samples") for x in images]
        found["fd"] = {name: frechet_distance(s, known) for name, s in zip(names, stats, strict=True)}
        found["fd"] |= {"images": len(images[0]), "real": known.protocol.get("source"), "real_images": known.n}
        if len(images[0]) < extractor.dim:
            log(
                f"{len(images[0])} images for {extractor.dim} features: the Fréchet distance is biased upwards; compare it only "
                "with others of the same count"
            )
    if len(images) == 2:
        value, maps = feature_distance(extractor, images[0], images[1], batch_size=batch_size)
        found["feature_distance"] = {"value": value, "maps": maps, "kind": "unit-length feature maps, unweighted; not LPIPS"}
    return found


def _held_out_images(
    real: Any, images: list[Tensor], unet: nn.Module, scheduler: Any, n: int, data_dir: Any, *, bundled: bool,
    **how: Any,
) -> tuple[Tensor, str]:
    """Images for the noise error and where they are from."""
    from . import data
    from .features import _name

    if isinstance(real, Tensor):
        return real[data._evenly(len(real), n)], "real"
    if real is not None and not os.fspath(real).endswith(".npz"):
        return data.load_images(os.fspath(real), n=n, unet=unet, data_dir=data_dir), f"real: {_name(real)}"
    if images:
        which = "reference" if len(images) == 2 else "model"
        return images[-1][:n], f"drawn by the {which}"
    if bundled:
        return data.read_sample_sheet(), "drawn by the bundled model, shipped with the package"
    return sample(unet, scheduler, min(n, 64), **how), "drawn by the model"


def _listed(timesteps: list[int]) -> str:
    """All of a few, else the first two and the last: "980, 960, ..., 0"."""
    few = timesteps if len(timesteps) < 4 else [*timesteps[:2], "...", timesteps[-1]]
    return ", ".join(map(str, few))


def _versions() -> dict[str, str]:
    import diffusers

    from . import __version__

    return {"wanda_fast": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


def _finite(value: Any) -> Any:
    """JSON has no Infinity (a PSNR of equal images): it becomes null."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_picture(result: dict[str, Any], images: list[Tensor], path: str | os.PathLike[str]) -> None:
    """The noise error (or the loss) over t, and the first images side by side: reference, model, difference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [images[1], images[0], (images[0].int() - images[1].int()).abs().mul(4).clamp(0, 255).to(torch.uint8)] \
        if len(images) == 2 else images  # fmt: skip
    names = ["reference", "model", "difference x 4"] if len(images) == 2 else ["model"]
    over_t = result.get("noise", {}).get("over_t", [])
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(1, 1.6))
    centres = [(e["from"] + e["to"]) / 2 for e in over_t]
    if over_t and "mse" in over_t[0]:
        axes[0].plot(centres, [max(e["mse"], 1e-12) for e in over_t], marker="o")
        axes[0].set_ylabel("squared difference of the predicted noise")
    elif over_t:
        axes[0].plot(centres, [e["loss"] for e in over_t], marker="o")
        axes[0].set_ylabel("denoising loss")
    if over_t:
        axes[0].set_yscale("log")
    axes[0].set_xlabel("timestep t (0: clean)")
    axes[0].grid(alpha=0.3)
    axes[1].axis("off")
    if rows and rows[0].shape[-1] in (1, 3):
        count = min(8, len(rows[0]))
        strip = torch.cat([torch.cat(list(F.pad(r[:count], (0, 0, 1, 1, 1, 1), value=255)), dim=1) for r in rows])
        axes[1].imshow(strip.expand(-1, -1, 3).numpy(), interpolation="nearest")
        axes[1].set_title("rows: " + ", ".join(names), fontsize=9)
    other = result.get("reference")
    figure.suptitle(result["model"]["name"] + (f" against {other['name']}" if other else ""))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
