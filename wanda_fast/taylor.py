"""Gradients of the noise-prediction loss, summed over timesteps: what the criteria `taylor` and `diff-pruning` need.

L_t = mean (ε_θ(x_t, t) - ε)² over the images and elements at timestep t, x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε. (A network that predicts
v = √ᾱ_t ε - √(1-ᾱ_t) x₀ or x₀ itself is held to that in place of ε, by its scheduler's `prediction_type`.) The timesteps are
visited in rising order, from clean to noisy, and Σ_t ∂L_t/∂w is accumulated in `.grad`; with a threshold the sum ends at
the first timestep whose loss is no more than this share of the largest loss so far, since L_t / L_max > thr defines the
timesteps that count.

Source: Diff-Pruning, Fang et al. 2023, arXiv:2305.10924, §4 and `ddpm_prune.py` of its published code. That code takes one
batch of 128 images and one noise for all of 1000 timesteps; here every timestep gets images and noise of its own, which
estimates the same sum from more of the calibration set, and 1000 timesteps with 128 images each are `calib_steps=128000`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sampling import class_labels, evaluating, fast_layout, image_shape, noise, predict, prediction_target, to_float

_IMAGES_PER_TIMESTEP = 16  # enough for a loss within some 10 %; what is left over buys more timesteps


class Noised(NamedTuple):
    """x_t [N, C, H, W] float32, t [N] int64, labels [N] int64 or None, and what the network is to predict, [N, C, H, W]; on one
    device.
    """

    x: Tensor
    t: Tensor
    labels: Tensor | None
    target: Tensor


class NoisedImages:
    """Calibration images at chosen timesteps: x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε, with ε a function of (seed, sample) alone.

    Args:
        images: uint8 [N, H, W, C] or float [-1, 1] [N, C, H, W]; sample i shows images[i % N].
    """

    def __init__(self, unet: nn.Module, scheduler: Any, images: Tensor, *, seed: int = 0) -> None:
        self.unet, self.images, self.seed = unet, images, seed
        self.alphas = scheduler.alphas_cumprod.to("cpu", torch.float64)
        self.kind = str(scheduler.config.get("prediction_type", "epsilon"))

    def __call__(self, samples: Tensor, t: Tensor) -> Noised:
        """The noised images of these samples.

        Args:
            samples: [N] int64 on the CPU, any numbers from 0 up.
            t: [N] int64 on the CPU.
        """
        device = next(self.unet.parameters()).device
        eps = noise(image_shape(self.unet), samples.tolist(), self.seed, "calibration")
        signal, blur = (v.sqrt().float().view(-1, 1, 1, 1) for v in (self.alphas[t], 1 - self.alphas[t]))
        clean = to_float(self.images[samples % len(self.images)])
        x = signal * clean + blur * eps
        target = prediction_target(self.kind, clean, eps, signal, blur)
        return Noised(x.to(device), t.to(device), class_labels(self.unet, samples.tolist(), self.seed, device), target.to(device))


@dataclass
class LossGradients:
    """Summed gradients, and which timesteps are in the sum.

    Attributes:
        gradients: layer -> Σ_t ∂L_t/∂w in the shape of its weight; every Conv2d, Linear and Embedding.
        timesteps: those of the sum, rising.
        losses: L_t of each.
        stopped_at: timestep at which the loss fell to the threshold, which is not in the sum any more; None if none did.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    timesteps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    stopped_at: int | None = None

    def summary(self) -> dict[str, Any]:
        """JSON-ready account of what was summed."""
        return {
            "timesteps": len(self.timesteps),
            "first": self.timesteps[0],
            "last": self.timesteps[-1],
            "stopped_at": self.stopped_at,
            "largest_loss": float(f"{max(self.losses):.4g}"),
        }


def timestep_grid(images: int, low: int, high: int) -> tuple[list[int], int]:
    """(rising timesteps in [low, high), images at each) for a budget of noised images.

    16 images each, on as many evenly spaced timesteps as the budget pays for; fewer images while there would be fewer than
    16 timesteps, more once every timestep is visited.
    """
    each = max(1, min(_IMAGES_PER_TIMESTEP, images // _IMAGES_PER_TIMESTEP))
    count = max(1, min(high - low, images // each))
    return [low + (high - low) * k // count for k in range(count)], max(1, images // count)


def loss_gradients(
    unet: nn.Module,
    noised: Callable[[Tensor, Tensor], Noised],
    *,
    images: int,
    timesteps: tuple[int, int] = (0, 1000),
    batch_size: int = 32,
    thr: float | None = None,
) -> LossGradients:
    """Σ_t ∂L_t/∂w over a grid of timesteps, of all Conv2d, Linear and Embedding weights.

    Memory: one gradient per weight and the activations of one batch. Weights, gradients, `requires_grad` and the training
    mode are afterwards what they were.

    Args:
        noised: see `NoisedImages`.
        images: budget of noised images, see `timestep_grid`.
        timesteps: [low, high).
        thr: end before the first timestep with L_t <= thr · L_max, L_max being the largest loss up to there. None sums all.

    Raises:
        RuntimeError: a loss or a gradient is not finite; the text names the layer.
    """
    grid, each = timestep_grid(images, *timesteps)
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))}
    result, largest = LossGradients(), 0.0
    with fast_layout(unet), _only_weights_learn(unet, layers):
        for k, t in enumerate(grid):
            chunks = torch.arange(k * each, (k + 1) * each).split(batch_size)

            def loss_of(samples: Tensor, t: int = t) -> Tensor:
                batch = noised(samples, torch.full((len(samples),), t, dtype=torch.int64))
                out = predict(unet, batch.x, batch.t, batch.labels)
                return F.mse_loss(out, batch.target.float()) * (len(samples) / each)

            if len(chunks) == 1:
                part = loss_of(chunks[0])
                loss = float(part.detach())
            else:  # whether the timestep counts must be known before its first gradient
                with torch.no_grad():
                    loss = sum(float(loss_of(c)) for c in chunks)
            if not loss < float("inf"):
                raise RuntimeError(_first_non_finite(unet, lambda c=chunks[0]: loss_of(c), t))  # type: ignore[misc]
            largest = max(largest, loss)
            if thr is not None and loss <= thr * largest and result.timesteps:
                result.stopped_at = t
                break
            result.timesteps.append(t)
            result.losses.append(loss)
            if len(chunks) == 1:
                part.backward()
            else:
                for c in chunks:
                    loss_of(c).backward()
        for name, layer in layers.items():
            grad: Tensor = torch.zeros_like(layer.weight) if layer.weight.grad is None else layer.weight.grad
            if not bool(torch.isfinite(grad).all()):
                raise RuntimeError(f"{name}: the gradient of the loss is not finite")
            result.gradients[name] = grad.contiguous()
    return result


@contextmanager
def _only_weights_learn(unet: nn.Module, layers: dict[str, Any]) -> Iterator[None]:
    """Gradients for the weights of these layers alone, from zero, deterministic on a GPU too; all is put back afterwards."""
    wanted = {id(m.weight) for m in layers.values()}
    before = [(p, p.requires_grad, p.grad) for p in unet.parameters()]
    for p, _, _ in before:
        p.grad = None
        p.requires_grad_(id(p) in wanted)
    from torch.nn.attention import SDPBackend, sdpa_kernel  # the fast kernels add up their gradients in no fixed order

    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    try:
        with evaluating(unet), torch.inference_mode(False), torch.enable_grad(), cudnn, sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for p, learns, grad in before:
            p.requires_grad_(learns)
            p.grad = grad


def _first_non_finite(unet: nn.Module, run: Callable[[], Tensor], t: int) -> str:
    """Which layer brought NaN or Inf into a forward pass at timestep t."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, Tensor) and not found and not bool(torch.isfinite(out).all()):
                found.append(name)

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in unet.named_modules() if not any(m.children())]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return f"{found[0] if found else 'the images'}: NaN or Inf at timestep {t}"
