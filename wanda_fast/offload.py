"""Weights that wait in the host's memory and visit the device only while their module runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def visiting(model: nn.Module, device: torch.device | str) -> Iterator[None]:
    """For the block, let `model`, whose weights stay where they are, run on `device`.

    Each module with parameters or buffers of its own gets copies of them on the device when its forward pass begins, and gives
    them up when the last pass inside has left. Several passes may be inside at once (`wanda_fast.lockstep`): they share
    one copy. So the device never holds more of the weights than the modules in which a pass stands.

    Example:
        >>> import torch
        >>> from wanda_fast.offload import visiting
        >>> layer = torch.nn.Linear(2, 2)
        >>> with visiting(layer, "cpu"):
        ...     layer(torch.ones(1, 2)).shape
        torch.Size([1, 2])
    """
    handles: list[Any] = []
    at_home: dict[nn.Module, dict[str, Tensor]] = {}
    inside: dict[nn.Module, int] = {}

    def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        yield from module.named_parameters(recurse=False)
        yield from module.named_buffers(recurse=False)

    def arrive(module: nn.Module, _args: Any) -> None:
        inside[module] += 1
        if inside[module] == 1:
            for _, tensor in tensors(module):
                tensor.data = tensor.data.to(device)

    def leave(module: nn.Module, _args: Any = None, _out: Any = None) -> None:
        inside[module] = max(0, inside[module] - 1)
        if inside[module] == 0:
            for name, tensor in tensors(module):
                tensor.data = at_home[module][name]

    for module in model.modules():
        own = {name: tensor.data for name, tensor in tensors(module)}
        if own:
            at_home[module], inside[module] = own, 0
            handles.append(module.register_forward_pre_hook(arrive))
            handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, own in at_home.items():
            for name, tensor in tensors(module):
                tensor.data = own[name]
