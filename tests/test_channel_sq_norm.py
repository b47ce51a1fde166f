"""`channel_sq_norm` of every backend against the float64 reference: values, layouts, dtypes, repeatability, errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wanda_fast import ops, reference

OP = "channel_sq_norm"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def nchw(*shape: int) -> Tensor:
    return torch.randn(shape)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "conv_in-2x3x32x32": lambda: nchw(2, 3, 32, 32),
    "level0-2x128x16x16": lambda: nchw(2, 128, 16, 16),
    "level3-3x512x4x4": lambda: nchw(3, 512, 4, 4),
    "ones-1x1x1x1": lambda: nchw(1, 1, 1, 1),
    "63-2x63x5x5": lambda: nchw(2, 63, 5, 5),
    "primes-3x17x7x11": lambda: nchw(3, 17, 7, 11),
    "hw1-4x70x1x1": lambda: nchw(4, 70, 1, 1),
    "empty_n-0x8x4x4": lambda: nchw(0, 8, 4, 4),
    "empty_hw-2x8x0x4": lambda: nchw(2, 8, 0, 4),
    "channels_last-2x130x9x9": lambda: nchw(2, 130, 9, 9).to(memory_format=torch.channels_last),
    "channels_last-2x64x16x16": lambda: nchw(2, 64, 16, 16).to(memory_format=torch.channels_last),
    "channels_last-primes-2x67x3x5": lambda: nchw(2, 67, 3, 5).to(memory_format=torch.channels_last),
    "channels_last-sliced_w": lambda: nchw(2, 40, 6, 40).to(memory_format=torch.channels_last)[..., 1:38],
    "sliced_hw": lambda: nchw(2, 9, 8, 8)[:, :, 1:7, 2:7],
    "every_second_pixel": lambda: nchw(2, 9, 8, 8)[:, :, ::2, ::2],
    "sliced_channels": lambda: nchw(3, 20, 5, 5)[:, 3:16],
    "every_second_sample": lambda: nchw(5, 12, 6, 6)[::2],
    "transposed_hw": lambda: nchw(2, 12, 6, 10).transpose(2, 3),
    "expanded_n": lambda: nchw(1, 6, 4, 4).expand(4, 6, 4, 4),
    "tokens-2x50x33": lambda: nchw(2, 50, 33),
    "tokens-channel_major": lambda: nchw(2, 33, 50).transpose(1, 2),
    "tokens-1x7x130": lambda: nchw(1, 7, 130),
    "vectors-5x31": lambda: nchw(5, 31),
    "vectors-0x31": lambda: nchw(0, 31),
    "vectors-transposed": lambda: nchw(31, 5).t(),
}
# Larger inputs, for the paths that several threads share; too slow for Triton's interpreter.
LARGE: dict[str, Callable[[], Tensor]] = {
    "8x128x32x32": lambda: nchw(8, 128, 32, 32),
    "8x128x32x32-channels_last": lambda: nchw(8, 128, 32, 32).to(memory_format=torch.channels_last),
    "2x3x256x256": lambda: nchw(2, 3, 256, 256),
    "1x1x500x500": lambda: nchw(1, 1, 500, 500),
    "7x1021": lambda: nchw(7, 1021),
    "128x1280": lambda: nchw(128, 1280),
    "4x1024x77": lambda: nchw(4, 1024, 77),
}


def run(x: Tensor, rows: Tensor, start: Tensor, backend: str) -> Tensor:
    return ops.channel_sq_norm(x, rows, start.clone(), backend=backend)


def check(x: Tensor, rows: Tensor, target: tuple[str, str]) -> None:
    backend, device = target
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    start = torch.rand(4, channels)
    truth = reference.channel_sq_norm(x.double(), rows, start.double())
    # Plain PyTorch in the same dtypes, the error that is allowed twice.
    plain = reference.channel_sq_norm(x, rows, start.clone())
    ours = run(x.to(device), rows.to(device), start.to(device), backend).cpu()
    assert ours.dtype == torch.float32
    allowed = 2 * (plain.double() - truth).abs().max() if truth.numel() else torch.tensor(0.0)
    torch.testing.assert_close(ours.double(), truth, rtol=2e-7, atol=float(allowed) + 1e-6)


def strided_as(x: Tensor, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """The same values and strides in another dtype: `x.to` would make sliced inputs dense."""
    base = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return torch.as_strided(base.to(device=device, dtype=dtype), x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values(layout: str, dtype: torch.dtype, target: tuple[str, str]) -> None:
    x = strided_as(LAYOUTS[layout](), dtype)
    rows = torch.randint(4, (x.shape[0],))
    backend, device = target
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    start = torch.rand(4, channels)
    truth = reference.channel_sq_norm(x.double(), rows, start.double())
    plain = reference.channel_sq_norm(x, rows, start.clone())
    moved = strided_as(x, dtype, device)
    assert moved.stride() == x.stride()
    ours = run(moved, rows.to(device), start.to(device), backend).cpu()
    allowed = 2 * float((plain.double() - truth).abs().max()) if truth.numel() else 0.0
    torch.testing.assert_close(ours.double(), truth, rtol=2e-7, atol=allowed + 1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=["fp32", "fp16", "bf16", "fp64"])
@pytest.mark.parametrize("layout", LARGE)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_large_values_on_cpu(layout: str, dtype: torch.dtype, backend: str) -> None:
    if reason := ops.available_backends("cpu")[backend]:
        pytest.skip(reason)
    x = LARGE[layout]().to(dtype)
    check(x, torch.arange(x.shape[0]) % 4, (backend, "cpu"))


@pytest.mark.parametrize("layout", ["channels_last-2x130x9x9", "63-2x63x5x5", "tokens-2x50x33", "vectors-5x31"])
def test_infinities_nan_and_subnormals_arrive(layout: str, target: tuple[str, str]) -> None:
    backend, device = target
    for dtype in DTYPES:
        x = LAYOUTS[layout]().to(dtype)
        flat = x.reshape(x.shape[0], -1)
        flat.zero_()
        tiny = torch.finfo(dtype).smallest_normal / 8
        flat[0, :3] = torch.tensor([float("inf"), float("nan"), tiny], dtype=dtype)
        x = flat.view(x.shape)
        rows = torch.zeros(x.shape[0], dtype=torch.int64)
        out = torch.zeros(1, x.shape[1] if x.dim() == 4 else x.shape[-1])
        truth = reference.channel_sq_norm(x.double(), rows, out.double()).float()
        ours = ops.channel_sq_norm(x.to(device), rows.to(device), out.to(device), backend=backend).cpu()
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=0, equal_nan=True)


def test_rows_repeat_and_accumulate(target: tuple[str, str]) -> None:
    backend, device = target
    x = torch.ones(5, 3, 2, 2, device=device)
    rows = torch.tensor([1, 1, 0, 1, 1], device=device)
    out = torch.tensor([[1.0] * 3, [0.0] * 3, [7.0] * 3], device=device)
    result = ops.channel_sq_norm(x, rows, out, backend=backend)
    assert result is out
    assert out.tolist() == [[5.0] * 3, [16.0] * 3, [7.0] * 3]


def test_the_table_needs_no_gradient(target: tuple[str, str]) -> None:
    """It would hold on to every activation that was ever added."""
    backend, device = target
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    out = ops.channel_sq_norm(x, torch.tensor([0, 1], device=device), torch.zeros(2, 3, device=device), backend=backend)
    assert not out.requires_grad and bool((out > 0).all())


def test_repeats_bit_for_bit(target: tuple[str, str]) -> None:
    backend, device = target
    x = torch.randn(16, 37, 9, 9, device=device)
    rows = torch.tensor([0, 1, 0, 2] * 4, device=device)
    first = run(x, rows, torch.zeros(3, 37, device=device), backend)
    for _ in range(5):
        assert torch.equal(run(x, rows, torch.zeros(3, 37, device=device), backend), first)


@pytest.mark.parametrize("layout", LARGE)
def test_cpu_bits_do_not_depend_on_threads(layout: str) -> None:
    if reason := ops.available_backends("cpu")["cpu"]:
        pytest.skip(reason)
    x = LARGE[layout]()
    rows = torch.arange(x.shape[0]) % 3
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(run(x, rows, torch.zeros(3, channels), "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0], other)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cpu_on_any_strides(data: st.DataObject) -> None:
    if reason := ops.available_backends("cpu")["cpu"]:
        pytest.skip(reason)
    shape = [data.draw(st.integers(0, 4)), *(data.draw(st.integers(1, 20)) for _ in range(3))]
    order = data.draw(st.permutations(range(4)))
    steps = [data.draw(st.integers(1, 2)) for _ in range(4)]
    base = torch.randn([shape[d] * steps[d] for d in order])
    x = base.permute([order.index(d) for d in range(4)])[tuple(slice(None, None, s) for s in steps)]
    check(x, torch.arange(x.shape[0]) % 4, ("cpu", "cpu"))


@pytest.mark.parametrize("shape", [(2, 5, 3, 3), (2, 4, 5), (2, 5)], ids=str)
def test_opcheck(shape: tuple[int, ...], target: tuple[str, str]) -> None:
    backend, device = target
    op = ops._OPS[OP].triton if backend == "triton" else torch.ops.wanda_fast.channel_sq_norm.default
    args = (torch.randn(shape, device=device), torch.tensor([1, 0], device=device), torch.zeros(3, 5, device=device))
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, r"x: .*\[3\]"),
        ({"x": torch.zeros(2, 5, dtype=torch.int32)}, r"x: .*int32"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, r"rows: .*\[2\].*\[3\]"),
        ({"rows": torch.zeros(2, dtype=torch.int32)}, r"rows: .*int32"),
        ({"rows": torch.tensor([0, 4])}, r"rows: .*4 is outside \[0, 4\)"),
        ({"rows": torch.tensor([-1, 0])}, r"rows: .*-1 is outside \[0, 4\)"),
        ({"out": torch.zeros(4, 6)}, r"out: .*\[R, 5\].*\[4, 6\]"),
        ({"out": torch.zeros(4, 5, dtype=torch.float64)}, r"out: .*float64"),
        ({"out": torch.zeros(5, 4).t()}, r"out: must be contiguous"),
        ({"out": torch.zeros(4, 5, device="meta")}, r"out: is on meta, but x is on cpu"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, r"rows: is on meta, but x is on cpu"),
    ],
)
def test_errors_name_argument_and_value(change: dict[str, Tensor], message: str, cpu_target: tuple[str, str]) -> None:
    backend, _ = cpu_target  # every device has the same checks; indices are only looked at here
    args = {"x": torch.ones(2, 5, 3, 3), "rows": torch.tensor([0, 3]), "out": torch.zeros(4, 5), **change}
    before = args["out"].clone()
    with pytest.raises(ValueError, match=message):
        ops.channel_sq_norm(**args, backend=backend)
    if before.device.type == "cpu":
        assert torch.equal(args["out"], before), "nothing may be written before the error"


def test_there_is_no_cuda_implementation() -> None:
    with pytest.raises(RuntimeError, match=r"channel_sq_norm has no cuda implementation, it has reference, cpu, triton"):
        ops.channel_sq_norm(torch.ones(1, 2), torch.tensor([0]), torch.zeros(1, 2), backend="cuda")
