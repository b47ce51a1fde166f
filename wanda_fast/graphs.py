"""Repeated steps on a GPU: run eagerly at first, recorded into a CUDA graph, then replayed without the host.

A step is a function of tensors (and dictionaries of tensors, or None) that returns tensors and may change others in place, such as
the tables of a calibration. It must not wait for the device. Inputs are copied into buffers of their own before each
replay; what the step returns is valid until the next one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Eager steps of a shape before it is recorded: they compile kernels and make what lives on, such as tables.
WARM_UP = 2
# Runs shorter than this stay eager. A recording costs about as much as an eager step and a garbage collection.
MIN_STEPS = 6
MAX_GRAPHS = 2  # shapes with a graph; they share their memory, others run eagerly

Replay = Callable[[], Any]
Capture = Callable[[Callable[[], Any]], Replay]

_log = logging.getLogger("wanda_fast")


def upload(t: Tensor, device: torch.device) -> Tensor:
    """`t` on `device`; from the CPU to a GPU without waiting for it."""
    if device.type == "cuda" and t.device.type == "cpu":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


@functools.cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """The stream that steps on this GPU are recorded on.

    torch's own belongs to the GPU of the process's first capture. On any other GPU nothing would be recorded: the step would run
    once, and its replays would do nothing.
    """
    return torch.cuda.Stream(index)


class CudaCapture:
    """Records a function into a CUDA graph (a HIP graph on ROCm) and returns what replays it. Recording runs no kernel.

    All graphs of one object share a memory pool, so they must not be replayed at the same time, and the results of one are
    lost with the next replay of any.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(self, run: Callable[[], Any]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # Another thread, such as one that loads images, may use the device meanwhile.
        with torch.cuda.device(self._device):
            random = torch.cuda.get_rng_state()
            stream = _capture_stream(torch.cuda.current_device())
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    result = run()
            except RuntimeError:
                self._end_of_capture(random)
                raise
        self._pool = graph.pool()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    @staticmethod
    def _end_of_capture(random: Tensor) -> None:
        """Give the device's generator a state of its own again: a capture that failed leaves it waiting for the capture's end,
        and every random number on the device would be refused from then on (seen in torch 2.11).
        """
        index = torch.cuda.current_device()
        fresh = torch.Generator(torch.device("cuda", index))
        fresh.set_state(random)
        torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())


def capture_for(device: torch.device, steps: int | None = None) -> Capture | None:
    """How steps are recorded on a device; None where they are not: no GPU with graphs, or fewer than `MIN_STEPS` steps."""
    if device.type != "cuda" or (steps is not None and steps < MIN_STEPS):
        return None
    return CudaCapture(device)


@dataclass
class _Recorded:
    inputs: tuple[Any, ...]
    replay: Replay


class Steps:
    """Calls `function`; the third call with inputs of the same shapes records it, later ones replay the recording.

    Args:
        function: the step.
        capture: see `capture_for`; None runs every step eagerly. Recording a step must not change anything.
        what: name in the log's sentences.

    Attributes:
        eager, replayed: steps so far.
    """

    def __init__(self, function: Callable[..., Any], capture: Capture | None, what: str = "steps") -> None:
        self._function = function
        self._capture = capture
        self._what = what
        self._seen: dict[Any, int] = {}
        self._recorded: dict[Any, _Recorded] = {}
        self.eager = 0
        self.replayed = 0

    def __call__(self, *inputs: Any) -> Any:
        if self._capture is not None:
            signature = _signature(inputs)
            recorded = self._recorded.get(signature)
            if recorded is None and self._seen.get(signature, 0) >= WARM_UP and len(self._recorded) < MAX_GRAPHS:
                recorded = self._record(self._capture, signature, inputs)
            if recorded is not None:
                _copy(inputs, recorded.inputs)
                self.replayed += 1
                return recorded.replay()
            self._seen[signature] = self._seen.get(signature, 0) + 1
        self.eager += 1
        return self._function(*inputs)

    def _record(self, capture: Capture, signature: Any, inputs: tuple[Any, ...]) -> _Recorded | None:
        own = _buffers(inputs)
        _copy(inputs, own)  # for a recorder that also runs what it records
        try:
            replay = capture(lambda: self._function(*own))
        except RuntimeError as error:
            self._capture = None
            reason = str(error).strip().splitlines() or [type(error).__name__]
            _log.warning("%s: no CUDA graph, every step is launched from the host: %s", self._what, reason[0])
            return None
        recorded = self._recorded[signature] = _Recorded(own, replay)
        return recorded

    def describe(self) -> str:
        """One sentence part for a log."""
        return f"{self._what}: {self.replayed} of {self.replayed + self.eager} replayed from a CUDA graph"

    def close(self) -> None:
        """Let go of the graphs and their memory."""
        self._recorded.clear()
        self._capture = None


def _signature(value: Any) -> Any:
    """Shapes, dtypes and devices; two inputs with equal ones can share a recording."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, Mapping):
        return tuple((name, _signature(v)) for name, v in value.items())
    if isinstance(value, tuple):
        return tuple(_signature(v) for v in value)
    return value


def _buffers(value: Any) -> Any:
    """Tensors of the same shapes and memory formats; other values as they are."""
    if isinstance(value, Tensor):
        return torch.empty_like(value)
    if isinstance(value, Mapping):
        return {name: _buffers(v) for name, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_buffers(v) for v in value)
    return value


def _copy(source: Any, target: Any) -> None:
    if isinstance(source, Tensor):
        target.copy_(source, non_blocking=True)
    elif isinstance(source, Mapping):
        for name, value in source.items():
            _copy(value, target[name])
    elif isinstance(source, tuple):
        for one, other in zip(source, target, strict=True):
            _copy(one, other)
