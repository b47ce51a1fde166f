"""Closed-form repair of a pruned network: every layer is refitted to the dense network's outputs, nothing is trained.

Layer by layer, in execution order: X is what the layer now receives in the pruned network (convolutions: unfolded patches,
and a column of ones for the bias), Y is what the dense network puts out there, restricted to the kept channels. The weight
becomes the ridge solution (XᵀX + λI) W' = XᵀY + λW, solved for the change: (XᵀX + λI) Δ = XᵀR with R = Y - XW. Since X
comes from the layers repaired before, later layers absorb what earlier ones could not restore, shifted norm
statistics included.

Source: DESIGN "Least-squares repair"; the layer-wise reconstruction goes back to He et al. 2017, arXiv:1707.06168.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanda_fast import inputs, ops
from wanda_fast.conv_gram import map_rows, patch_rows, row_gram, rows_weight, weight_rows
from wanda_fast.distributed import ranks
from wanda_fast.least_squares import Sums, solve_ridge
from wanda_fast.lockstep import Event, Hooked, Walk, first_tensor, peak_bytes
from wanda_fast.memory import free_gpu_bytes
from wanda_fast.offload import visiting
from wanda_fast.resume import RepairState

METHODS = ("lstsq", "bias", "none")
TARGETS = ("block", "layer")
RIDGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # few images want a strong one, thousands a weak one

Keep = dict[str, tuple["Tensor | None", "Tensor | None"]]
TimestepWeight = Callable[[Tensor], Tensor]  # t [N] int64 -> [N]
Batch = tuple[Tensor, Tensor, Any]  # x_t, t, and labels, a dictionary of conditioning, or None

HELD_OUT = 8  # every 8th image of a batch judges the fit and takes no part in it
_CPU_ROWS_PER_UNKNOWN = 8.0
_MIN_ROWS = 16384  # rows of a layer are not subsampled below this
_WHOLE_FROM = 0.35  # share of a map's positions from which on the whole map is cheaper than the rows
_HELD_ROWS = 4096  # rows of held-out images that are kept per layer
# squared relative error below which a layer's output counts as equal to the dense one's: rounding of the forward pass
_EXACT = {torch.float32: 1e-9, torch.float64: 1e-18, torch.float16: 1e-6, torch.bfloat16: 3e-5}


@dataclass
class LayerRepair:
    """What happened to one layer. Errors are Σ(Y - Ŷ)² / Σ(Y - mean Y)² of what the layer was fitted to."""

    layer: str
    status: str  # refitted | exact (its output equals the dense one's) | kept (no fit was better) | skipped
    error_before: float | None = None  # on the rows of the fit
    error_after: float | None = None
    held_before: float | None = None  # on images that took no part in the fit
    held_after: float | None = None
    rows: int = 0
    unknowns: int = 0
    ridge: float | None = None
    seconds: float = 0.0
    remark: str = ""

    @property
    def accepted(self) -> bool:
        return self.status == "refitted"


@dataclass
class RepairReport:
    """What a repair did: one entry per layer in execution order, and how it was run."""

    method: str
    layers: list[LayerRepair] = field(default_factory=list)
    images: int = 0
    replayed_images: int = 0  # images whose pass was run again for every layer, because memory did not hold them
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def summary(self) -> str:
        """One line for a person."""
        done = [r for r in self.layers if r.accepted]
        if self.method == "none":
            return "repair: none"
        if self.method == "bias":
            return f"repair: {len(done)} biases corrected with {self.images} images in {self.seconds:.1f} s"
        exact = sum(r.status == "exact" for r in self.layers)
        held = any(r.held_before is not None for r in done)  # fewer than 8 images leave none to judge by
        before = _geometric_mean([r.held_before if held else r.error_before for r in done])
        after = _geometric_mean([r.held_after if held else r.error_after for r in done])
        where = "held-out images" if held or not done else "the images of the fit"
        again = f", {self.replayed_images} of them passed anew for every layer, for lack of memory," if self.replayed_images else ""
        return (
            f"repair: {len(done)} of {len(self.layers)} layers refitted ({exact} were exact) with {self.images} images{again} in "
            f"{self.seconds:.1f} s; typical layer error {before:.2g} -> {after:.2g} on {where}"
        )


def save_picture(report: RepairReport, path: str | os.PathLike[str], *, title: str = "") -> None:
    """Write as PNG how much the error of every layer fell: one line per layer in execution order, on images that took no part.

    The folder of `path` is made. Layers that were exact or skipped are not shown; a layer that was kept is a single dot.
    """
    # No pyplot: it would choose a window system and keep state for a program that only writes a file.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [r for r in report.layers if r.error_before and not r.remark.startswith("fitted with")]
    shown = [r for r in shown if r.status in ("refitted", "kept")]
    kinds = {"convolution, linear": "tab:blue", "norm": "tab:orange", "kept as it was": "tab:gray"}
    figure = Figure(figsize=(11, max(3.0, 1.6 + 0.17 * len(shown))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for y, r in enumerate(shown):
        pair = (r.error_before, r.error_after) if r.held_before is None else (r.held_before, r.held_after)
        before, after = (float(v or 0.0) for v in pair)
        colour = kinds["kept as it was" if r.status == "kept" else "norm" if r.unknowns == 1 else "convolution, linear"]
        axes.plot([before, after], [y, y], color=colour, linewidth=1.2, alpha=0.5)
        axes.plot([before], [y], "o", color=colour, markersize=4, markerfacecolor="white")
        axes.plot([after], [y], "o", color=colour, markersize=4)
    axes.set_yticks(range(len(shown)), [r.layer for r in shown], fontsize=7)
    axes.set_ylim(len(shown) - 0.3, -0.7)
    if shown:
        axes.set_xscale("log")
    else:
        axes.text(0.5, 0.5, "no layer had anything to repair", transform=axes.transAxes, ha="center", va="center")
    judged = "images that took no part in the fit" if any(r.held_before for r in shown) else "the images of the fit"
    axes.set_xlabel(f"squared error relative to the layer's variance, on {judged}: before (ring) and after (dot)")
    axes.grid(axis="x", which="major", alpha=0.3)
    for name, colour in kinds.items():
        axes.plot([], [], "o-", color=colour, markersize=4, label=name)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"Repair{': ' + title if title else ''}", x=0.01, ha="left", fontsize=12)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _geometric_mean(values: Sequence[float | None]) -> float:
    logs = [math.log(v) for v in values if v]
    return math.exp(sum(logs) / len(logs)) if logs else 0.0


# ---------------------------------------------------------------------------------------------------------------- stages


@dataclass
class _Stage:
    """Layers that are fitted at one stop of the two passes.

    inputs[i] is the pruned network's event that holds layer i's input. `joint`: the layers' outputs are added up and fitted to
    one target together (a block's last convolution and its shortcut); otherwise they share one input, each with its own target.
    """

    kind: str  # linear | norm
    layers: list[str]
    inputs: list[Event]
    joint: bool = False
    block: str | None = None  # the target is this block's output, less what is added to the layers' output in the block

    @property
    def targets(self) -> list[Event]:
        return [(self.block, "out")] if self.block else [(name, "out") for name in self.layers]

    @property
    def wanted(self) -> list[Event]:
        extra = [(self.block, "in")] if self.block and (self.block, "in") not in self.inputs else []
        return [*self.inputs, *extra]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear))


def _find_blocks(model: nn.Module) -> dict[str, str]:
    """Residual blocks whose output is (layer + shortcut) / factor: name of the last layer -> name of the block.

    Recognised by their parts (diffusers' ResnetBlock2D without resampling, Attention with a residual connection), not by type.
    """
    found = {}
    for name, m in model.named_modules():
        if hasattr(m, "conv2") and hasattr(m, "output_scale_factor") and hasattr(m, "conv_shortcut"):
            if getattr(m, "upsample", None) is None and getattr(m, "downsample", None) is None:
                found[f"{name}.conv2"] = name
        elif hasattr(m, "to_out") and getattr(m, "residual_connection", False) and hasattr(m, "rescale_output_factor"):
            found[f"{name}.to_out.0"] = name
    return found


def _unsupported(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return "grouped convolution"
        if module.dilation != (1, 1):
            return "dilated convolution"
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return f"padding {module.padding_mode} {module.padding}"
    return ""


def _plan_stages(
    hooked: Hooked, call: Callable[[nn.Module], Any], names: list[str], blocks: dict[str, str]
) -> tuple[list[_Stage], dict[str, str], dict[str, str]]:
    """Stages in execution order, reasons of the layers that are left alone, and for each norm the layer that reads it."""
    modules = dict(hooked.model.named_modules())
    order: list[str] = []
    received: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def listener(event: Event, value: Any) -> None:
        name, side = event
        if side == "in" and name not in blocks.values():
            order.append(name)
            calls[name] = calls.get(name, 0) + 1
            received[name] = value  # kept alive, so that identity means "the same tensor"

    hooked.listen(call, listener)
    reasons = {
        name: "not reached by the forward pass" for name in names if name not in calls and _is_layer(modules[name])
    }
    for name, times in calls.items():
        why = _unsupported(modules[name]) or (f"called {times} times in one pass" if times > 1 else "")
        if not why and len(received[name]) != 1:  # of an image: the sums tell images apart by dimension 0
            why = "its dimension 0 is not the batch"
        if why:
            reasons[name] = why
    order = [name for name in order if name not in reasons]
    reader = {}
    for name, follower in itertools.pairwise(order):
        if not _is_layer(modules[name]):
            reader[name] = follower

    stages: list[_Stage] = []
    taken: set[str] = set()
    for i, name in enumerate(order):
        if name in taken:
            continue
        if not _is_layer(modules[name]):
            stages.append(_Stage("norm", [name], [(name, "in")]))
            continue
        if name in blocks:
            block = blocks[name]
            stage = _Stage("linear", [name], [(name, "in")], joint=True, block=block)
            shortcut = f"{block}.conv_shortcut"
            if shortcut in calls:
                if shortcut in reasons:
                    stage.joint, stage.block = False, None
                else:
                    stage.layers.append(shortcut)
                    stage.inputs.append((block, "in"))
            stages.append(stage)
        else:
            stage = _Stage("linear", [name], [(name, "in")])
            for other in order[i + 1 :]:
                together = isinstance(modules[name], nn.Linear) and received[other] is received[name] and other not in blocks
                if together and (modules[name].bias is None) == (modules[other].bias is None):
                    stage.layers.append(other)
                else:
                    break
            stages.append(stage)
        taken.update(stage.layers)
    return stages, reasons, reader


# ------------------------------------------------------------------------------------------------------------------ maps


def _as_map(value: Tensor, module: nn.Module) -> Tensor:
    """A layer's input or output as [N, C, H, W] float32: Linear layers are 1 x 1 convolutions over a column of positions."""
    if isinstance(module, nn.Linear):
        value = value.reshape(value.shape[0], -1, value.shape[-1]).transpose(1, 2).unsqueeze(-1)
    return value if value.dtype == torch.float64 else value.float()


def _geometry(module: nn.Module) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size, module.stride, module.padding  # type: ignore[return-value]
    return (1, 1), (1, 1), (0, 0)


def _apply(module: Any, x: Tensor) -> Tensor:
    """The layer on a map, in x's dtype and outside of autocast."""
    weight, bias = module.weight.to(x.dtype), None if module.bias is None else module.bias.to(x.dtype)
    if isinstance(module, nn.Conv2d):
        return F.conv2d(x, weight, bias, module.stride, module.padding)
    return F.conv2d(x, weight[:, :, None, None], bias)


def _select(value: Tensor, keep: Tensor | None) -> Tensor:
    return value if keep is None else value.index_select(1, keep.to(value.device))


@dataclass
class _Record:
    """One batch at one stage: its number, the data, t [N], and which of its samples judge instead of fitting."""

    batch: int
    data: _Rows
    t: Tensor
    held: Tensor


class _Rows:
    """What one stage takes from one batch: input maps, and the target map left to explain."""

    def __init__(self, modules: list[Any], maps: list[Tensor], target: Tensor) -> None:
        self.modules, self.maps, self.target = modules, maps, target

    def subset(self, index: Tensor) -> _Rows:
        return _Rows(self.modules, [m.index_select(0, index) for m in self.maps], self.target.index_select(0, index))

    @property
    def positions(self) -> int:
        return self.target.shape[-2] * self.target.shape[-1]

    def gather(self, positions: Tensor | None, joint: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Rows X [M, K + 1] with a column of ones, residual R [M, C] of the present weights, target Y [M, C]."""
        parts = [
            patch_rows(x, *_geometry(m), positions)
            for m, x in zip(self.modules if joint else self.modules[:1], self.maps, strict=True)
        ]
        y = map_rows(self.target, positions)
        fits = []
        for i, m in enumerate(self.modules):
            out = (parts[i] if joint else parts[0]) @ weight_rows(m.weight.to(y.dtype))
            fits.append(out if m.bias is None else out + m.bias.to(y.dtype))
        fit = sum(fits[1:], fits[0]) if joint else torch.cat(fits, dim=1)
        x = torch.cat([*parts, y.new_ones(len(y), 1)], dim=1)
        return x, y - fit, y

    def residual_map(self, joint: bool) -> Tensor:
        outs = [
            _apply(m, x)
            for m, x in zip(self.modules, self.maps if joint else self.maps * len(self.modules), strict=True)
        ]
        return self.target - (sum(outs[1:], outs[0]) if joint else torch.cat(outs, dim=1))


# ---------------------------------------------------------------------------------------------------------------- repair


def repair(
    dense: nn.Module,
    pruned: nn.Module,
    keep: Keep,
    batches: Callable[[], Iterable[Batch]],
    *,
    method: str = "lstsq",
    target: str = "block",
    ridge: float | Sequence[float] = RIDGES,
    norms: bool = True,
    layers: Collection[str] | None = None,
    rows_per_unknown: float | None = None,
    max_rows: int | None = None,
    timestep_weight: TimestepWeight | None = None,
    last_weight: TimestepWeight | None = None,
    memory_limit: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    state: str | os.PathLike[str] | None = None,
    offload: bool = False,
) -> RepairReport:
    """Refit every layer of `pruned` to the dense network's outputs, (XᵀX + λI) W' = XᵀY + λW, in place.

    Both networks walk through the same noised images together and stop at every layer (`wanda_fast.lockstep`), so the whole repair
    costs one forward pass of each, the sums and the solutions. A change is accepted only where it lowers the error on the
    rows of the fit and on every 8th image, which takes no part in it; of several ridges the one wins that is best there.
    Layers whose output equals the dense one's are left alone, bit for bit. The sums and solutions are made in
    float32 products added up in float64, and a float64 Cholesky factorisation, whatever dtype the networks have.

    Args:
        dense: the network before pruning; not changed.
        pruned: a network with the same names of Conv2d and Linear layers; its weights, biases and norm gains are changed in place
            at the very end, in their own dtype.
        keep: layer -> (output channels, input channels) of the dense layer that the pruned one keeps, int64; None for all.
        batches: makes the iterable of (x_t [N, C, H, W], t [N], labels [N], a dictionary of
            conditioning (`wanda_fast.inputs`) or None); each call must give the same.
        method: "lstsq"; "bias" only adds to each bias what the removed inputs contribute on average; "none" changes nothing.
        target: what a layer that ends a residual block is fitted to: "layer", its own dense output, or "block", the block's dense output
            less what the pruned network's own shortcut adds, so that it also corrects the error that has piled up before. A
            convolution on the shortcut is then fitted together with it.
        ridge: λ in units of the mean diagonal of the centred XᵀX; of several the best on held-out images is taken. They are
            tried from the largest down, as long as the error falls.
        norms: also refit gain and bias of every GroupNorm, channel by channel.
        layers: names of the layers and norms that "lstsq" refits, the others stay; layers that are fitted together (a block's last
            convolution and its shortcut) where all are named. None for all.
        rows_per_unknown: rows of X per unknown of a layer, at least 16384 rows; positions of the maps are drawn at random
            to that number. None for 8 on a CPU and all on a GPU; `math.inf` for all.
        max_rows: most rows of a layer, whatever its size.
        timestep_weight: t [N] int64 -> weight [N], at least 0, of these images in every fit and in its judgement; None for 1.
        last_weight: the same for the network's last layer; None for `timestep_weight`.
        memory_limit: bytes that waiting passes may hold. Images beyond it are run from the start again for every layer, which
            gives the same sums for more time. None for 60 % of a GPU's free memory, 40 % of the free main memory.
        seed: of the positions that are drawn.
        device: where to compute; None for the pruned network's device.
        dtype: of the forward passes; float16 and bfloat16 run under autocast.
        progress: show a progress bar.
        state: file of an unfinished repair. What it holds is taken over, and the layers done so far are written to it in one
            step now and then (`wanda_fast.resume`); the result equals that of a run without a break. "lstsq" alone uses it.
        offload: keep the dense network's weights in the host's memory; each layer's are copied to the device for the moment
            that it runs.

    Several processes (`wanda_fast.distributed`) take the batches in turns and add up their sums; each makes the same weights.

    Raises:
        ValueError: an unknown method or target, a name in `layers` that the network does not have, or `keep` does not fit the layers.
        RuntimeError: non-finite values; the text names the layer.

    Source: layer-wise reconstruction, He et al. 2017, arXiv:1707.06168; block outputs: Li et al. 2021, arXiv:2102.05426.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    ridges = (float(ridge),) if isinstance(ridge, (int, float)) else tuple(sorted((float(r) for r in ridge), reverse=True))
    if not ridges or not all(0 <= r < math.inf for r in ridges):
        raise ValueError(f"ridge must be one or more finite numbers of at least 0, got {ridge}")
    unknown = sorted(set(layers or ()) - {name for name, _ in pruned.named_modules()})
    if unknown:
        raise ValueError(f"layers: the network has no {unknown[0]}")
    started = time.perf_counter()
    report = RepairReport(method)
    if method == "none":
        return report
    home = torch.device(device) if device is not None else next(pruned.parameters()).device
    if home.type == "cuda" and home.index is None:
        home = torch.device("cuda", torch.cuda.current_device())
    if rows_per_unknown is None:
        rows_per_unknown = _CPU_ROWS_PER_UNKNOWN if home.type == "cpu" else math.inf
    work_dense = _working_copy(dense, torch.device("cpu") if offload else home)
    work = _working_copy(pruned, home)
    chosen = None if layers is None else frozenset(layers)
    options = _Options(
        target, ridges, norms, chosen, rows_per_unknown, max_rows, timestep_weight, last_weight, memory_limit, seed, dtype
    )
    run = _Run(work_dense, work, keep, batches, home, options, report)
    with _full_precision(), visiting(work_dense, home) if offload else nullcontext():
        if method == "bias":
            run.fold_means()
        else:
            run.least_squares(progress, None if state is None else RepairState(state, ranks().main))
    report.settings = options.to_dict()
    source, destination = dict(work.named_modules()), dict(pruned.named_modules())
    with torch.no_grad():
        for name in {r.layer for r in report.layers if r.accepted}:
            for part in ("weight", "bias"):
                to: Tensor | None = getattr(destination[name], part)
                if to is not None:
                    to.copy_(getattr(source[name], part))
    report.seconds = time.perf_counter() - started
    return report


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 inside: the sums need all of float32."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


@dataclass(frozen=True)
class _Options:
    target: str
    ridges: tuple[float, ...]
    norms: bool
    layers: frozenset[str] | None
    rows_per_unknown: float
    max_rows: int | None
    timestep_weight: TimestepWeight | None
    last_weight: TimestepWeight | None
    memory_limit: int | None
    seed: int
    dtype: torch.dtype

    def to_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "ridges": list(self.ridges),
            "norms": self.norms,
            "layers": "all" if self.layers is None else len(self.layers),
            "rows_per_unknown": self.rows_per_unknown if math.isfinite(self.rows_per_unknown) else "all",
            "max_rows": self.max_rows,
            "timestep_weight": self.timestep_weight is not None,
            "last_weight": self.last_weight is not None,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def rows(self, unknowns: int) -> float:
        """Rows that a layer of so many unknowns is fitted on, at most."""
        wanted = max(_MIN_ROWS, self.rows_per_unknown * unknowns)
        return wanted if self.max_rows is None else min(wanted, self.max_rows)


class _Run:
    def __init__(
        self,
        dense: nn.Module,
        pruned: nn.Module,
        keep: Keep,
        batches: Callable[[], Iterable[Batch]],
        device: torch.device,
        options: _Options,
        report: RepairReport,
    ) -> None:
        self.dense, self.pruned, self.keep, self.batches = dense, pruned, keep, batches
        self.device, self.options, self.report = device, options, report
        self.last: _Stage | None = None
        self.ranks = ranks()
        self.dense_modules: dict[str, Any] = dict(dense.named_modules())
        self.modules: dict[str, Any] = dict(pruned.named_modules())
        self.layers = [n for n, m in self.modules.items() if _is_layer(m)]
        missing = [n for n in self.layers if n not in self.dense_modules]
        if missing:
            raise ValueError(f"the dense network has no layer {missing[0]}")
        for name in self.layers:
            for side, kept in enumerate(keep.get(name, (None, None))):
                full = self.dense_modules[name].weight.shape[side]
                size = self.modules[name].weight.shape[side]
                # inputs that are none of the dense layer's (a shorter sinusoid) are given as None
                count = (full if side == 0 else size) if kept is None else len(kept)
                if count != size:
                    what = ("output", "input")[side]
                    raise ValueError(f"keep[{name!r}]: {count} {what} channels, the layer has {size}")

    # ----------------------------------------------------------------------------------------------------------- passes

    def call(self, batch: Batch) -> Callable[[nn.Module], Any]:
        x, t, labels = batch[0].to(self.device), batch[1].to(self.device), inputs.to_device(batch[2], self.device)
        extra = {} if labels is None else {"class_labels": labels}

        def run(model: nn.Module) -> None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            low = self.options.dtype in (torch.bfloat16, torch.float16)
            cast: Any = (
                torch.autocast(self.device.type, self.options.dtype, cache_enabled=False) if low else nullcontext()
            )
            with torch.no_grad(), cast:
                if isinstance(labels, Mapping):
                    inputs.forward(model, x.float(), t, labels)
                else:
                    model(x.float(), t, **extra)

        return run

    def output_scale(self, name: str) -> float:
        """Factor on the dense output of a query projection: pruning may fold the change of the softmax scale into it."""
        parent, _, leaf = name.rpartition(".")
        if leaf == "to_q" and hasattr(self.modules[parent], "scale") and hasattr(self.dense_modules[parent], "scale"):
            return float(self.dense_modules[parent].scale) / float(self.modules[parent].scale)
        return 1.0

    def rows_of(self, stage: _Stage, dense: Walk, pruned: Walk) -> _Rows:
        """Advance both passes to the stage and read what it needs."""
        dense.advance(stage.targets)
        pruned.advance(stage.wanted)
        got = {event: pruned.take(event) for event in stage.wanted}
        modules = [self.modules[name] for name in stage.layers]
        maps = [
            _as_map(got[event], m) for event, m in zip(stage.inputs, modules, strict=False)
        ]  # one input may feed several
        outs = [dense.take(event) for event in stage.targets]
        if stage.kind == "norm":
            keep = self.keep.get(self.reader.get(stage.layers[0], ""), (None, None))[1]
            flat = [v.reshape(v.shape[0], v.shape[1], -1, 1).float() for v in (maps[0], outs[0])]
            return _Rows(modules, flat[:1], _select(flat[1], keep))
        if stage.block is None:
            parts = [
                _select(_as_map(out, m), self.keep.get(name, (None, None))[0]) * self.output_scale(name)
                for out, m, name in zip(outs, modules, stage.layers, strict=True)
            ]
            return _Rows(modules, maps, torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])
        block = self.dense_modules[stage.block]
        factor = getattr(block, "output_scale_factor", getattr(block, "rescale_output_factor", 1.0))
        goal = _select(outs[0].float(), self.keep.get(stage.layers[0], (None, None))[0]) * factor
        if len(stage.layers) == 1:  # what the block adds to the layer as it is
            goal = goal - got[(stage.block, "in")].float()
        if isinstance(modules[0], nn.Linear):
            goal = goal.flatten(2).unsqueeze(-1)
        return _Rows(modules, maps, goal)

    # ------------------------------------------------------------------------------------------------------ least squares

    def least_squares(self, progress: bool, state: RepairState | None = None) -> None:
        o = self.options
        blocks = _find_blocks(self.pruned) if o.target == "block" else {}
        norms = [n for n, m in self.modules.items() if isinstance(m, nn.GroupNorm) and m.affine] if o.norms else []
        watched = [*self.layers, *norms, *blocks.values()]
        walks: list[tuple[int, int, Walk, Walk, Tensor]] = []  # number of the batch, images before it
        with Hooked(self.dense, watched) as dense, Hooked(self.pruned, watched) as pruned:
            first = next(iter(self.batches()), None)
            if first is None or len(first[0]) == 0:
                raise ValueError("batches: there is no image to repair with")
            one: Batch = (first[0][:1], first[1][:1], inputs.select(first[2], slice(1)))
            stages, reasons, self.reader = _plan_stages(pruned, self.call(one), watched, blocks)
            self.last = stages[-1] if stages else None
            if o.layers is not None:
                stages = [stage for stage in stages if o.layers.issuperset(stage.layers)]
                reasons = {name: why for name, why in reasons.items() if name in o.layers}
            per_image = peak_bytes(lambda: self.call(one)(self.dense)) + peak_bytes(lambda: self.call(one)(self.pruned))
            budget = _memory_budget(self.device) if o.memory_limit is None else o.memory_limit
            self.report.layers += [LayerRepair(n, "skipped", remark=why) for n, why in reasons.items()]
            done = 0 if state is None else state.restore(self.modules, self.report)
            sticky = [event for stage in stages[done:] for event in stage.wanted]
            try:
                held = images = mine = 0
                for number, batch in enumerate(self.batches()):
                    n = len(batch[0])
                    if number % self.ranks.size == self.ranks.rank:
                        mine += n
                        if not walks or mine * per_image <= budget:
                            call = self.call(batch)
                            walks.append((number, images, Walk(dense, call), Walk(pruned, call, sticky), batch[1]))
                        else:
                            self.report.replayed_images += n
                    held += len(_held_index(images, n))
                    images += n
                self.report.images = images
                self.fit_images, self.held_images = images - held, held

                def records(stage: _Stage) -> Iterator[_Record]:
                    for number, before, a, b, t in walks:
                        yield _Record(number, self.rows_of(stage, a, b), t, _held_index(before, len(t)))
                    if not self.report.replayed_images:
                        return
                    waiting, before = {number for number, *_ in walks}, 0
                    for number, batch in enumerate(self.batches()):
                        if number % self.ranks.size == self.ranks.rank and number not in waiting:
                            call = self.call(batch)
                            a, b = Walk(dense, call), Walk(pruned, call, stage.wanted)
                            try:
                                held = _held_index(before, len(batch[1]))
                                yield _Record(number, self.rows_of(stage, a, b), batch[1], held)
                            finally:
                                a.close()
                                b.close()
                        before += len(batch[1])

                for number, stage in enumerate(_progress(stages, progress)):
                    if number < done:
                        continue
                    begun = time.perf_counter()
                    with torch.no_grad():
                        if stage.kind == "norm":
                            results = self.fit_norm(stage, records(stage))
                        else:
                            results = self.fit(stage, records(stage), number)
                    for r in results:
                        r.seconds = (time.perf_counter() - begun) / len(results)
                    self.report.layers += results
                    if state is not None:
                        state.save(number + 1, self.modules, self.report)
            finally:
                for *_, a, b, _t in walks:
                    a.close()
                    b.close()

    def exact(self, stage: _Stage, rows: int, unknowns: int) -> list[LayerRepair]:
        return [LayerRepair(name, "exact", 0.0, 0.0, rows=rows, unknowns=unknowns) for name in stage.layers]

    def fit(self, stage: _Stage, records: Iterator[_Record], number: int) -> list[LayerRepair]:
        modules = [self.modules[name] for name in stage.layers]
        widths = [m.weight[0].numel() for m in modules]
        unknowns = sum(widths) if stage.joint else widths[0]
        outs = [m.weight.shape[0] for m in modules]
        edges = [sum(outs[:i]) for i in range(len(outs) + 1)]
        groups = [slice(0, outs[0])] if stage.joint else [slice(a, b) for a, b in itertools.pairwise(edges)]
        sums = Sums(unknowns, groups[-1].stop, self.device)
        bias = any(m.bias is not None for m in modules)  # those of a stage that is not joint have one all or none
        label = " + ".join(stage.layers)
        asked = False
        for record in records:
            self.collect(sums, stage, record, unknowns, number * 100003 + record.batch)
            if not asked:
                asked = True
                # sums of the first batch tell whether anything was disturbed at all up to here
                if self.ranks.all(all(sums.error(None, g) <= _EXACT[self.options.dtype] for g in groups)):
                    return self.exact(stage, sums.rows, unknowns)
        if not asked and self.ranks.all(True):  # a rank without batches of its own
            return self.exact(stage, 0, unknowns)
        sums.join()
        if not sums.finite():
            raise RuntimeError(f"non-finite values in the input or output of layer {label}: the repair cannot continue")
        tries: list[tuple[Tensor, float, str, list[float | None]]] = []
        best: list[float] = []
        for ridge in self.options.ridges:
            delta, used, remark = solve_ridge(sums.xtx, sums.xtr, ridge, bias=bias)
            helds = [sums.held_error(delta, g) for g in groups]
            known = [h for h in helds if h is not None]
            # without images to judge by, the strongest pull towards the present weight
            better = any(h < b for h, b in zip(known, best, strict=False)) or not tries
            best = [min(pair) for pair in zip(known, best, strict=False)] if tries else known
            tries.append((delta, used, remark, helds))
            if not better or not known:
                break
        results = []
        for i, g in enumerate(groups):
            before, held_before = sums.error(None, g), sums.held_error(None, g)
            delta, used, remark, helds = tries[0] if held_before is None else min(tries, key=lambda entry: entry[3][i])  # type: ignore[arg-type,return-value]
            after, held_after = sums.error(delta, g), helds[i]
            remarks = [remark] if remark else []
            if sums.rows < unknowns:
                remarks.append(f"{sums.rows} rows for {unknowns} unknowns")
            better = after < before and (held_after is None or held_before is None or held_after < held_before)
            if better:
                self.change(modules if stage.joint else modules[i : i + 1], delta[:, g])
            else:
                remarks.append("no fit was better")
            results.append(
                LayerRepair(
                    stage.layers[i],
                    "refitted" if better else "kept",
                    before,
                    after if better else before,
                    held_before,
                    held_after if better else held_before,
                    sums.rows,
                    unknowns,
                    used,
                    remark=", ".join(remarks),
                )
            )
        if stage.joint:  # fitted together: one result, told of each layer
            results += [
                LayerRepair(**{**asdict(results[0]), "layer": n, "remark": f"fitted with {stage.layers[0]}"})
                for n in stage.layers[1:]
            ]
        return results

    def weight(self, stage: _Stage, t: Tensor) -> Tensor | None:
        """[N] float32 weights of images at timesteps t [N] in the fit of a stage; None where all count alike."""
        rule = self.options.timestep_weight
        if stage is self.last and self.options.last_weight is not None:
            rule = self.options.last_weight
        return None if rule is None else rule(t).to(device=self.device, dtype=torch.float32)

    def collect(self, sums: Sums, stage: _Stage, record: _Record, unknowns: int, seed: int) -> None:
        """Add one batch to the normal equations."""
        data, t, held = record.data, record.t, record.held
        n = len(data.target)
        generator = torch.Generator().manual_seed(self.options.seed * 7919 + seed)
        if len(held):
            part = data.subset(held.to(self.device))
            share = math.ceil(_HELD_ROWS / self.held_images)
            rows = part.gather(self.pick(len(held), part.positions, share, generator), stage.joint)
            weight = self.weight(stage, t[held])
            sums.hold_out(*rows, None if weight is None else weight.repeat_interleave(len(rows[0]) // len(held)))
        fit = torch.ones(n, dtype=torch.bool)
        fit[held] = False
        chosen = fit.nonzero().flatten()
        if not len(chosen):
            return
        part = data.subset(chosen.to(self.device)) if len(held) else data
        weight = self.weight(stage, t[chosen])
        geometry = _geometry(data.modules[0])
        share = math.ceil(min(self.options.rows(unknowns) / self.fit_images, data.positions))
        # Whole maps cost 13 products instead of 45 per row, so they are cheaper well before all positions are drawn.
        shifts = geometry == ((3, 3), (1, 1), (1, 1))
        if share >= data.positions * (_WHOLE_FROM if shifts else 1.0):
            r = part.residual_map(stage.joint)
            second = part.maps[1] if stage.joint and len(part.maps) == 2 else None
            right = r if second is None else torch.cat([r, second], dim=1)
            xtx, xtr = ops.conv_gram(part.maps[0], right, *geometry, weight=weight)
            if second is not None:
                xtx, xtr = self.join(xtx, xtr, *ops.conv_gram(second, r, (1, 1), weight=weight))
            sums.add(xtx, xtr, r, part.target, (0, 2, 3), None if weight is None else weight[:, None, None, None])
            return
        x, r, y = part.gather(self.pick(len(chosen), data.positions, share, generator), stage.joint)
        if weight is None:
            sums.add(*row_gram(x, r), r, y, (0,), None)
        else:
            root = weight.repeat_interleave(share)[:, None].sqrt()
            sums.add(*row_gram(x * root, r * root), r, y, (0,), root.square())

    @staticmethod
    def join(xtx: Tensor, both: Tensor, xtx2: Tensor, xtr2: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of [X1, X2, 1] from those of [X1, 1] against [R, X2] and of [X2, 1] against R."""
        k, k2, c = len(xtx) - 1, len(xtx2) - 1, xtr2.shape[1]
        joined = xtx.new_empty(k + k2 + 1, k + k2 + 1)
        joined[:k, :k] = xtx[:k, :k]
        joined[:k, k:-1] = both[:k, c:]
        joined[k:-1, :k] = both[:k, c:].t()
        joined[k:, k:] = xtx2
        joined[:k, -1] = joined[-1, :k] = xtx[:k, -1]
        return joined, torch.cat([both[:k, :c], xtr2])

    def pick(self, n: int, size: int, count: int, generator: torch.Generator) -> Tensor | None:
        """[n, count] positions of each image, drawn without repeats; None takes all."""
        if count >= size:
            return None
        order = torch.rand(n, size, generator=generator).topk(count, dim=1).indices
        return order.sort(dim=1).values.to(self.device)

    def change(self, modules: list[Any], delta: Tensor) -> None:
        """Add Δ [K + 1, C] to the layers' weights, and its last row to the first bias."""
        start = 0
        bias = delta[-1]
        for m in modules:
            k = m.weight[0].numel()
            m.weight += rows_weight(delta[start : start + k], m.weight.shape).to(m.weight)
            start += k
        for m in modules:
            if m.bias is not None:
                m.bias += bias.to(m.bias)
                break

    # ------------------------------------------------------------------------------------------------------------- norms

    def fit_norm(self, stage: _Stage, records: Iterator[_Record]) -> list[LayerRepair]:
        """Gain and bias of a norm, channel by channel: least squares of Y on the normalised input."""
        name = stage.layers[0]
        module: Any = self.modules[name]
        gain, bias = module.weight.double(), module.bias.double()
        # [2, 6, C] sums for the fit and for the held-out images: 1, x, x², y, xy, y²
        sums = torch.zeros(2, 6, len(gain), dtype=torch.float64, device=self.device)
        rows = torch.zeros((), dtype=torch.int64)
        asked = False
        for record in records:
            data, t, held = record.data, record.t, record.held
            if data.target.shape != data.maps[0].shape:
                self.ranks.all(True)  # a rank without batches asks
                return [LayerRepair(name, "skipped", remark="its channels in the dense network are not known")]
            x = F.group_norm(data.maps[0], module.num_groups, None, None, module.eps)
            y = data.target
            judge = torch.zeros(len(x), dtype=torch.bool, device=self.device)
            judge[held.to(self.device)] = True
            terms = (torch.ones_like(x), x, x.square(), y, x * y, y.square())
            # [6, N, C]
            each = torch.stack([v.flatten(2).sum(2, dtype=torch.float64) for v in terms])
            weight = self.weight(stage, t)
            if weight is not None:
                each = each * weight.to(each)[:, None]
            sums[0] += each[:, ~judge].sum(1)
            sums[1] += each[:, judge].sum(1)
            rows += (len(x) - len(held)) * data.positions
            if not asked:
                asked = True
                off = float((_apply_norm(x, module) - y).square().sum() / (y - y.mean()).square().sum().clamp_min(1e-30))
                if self.ranks.all(off <= _EXACT[self.options.dtype]):
                    return self.exact(stage, int(rows), 1)
        if not asked and self.ranks.all(True):
            return self.exact(stage, 0, 1)
        self.ranks.add([sums, rows])
        if not bool(torch.isfinite(sums).all()):
            raise RuntimeError(f"non-finite values in the input or output of layer {name}: the repair cannot continue")
        n, sx, sxx, sy, sxy, _ = sums[0]
        variance = sxx / n - (sx / n).square()
        covariance = sxy / n - sx / n * sy / n
        pull = 1e-3 * variance.mean() + 1e-12
        new_gain = (covariance + pull * gain) / (variance + pull)
        new_bias = (sy - new_gain * sx) / n
        before, after = _norm_error(sums[0], gain, bias), _norm_error(sums[0], new_gain, new_bias)
        held_before = held_after = None
        if sums[1, 0, 0] > 0:
            held_before, held_after = _norm_error(sums[1], gain, bias), _norm_error(sums[1], new_gain, new_bias)
        better = after < before and (held_before is None or held_after is None or held_after < held_before)
        if better:
            module.weight.copy_(new_gain)
            module.bias.copy_(new_bias)
        status = "refitted" if better else "kept"
        remark = "" if better else "no fit was better"
        if not better:
            after, held_after = before, held_before
        return [LayerRepair(name, status, before, after, held_before, held_after, int(rows), 1, remark=remark)]

    # -------------------------------------------------------------------------------------------------------------- bias

    def fold_means(self) -> None:
        """b' = b + mean over images of (dense output, restricted and computed from mean inputs) - (pruned layer on the same means).

        A convolution is linear, so this is Σ over removed inputs of mean(x_c) Σ_k W[:, c, k], borders aside.

        Every layer's error falls by it, the network's may rise (a likely reason: what was removed took variance along with
        the mean, a norm that follows divides by the smaller deviation, and the mean that was put back comes out too large).
        So all of it is taken back where the predicted noise is no nearer to the dense one afterwards.
        """
        before = self.output_error()
        old = {n: m.bias.detach().clone() for n in self.layers if (m := self.modules[n]).bias is not None}
        cut = [n for n in self.layers if self.keep.get(n, (None, None))[1] is not None]
        totals: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def listener(event: Event, value: Any) -> None:
            name, side = event
            if side == "in":
                x = _as_map(value, self.dense_modules[name])
                totals[name] = totals.get(name, 0) + x.sum((0, 2, 3), dtype=torch.float64)
                counts[name] = counts.get(name, 0) + x[:, 0].numel()

        with Hooked(self.dense, cut) as hooked:
            for number, batch in enumerate(self.batches()):
                if number % self.ranks.size == self.ranks.rank:
                    hooked.listen(self.call(batch), listener)
                self.report.images += len(batch[0])
        for name in cut if self.ranks.size > 1 else ():
            size = self.dense_modules[name].weight.shape[1]
            total = totals.get(name, torch.zeros(size, dtype=torch.float64, device=self.device))
            count = torch.tensor(counts.get(name, 0), dtype=torch.int64)
            self.ranks.add([total, count])
            if int(count):
                totals[name], counts[name] = total, int(count)
        for name in cut:
            keep_out, keep_in = self.keep[name]
            dense, pruned = self.dense_modules[name], self.modules[name]
            why = _unsupported(dense) or ("" if name in totals else "not reached by the forward pass")
            why = why or ("" if pruned.bias is not None else "has no bias")
            if why:
                self.report.layers.append(LayerRepair(name, "skipped", remark=why))
                continue
            mean = totals[name] / counts[name]
            if not bool(torch.isfinite(mean).all()):
                raise RuntimeError(f"non-finite values in the input of layer {name}: the repair cannot continue")
            goal = _mean_output(dense, mean)
            goal = (goal if keep_out is None else goal[keep_out.to(goal.device)]) * self.output_scale(name)
            shift = goal - _mean_output(pruned, mean[keep_in.to(mean.device)])  # type: ignore[union-attr]
            with torch.no_grad():
                pruned.bias += shift.to(pruned.bias)
            remark = f"bias moved by {float(shift.square().mean().sqrt()):.2g}"
            self.report.layers.append(LayerRepair(name, "refitted", rows=counts[name], unknowns=1, remark=remark))
        after = self.output_error()
        if after < before:
            return
        with torch.no_grad():
            for name, bias in old.items():
                self.modules[name].bias.copy_(bias)
        for r in self.report.layers:
            if r.accepted:
                r.status, r.remark = "kept", f"the network's error would have risen from {before:.2g} to {after:.2g}"

    def output_error(self) -> float:
        """Σ(ε - ε̂)² / Σε² of the pruned network's prediction on the first batches, 64 images or a few more."""
        sums = torch.zeros(2, dtype=torch.float64)
        outs: list[Tensor] = []

        def note(_module: nn.Module, _args: tuple, out: Any) -> None:
            found = out if isinstance(out, Tensor) else first_tensor(out.values() if isinstance(out, Mapping) else out)
            assert found is not None
            outs.append(found.double())

        handles = [m.register_forward_hook(note) for m in (self.dense, self.pruned)]
        try:
            seen = 0
            for number, batch in enumerate(self.batches()):
                if seen >= 64:
                    break
                seen += len(batch[0])
                if number % self.ranks.size == self.ranks.rank:
                    outs.clear()
                    call = self.call(batch)
                    call(self.dense)
                    call(self.pruned)
                    sums += torch.stack([(outs[1] - outs[0]).square().sum(), outs[0].square().sum()]).cpu()
        finally:
            for handle in handles:
                handle.remove()
        self.ranks.add([sums])
        return float(sums[0] / sums[1].clamp_min(1e-300))


def _apply_norm(x: Tensor, module: nn.GroupNorm) -> Tensor:
    return x * module.weight[:, None, None] + module.bias[:, None, None]


@torch.no_grad()
def _mean_output(module: Any, mean: Tensor) -> Tensor:
    """Output [C_out] of a layer whose input channels are constant at `mean` [C_in], away from borders."""
    weight = module.weight.double().to(mean.device)
    out = (weight if weight.dim() == 2 else weight.sum((2, 3))) @ mean
    return out if module.bias is None else out + module.bias.double().to(mean.device)


def _norm_error(sums: Tensor, gain: Tensor, bias: Tensor) -> float:
    """Σ(y - gain·x - bias)² / Σ(y - mean y)² from the sums [6, C] of 1, x, x², y, xy, y²."""
    n, sx, sxx, sy, sxy, syy = sums
    rr = syy + gain**2 * sxx + n * bias**2 - 2 * gain * sxy - 2 * bias * sy + 2 * gain * bias * sx
    spread = syy - sy.square() / n
    return float(rr.sum().clamp_min(0) / torch.where(spread > 1e-12 * syy, spread, syy).sum().clamp_min(1e-300))


def _working_copy(model: nn.Module, device: torch.device) -> nn.Module:
    copied = copy.deepcopy(model).eval()
    # nn.Module.to, because that of diffusers models warns at every change of dtype
    return nn.Module.to(copied, device=device, dtype=torch.float32)


def _held_index(before: int, n: int) -> Tensor:
    """Samples of a batch of n that are held out, when `before` images came before it."""
    index = torch.arange(n)
    return index[(index + before) % HELD_OUT == HELD_OUT - 1]


def _progress(stages: list[_Stage], show: bool) -> Iterable[_Stage]:
    if not show:
        return stages
    from tqdm.auto import tqdm

    return tqdm(stages, desc="repair", unit="layer")


def _memory_budget(device: torch.device) -> int:
    """Bytes that waiting passes may hold: 60 % of a GPU's free memory, 40 % of the free main memory."""
    if device.type == "cuda":
        return int(free_gpu_bytes(device) * 0.6)
    try:
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.4)
    except (ValueError, OSError, AttributeError):
        return 4 << 30
