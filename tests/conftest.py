"""Shared fixtures. Without a GPU, Triton kernels run under the interpreter, so that their values are tested everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # read when triton is first imported, so it has to be set here
    os.environ.setdefault("TRITON_INTERPRET", "1")

from wanda_fast import ops  # noqa: E402

# Beside other test processes (pytest -n) each keeps to one core: two thread pools on two cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")  # for subprocesses
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# (backend, device) of every implementation that an operation may have.
TARGETS = [("reference", "cpu"), ("cpu", "cpu"), ("triton", "cpu"), ("reference", "cuda"), ("triton", "cuda"), ("cuda", "cuda")]


def targets_of(op: str) -> list[tuple[str, str]]:
    """Those of TARGETS that the operation is written for."""
    return [target for target in TARGETS if target[0] in ("reference", *ops._OPS[op].homes)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `target` runs once for each implementation of its module's operation (`OP`)."""
    if "target" in metafunc.fixturenames:
        targets = targets_of(metafunc.module.OP)
        metafunc.parametrize("target", targets, indirect=True, ids=[f"{b}-{d}" for b, d in targets])
    if "cpu_target" in metafunc.fixturenames:
        targets = [target for target in targets_of(metafunc.module.OP) if target[1] == "cpu"]
        metafunc.parametrize("cpu_target", targets, indirect=True, ids=[f"{b}-{d}" for b, d in targets])


def _usable(backend: str, device: str) -> tuple[str, str]:
    if device == "cuda" and not HAS_GPU:
        pytest.skip("no GPU is visible")
    reason = ops.available_backends(device)[backend]
    if reason:
        pytest.skip(f"backend {backend} on {device}: {reason}")
    return backend, device


@pytest.fixture
def target(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device); skipped, with the reason, where this machine or build has none."""
    return _usable(*request.param)


@pytest.fixture
def cpu_target(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The same for tests of what is only done, or done alike, on the CPU."""
    return _usable(*request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """With WANDA_FAST_GPU_SUITE=1 a GPU test that is skipped fails: that run is to show that all of them ran.

    A GPU test is one marked `gpu`, or one whose target is on a GPU. Targets that the operation has no implementation for are never made.
    """
    report = yield
    if os.environ.get("WANDA_FAST_GPU_SUITE", "0") not in ("", "0") and report.skipped and not hasattr(report, "wasxfail"):
        target = getattr(item, "callspec", None) and item.callspec.params.get("target")
        if item.get_closest_marker("gpu") is not None or (target and target[1] == "cuda"):
            report.outcome = "failed"
            report.longrepr = f"skipped in a run of the GPU suite: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Fresh memory is filled with NaN, so an output that is not fully written fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restore_backend() -> Iterator[None]:
    """Undo `ops.set_backend` after the test."""
    before = ops.get_backend()
    yield
    ops._current = before
    ops._selected.clear()
