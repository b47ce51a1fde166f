"""Triton kernels called directly: tile shapes, tickets, second table, huge strides; on the CPU through the interpreter, on a GPU as compiled.

Values over layouts and dtypes through the operations are in test_channel_sq_norm.py and test_wanda_score.py.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wanda_fast import reference

pytest.importorskip("triton", reason="the package triton is not installed")
from wanda_fast.kernels import channel_sq_norm as sq_kernel
from wanda_fast.kernels import conv_gram as gram_kernel
from wanda_fast.kernels import wanda_score as score_kernel

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Config = sq_kernel.Config


def truth_of(x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    return reference.channel_sq_norm(x.double(), rows, out.double())


def sums_of(x: Tensor, rows: Tensor, sums: Tensor) -> Tensor:
    dims = {2: (), 3: (1,), 4: (2, 3)}[x.dim()]
    wide = x.double().sum(dim=dims) if dims else x.double()
    return sums.double().index_add(0, rows, wide)


ROWS = {
    "unique": lambda n: torch.randperm(n),
    "pairs": lambda n: torch.arange(n) // 2,
    "interleaved": lambda n: torch.arange(n) % max(n // 2, 1),
    "one_row": lambda n: torch.full((n,), n - 1),
}
CONFIGS = {
    "chosen": None,
    "split-3": Config(block_c=4, block_s=16, split=3, split_len=32, num_warps=1),
    "split-odd_tail": Config(block_c=8, block_s=8, split=6, split_len=16, num_warps=2),
    "one_channel": Config(block_c=1, block_s=32, split=1, split_len=96, num_warps=1),
    "wide": Config(block_c=32, block_s=4, split=1, split_len=84, num_warps=1),
}


@pytest.mark.parametrize(
    "layout,config,rows_kind",
    [
        *(("nchw", config, rows) for config in ("chosen", "split-3", "wide") for rows in ROWS),
        ("nchw", "split-odd_tail", "unique"),
        ("nchw", "one_channel", "pairs"),
        ("channels_last", "chosen", "pairs"),
        ("channels_last", "split-odd_tail", "interleaved"),
        ("tokens", "split-3", "unique"),
        ("tokens", "chosen", "one_row"),
    ],
)
def test_every_path_of_the_reduction(layout: str, config: str, rows_kind: str) -> None:
    """Direct adds, tickets over repeated rows and over slices of positions: right, repeatable, and the tickets are clean afterwards."""
    N, C, S = 4, 13, 81
    x = torch.randn(N, C, 9, 9)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "tokens":
        x = x.flatten(2).transpose(1, 2).contiguous()
    rows = ROWS[rows_kind](N).to(DEVICE)
    x = x.to(DEVICE)
    start, start_sums = torch.rand(N, C, device=DEVICE), torch.rand(N, C, device=DEVICE)
    chosen = CONFIGS[config]
    assert chosen is None or chosen.split * chosen.split_len >= S > (chosen.split - 1) * chosen.split_len
    results = []
    for _ in range(3):
        out, sums = start.clone(), start_sums.clone()
        assert sq_kernel.channel_sq_norm(x, rows, out, sums, config=chosen) is out
        results.append((out, sums))
    out, sums = results[0]
    torch.testing.assert_close(out.double(), truth_of(x, rows, start), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sums.double(), sums_of(x, rows, start_sums), rtol=1e-6, atol=1e-5)
    assert all(torch.equal(a, out) and torch.equal(b, sums) for a, b in results)
    alone = start.clone()
    sq_kernel.channel_sq_norm(x, rows, alone, config=chosen)
    assert torch.equal(alone, out)
    assert all(not s.tickets.any() for s in sq_kernel._scratch.values())


def test_more_samples_than_one_launch_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sq_kernel, "MAX_SAMPLES", 4)
    x = torch.randn(11, 7, device=DEVICE)
    rows = torch.arange(11, device=DEVICE) % 3
    out = torch.zeros(3, 7, device=DEVICE)
    sq_kernel.channel_sq_norm(x, rows, out)
    torch.testing.assert_close(out.double(), truth_of(x, rows, torch.zeros(3, 7, device=DEVICE)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit", [{"MAX_POSITIONS": 10}, {"MAX_PARTIALS": 10}, {"MAX_PARTIALS": 1, "MAX_POSITIONS": 1}], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 6, 7), (3, 5, 1, 42), (3, 42, 5), (3, 5)], ids=str)
def test_more_than_one_launch_can_number(limit: dict[str, int], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of more than 2^31 positions or partial sums, in small."""
    launched = []
    original = sq_kernel._prepare

    def prepare(x: Tensor, *args: Any) -> Any:
        launched.append((x.shape[0] * 5, x.numel() // (x.shape[0] * 5)))
        return original(x, *args)

    for name, value in limit.items():
        monkeypatch.setattr(sq_kernel, name, value)
    monkeypatch.setattr(sq_kernel, "_prepare", prepare)
    monkeypatch.setattr(sq_kernel, "_launches", {})
    x, rows = torch.randn(shape, device=DEVICE), torch.tensor([1, 0, 1], device=DEVICE)
    out, sums = torch.rand(2, 5, device=DEVICE), torch.rand(2, 5, device=DEVICE)
    want, want_sums = truth_of(x, rows, out), sums_of(x, rows, sums)
    sq_kernel.channel_sq_norm(x, rows, out, sums)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sums.double(), want_sums, rtol=1e-6, atol=1e-5)
    assert all(partials <= max(limit.get("MAX_PARTIALS", 15), 5) for partials, _ in launched)
    assert all(positions <= limit.get("MAX_POSITIONS", 42) for _, positions in launched)


@pytest.mark.parametrize("row", [-1, 3, 2**40, -(2**40)])
def test_rows_outside_add_nothing(row: int) -> None:
    """On a device the rows cannot be checked without stopping it: samples of a row outside are left out, all others count."""
    x = torch.randn(4, 5, 3, 3, device=DEVICE)
    rows = torch.tensor([0, row, 2, row], device=DEVICE)
    out = torch.zeros(3, 5, device=DEVICE)
    sq_kernel.channel_sq_norm(x, rows, out)
    inside = torch.tensor([0, 2], device=DEVICE)
    want = truth_of(x[inside], rows[inside], torch.zeros(3, 5, device=DEVICE))
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-6)
    assert all(not s.tickets.any() for s in sq_kernel._scratch.values())


def test_rows_and_tables_with_strides() -> None:
    x = torch.randn(4, 5, 3, 3, device=DEVICE)
    rows = torch.tensor([0, 9, 1, 9, 2, 9, 2, 9], device=DEVICE)[::2]
    wide = torch.zeros(3, 11, device=DEVICE)
    out = wide[:, 1:11:2]
    sq_kernel.channel_sq_norm(x, rows, out)
    torch.testing.assert_close(out.double(), truth_of(x, rows, torch.zeros(3, 5, device=DEVICE)), rtol=1e-6, atol=1e-6)
    assert not wide[:, 0::2].any()


def sparse(elements: int, folder: Path, dtype: torch.dtype) -> Tensor:
    """A tensor over a sparse file: gigabytes of addresses, kilobytes of disk."""
    path = folder / "sparse.bin"
    with open(path, "wb") as file:
        file.truncate(elements * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=elements, dtype=dtype)


def far_apart(dim: str, folder: Path) -> tuple[Tensor, Tensor]:
    """[2, 2, 3, 3] with one stride of more than 2^31 elements, as in a slice of a very large tensor, and the same values side by side."""
    strides = {"n": 18, "c": 9, "h": 3, "w": 1}
    strides[dim] = 2**31 + 8
    shape = (2, 2, 3, 3)
    length = sum((size - 1) * stride for size, stride in zip(shape, strides.values(), strict=True)) + 1
    x = torch.as_strided(sparse(length, folder, torch.float16), shape, tuple(strides.values()))
    values = torch.randn(shape).half()
    x.copy_(values)
    return x, values


@pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU memory that is mapped but not allocated")
@pytest.mark.parametrize("dim", ["n", "c", "h", "w"])
def test_offsets_beyond_2_to_the_31(dim: str, tmp_path: Path) -> None:
    """32-bit offsets would wrap."""
    x, values = far_apart(dim, tmp_path)
    rows = torch.tensor([1, 0])
    out = torch.zeros(2, 2)
    sq_kernel.channel_sq_norm(x, rows, out)
    torch.testing.assert_close(out.double(), truth_of(values, rows, torch.zeros(2, 2)), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU memory that is mapped but not allocated")
@pytest.mark.parametrize("dim", ["n", "c", "h", "w"])
def test_packed_offsets_beyond_2_to_the_31(dim: str, tmp_path: Path) -> None:
    x, values = far_apart(dim, tmp_path)
    largest = gram_kernel.largest_of(values)
    table = gram_kernel.Table(3, 3, 2, 2, 1)
    size = (2 * table.rows + 3 * table.front) * 2 * table.columns  # what lies after that is not written
    for pair in ((x, values), (values, x)):
        packed, near = (gram_kernel.pack(*maps, table, largest, largest)[:size] for maps in (pair, (values, values)))
        assert packed.any() and torch.equal(packed, near)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs CPU memory that is mapped but not allocated")
def test_weight_rows_beyond_2_to_the_31(tmp_path: Path) -> None:
    far = 2**31 + 8
    weight = torch.as_strided(sparse(2 * far + 4, tmp_path, torch.float16), (3, 4), (far, 1))
    values = torch.randn(3, 4).half()
    weight.copy_(values)
    norm = torch.rand(4)
    for got, want in zip(
        score_kernel.wanda_score(weight, norm), reference.wanda_score(values.double(), norm.double()), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [score_kernel.LARGE, score_kernel.LARGE_16, score_kernel.SMALL, score_kernel.Config(4, 32, 8, 1)],
    ids=["LARGE", "LARGE_16", "SMALL", "4x32"],
)
@pytest.mark.parametrize(
    "shape,groups", [((21, 10, 3, 3), 1), ((12, 5, 3, 1), 3), ((1, 300), 1), ((40, 1, 1, 1), 1)], ids=str
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_score_tiles(
    shape: tuple[int, ...], groups: int, channels_last: bool, config: score_kernel.Config | None
) -> None:
    weight = torch.randn(shape, device=DEVICE)
    if channels_last:
        if weight.dim() != 4:
            pytest.skip("channels-last needs four dimensions")
        weight = weight.to(memory_format=torch.channels_last)
    norm = torch.rand(shape[1] * groups, device=DEVICE)
    first = score_kernel.wanda_score(weight, norm, config=config)
    for got, want in zip(first, reference.wanda_score(weight.double(), norm.double()), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-6)
    for got, again in zip(first, score_kernel.wanda_score(weight, norm, config=config), strict=True):
        assert torch.equal(got, again)


@pytest.mark.parametrize("rows", [0, 1, 33, 100])
def test_score_aggregates_the_table(rows: int) -> None:
    weight = torch.randn(9, 40, device=DEVICE).bfloat16()
    sq = torch.rand(rows, 80, device=DEVICE)[:, ::2]
    row_weight = torch.rand(rows, device=DEVICE)
    got = score_kernel.wanda_score_stats(weight, sq, row_weight)
    want = reference.wanda_score_stats(weight.double(), sq.double(), row_weight.double())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 3e30], ids=str)
def test_halves_of_packed_maps(layout: str, pad: int, scale: float) -> None:
    """High and low halves together hold 22 bits of each value, whatever its size; padding, margins and weights included."""
    x = torch.randn(3, 9, 5, 6) * scale
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x[:, 1:8, :, ::2]
    elif layout == "transposed":
        x = x.transpose(2, 3)
    x, weight = x.to(DEVICE), torch.tensor([0.5, 0.0, 2.0], device=DEVICE)
    y = torch.randn(3, 20, *x.shape[2:], device=DEVICE).half()
    c, h, w = x.shape[1:]
    table = gram_kernel.Table(h, w, c, 20, pad)
    largest, most = (gram_kernel.largest_of(x), gram_kernel.largest_of(y)), weight.max()
    rows = gram_kernel.pack(x, y, table, *largest, weight, most)[: -gram_kernel.WIDE.block].view(-1, 2 * table.columns)
    assert len(rows) == 3 * table.front + 3 * table.rows
    values = rows.double()[:, : table.columns] + rows.double()[:, table.columns :] / 2048
    for source, first in ((x, 0), (y, table.y)):
        got = values[:, first : first + source.shape[1]]
        assert not got[: table.front].any() and not got[table.front + 3 * table.rows :].any()
        got = got[table.front : table.front + 3 * table.rows]
        want = torch.nn.functional.pad(source.double() * (weight / most).double()[:, None, None, None], (pad, pad, pad, pad))
        want = want.permute(0, 2, 3, 1).reshape(-1, source.shape[1])
        assert 2**11 < float(got.abs().max()) <= 2**13
        power = 2.0 ** round(math.log2(float(got.abs().max() / want.abs().max())))
        torch.testing.assert_close(got / power, want, rtol=2**-21, atol=float(want.abs().max()) * 2**-30)


@pytest.mark.parametrize("shape", [(1, 1, 1), (100, 5, 20), (600, 3, 17), (37, 70, 66), (0, 3, 4), (5, 0, 4)], ids=str)
def test_row_gram(shape: tuple[int, int, int]) -> None:
    m, k, c_out = shape
    rows, right = torch.randn(m, k, device=DEVICE), torch.randn(c_out, m, device=DEVICE).t()
    got = gram_kernel.row_gram(rows, right)
    for value, want in zip(got, (rows.double().t() @ rows.double(), rows.double().t() @ right.double()), strict=True):
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(got, gram_kernel.row_gram(rows, right), strict=True))
    with pytest.raises(ValueError, match="rows, right"):
        gram_kernel.row_gram(rows, right.double())


SMALL_TILES = {"WIDE": gram_kernel.Config(32, 32, 4, 3), "NARROW": gram_kernel.Config(16, 32, 4, 3)}
TILE_BYTES = 4 * 32 * 32


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"PARTIAL_BYTES": 1},  # a launch per pair of blocks
        {"PARTIAL_BYTES": 60 * TILE_BYTES, "CHUNK_BYTES": 1},  # several pairs, sample by sample
        {"SUB": 32, "PROGRAMS": 400, "CHUNK_BYTES": 30_000},  # many stretches, and a last chunk that is shorter
    ],
    ids=["chosen", "pairs", "samples", "stretches"],
)
@pytest.mark.parametrize("shape", [(5, 40, 6, 5, 50, 3), (7, 50, 4, 5, 40, 1), (5, 10, 8, 8, 20, 3)], ids=str)
def test_launches_of_conv_gram(
    shape: tuple[int, ...], constants: dict[str, Any], weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums do not depend on how they are spread over launches, programs and chunks of samples."""
    for name, value in (SMALL_TILES | constants).items():
        monkeypatch.setattr(gram_kernel, name, value)
    gram_kernel.plan.cache_clear()
    n, c, h, w, c_out, kernel = shape
    x, y = torch.randn(n, c, h, w, device=DEVICE) + 0.5, torch.randn(n, c_out, h, w, device=DEVICE)
    weight = torch.rand(n, device=DEVICE) if weighted else None
    geometry = (kernel, kernel), (1, 1), (kernel // 2, kernel // 2)
    try:
        got = gram_kernel.conv_gram(x, y, *geometry, weight)
    finally:
        gram_kernel.plan.cache_clear()
    exact = reference.conv_gram(x.double(), y.double(), *geometry, None if weight is None else weight.double())
    for value, want in zip(got, exact, strict=True):
        torch.testing.assert_close(value.double(), want, rtol=2e-5, atol=3e-6 * float(want.abs().max()))


def test_groups_of_conv_gram_cover_every_tile_once() -> None:
    """[1280, 32, 32] to 1280: the partial sums of a launch stay within their bound, and all launches together make up the results."""
    table = gram_kernel.Table(32, 32, 1280, 1280, 1)
    known = gram_kernel.products(table, 9)
    groups = gram_kernel.plan(table, 9, 4, torch.device("cpu"))
    assert len(groups) > 1 and all(4 * 128**2 * g.partials <= gram_kernel.PARTIAL_BYTES for g in groups)
    tiles = [tuple(t) for g in groups for t in g.tiles.tolist()]
    cross = [tuple(t) for g in groups for t in g.cross.tolist()]
    everything = [(r, q) for r in range(10) for q in range(10)]
    assert sorted(tiles) == sorted(cross) == everything
    for group in groups:
        slots = group.slots.flatten()
        used = sorted(slots[slots >= 0].tolist())
        assert used == sorted(set(used)) and sorted(i[2] for i in group.items.tolist()) == list(range(group.partials))
        for d, product in enumerate(known):
            wanted = group.cross if product.cross else group.tiles
            for r, q in wanted.tolist():
                assert group.slots[d, r, q] >= 0 or (product.symmetric and r > q and group.slots[d, q, r] >= 0)


def test_direct_calls_name_the_wrong_argument() -> None:
    x, rows, out = torch.randn(2, 3, 4, 4), torch.tensor([0, 1]), torch.zeros(2, 3)
    for arguments, name in (
        ((x[0, 0, 0], rows, out), "x must have"),
        ((x.double(), rows, out), "x must be"),
        ((x, rows.int(), out), "rows must be"),
        ((x, rows[:1], out), "rows must be"),
        ((x, rows, out[:, :2]), "out must be"),
        ((x, rows, out.double()), "out must be"),
        ((x, rows, out, out[:1]), "sums must"),
    ):
        with pytest.raises(ValueError, match=name):
            sq_kernel.channel_sq_norm(*arguments)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, device=DEVICE)

    weight = rand(4, 3)
    for call, name in (
        (lambda: score_kernel.wanda_score(weight[0], rand(3)), "weight must have"),
        (lambda: score_kernel.wanda_score(weight.double(), rand(3)), "weight must be"),
        (lambda: score_kernel.wanda_score(weight, rand(4)), "act_norm"),
        (lambda: score_kernel.wanda_score(weight, rand(1, 3)), "act_norm"),
        (lambda: score_kernel.wanda_score_stats(weight, rand(2, 4), rand(2)), "sq"),
        (lambda: score_kernel.wanda_score_stats(weight, rand(2, 3), rand(3)), "row_weight"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


def test_a_known_shape_is_checked_again() -> None:
    """What a launch was prepared for holds for these dtypes alone."""
    x, rows, out = torch.randn(2, 3, 4, 4, device=DEVICE), torch.tensor([0, 1], device=DEVICE), torch.zeros(2, 3, device=DEVICE)
    sq_kernel.channel_sq_norm(x, rows, out, torch.zeros_like(out))
    for arguments, name in (
        ((x, rows.double(), out, torch.zeros_like(out)), "rows must be"),
        ((x, rows, out.long(), torch.zeros_like(out)), "out must be"),
        ((x, rows, out, torch.zeros_like(out).double()), "sums must be"),
    ):
        with pytest.raises(ValueError, match=name):
            sq_kernel.channel_sq_norm(*arguments)


def test_a_launch_belongs_to_the_alignment_that_it_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with a stride are copied, and copies are aligned; rows of their address without a stride are not."""
    monkeypatch.setattr(sq_kernel, "_launches", {})
    x, base = torch.randn(4, 5, 3, 3, device=DEVICE), torch.tensor([9, 0, 1, 2, 2, 3, 3, 3, 3], device=DEVICE)
    for rows in (base[1::2], base[1:5]):
        assert rows.data_ptr() % 16 == 8
        out = torch.zeros(4, 5, device=DEVICE)
        sq_kernel.channel_sq_norm(x, rows, out)
        torch.testing.assert_close(out.double(), truth_of(x, rows, torch.zeros(4, 5, device=DEVICE)), rtol=1e-6, atol=1e-6)
    assert len(sq_kernel._launches) == 2


COMPILE = '''
import re, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wanda_fast.kernels import channel_sq_norm as kernel

NAMES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
for shape, layout in (((128, 128, 32, 32), "nchw"), ((128, 128, 32, 32), "channels_last"), ((2, 1024, 1280), "nlc")):
    for dtype in NAMES:
        form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=form)
        if layout == "channels_last":
            x = torch.empty(shape, dtype=dtype, device="meta", memory_format=form)
        channels = shape[1] if len(shape) == 4 else shape[-1]
        rows, out = torch.empty(shape[0], dtype=torch.int64, device="meta"), torch.empty(shape[0], channels, device="meta")
        launch = kernel._prepare(x, rows, out, False, None)
        function = kernel._channel_sq_norm_kernel
        pointers = (NAMES[dtype], "*i64", "*fp32", "*fp32", "*fp32", "*i32")
        values = dict(zip(function.arg_names, (*pointers, *launch.integers, *launch.constants.values())))
        signature, constants, attributes = {}, {}, {}
        for i, (name, value) in enumerate(values.items()):
            if isinstance(value, str):
                signature[name], attributes[(i,)] = value, [["tt.divisibility", 16]]
            elif name in launch.constants or value == 1:
                signature[name], constants[(i,)] = "constexpr", value
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        for arch in map(int, sys.argv[1:]):
            built = triton.compile(ASTSource(function, signature, constants, attributes), target=GPUTarget("cuda", arch, 32),
                                   options={"num_warps": launch.num_warps})
            wide = len(re.findall(r"ld\\.global[.\\w:]*\\.v4\\.b32", built.asm["ptx"]))
            assert len(built.asm["cubin"]) > 0
            assert wide >= 4, (shape, layout, dtype, arch, wide)
print("compiled")
'''  # fmt: skip


def test_compiles_for_every_architecture_with_16_byte_loads(tmp_path: Path) -> None:
    """Without a GPU: machine code for sm_80, sm_90 and sm_100, reading x in 16-byte words in every layout and dtype."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, "80", "90", "100"],
        capture_output=True,
        text=True,
        timeout=280,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("compiled")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_captured_graphs_keep_their_own_tickets() -> None:
    """Two graphs that hold the ticket path replay at once on two streams, between eager calls."""
    x = torch.randn(8, 320, 64, 64, device="cuda")
    rows = torch.arange(8, device="cuda") // 2
    want = truth_of(x, rows, torch.zeros(4, 320, device="cuda"))
    eager = torch.zeros(4, 320, device="cuda")
    sq_kernel.channel_sq_norm(x, rows, eager)
    outs, graphs, streams = [], [], [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in streams:
        out = torch.zeros(4, 320, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(4):
                sq_kernel.channel_sq_norm(x, rows, out)
        outs.append(out)
        graphs.append(graph)
    for _ in range(5):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        sq_kernel.channel_sq_norm(x, rows, eager)
    torch.cuda.synchronize()
    for out in outs:
        torch.testing.assert_close(out.double(), 20 * want, rtol=1e-5, atol=1e-3)
        assert torch.equal(out, outs[0])
    torch.testing.assert_close(eager.double(), 6 * want, rtol=1e-5, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_side_stream_and_alignment() -> None:
    """The cached launch is only reused for the same alignment, and scratch belongs to a stream."""
    base = torch.randn(4 * 64 * 256 + 8, device="cuda")
    rows = torch.tensor([0, 0, 1, 1], device="cuda")
    torch.cuda.synchronize()
    for shift in (0, 1, 2, 4, 0):
        x = base[shift : shift + 4 * 64 * 256].view(4, 64, 16, 16)
        with torch.cuda.stream(torch.cuda.Stream()):
            out = torch.zeros(2, 64, device="cuda")
            sq_kernel.channel_sq_norm(x, rows, out)
        torch.cuda.synchronize()
        torch.testing.assert_close(
            out.double(), truth_of(x, rows, torch.zeros(2, 64, device="cuda")), rtol=1e-6, atol=1e-4
        )
