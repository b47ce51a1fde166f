"""Which backend "auto" takes where: CUDA, ROCm and XPU devices, and builds that lack a part. No such device is needed."""

from __future__ import annotations

import logging

import pytest
import torch

from wanda_fast import ops


def choose(
    monkeypatch: pytest.MonkeyPatch, operation: str, device: str, *, hip: bool = False, missing: tuple[str, ...] = (), asked: str = "auto"
) -> str:
    """Backend of an operation on a machine with everything but `missing`."""
    monkeypatch.setattr(torch.version, "hip", "6.4" if hip else None)
    monkeypatch.setattr(ops, "_triton_error", lambda device_type: "no triton" if "triton" in missing or device_type == "mps" else "")
    monkeypatch.setattr(ops, "_native_error", lambda backend, device_type: f"no {backend}" if backend in missing else "")
    monkeypatch.setattr(ops, "_has_kernel", lambda op, key: key.lower() not in missing and not (hip and key == "CUDA"))
    monkeypatch.setattr(ops, "_logged", set())
    return ops._decide(ops._OPS[operation], asked, device)[0]


@pytest.mark.parametrize("operation", ["channel_sq_norm", "wanda_score", "wanda_score_stats"])
@pytest.mark.parametrize(("device", "hip"), [("cuda", False), ("cuda", True), ("xpu", False)], ids=["cuda", "rocm", "xpu"])
def test_triton_wherever_it_runs(operation: str, device: str, hip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, operation, device, hip=hip) == "triton"
    assert choose(monkeypatch, operation, device, hip=hip, missing=("triton",)) == "reference"


def test_compact_is_cuda_on_cuda_and_the_reference_on_rocm_and_xpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, "compact", "cuda") == "cuda"
    assert choose(monkeypatch, "compact", "cuda", hip=True) == "reference"
    assert choose(monkeypatch, "compact", "xpu") == "reference"
    assert choose(monkeypatch, "compact", "cuda", missing=("cuda",)) == "reference"


@pytest.mark.parametrize(("device", "hip"), [("cuda", True), ("xpu", False)], ids=["rocm", "xpu"])
def test_conv_gram_never_asks_for_cuda_where_there_is_none(device: str, hip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, "conv_gram", device, hip=hip) == "triton"
    assert choose(monkeypatch, "conv_gram", device, hip=hip, missing=("triton",)) == "reference"


@pytest.mark.parametrize("operation", ["channel_sq_norm", "wanda_score", "compact", "conv_gram"])
def test_cpu_is_cpp_and_triton_there_is_only_for_tests(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(monkeypatch, operation, "cpu") == "cpu"
    assert choose(monkeypatch, operation, "cpu", missing=("cpu",)) == "reference"
    assert choose(monkeypatch, operation, "mps") == "reference"


def test_stepping_down_is_logged_once_with_the_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="wanda_fast"):
        choose(monkeypatch, "channel_sq_norm", "cuda", missing=("triton",))
        ops._decide(ops._OPS["wanda_score"], "auto", "cuda")
    assert [r.getMessage() for r in caplog.records] == ["channel_sq_norm: triton is not used, reference is: no triton"]


@pytest.mark.parametrize(("asked", "device"), [("triton", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_a_named_backend_never_falls_back(asked: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = "compact" if asked == "cuda" else "channel_sq_norm"
    with pytest.raises(RuntimeError, match=f"{operation}: backend '{asked}' is not available: no {asked}"):
        choose(monkeypatch, operation, device, missing=(asked,), asked=asked)
    with pytest.raises(RuntimeError, match="has no"):
        choose(monkeypatch, "compact", "xpu", asked="triton")


def test_an_extension_without_cuda_is_no_cuda_backend(monkeypatch: pytest.MonkeyPatch, restore_backend: None) -> None:
    """Though conv_gram, written in Python, has a version for CUDA tensors: a GPU machine without nvcc builds the C++ part alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "_extension_error", "")
    monkeypatch.setattr(ops, "_has_kernel", lambda op, key: key == "CPU" or op == "conv_gram")
    assert ops.available_backends()["cuda"] == ops.available_backends("cuda")["cuda"] == "the compiled extension was built without CUDA"
    assert "cuda (the compiled extension was built without CUDA)" in ops.describe_backends()
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: the compiled extension was built without CUDA"):
        ops.set_backend("cuda")
    assert ops._decide(ops._OPS["conv_gram"], "cuda", "cuda")[0] == "cuda"
