"""Widths chosen by measured time: a table of layer times on this device, and a network that is measured before it is believed.

Each kind of layer of the network (type, kernel, stride, size of its map) is timed on this device and batch at a few widths of its
inputs and outputs. Least squares turn that table into seconds = a + b·C_in + c·C_out + d·C_in·C_out per layer, and a + b·C
per GroupNorm with its SiLU. `LatencyModel` adds them up and stands in for `wanda_fast.plan.CostModel`, so the search for
widths spends seconds where it would spend MACs.

Layers by themselves are not a network: compilers fuse what lies between them. So the whole network is timed too, dense and
candidate in turns, and the budget of the search is corrected by what was measured (`search`).
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .evaluation import _seconds, forget_compiled
from .graphs import CudaCapture
from .plan import CostModel
from .slots import SlotMap

MODES = ("compiled", "eager")
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the dense width, at which layers are timed
ROUNDS = 4
TOLERANCE = 0.03  # a candidate this much faster than asked is not searched for again
_UNIT = 1e-12  # seconds; budgets of a search are whole numbers


@dataclass
class LatencyModel:
    """Time of a network's layers as a function of its slots' widths; `sizes` has the form of `CostModel.sizes`.

    Attributes:
        costs: gives the parameters and says which layer reads and writes which slots.
        layers: layer -> (a, b, c, d) of seconds = a + b·C_in + c·C_out + d·C_in·C_out.
        norms: norm -> (a, b) of seconds = a + b·C.
        table: what was measured: kind of layer -> [(C_in, C_out, seconds)].
    """

    costs: CostModel
    layers: dict[str, tuple[float, float, float, float]]
    norms: dict[str, tuple[float, float]]
    table: dict[str, list[tuple[int, int, float]]] = field(default_factory=dict)

    def sizes(self, widths: Mapping[str, int], *, sinusoid: int | None = None) -> tuple[int, int]:
        """(parameters, picoseconds of a forward pass)."""
        return self.costs.sizes(widths, sinusoid=sinusoid)[0], int(self.seconds(widths, sinusoid=sinusoid) / _UNIT)

    def part(self, names: Iterable[str]) -> LatencyModel:
        """The model of the layers and norms alone whose time may change with these slots."""
        return replace(self, costs=self.costs.part(names))

    def seconds(self, widths: Mapping[str, int], *, sinusoid: int | None = None) -> float:
        """Predicted seconds of a forward pass."""
        slots = self.costs.slots

        def total(segments: tuple, dense: int) -> float:
            return sum(widths.get(s.slot, slots.slots[s.slot].width) for s in segments) if segments else dense

        seconds = 0.0
        for c in self.costs.layers:
            if c.name not in self.layers:
                continue
            c_in, c_out = total(slots.inputs.get(c.name, ()), c.c_in), total(slots.outputs.get(c.name, ()), c.c_out)
            if sinusoid is not None and c.name in self.costs.sinusoid_consumers:
                c_in = sinusoid
            a, b, g, d = self.layers[c.name]
            seconds += a + b * c_in + g * c_out + d * c_in * c_out
        for name, dense in self.costs.norms.items():
            if name in self.norms:
                a, b = self.norms[name]
                seconds += a + b * total(slots.inputs[name], dense)
        return seconds


# ------------------------------------------------------------------------------------------------------------- the table


def measure_layers(
    unet: nn.Module,
    slots: SlotMap,
    costs: CostModel,
    call: Callable[[nn.Module], Any],
    *,
    dtype: torch.dtype,
    fused_norms: bool = False,
    repeats: int = 3,
) -> LatencyModel:
    """Time every kind of layer that the network's forward pass meets, at some widths, in channels-last memory.

    Args:
        unet: the dense network, on the device to measure.
        slots, costs: its own.
        call: runs one forward pass of the batch to measure, `call(unet)`.
        dtype: of weights and activations.
        fused_norms: time norms under torch.compile, which fuses a norm and its SiLU. On a GPU the eager ones would count twice as much
            beside the convolutions as they do in a compiled network (benchmarks/results/notes.md, "Images per second").
        repeats: timings of which the median counts.
    """
    device = next(unet.parameters()).device
    shapes: dict[str, tuple[Any, torch.Size]] = {}
    handles = [
        m.register_forward_pre_hook(lambda m, args, name=name: shapes.setdefault(name, (m, args[0].shape)) and None)
        for name, m in unet.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.GroupNorm))
    ]
    try:
        with torch.no_grad():
            call(unet)
    finally:
        for handle in handles:
            handle.remove()
    table: dict[str, list[tuple[int, int, float]]] = {}
    kinds: dict[str, str] = {}
    for name, (module, shape) in shapes.items():
        kind = kinds[name] = _kind(module, shape)
        points = table.setdefault(kind, [])
        # Every compilation takes seconds, and a line needs two points.
        norm = fused_norms and isinstance(module, nn.GroupNorm)
        for c_in, c_out in _grid(module, shape, (1.0, 0.5) if norm else SHARES):
            if not any(p[:2] == (c_in, c_out) for p in points) and not (norm and len(points) > 3):
                points.append((c_in, c_out, _time(module, shape, c_in, c_out, device, dtype, repeats, norm)))
    fits = {kind: _fit(points) for kind, points in table.items()}
    layers = {n: fits[k] for n, k in kinds.items() if not isinstance(shapes[n][0], nn.GroupNorm)}
    norms = {n: (fits[k][0], fits[k][1]) for n, k in kinds.items() if isinstance(shapes[n][0], nn.GroupNorm)}
    return LatencyModel(costs, layers, norms, table)


def _kind(module: Any, shape: torch.Size) -> str:
    if isinstance(module, nn.Conv2d):
        k, s, p = module.kernel_size, module.stride, module.padding
        return f"conv {k[0]}x{k[1]} stride {s[0]} padding {p} on {shape[2]}x{shape[3]}"
    positions = shape[2:] if isinstance(module, nn.GroupNorm) else shape[1:-1]
    return f"{'norm' if isinstance(module, nn.GroupNorm) else 'linear'} on {'x'.join(map(str, positions)) or 1}"


def _grid(module: Any, shape: torch.Size, shares: tuple[float, ...] = SHARES) -> list[tuple[int, int]]:
    def widths(full: int) -> list[int]:
        return sorted({full if full < 16 else max(8, round(full * s / 8) * 8) for s in shares})

    if isinstance(module, nn.GroupNorm):
        return [(c, c) for c in sorted({max(module.num_groups, int(shape[1] * s)) // module.num_groups * module.num_groups for s in shares})]
    c_in, c_out = (module.in_channels, module.out_channels) if isinstance(module, nn.Conv2d) else (
        module.in_features, module.out_features)  # fmt: skip
    return list(itertools.product(widths(c_in), widths(c_out)))


def _time(
    module: Any,
    shape: torch.Size,
    c_in: int,
    c_out: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    compiled: bool = False,
) -> float:
    """Median seconds of one layer of other widths, replayed from a CUDA graph on a GPU: launches cost nothing there."""
    if isinstance(module, nn.Linear):
        x = torch.randn(*shape[:-1], c_in, device=device, dtype=dtype)
        weight = torch.randn(c_out, c_in, device=device, dtype=dtype)
        one: Callable[[], Tensor] = lambda: F.linear(x, weight)  # noqa: E731
    else:
        x = torch.randn(shape[0], c_in, *shape[2:], device=device, dtype=dtype)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if isinstance(module, nn.GroupNorm):
            one = lambda: F.silu(F.group_norm(x, module.num_groups))  # noqa: E731
        else:
            weight = torch.randn(c_out, c_in, *module.kernel_size, device=device, dtype=dtype)
            weight = weight.contiguous(memory_format=torch.channels_last)
            one = lambda: F.conv2d(x, weight, None, module.stride, module.padding)  # noqa: E731
    if compiled:
        forget_compiled()  # the shapes before it: past a number of them the rest would run eagerly
        one = torch.compile(one, dynamic=False)
    with torch.no_grad():
        if device.type != "cuda":
            one()
            return statistics.median(_seconds(one, device) for _ in range(repeats))
        for _ in range(3):  # lets the library choose its algorithm before the capture
            one()

        def ten() -> None:
            for _ in range(10):
                one()

        replay = CudaCapture(device)(ten)
        replay()
        return statistics.median(_seconds(replay, device) for _ in range(repeats)) / 10


def _fit(points: list[tuple[int, int, float]]) -> tuple[float, float, float, float]:
    """(a, b, c, d) of seconds ≈ a + b·C_in + c·C_out + d·C_in·C_out; terms that the points cannot tell apart are 0."""
    c_in, c_out, seconds = (torch.tensor(v, dtype=torch.float64) for v in zip(*points, strict=True))
    columns = [torch.ones_like(seconds)]
    varies = [len(c_in.unique()) > 1, len(c_out.unique()) > 1 and not torch.equal(c_in, c_out)]
    columns += [c_in] if varies[0] else []
    columns += [c_out] if varies[1] else []
    columns += [c_in * c_out] if all(varies) else []
    matrix = torch.stack(columns, 1)
    scale = matrix.abs().amax(0)
    # relative errors: a small layer's time matters to the layer as a large one's does
    weight = 1 / seconds
    found = torch.linalg.lstsq(matrix / scale * weight[:, None], (seconds * weight)[:, None]).solution.flatten() / scale
    values = iter(found.tolist())
    a = next(values)
    b = next(values) if varies[0] else 0.0
    c = next(values) if varies[1] else 0.0
    return a, b, c, next(values) if all(varies) else 0.0


# ------------------------------------------------------------------------------------------------------------ the search


@dataclass
class Search:
    """What a search found: `share` is the measured time of the result over that of the dense network."""

    share: float
    asked: float
    rounds: list[dict[str, float]]

    @property
    def met(self) -> bool:
        return self.share <= self.asked

    def describe(self) -> str:
        """One line for a person."""
        missed = "" if self.met else f", which misses the target by {self.share / self.asked - 1:.1%}"
        return f"latency: {self.share:.3f}x of the dense network's, asked at most {self.asked:g}x{missed}; {len(self.rounds)} networks measured"


def search(asked: float, dense: int, choose: Callable[[int], Any], measure: Callable[[Any], float]) -> tuple[Any, Search]:
    """The candidate of largest measured time within the target; the fastest one where none is within it.

    Args:
        asked: share of the dense network's time, 0 < asked ≤ 1.
        dense: predicted cost of the dense network, in the unit of `choose`.
        choose: budget -> candidate.
        measure: candidate -> its measured time over the dense network's.

    Raises:
        UserError: not even the first budget can be met.
    """
    budget, tried = asked * dense, []
    candidates: list[tuple[float, Any]] = []
    for _ in range(ROUNDS):
        try:
            candidate = choose(int(budget))
        except UserError:
            if not candidates:
                raise
            break
        share = measure(candidate)
        candidates.append((share, candidate))
        tried.append({"budget": budget / dense, "measured": share})
        if asked * (1 - TOLERANCE) <= share <= asked:
            break
        # What was measured tells how far the sum of layers is off here; nearer to the goal it is off by nearly as much.
        following = budget * (asked * (1 - TOLERANCE / 3) / share)
        if any(abs(following / dense - t["budget"]) < 0.002 for t in tried) or following >= dense:
            break
        budget = following
    within = [c for c in candidates if c[0] <= asked]
    share, best = max(within, key=lambda c: c[0]) if within else min(candidates, key=lambda c: c[0])
    return best, Search(share, asked, tried)


def parse_latency(text: str | float, what: str = "target_latency") -> float:
    """The share 0.6 from "0.6x", "60%" or 0.6.

    Raises:
        UserError: not a share between 0 and 1.

    Example:
        >>> parse_latency("60%")
        0.6
    """
    word = str(text).strip().lower()
    try:
        share = float(word[:-1]) / 100 if word.endswith("%") else float(word.removesuffix("x"))
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise UserError(f"{what}: {text!r} is no share of the dense network's time, such as 0.6x")
    return share
