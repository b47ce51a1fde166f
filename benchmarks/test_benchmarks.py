"""The quick cases of bench.py through pytest-benchmark: `pytest --benchmark-only`. Plain `pytest` leaves them out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import channel_sq_norm, compact, conv_gram, wanda_score
from benchmarks.harness import Case, check

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CASES = [case for module in (channel_sq_norm, wanda_score, compact, conv_gram) for case in module.cases(DEVICE, "quick")]
RUNS = [(case, backend) for case in CASES for backend in case.candidates]


@pytest.mark.parametrize(
    "case,backend", RUNS, ids=[f"{c.op}-{c.case}-{c.dtype}-{c.layout}-{b}".replace(" ", "_") for c, b in RUNS]
)
def test_benchmark(benchmark: Any, case: Case, backend: str) -> None:
    benchmark.group = f"{case.op} {case.case} {case.dtype} {case.layout}"
    inputs = case.make(torch.Generator(device=DEVICE).manual_seed(0))
    run = case.candidates[backend]
    if backend not in case.unchecked:
        _, reference_error = check(case, "reference", case.candidates["reference"], inputs, None)
        right, error = check(case, backend, run, inputs, reference_error)
        assert right, f"wrong result, relative error {error:.3g}: no time for it"

    def call() -> None:
        run(*inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
