"""`wanda_score` and `wanda_score_stats` of every backend against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wanda_fast import ops, reference

OP = "wanda_score"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# name -> (weight, input channels)
WEIGHTS = {
    "linear-48x32": ((48, 32), 32),
    "linear-1x1": ((1, 1), 1),
    "linear-primes-61x127": ((61, 127), 127),
    "conv_in-128x3x3x3": ((128, 3, 3, 3), 3),
    "conv_out-3x128x3x3": ((3, 128, 3, 3), 128),
    "conv-64x63x3x3": ((64, 63, 3, 3), 63),
    "conv-33x65x1x1": ((33, 65, 1, 1), 65),
    "conv-5x7x5x3": ((5, 7, 5, 3), 7),
    "conv1d-9x10x3": ((9, 10, 3), 10),
    "groups2-12x5x3x3": ((12, 5, 3, 3), 10),
    "groups4-40x8x3x3": ((40, 8, 3, 3), 32),
    "depthwise-24x1x3x3": ((24, 1, 3, 3), 24),
    "empty_out-0x8": ((0, 8), 8),
    "empty_in-4x0": ((4, 0), 0),
}
LARGE = {
    "256x512x3x3": ((256, 512, 3, 3), 512),
    "320x1280": ((320, 1280), 1280),
    "67x1021x3x3": ((67, 1021, 3, 3), 1021),
}


def compare(ours: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> None:
    for got, simple, exact in zip(ours, plain, truth, strict=True):
        assert got.dtype == torch.float32
        allowed = 2 * float((simple.double() - exact).abs().max()) if exact.numel() else 0.0
        torch.testing.assert_close(got.cpu().double(), exact, rtol=2e-7, atol=allowed + 1e-6)


def check(weight: Tensor, act_norm: Tensor, target: tuple[str, str]) -> None:
    backend, device = target
    truth = reference.wanda_score(weight.detach().double(), act_norm.double())
    plain = reference.wanda_score(weight.detach(), act_norm)
    compare(ops.wanda_score(weight.to(device), act_norm.to(device), backend=backend), plain, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("case", WEIGHTS)
def test_values(case: str, dtype: torch.dtype, target: tuple[str, str]) -> None:
    shape, channels = WEIGHTS[case]
    check(torch.randn(shape).to(dtype), torch.rand(channels), target)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=["fp32", "fp16", "bf16", "fp64"])
@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_large_values_on_cpu(case: str, dtype: torch.dtype, backend: str) -> None:
    if reason := ops.available_backends("cpu")[backend]:
        pytest.skip(reason)
    shape, channels = LARGE[case]
    check(torch.randn(shape).to(dtype), torch.rand(channels), (backend, "cpu"))


STRIDED = {
    "channels_last": lambda: torch.randn(20, 33, 3, 3).to(memory_format=torch.channels_last),
    "channels_last-groups": lambda: torch.randn(20, 11, 3, 3).to(memory_format=torch.channels_last),
    "sliced_rows": lambda: torch.randn(40, 33, 3, 3)[::2],
    "sliced_columns": lambda: torch.randn(20, 66, 3, 3)[:, :33],
    "transposed_linear": lambda: torch.randn(33, 20).t(),
    "transposed_conv": lambda: torch.randn(33, 20, 3, 3).transpose(0, 1),
    "parameter": lambda: torch.nn.Parameter(torch.randn(20, 33)),
}


@pytest.mark.parametrize("case", STRIDED)
def test_strides(case: str, target: tuple[str, str]) -> None:
    weight = STRIDED[case]()
    check(weight, torch.rand(22 if case.endswith("groups") else 33), target)


def test_results_need_no_gradient(target: tuple[str, str]) -> None:
    backend, device = target
    weight = torch.randn(4, 3, device=device, requires_grad=True)
    norm, sq, row_weight = (torch.rand(shape, device=device, requires_grad=True) for shape in ((3,), (5, 3), (5,)))
    found = ops.wanda_score(weight, norm, backend=backend), ops.wanda_score_stats(weight, sq, row_weight, backend=backend)
    assert not any(result.requires_grad for pair in found for result in pair)


@pytest.mark.parametrize("rows", [1, 7, 40], ids=lambda r: f"R{r}")
@pytest.mark.parametrize("case", ["linear-primes-61x127", "conv-64x63x3x3", "groups4-40x8x3x3", "conv_in-128x3x3x3"])
def test_statistics(case: str, rows: int, target: tuple[str, str]) -> None:
    backend, device = target
    shape, channels = WEIGHTS[case]
    weight, sq, row_weight = torch.randn(shape), torch.rand(rows, channels) * 100, torch.rand(rows)
    truth = reference.wanda_score_stats(weight.double(), sq.double(), row_weight.double())
    plain = reference.wanda_score_stats(weight, sq, row_weight)
    ours = ops.wanda_score_stats(weight.to(device), sq.to(device), row_weight.to(device), backend=backend)
    compare(ours, plain, truth)


def test_repeats_bit_for_bit_over_threads() -> None:
    if reason := ops.available_backends("cpu")["cpu"]:
        pytest.skip(reason)
    weight, sq, row_weight = torch.randn(300, 150, 3, 3), torch.rand(100, 150), torch.rand(100)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(torch.cat(ops.wanda_score_stats(weight, sq, row_weight, backend="cpu")))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)], ids=str)
def test_opcheck(shape: tuple[int, ...], target: tuple[str, str]) -> None:
    backend, device = target
    suffix = "_triton" if backend == "triton" else ""
    weight = torch.randn(shape, device=device)
    torch.library.opcheck(getattr(torch.ops.wanda_fast, f"wanda_score{suffix}").default, (weight, torch.rand(4, device=device)))
    torch.library.opcheck(
        getattr(torch.ops.wanda_fast, f"wanda_score_stats{suffix}").default,
        (weight, torch.rand(5, 4, device=device), torch.rand(5, device=device)),
    )


@pytest.mark.parametrize(
    ("weight", "act_norm", "message"),
    [
        (torch.ones(4), torch.ones(4), r"weight: .*\[4\]"),
        (torch.ones(4, 3, dtype=torch.int64), torch.ones(3), r"weight: .*int64"),
        (torch.ones(4, 3), torch.ones(3, 1), r"act_norm: .*\[3, 1\]"),
        (torch.ones(4, 3), torch.ones(3, dtype=torch.int64), r"act_norm: .*int64"),
        (torch.ones(4, 3), torch.ones(5), r"act_norm: 5 channels do not fit .*\[4, 3\]"),
        (torch.ones(4, 3), torch.ones(9), r"act_norm: 9 channels do not fit .*\[4, 3\]"),
        (torch.ones(4, 3), torch.ones(3, device="meta"), r"act_norm: is on meta, but weight is on cpu"),
    ],
)
def test_errors_name_argument_and_value(weight: Tensor, act_norm: Tensor, message: str, target: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=message):
        ops.wanda_score(weight, act_norm, backend=target[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sq": torch.ones(3)}, r"sq: .*\[3\]"),
        ({"sq": torch.ones(2, 3, dtype=torch.float64)}, r"sq: .*float64"),
        ({"sq": torch.ones(2, 5)}, r"sq: 5 channels do not fit"),
        ({"row_weight": torch.ones(3)}, r"row_weight: .*\[2\].*\[3\]"),
        ({"row_weight": torch.ones(2, dtype=torch.int64)}, r"row_weight: .*int64"),
        ({"weight": torch.ones(4)}, r"weight: .*\[4\]"),
    ],
)
def test_statistics_errors(change: dict[str, Tensor], message: str) -> None:
    args = {"weight": torch.ones(4, 3), "sq": torch.ones(2, 3), "row_weight": torch.ones(2), **change}
    with pytest.raises(ValueError, match=message):
        ops.wanda_score_stats(**args)
