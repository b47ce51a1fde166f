"""The published method's own code path, re-implemented plainly: what a PyTorch script does per layer, per call.

- the hook keeps `torch.norm(x.float(), ...)` of every layer input on the CPU, which stops the device once per layer and call;
- scores are computed layer by layer in Python, and channels are sliced with one `index_select` per dimension and tensor.

Source: Wanda, Sun et al. 2023, arXiv:2306.11695 (the hook of its `WrappedGPT`), carried over to diffusion UNets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def activation_norm(x: Tensor) -> Tensor:
    """||X||_2 per sample and channel, as the hook computes it: [N, C]."""
    if x.dim() == 4:
        return torch.norm(x.float(), p=2, dim=(2, 3))
    if x.dim() == 3:
        return torch.norm(x.float(), p=2, dim=1)
    return x.float().abs()


class NormHooks:
    """Forward hooks on every convolution and linear layer that collect norms on the CPU."""

    def __init__(self, network: nn.Module) -> None:
        self.norms: dict[str, list[Tensor]] = {}
        self._handles = []
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                self.norms[name] = []
                self._handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str) -> Callable[..., None]:
        def collect(_module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> None:
            self.norms[name].append(activation_norm(inputs[0].detach()).cpu())

        return collect

    def clear(self) -> None:
        for values in self.norms.values():
            values.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def act_norm(values: list[Tensor]) -> Tensor:
    """Mean over all collected samples: [C]."""
    return torch.cat(values).mean(dim=0)


def score(weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column sums of the elementwise score, which is written to memory first."""
    shape = (1, -1) + (1,) * (weight.dim() - 2)
    elementwise = weight.float().abs() * norm.to(weight.device).reshape(shape)
    return elementwise.flatten(1).sum(dim=1), elementwise.transpose(0, 1).flatten(1).sum(dim=1)


def compact(tensors: list[Tensor], keep_out: list[Tensor | None], keep_in: list[Tensor | None]) -> list[Tensor]:
    """One index_select per dimension and tensor."""
    result = []
    for t, rows, columns in zip(tensors, keep_out, keep_in, strict=True):
        if rows is not None:
            t = torch.index_select(t, 0, rows)
        if columns is not None:
            t = torch.index_select(t, 1, columns)
        result.append(t)
    return result
