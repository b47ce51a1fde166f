"""Samples into a folder: one PNG per image number, each written whole, so that a run can stop anywhere and go on.

`sample.json` in the folder holds what the images depend on. A folder of other settings is refused, complete images are
kept, and only the missing ones are drawn.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import sampling
from .errors import UserError

NAME = "sample.json"
FORMAT = "wanda_fast.sample/1"
_PNG_END = bytes.fromhex("0000000049454e44ae426082")


@dataclass
class Drawn:
    """What `fill` did.

    Attributes:
        drawn: images drawn by this call.
        kept: images that were there.
        seconds: of drawing and writing, without loading and, for compiled networks, with compilation.
        steady: images per second after the first batch, which holds start-up and compilation; None for one batch.
    """

    drawn: int
    kept: int
    seconds: float
    steady: float | None


def settings(
    unet: nn.Module, scheduler: Any, *, steps: int, kind: str, seed: int, dtype: str, device: str, compiled: bool
) -> dict[str, Any]:
    """Everything that the images depend on, as JSON values; the weights stand in it as their checksum."""
    from .stats import fingerprint

    return {
        "format": FORMAT,
        "sampler": kind,
        "steps": steps,
        "seed": seed,
        "dtype": dtype,
        "device": torch.device(device).type,
        "compiled": compiled,
        "image": list(sampling.image_shape(unet)),
        "scheduler": {k: v for k, v in sorted(json.loads(scheduler.to_json_string()).items()) if not k.startswith("_")},
        "model": fingerprint(unet),
    }


def open_folder(folder: str | os.PathLike[str], wanted: dict[str, Any], n: int) -> tuple[Path, list[int]]:
    """Make the folder or check that it goes with these settings; numbers of the images that are missing.

    Raises:
        UserError: a file is in the way, the folder holds something else, other settings or more than n images, or
            cannot be written to.
    """
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"{folder}: exists and is not a folder")
    try:
        file = path / NAME
        if file.is_file():
            _same(file, wanted)
        elif path.is_dir() and any(path.iterdir()):
            raise UserError(f"{folder}: holds something other than samples (it has no {NAME}); choose another folder")
        else:
            path.mkdir(parents=True, exist_ok=True)
            _write(file, json.dumps(wanted, indent=1).encode() + b"\n")
        for left in path.glob(".*.partial"):  # of a run that was killed
            left.unlink(missing_ok=True)
        there = {int(p.stem) for p in path.glob("*.png") if p.stem.isdecimal() and _complete(p)}
    except OSError as error:
        raise UserError(f"{folder}: cannot be used ({error.strerror or error})") from None
    beyond = [i for i in there if i >= n]
    if beyond:
        raise UserError(f"{folder}: holds {len(there)} images already, more than the {n} that are asked for; choose another folder")
    return path, [i for i in range(n) if i not in there]


def _same(file: Path, wanted: dict[str, Any]) -> None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); choose another folder") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: is not a settings file of samples; choose another folder")
    wrong = [k for k in wanted if found.get(k) != wanted[k]]
    if wrong:
        name = wrong[0]
        detail = "" if isinstance(wanted[name], dict) else f": {found.get(name)!r} there, {wanted[name]!r} asked"
        raise UserError(f"{file.parent}: holds images of another {name}{detail}; choose another folder")


def _complete(file: Path) -> bool:
    """A PNG ends with its IEND chunk. Names are given to whole files only; this finds what a power cut left."""
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - len(_PNG_END)))
        return stream.read() == _PNG_END


def _write(file: Path, data: bytes) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _png(image: Tensor) -> bytes:
    from io import BytesIO

    from PIL import Image

    stream = BytesIO()
    array = image.squeeze(-1).numpy() if image.shape[-1] == 1 else image.numpy()
    Image.fromarray(array).save(stream, format="PNG", compress_level=3)
    return stream.getvalue()


def fill(
    folder: Path,
    missing: Sequence[int],
    unet: nn.Module,
    scheduler: Any,
    *,
    steps: int,
    kind: str,
    seed: int,
    batch_size: int,
    dtype: torch.dtype | None = None,
    even: bool = False,
    progress: bool = False,
    note: Callable[[str], None] | None = None,
    kept: int = 0,
) -> Drawn:
    """Draw the missing images and write 000000.png, 000001.png, …; encoding runs beside the network.

    Raises:
        OSError: writing failed; the line says how many images are complete. Those stay, and a later call goes on.
    """
    parts = sampling.draw(
        unet, scheduler, missing, steps=steps, kind=kind, seed=seed, batch_size=batch_size, dtype=dtype, even=even,
        progress=progress, note=note,
    )  # fmt: skip
    begin = time.perf_counter()
    first: tuple[float, int] | None = None
    done = 0
    with ThreadPoolExecutor(max_workers=4) as pool:
        pending: list[Any] = []

        def settle() -> None:
            nonlocal done
            for job in pending:
                job.result()
                done += 1
            pending.clear()

        try:
            for indices, images in parts:
                settle()  # the batch before this one
                pending += [
                    pool.submit(lambda i, image: _write(folder / f"{i:06d}.png", _png(image)), i, image)
                    for i, image in zip(indices, images, strict=True)
                ]
                if first is None:
                    first = (time.perf_counter(), len(indices))
            settle()
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(
                f"{folder}: writing failed ({reason}); {kept + done} of {kept + len(missing)} images are complete, "
                "the same command goes on from there"
            ) from None
    end = time.perf_counter()
    steady = None
    if first is not None and len(missing) > first[1] and end > first[0]:
        steady = (len(missing) - first[1]) / (end - first[0])
    return Drawn(len(missing), kept, end - begin, steady)
