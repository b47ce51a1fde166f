"""A calibration in shards: over several processes, and over several lives of one run."""

from __future__ import annotations

from collections.abc import Callable

from .distributed import Ranks, merge_stats
from .resume import Unfinished
from .stats import ActivationStats


def calibrate_in_shards(
    calibrate: Callable[[tuple[int, int]], ActivationStats],
    n: int,
    unit: int,
    together: Ranks,
    unfinished: Unfinished | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> ActivationStats:
    """Statistics of n samples, the same on every rank.

    Args:
        calibrate: makes the statistics of samples first … last - 1.
        n: samples of the whole run.
        unit: samples of a batch; every cut is at a multiple, so that each batch is the one of an uncut run.
        together: the processes that share the work.
        unfinished: where shards are kept, and found again; None keeps none.
        log: told what was found.

    Raises:
        UserError: a shard that was found is damaged; the text names it.
    """
    first, last = together.part(n, unit)
    cuts = [(first, last)] if unfinished is None else Unfinished.shards(first, last, unit)
    parts: list[ActivationStats] = []
    found = 0
    for a, b in cuts if first < last else []:
        if unfinished is None:
            parts.append(calibrate((a, b)))
            continue
        kept = unfinished.load_shard(a, b)
        if kept is not None:
            parts.append(kept)
            found += b - a
        else:
            parts.append(calibrate((a, b)))
            unfinished.save_shard(a, b, parts[-1])
    if found:
        log(f"calibration: {found} of {last - first} images were done already")
    mine = parts[0].merge(*parts[1:]) if parts else None
    if together.size > 1:
        return merge_stats(mine, n, unit, together)
    assert mine is not None  # n is at least 1
    return mine
