"""What a run would bring by simply going on, from its own loss curve."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_POINTS: Final = 4
LATEST: Final = 1 / 3
"""Share of the evaluations that is fitted; what came before belongs to another part of a curve."""
POWERS: Final = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Falls towards a floor, as the update to minus so much; 0 is the logarithm, which has none."""
TRUST: Final = 0.25
"""Exponent of the residuals in the weight of a fit; errors of evaluations are not independent."""


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

    Nobody knows how a curve bends on: it may fall as a logarithm for ever, or be near its floor. So
    several shapes are fitted to the last third of the evaluations, at least four, by least squares,
    and weighed by how well they fit; shapes that end below 0, where no loss so far was, are left
    out. The standard error has the scatter about each and how far the shapes disagree. That runs
    change their rate, or grow, is not in it.

    Args:
        points: Update, at least 1, and loss of each evaluation, in order.
        at: Updates done now; later points are left out.
        extra_updates: How many more, at least 0.

    Returns:
        None where fewer than four finite losses are known, or all at one update.
    """
    known = [(u, loss) for u, loss in points if 1 <= u <= at and math.isfinite(loss)]
    used = known[-max(MIN_POINTS, math.ceil(len(known) * LATEST)) :]
    if len(used) < MIN_POINTS or used[0][0] == used[-1][0]:
        return None
    fits = [_fit(power, used, at, extra_updates) for power in POWERS]
    least = 0.0 if min(loss for _, loss in used) >= 0.0 else -math.inf
    likely = [fit for fit in fits if fit.loss_now - fit.gain >= least]
    return _mean(likely or [min(fits, key=lambda fit: fit.gain)], len(used))


class _Fit(NamedTuple):
    """One shape: what it promises, its error, where it is now, and the squares it leaves."""

    gain: float
    stderr: float
    loss_now: float
    left: float


def _fit(power: float, used: Sequence[tuple[int, float]], at: float, extra: float) -> _Fit:
    """Fit ``loss = a + b f(update)``, ``f`` falling by one of the powers."""

    def fall(update: float) -> float:
        return (update / at) ** -power if power else -math.log(update / at)

    slope, stderr, left = _line([fall(u) for u, _ in used], [loss for _, loss in used])
    reach = fall(at) - fall(at + extra)
    mean = math.fsum(loss - slope * fall(u) for u, loss in used) / len(used)
    return _Fit(slope * reach, stderr * reach, mean + slope * fall(at), left)


def _mean(fits: Sequence[_Fit], num_points: int) -> GoingOn:
    """Return the mean of shapes by how well they fit, with an error for their disagreement."""
    best = min(fit.left for fit in fits)
    tiny = 1e-24 * math.fsum(fit.loss_now**2 for fit in fits) or 1.0
    trust = TRUST * (num_points - 2)
    weights = [((best + tiny) / (fit.left + tiny)) ** trust for fit in fits]
    total = math.fsum(weights)
    pairs = [(weight / total, fit) for weight, fit in zip(weights, fits, strict=True)]
    gain = math.fsum(weight * fit.gain for weight, fit in pairs)
    variance = math.fsum(w * (fit.stderr**2 + (fit.gain - gain) ** 2) for w, fit in pairs)
    return GoingOn(gain=gain, stderr=math.sqrt(variance))


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Return slope of the least squares line, its standard error, and the squares it leaves."""
    n = len(xs)
    mean_x, mean_y = math.fsum(xs) / n, math.fsum(ys) / n
    spread = math.fsum((x - mean_x) ** 2 for x in xs)
    slope = math.fsum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    left = math.fsum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return slope, math.sqrt(left / (n - 2) / spread), left
