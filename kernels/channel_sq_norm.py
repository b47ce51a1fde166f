"""Channel energy of activations: out[rows[n], c] += Σ_s x[n, c, s]², in one read of x and one launch.

Layouts: every [N, C, H, W] view (contiguous, channels-last, sliced; read in place through its strides) and channel-last
[N, L, C] and [N, C].
Traffic: each element of x is read once (4 bytes in fp32, 2 in fp16 and bf16); 8 bytes per element of the N touched rows of `out`.
Sums are fp32. No floating-point atomics: a program owns one (sample, channel block, slice of positions). It adds straight to
`out` when no other program adds to the same place; otherwise it writes a partial, and the last to arrive (an integer ticket) adds
all partials in index order. The result therefore does not depend on the order in which programs run.

Source: the activation norm of Wanda, Sun et al. 2023, arXiv:2306.11695, section 3; the last-block reduction is CUDA's
threadFenceReduction sample.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One launch holds at most this many samples: each program compares its row with all of them, and grid.z ends at 65,535.
MAX_SAMPLES = 1024
# Inside the kernel positions and places in the table of partials are 32-bit numbers: larger inputs take several launches.
MAX_POSITIONS = 1 << 30
MAX_PARTIALS = 1 << 30
# Bytes of x that one program holds at once: four 16-byte loads per thread of 4 warps. Measured best on an H200 among 4 to 32 KiB.
TILE_BYTES = 8192
# Tiles shrink down to MIN_TILE elements until there are this many programs: 132 multiprocessors hold about eight each.
MIN_PROGRAMS = 1024
MIN_TILE = 1024
# With fewer programs than this the positions of a sample are split over several, which costs partials and a ticket.
SPLIT_BELOW = 256
# Integer tickets set aside for captured graphs: each captured launch keeps its own, so that two graphs may replay at once.
CAPTURE_TICKETS = 1 << 20


class Config(NamedTuple):
    """Tile shape of one launch: BLOCK_C channels by BLOCK_S positions, SPLIT slices of SPLIT_LEN positions, tiles in flight."""

    block_c: int
    block_s: int
    split: int
    split_len: int
    num_warps: int
    stages: int = 1


@triton.jit
def _load_tile(
    channel_ptr, first_s, stop, mask_c, W, stride_xh, stride_xs,
    BLOCK_S: tl.constexpr, TWO_D: tl.constexpr, EVEN_C: tl.constexpr, EVEN_S: tl.constexpr,
):  # fmt: skip
    """[BLOCK_C, BLOCK_S] values in fp32, from position first_s on."""
    offs_s = first_s + tl.arange(0, BLOCK_S)
    if TWO_D:
        position = (offs_s // W).to(tl.int64) * stride_xh + (offs_s % W).to(tl.int64) * stride_xs
    else:
        position = offs_s.to(tl.int64) * stride_xs
    pointers = channel_ptr + position[None, :]
    if EVEN_C and EVEN_S:
        value = tl.load(pointers)
    elif EVEN_C:
        value = tl.load(pointers, mask=(offs_s < stop)[None, :], other=0.0)
    elif EVEN_S:
        value = tl.load(pointers, mask=mask_c[:, None], other=0.0)
    else:
        value = tl.load(pointers, mask=mask_c[:, None] & (offs_s < stop)[None, :], other=0.0)
    return value.to(tl.float32)


@triton.jit
def _channel_sq_norm_kernel(
    x_ptr,
    rows_ptr,
    out_ptr,
    sums_ptr,
    partial_ptr,
    ticket_ptr,
    N,
    C,
    S,
    W,
    R,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xs,
    stride_or,
    stride_oc,
    SPLIT_LEN,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TWO_D: tl.constexpr,
    EVEN_C: tl.constexpr,
    EVEN_S: tl.constexpr,
    WITH_SUMS: tl.constexpr,
    STAGES: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    pid_c = tl.program_id(0)
    pid_s = tl.program_id(1)
    n = tl.program_id(2)

    # Issued before x so that their latency hides behind the stream.
    row = tl.load(rows_ptr + n).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    all_rows = tl.load(rows_ptr + offs_n, mask=offs_n < N, other=-1).to(tl.int64)

    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    channel_ptr = x_ptr + n.to(tl.int64) * stride_xn + offs_c[:, None].to(tl.int64) * stride_xc  # [BLOCK_C, 1]
    start = pid_s * SPLIT_LEN
    stop = tl.minimum(start + SPLIT_LEN, S)

    # The first tile is on its way before anything waits for `row`; the present value of `out` then arrives together with it.
    value = _load_tile(
        channel_ptr, start, stop, mask_c, W, stride_xh, stride_xs, BLOCK_S, TWO_D, EVEN_C, EVEN_S
    )  # [BLOCK_C, BLOCK_S]
    mask = mask_c & (row >= 0) & (row < R)
    offset = row * stride_or + offs_c.to(tl.int64) * stride_oc
    before = tl.load(out_ptr + offset, mask=mask, other=0.0)
    if WITH_SUMS:
        before_sum = tl.load(sums_ptr + offset, mask=mask, other=0.0)

    acc = value * value
    acc_sum = value
    if not ONE_TILE:
        for first_s in tl.range(start + BLOCK_S, stop, BLOCK_S, num_stages=STAGES):
            value = _load_tile(
                channel_ptr, first_s, stop, mask_c, W, stride_xh, stride_xs, BLOCK_S, TWO_D, EVEN_C, EVEN_S
            )
            acc += value * value
            if WITH_SUMS:
                acc_sum += value
    total = tl.sum(acc, axis=1)  # [BLOCK_C]
    total_sum = tl.sum(acc_sum, axis=1) if WITH_SUMS else total

    same = (all_rows == row) & (offs_n < N)
    count = tl.sum(same.to(tl.int32), axis=0) * SPLIT
    if count == 1:
        tl.store(out_ptr + offset, before + total, mask=mask)
        if WITH_SUMS:
            tl.store(sums_ptr + offset, before_sum + total_sum, mask=mask)
    else:
        first = tl.min(tl.where(same, offs_n, BLOCK_N), axis=0)
        last = tl.max(tl.where(same, offs_n, -1), axis=0)
        plane = N * SPLIT * C
        slot = (n * SPLIT + pid_s) * C + offs_c
        tl.store(partial_ptr + slot, total, mask=mask_c)
        if WITH_SUMS:
            tl.store(partial_ptr + plane + slot, total_sum, mask=mask_c)
        # All threads' partials are written before one thread takes the ticket, which publishes them device-wide.
        tl.debug_barrier()
        ticket = ticket_ptr + first * tl.num_programs(0) + pid_c
        arrived = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
        if arrived == count - 1:
            acc_p = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
            acc_q = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
            end = (last + 1) * SPLIT
            for first_p in range(first * SPLIT, end, BLOCK_P):
                offs_p = first_p + tl.arange(0, BLOCK_P)
                owner = tl.load(rows_ptr + offs_p // SPLIT, mask=offs_p < end, other=-1).to(tl.int64)
                mask_p = ((owner == row) & (offs_p < end))[:, None] & mask_c[None, :]
                slots = offs_p[:, None] * C + offs_c[None, :]
                acc_p += tl.load(partial_ptr + slots, mask=mask_p, other=0.0, cache_modifier=".cg")
                if WITH_SUMS:
                    acc_q += tl.load(partial_ptr + plane + slots, mask=mask_p, other=0.0, cache_modifier=".cg")
            tl.store(
                out_ptr + offset, tl.load(out_ptr + offset, mask=mask, other=0.0) + tl.sum(acc_p, axis=0), mask=mask
            )
            if WITH_SUMS:
                q = tl.load(sums_ptr + offset, mask=mask, other=0.0) + tl.sum(acc_q, axis=0)
                tl.store(sums_ptr + offset, q, mask=mask)
            tl.store(ticket, 0)  # ready for the next launch on this stream


class _Scratch:
    """Partials and tickets of one stream: launches of a stream never overlap, so they share them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.partial = torch.empty(0, dtype=torch.float32, device=device)
        self.tickets = torch.zeros(0, dtype=torch.int32, device=device)

    def reserve(self, partials: int, tickets: int) -> None:
        if self.partial.numel() < partials:
            self.partial = torch.empty(2 * partials, dtype=torch.float32, device=self.device)
        if self.tickets.numel() < tickets:
            self.tickets = torch.zeros(2 * tickets, dtype=torch.int32, device=self.device)


class _CaptureTickets:
    """Zeroed tickets handed out once each to captured launches, since a graph outlives the scratch of the stream it was captured on."""

    def __init__(self, device: torch.device) -> None:
        self.tickets = torch.zeros(CAPTURE_TICKETS, dtype=torch.int32, device=device)
        self.used = 0

    def take(self, count: int) -> Tensor | None:
        count = -(-count // 4) * 4  # kernels are built for pointers aligned to 16 bytes
        if self.used + count > CAPTURE_TICKETS:
            return None
        self.used += count
        return self.tickets[self.used - count : self.used]


class _Launch(NamedTuple):
    """Everything about one launch that its shapes decide; `compiled` holds the kernel once Triton has built it."""

    grid: tuple[int, int, int]
    integers: tuple[int, ...]
    constants: dict[str, Any]
    num_warps: int
    partials: int
    tickets: int
    compiled: list[Any]


_launches: dict[tuple[Any, ...], _Launch] = {}
_scratch: dict[tuple[int, int], _Scratch] = {}
_capture_tickets: dict[int, _CaptureTickets] = {}


def _divide(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def choose_config(samples: int, channels: int, positions: int, channels_inner: bool, item_size: int = 4) -> Config:
    """Tile shape for N samples of C channels at S positions; `channels_inner` when neighbouring channels are neighbours in memory."""
    stages = 1
    if channels_inner:
        # 64 channels are one to two full 128-byte lines; narrower where that wastes lanes or leaves multiprocessors idle. The long walk down
        # the positions fetches small tiles four ahead: 64 x 64 on 4 warps, three ahead, reached 0.72 of copy where these reach 0.92.
        block_c = min(_power_of_2(channels), 64)
        steps = _divide(positions, 32)  # long walks can be split over several programs
        while block_c > 32 and (channels % block_c or samples * _divide(channels, block_c) * steps < SPLIT_BELOW):
            block_c //= 2
        block_s = min(_power_of_2(positions), max(4096 // block_c, 1))
        num_warps = 4
        stages = 3 if positions > block_s else 1
        if block_c == 64 and stages > 1:
            block_s, num_warps, stages = 32, 2, 4
    elif positions >= 4096:
        block_s, num_warps = 4096, 8
        block_c = 2 if samples * channels >= 2 * MIN_PROGRAMS else 1
    else:
        block_s = min(_power_of_2(positions), 1024)
        block_c = min(_power_of_2(channels), max(TILE_BYTES // (item_size * block_s), 1))
        num_warps = 4
        while block_c > 1 and block_c * block_s > MIN_TILE and samples * _divide(channels, block_c) < SPLIT_BELOW:
            block_c //= 2
    programs = samples * _divide(channels, block_c)
    steps = _divide(positions, block_s)
    # Fewer, longer walks for tiles that are fetched ahead.
    wanted = MIN_PROGRAMS if stages < 4 else MIN_PROGRAMS // 2
    split = 1 if programs >= SPLIT_BELOW else min(steps, _divide(wanted, programs))
    # The last to arrive reads samples · split partials: keep that short.
    split = max(1, min(split, 4096 // samples, 64))
    split_len = _divide(steps, split) * block_s
    split = _divide(positions, split_len)
    num_warps = max(1, min(num_warps, block_c * block_s // 128))
    return Config(block_c, block_s, split, split_len, num_warps, stages if split_len > block_s else 1)


def _prepare(x: Tensor, rows: Tensor, out: Tensor, with_sums: bool, config: Config | None) -> _Launch:
    if x.dim() == 4:
        N, C, H, W = x.shape
        stride_xn, stride_xc, stride_xh, stride_xs = x.stride()
        S, two_d = H * W, False
        if W == 1:
            stride_xs = stride_xh
        elif H > 1 and stride_xh != W * stride_xs:
            two_d = True
    else:
        N, C, W = x.shape[0], x.shape[-1], 1
        S = x.shape[1] if x.dim() == 3 else 1
        stride_xn, stride_xc, stride_xh, two_d = x.stride(0), x.stride(-1), 0, False
        stride_xs = x.stride(1) if x.dim() == 3 else 0
    channels_inner = C > 1 and (S == 1 or stride_xc < stride_xs)
    config = config or choose_config(N, C, S, channels_inner, x.element_size())
    blocks_c = _divide(C, config.block_c)
    constants = {
        "SPLIT": config.split,
        "BLOCK_N": _power_of_2(N),
        "BLOCK_C": config.block_c,
        "BLOCK_S": config.block_s,
        "BLOCK_P": max(1, min(_power_of_2(N * config.split), 512 * config.num_warps // config.block_c, 64)),
        "TWO_D": two_d,
        "EVEN_C": C % config.block_c == 0,
        "EVEN_S": S % config.block_s == 0 and config.split_len % config.block_s == 0,
        "WITH_SUMS": with_sums,
        "STAGES": config.stages,
        "ONE_TILE": config.split_len <= config.block_s,
    }
    needs_partials = N * config.split > 1
    return _Launch(
        grid=(blocks_c, config.split, N),
        integers=(
            N,
            C,
            S,
            W,
            out.shape[0],
            stride_xn,
            stride_xc,
            stride_xh,
            stride_xs,
            out.stride(0),
            out.stride(1),
            config.split_len,
        ),
        constants=constants,
        num_warps=config.num_warps,
        partials=(2 if with_sums else 1) * N * config.split * C if needs_partials else 1,
        tickets=N * blocks_c if needs_partials else 1,
        compiled=[],
    )


def _workspace(launch: _Launch, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    """Partials and tickets of a launch. Inside a graph capture the memory belongs to the graph."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        partial = torch.empty(launch.partials, dtype=torch.float32, device=device)
        reserved = _capture_tickets.get(device.index)
        tickets = reserved.take(launch.tickets) if reserved is not None else None
        if tickets is None:  # nothing reserved before the capture began, or all of it used: one more memset in the graph
            tickets = torch.zeros(launch.tickets, dtype=torch.int32, device=device)
        return partial, tickets
    index = device.index if device.index is not None else -1
    scratch = _scratch.get((index, stream))
    if scratch is None:
        scratch = _scratch[(index, stream)] = _Scratch(device)
        if device.type == "cuda" and index not in _capture_tickets:
            _capture_tickets[index] = _CaptureTickets(device)
    scratch.reserve(launch.partials, launch.tickets)
    return scratch.partial, scratch.tickets


def _check(x: Tensor, rows: Tensor, out: Tensor, sums: Tensor | None) -> None:
    if x.dim() not in (2, 3, 4):
        raise ValueError(f"x must have 2, 3 or 4 dimensions, got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}")
    if rows.dtype != torch.int64 or rows.shape != (x.shape[0],):
        raise ValueError(f"rows must be int64 of shape [{x.shape[0]}], got {rows.dtype} of shape {list(rows.shape)}")
    channels = x.shape[1] if x.dim() == 4 else x.shape[-1]
    for name, table in (("out", out), ("sums", out if sums is None else sums)):
        if table.dtype != torch.float32 or table.dim() != 2 or table.shape[1] != channels:
            raise ValueError(
                f"{name} must be float32 of shape [R, {channels}], got {table.dtype} of shape {list(table.shape)}"
            )
        if table.device != x.device or rows.device != x.device:
            raise ValueError(
                f"x, rows and {name} must be on one device, got {x.device}, {rows.device} and {table.device}"
            )
        if table.shape != out.shape or table.stride() != out.stride():
            raise ValueError(
                f"sums must have the shape and strides of out, got {list(table.shape)} and {list(out.shape)}"
            )


def channel_sq_norm(
    x: Tensor, rows: Tensor, out: Tensor, sums: Tensor | None = None, *, config: Config | None = None
) -> Tensor:
    """Add each sample's channel energy to its row: out[rows[n], c] += Σ_s x[n, c, s]².

    Args:
        x: [N, C, H, W] with any strides, or [N, L, C] or [N, C] with the channel last; fp32, fp16 or bf16. N, C and the positions may be 0.
        rows: [N] int64, 0 ≤ rows[n] < R. Rows may repeat; the sum is bitwise repeatable. A row outside the range adds nothing
            (checking it would stop the device; the operation in ops.py checks where it can).
        out: [R, C] fp32, changed in place.
        sums: [R, C] fp32 with the strides of `out`; if given, also sums[rows[n], c] += Σ_s x[n, c, s] from the same read.
        config: tile shape, for tuning; chosen from the shape when None.

    Returns:
        out.

    Raises:
        ValueError: shapes, dtypes or devices disagree; the text names the argument.
    """
    if not rows.is_contiguous():
        rows = rows.contiguous()
    # All that the checks look at, and the alignment that the kernel is built for.
    key = (
        x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() & 15, rows.shape, rows.dtype, rows.get_device(), rows.data_ptr() & 15,
        out.shape, out.stride(), out.dtype, out.get_device(), out.data_ptr() & 15,
        None if sums is None else (sums.shape, sums.stride(), sums.dtype, sums.get_device(), sums.data_ptr() & 15), config,
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None:
        _check(x, rows, out, sums)
        if x.numel() == 0 or out.shape[0] == 0:
            return out
        samples = max(1, min(MAX_SAMPLES, MAX_PARTIALS // out.shape[1]))
        if x.shape[0] > samples:
            for n in range(0, x.shape[0], samples):  # launches of one stream run in order: still repeatable
                channel_sq_norm(x[n : n + samples], rows[n : n + samples], out, sums, config=config)
            return out
        if x.numel() // (x.shape[0] * out.shape[1]) > MAX_POSITIONS:
            dim = 1 if x.dim() == 3 else 2 if x.shape[2] > 1 else 3
            for part in x.chunk(2, dim):
                channel_sq_norm(part, rows, out, sums, config=config)
            return out
        if x.device.type == "cpu" and not triton.knobs.runtime.interpret:
            raise ValueError("x is on the CPU: Triton runs there only with TRITON_INTERPRET=1")
        if len(_launches) >= 4096:
            _launches.clear()
        launch = _launches[key] = _prepare(x, rows, out, sums is not None, config)
    table = out if sums is None else sums

    if x.is_cuda:
        index = x.get_device()
        if index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return channel_sq_norm(x, rows, out, sums, config=config)
        stream = torch._C._cuda_getCurrentRawStream(index)
        partial, tickets = _workspace(launch, x.device, stream)
        if launch.compiled:
            # Same shapes, strides and alignment: skip Triton's argument analysis, which costs more than the kernel of a small layer.
            launch.compiled[0][launch.grid](
                x, rows, out, table, partial, tickets, *launch.integers, *launch.constants.values(), stream=stream
            )
            return out
        guard: Any = nullcontext()
    else:
        partial, tickets = _workspace(launch, x.device, 0)
        guard = nullcontext() if x.device.type == "cpu" else torch.get_device_module(x.device).device(x.device)
    with guard:
        built = _channel_sq_norm_kernel[launch.grid](
            x, rows, out, table, partial, tickets, *launch.integers, **launch.constants, num_warps=launch.num_warps
        )
    if x.is_cuda and built is not None:
        launch.compiled.append(built)
    return out
