"""PruningPlan: which channels of every slot stay, and how the widths are chosen.

Two questions are answered apart. *How many* channels a slot keeps is decided by the split (`uniform`, or
`sensitivity` with measured damage) under a target (share of channels, MACs or parameters), on legal widths only.
*Which* channels they are is decided by the scores, under the norm policy:

- `balanced`: equally many channels leave every block of a slot, each block chooses its own. A block is the greatest
  common divisor of the group sizes (and concatenation offsets) of all norms that see the slot, so `num_groups` and
  every channel's group stay. (With unequal ratios on the two sides of a concatenation the groups of the
  concatenated norm shift; the report counts those norms.)
- `free`: the best channels of the whole slot; `num_groups` becomes a divisor of the new width.
- `groups`: whole norm groups leave and `num_groups` shrinks, so the statistics of the others stay what they were.

A slot that no norm sees is always chosen freely. Ties go to the lower index.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .slots import SlotMap

LAYOUTS = ("stock", "free")
NORM_POLICIES = ("balanced", "free", "groups")
SPLITS = ("uniform", "sensitivity")
PLAN_FORMAT = "wanda_fast.plan/1"
_COMPLETE = 2_000_000  # assignments up to which the widths of least damage are searched completely


@dataclass
class PruningPlan:
    """Kept channels per slot, and everything needed to apply them again.

    Attributes:
        keep: slot -> sorted int64 indices into the dense slot.
        layout: "stock" (opens as a plain UNet2DModel) or "free" (one width per slot).
        norm_policy: "balanced", "free" or "groups".
        norm_groups: norm -> `num_groups` after pruning.
        identity_shortcuts: resnets that get an explicit identity `conv_shortcut` before pruning.
        dense_config: configuration of the dense network.
        config: configuration of the pruned network; None in the free layout.
        architecture: fingerprint of `dense_config`, compared before a plan is replayed.

    Example:
        >>> import wanda_fast
        >>> plan = wanda_fast.prune(pruner="magnitude", split="uniform", ratio=0.5, dry_run=True).plan
        >>> plan.layout, plan.widths["conv_in"], plan.keep["conv_in"].dtype
        ('stock', 32, torch.int64)
        >>> wanda_fast.PruningPlan.from_dict(plan.to_dict()).widths == plan.widths
        True
    """

    keep: dict[str, Tensor]
    layout: str
    norm_policy: str
    norm_groups: dict[str, int]
    identity_shortcuts: list[str] = field(default_factory=list)
    dense_config: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    architecture: str = ""

    @property
    def widths(self) -> dict[str, int]:
        """Channels kept per slot."""
        return {name: len(k) for name, k in self.keep.items()}

    @property
    def record(self) -> dict[str, Any]:
        """What rebuilds a free-layout network beside the dense configuration (plain JSON values)."""
        return {"widths": self.widths, "norm_groups": self.norm_groups, "identity_shortcuts": self.identity_shortcuts}

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {
            "format": PLAN_FORMAT,
            "layout": self.layout,
            "norm_policy": self.norm_policy,
            "architecture": self.architecture,
            "slots": {name: k.tolist() for name, k in self.keep.items()},
            "norm_groups": self.norm_groups,
            "identity_shortcuts": self.identity_shortcuts,
            "dense_config": self.dense_config,
            "config": self.config,
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> PruningPlan:
        """Read a plan from JSON values.

        Raises:
            UserError: the data is not a plan, or an index list is not sorted, unique and non-negative.
        """
        if not isinstance(data, dict) or data.get("format") != PLAN_FORMAT:
            raise UserError(f"{where} is not a pruning plan (expected \"format\": \"{PLAN_FORMAT}\")")
        try:
            layout, policy = data["layout"], data["norm_policy"]
            if layout not in LAYOUTS or policy not in NORM_POLICIES:
                raise UserError(f"{where}: unknown layout {layout!r} or norm policy {policy!r}")
            keep = {}
            for name, indices in data["slots"].items():
                whole = isinstance(indices, list) and all(type(i) is int for i in indices)
                if not whole or not indices or indices[0] < 0 or any(a >= b for a, b in zip(indices, indices[1:])):
                    raise UserError(f"{where}: slot {name} must hold sorted, unique, non-negative indices")
                keep[str(name)] = torch.tensor(indices, dtype=torch.int64)
            groups = {str(k): int(v) for k, v in data["norm_groups"].items()}
            shortcuts = [str(s) for s in data["identity_shortcuts"]]
            config = data["config"]
            if not isinstance(data["dense_config"], dict) or not (config is None or isinstance(config, dict)):
                raise UserError(f"{where}: the configurations must be JSON objects")
            return cls(keep, layout, policy, groups, shortcuts, data["dense_config"], config, str(data["architecture"]))
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            raise UserError(f"{where} is damaged: {type(error).__name__}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read a plan file, or the plan inside a `pruning.json`.

        Raises:
            UserError: the file is missing, truncated, or not a plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the plan {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        if isinstance(data, dict) and "plan" in data:
            data = data["plan"]
        return cls.from_dict(data, str(path))


def record_of(data: Any) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """Read a pruning record: (kept channels per slot, num_groups per norm, identity shortcuts).

    Raises:
        UserError: the record is damaged.
    """
    try:
        widths = {str(k): int(v) for k, v in data["widths"].items()}
        groups = {str(k): int(v) for k, v in data["norm_groups"].items()}
        return widths, groups, [str(s) for s in data["identity_shortcuts"]]
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"the pruning record is damaged: {type(error).__name__}: {error}") from None


def architecture_fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256 of the configuration entries that define the network's shape (private and version entries left out)."""
    shape = {k: v for k, v in config.items() if not k.startswith("_")}
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=list).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------------
# Sizes


@dataclass
class LayerCost:
    """What one layer costs: MACs = pairs · C_in · C_out, parameters = kernel · C_in · C_out + vector · C_out."""

    name: str
    c_in: int
    c_out: int
    kernel: int
    vector: int
    pairs: int


@dataclass
class CostModel:
    """Parameters and multiply-accumulates of a network as a function of its slots' widths.

    MACs count convolutions and linear layers of one image; the two matrix products inside attention are left out, as
    in the published figures (6.06 G for google/ddpm-cifar10-32).
    """

    layers: list[LayerCost]
    slots: SlotMap
    norms: dict[str, int]
    sinusoid_consumers: tuple[str, ...] = ()
    constant: int = 0  # parameters of everything else
    copies: Mapping[str, int] = field(default_factory=dict)  # sets of weights of the layers and norms that have more than one

    def sizes(self, widths: Mapping[str, int], *, sinusoid: int | None = None) -> tuple[int, int]:
        """(parameters, MACs) for kept channels per slot; slots that are absent stay whole.

        Args:
            sinusoid: new width of the sinusoidal time embedding, where the layout changes it.
        """
        slots, params, macs = self.slots, self.constant, 0

        def total(segments: tuple, dense: int) -> int:
            if not segments:
                return dense
            return sum(widths.get(s.slot, slots.slots[s.slot].width) for s in segments)

        for c in self.layers:
            c_in = total(slots.inputs.get(c.name, ()), c.c_in)
            if sinusoid is not None and c.name in self.sinusoid_consumers:
                c_in = sinusoid
            c_out = total(slots.outputs.get(c.name, ()), c.c_out)
            params += (c.kernel * c_in * c_out + c.vector * c_out) * self.copies.get(c.name, 1)
            macs += c.pairs * c_in * c_out
        for name, dense in self.norms.items():
            params += 2 * total(slots.inputs[name], dense) * self.copies.get(name, 1)
        return params, macs

    def part(self, names: Iterable[str]) -> CostModel:
        """The model of the layers and norms alone whose size may change with these slots."""
        changing = set(names)

        def touched(*sides: tuple) -> bool:
            return any(segment.slot in changing for side in sides for segment in side)

        inputs, outputs = self.slots.inputs, self.slots.outputs
        return replace(
            self,
            layers=[c for c in self.layers if touched(inputs.get(c.name, ()), outputs.get(c.name, ())) or c.name in self.sinusoid_consumers],
            norms={name: dense for name, dense in self.norms.items() if touched(inputs[name])},
            constant=0,
        )


# --------------------------------------------------------------------------------------------------------------------
# Legal widths


def norm_block(slots: SlotMap, name: str) -> int:
    """Block of a slot: gcd of the group sizes and offsets of the norms that see it; the whole width if none does."""
    slot = slots.slots[name]
    block = slot.width
    for norm, offset in slot.norms:
        groups, channels = slots.norms[norm]
        block = math.gcd(block, math.gcd(channels // groups, offset))
    return block


def _removal_unit(slots: SlotMap, name: str, policy: str, layout: str) -> int:
    """Channels that leave together: a head, or a whole norm group under the policy "groups"."""
    slot = slots.slots[name]
    if slot.unit > 1 or policy != "groups" or not slot.norms:
        return slot.unit
    sizes = [slots.norms[n][1] // slots.norms[n][0] for n, _ in slot.norms]
    if layout == "stock":  # one num_groups for all norms: the slot is cut into that many runs
        return slot.width // slots.norms[slot.norms[0][0]][0]
    unit = math.lcm(*sizes)
    aligned = all(offset % size == 0 for (_, offset), size in zip(slot.norms, sizes))
    return unit if aligned and slot.width % unit == 0 else slot.width


def legal_counts(slots: SlotMap, name: str, policy: str, layout: str, align: int, min_width: int) -> list[int]:
    """Legal numbers of kept channels of one slot, ascending; the full width is always among them."""
    slot = slots.slots[name]
    if not slot.prunable:
        return [slot.width]
    unit = _removal_unit(slots, name, policy, layout)
    if policy == "balanced" and slot.norms:
        step = math.lcm(slot.width // norm_block(slots, name), unit)
    else:
        step = unit
    if slot.unit == 1 and policy != "groups":
        step = math.lcm(step, align)
    counts = [n for n in range(step, slot.width, step) if n >= min_width]
    return [*counts, slot.width]


def select(score: Tensor, count: int, *, block: int | None = None, unit: int = 1) -> Tensor:
    """Indices of the `count` best channels, sorted; ties go to the lower index.

    Args:
        score: [C] float, higher is more important.
        count: channels to keep, a multiple of `unit`.
        block: keep equally many of every run of `block` channels (a smaller block is used where the count needs it).
        unit: runs of this many channels are kept or removed together, by the sum of their scores.

    Returns:
        [count] int64.
    """
    width = score.numel()
    if count == width:
        return torch.arange(width)
    score = score.detach().double().cpu()
    if unit > 1:
        runs = score.view(-1, unit).sum(1)
        best = torch.sort(runs, descending=True, stable=True).indices[: count // unit]
        return (best.sort().values[:, None] * unit + torch.arange(unit)).flatten()
    if block is None or block >= width:
        best = torch.sort(score, descending=True, stable=True).indices[:count]
        return best.sort().values
    if count * block % width:
        raise ValueError(f"{count} of {width} channels cannot be spread equally over blocks of {block}")
    per_block = count * block // width
    best = torch.sort(score.view(-1, block), dim=1, descending=True, stable=True).indices[:, :per_block]
    return (best.sort(dim=1).values + torch.arange(0, width, block)[:, None]).flatten()


# --------------------------------------------------------------------------------------------------------------------
# Choosing widths


@dataclass(frozen=True)
class Target:
    """What is asked for: exactly one of a share of channels to remove, a MACs or a parameter budget (absolute)."""

    ratio: float | None = None
    macs: int | None = None
    params: int | None = None


@dataclass
class WidthProblem:
    """Units whose width is decided together, and their legal widths.

    A unit is a resolution level (stock layout) or one slot with the slots tied to it (free layout). `options[u]` lists
    assignments {slot: count}, from the smallest to the whole width.
    """

    slots: SlotMap
    costs: CostModel
    options: dict[str, list[dict[str, int]]]
    legal: Callable[[dict[str, int]], bool]
    sinusoid: Callable[[dict[str, int]], int | None]

    @property
    def channels(self) -> int:
        """Channels of all slots of the dense network."""
        return sum(s.width for s in self.slots.slots.values())

    def widths(self, choice: Mapping[str, int]) -> dict[str, int]:
        """Kept channels per slot for an option index per unit."""
        merged: dict[str, int] = {}
        for unit, index in choice.items():
            for slot, count in self.options[unit][index].items():
                merged[slot] = count
        return merged

    def sizes(self, widths: dict[str, int]) -> tuple[int, int]:
        """(parameters, MACs) of an assignment."""
        return self.costs.sizes(widths, sinusoid=self.sinusoid(widths))

    def removed(self, widths: Mapping[str, int]) -> float:
        """Share of all channels that an assignment removes."""
        return 1 - sum(widths.get(n, s.width) for n, s in self.slots.slots.items()) / self.channels


def _meets(problem: WidthProblem, target: Target, widths: dict[str, int]) -> bool:
    params, macs = problem.sizes(widths)
    return (target.macs is None or macs <= target.macs) and (target.params is None or params <= target.params)


def _unreachable(problem: WidthProblem, target: Target, candidates: Sequence[dict[str, int]]) -> UserError:
    """The refusal of a budget, with the size of the smallest of these legal assignments."""
    which = 1 if target.macs is not None else 0
    smallest = min(candidates, key=lambda widths: problem.sizes(widths)[which])
    params, macs = problem.sizes(smallest)
    asked = f"{target.macs:,} MACs" if target.macs is not None else f"{target.params:,} parameters"
    return UserError(
        f"{asked} cannot be reached: the smallest legal network of this layout, norm policy and split has about "
        f"{params:,} parameters and {macs:,} MACs"
    )


def _smallest(problem: WidthProblem) -> list[dict[str, int]]:
    """Legal assignments of few channels. Least widths everywhere need not be legal: levels of the stock layout must differ."""
    least = problem.widths(dict.fromkeys(problem.options, 0))
    if problem.legal(least) or math.prod(len(o) for o in problem.options.values()) > _COMPLETE:
        return [least]
    channels = {u: [float(sum(o.values())) for o in options] for u, options in problem.options.items()}
    ranked = _ranked(problem, channels, lambda params, macs, gone: torch.ones_like(gone, dtype=torch.bool))
    return list(itertools.islice((w for w in ranked if problem.legal(w)), 64))


def uniform_widths(problem: WidthProblem, target: Target) -> dict[str, int]:
    """The same share from every unit, rounded to its nearest legal width.

    With a ratio the result is the legal assignment nearest to it; with a budget, the largest one within it.

    Raises:
        UserError: no legal assignment meets the budget.
    """
    legal = [problem.widths(choice) for choice in _even_choices(problem)]
    if target.ratio is not None:
        return min(legal, key=lambda w: (round(abs(problem.removed(w) - target.ratio), 9), problem.removed(w)))  # type: ignore[operator]
    fitting = [w for w in legal if _meets(problem, target, w)]
    if not fitting:
        raise _unreachable(problem, target, legal)
    return max(fitting, key=lambda w: problem.sizes(w)[1 if target.macs is not None else 0])


def _even_choices(problem: WidthProblem) -> list[dict[str, int]]:
    """Legal choices (option per unit) that keep about the same share of every unit, by rising share."""
    found: dict[tuple[int, ...], dict[str, int]] = {}
    for share in (i / 400 for i in range(1, 401)):
        choice = {}
        for unit, options in problem.options.items():
            whole = sum(options[-1].values())
            choice[unit] = min(range(len(options)), key=lambda i: (abs(sum(options[i].values()) / whole - share), -i))
        found.setdefault(tuple(choice.values()), choice)
    return [choice for choice in found.values() if problem.legal(problem.widths(choice))]


def sensitive_widths(
    problem: WidthProblem,
    target: Target,
    damage: Mapping[str, list[float]],
    *,
    floor: float | Sequence[float] = 0.25,
    evenness: float = 1.0,
    groups: int = 1,
) -> dict[str, int]:
    """Widths of least summed damage under the target.

    A ratio r asks for two things: at least the share r of all channels goes, and of the MACs. (Channels alone would be
    taken where they cost least, in the deep levels, which make a network small but hardly faster.)

    Few units (the levels of the stock layout) are searched completely. Many units (slots of the free layout) are cut
    greedily, each step the one of least damage per unit of budget that it frees; a final pass gives widths back where
    the budget still has room.

    Args:
        damage: unit -> damage of each of its options (0 for the whole width), same order as `problem.options`.
        floor: no unit keeps less than this share of its width, unless the target cannot be met otherwise: the damage
            is estimated for one unit at a time and says too little where almost nothing is left. Of several, ascending, the largest whose
            summed damage is at most `evenness` times that of the first one.
        evenness: what a larger floor may cost, at least 1.
        groups: widths (of the time embedding apart) are multiples of it where the target and the floors can be met so with a unit that keeps
            everything. A stock configuration has one number of norm groups, and a level whose width it does not divide changes it for all
            norms, those of levels that keep everything included, which no repair takes back.

    Raises:
        UserError: no legal assignment meets the budget.
    """
    whole = {u: sum(options[-1].values()) for u, options in problem.options.items()}
    kinds = {name: slot.kind for name, slot in problem.slots.slots.items()}

    def divided(option: Mapping[str, int]) -> bool:
        """Whether norms divide its channels into groups."""
        return not any(kinds[name].startswith("time") for name in option)

    def divides(step: int, option: Mapping[str, int]) -> bool:
        return not divided(option) or all(count % step == 0 for count in option.values())

    def some_whole(widths: Mapping[str, int]) -> bool:
        return any(divided(o[-1]) and o[-1].items() <= widths.items() for o in problem.options.values())

    def above(least: float, step: int) -> dict[str, int] | None:
        allowed = {
            u: [i for i, option in enumerate(options) if sum(option.values()) >= least * whole[u] and divides(step, option)]
            for u, options in problem.options.items()
        }
        if not all(allowed.values()):
            return None
        careful = replace(problem, options={u: [problem.options[u][i] for i in allowed[u]] for u in allowed})
        return _least_damage(careful, target, {u: [damage[u][i] for i in allowed[u]] for u in allowed})

    floors = [floor] if isinstance(floor, (int, float)) else list(floor)
    step = groups
    found = above(floors[0], step)
    if groups > 1 and not (found and some_whole(found)):
        step = 1
        found = above(floors[0], step)
    if found is not None and len(floors) > 1:
        limit = evenness * _summed(problem, damage, found)
        low, high = 0, len(floors)  # the damage rises with the floor
        while high - low > 1:
            middle = (low + high) // 2
            narrower = above(floors[middle], step)
            if narrower is not None and _summed(problem, damage, narrower) <= limit:
                low, found = middle, narrower
            else:
                high = middle
    if found is None:
        found = _least_damage(problem, target, damage)
    if found is None and target.ratio is not None:
        smallest = problem.widths(dict.fromkeys(problem.options, 0))
        found = smallest if problem.legal(smallest) else uniform_widths(problem, target)
    if found is None:
        raise _unreachable(problem, target, _smallest(problem))
    return found


def _summed(problem: WidthProblem, damage: Mapping[str, list[float]], widths: Mapping[str, int]) -> float:
    """Estimated damage of an assignment made of the problem's options."""
    return sum(
        next(row[i] for i, option in enumerate(problem.options[u]) if all(widths[n] == c for n, c in option.items()))
        for u, row in damage.items()
    )


def _least_damage(
    problem: WidthProblem, target: Target, damage: Mapping[str, list[float]]
) -> dict[str, int] | None:
    """The search of `sensitive_widths` among all options of a problem; None where the target cannot be met."""

    dense_macs = problem.sizes({})[1]

    def over_by(params: int, macs: int, removed: float) -> float:
        if target.ratio is None:
            return max(0.0, macs / target.macs - 1 if target.macs is not None else params / (target.params or 1) - 1)
        return max(0.0, target.ratio - removed - 1e-9) + max(0.0, macs / dense_macs - (1 - target.ratio))

    def excess(widths: dict[str, int]) -> float:
        """How far the widths are over what is allowed, 0 where they fit."""
        return over_by(*problem.sizes(widths), problem.removed(widths))

    units = list(problem.options)
    if math.prod(len(problem.options[u]) for u in units) <= _COMPLETE:
        for widths in _ranked(problem, damage, lambda params, macs, gone: _fits(target, params, macs, gone, dense_macs)):
            if excess(widths) == 0 and problem.legal(widths):
                return widths
        return None

    # A step to a smaller width of a unit is scored by its damage per unit of excess that it takes away. Steps of other
    # units change what a step saves only slowly, so a step is scored again only when it comes to the top.
    near = {u: replace(problem, costs=problem.costs.part(problem.options[u][0])) for u in units}
    choice = {u: len(problem.options[u]) - 1 for u in units}
    widths = problem.widths(choice)
    params, macs = problem.sizes(widths)
    over = excess(widths)
    step_to: dict[str, int] = {}

    def after(u: str, index: int) -> tuple[int, int, dict[str, int]]:
        """Sizes and widths after a step of one unit; only the layers that see it change."""
        new = {**widths, **problem.options[u][index]}
        (p0, m0), (p1, m1) = near[u].sizes(widths), near[u].sizes(new)
        return params - p0 + p1, macs - m0 + m1, new

    def price(u: str) -> float:
        """Damage per saving of the best step down from here, over the next few widths (damage need not be convex)."""
        cheapest = math.inf
        for index in range(choice[u] - 1, max(choice[u] - 4, -1), -1):
            new_params, new_macs, new = after(u, index)
            saved = over - over_by(new_params, new_macs, problem.removed(new))
            if saved > 0:
                rate = (damage[u][index] - damage[u][choice[u]]) / saved
                if rate < cheapest:
                    cheapest, step_to[u] = rate, index
        return cheapest

    queue = [(price(u), n, u) for n, u in enumerate(units)] if over > 0 else []
    heapq.heapify(queue)
    while over > 0:
        _, n, unit = heapq.heappop(queue)
        fresh = price(unit)
        if queue and fresh > queue[0][0]:
            heapq.heappush(queue, (fresh, n, unit))
            continue
        if not math.isfinite(fresh):
            return None
        params, macs, widths = after(unit, step_to[unit])
        choice[unit] = step_to[unit]
        over = over_by(params, macs, problem.removed(widths))
        heapq.heappush(queue, (price(unit) if over > 0 else math.inf, n, unit))
    if not problem.legal(problem.widths(choice)):
        fitting = _legal_below(problem, choice) or [even for even in _even_choices(problem) if excess(problem.widths(even)) == 0]
        if not fitting:
            return None
        choice = min(fitting, key=lambda c: sum(damage[u][c[u]] for u in units))
    for u in sorted(units, key=lambda u: -damage[u][choice[u]]):
        for index in range(len(problem.options[u]) - 1, choice[u], -1):
            widths = problem.widths({**choice, u: index})
            if problem.legal(widths) and excess(widths) == 0:
                choice[u] = index
                break
    return problem.widths(choice)


def _legal_below(problem: WidthProblem, choice: dict[str, int]) -> list[dict[str, int]]:
    """Legal choices a few steps under one that is not legal, such as where two levels must differ: by one unit, or else by two."""
    for count in (1, 2):
        legal = []
        for units in itertools.combinations(choice, count):
            for indices in itertools.product(*(range(max(0, choice[u] - 4), choice[u]) for u in units)):
                changed = {**choice, **dict(zip(units, indices, strict=True))}
                if problem.legal(problem.widths(changed)):
                    legal.append(changed)
        if legal:
            return legal
    return []


def _fits(target: Target, params: Tensor, macs: Tensor, gone: Tensor, dense_macs: int) -> Tensor:
    """Which assignments may meet a target, by sizes that carry rounding: bool, a little too generous."""
    if target.ratio is not None:
        return (gone >= target.ratio - 1e-6) & (macs <= (1 - target.ratio) * dense_macs * (1 + 1e-6))
    return macs <= target.macs * (1 + 1e-6) if target.macs is not None else params <= (target.params or 1) * (1 + 1e-6)


def _ranked(
    problem: WidthProblem, damage: Mapping[str, list[float]], fits: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Iterator[dict[str, int]]:
    """All assignments that fit, by ascending damage, then descending MACs.

    Sizes are polynomials of second degree in the units' widths (a layer costs inputs times outputs), so a few of them give
    all: f(x) = c + Σ b_u x_u + Σ q_uv x_u x_v with x_u the share of unit u that is kept.
    """
    units = list(problem.options)
    whole = {u: problem.options[u][-1] for u in units}

    def sizes(shares: Mapping[str, float]) -> Tensor:
        widths = {slot: n * shares.get(u, 0) for u in units for slot, n in whole[u].items()}
        return torch.tensor(problem.sizes(widths), dtype=torch.float64)  # type: ignore[arg-type]

    shares, harms, kept = [], [], []
    shape = [len(problem.options[u]) for u in units]
    for i, u in enumerate(units):
        view = [-1 if j == i else 1 for j in range(len(units))]
        counts = torch.tensor([sum(o.values()) for o in problem.options[u]], dtype=torch.float64)
        shares.append((counts / sum(whole[u].values())).view(view))
        kept.append(counts.view(view))
        harms.append(torch.tensor(damage[u], dtype=torch.float64).view(view))
    constant = sizes({})
    totals = [torch.full(shape, float(c), dtype=torch.float64) for c in constant]  # parameters, MACs
    single = {u: sizes({u: 1}) - constant for u in units}
    for i, u in enumerate(units):
        square = (sizes({u: 2}) - constant - 2 * single[u]) / 2
        for total, one, two in zip(totals, single[u], square, strict=True):
            total += (one - two) * shares[i] + two * shares[i].square()
        for j in range(i):
            cross = sizes({u: 1, units[j]: 1}) - constant - single[u] - single[units[j]]
            for total, c in zip(totals, cross, strict=True):
                total += c * shares[i] * shares[j]
    zero = torch.zeros(shape, dtype=torch.float64)
    outside = problem.channels - sum(sum(o.values()) for o in whole.values())
    gone = 1 - (sum(kept, zero) + outside) / problem.channels
    candidates = fits(totals[0], totals[1], gone).flatten().nonzero().flatten()
    harm = sum(harms, zero).flatten()[candidates]
    macs = totals[1].flatten()[candidates]
    order = torch.sort(-macs, stable=True).indices
    order = order[torch.sort(harm[order], stable=True).indices]
    for index in candidates[order].tolist():
        choice = {}
        for u, n in zip(reversed(units), reversed(shape), strict=True):
            index, choice[u] = divmod(index, n)
        yield problem.widths(choice)


def stock_problem(
    slots: SlotMap, costs: CostModel, config: Mapping[str, Any], policy: str, align: int, min_width: int
) -> WidthProblem:
    """Width choices of the stock layout: one per resolution level, and one for the time embedding."""
    channels = list(config["block_out_channels"])
    by_level: dict[int, list[str]] = {i: [] for i in range(len(channels))}
    time_slots = [n for n, s in slots.slots.items() if s.kind.startswith("time")]
    for name, slot in slots.slots.items():
        for level in slot.levels:
            by_level[level].append(name)
    head_dim = config.get("attention_head_dim")
    single = all(heads == 1 for *_, heads, _ in slots.attentions.values())
    merged: dict[int, int] = {}  # level -> first level of its run of levels that share a slot
    for slot in slots.slots.values():
        for level in slot.levels[1:]:
            merged[level] = merged.get(slot.levels[0], slot.levels[0])
    runs: dict[int, list[int]] = {}
    for level in by_level:
        runs.setdefault(merged.get(level, level), []).append(level)

    options: dict[str, list[dict[str, int]]] = {}
    for run in runs.values():
        names = list(dict.fromkeys(n for level in run for n in by_level[level]))
        width = channels[run[0]]
        odd = next((n for n in names if slots.slots[n].width != width), None)
        if odd is not None:  # of an attention whose heads do not fill its level
            raise UserError(f"level {run[0]} has {width} channels and {odd} has {slots.slots[odd].width} (attention_head_dim {head_dim}): "
                            "only the free layout can express other widths there")  # fmt: skip
        counts = set(range(1, width + 1))
        for name in names:
            counts &= set(legal_counts(slots, name, policy, "stock", align, min_width))
        if any(slots.slots[n].kind == "heads" for n in names) or (head_dim is not None and not single):
            counts = {c for c in counts if c % int(head_dim or 1) == 0} | {width}
        if 0 in run:
            counts = {c for c in counts if _sinusoid_ok(config, width, c)}
        options["+".join(f"level {i}" for i in run)] = [dict.fromkeys(names, c) for c in sorted(counts)]
    if all(slots.slots[n].prunable for n in time_slots):
        width = slots.slots[time_slots[0]].width
        step = math.lcm(align, max(1, width // 16))
        counts_time = [c for c in range(step, width, step) if c >= max(min_width, width // 8)]
        options["time embedding"] = [dict.fromkeys(time_slots, c) for c in [*counts_time, width]]

    def level_widths(widths: Mapping[str, int]) -> list[int]:
        return [widths.get(by_level[i][0], channels[i]) for i in range(len(channels))]

    def legal(widths: dict[str, int]) -> bool:
        new = level_widths(widths)
        different = all(a != b for a, b, x, y in zip(new, new[1:], channels, channels[1:]) if x != y)
        return different and stock_groups(config, channels, new, policy) is not None

    def sinusoid(widths: dict[str, int]) -> int | None:
        return level_widths(widths)[0] if config.get("time_embedding_type", "positional") == "positional" else None

    return WidthProblem(slots, costs, options, legal, sinusoid)


def _sinusoid_ok(config: Mapping[str, Any], width: int, count: int) -> bool:
    """Whether the sinusoidal embedding can follow level 0: at least half of it, and an even number of frequencies."""
    if count == width:
        return True
    kind = config.get("time_embedding_type", "positional")
    return kind == "positional" and 2 * count >= width and count % 2 == 0 and (width - count) % 2 == 0


def stock_groups(config: Mapping[str, Any], old: list[int], new: list[int], policy: str) -> int | None:
    """`norm_num_groups` of a stock configuration with these level widths; None where no legal value exists."""
    groups = int(config["norm_num_groups"])
    if policy == "groups":
        shares = {n * groups // o if n * groups % o == 0 else 0 for o, n in zip(old, new)}
        return shares.pop() if len(shares) == 1 and 0 not in shares else None
    if all(n % groups == 0 for n in new):
        return groups
    if policy == "balanced":
        return None
    return next(g for g in range(min(groups, *new), 0, -1) if all(n % g == 0 for n in new))


def free_problem(slots: SlotMap, costs: CostModel, policy: str, align: int, min_width: int) -> WidthProblem:
    """Width choices of the free layout: one per slot, tied slots together."""
    options: dict[str, list[dict[str, int]]] = {}
    tied = {name: tie for tie in slots.ties for name in tie}
    for name, slot in slots.slots.items():
        members = tied.get(name, (name,))
        if members[0] != name:
            continue
        if slot.kind.startswith("time"):
            minimum = max(min_width, slot.width // 8)
        else:
            minimum = max(min_width, slot.width // 8 if slot.unit == 1 else 1)
        counts = set(legal_counts(slots, name, policy, "free", align, minimum))
        for other in members[1:]:
            counts &= set(legal_counts(slots, other, policy, "free", align, minimum)) | {slot.width}
        fine = sorted(counts)
        if len(fine) > 24:  # sixteenths are fine enough
            fine = [c for c in fine if c % max(1, slot.width // 16) == 0]
        options[name] = [dict.fromkeys(members, c) for c in fine]
    return WidthProblem(slots, costs, options, lambda widths: True, lambda widths: None)


# --------------------------------------------------------------------------------------------------------------------
# From widths and scores to a plan


def norm_groups_after(slots: SlotMap, widths: Mapping[str, int], policy: str) -> dict[str, int]:
    """`num_groups` of every norm whose channels change, for the free layout.

    "groups": as many groups as whole ones stay. Otherwise the old number where it divides the new width, else the
    largest smaller divisor.
    """
    result = {}
    for norm, (groups, channels) in slots.norms.items():
        new = sum(widths.get(s.slot, slots.slots[s.slot].width) for s in slots.inputs[norm])
        if policy == "groups" and new * groups % channels == 0:
            result[norm] = new * groups // channels
        else:
            result[norm] = next(g for g in range(min(groups, new), 0, -1) if new % g == 0)
    return result


def choose_channels(
    slots: SlotMap, widths: Mapping[str, int], scores: Mapping[str, Tensor], policy: str, layout: str
) -> dict[str, Tensor]:
    """Kept indices of every slot for given widths and scores (see the norm policies above)."""
    keep = {}
    for name, slot in slots.slots.items():
        count = widths.get(name, slot.width)
        unit = _removal_unit(slots, name, policy, layout)
        block = None
        if policy == "balanced" and slot.norms and count < slot.width:
            block = math.gcd(norm_block(slots, name), slot.width)
            if count * block % slot.width:
                raise ValueError(f"{name}: {count} of {slot.width} channels is not legal for blocks of {block}")
        if unit > 1 and (count % unit or unit >= slot.width):
            unit = slot.unit
        keep[name] = select(scores[name], count, block=block, unit=unit) if count < slot.width else torch.arange(count)
    return keep


def build_plan(
    slots: SlotMap,
    widths: Mapping[str, int],
    scores: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    layout: str,
    norm_policy: str,
    identity_shortcuts: list[str] | None = None,
) -> PruningPlan:
    """Turn widths and scores into a plan.

    Args:
        slots: of the network with `identity_shortcuts` already inserted.
        widths: kept channels per slot.
        scores: slot -> [width] importance.
        config: the dense configuration (private entries are dropped).

    Raises:
        UserError: the widths have no stock configuration.
    """
    dense = json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}))
    keep = choose_channels(slots, widths, scores, norm_policy, layout)
    counts = {n: len(k) for n, k in keep.items()}
    new_config = None
    groups = norm_groups_after(slots, counts, norm_policy)
    if layout == "stock":
        new_config = stock_config(slots, counts, dense, norm_policy)
        for name in slots.norms:
            # The mid block's attention may have a number of its own.
            mid = name.startswith("mid_block.attentions") and new_config.get("attn_norm_num_groups") is not None
            groups[name] = int(new_config["attn_norm_num_groups" if mid else "norm_num_groups"])
    return PruningPlan(
        keep, layout, norm_policy, groups, list(identity_shortcuts or []), dense, new_config,
        architecture_fingerprint(dense),
    )


def stock_config(slots: SlotMap, widths: Mapping[str, int], dense: Mapping[str, Any], policy: str) -> dict[str, Any]:
    """Configuration of the pruned network in the stock layout.

    Raises:
        UserError: a level's slots differ in width, or no stock configuration expresses the widths.
    """
    old = list(dense["block_out_channels"])
    new: list[int] = []
    for level in range(len(old)):
        found = {widths.get(n, s.width) for n, s in slots.slots.items() if level in s.levels}
        if len(found) != 1:
            raise UserError(f"level {level} has several widths {sorted(found)}: only the free layout can express that")
        new.append(found.pop())
    for i, (a, b, x, y) in enumerate(zip(new, new[1:], old, old[1:])):
        if x != y and a == b:
            raise UserError(f"levels {i} and {i + 1} would both have width {a}: stock diffusers then drops a shortcut")
    groups = stock_groups(dense, old, new, policy)
    if groups is None:
        raise UserError(f"no norm_num_groups fits the widths {new} under the norm policy {policy!r}")
    config = dict(dense)
    config["block_out_channels"] = new
    config["norm_num_groups"] = groups
    attention = dense.get("attn_norm_num_groups")
    if attention is not None:
        most = int(attention) * new[-1] // old[-1] if policy == "groups" else int(attention)
        config["attn_norm_num_groups"] = next(g for g in range(max(1, most), 0, -1) if new[-1] % g == 0)
    if dense.get("time_embedding_type", "positional") == "positional":
        config["freq_shift"] = dense["freq_shift"] - (old[0] - new[0]) // 2
    time = {widths.get(n, s.width) for n, s in slots.slots.items() if s.kind.startswith("time")}
    if len(time) != 1:
        raise UserError(f"the time embedding has several widths {sorted(time)}: only the free layout can express that")
    width = time.pop()
    config["time_embedding_dim"] = None if width == 4 * new[0] else width
    single = all(heads == 1 for *_, heads, _ in slots.attentions.values())
    if single:
        config["attention_head_dim"] = None
    return config
