"""Sizes in bytes: read from text, and the most that a stage of a run took."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

from .errors import UserError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(text: str | int, what: str = "size") -> int:
    """Bytes from "256M", "1.5 GiB", "2G" or a plain number; K, M, G and T are powers of 1024.

    Raises:
        UserError: not a positive size.

    Example:
        >>> parse_bytes("1.5G")
        1610612736
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not 1 <= size < 1 << 62:
        raise UserError(f"{what}: {str(text)!r} is not a size such as 256M or 1.5G")
    return size


def free_gpu_bytes(device: torch.device) -> int:
    """Bytes of a GPU that this process could take now. What PyTorch keeps of freed tensors is given back first: the driver counts it as
    taken, and it can be most of the memory where something large ran before.
    """
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


class PeakMemory:
    """The most memory between `start` and `stop`: of tensors on the GPU, and of the whole process on the host.

    The host's figure is the kernel's high-water mark of resident memory. Where the kernel does not let it be set back
    (/proc/self/clear_refs), or is not Linux, it is None rather than that of an earlier stage.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset = False

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._reset = False
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._reset = True

    def stop(self) -> dict[str, int | None]:
        """{"host": bytes or None, "device": bytes or None without a GPU}."""
        host = None
        if self._reset:
            with suppress(OSError):
                found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
                host = int(found[1]) << 10 if found else None
        device = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None
        return {"host": host, "device": device}
