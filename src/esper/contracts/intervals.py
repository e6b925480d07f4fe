"""The t interval of a mean, in plain Python: reports need it where torch is not imported."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_TINY: Final = 1e-300
_BISECTIONS: Final = 200
_FRACTION_TERMS: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: Mean of the values; None where there is no value.
        low: Lower end; None with fewer than two values, which say nothing about their spread.
        high: Upper end; None as ``low`` is.
    """

    mean: float | None
    low: float | None
    high: float | None

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval lies above 0; an interval that is unknown does not."""
        return self.low is not None and self.low > 0.0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval lies below 0; an interval that is unknown does not."""
        return self.high is not None and self.high < 0.0


UNKNOWN: Final = Interval(mean=None, low=None, high=None)
"""The interval of what was not measured."""


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of ``values`` with its two-sided t interval.

    Of paired differences this is the interval of the paired t test: the mean plus or minus
    ``t(1 - (1 - confidence) / 2, n - 1) * s / sqrt(n)``, s the sample standard deviation.

    Args:
        values: Independent values, in any unit.
        confidence: Chance that the interval covers the true mean, in (0, 1).

    Raises:
        ValueError: ``confidence`` is out of range, or a value is not finite.
    """
    if not 0.0 < confidence < 1.0:
        msg = f"confidence is a chance between 0 and 1, exclusive; got {confidence}"
        raise ValueError(msg)
    if not all(math.isfinite(value) for value in values):
        msg = f"an interval needs finite values; got {list(values)}"
        raise ValueError(msg)
    if len(values) < 2:
        return Interval(mean=values[0] if values else None, low=None, high=None)
    mean = statistics.fmean(values)
    quantile = student_t_quantile(0.5 + confidence / 2.0, len(values) - 1)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def student_t_quantile(probability: float, degrees: float) -> float:
    """Return the value that Student's t stays below with the given probability.

    Args:
        probability: In (0, 1).
        degrees: Degrees of freedom, above 0.

    Raises:
        ValueError: An argument is out of range.
    """
    if not 0.0 < probability < 1.0 or not degrees > 0.0:
        msg = (
            "a t quantile needs a probability between 0 and 1 and degrees of freedom above 0; "
            f"got {probability} and {degrees}"
        )
        raise ValueError(msg)
    if probability < 0.5:
        return -student_t_quantile(1.0 - probability, degrees)
    high = 1.0
    while student_t_cdf(high, degrees) < probability:
        high *= 2.0
    low = 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        if middle in (low, high):
            break
        if student_t_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return high


def student_t_cdf(t: float, degrees: float) -> float:
    """Return the probability that Student's t with ``degrees`` of freedom is at most ``t``.

    For t >= 0 it is ``1 - I_x(degrees / 2, 1 / 2) / 2`` with ``x = degrees / (degrees + t^2)``
    and I the regularised incomplete beta function (Abramowitz and Stegun, 26.7.1).
    """
    tail = _regularised_beta(degrees / (degrees + t * t), degrees / 2.0, 0.5) / 2.0
    return 1.0 - tail if t >= 0.0 else tail


def _regularised_beta(x: float, a: float, b: float) -> float:
    """Return I_x(a, b), from the side where its continued fraction converges quickly."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(log_front + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(x, a, b) / a
    return 1.0 - front * _beta_fraction(1.0 - x, b, a) / b


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Return the continued fraction of the incomplete beta function (A&S 26.5.8), after Lentz."""
    numerator = 1.0
    denominator = 1.0 / _away_from_zero(1.0 - (a + b) * x / (a + 1.0))
    total = denominator
    for m in range(1, _FRACTION_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            denominator = 1.0 / _away_from_zero(1.0 + term * denominator)
            numerator = _away_from_zero(1.0 + term / numerator)
            change = numerator * denominator
            total *= change
        if abs(change - 1.0) < 1e-16:
            break
    return total


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
