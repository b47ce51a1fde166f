"""What is left of a run that was killed, so that the same command goes on from there.

`Unfinished` is a folder beside the target: the settings of the run, the shards of the calibration, the plan and the state of the
repair, each written in one step and with a checksum: a damaged one is refused, since what it holds would go into the result. The folder is
removed when the result is in place. `RepairState` is the one file of it that the repair itself reads and writes. Safetensors and JSON only.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import UserError

if TYPE_CHECKING:
    from .plan import PruningPlan
    from .repair import RepairReport
    from .stats import ActivationStats

FORMAT = "wanda_fast.unfinished/1"
SHARDS = 16  # of a calibration
_OVERHEAD = 20  # the repair's state is saved when this many times the seconds of the last save have passed


class Unfinished:
    """The folder of one unfinished run.

    Args:
        target: folder that the run will write; this one is `target` + ".unfinished".
        key: settings that decide about the result, JSON values; what was begun with others is refused.
        write: whether this process begins the folder (of several, one; the others come when it is there).

    Raises:
        UserError: the folder belongs to a run with other settings (names the first), is none of ours, or cannot be seen from here.
    """

    def __init__(self, target: str | os.PathLike[str], key: Mapping[str, Any], *, write: bool = True) -> None:
        from .checkpoint import atomic_file

        path = Path(target)
        self.folder = path.with_name(path.name + ".unfinished")
        self._write = write
        file = self.folder / "settings.json"
        self.found = file.is_file()
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} exists and is not an unfinished run")
        if self.found:
            try:
                before = json.loads(file.read_text(encoding="utf-8"))
                if before["format"] != FORMAT:
                    raise KeyError("format")
                before = dict(before["key"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{file}: not the settings of an unfinished run; remove the folder to begin anew") from None
            now = json.loads(json.dumps(key))
            for name in sorted({*before, *now}):
                if before.get(name) != now.get(name):
                    raise UserError(
                        f"{self.folder} holds a run with {name[:40]} = {str(before.get(name))[:80]}, not {str(now.get(name))[:80]}: "
                        "repeat its command, or remove the folder to begin anew"
                    )
        elif self.folder.exists() and any(p.name[:1] != "." for p in self.folder.iterdir()):
            raise UserError(f"{self.folder} exists and is not an unfinished run")
        elif write:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(file) as temp:
                temp.write_text(json.dumps({"format": FORMAT, "key": dict(key)}, indent=1) + "\n", encoding="utf-8")
        else:
            raise UserError(f"{self.folder} cannot be seen from here: to resume on several machines, write to a folder that they share")

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    def save_plan(self, plan: PruningPlan, findings: Mapping[str, Any]) -> None:
        """Keep the plan, and what the report says of how it was found, in one file."""
        from .checkpoint import atomic_file

        kept = {"plan": plan.to_dict(), "findings": dict(findings)}
        with atomic_file(self.plan) as temp:
            temp.write_text(json.dumps({**kept, "checksum": _checksum(kept)}, indent=1) + "\n", encoding="utf-8")

    def load_plan(self) -> tuple[PruningPlan, dict[str, Any]]:
        """What `save_plan` kept.

        Raises:
            UserError: the file is damaged.
        """
        from .plan import PruningPlan

        try:
            kept = json.loads(self.plan.read_text(encoding="utf-8"))
            if kept.pop("checksum") != _checksum(kept):
                raise ValueError("its checksum differs")
            return PruningPlan.from_dict(kept["plan"], str(self.plan)), dict(kept["findings"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{self.plan}: not the plan of an unfinished run ({_reason(error)}); remove it to plan anew") from None

    def repair(self, part: int = 0) -> Path:
        """State of the repair, or of that of an expert, counted from 1."""
        return self.folder / f"repair{part or ''}.safetensors"

    def save_shard(self, first: int, last: int, stats: ActivationStats) -> None:
        """Keep the statistics of samples first … last - 1; the file's name ends with its checksum."""
        temp = self.folder / f".{self._shard(first, last)}"
        stats.save(temp)
        os.replace(temp, self.folder / f"{self._shard(first, last)}-{zlib.crc32(temp.read_bytes()):08x}.safetensors")

    def load_shard(self, first: int, last: int) -> ActivationStats | None:
        """What `save_shard` kept, or None.

        Raises:
            UserError: the file is damaged.
        """
        from .stats import ActivationStats

        file = next(iter(sorted(self.folder.glob(f"{self._shard(first, last)}-*.safetensors"))), None)
        if file is None:
            return None
        if f"{zlib.crc32(file.read_bytes()):08x}" != file.stem.rpartition("-")[2]:
            raise UserError(f"{file}: damaged activation statistics (its checksum differs). Remove the file: its samples are then "
                            "calibrated again.")  # fmt: skip
        return ActivationStats.load(file)

    @staticmethod
    def _shard(first: int, last: int) -> str:
        return f"calibration-{first:09d}-{last:09d}"

    @staticmethod
    def shards(first: int, last: int, unit: int) -> list[tuple[int, int]]:
        """Ranges into which [first, last) is cut, at multiples of `unit`."""
        step = unit * max(1, -(-(last - first) // (unit * SHARDS)))
        return [(a, min(last, a + step)) for a in range(first, last, step)]

    def remove(self) -> None:
        if self._write:
            shutil.rmtree(self.folder, ignore_errors=True)


def _checksum(value: Any) -> int:
    """Of JSON values: what is read back has that of what was written."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _reason(error: Exception) -> str:
    return (str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))[:200] or type(error).__name__


class RepairState:
    """File of an unfinished repair: how many stages are done, their layers' tensors and what the report says of them.

    Saving takes at most a twentieth of the time.
    """

    def __init__(self, file: str | os.PathLike[str], write: bool = True) -> None:
        self.file, self._write = Path(file), write
        self._saved, self._cost = time.perf_counter(), 0.0

    def restore(self, modules: Mapping[str, nn.Module], report: RepairReport) -> int:
        """Put the tensors in place, complete the report, and return the number of stages that are done.

        Raises:
            UserError: a damaged file, or one of another network.
        """
        from safetensors import SafetensorError, safe_open

        from .repair import LayerRepair

        if not self.file.is_file():
            return 0
        try:
            with safe_open(self.file, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if metadata["checksum"] != self._checksum(metadata["state"], tensors):
                raise ValueError("its checksum differs")
            head = json.loads(metadata["state"])
            layers = [LayerRepair(**entry) for entry in head["layers"]]
            targets = [(getattr(modules[n.rpartition(".")[0]], n.rpartition(".")[2]), value) for n, value in tensors.items()]
            if any(to.shape != value.shape for to, value in targets):
                raise ValueError("a tensor of another shape")
            done = int(head["done"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError,
                RuntimeError) as error:  # fmt: skip
            raise UserError(f"{self.file}: not the state of this repair ({_reason(error)}); remove it to begin anew") from None
        for to, value in targets:
            to.data.copy_(value)
        report.layers[:] = layers
        return done

    def save(self, done: int, modules: Mapping[str, nn.Module], report: RepairReport) -> None:
        """Write what is done so far, unless the last time is too near."""
        from safetensors.torch import save_file

        from .checkpoint import atomic_file

        begun = time.perf_counter()
        if not self._write or begun - self._saved < _OVERHEAD * self._cost:
            return
        tensors: dict[str, Tensor] = {}
        for name in {entry.layer for entry in report.layers if entry.accepted}:
            for part in ("weight", "bias"):
                value = getattr(modules[name], part)
                if value is not None:
                    tensors[f"{name}.{part}"] = value.detach().to("cpu").contiguous()
        state = json.dumps({"done": done, "layers": [asdict(entry) for entry in report.layers]})
        with atomic_file(self.file) as temp:
            save_file(tensors, temp, metadata={"state": state, "checksum": self._checksum(state, tensors)})
        self._saved = time.perf_counter()
        self._cost = self._saved - begun

    @staticmethod
    def _checksum(state: str, tensors: Mapping[str, Tensor]) -> str:
        found = zlib.crc32(state.encode())
        for name in sorted(tensors):
            value = tensors[name].contiguous()
            found = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), found)
            found = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, found)
        return f"{found:08x}"
