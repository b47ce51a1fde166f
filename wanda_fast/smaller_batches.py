"""How many images pass at once: the usual number, and fewer where the device has too little memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from .distributed import ranks

T = TypeVar("T")
P = ParamSpec("P")

_log = logging.getLogger("wanda_fast")


CPU_BATCH = 32
GPU_BATCH = (32, 256)  # least and most
GPU_PIXELS = 1 << 18  # of one pass: below it a GPU waits for its launches


def usual_batch_size(device: torch.device, height: int, width: int) -> int:
    """Images per pass where nothing is asked: 32 on a CPU; on a GPU what makes 2¹⁸ pixels, at least 32 and at most 256.

    Example:
        >>> usual_batch_size(torch.device("cuda"), 32, 32), usual_batch_size(torch.device("cuda"), 256, 256)
        (256, 32)
    """
    if device.type == "cpu":
        return CPU_BATCH
    least, most = GPU_BATCH
    return min(most, max(least, GPU_PIXELS // max(1, height * width)))


def large_batch_size(device: torch.device, height: int, width: int, factor: int) -> int:
    """`factor` times the usual number on a GPU for images of at most 32 x 32, where work that keeps little per image (drawing, the repair)
    waits for its launches; the usual number elsewhere.

    Example:
        >>> large_batch_size(torch.device("cuda"), 32, 32, 4), large_batch_size(torch.device("cuda"), 256, 256, 4)
        (1024, 32)
    """
    usual = usual_batch_size(device, height, width)
    return factor * usual if device.type != "cpu" and usual == GPU_BATCH[1] else usual


def in_smaller_batches(run: Callable[[int], T], batch_size: int, *, what: str, say: Callable[[str], None] | None = None) -> T:
    """run(batch_size); where the device runs out of memory, again with half the batch size, down to 1.

    Args:
        run: starts from the beginning each time it is called, and gives the same result for every batch size (all work of
            this package depends on the seed and the sample alone).
        what: of the work, for the message.
        say: called with the message; None logs a warning.

    Raises:
        torch.OutOfMemoryError: a single sample is too much, or this is one of several processes.
    """
    while True:
        try:
            return run(batch_size)
        except torch.OutOfMemoryError:
            # Of several processes one cannot begin again: the others wait for its part of the sums.
            if batch_size <= 1 or ranks().size > 1:
                raise
        # Outside the except block, whose traceback holds on to the tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        batch_size = -(-batch_size // 2)
        (say or _log.warning)(f"too little memory: {what} goes on with batches of {batch_size}")


def halves_batches(what: str, default: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator for a function with the keyword `batch_size`: :func:`in_smaller_batches` around each call.

    Args:
        default: the function's own default batch size.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            asked = kwargs.get("batch_size", default)
            start = asked if isinstance(asked, int) else default
            return in_smaller_batches(lambda size: function(*args, **{**kwargs, "batch_size": size}), start, what=what)  # type: ignore[arg-type]

        return call

    return decorate
