"""`wanda_fast.score` against the float64 formula, with every spelling, reduction, layer shape and backend."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import wanda_fast
from wanda_fast import ops

OP = "wanda_score"

# name -> (weight shape, groups)
LAYERS = {
    "linear": ((12, 7), 1),
    "conv1x1": ((12, 7, 1, 1), 1),
    "conv3x3": ((12, 7, 3, 3), 1),
    "conv5x3": ((4, 3, 5, 3), 1),
    "conv3x3-groups2": ((12, 5, 3, 3), 2),
    "conv1x1-groups4": ((12, 2, 1, 1), 4),
    "depthwise": ((9, 1, 3, 3), 9),
    "linear-1x1": ((1, 1), 1),
    "linear-0x3": ((0, 3), 1),
}


def formula(weight: Tensor, act_norm: Tensor, groups: int) -> Tensor:
    """S element by element, as the definition reads."""
    result = torch.empty(weight.shape, dtype=torch.float64)
    per_output = weight.shape[0] // groups
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            channel = o // per_output * weight.shape[1] + i
            result[o, i] = weight[o, i].double().abs() * act_norm[channel].double()
    return result


def column_sums(scores: Tensor, groups: int) -> Tensor:
    per_output = scores.shape[0] // groups
    parts = [scores[g * per_output : (g + 1) * per_output].transpose(0, 1).flatten(1).sum(1) for g in range(groups)]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layer", LAYERS)
def test_against_the_formula(layer: str, dtype: torch.dtype, target: tuple[str, str]) -> None:
    backend, device = target
    shape, groups = LAYERS[layer]
    weight, act_norm = torch.randn(shape).to(dtype), torch.rand(shape[1] * groups)
    truth = formula(weight, act_norm, groups)

    def score(reduce: str) -> Tensor:
        moved = weight.to(device), act_norm.to(device)
        result = wanda_fast.score(*moved, reduce=reduce, groups=groups, backend=backend)
        assert result.dtype == torch.float32
        return result.cpu().double()

    torch.testing.assert_close(score("none"), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(score("rows"), truth.flatten(1).sum(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(score("columns"), column_sums(truth, groups), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_float64_stays_float64(layer: str) -> None:
    shape, groups = LAYERS[layer]
    weight, act_norm = torch.randn(shape).double(), torch.rand(shape[1] * groups).double()
    truth = formula(weight, act_norm, groups)
    expected = {"none": truth, "rows": truth.flatten(1).sum(1), "columns": column_sums(truth, groups)}
    for reduce, values in expected.items():
        for backend in (None, "reference"):
            result = wanda_fast.score(weight, act_norm, reduce=reduce, groups=groups, backend=backend)
            assert result.dtype == torch.float64
            torch.testing.assert_close(result, values, rtol=1e-13, atol=1e-13)


def test_half_precision_does_not_overflow() -> None:
    weight, act_norm = torch.full((1, 1), 300.0).half(), torch.full((1,), 300.0).half()
    assert wanda_fast.score(weight, act_norm).item() == 90000.0


def test_works_on_parameters_and_gives_plain_tensors() -> None:
    layer = torch.nn.Conv2d(4, 6, 3)
    for reduce in ("none", "rows", "columns"):
        assert not wanda_fast.score(layer.weight, torch.rand(4), reduce=reduce).requires_grad


def test_a_named_backend_does_not_fall_back() -> None:
    with pytest.raises(RuntimeError, match="wanda_score has no cuda implementation"):
        wanda_fast.score(torch.ones(2, 3), torch.ones(3), reduce="rows", backend="cuda")


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((torch.ones(3), torch.ones(3)), {}, r"weight: .*\[3\]"),
        ((torch.tensor(3.0), torch.ones(3)), {}, r"weight: .*\[\]"),
        ((torch.ones(2, 3), torch.ones(4)), {}, r"act_norm: 4 channels .*\[2, 3\]"),
        ((torch.ones(2, 3), torch.ones(6)), {}, r"act_norm: 6 channels .*groups = 1"),
        ((torch.ones(2, 3), torch.ones(3)), {"groups": 2}, r"act_norm: 3 channels .*groups = 2"),
        ((torch.ones(2, 3), torch.ones(9)), {"groups": 3}, r"groups: 3 does not divide"),
        ((torch.ones(2, 3), torch.ones(3)), {"groups": 0}, r"groups: 0"),
        ((torch.ones(2, 3), torch.ones(3)), {"reduce": "row"}, r"reduce: 'row' is not one of none, rows, columns"),
        ((torch.ones(2, 3), torch.ones(3)), {"reduce": "rows", "backend": "gpu"}, r"backend: 'gpu'"),
        ((torch.ones(2, 3, dtype=torch.int32), torch.ones(3)), {}, r"weight: .*int32"),
    ],
)
def test_errors_name_argument_and_value(arguments, keywords, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wanda_fast.score(*arguments, **keywords)


@pytest.mark.parametrize(
    "spelling",
    [
        "import wanda_fast; score = wanda_fast.score",
        "from wanda_fast import score",
        "from wanda_fast.score import score",
        "import wanda_fast.score as score",
        "import wanda_fast.score; score = wanda_fast.score",
        "import wanda_fast.score; score = wanda_fast.score.score",
        "from wanda_fast import *",
        "import wanda_fast.ops, wanda_fast.score; from wanda_fast import score",
        "from wanda_fast.score import score as first; from wanda_fast import score; assert score.score is first",
    ],
)
def test_every_spelling(spelling: str) -> None:
    """Each in its own process, since the first import decides what the name is bound to."""
    if spelling.endswith("*"):  # what a star import takes without the modules that need other packages
        spelling = "import wanda_fast; wanda_fast.__all__ = ['score', 'ops']; " + spelling
    code = f"{spelling}\nimport torch\nassert score(torch.tensor([[-2.0, 3.0]]), torch.tensor([0.5, 2.0])).tolist() == [[1.0, 6.0]]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_module_has_the_functions_signature_and_doc() -> None:
    module = importlib.import_module("wanda_fast.score")
    assert wanda_fast.score is module
    assert inspect.signature(module) == inspect.signature(module.score)
    assert inspect.ismodule(module)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        wanda_fast.scores  # noqa: B018
    assert set(wanda_fast.__all__) <= set(dir(wanda_fast))


def test_reference_is_really_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named, it runs plain PyTorch even where the compiled extension would be taken for the device."""
    calls = []
    monkeypatch.setattr(torch.ops.wanda_fast.wanda_score, "default", None, raising=False)
    original = ops._OPS["wanda_score"]
    replaced = type(original)(original.name, lambda *a: calls.append(a) or original.reference(*a), None, None, original.homes)
    monkeypatch.setitem(ops._OPS, "wanda_score", replaced)
    ops._selected.clear()
    try:
        wanda_fast.score(torch.ones(2, 3), torch.ones(3), reduce="rows", backend="reference")
    finally:
        ops._selected.clear()
    assert len(calls) == 1
