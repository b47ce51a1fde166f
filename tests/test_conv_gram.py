"""`conv_gram` of every backend against unfolded patches in float64, and the pieces it is made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wanda_fast import conv_gram as module
from wanda_fast import ops, reference

OP = "conv_gram"


# name -> (N, C, H, W, C_out, kernel, stride, padding)
CASES: dict[str, tuple[Any, ...]] = {
    "3x3-pad1": (3, 5, 8, 8, 4, (3, 3), (1, 1), (1, 1)),
    "3x3-pad1-wide": (2, 70, 4, 6, 20, (3, 3), (1, 1), (1, 1)),
    "3x3-pad1-1x1": (2, 3, 1, 1, 2, (3, 3), (1, 1), (1, 1)),
    "3x3-pad1-1x7": (1, 2, 1, 7, 1, (3, 3), (1, 1), (1, 1)),
    "3x3-pad1-2x3": (3, 2, 2, 3, 2, (3, 3), (1, 1), (1, 1)),
    "3x3-pad1-primes": (1, 7, 13, 11, 3, (3, 3), (1, 1), (1, 1)),
    "3x3-pad0": (2, 3, 6, 5, 4, (3, 3), (1, 1), (0, 0)),
    "3x3-stride2-pad0": (2, 4, 9, 9, 3, (3, 3), (2, 2), (0, 0)),
    "3x3-stride2-pad1": (2, 4, 8, 6, 3, (3, 3), (2, 2), (1, 1)),
    "1x1": (3, 6, 5, 4, 2, (1, 1), (1, 1), (0, 0)),
    "linear": (37, 6, 1, 1, 5, (1, 1), (1, 1), (0, 0)),
    "2x3-uneven": (2, 3, 6, 5, 2, (2, 3), (1, 2), (1, 0)),
}
EMPTY: dict[str, tuple[Any, ...]] = {
    "no_samples": (0, 4, 5, 5, 3, (3, 3), (1, 1), (1, 1)),
    "no_samples-1x1": (0, 4, 1, 1, 3, (1, 1), (1, 1), (0, 0)),
    "no_outputs": (2, 4, 5, 5, 0, (3, 3), (1, 1), (1, 1)),
    "no_channels": (2, 0, 5, 5, 3, (3, 3), (1, 1), (1, 1)),
    "no_channels-1x1": (2, 0, 5, 4, 3, (1, 1), (1, 1), (0, 0)),
    "no_channels-stride2": (2, 0, 5, 4, 3, (3, 3), (2, 2), (1, 1)),
}


def tensors(case: tuple[Any, ...]) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    n, c, h, w, c_out, kernel, stride, padding = case
    size = [(v + 2 * p - k) // s + 1 for v, k, s, p in zip((h, w), kernel, stride, padding, strict=True)]
    return torch.randn(n, c, h, w) + 0.5, torch.randn(n, c_out, *size), (kernel, stride, padding)


def truth(x: Tensor, y: Tensor, kernel: Any, stride: Any, padding: Any, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Straight from the definition, in float64."""
    x, y = x.double(), y.double()
    n, c = x.shape[:2]
    patches = F.unfold(x, kernel, padding=padding, stride=stride).view(n, c, kernel[0] * kernel[1], -1)
    rows = patches.permute(0, 3, 2, 1).reshape(n * patches.shape[-1], -1)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    right = y.flatten(2).transpose(1, 2).reshape(len(rows), -1)
    scale = torch.ones(n) if weight is None else weight
    scaled = rows * scale.double().repeat_interleave(patches.shape[-1])[:, None]
    return scaled.t() @ rows, scaled.t() @ right


def compare(got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
    for value, want in zip(got, exact, strict=True):
        assert value.dtype == torch.float32 and value.shape == want.shape
        scale = float(want.abs().max()) if want.numel() else 1.0
        torch.testing.assert_close(value.cpu().double(), want, rtol=2e-5, atol=3e-6 * scale + 1e-7)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("case", CASES)
def test_values(case: str, weighted: bool, target: tuple[str, str]) -> None:
    backend, device = target
    x, y, geometry = tensors(CASES[case])
    weight = torch.rand(len(x)) if weighted else None
    got = ops.conv_gram(
        x.to(device), y.to(device), *geometry, weight=None if weight is None else weight.to(device), backend=backend
    )
    compare(got, truth(x, y, *geometry, weight))
    assert torch.equal(got[0], got[0].t()) or torch.allclose(got[0], got[0].t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", EMPTY)
def test_empty(case: str, target: tuple[str, str]) -> None:
    backend, device = target
    x, y, geometry = tensors(EMPTY[case])
    xtx, xty = ops.conv_gram(x.to(device), y.to(device), *geometry, backend=backend)
    exact = reference.conv_gram(x.double(), y.double(), *geometry)
    torch.testing.assert_close(xtx.cpu().double(), exact[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(xty.cpu().double(), exact[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_definition(case: str) -> None:
    x, y, geometry = tensors(CASES[case])
    got = reference.conv_gram(x.double(), y.double(), *geometry)
    for value, want in zip(got, truth(x, y, *geometry, None), strict=True):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed"])
def test_dtypes_and_strides(dtype: torch.dtype, layout: str, target: tuple[str, str]) -> None:
    backend, device = target
    x, y, geometry = tensors(CASES["3x3-pad1"])
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.randn(3, 9, 8, 8)[:, 2:7]
    else:
        x = x.transpose(2, 3)
    x, y = x.to(dtype), y.to(dtype)
    compare(ops.conv_gram(x.to(device), y.to(device), *geometry, backend=backend), truth(x, y, *geometry, None))


@pytest.mark.parametrize("case", ["3x3-pad1", "3x3-stride2-pad1", "1x1"])
def test_a_few_samples_at_a_time(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, geometry = tensors(CASES[case])
    weight = torch.rand(len(x))
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    compare(ops.conv_gram(x, y, *geometry, weight=weight, backend="cpu"), truth(x, y, *geometry, weight))


def test_weights_come_from_the_sums_as_from_a_float64_solve(target: tuple[str, str]) -> None:
    """The normal equations of float32 sums give the weight of a float64 least-squares fit to 1e-3."""
    backend, device = target
    mix = torch.randn(12, 12) / 3
    x = F.relu(torch.einsum("dc,nchw->ndhw", mix, torch.randn(6, 12, 8, 8)))
    y = F.conv2d(x, torch.randn(5, 12, 3, 3), torch.randn(5), padding=1) + 0.1 * torch.randn(6, 5, 8, 8)
    xtx, xty = ops.conv_gram(x.to(device), y.to(device), (3, 3), (1, 1), (1, 1), backend=backend)
    exact = truth(x, y, (3, 3), (1, 1), (1, 1), None)
    got = torch.linalg.solve(xtx.cpu().double(), xty.cpu().double())
    want = torch.linalg.solve(*exact)
    assert float((got - want).norm() / want.norm()) < 1e-3


def test_weight_rows_and_back() -> None:
    for shape in ((5, 7), (5, 7, 3, 2)):
        weight = torch.randn(shape)
        rows = module.weight_rows(weight)
        assert torch.equal(module.rows_weight(rows, weight.shape), weight)
    x, _, (kernel, stride, padding) = tensors(CASES["3x3-stride2-pad1"])
    weight = torch.randn(6, 4, 3, 3)
    out = F.conv2d(x, weight, stride=stride, padding=padding)
    rows = module.patch_rows(x, kernel, stride, padding, None) @ module.weight_rows(weight)
    torch.testing.assert_close(rows, module.map_rows(out, None), rtol=1e-5, atol=1e-5)


def test_rows_at_positions() -> None:
    x, y, (kernel, stride, padding) = tensors(CASES["3x3-pad1-primes"])
    positions = torch.tensor([[0, 10, 142, 71]])
    everything = module.patch_rows(x, kernel, stride, padding, None)
    assert torch.equal(module.patch_rows(x, kernel, stride, padding, positions), everything[positions[0]])
    assert torch.equal(module.map_rows(y, positions), module.map_rows(y, None)[positions[0]])


def test_opcheck(target: tuple[str, str]) -> None:
    backend, device = target
    op = ops._OPS[OP].triton if backend == "triton" else torch.ops.wanda_fast.conv_gram.default
    x, y, geometry = tensors(CASES["3x3-pad1-2x3"])
    torch.library.opcheck(op, (x.to(device), y.to(device), *geometry, None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x: .*\[2, 3, 4\]"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, r"x: .*int32"),
        ({"y": torch.zeros(3, 2, 4, 4)}, r"y: .*2 samples"),
        ({"y": torch.zeros(2, 2, 4, 3)}, r"y: .*4 x 4"),
        ({"stride": (2, 2)}, r"y: .*2 x 2"),
        ({"kernel_size": (0, 3)}, r"kernel_size: .*at least 1"),
        ({"padding": (-1, 0)}, r"padding: .*at least 0"),
        ({"weight": torch.zeros(3)}, r"weight: .*\[2\]"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 3, 4, 4),
        "y": torch.zeros(2, 2, 4, 4),
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "weight": None,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        ops.conv_gram(**arguments)


def test_an_unavailable_backend_is_refused() -> None:
    x, y, geometry = tensors(CASES["1x1"])
    with pytest.raises(RuntimeError, match="conv_gram"):
        ops.conv_gram(x, y, *geometry, backend="cuda")


# ------------------------------------------------------------------------------------------- sums of a 3 x 3 convolution in C++

needs_extension = pytest.mark.skipif(bool(ops.available_backends()["cpu"]), reason="the compiled extension is missing")
SUMS = [c for n, c in {**CASES, **EMPTY}.items() if n.startswith("3x3-pad1") or n in ("no_samples", "no_outputs")]
SUMS += [(9, 64, 5, 7, 33, (3, 3), (1, 1), (1, 1)), (2, 25, 16, 16, 12, (3, 3), (1, 1), (1, 1)), (1, 9, 40, 40, 2, (3, 3), (1, 1), (1, 1))]


def close(got: Any, exact: Any) -> None:
    for value, want in zip(got, exact, strict=True):
        assert value.dtype == torch.float32 and value.shape == want.shape
        scale = float(want.abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(value.double(), want.double(), rtol=0, atol=2e-6 * scale + 1e-30)


@needs_extension
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", SUMS, ids=lambda c: "x".join(map(str, c[:5])))
def test_sums_in_cpp(case: tuple[Any, ...], weighted: bool) -> None:
    x, y, _ = tensors(case)
    weight = torch.rand(2 * len(x))[::2] if weighted else None
    exact = module.shift_sums(x.double(), y.double(), weight)
    close(torch.ops.wanda_fast.conv_gram_sums(x, y, weight), exact)
    if x.numel():
        again = [torch.ops.wanda_fast.conv_gram_sums(x, y, weight) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_sums_in_cpp_of_any_layout_and_dtype(dtype: torch.dtype) -> None:
    wide_x, wide_y = torch.randn(6, 20, 9, 22).to(dtype), torch.randn(3, 8, 9, 11).to(dtype)
    x, y = wide_x[::2, 1:18, :, ::2], wide_y
    layouts = [(x, y), (x.contiguous(), y), (x.contiguous(memory_format=torch.channels_last), y.transpose(2, 3).contiguous().transpose(2, 3))]
    for one, other in layouts:
        close(torch.ops.wanda_fast.conv_gram_sums(one, other, None), module.shift_sums(x.double(), y.double()))


@needs_extension
def test_sums_in_cpp_do_not_depend_on_the_threads() -> None:
    x, y, _ = tensors((3, 40, 12, 12, 30, (3, 3), (1, 1), (1, 1)))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.ops.wanda_fast.conv_gram_sums(x, y, None))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_extension
def test_sums_in_cpp_take_several_blocks_of_samples() -> None:
    """More than the tables hold at a time."""
    x, y, _ = tensors((90, 40, 16, 16, 8, (3, 3), (1, 1), (1, 1)))
    weight = torch.rand(90)
    assert 90 * 256 * 4 * (48 + 48 + 16) > 8 << 20  # rows of 48, 48 and 16 floats
    close(torch.ops.wanda_fast.conv_gram_sums(x, y, weight), module.shift_sums(x.double(), y.double(), weight))


@needs_extension
def test_opcheck_of_the_sums() -> None:
    x, y, _ = tensors(CASES["3x3-pad1"])
    torch.library.opcheck(torch.ops.wanda_fast.conv_gram_sums.default, (x, y, None))
    torch.library.opcheck(torch.ops.wanda_fast.conv_gram_sums.default, (x, y, torch.rand(3)))


@needs_extension
def test_the_cpu_backend_uses_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, geometry = tensors(CASES["3x3-pad1"])
    monkeypatch.setattr(module, "conv_gram_shift", lambda *a: pytest.fail("products of matrices instead of C++"))
    compare(ops.conv_gram(x, y, *geometry, backend="cpu"), truth(x, y, *geometry, None))
    monkeypatch.undo()
    monkeypatch.setattr(ops, "_has_kernel", lambda op, key: op != "conv_gram_sums")
    compare(ops.conv_gram(x, y, *geometry, backend="cpu"), truth(x, y, *geometry, None))
