"""The operation `compact` of every backend: exact gathers, any dtype, both memory formats, many tensors at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wanda_fast import ops, reference

OP = "compact"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool, torch.complex64]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(0, 100, shape).to(dtype)


def keep(size: int, count: int) -> Tensor:
    return torch.randperm(size)[:count].sort().values


def network() -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Weights, biases and norms of a small network, pruned in every way a layer can be."""
    tensors = [
        values(32, 3, 3, 3),
        values(32),
        values(48, 32, 3, 3),
        values(48, 32, 1, 1),
        values(64, 48),
        values(64, 48),
        values(17, 31, 3, 3),
        values(7, 5),
        values(20, 8, 3),
        values(12, 6, 3, 3, 3),
    ]
    rows = [keep(32, 20), keep(32, 20), keep(48, 30), None, keep(64, 1), None, keep(17, 16), keep(7, 0), keep(20, 11), None]
    columns = [None, None, keep(32, 20), keep(32, 31), None, keep(48, 17), keep(31, 13), None, keep(8, 3), keep(6, 2)]
    return tensors, rows, columns


def check(
    tensors: list[Tensor],
    rows: list[Tensor | None],
    columns: list[Tensor | None],
    target: tuple[str, str],
    dtype: torch.dtype | None = None,
) -> None:
    backend, device = target

    def move(items: list[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else t.to(device) for t in items]

    moved = [t.to(device) for t in tensors]
    results = ops.compact(moved, move(rows), move(columns), dtype=dtype, backend=backend)
    assert len(results) == len(tensors)
    for got, source, t, r, c in zip(results, moved, tensors, rows, columns, strict=True):
        expected = t if r is None else t[r]
        expected = expected if c is None else expected[:, c]
        if dtype is not None and t.dtype in ops.FLOAT_DTYPES:
            expected = expected.to(dtype)
        assert got.dtype == expected.dtype
        assert torch.equal(got.cpu(), expected) or torch.allclose(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)
        assert got.is_contiguous(memory_format=reference.memory_format(source)), got.stride()
        assert got.numel() == 0 or got.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()


def test_network(target: tuple[str, str]) -> None:
    check(*network(), target)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_dtypes(dtype: torch.dtype, target: tuple[str, str]) -> None:
    tensors, rows, columns = network()
    check([t.to(dtype) for t in tensors], rows, columns, target)


def test_mixed_dtypes_and_formats(target: tuple[str, str]) -> None:
    tensors, rows, columns = network()
    tensors = [t.to(dtype) for t, dtype in zip(tensors, [*DTYPES, *DTYPES], strict=False)]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    tensors[6] = tensors[6].to(memory_format=torch.channels_last)
    check(tensors, rows, columns, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_channels_last_stays(dtype: torch.dtype, target: tuple[str, str]) -> None:
    tensors = [values(24, 17, 3, 3, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(4)]
    check(tensors, [keep(24, 9), None, keep(24, 9), None], [keep(17, 5), keep(17, 5), None, None], target)


@pytest.mark.parametrize("wanted", ops.FLOAT_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_cast(wanted: torch.dtype, target: tuple[str, str]) -> None:
    """Rounded as PyTorch rounds; other types and the memory format stay."""
    tensors, rows, columns = network()
    for dtype in DTYPES:
        scattered = [t.to(dtype) if not dtype.is_floating_point else torch.randn(t.shape).to(dtype) for t in tensors]
        scattered[2] = scattered[2].to(memory_format=torch.channels_last)
        check(scattered, rows, columns, target, wanted)
        check(scattered, [None] * len(tensors), [None] * len(tensors), target, wanted)


@pytest.mark.parametrize("wanted", ops.FLOAT_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("dtype", ops.FLOAT_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_cast_of_special_values(dtype: torch.dtype, wanted: torch.dtype, target: tuple[str, str]) -> None:
    """Subnormals, ties, overflow, infinities and NaN of the narrower types; every bit pattern of the half types."""
    if dtype.itemsize == 2:
        t = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    else:
        edges = torch.arange(0, 2**16, 7, dtype=torch.int32) << 16
        near = torch.cat([edges, edges + 0x7FFF, edges + 0x8000, edges + 0x8001, edges + 0x0FFF, edges + 0x1000, edges + 0x1001])
        t = near.view(torch.float32).to(dtype)
    t = t[: len(t) // 8 * 8].view(8, -1)
    check([t, t.flatten()], [torch.tensor([7, 0, 3]), None], [torch.arange(1, t.shape[1]), None], target, wanted)


def test_cast_of_a_network_to_no_float_is_refused(target: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"dtype: must be float32.*not torch\.int8"):
        ops.compact([torch.ones(3)], [None], [None], dtype=torch.int8, backend=target[0])


def test_sliced_inputs(target: tuple[str, str]) -> None:
    tensors = [values(40, 33, 3, 3)[::2], values(20, 66)[:, 1::2], values(33, 20).t(), values(60)[::3]]
    check(tensors, [keep(20, 7)] * 4, [keep(33, 12)] * 3 + [None], target)


def test_single_entries_and_rows_of_slices(target: tuple[str, str]) -> None:
    """The stride of a dimension of size 1 means nothing; the memory format is that of the rest, as under a compiler."""
    backend, device = target
    wide = values(4, 17, 3, 3).to(memory_format=torch.channels_last)
    tensors = [values(10)[3::5][:1], values(1, 7)[:, 2], values(4, 3)[::2, 1:2][:1], wide[::2][:1], values(4, 6, 3, 3)[::2][:1]]
    tensors.append(values(4, 5, 2, 3, 3).to(memory_format=torch.channels_last_3d)[::3][:1])
    rows, columns = [torch.tensor([0]), None, None, torch.tensor([0]), None, None], [None, None, None, keep(17, 5), keep(6, 2), keep(5, 3)]
    for dtype in (None, torch.float16):
        moved = [torch.as_strided(t._base.to(device), t.shape, t.stride(), t.storage_offset()) for t in tensors]
        keeps = [[None if k is None else k.to(device) for k in part] for part in (rows, columns)]
        results = ops.compact(moved, *keeps, dtype=dtype, backend=backend)
        wanted = reference.compact(moved, *keeps, dtype)
        for got, want, fake in zip(results, wanted, ops._fake_compact(moved, *keeps, dtype), strict=True):
            assert torch.equal(got, want) and got.dtype == want.dtype
            strides = [[step for step, size in zip(t.stride(), t.shape, strict=True) if size > 1] for t in (got, fake)]
            assert strides[0] == strides[1]


def test_runs_and_order(target: tuple[str, str]) -> None:
    """Long runs of neighbours, repeated and descending indices: any index list is a gather."""
    tensors = [values(64, 128), values(64, 128, 3, 3), values(64, 128)]
    long = torch.cat([torch.arange(0, 50), torch.arange(60, 128)])
    mixed = torch.tensor([5, 5, 4, 127, 0])
    check(tensors, [torch.tensor([63, 0, 0]), None, mixed % 64], [long, long, mixed], target)


def test_index_of_a_strided_keep(target: tuple[str, str]) -> None:
    check([values(10, 10)], [torch.arange(10)[::3]], [torch.arange(10).flip(0)], target)


def test_no_tensors() -> None:
    assert ops.compact([], [], []) == []


def test_parameters_give_plain_tensors(target: tuple[str, str]) -> None:
    backend, device = target
    weight = torch.nn.Parameter(torch.randn(4, 3, device=device))
    (result,) = ops.compact([weight], [torch.tensor([1], device=device)], [None], backend=backend)
    assert not result.requires_grad and torch.equal(result, weight.detach()[1:2])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cpu_on_any_shape(data: st.DataObject) -> None:
    if reason := ops.available_backends("cpu")["cpu"]:
        pytest.skip(reason)
    tensors, rows, columns = [], [], []
    for _ in range(data.draw(st.integers(1, 5))):
        shape = [data.draw(st.integers(1, 40)) for _ in range(data.draw(st.integers(1, 4)))]
        t = values(*shape, dtype=data.draw(st.sampled_from(DTYPES)))
        if len(shape) == 4 and data.draw(st.booleans()):
            t = t.to(memory_format=torch.channels_last)
        tensors.append(t)
        rows.append(keep(shape[0], data.draw(st.integers(0, shape[0]))) if data.draw(st.booleans()) else None)
        wanted = len(shape) > 1 and data.draw(st.booleans())
        columns.append(keep(shape[1], data.draw(st.integers(0, shape[1]))) if wanted else None)
    check(tensors, rows, columns, ("cpu", "cpu"))


def test_opcheck(target: tuple[str, str]) -> None:
    _, device = target
    tensors = [torch.randn(6, 4, 3, 3, device=device), torch.randn(6, device=device), torch.randn(5, 4, device=device)]
    tensors.append(torch.randn(6, 4, 3, 3, device=device).to(memory_format=torch.channels_last))
    rows = [torch.tensor([0, 2], device=device), torch.tensor([1], device=device), None, None]
    columns = [torch.tensor([0, 3], device=device), None, None, torch.tensor([2, 3], device=device)]
    torch.library.opcheck(torch.ops.wanda_fast.compact.default, (tensors, rows, columns))
    torch.library.opcheck(torch.ops.wanda_fast.compact.default, (tensors, rows, columns, torch.bfloat16))


@pytest.mark.parametrize(
    ("tensors", "rows", "columns", "message"),
    [
        ([torch.ones(3, 3)], [], [None], r"keep_out, keep_in: .*1, not 0 and 1"),
        ([torch.ones(())], [None], [None], r"tensors\[0\]: at least one|tensors\[0\]: must have at least one"),
        ([torch.ones(3)], [None], [torch.tensor([0])], r"keep_in\[0\]: must be None .*\[3\]"),
        ([torch.ones(3, 3)], [torch.tensor([0.0])], [None], r"keep_out\[0\]: .*float32"),
        ([torch.ones(3, 3)], [None], [torch.tensor([[0]])], r"keep_in\[0\]: .*\[1, 1\]"),
        ([torch.ones(3, 3)], [torch.tensor([0, 3])], [None], r"keep_out\[0\]: index 3 is outside \[0, 3\)"),
        ([torch.ones(3), torch.ones(3, 2)], [None] * 2, [None, torch.tensor([-1])], r"keep_in\[1\]: index -1 is outside \[0, 2\)"),
        ([torch.ones(3), torch.ones(3, device="meta")], [None] * 2, [None] * 2, r"tensors\[1\]: is on meta"),
        ([torch.ones(3)], [torch.zeros(1, dtype=torch.int64, device="meta")], [None], r"keep_out\[0\]: is on meta"),
    ],
)
def test_errors_name_argument_and_value(tensors, rows, columns, message: str, cpu_target: tuple[str, str]) -> None:
    backend, _ = cpu_target  # every device has the same checks; indices are only looked at here
    with pytest.raises(ValueError, match=message):
        ops.compact(tensors, rows, columns, backend=backend)
