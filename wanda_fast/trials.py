"""Trials: a few allocations of widths are really cut, repaired and sampled, and the best of them is taken. Behind `--trials`.

The sensitivity study (`wanda_fast.sensitivity`) adds up damages to the predicted noise that are estimated one slot at a time. The image
is decided by all of them together along a trajectory, and the two can disagree: of two networks of equal MACs the one with the larger
noise error can keep the images better (benchmarks/results/recipe-h200.md, "Rounds and trials"). So candidates are made from the same estimate,
first with other least shares of a width, then with the damage of one level counted four times or a quarter, and each is judged by its images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .errors import UserError
from .plan import WidthProblem

LEAST_SHARES = (0.25, 0.375, 0.5, 0.625)  # of a width, besides the split's own
FACTOR = 4.0  # what a level's damage is multiplied and divided by
CERTAINTY = 2.0  # standard errors of the mean difference by which a candidate must be better


@dataclass
class Trial:
    """One allocation of widths that was tried.

    Attributes:
        ssim: of each image with the dense network's from the same noise; the report holds their mean.
        macs: of the candidate.
        widths: level -> [least, most] channels kept.
        emphasis: level -> factor of its estimated damage; empty for 1.
        taken: whether it is the one that was taken.
    """

    ssim: list[float]
    macs: int
    widths: dict[str, list[int]]
    emphasis: dict[str, float]
    taken: bool = False

    @property
    def mean(self) -> float:
        return sum(self.ssim) / len(self.ssim)

    def better_than(self, other: Trial) -> bool:
        """Whether the mean is higher by twice the standard error of the difference, image by image: of few images some other
        noise turns smaller differences around."""
        gains = [a - b for a, b in zip(self.ssim, other.ssim, strict=True)]
        return len(gains) > 1 and statistics.mean(gains) > CERTAINTY * statistics.stdev(gains) / math.sqrt(len(gains))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "ssim": self.mean}

    def describe(self) -> str:
        """One line for a person."""
        shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in self.widths.values())
        return f"SSIM {self.mean:.4f} with {shown} channels per level, {self.macs / 1e9:.3f} GMACs"


def emphasised(problem: WidthProblem, damage: Mapping[str, list[float]], emphasis: Mapping[int, float]) -> dict[str, list[float]]:
    """The damage with that of some levels multiplied; a slot of several levels takes the geometric mean of their factors."""
    found = {}
    for unit, row in damage.items():
        levels = problem.slots.slots[next(iter(problem.options[unit][0]))].levels
        factor = math.prod(emphasis.get(n, 1.0) for n in levels) ** (1 / max(1, len(levels)))
        found[unit] = [factor * d for d in row]
    return found


def search(
    widths_for: Callable[[float | None, Mapping[int, float]], dict[str, int]],
    measure: Callable[[dict[str, int]], Trial],
    levels: Sequence[int],
    limit: int,
) -> tuple[dict[str, int], list[Trial]]:
    """Try at most `limit` different allocations and keep the best; one that comes later must be better beyond doubt
    (`Trial.better_than`).

    Args:
        widths_for: (least share of a width or None for the split's own, level -> factor) -> kept channels per slot.
        measure: cuts, repairs and judges.
        levels: resolution levels.

    Returns:
        (widths of the best, all trials in order). Which comes first: the allocation that is taken without trials.

    Raises:
        UserError: not even the first allocation meets the target.
    """
    best = widths_for(None, {})
    trials = [measure(best)]
    leader, share, factors = trials[0], None, {}  # type: Trial, float | None, dict[int, float]
    seen = {tuple(sorted(best.items()))}

    def attempt(asked: float | None, emphasis: dict[int, float]) -> None:
        nonlocal best, leader, share, factors
        if len(trials) >= limit:
            return
        try:
            widths = widths_for(asked, emphasis)
        except UserError:  # no legal widths under the target: one candidate less
            return
        key = tuple(sorted(widths.items()))
        if key in seen:
            return
        seen.add(key)
        trials.append(measure(widths))
        trials[-1].emphasis = {f"level {n}": f for n, f in emphasis.items()}
        if trials[-1].better_than(leader):
            best, leader, share, factors = widths, trials[-1], asked, emphasis

    for asked in LEAST_SHARES:
        attempt(asked, {})
    for level in levels:
        for factor in (FACTOR, 1 / FACTOR):
            attempt(share, {**factors, level: factors.get(level, 1.0) * factor})
    leader.taken = True
    return best, trials
