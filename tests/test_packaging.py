"""What an import costs, how backends are chosen and reported, how the package looks when installed."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import wanda_fast
from wanda_fast import ops

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# ---- import -------------------------------------------------------------------------------------------------------


def test_import_is_light() -> None:
    code = "import sys, wanda_fast; print([m for m in ('torch', 'diffusers', 'matplotlib', 'triton', 'numpy') if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_operations_import_torch_alone_and_touch_no_gpu() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import wanda_fast.ops, wanda_fast.score
new = {m.partition(".")[0] for m in set(sys.modules) - before}
print(sorted(new & {"diffusers", "matplotlib", "triton", "scipy", "transformers", "skimage", "PIL"}), torch.cuda.is_initialized())
"""
    assert python(code).strip() == "[] False"


def test_package_is_typed_and_versioned() -> None:
    assert (Path(wanda_fast.__file__).parent / "py.typed").is_file()
    assert wanda_fast.__version__.count(".") == 2


# ---- kernels ------------------------------------------------------------------------------------------------------


def test_kernels_do_not_hide_another_package(tmp_path: Path) -> None:
    """Hugging Face's `kernels`, found after the working directory, must win over our folder of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("OTHER = True\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import wanda_fast, kernels; print(kernels.OTHER, wanda_fast.kernels is kernels)"
    assert python(code).strip() == "True False"


def test_kernels_are_a_subpackage() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    module = importlib.import_module("wanda_fast.kernels.channel_sq_norm")
    assert Path(str(module.__file__)).name == "channel_sq_norm.py"
    assert callable(module.channel_sq_norm)


# ---- backends -----------------------------------------------------------------------------------------------------

WITHOUT = {"WANDA_FAST_NO_EXTENSION": "1", "TRITON_INTERPRET": "0"}


def test_without_the_extension_the_reference_works_and_says_so() -> None:
    code = """
import logging; logging.basicConfig()
import torch, wanda_fast
from wanda_fast import ops
out = torch.zeros(1, 3)
for _ in range(3):
    ops.channel_sq_norm(torch.ones(2, 3, 2, 2), torch.tensor([0, 0]), out)
print(out.tolist())
print(wanda_fast.score(torch.ones(2, 3), torch.ones(3), reduce="rows").tolist())
print(ops.compact([torch.arange(4).view(2, 2)], [torch.tensor([1])], [None])[0].tolist())
print(ops.describe_backends())
"""
    text = python(code, **WITHOUT)
    assert "[[24.0, 24.0, 24.0]]" in text and "[3.0, 3.0]" in text and "[[2, 3]]" in text
    assert "backends: reference" in text and "cpu (the compiled extension is switched off" in text
    assert text.count("is not used, reference is") == 1, "the reason is logged once"


def test_a_missing_extension_file_is_explained() -> None:
    code = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name == "wanda_fast._C" else find(name, *args)
from wanda_fast import ops
print(ops.available_backends()["cpu"])
"""
    assert "the compiled extension is missing" in python(code, WANDA_FAST_NO_EXTENSION="0")


def test_without_the_extension_a_named_backend_raises() -> None:
    code = """
import torch
from wanda_fast import ops
for backend in ("cpu", "triton"):
    try:
        ops.wanda_score(torch.ones(2, 3), torch.ones(3), backend=backend)
    except RuntimeError as error:
        print(error)
"""
    text = python(code, **WITHOUT)
    assert "wanda_score: backend 'cpu' is not available: the compiled extension is switched off" in text
    assert "wanda_score: backend 'triton' is not available: " in text


def test_environment_variable_selects_the_backend() -> None:
    code = """
import torch
from wanda_fast import ops
print(ops.get_backend(), ops._select("wanda_score", None, "cpu")[0], ops.describe_backends())
"""
    text = python(code, WANDA_FAST_BACKEND="reference")
    assert text.startswith("reference reference") and "chosen: reference" in text
    bad = "from wanda_fast import ops\ntry: ops.get_backend()\nexcept ValueError as e: print(e)"
    assert "WANDA_FAST_BACKEND: 'fast' is not one of auto, reference" in python(bad, WANDA_FAST_BACKEND="fast")
    missing = "from wanda_fast import ops\ntry: ops.get_backend()\nexcept RuntimeError as e: print(e)"
    assert "WANDA_FAST_BACKEND: backend 'cpu' is not available: the compiled" in python(missing, WANDA_FAST_BACKEND="cpu", **WITHOUT)


def test_set_backend(restore_backend: None) -> None:
    ops.set_backend("reference")
    assert ops.get_backend() == "reference"
    assert ops._select("compact", None, "cpu")[0] == "reference"
    with pytest.raises(ValueError, match="'gpu' is not one of"):
        ops.set_backend("gpu")
    if ops.available_backends()["cuda"]:
        with pytest.raises(RuntimeError, match="backend 'cuda' is not available: "):
            ops.set_backend("cuda")


def test_auto_takes_the_compiled_code_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    if reason := ops.available_backends("cpu")["cpu"]:
        pytest.skip(reason)
    ops._selected.clear()
    with caplog.at_level(logging.WARNING, logger="wanda_fast"):
        for op in ops._OPS.values():
            if "cpu" in op.homes:
                assert ops._select(op.name, "auto", "cpu")[0] == "cpu"
    assert not caplog.records


def test_operations_trace_into_one_graph() -> None:
    """torch.compile sees each operation as one node, through its fake."""
    if reason := ops.available_backends("cpu")["cpu"]:
        pytest.skip(reason)
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(weight: torch.Tensor, sq: torch.Tensor, row_weight: torch.Tensor) -> torch.Tensor:
        row, col = ops.wanda_score_stats(weight, sq, row_weight)
        return row.sum() + col.sum()

    args = (torch.randn(4, 3), torch.rand(5, 3), torch.rand(5))
    graph = make_fx(step, tracing_mode="fake")(*args)
    assert any(node.target is torch.ops.wanda_fast.wanda_score_stats.default for node in graph.graph.nodes)
    torch.testing.assert_close(graph(*args), step(*args))


@pytest.mark.parametrize("instructions", ["baseline", "avx2"])
def test_older_processors_get_right_values(instructions: str) -> None:
    """The C++ code of narrower instruction sets, which this processor would not choose, over dtypes and odd shapes."""
    if reason := ops.available_backends("cpu")["cpu"]:
        pytest.skip(reason)
    code = """
import torch
from wanda_fast import ops, reference
torch.manual_seed(0)
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    for shape in [(2, 3, 32, 32), (3, 67, 9, 11), (2, 130, 1, 1), (2, 50, 33), (5, 31)]:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape)
            x.view(-1)[:40] *= 1e-6  # subnormal in half precision
            x = x.to(dtype).contiguous(memory_format=layout) if x.dim() == 4 else x.to(dtype)
            rows = torch.arange(len(x)) % 2
            out = torch.rand(2, shape[1] if len(shape) == 4 else shape[-1])
            truth = reference.channel_sq_norm(x.double(), rows, out.double())
            torch.testing.assert_close(ops.channel_sq_norm(x, rows, out, backend="cpu").double(), truth, rtol=1e-6, atol=1e-6)
    for shape in [(33, 65, 3, 3), (61, 127), (40, 8, 3, 3)]:
        weight, act_norm = torch.randn(shape).to(dtype), torch.rand(32 if shape[1] == 8 else shape[1])
        truth = reference.wanda_score(weight.double(), act_norm.double())
        for ours, exact in zip(ops.wanda_score(weight, act_norm, backend="cpu"), truth):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
special = torch.tensor([[65504.0, float("inf"), float("-inf"), float("nan"), 6e-8, -0.0, 1.0, -2.0] * 9]).half()
ours = ops.channel_sq_norm(special, torch.tensor([0]), torch.zeros(1, 72), backend="cpu")
torch.testing.assert_close(ours, special.double().square().float(), rtol=1e-6, atol=0, equal_nan=True)
print("right")
"""
    assert python(code, WANDA_FAST_CPU=instructions).strip().endswith("right")


# ---- installation -------------------------------------------------------------------------------------------------


def copy_source(folder: Path) -> None:
    """This source without anything built before."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("*.so", "build", "run", ".*", "*.egg-info", "__pycache__", "results"))


def build_wheel(folder: Path, source: Path, **environment: str) -> tuple[list[str], str]:
    """Names in a wheel of this source, and what the build printed."""
    copy_source(source)
    env = {**os.environ, "WANDA_FAST_CUDA": "0", **environment}
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist(), done.stdout + done.stderr


def test_a_wheel_is_built_without_a_compiler_and_says_so(tmp_path: Path) -> None:
    """The install succeeds; the wheel has every file but the extension, and works from where it is unpacked."""
    none = str(tmp_path / "no-compiler")
    names, output = build_wheel(tmp_path / "wheel", tmp_path / "source", CXX=none, CC=none)
    assert "building the C++ extension FAILED" in output
    assert "WARNING: no extension was built" in output
    assert not [name for name in names if name.endswith(".so")]
    for name in ("wanda_fast/__init__.py", "wanda_fast/py.typed", "wanda_fast/ops.py", "wanda_fast/kernels/channel_sq_norm.py"):
        assert name in names
    assert any(name.startswith("wanda_fast/assets/") and name.endswith(".safetensors") for name in names)
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]
    assert "wanda_fast/kernels/__init__.py" not in names
    with zipfile.ZipFile(next((tmp_path / "wheel").glob("*.whl"))) as archive:
        archive.extractall(tmp_path / "site")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n" + """
import importlib.util, torch, wanda_fast
from wanda_fast import ops
assert wanda_fast.__file__.startswith(sys.path[0]), wanda_fast.__file__
print(wanda_fast.score(torch.ones(1, 2), torch.ones(2), reduce="rows").item(), ops.available_backends()["cpu"])
print(importlib.util.find_spec("wanda_fast.kernels.channel_sq_norm").origin)
"""
    text = python(code, cwd=tmp_path)
    assert "2.0 the compiled extension is missing" in text
    assert str(tmp_path / "site" / "wanda_fast" / "kernels") in text


def test_a_source_distribution_holds_what_the_build_reads_and_no_more(tmp_path: Path) -> None:
    copy_source(tmp_path / "source")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    environment = {**os.environ, "WANDA_FAST_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "source", env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name and not archive.getmember(name).isdir()}
    made = {"PKG-INFO", "setup.cfg"}
    wanted = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
    for folder in ("csrc", "kernels", "wanda_fast"):
        found = (file for file in (tmp_path / "source" / folder).rglob("*") if file.is_file())
        wanted |= {file.relative_to(tmp_path / "source").as_posix() for file in found}
    assert {name for name in names - made if ".egg-info/" not in name} == wanted
