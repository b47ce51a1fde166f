"""CUDA sources without a GPU: they compile for every architecture, and the gather kernel's own code is right on the CPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wanda_fast import ops, reference

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("80", "90", "100")
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.complex128)


def includes() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [f"-I{path}" for path in include_paths()]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_for_every_architecture(source: Path, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command = [nvcc, "-std=c++17", "-O3", "--threads=2", TARGET, "-DUSE_CUDA", "-Xcompiler=-fPIC", "-Werror=all-warnings",
               "-isystem", ",".join(path[2:] for path in includes()), *targets, "-c", str(source), "-o", str(tmp_path / "out.o")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out.o").stat().st_size > 0


def emulated_source(text: str) -> str:
    """compact.cu for a C++ compiler and CPU tensors: the launch becomes a loop, device checks become CPU checks, no more."""
    replaced = [
        (r"#include <cuda_runtime.h>\n", ""),
        (r"#include <torch/csrc/stable/accelerator.h>\n", ""),
        (r"namespace wanda_fast \{\n", '#include "cuda_emulation.h"\n#undef STD_CUDA_CHECK\n#define STD_CUDA_CHECK(x) (void)(x)\n'
                                       "namespace wanda_fast {\n"),
        (r"(\w+)<kCapacity><<<static_cast<unsigned>\(blocks\), kThreads, 0, stream>>>\(table\);",
         r"emulation::launch(blocks, kThreads, [&] { \1<kCapacity>(table); });"),
        (r"STD_CUDA_KERNEL_LAUNCH_CHECK\(\);", ""),
        (r"torch::stable::accelerator::DeviceGuard guard\(device\);\n", ""),
        (r"STABLE_TORCH_ERROR_CODE_CHECK\(aoti_torch_get_current_cuda_stream\(device, &stream\)\);\n", ""),
        (r"is_cuda\(\)", "is_cpu()"),
        (r"aoti_torch_device_type_cuda\(\)", "aoti_torch_device_type_cpu()"),
        (r"STABLE_TORCH_LIBRARY_IMPL\(wanda_fast, CUDA, m\)",
         "STABLE_TORCH_LIBRARY(wanda_fast_emulated, m) {\n"
         '  m.def("compact(Tensor[] tensors, Tensor?[] keep_out, Tensor?[] keep_in, ScalarType? dtype=None) -> Tensor[]");\n'
         '  m.def("compact_shared(Tensor[] tensors, Tensor?[] keep_out, Tensor?[] keep_in, ScalarType? dtype=None) -> Tensor[]");\n}\n'
         "STABLE_TORCH_LIBRARY_IMPL(wanda_fast_emulated, CPU, m)"),
    ]  # fmt: skip
    for pattern, new in replaced:
        text, count = re.subn(pattern, lambda match, new=new: match.expand(new) if match.re.groups else new, text)
        assert count, f"compact.cu changed: nothing matches {pattern}"
    return text


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 10):
        pytest.skip(f"the stable ABI needs torch 2.10, this is {torch.__version__}")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernel itself is tested on it")
    folder = tmp_path_factory.mktemp("emulated")
    source = folder / "compact.cpp"
    source.write_text(emulated_source((ROOT / "csrc" / "cuda" / "compact.cu").read_text()))
    library = folder / "compact_emulated.so"
    lib = Path(torch.__file__).parent / "lib"
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", TARGET, f"-I{ROOT / 'tests'}",
               f"-I{ROOT / 'csrc' / 'cuda'}", *includes(), str(source), "-o", str(library),
               f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch", "-ltorch_cpu", "-lc10"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.ops.load_library(str(library))
    return torch.ops.wanda_fast_emulated


SHAPES = (
    (20, 12, 3, 3), (64,), (37, 53), (160, 40, 1, 1), (5, 1, 3, 3), (24, 96, 3, 3), (7,), (3, 24, 3, 3), (24, 3, 3, 3), (16, 16, 2, 2),
    (6, 8, 3, 3, 3), (300, 3), (2, 4100), (1, 1), (9, 1), (23, 303, 3, 3), (38, 2100),
)  # fmt: skip


def layouts(t: Tensor) -> list[Tensor]:
    """The tensor contiguous, channels-last, as a slice of rows and of columns."""
    found = [t]
    if t.dim() == 4:
        found.append(t.to(memory_format=torch.channels_last))
    found.append(torch.cat([t, t])[1 : 1 + t.shape[0]])
    if t.dim() >= 2:
        found.append(torch.cat([t, t], dim=1)[:, 1 : 1 + t.shape[1]])
    return found


def keep_pairs(shape: tuple[int, ...], generator: torch.Generator) -> list[tuple[Tensor | None, Tensor | None]]:
    """Random, unsorted and repeated, three of four, one aligned run, none, and everything."""

    def random(n: int) -> Tensor:
        return torch.randperm(n, generator=generator)[: max(1, n * 7 // 10)].sort().values

    rows, columns = shape[0], shape[1] if len(shape) > 1 else None
    empty = torch.empty(0, dtype=torch.int64)
    pairs: list[tuple[Tensor | None, Tensor | None]] = [
        (random(rows), None if columns is None else random(columns)),
        (torch.randint(0, rows, (rows + 3,), generator=generator), None),
        (
            torch.arange(rows)[torch.arange(rows) % 4 != 1],
            None if columns is None else torch.arange(columns)[torch.arange(columns) % 4 != 1],
        ),
        (None, None if columns is None else torch.arange(columns // 16 * 8, columns)),
        (empty, None),
        (random(rows), None if columns is None else empty),
        (None, None),
    ]
    return pairs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_code_on_the_cpu(emulated: Any, dtype: torch.dtype) -> None:
    """More tensors than one table holds, of all layouts and keep patterns, in one call."""
    generator = torch.Generator().manual_seed(0)
    tensors, keep_out, keep_in = [], [], []
    for shape in SHAPES:
        for t in layouts((torch.randn(shape, generator=generator) * 50).to(dtype)):
            for rows, columns in keep_pairs(shape, generator):
                tensors.append(t)
                keep_out.append(rows)
                keep_in.append(columns)
    tensors, keep_out, keep_in = tensors * 2, keep_out * 2, keep_in * 2
    assert sum(k is None or len(k) > 0 for k in keep_out) > 360  # more than the largest table holds
    wanted = reference.compact(tensors, keep_out, keep_in)
    results = emulated.compact(tensors, keep_out, keep_in)
    own = [r.untyped_storage().data_ptr() for r in results if r.numel()]
    assert len(set(own)) == len(own)
    shared = emulated.compact_shared(tensors, keep_out, keep_in)
    ends = sorted((r.data_ptr(), r.data_ptr() + r.numel() * r.element_size()) for r in shared if r.numel())
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    for i, (got, also, want) in enumerate(zip(results, shared, wanted, strict=True)):
        assert torch.equal(got, also) and got.stride() == also.stride()
        where = (tuple(tensors[i].shape), tensors[i].stride(), keep_out[i], keep_in[i])
        assert got.dtype == want.dtype and got.shape == want.shape, where
        assert got.numel() == 0 or got.stride() == want.stride(), where
        assert torch.equal(got, want), where
        assert got.data_ptr() != tensors[i].data_ptr() or got.numel() == 0, where


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
def test_single_entries_and_rows_of_slices(emulated: Any, dtype: torch.dtype | None) -> None:
    """The stride of a dimension of size 1 means nothing."""
    tensors = [torch.randn(10)[3::5][:1], torch.randn(1, 7)[:, 2], torch.randn(4, 3)[::2, 1:2][:1], torch.randn(4, 6, 3, 3)[::2][:1],
               torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)[::2][:1]]  # fmt: skip
    keeps = [torch.tensor([0]), None, None, None, torch.tensor([0])], [None, None, None, None, torch.tensor([1, 4])]
    fakes = ops._fake_compact(tensors, *keeps, dtype)
    for results in (emulated.compact(tensors, *keeps, dtype), emulated.compact_shared(tensors, *keeps, dtype)):
        for got, want, fake in zip(results, reference.compact(tensors, *keeps, dtype), fakes, strict=True):
            assert torch.equal(got, want) and got.stride() == fake.stride()


@pytest.mark.parametrize("wanted", ops.FLOAT_DTYPES, ids=str)
def test_cast_on_the_cpu(emulated: Any, wanted: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(24, 17, 3, 3, generator=generator).to(d) for d in (*ops.FLOAT_DTYPES, torch.int32)]
    tensors += [tensors[0].to(memory_format=torch.channels_last), tensors[2][0, 0, 0]]
    keep = torch.tensor([0, 2, 5, 6, 16])
    keeps = ([keep] * 6 + [None], [keep] * 6 + [None])
    wide = torch.arange(303)[torch.arange(303) % 7 != 2]  # rows that a whole block walks down, in pairs where there are 16 bits
    for d in ops.FLOAT_DTYPES:
        for columns in (wide, wide[1:]):
            tensors.append(torch.randn(21, 303, 3, 3, generator=generator).to(d))
            keeps[0].append(keep)
            keeps[1].append(columns)
    wanted_results = reference.compact(tensors, *keeps, wanted)
    for results in (emulated.compact(tensors, *keeps, wanted), emulated.compact_shared(tensors, *keeps, wanted)):
        for got, want in zip(results, wanted_results, strict=True):
            assert got.dtype == want.dtype and got.stride() == want.stride() and torch.equal(got, want)


@pytest.mark.parametrize("count", [1, 46, 47, 121])
def test_tables_of_every_capacity(emulated: Any, count: int) -> None:
    tensors = [torch.randn(6, 5) + i for i in range(count)]
    keep = torch.tensor([0, 2, 5])
    results = emulated.compact_shared(tensors, [keep] * count, [None] * count)
    assert all(torch.equal(r, t[keep]) for r, t in zip(results, tensors, strict=True))
    half = [torch.float32 if i % 3 else torch.bfloat16 for i in range(count)]  # moved and cast tensors in one call, in any order
    tensors = [t.to(d) for t, d in zip(tensors, half, strict=True)]
    results = emulated.compact_shared(tensors, [keep] * count, [None] * count, torch.bfloat16)
    assert all(torch.equal(r, t[keep].bfloat16()) for r, t in zip(results, tensors, strict=True))


def test_rows_beyond_2_to_the_31(emulated: Any, tmp_path: Path) -> None:
    """Rows so far apart, in a sparse file, that 32-bit offsets would wrap."""
    far = 2**31 + 8
    with open(tmp_path / "sparse.bin", "wb") as file:
        file.truncate((2 * far + 4) * 2)
    storage = torch.from_file(str(tmp_path / "sparse.bin"), shared=True, size=2 * far + 4, dtype=torch.float16)
    t, values = torch.as_strided(storage, (3, 4), (far, 1)), torch.randn(3, 4).half()
    t.copy_(values)
    rows, columns = torch.tensor([2, 0]), torch.tensor([3, 1])
    for operation in (emulated.compact, torch.ops.wanda_fast.compact.default):
        for dtype in (None, torch.float32):
            wanted = values[rows][:, columns].to(dtype or torch.float16)
            assert torch.equal(operation([t], [rows], [columns], dtype)[0], wanted)


@pytest.mark.parametrize("bad", [-1, 6])
def test_index_outside_stops_the_kernel(emulated: Any, bad: int) -> None:
    index = torch.tensor([0, bad])
    with pytest.raises(RuntimeError):
        emulated.compact([torch.randn(6, 6)], [index], [None])
    with pytest.raises(RuntimeError):
        emulated.compact([torch.randn(6, 6)], [None], [index])


def test_wrong_arguments_name_themselves(emulated: Any) -> None:
    t = torch.randn(4, 4)
    with pytest.raises(RuntimeError):
        emulated.compact([t], [torch.zeros(2)], [None])
    with pytest.raises(RuntimeError):
        emulated.compact([t[0]], [None], [torch.tensor([0])])
    with pytest.raises(RuntimeError):
        emulated.compact([t], [], [None])


def on_gpu(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.cuda()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_on_the_gpu(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors, keep_out, keep_in = [], [], []
    for shape in (*SHAPES, (1280, 320, 3, 3), (320, 1280), (3000,)):
        for t in layouts((torch.randn(shape, generator=generator) * 50).to(dtype).cuda()):
            for rows, columns in keep_pairs(shape, generator):
                tensors.append(t)
                keep_out.append(on_gpu(rows))
                keep_in.append(on_gpu(columns))
    results = ops.compact(tensors, keep_out, keep_in, backend="cuda")
    for i, (got, want) in enumerate(zip(results, reference.compact(tensors, keep_out, keep_in), strict=True)):
        where = (tuple(tensors[i].shape), tensors[i].stride(), keep_out[i], keep_in[i])
        assert got.dtype == want.dtype and torch.equal(got, want), where
        assert got.numel() == 0 or got.stride() == want.stride(), where


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_gather_in_a_captured_graph() -> None:
    """Descriptors travel as kernel parameters: a replay reads the weights of the moment."""
    tensors = [torch.randn(64, 32, 3, 3, device="cuda"), torch.randn(64, device="cuda")]
    keep = torch.arange(0, 64, 3, device="cuda")
    ops.compact(tensors, [keep, keep], [None, None], backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.compact(tensors, [keep, keep], [None, None], backend="cuda")
    for t in tensors:
        t.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(r, t[keep]) for r, t in zip(results, tensors, strict=True))
