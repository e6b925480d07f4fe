"""What a run would bring by simply going on, from its own loss curve."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_POINTS: Final = 4


class GoingOn(NamedTuple):
    """What some more updates of the same run would bring.

    Attributes:
        gain: By how much the loss would fall; negative where it would rise.
        stderr: Standard error of that, as far as the scatter about the curve tells.
    """

    gain: float
    stderr: float


def going_on(
    points: Sequence[tuple[int, float]], at: float, extra_updates: float
) -> GoingOn | None:
    """Say what ``extra_updates`` more would bring, from the losses of the evaluations so far.

    The loss is taken to fall by a straight line over the logarithm of the update, fitted to the
    later half of the evaluations, at least four. Curves of losses bend so: a line over the updates
    themselves promises too much. The standard error is that of the slope; that a run's losses are
    not independent, and that the curve may bend on, is not in it: on power laws that fall to a
    floor it promises 4 to 30 % too much.

    Args:
        points: Update, at least 1, and loss of each evaluation, in order.
        at: Updates done now; later points are left out.
        extra_updates: How many more, at least 0.

    Returns:
        None where fewer than four finite losses are known, or all at one update.
    """
    known = [(u, loss) for u, loss in points if 1 <= u <= at and math.isfinite(loss)]
    used = known[-max(MIN_POINTS, math.ceil(len(known) / 2)) :]
    if len(used) < MIN_POINTS or used[0][0] == used[-1][0]:
        return None
    slope, stderr = _line([math.log(u) for u, _ in used], [loss for _, loss in used])
    reach = math.log1p(extra_updates / at)
    return GoingOn(gain=-slope * reach, stderr=stderr * reach)


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Return the slope of the least squares line, and its standard error."""
    n = len(xs)
    mean_x, mean_y = math.fsum(xs) / n, math.fsum(ys) / n
    spread = math.fsum((x - mean_x) ** 2 for x in xs)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    left = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return slope, math.sqrt(left / (n - 2) / spread)
