"""ActivationStats: how strongly every input channel of every layer is used, kept per timestep.

The tables hold Σ x² over positions, in rows. With one row per calibration sample nothing is decided yet: every strategy
over samples and timesteps, and every target range, can be applied to saved statistics without another calibration. Very
large models get one row per timestep bin, from which only the root mean square over samples can be formed.

From rows to ‖X‖₂ of a layer, [C_in]:

1. rows outside the target range are left out, the others are grouped by timestep: one group per timestep while there are at
   most 64, otherwise 32 bins of equal width over the target range;
2. the activation strategy makes one norm per group: ``mean`` √(Σ x² / samples), the root mean square of the per-sample norms;
   ``max`` and ``median`` of the per-sample norms;
3. the time strategy joins the groups: ``mean``, ``max``, ``median``, or ``weighted_mean`` with weights that rise linearly from
   0.5 at the noisiest timestep of the target range to 1.5 at the cleanest.

Source: Wanda, Sun et al. 2023, arXiv:2306.11695, section 3, for ‖X‖₂; the strategies over time are those of Wanda-Diff.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .errors import UserError

TIME_STRATEGIES = ("mean", "max", "median", "weighted_mean")
WEIGHTED = ("mean", "weighted_mean")  # time strategies that are weighted sums over the groups
ACTIVATION_STRATEGIES = ("mean", "max", "median")
TARGET_STEPS = ("all", "early", "late", "middle")
EXACT_GROUPS = 64
BINS = 32
FORMAT = "wanda_fast.activation_stats/1"


T = TypeVar("T")


class _PerLayer(Mapping[str, T], Generic[T]):
    """Layer → value, worked out when first asked for."""

    def __init__(self, layers: Iterable[str], make: Callable[[str], T]) -> None:
        self._layers = dict.fromkeys(layers)
        self._make = make
        self._made: dict[str, T] = {}

    def __getitem__(self, layer: str) -> T:
        if layer not in self._layers:
            raise KeyError(layer)
        if layer not in self._made:
            self._made[layer] = self._make(layer)
        return self._made[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


@dataclass
class ActivationStats:
    """Activation energies of one network.

    Attributes:
        tables: layer → [R, C_in] float32, Σ x² over the positions (and samples) of the row.
        positions: layer → positions per sample: H·W of a convolution's input, L of a token sequence, 1 for vectors.
        timesteps: [R] int64; of a bin its middle.
        counts: [R] int64, samples in the row.
        samples: [R] int64, index of the row's sample in its run, or -1 for a bin.
        num_train_timesteps: length of the noise schedule.
        model: fingerprint of the network, see :func:`fingerprint`.
        info: how the statistics came about: dataset, seed, mode, target, dtype, versions. JSON.
        sums: layer → [C_in] float64, Σ x over all samples and positions; empty unless the calibration was asked for means.

    Example:
        Two channels in four samples, two of them at a noisy and two at a clean timestep:

        >>> import torch
        >>> from wanda_fast import ActivationStats
        >>> stats = ActivationStats(
        ...     tables={"conv": torch.tensor([[9.0, 1.0], [9.0, 1.0], [1.0, 4.0], [1.0, 4.0]])}, positions={"conv": 1},
        ...     timesteps=torch.tensor([900, 900, 100, 100]), counts=torch.ones(4, dtype=torch.int64),
        ...     samples=torch.arange(4), num_train_timesteps=1000, model={})
        >>> stats.act_norm("conv")
        tensor([2.0000, 1.5000])
        >>> stats.act_norm("conv", target_steps="late")
        tensor([1., 2.])
        >>> stats.act_norm("conv", time_strategy="max")
        tensor([3., 2.])
    """

    tables: dict[str, Tensor]
    positions: dict[str, int]
    timesteps: Tensor
    counts: Tensor
    samples: Tensor
    num_train_timesteps: int
    model: dict[str, str]
    info: dict[str, Any] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = len(self.timesteps)
        if not self.tables or rows == 0:
            raise UserError("the activation statistics are empty.")
        if len(self.counts) != rows or len(self.samples) != rows or any(len(t) != rows for t in self.tables.values()):
            raise UserError("the activation statistics are inconsistent: their tables have different numbers of rows.")

    @property
    def per_sample(self) -> bool:
        """Whether each row is one sample, so that every activation strategy can be applied."""
        return bool((self.samples >= 0).all())  # counts do not tell: a bin may hold one sample

    def check_model(self, unet: nn.Module) -> None:
        """Refuse the statistics of another network.

        Raises:
            UserError: the architecture or the weights differ.
        """
        here = fingerprint(unet)
        if self.model.get("architecture") != here["architecture"]:
            raise UserError("the activation statistics belong to a network of another architecture.")
        if self.model.get("weights") != here["weights"]:
            raise UserError("the activation statistics belong to a network of this architecture with other weights.")

    # ------------------------------------------------------------------------------------------------------- strategies

    def grouped(
        self, layer: str, *, activation_strategy: str = "mean", target_steps: str | tuple[int, int] = "all"
    ) -> tuple[Tensor, Tensor]:
        """Norms per timestep group: (mean timestep [G] float64 rising, ‖X‖₂ [G, C_in] float32).

        Raises:
            UserError: unknown layer or strategy, no rows in the target range, or a strategy that needs per-sample rows.
        """
        _check_choice("activation strategy", activation_strategy, ACTIVATION_STRATEGIES)
        if layer not in self.tables:
            raise UserError(f"the activation statistics have no layer {layer}.")
        if activation_strategy != "mean" and not self.per_sample:
            raise UserError(
                f"the activation strategy {activation_strategy} needs one row per sample, but these statistics hold one row per "
                "timestep bin (calibrate with fewer images, or ask for sample rows)."
            )
        if activation_strategy == "mean":
            when, energy = self._mean_energies(layer, target_steps)
            return when, energy.sqrt().float()
        rows, group, groups = self._groups(target_steps)
        _, when = self._group_times(rows, group, groups)
        sq = self.tables[layer].to("cpu")[rows]
        parts = [sq[group == g].sqrt() for g in range(groups)]
        if activation_strategy == "max":
            return when, torch.stack([p.amax(0) for p in parts])
        return when, torch.stack([_median(p) for p in parts])

    def _group_times(self, rows: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """(samples, mean timestep) of each group, float64."""
        counts = self.counts[rows].double()
        total = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, counts)
        when = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, counts * self.timesteps[rows]) / total
        return total, when

    def _mean_energies(self, layer: str, target_steps: str | tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(mean timestep [G], mean Σ x² over the samples of each group [G, C_in]), float64."""
        if layer not in self.tables:
            raise UserError(f"the activation statistics have no layer {layer}.")
        rows, group, groups = self._groups(target_steps)
        total, when = self._group_times(rows, group, groups)
        sq = self.tables[layer].to("cpu")[rows].double()
        return when, torch.zeros(groups, sq.shape[1], dtype=torch.float64).index_add_(0, group, sq) / total[:, None]

    def _groups(self, target_steps: str | tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        """(indices of the rows in the target, group of each, number of groups); groups are numbered by rising timestep."""
        low, high = self._target(target_steps)
        rows = ((self.timesteps >= low) & (self.timesteps < high)).nonzero().flatten()
        if len(rows) == 0:
            have = f"{int(self.timesteps.min())} to {int(self.timesteps.max())}"
            raise UserError(f"the activation statistics have no samples in timesteps {low}-{high}; they cover {have}.")
        t = self.timesteps[rows]
        distinct = t.unique()
        key = t if len(distinct) <= EXACT_GROUPS else (t - low) * BINS // (high - low)
        present, group = key.unique(return_inverse=True)
        return rows, group, len(present)

    def _target(self, target_steps: str | tuple[int, int]) -> tuple[int, int]:
        return parse_target_steps(target_steps, self.num_train_timesteps)

    def act_norm(
        self,
        layer: str,
        *,
        time_strategy: str = "mean",
        activation_strategy: str = "mean",
        target_steps: str | tuple[int, int] = "all",
    ) -> Tensor:
        """‖X‖₂ of every input channel of a layer, [C_in] float32 on the CPU; see the module's text for the formula.

        Raises:
            UserError: as :meth:`grouped`, or an unknown time strategy.
        """
        _check_choice("time strategy", time_strategy, TIME_STRATEGIES)
        when, norms = self.grouped(layer, activation_strategy=activation_strategy, target_steps=target_steps)
        if time_strategy == "max":
            return norms.amax(0)
        if time_strategy == "median":
            return _median(norms)
        weights = self._time_weights(when, time_strategy, target_steps)
        return (weights[:, None] * norms.double()).sum(0).float()

    def _time_weights(self, when: Tensor, time_strategy: str, target_steps: str | tuple[int, int]) -> Tensor:
        """[G] float64, sum 1."""
        weights = torch.ones_like(when)
        if time_strategy == "weighted_mean":
            low, high = self._target(target_steps)
            weights = 0.5 + ((high - 1 - when) / max(high - 1 - low, 1)).clamp(0, 1)
        return weights / weights.sum()

    def score_table(
        self,
        layer: str,
        *,
        time_strategy: str = "mean",
        activation_strategy: str = "mean",
        target_steps: str | tuple[int, int] = "all",
    ) -> tuple[Tensor, Tensor]:
        """(sq [G, C_in], row_weight [G]), float32, for ``ops.wanda_score_stats``: Σ_g row_weight[g] √sq[g, c] =
        act_norm[c] up to rounding. Nothing is joined over time here, the operation does that on its way through the weight.

        Raises:
            UserError: as :meth:`grouped`, or a time strategy that is no weighted sum (max and median).
        """
        _check_choice("time strategy", time_strategy, WEIGHTED)
        if activation_strategy == "mean":
            when, sq = self._mean_energies(layer, target_steps)
        else:
            when, norms = self.grouped(layer, activation_strategy=activation_strategy, target_steps=target_steps)
            sq = norms.square()
        return sq.float(), self._time_weights(when, time_strategy, target_steps).float()

    def norms(
        self,
        *,
        time_strategy: str = "mean",
        activation_strategy: str = "mean",
        target_steps: str | tuple[int, int] = "all",
    ) -> Mapping[str, Tensor]:
        """Layer → :meth:`act_norm`, worked out when first asked for."""
        return _PerLayer(
            self.tables,
            lambda layer: self.act_norm(
                layer, time_strategy=time_strategy, activation_strategy=activation_strategy, target_steps=target_steps
            ),
        )

    def score_tables(
        self,
        *,
        time_strategy: str = "mean",
        activation_strategy: str = "mean",
        target_steps: str | tuple[int, int] = "all",
    ) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Layer → :meth:`score_table`, worked out when first asked for; empty where the time strategy is no weighted sum."""
        return _PerLayer(
            self.tables if time_strategy in WEIGHTED else (),
            lambda layer: self.score_table(
                layer, time_strategy=time_strategy, activation_strategy=activation_strategy, target_steps=target_steps
            ),
        )

    # ---------------------------------------------------------------------------------------------------------- merging

    def merge(self, *others: ActivationStats) -> ActivationStats:
        """Join statistics of the same network.

        Parts of one run (same info) come in the order of their samples, so that two halves give the whole run bit for
        bit; other sample rows are appended. Bins are added.

        Raises:
            UserError: another network, other layers, a sample twice, or bins that do not match.
        """
        everyone = [self, *others]
        for other in others:
            if other.model != self.model or other.num_train_timesteps != self.num_train_timesteps:
                raise UserError("statistics of different networks cannot be merged.")
            if {n: t.shape[1] for n, t in other.tables.items()} != {n: t.shape[1] for n, t in self.tables.items()}:
                raise UserError("statistics with different layers cannot be merged.")
            if other.per_sample != self.per_sample:
                raise UserError("statistics per sample and per timestep bin cannot be merged.")
        sums = {
            n: torch.stack([s.sums[n] for s in everyone]).sum(0)
            for n in self.sums
            if all(n in s.sums for s in everyone)
        }
        same_run = all(s.info == self.info for s in others)
        info = dict(self.info) if same_run else {"runs": [r for s in everyone for r in s.info.get("runs", [s.info])]}
        if not self.per_sample:
            if not same_run and any(not torch.equal(s.timesteps, self.timesteps) for s in others):
                raise UserError("statistics with different timestep bins cannot be merged.")
            # A part of a run has no rows for bins that none of its samples fell into.
            timesteps, row = torch.cat([s.timesteps for s in everyone]).unique(return_inverse=True)

            def added(parts: list[Tensor]) -> Tensor:
                values = torch.cat(parts)
                return values.new_zeros(len(timesteps), *values.shape[1:]).index_add_(0, row, values)

            return dataclasses.replace(
                self,
                tables={n: added([s.tables[n] for s in everyone]) for n in self.tables},
                timesteps=timesteps,
                counts=added([s.counts for s in everyone]),
                samples=torch.full((len(timesteps),), -1),
                sums=sums,
                info=info,
            )
        samples = torch.cat([s.samples for s in everyone])
        order = torch.arange(len(samples))
        if same_run:
            if len(samples.unique()) != len(samples):
                raise UserError("statistics of the same samples cannot be merged: calibrate with another seed.")
            order = samples.argsort()
        return dataclasses.replace(
            self,
            tables={n: torch.cat([s.tables[n] for s in everyone])[order] for n in self.tables},
            timesteps=torch.cat([s.timesteps for s in everyone])[order],
            counts=torch.cat([s.counts for s in everyone])[order],
            samples=samples[order],
            sums=sums,
            info=info,
        )

    # ---------------------------------------------------------------------------------------------------------- on disk

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, in one step. Layers with equal tables (queries, keys and values read one tensor) share one."""
        from safetensors.torch import save_file

        owners, aliases = self._shared()
        tensors = {f"sq/{n}": self.tables[n].to("cpu").contiguous() for n in owners}
        tensors |= {f"sum/{n}": t.to("cpu").clone() for n, t in self.sums.items()}
        tensors |= {"timesteps": self.timesteps, "counts": self.counts, "samples": self.samples}
        header = {
            "num_train_timesteps": self.num_train_timesteps,
            "model": self.model,
            "info": self.info,
            "positions": self.positions,
            "aliases": aliases,
            "layers": list(self.tables),
        }
        target = Path(path)
        handle, temp = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        os.close(handle)
        try:
            save_file(tensors, temp, metadata={"format": FORMAT, "header": json.dumps(header, sort_keys=True)})
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temp, 0o666 & ~mask)  # mkstemp makes files private
            os.replace(temp, target)
        except BaseException:
            os.unlink(temp)
            raise

    def _shared(self) -> tuple[list[str], dict[str, str]]:
        """(layers whose table is stored, layer → the stored layer it equals)."""
        owners: dict[tuple[Any, ...], list[str]] = {}
        aliases: dict[str, str] = {}
        for name, table in self.tables.items():
            peers = owners.setdefault((table.shape, float(table[0].double().sum())), [])
            twin = next((p for p in peers if torch.equal(self.tables[p], table)), None)
            if twin is None:
                peers.append(name)
            else:
                aliases[name] = twin
        return [n for n in self.tables if n not in aliases], aliases

    def _check_values(self) -> None:
        """Refuse what no calibration writes: a damaged file must not decide what is removed."""

        def check(right: bool, what: str) -> None:
            if not right:
                raise UserError(f"damaged activation statistics: {what}.")

        rows = len(self.timesteps)
        check(1 <= self.num_train_timesteps <= 100_000, "the length of the noise schedule")
        for name, values in (("timesteps", self.timesteps), ("counts", self.counts), ("samples", self.samples)):
            check(values.dtype == torch.int64 and values.shape == (rows,), f"the shape of {name}")
        t = self.timesteps
        check(bool(((t >= 0) & (t < self.num_train_timesteps)).all()), "timesteps outside the schedule")
        check(bool(((self.counts >= 1) & (self.counts <= 2**40)).all()), "the numbers of samples")
        check(set(self.positions) >= set(self.tables), "positions are missing")
        for name, table in self.tables.items():
            check(1 <= self.positions[name] <= 2**40, f"the positions of {name}")
            check(table.dtype == torch.float32 and table.ndim == 2 and table.shape[1] > 0, f"the table of {name}")
            check(bool(((table >= 0) & torch.isfinite(table)).all()), f"values in the table of {name}")
        for name, total in self.sums.items():
            fits = name in self.tables and total.shape == self.tables[name].shape[1:] and total.is_floating_point()
            check(fits and bool(torch.isfinite(total).all()), f"the sums of {name}")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ActivationStats:
        """Read a file that :meth:`save` wrote.

        Raises:
            UserError: no such file, truncated, or not such a file.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise UserError(f"{path}: no such file with activation statistics.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"{path}: holds no activation statistics ({FORMAT}).")
                header = json.loads(metadata["header"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            aliases = header["aliases"]
            found = cls(
                tables={n: tensors[f"sq/{aliases.get(n, n)}"] for n in header["layers"]},
                positions={n: int(p) for n, p in header["positions"].items()},
                timesteps=tensors["timesteps"],
                counts=tensors["counts"],
                samples=tensors["samples"],
                num_train_timesteps=int(header["num_train_timesteps"]),
                model=dict(header["model"]),
                info=dict(header["info"]),
                sums={n[4:]: t for n, t in tensors.items() if n.startswith("sum/")},
            )
            found._check_values()
            return found
        except UserError as error:
            raise error if str(path) in str(error) else UserError(f"{path}: {error}") from error
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError,
                RuntimeError) as error:  # fmt: skip
            raise UserError(f"{path}: damaged activation statistics ({type(error).__name__}: {error}).") from error


def parse_target_steps(text: str | tuple[int, int], num_train_timesteps: int) -> tuple[int, int]:
    """Range [low, high) of timesteps: ``all``; ``early`` (t ≥ 0.7 T, the noisiest); ``late`` (t < 0.3 T); ``middle``; ``a-b``; or
    the pair itself.

    Raises:
        UserError: malformed, empty, or outside [0, T].
    """
    total = num_train_timesteps
    first, last = -(-3 * total // 10), -(-7 * total // 10)  # smallest integers ≥ 0.3 T and ≥ 0.7 T
    named = {"all": (0, total), "early": (last, total), "late": (0, first), "middle": (first, last)}
    if isinstance(text, str):
        match = re.fullmatch(r"(\d+)-(\d+)", text.strip())
        if match is None and text not in named:
            raise UserError(
                f"timestep range {text!r}: expected {', '.join(TARGET_STEPS)} or a-b with 0 <= a < b <= {total}."
            )
        low, high = named[text] if match is None else (int(match[1]), int(match[2]))
    else:
        low, high = text
    if not 0 <= low < high <= total:
        raise UserError(f"timestep range {text!r}: [{low}, {high}) is empty or outside the {total} timesteps.")
    return low, high


def fingerprint(unet: nn.Module) -> dict[str, str]:
    """SHA-256 of the architecture (config, names and shapes) and of the weights (as float32, so the dtype in memory is free)."""
    config: Any = unet.config
    state = unet.state_dict()
    shape = {
        "config": {k: v for k, v in config.items() if not k.startswith("_")},
        "tensors": {n: list(t.shape) for n, t in state.items()},
    }
    weights = hashlib.sha256()
    for name, tensor in state.items():
        weights.update(name.encode())
        weights.update(tensor.detach().to("cpu", torch.float32).contiguous().view(torch.uint8).numpy().data)
    return {
        "architecture": hashlib.sha256(json.dumps(shape, sort_keys=True, default=list).encode()).hexdigest(),
        "weights": weights.hexdigest(),
    }


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{what} {value!r} is not one of {', '.join(allowed)}.")


def _median(values: Tensor) -> Tensor:
    """Median over dim 0; of an even number the mean of the middle two (torch.median takes the lower)."""
    ordered = values.sort(0).values
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
