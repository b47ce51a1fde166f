"""Forward passes that stop inside the network, so that a layer can be changed before the rest of the pass has run.

A `Walk` is one forward pass of one batch in its own thread. Only one thread ever runs: the caller hands a baton over,
the walk runs until the last of the wanted values has been seen and hands the baton back. While it waits, everything
that the rest of the pass needs (skip connections, the time embedding) stays alive in the thread's own frames. So a
whole network can be refitted layer by layer, on any number of batches, for the price of one forward pass.

Plain threads and forward hooks, because they work for every network that runs, control flow included.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Event = tuple[str, str]  # (module name, "in" before it runs | "out" after it ran)

_active = threading.local()


class _Stop(BaseException):
    """Unwinds a walk that is no longer needed. Not an Exception, so that no `except Exception` of a model keeps it."""


def first_tensor(args: Iterable[Any]) -> Tensor | None:
    """The first tensor of a call's arguments, or None."""
    return next((a for a in args if isinstance(a, Tensor)), None)


class Hooked:
    """A network whose named modules report their input and output to the walk that is running.

    Args:
        model: any module. Its hooks are removed by `close()` or at the end of a `with` block.
        names: qualified names of the modules that report.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        modules = dict(model.named_modules())
        self._handles = []
        for name in names:
            self._handles.append(modules[name].register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._handles.append(modules[name].register_forward_hook(self._after(name)))

    def _before(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            listener = getattr(_active, "listener", None)
            if listener is not None:
                listener((name, "in"), first_tensor((*args, *kwargs.values())))

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            listener = getattr(_active, "listener", None)
            if listener is not None:
                listener((name, "out"), output if isinstance(output, Tensor) else first_tensor(output))

        return hook

    def listen(self, call: Callable[[nn.Module], Any], listener: Callable[[Event, Any], None]) -> None:
        """Run `call(model)` in this thread and report every event to `listener`."""
        _active.listener = listener
        try:
            call(self.model)
        finally:
            _active.listener = None

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Hooked:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class Walk:
    """One forward pass that advances on demand.

    Args:
        hooked: the network.
        call: runs one batch, `call(model)`. It is executed in a thread of its own; grad mode, autocast and device
            are thread-local in torch, so `call` sets them itself.
        sticky: events whose value is kept whenever it passes, until `take` fetches it.
    """

    def __init__(self, hooked: Hooked, call: Callable[[nn.Module], Any], sticky: Iterable[Event] = ()) -> None:
        self._hooked, self._call = hooked, call
        self._sticky = frozenset(sticky)
        self._wanted: set[Event] = set()
        self._seen: dict[Event, Tensor] = {}
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._stopping = self._done = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._stopping:
                self._hooked.listen(self._call, self._report)
        except _Stop:
            pass
        except BaseException as error:  # handed to the caller's thread, which raises it there
            self._error = error
        finally:
            self._done = True
            self._back.release()

    def _report(self, event: Event, value: Any) -> None:
        if event in self._sticky:
            self._seen[event] = value
        if event not in self._wanted:
            return
        self._seen[event] = value
        self._wanted.discard(event)
        if not self._wanted:
            self._back.release()
            self._go.acquire()
            if self._stopping:
                raise _Stop

    def advance(self, wanted: Iterable[Event]) -> None:
        """Run until every wanted event has been seen; stop right there.

        Raises:
            RuntimeError: the pass ended before; or whatever the network itself raised.
        """
        self._wanted = {event for event in wanted if event not in self._seen}
        if not self._wanted:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="wanda_fast walk", daemon=True)
            self._thread.start()
        if self._done:
            raise RuntimeError(f"the forward pass ended before {sorted(self._wanted)}")
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        if self._wanted:
            raise RuntimeError(f"the forward pass ended before {sorted(self._wanted)}")

    def take(self, event: Event) -> Tensor:
        """The value of an event that was seen; the walk forgets it."""
        return self._seen.pop(event)

    def close(self) -> None:
        """Unwind the pass and free what it holds."""
        if self._thread is not None and not self._done:
            self._stopping = True
            self._go.release()
            self._thread.join()
        self._thread = None
        self._seen.clear()


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that were made inside and are still referenced: `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._users: dict[int, int] = {}

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if self._users[key] == 0:
            del self._users[key]
            self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {id(a) for a in args if isinstance(a, Tensor)}
        for out in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(out, Tensor) or id(out) in known:
                continue
            storage = out.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._users:
                self._users[key] = 0
                self.live += size
                self.peak = max(self.peak, self.live)
            self._users[key] += 1
            weakref.finalize(out, self._drop, key, size)
        return result


def peak_bytes(call: Callable[[], Any]) -> int:
    """Bytes of activations that are alive at the fullest moment of `call()`: what a paused pass may hold."""
    with torch.no_grad(), _LiveBytes() as counter:
        call()
    return counter.peak
