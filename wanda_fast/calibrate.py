"""Calibration: run noised images, or the model's own sampling trajectory, through the network and fill ActivationStats.

``wanda_fast.calibrate(...)`` and ``wanda_fast.calibrate.calibrate(...)`` are the same function.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import inputs, ops
from ._callable import make_callable
from .errors import UserError
from .experts import refuse_experts
from .graphs import Steps, capture_for, upload
from .sampling import (
    check_network,
    class_labels,
    evaluating,
    fast_layout,
    generator,
    image_shape,
    make_stepper,
    noise,
    place,
    predict,
    to_float,
)
from .smaller_batches import halves_batches
from .stats import BINS, ActivationStats, fingerprint, parse_target_steps

MODES = ("random", "trajectory")
ROWS = ("auto", "sample", "bin")
TABLE_LIMIT = 256 << 20  # bytes of all tables up to which each sample gets its own row
GROUP_ELEMENTS = 1 << 15  # per sample; larger inputs take longer to join than to launch for
GROUP_LIMIT = 1 << 19  # elements per sample that one group holds
_SUM_QUANTUM = 2.0**-20

_log = logging.getLogger("wanda_fast")


class NonFiniteActivations(UserError, RuntimeError):
    """NaN or Inf entered a layer; the text names the first such layer."""


class Batch(NamedTuple):
    """Network inputs: x_t [N, C, H, W] float32, t [N] int64, labels [N] int64 or None, all on the device; indices [N] int64 of
    the samples, on the CPU.
    """

    x: Tensor
    t: Tensor
    indices: Tensor
    labels: Any  # a dictionary for conditioned networks, see `wanda_fast.inputs`


@halves_batches("calibration", default=64)
@torch.inference_mode(False)  # the hooks tell changed inputs by their versions, which tensors of inference mode do not have
def calibrate(
    unet: nn.Module,
    scheduler: Any,
    images: Tensor | Any | None,
    *,
    n: int = 1024,
    mode: str = "random",
    target_steps: str | tuple[int, int] = "all",
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    rows: str = "auto",
    table_bytes: int = TABLE_LIMIT,
    means: bool = False,
    part: tuple[int, int] | None = None,
    trajectory_steps: int = 50,
    dataset: str = "",
    graph: bool = True,
    progress: bool = False,
) -> ActivationStats:
    """Σ x² of every input channel of every Conv2d and Linear, for n noised images.

    Args:
        unet: UNet2DModel; moved to `device` if it is elsewhere.
        images: uint8 [N, H, W, C] or float [-1, 1] [N, C, H, W]; sample i is images[i % N]. Not used by "trajectory".
            For a conditioned network `wanda_fast.inputs.Prompts`, or None for random ones.
        n: number of noised images.
        mode: "random": images noised to timesteps that cover the target evenly; "trajectory": states of the model's own
            DDIM trajectory started from noise, at the steps inside the target.
        target_steps: see :func:`wanda_fast.stats.parse_target_steps`.
        dtype: bfloat16 or float16 runs the network under autocast. Sums are float32 always.
        backend: of ``ops.channel_sq_norm``.
        rows: "sample", "bin", or "auto": samples while all tables together take at most `table_bytes` (256 MiB).
        means: also collect Σ x per channel (costs a second pass over every activation).
        part: only samples part[0] … part[1]-1 of the n. Parts merge to the whole run; rows per sample bit for bit where they
            end at multiples of the batch size (the network itself rounds differently in batches of another size).
        dataset: name recorded with the statistics.
        graph: on a CUDA GPU record the forward pass with its hooks into a CUDA graph, once it was run eagerly twice, and replay
            it for every later batch of the same size (for six batches and more). Where that is not possible a line in the log
            says so.

    Raises:
        NonFiniteActivations: NaN or Inf reached a layer, which is named. It is a UserError and a RuntimeError.
        UserError: bad arguments, or an unsupported network.

    Example:
        >>> import wanda_fast
        >>> from wanda_fast import checkpoint, data
        >>> loaded = checkpoint.load_pipeline(None)  # the bundled model
        >>> images = data.load_images("self", n=4, unet=loaded.unet, bundled=True)
        >>> stats = wanda_fast.calibrate(loaded.unet, loaded.scheduler, images, n=4, batch_size=2)
        >>> stats.tables["mid_block.resnets.0.conv1"].shape
        torch.Size([4, 128])
    """
    from tqdm import tqdm

    if rows not in ROWS:
        raise UserError(f"rows {rows!r} is not one of {', '.join(ROWS)}.")
    check_network(unet, scheduler)
    refuse_experts(unet, "the calibration")
    device, dtype = place(unet, device, dtype)
    total = int(scheduler.config.num_train_timesteps)
    target = parse_target_steps(target_steps, total)
    first, last = part or (0, n)
    if not 0 <= first < last <= n:
        raise UserError(f"samples {first} to {last} are no part of the {n} calibration images.")
    layers = collect_layers(unet)
    if not layers:
        raise UserError("the network has no Conv2d and no Linear layer.")
    per_sample = rows == "sample" or (rows == "auto" and table_memory(unet, n) <= table_bytes)
    count = last - first if per_sample else BINS
    timesteps = torch.zeros(count, dtype=torch.int64)
    counts = torch.zeros(count, dtype=torch.int64)
    seen: list[tuple[Tensor, Tensor]] = []  # on the device: asking for them in between would wait for it
    batches = noised_batches(
        unet,
        scheduler,
        images,
        n=n,
        mode=mode,
        target=target,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        part=(first, last),
        trajectory_steps=trajectory_steps,
    )
    with (
        torch.no_grad(),
        evaluating(unet),
        fast_layout(unet),
        Collector(layers, count, device, backend=backend, means=means) as collector,
        tqdm(total=last - first, desc="calibration", unit="image", disable=not progress) as bar,
    ):

        def step(x: Tensor, t: Tensor, labels: Any, row: Tensor) -> Tensor:
            with collector.record(row):
                out = predict(unet, x, t, labels, dtype=dtype)
            # The first batch is added like all others, so that its place in a run leaves no trace.
            return step(x, t, labels, row) if collector.restart() else out

        steps = Steps(step, capture_for(device, (last - first) // max(batch_size, 1)) if graph else None, "calibration steps")
        out: Tensor | None = None
        while True:
            try:
                batch = batches.send(out)
            except StopIteration:
                break
            if per_sample:
                row = upload(batch.indices - first, device)
            else:
                row = (batch.t - target[0]) * BINS // (target[1] - target[0])
            seen.append((row, batch.t))
            out = steps(batch.x, batch.t, batch.labels, row)
            bar.update(len(row))
        tables = collector.tables()
        if steps.replayed:
            _log.info("%s", steps.describe())
        steps.close()
    for row, t in seen:
        row, t = row.to("cpu"), t.to("cpu")
        timesteps[row] = t
        counts.index_add_(0, row, torch.ones_like(row))
    for name, table in tables.items():
        if not bool(torch.isfinite(table).all()):
            raise NonFiniteActivations(f"NaN or Inf in the activations that enter layer {name}.")
    if not per_sample:
        low, high = target
        timesteps = torch.tensor([low + (high - low) * (2 * b + 1) // (2 * BINS) for b in range(BINS)])
        used = counts > 0
        timesteps, counts = timesteps[used], counts[used]
        tables = {name: table[used] for name, table in tables.items()}
    samples = torch.arange(first, last) if per_sample else torch.full((len(counts),), -1)
    return ActivationStats(
        tables=tables,
        positions=collector.positions,
        timesteps=timesteps,
        counts=counts,
        samples=samples,
        num_train_timesteps=total,
        model=fingerprint(unet),
        info={
            "dataset": dataset,
            "seed": seed,
            "n": n,
            "mode": mode,
            "target": list(target),
            "dtype": str(dtype)[6:],
            "rows": "sample" if per_sample else "bin",
            "trajectory_steps": trajectory_steps if mode == "trajectory" else None,
            "versions": _versions(),
        },
        sums=collector.sums,
    )


def table_memory(unet: nn.Module, n: int) -> int:
    """Bytes of the tables of n samples with a row for each, shared inputs not counted once but as often as they are read."""
    width = sum(m.in_channels if isinstance(m, nn.Conv2d) else m.in_features for m in collect_layers(unet).values())
    return n * width * 4


def collect_layers(unet: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Every Conv2d and Linear by its qualified name; of a network that is pruned inside its blocks those that a cut touches."""
    from .inputs import is_conditioned

    if is_conditioned(unet):
        from .slots import find_slots

        slots = find_slots(unet)
        touched = {**slots.outputs, **slots.inputs}
        return {name: m for name, m in unet.named_modules() if name in touched and not isinstance(m, nn.GroupNorm)}
    return {name: m for name, m in unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def _versions() -> dict[str, str]:
    import diffusers

    from . import __version__

    return {"wanda_fast": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


# ---------------------------------------------------------------------------------------------------------------- hooks


class Collector:
    """Hooks that add the energy of every layer's input to tables, while :meth:`record` is active.

    A hook launches one kernel and never waits for the device. Layers that are given the very same tensor one after the
    other (queries, keys and values) share one table. The first forward pass shows which layers have small inputs of the same
    size (the time projections, the deepest levels): from the second on each such group is added by one launch over its
    concatenated inputs, because on a GPU the launches cost more than the sums.

    Args:
        layers: name → layer.
        rows: rows of the tables.
        means: also add up Σ x.
        group_elements: inputs of up to so many elements per sample are grouped; None for `GROUP_ELEMENTS` on a GPU and 0 on a
            CPU, where a launch costs nothing.
    """

    def __init__(
        self,
        layers: dict[str, nn.Conv2d | nn.Linear],
        rows: int,
        device: torch.device,
        *,
        backend: str | None = None,
        means: bool = False,
        group_elements: int | None = None,
    ) -> None:
        self._layers = layers
        self._count = rows
        self._device = device
        self._backend = backend
        self._means = means
        if group_elements is None:
            group_elements = 0 if device.type == "cpu" else GROUP_ELEMENTS
        self._group_elements = group_elements
        self._rows: Tensor | None = None
        self._batch = 0
        self._own: dict[str, Tensor] = {}  # columns of a wider table for layers in a group
        self._owner: dict[str, str] = {}  # in the order of execution
        self._last: tuple[Tensor, int, str] | None = None
        self._first: dict[str, list[tuple[Tensor, int]]] | None = {}  # small inputs of the first pass; None after it
        self._groups: dict[str, _Group] = {}
        self._regrouped = False
        self._handles: list[Any] = []
        self.positions: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}

    def __enter__(self) -> Collector:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(name, isinstance(layer, nn.Conv2d))))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def record(self, rows: Tensor) -> _Recording:
        """Record the forward pass in the block; sample k of the batch belongs to row rows[k]."""
        return _Recording(self, rows)

    def _hook(self, name: str, is_conv: bool) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            rows = self._rows
            if rows is None:
                return
            x: Tensor = args[0]
            if x.shape[0] != self._batch:
                raise RuntimeError(f"layer {name} sees a batch of {x.shape[0]}, the network was given {self._batch}")
            # The tensor is held, so an equal identity cannot be a recycled one; the version tells of changes in place.
            last = self._last
            if last is not None and last[0] is x and last[1] == x._version:
                owner = last[2]
            else:
                owner = name
                self._last = (x, x._version, name)
            if self._owner.setdefault(name, owner) != owner:
                raise RuntimeError(f"layer {name} shared its input in one forward pass and not in another")
            if owner == name:
                self._add(name, is_conv, x, rows)
            elif name not in self.positions:
                self.positions[name] = self.positions[owner]

        return hook

    def _add(self, name: str, is_conv: bool, x: Tensor, rows: Tensor) -> None:
        if not is_conv and x.dim() > 3:
            x = x.reshape(x.shape[0], -1, x.shape[-1])
        group = self._groups.get(name)
        if group is not None:
            if group.take(name, x):
                ops.channel_sq_norm(group.joined(), rows, group.table, backend=self._backend)
        else:
            if name not in self._own:
                self._start(name, is_conv, x)
            ops.channel_sq_norm(x, rows, self._own[name], backend=self._backend)
            if self._first is not None and x[0].numel() <= self._group_elements:
                self._first.setdefault(name, []).append((x, x._version))
        if self._means:
            total = x.sum((0, 2, 3) if is_conv else tuple(range(x.dim() - 1)), dtype=torch.float32).double()
            # Multiples of a fixed quantum add up exactly in float64, so the order of the batches leaves no trace.
            self._sums[name].add_((total / _SUM_QUANTUM).round() * _SUM_QUANTUM)

    def _start(self, name: str, is_conv: bool, x: Tensor) -> None:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():  # every replay would clear the new table
            raise RuntimeError(f"layer {name} did not run in the first forward passes and runs in a later one")
        channels = x.shape[1] if is_conv else x.shape[-1]
        self._own[name] = torch.zeros(self._count, channels, dtype=torch.float32, device=self._device)
        self.positions[name] = x[0].numel() // channels
        if self._means:
            self._sums[name] = torch.zeros(channels, dtype=torch.float64, device=self._device)

    def _finish(self) -> None:
        """End of a forward pass."""
        self._last = None
        if self._first is not None:
            self._make_groups(self._first)
            self._first = None
        missing = [name for group in self._groups.values() for name in group.left()]
        if missing:
            self._drop()
            raise RuntimeError(f"layer {missing[0]} ran in the first forward pass and not in a later one")

    def _drop(self) -> None:
        """Forget what a pass kept, so that nothing of it ends up in the next."""
        for group in self._groups.values():
            group.clear()

    def _make_groups(self, first: dict[str, list[tuple[Tensor, int]]]) -> None:
        """Groups of layers whose inputs differ in nothing but the channels, and that nothing changes before the group is full."""
        alike: dict[Any, list[str]] = {}
        held: dict[Any, int] = {}
        for name, seen in first.items():
            x, version = seen[0]
            if len(seen) > 1 or x._version != version:
                continue
            inside = x.shape[2:] if x.dim() == 4 else x.shape[1:-1]
            base = (x.dim(), inside, x.dtype, x.is_contiguous(), x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
            key = (*base, held.get(base, 0) // GROUP_LIMIT)
            held[base] = held.get(base, 0) + x[0].numel()
            alike.setdefault(key, []).append(name)
        for names in alike.values():
            if len(names) > 1:
                group = _Group(names, [self._own[n] for n in names], 1 if first[names[0]][0][0].dim() == 4 else -1)
                for name, part in zip(names, group.parts, strict=True):
                    self._groups[name] = group
                    self._own[name] = part
                self._regrouped = True

    def restart(self) -> bool:
        """Whether the groups were made in the last pass; everything is then cleared, and the pass has to be repeated. Grouped
        sums may be rounded otherwise than those of one layer.
        """
        if not self._regrouped:
            return False
        self._regrouped = False
        for total in (*self._own.values(), *self._sums.values()):
            total.zero_()
        return True

    def tables(self) -> dict[str, Tensor]:
        """Layer → [R, C_in] float32 on the CPU, in the order of execution; shared tables are one object."""
        own = {name: table.to("cpu").contiguous() for name, table in self._own.items()}
        return {name: own[owner] for name, owner in self._owner.items()}

    @property
    def sums(self) -> dict[str, Tensor]:
        """Layer → [C_in] float64 on the CPU; empty without `means`."""
        own = {name: total.to("cpu") for name, total in self._sums.items()}
        return {name: own[owner] for name, owner in self._owner.items() if owner in own}


class _Group:
    """Layers whose inputs are added together; `table` is [R, Σ C_in], `parts` are its columns layer by layer."""

    def __init__(self, names: list[str], tables: list[Tensor], dim: int) -> None:
        self._names = names
        self._dim = dim
        self._inputs: list[Tensor] = []
        self._versions: list[int] = []
        self.table = torch.cat(tables, dim=1)
        self.parts = self.table.split([t.shape[1] for t in tables], dim=1)

    def take(self, name: str, x: Tensor) -> bool:
        """Keep one input; whether it was the last of the group."""
        if self._names[len(self._inputs)] != name:
            raise RuntimeError(f"layer {name} runs where the first forward pass had {self._names[len(self._inputs)]}")
        self._inputs.append(x)
        self._versions.append(x._version)
        return len(self._inputs) == len(self._names)

    def joined(self) -> Tensor:
        """All kept inputs side by side, and none is kept any more."""
        changed = [n for n, x, v in zip(self._names, self._inputs, self._versions, strict=True) if x._version != v]
        if changed:
            raise RuntimeError(f"the input of layer {changed[0]} was changed in place, and was not in the first forward pass")
        x = torch.cat(self._inputs, dim=self._dim)
        self.clear()
        return x

    def clear(self) -> None:
        self._inputs.clear()
        self._versions.clear()

    def left(self) -> list[str]:
        """Layers that a group which has begun still waits for."""
        return self._names[len(self._inputs) :] if self._inputs else []


class _Recording:
    def __init__(self, collector: Collector, rows: Tensor) -> None:
        self._collector = collector
        self._new_rows = rows

    def __enter__(self) -> None:
        self._collector._rows = self._new_rows
        self._collector._batch = len(self._new_rows)

    def __exit__(self, kind: object, *exc: object) -> None:
        collector = self._collector
        collector._rows = None
        collector._last = None
        if kind is None:
            collector._finish()
        else:
            collector._drop()


# --------------------------------------------------------------------------------------------------------------- inputs


def timestep_schedule(n: int, low: int, high: int, rng: torch.Generator) -> Tensor:
    """[n] int64 timesteps that cover [low, high) evenly: one in each of n equal slices, in shuffled order."""
    place_in_slice = torch.rand(n, generator=rng, dtype=torch.float64)
    spread = (torch.arange(n, dtype=torch.float64) + place_in_slice) * ((high - low) / n)
    t = (low + spread.floor().to(torch.int64)).clamp(low, high - 1)
    return t[torch.randperm(n, generator=rng)]


def noised_batches(
    unet: nn.Module,
    scheduler: Any,
    images: Tensor | Any | None,
    *,
    n: int,
    mode: str = "random",
    target: tuple[int, int] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    part: tuple[int, int] | None = None,
    trajectory_steps: int = 50,
) -> Generator[Batch, Tensor | None, None]:
    """Network inputs for n samples; repeating the call repeats the batches.

    "random": x_t = √ᾱ_t x₀ + √(1-ᾱ_t) ε with x₀ = images[i % N]; ε depends on (seed, i), t on (seed, n, i).
    "trajectory": sample i is a state of a DDIM trajectory of `trajectory_steps` steps. Trajectories are run by this
    generator, with the network's output sent back into it (``batches.send(eps)``) or, in a plain for loop, with a forward pass
    of its own.

    Args:
        target: [low, high) of t, None for all timesteps.
        part: yield samples part[0] … part[1]-1 alone.

    Raises:
        UserError: bad arguments, images that do not fit the network, or no step of the trajectory inside the target.
    """
    if mode not in MODES:
        raise UserError(f"timesteps mode {mode!r} is not one of {', '.join(MODES)}.")
    if n < 1 or batch_size < 1:
        raise UserError(f"the number of calibration images ({n}) and the batch size ({batch_size}) must be at least 1.")
    low, high = parse_target_steps(target or "all", int(scheduler.config.num_train_timesteps))
    first, last = part or (0, n)
    device, dtype = place(unet, device, dtype)
    if inputs.is_conditioned(unet):
        prompts = images if isinstance(images, inputs.Prompts) else inputs.Prompts()
        given = inputs.conditioned_batches(
            unet, scheduler, prompts, n=n, mode=mode, target=(low, high), batch_size=batch_size, seed=seed,
            device=device, dtype=dtype, part=(first, last), steps=trajectory_steps,
        )  # fmt: skip
        for x, t, indices, condition in given:
            yield Batch(x, t, indices, condition)
        return
    if mode == "trajectory":
        yield from _trajectory(
            unet, scheduler, n, low, high, first, last, batch_size, seed, device, dtype, trajectory_steps
        )
        return
    shape = image_shape(unet)
    if images is None or len(images) == 0:
        raise UserError("calibration with noised images needs at least one image.")
    have = (images.shape[3], *images.shape[1:3]) if images.dtype == torch.uint8 else tuple(images.shape[1:])
    if tuple(have) != shape:
        raise UserError(
            f"the calibration images are {tuple(have)} (channels, height, width), the network needs {shape}."
        )
    schedule = timestep_schedule(n, low, high, generator(seed, "timesteps", 0))
    alphas = scheduler.alphas_cumprod.to("cpu", torch.float64)
    for start in range(first, last, batch_size):
        indices = torch.arange(start, min(start + batch_size, last))
        t = schedule[indices]
        signal = alphas[t].sqrt().float().view(-1, 1, 1, 1)
        blur = (1 - alphas[t]).sqrt().float().view(-1, 1, 1, 1)
        x = signal * to_float(images[indices % len(images)]) + blur * noise(
            shape, indices.tolist(), seed, "calibration"
        )
        yield Batch(upload(x, device), upload(t, device), indices, class_labels(unet, indices.tolist(), seed, device))


def _trajectory(
    unet: nn.Module,
    scheduler: Any,
    n: int,
    low: int,
    high: int,
    first: int,
    last: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
) -> Generator[Batch, Tensor | None, None]:
    """States of DDIM trajectories. Sample i lies on trajectory i % m, and each trajectory gives its samples at steps spread over
    the target, shifted from one trajectory to the next.
    """
    stepper = make_stepper(scheduler, steps)
    inside = [k for k, t in enumerate(stepper.timesteps.tolist()) if low <= t < high]
    if not inside:
        raise UserError(f"none of the {steps} DDIM steps lies in timesteps {low}-{high}.")
    # Enough trajectories for all samples; at least eight, since the states of one resemble each other.
    m = max(-(-n // len(inside)), min(n, 8))
    per = -(-n // m)
    shape = image_shape(unet)
    for start in range(0, m, batch_size):
        mine = torch.arange(start, min(start + batch_size, m))
        at: dict[int, list[tuple[int, int]]] = {}  # step → (place in the batch, sample)
        for k, trajectory in enumerate(mine.tolist()):
            for j, i in enumerate(range(trajectory, n, m)):
                step = inside[int((j + (trajectory + 0.5) / m) * len(inside) / per)]
                if first <= i < last:
                    at.setdefault(step, []).append((k, i))
        if not at:
            continue
        x = noise(shape, mine.tolist(), seed, "trajectory").to(device)
        labels = class_labels(unet, mine.tolist(), seed, device)
        for k, t in enumerate(stepper.timesteps.tolist()):
            eps = None
            if k in at:
                chosen = torch.tensor([c for c, _ in at[k]])
                indices = torch.tensor([i for _, i in at[k]])
                pick = chosen.to(device)
                batch = Batch(
                    x[pick],
                    torch.full((len(pick),), t, device=device),
                    indices,
                    None if labels is None else labels[pick],
                )
                out = yield batch
                eps = out if len(chosen) == len(mine) else None
            if k >= max(at):
                break
            if eps is None:
                with torch.no_grad():
                    eps = predict(unet, x, torch.full((len(mine),), t, device=device), labels, dtype=dtype)
            x = stepper.step(eps, t, x, eta=0.0).prev_sample


make_callable(__name__)
