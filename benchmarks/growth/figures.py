"""Figures of the document, computed from results that are kept."""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from store import Result, Store
from task import Task

from esper.contracts.intervals import Interval, mean_interval

ByArm = dict[str, dict[int, Result]]
"""Results by arm and random seed."""


def by_arm(task: Task, store: Store) -> ByArm:
    """Return the results of a task that are of its settings of today."""
    found: ByArm = {}
    for result in store.of(task.name):
        if store.has(task.name, result.arm, result.random_seed, task.settings):
            found.setdefault(result.arm, {})[result.random_seed] = result
    return found


def values(results: ByArm, arm: str, figure: str) -> list[float]:
    """Return a figure of an arm, where it was measured, in the order of random seeds."""
    found = (r.figures.get(figure) for _, r in sorted(results.get(arm, {}).items()))
    return [value for value in found if value is not None]


def paired(results: ByArm, arm: str, other: str, figure: str) -> list[float]:
    """Return ``arm - other`` at every random seed that both have."""
    ours, theirs = results.get(arm, {}), results.get(other, {})
    pairs = (
        (ours[s].figures[figure], theirs[s].figures[figure]) for s in sorted(ours) if s in theirs
    )
    return [a - b for a, b in pairs if a is not None and b is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What of the compute an arm saved, against training from scratch to the same loss.

    Attributes:
        shares: One per random seed, 1 is all of it.
        num_beyond: How many lie beyond the curve of runs from scratch, where the share is a bound.
    """

    shares: list[float]
    num_beyond: int


def saving(results: ByArm, arm: str, scratch: Sequence[str]) -> Saving:
    """Hold an arm against the curve of finished runs from scratch, per random seed.

    Between two runs the loss is taken to be linear in the logarithm of FLOPs. A loss below that of
    the longest run counts as the longest run's, so that the share is at least what is said; one
    above that of the shortest as the shortest's, so that it is at most that.
    """
    shares, beyond = [], 0
    for seed, result in sorted(results.get(arm, {}).items()):
        curve = [results[a][seed] for a in scratch if seed in results.get(a, {})]
        if len(curve) < 2:
            continue
        points = sorted((r.flops, _loss(r)) for r in curve)
        flops, is_beyond = flops_at_loss(points, _loss(result))
        shares.append(1 - result.flops / flops)
        beyond += is_beyond
    return Saving(shares=shares, num_beyond=beyond)


def flops_at_loss(points: Sequence[tuple[float, float]], loss: float) -> tuple[float, bool]:
    """Return the FLOPs at which a falling curve has a loss, and whether that is beyond its ends."""
    for (f1, l1), (f2, l2) in itertools.pairwise(points):
        if l1 >= loss >= l2 and l1 > l2:
            share = (l1 - loss) / (l1 - l2)
            return math.exp(math.log(f1) + share * (math.log(f2) - math.log(f1))), False
    return (points[-1] if loss < points[-1][1] else points[0])[0], True


def _loss(result: Result) -> float:
    loss = result.figures["loss"]
    assert loss is not None
    return loss


def told(interval: Interval, digits: int = 3, *, sign: bool = True) -> str:
    """Write an interval."""
    if interval.mean is None:
        return "-"
    form = f"{'+' if sign else ''}.{digits}f"
    mean = format(interval.mean, form)
    if interval.low is None or interval.high is None:
        return f"{mean} (one run)"
    return f"{mean} [{interval.low:{form}}, {interval.high:{form}}]"


def interval_of(found: Sequence[float], digits: int = 3, *, sign: bool = True) -> str:
    """Write the 95 % t interval of a mean."""
    return told(mean_interval(found), digits, sign=sign)


def share_interval(count: int, num: int) -> tuple[float, float]:
    """Return the exact 95 % interval of a share (Clopper and Pearson), each in [0, 1]."""
    if num == 0:
        return 0.0, 1.0
    low = 0.0 if count == 0 else _solved(lambda p: _at_least(count, num, p) - 0.025)
    high = 1.0 if count == num else _solved(lambda p: 0.025 - _at_least(num - count, num, 1 - p))
    return low, high


def upper_bound(count: int, num: int) -> float:
    """Return the exact one-sided upper 95 % bound of a share."""
    if count >= num:
        return 1.0
    return _solved(lambda p: 0.05 - _at_least(num - count, num, 1 - p))


def _at_least(count: int, num: int, p: float) -> float:
    """Return the chance of ``count`` or more of ``num``."""
    return math.fsum(math.comb(num, k) * p**k * (1 - p) ** (num - k) for k in range(count, num + 1))


def _solved(rising: Callable[[float], float]) -> float:
    """Return where a rising function of a share is 0."""
    grid = range(1 << 30)
    found = bisect.bisect_left(grid, 0.0, key=lambda i: rising(i / len(grid)))
    return found / len(grid)
