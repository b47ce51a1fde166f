"""torch-pruning's own selection, as a user of that package would call it: the rival outside of this package.

What its users do, taken from `ddpm_prune.py` of Diff-Pruning (arXiv:2305.10924) and kept as it is there: `BasePruner` with one
ratio for all layers and local ranking, `conv_out` ignored, example inputs of one image, the network in eval mode with
gradients on, nothing passed about the norms (the package finds the GroupNorms itself and removes the same
offsets from every group, with the score averaged over the groups), no `round_to` (with GroupNorm it prunes next to nothing),
and afterwards the `channels` attributes of the resampling layers set right. The ratio is not asked for but searched:
the smallest whole percentage whose network fits the budget. With norm groups the size moves in large steps (of the bundled model, with
four channels to a group, 70 %, 57 %, 35 %, 26 % of the MACs), so the budget may be exceeded by 2 %, in the rival's favour.
From some ratio on fewer channels are removed again, since the package skips layers that would be emptied.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMPORTANCES = ("magnitude", "taylor", "random")
_PERCENT = range(1, 100)


def noised_batches(
    unet: nn.Module, scheduler: Any, images: Tensor, *, n: int = 1024, batch_size: int = 32, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Batches (x_t, t, labels or None, noise) of n images over the timesteps, rising: what "taylor" takes its loss from. In place of
    the noise stands v or x₀ where the network predicts these (`wanda_fast.taylor.Noised`).

    The same inputs as those of `--pruner taylor --calib_steps n` with this seed.
    """
    from wanda_fast.taylor import NoisedImages, timestep_grid

    grid, each = timestep_grid(n, 0, int(scheduler.config.num_train_timesteps))
    samples, t = torch.arange(len(grid) * each), torch.tensor(grid).repeat_interleave(each)
    noised = NoisedImages(unet, scheduler, images, seed=seed)
    for part in torch.arange(len(samples)).split(batch_size):
        yield noised(samples[part], t[part])


def torch_pruning(
    unet: nn.Module,
    scheduler: Any,
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
    *,
    target_macs: int,
    importance: str = "magnitude",
    seed: int = 0,
    tolerance: float = 0.02,
) -> tuple[nn.Module, int]:
    """Prune a UNet2DModel with torch-pruning alone.

    Args:
        unet: not changed.
        scheduler: of the pipeline; its noise schedule is not needed for what the batches hold already.
        batches: for "taylor", see `noised_batches`; a function is called once.
        target_macs: budget of one forward pass, counted by `wanda_fast.evaluation.count_macs`.
        importance: "magnitude", "taylor" (`multivariable=True`, the baseline of the published code) or "random".
        seed: of "random".
        tolerance: share of the budget by which it may be exceeded.

    Returns:
        (the pruned network in eval mode without gradients, its MACs). Its config is still that of the dense network, as it
        is for users of the package: it runs, but its folder would not load.

    Raises:
        ValueError: unknown importance, "taylor" without noise in the batches, or a budget that no ratio reaches.
    """
    from wanda_fast.evaluation import count_macs

    if importance not in IMPORTANCES:
        raise ValueError(f"importance {importance!r} is not one of {', '.join(IMPORTANCES)}")
    dense = copy.deepcopy(unet).eval().requires_grad_(True)
    if importance == "taylor":
        _accumulate(dense, batches() if callable(batches) else batches)
    least = None
    for percent in _PERCENT:  # no bisection: the size does not only fall
        network = _prune(dense, percent / 100, importance, seed)
        macs = count_macs(network)
        if macs <= target_macs * (1 + tolerance):
            return network, macs
        least = macs if least is None else min(least, macs)
    raise ValueError(f"torch-pruning reaches {least} MACs at the least, the budget is {target_macs}")


def _accumulate(network: nn.Module, batches: Iterable[Any] | None) -> None:
    """Gradients of the noise-prediction loss, added up in `.grad` as the published code does it."""
    count = 0
    for batch in batches or ():
        if len(batch) != 4:
            raise ValueError("taylor needs batches (x_t, t, labels or None, noise), see noised_batches")
        x, t, labels, noise = batch
        with torch.enable_grad():
            F.mse_loss(network(x, t, class_labels=labels).sample, noise).backward()
        count += 1
    if not count:
        raise ValueError("taylor needs batches (x_t, t, labels or None, noise), see noised_batches")


def _copy_with_gradients(network: nn.Module) -> nn.Module:
    """A deep copy; torch's own leaves the gradients behind."""
    twin = copy.deepcopy(network)
    for old, new in zip(network.parameters(), twin.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return twin


def _prune(dense: nn.Module, ratio: float, importance: str, seed: int) -> nn.Module:
    import torch_pruning as tp
    from diffusers.models.resnet import Downsample2D, Upsample2D

    from wanda_fast.sampling import image_shape

    network: Any = _copy_with_gradients(dense)
    device = next(network.parameters()).device
    example: dict[str, Any] = {
        "sample": torch.randn(1, *image_shape(network), generator=torch.Generator().manual_seed(0)).to(device),
        "timestep": torch.ones(1, dtype=torch.int64, device=device),
    }
    if getattr(network, "class_embedding", None) is not None:
        example["class_labels"] = torch.zeros(1, dtype=torch.int64, device=device)
    score = {
        "magnitude": tp.importance.MagnitudeImportance,
        "taylor": lambda: tp.importance.TaylorImportance(multivariable=True),
        "random": tp.importance.RandomImportance,
    }[importance]()
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        # Own dictionaries: the defaults of the package are shared between all pruners of a process.
        pruner = tp.pruner.BasePruner(
            network, example, importance=score, pruning_ratio=ratio, ignored_layers=[network.conv_out],
            in_channel_groups={}, out_channel_groups={}, num_heads={},
        )  # fmt: skip
        for group in pruner.step(interactive=True):
            group.prune()
    for module in network.modules():
        if isinstance(module, (Upsample2D, Downsample2D)) and getattr(module, "conv", None) is not None:
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
    network.zero_grad()
    return network.eval().requires_grad_(False)
