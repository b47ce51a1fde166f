"""Runs of the program that tests share: tiny counts, and ways to start it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from wanda_fast.cli import main

ROOT = Path(__file__).resolve().parent.parent
# Options of `prune` that make a run of the bundled model a matter of seconds.
TINY: dict[str, Any] = {
    "device": "cpu",
    "split": "uniform",
    "calib_steps": 16,
    "num_samples": 2,
    "num_inference_steps": 3,
    "repair": "none",
    "repair_images": 16,
    "batch_size": 4,
}
FAST: dict[str, Any] = {**TINY, "pruner": "magnitude", "num_samples": 0}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For modules that import it: passes this small gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flags(options: dict[str, Any]) -> list[str]:
    """The options as words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def cli(*words: Any) -> int:
    """`wanda-fast prune` in this process; its exit code."""
    return main(["prune", *map(str, words)])


def script(code: str, *words: Any, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """A Python program in a process of its own, with the repository importable and no GPU."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **(env or {})},
    )


def tree(folder: Path) -> list[str]:
    """Files below a folder, hidden ones included."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
