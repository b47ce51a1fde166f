"""Several processes, one job: what the stages of a run need of torch.distributed, and nothing of it for a single process.

    torchrun --nproc_per_node=4 -m wanda_fast prune …

Every rank runs the same program on its share of the images; sums are added up over the ranks, rank 0 decides and writes.
Only tensors travel (JSON as bytes in a tensor), never pickled objects. NCCL carries what lies on GPUs, Gloo the rest.

A rank that fails ends the run: its sockets close, and what waits for it raises `RankLost` within the timeout
(WANDA_FAST_TIMEOUT seconds, 1800 if not set). Launchers such as torchrun end the other ranks at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import UserError

if TYPE_CHECKING:
    from .stats import ActivationStats

TIMEOUT = 1800.0  # seconds that a rank waits for the others
_LONGEST = 10**8  # three years; below what overflows in the libraries underneath
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankLost(RuntimeError):
    """Another process of this run has ended or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """The processes of this run as seen from one of them. `Ranks()` is a process on its own, where every method is free.

    Attributes:
        rank: 0 ≤ rank < size.
        size: number of processes.
        local: number of this process on its machine, which is also the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place, on whatever device it is."""
        if self.size == 1:
            return
        import torch.distributed as dist

        with self._answering():
            for tensor in tensors:
                if tensor.is_contiguous():
                    dist.all_reduce(tensor)
                else:
                    whole = tensor.contiguous()
                    dist.all_reduce(whole)
                    tensor.copy_(whole)

    def all(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""
        if self.size == 1:
            return flag
        failed = torch.tensor(0 if flag else 1, dtype=torch.int64)
        self.add([failed])
        return int(failed) == 0

    def share(self, value: Any = None, source: int = 0) -> Any:
        """The value of rank `source`, a JSON document, on every rank."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        data = json.dumps(value).encode() if self.rank == source else b""
        length = torch.tensor(len(data), dtype=torch.int64)
        with self._answering():
            dist.broadcast(length, source)
            buffer = torch.zeros(int(length), dtype=torch.uint8)
            if self.rank == source:
                buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(buffer, source)
        return json.loads(bytes(buffer.tolist()))

    def wait(self) -> None:
        """Return when every rank is here."""
        self.all(True)

    def part(self, n: int, unit: int = 1, rank: int | None = None) -> tuple[int, int]:
        """The share [first, last) of n items of this rank, or of `rank`, cut at multiples of `unit`; it may be empty."""
        own = self.rank if rank is None else rank
        units = -(-n // unit)
        return min(n, units * own // self.size * unit), min(n, units * (own + 1) // self.size * unit)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RankLost(f"rank {self.rank}: another process of this run has ended or does not answer ({reason})") from None


_SOLO = Ranks()
_current = _SOLO


def ranks() -> Ranks:
    """The ranks of this run: a single process unless `joined` is active."""
    return _current


def launched() -> bool:
    """Whether a launcher such as torchrun or `accelerate launch` started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes that the launcher started, for the block; a process on its own where there is no launcher.

    Raises:
        UserError: the launcher's environment is incomplete.
        RankLost: the others do not come.
    """
    global _current
    if not launched():
        yield _SOLO
        return
    import torch.distributed as dist

    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE is set but {missing[0]} is not: start several processes with torchrun or accelerate launch")
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", rank))
        seconds = float(os.environ.get("WANDA_FAST_TIMEOUT") or TIMEOUT)
        if not 0 < seconds <= _LONGEST:
            raise ValueError(f"WANDA_FAST_TIMEOUT is {seconds:g}, and must be more than 0 and at most {_LONGEST} seconds")
        if not 0 <= rank < size:
            raise ValueError(f"RANK is {rank} where WORLD_SIZE is {size}")
        timeout = timedelta(seconds=seconds)
    except ValueError as error:
        raise UserError(f"the launcher's environment is malformed: {error}") from None
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
        if dist.is_nccl_available():
            backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise RankLost(f"rank {rank}: the processes of this run could not join: {' '.join(str(error).split())[:200]}") from None
    _current = Ranks(rank, size, local)
    try:
        yield _current
    finally:
        _current = _SOLO
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------ statistics


def merge_stats(part: ActivationStats | None, n: int, unit: int, together: Ranks) -> ActivationStats:
    """Statistics of the whole run on every rank, from what each rank calibrated: its `together.part(n, unit)` of the samples.

    Rows of samples travel unchanged, so the result equals that of one process bit for bit. Bins are added in float32.

    Args:
        part: this rank's statistics; None if its share is empty.
        n: samples of the whole run.
        unit: samples of a batch.
    """
    from .stats import BINS, ActivationStats

    source = next(r for r in range(together.size) if together.part(n, unit, r)[0] < together.part(n, unit, r)[1])
    head: dict[str, Any] = {}
    if part is not None:
        first: dict[int, str] = {}
        owner = {name: first.setdefault(id(table), name) for name, table in part.tables.items()}
        head = {
            "owner": owner,
            "channels": {name: part.tables[name].shape[1] for name in first.values()},
            "positions": part.positions,
            "total": part.num_train_timesteps,
            "model": part.model,
            "info": part.info,
            "sums": {name: len(value) for name, value in part.sums.items()},
        }
    head = together.share(head, source)
    per_sample = head["info"]["rows"] == "sample"
    low, high = head["info"]["target"]
    # Of a range of few timesteps several bins have the same middle: one row for them, since rows are grouped by it anyway.
    middle = torch.tensor([low + (high - low) * (2 * b + 1) // (2 * BINS) for b in range(BINS)]).unique()
    rows = n if per_sample else len(middle)
    timesteps, counts = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    own = torch.zeros(0, dtype=torch.int64)
    if part is not None:
        own = part.samples if per_sample else torch.searchsorted(middle, part.timesteps)
        timesteps.index_add_(0, own, part.timesteps)
        counts.index_add_(0, own, part.counts)
    together.add([timesteps, counts])
    tables: dict[str, Tensor] = {}
    for name, channels in head["channels"].items():
        tables[name] = torch.zeros(rows, channels)
        if part is not None:
            tables[name].index_add_(0, own, part.tables[name])
        together.add([tables[name]])
    sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in head["sums"].items()}
    for name, value in sums.items():
        if part is not None:
            value += part.sums[name]
        together.add([value])
    if not per_sample:
        used = counts > 0
        timesteps, counts = middle[used], counts[used]
        tables = {name: table[used] for name, table in tables.items()}
    return ActivationStats(
        tables={name: tables[peer] for name, peer in head["owner"].items()},
        positions=head["positions"],
        timesteps=timesteps,
        counts=counts,
        samples=torch.arange(n) if per_sample else torch.full((len(counts),), -1),
        num_train_timesteps=head["total"],
        model=head["model"],
        info=head["info"],
        sums=sums,
    )


# -------------------------------------------------------------------------------------------------------------- sampling


def sample(unet: nn.Module, scheduler: Any, n: int, together: Ranks, **options: Any) -> Tensor:
    """`wanda_fast.sampling.sample`, each rank drawing its share of the images; all of them on every rank.

    Image i depends on (seed, i) alone, so these are the images of a single process.

    Returns:
        uint8 [n, H, W, C] on the CPU.
    """
    from . import sampling

    if together.size == 1 or n == 0:
        return sampling.sample(unet, scheduler, n, **options)
    channels, height, width = sampling.image_shape(unet)
    images = torch.zeros(n, height, width, channels, dtype=torch.uint8)
    first, last = together.part(n)
    for indices, drawn in sampling.draw(unet, scheduler, range(first, last), **options):
        images[torch.tensor(list(indices))] = drawn
    together.add([images])
    return images
