"""Gates: what a package has to show on held-out samples, and how luck is counted.

A gate compares two models on the same held-out samples, one loss per sample, and is read once.
With the paired differences ``d_i = reference_i - candidate_i`` (positive: the candidate is
better) and ``s`` their standard deviation,

    z = mean(d) / (spread s / sqrt(n)),

and the gate passes where ``z`` exceeds the quantile of ``1 - level`` and ``mean(d)`` the minimum
effect. A paired test says whether two models differ, and two runs differ that are equal but for
luck: ``spread`` is the standard deviation that ``z`` has between such runs without it. The quantile
is the normal distribution's where the spread is a setting (200 samples at least stand for
Student's: the two differ by less than 0.03 at every level above 0.001), and Student's where the
spread was measured on a few equal twins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from esper.contracts.intervals import student_t_quantile
from esper.growth.measurement import Losses, Measurement

FAMILY_LEVEL: Final = 0.05
"""Chance, at most, that a run ever keeps a package that is useless."""
MIN_SAMPLES: Final = 200
"""Fewest samples of the gate split that a verdict is read on."""
MIN_WATCH_SAMPLES: Final = 100
"""Fewest samples of the gate split that the watch looks at."""
MIN_GATE_SAMPLES: Final = 300
"""Fewest samples of the gate split: one in three is for the watch."""
NO_SAMPLES: Final = "evaluate gives no per-sample losses, so luck cannot be told from gain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How far equal runs come out apart, in standard errors of the paired difference.

    Attributes:
        factor: By what the standard error is widened, at least 1.
        degrees: Degrees of freedom that it was measured with; None where it is a setting.
    """

    factor: float = 1.0
    degrees: int | None = None

    def threshold(self, level: float) -> float:
        """Return what z has to exceed at a one-sided level in (0, 0.5)."""
        if self.degrees is None:
            return NormalDist().inv_cdf(1.0 - level)
        return student_t_quantile(1.0 - level, self.degrees)


EXACT: Final = Spread()
"""Of two models that are compared for themselves, and not as outcomes of runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    """What a gate said, with everything that it was said on.

    Attributes:
        passed: Whether the candidate is better, beyond luck.
        effect: Mean fall of the loss, reference minus candidate; None where it was not measured.
        stderr: Standard error of the effect, the spread in it; None where it was not measured.
        spread: By what the standard error was widened, at least 1.
        z: ``effect / stderr``; None where one is missing or the error is 0.
        threshold: What ``z`` had to exceed.
        level: One-sided level of the test, in (0, 0.5).
        samples: Number of paired samples.
        reason: One sentence for the log.
    """

    passed: bool
    effect: float | None
    stderr: float | None
    spread: float
    z: float | None
    threshold: float
    level: float
    samples: int
    reason: str


def level_of(tries: int) -> float:
    """Return the level that each package of a model is tested at, ``0.05 / tries``.

    The first refusal ends growth where ``tries`` is 1, and the k-th where it is k. A useless
    package is then kept with a chance of at most 5 %, however many good ones came before it
    (the fixed-sequence rule), and Bonferroni's rule takes care of the tries.

    Args:
        tries: How many packages may be refused, at least 1.
    """
    return FAMILY_LEVEL / tries


def spread_of_equals(equals: Sequence[ArrayLike]) -> Spread:
    """Measure how far apart equal runs come out.

    With the mean losses ``m_i`` of ``k + 1`` equal runs, ``v`` their sample variance, and ``e`` the
    mean over all pairs of the squared standard error of their paired difference, the spread is
    ``sqrt(2 v / e)``, at least 1, with ``k`` degrees of freedom.

    Args:
        equals: One loss per sample of each run, shape (samples,), of the same samples; at least 2.
    """
    losses = [np.asarray(own, dtype=np.float64) for own in equals]
    with np.errstate(invalid="ignore"):  # inf - inf is a NaN, and known as one
        variance = float(np.var([own.mean() for own in losses], ddof=1))
        pairs = itertools.combinations(losses, 2)
        error = float(np.mean([np.var(a - b, ddof=1) / len(a) for a, b in pairs]))
    known = math.isfinite(variance) and math.isfinite(error) and error > 0.0
    factor = max(1.0, math.sqrt(2.0 * variance / error)) if known else math.inf
    return Spread(factor=factor, degrees=len(losses) - 1)


def read_gate(
    reference_losses: ArrayLike,
    candidate_losses: ArrayLike,
    *,
    level: float,
    spread: Spread = EXACT,
    min_effect: float = 0.0,
    min_samples: int = MIN_SAMPLES,
) -> GateVerdict:
    """Say whether the candidate is better than the reference, beyond luck.

    What is not measured does not pass: too few samples, losses that are not finite, or
    differences without any spread (a graft that changes nothing has them all 0).

    Args:
        reference_losses: One loss per held-out sample, shape (samples,), lower is better.
        candidate_losses: The same samples in the same order.
        level: One-sided level of the test, in (0, 0.5).
        spread: How far equal runs come out apart. One that is not finite was not measured, and
            nothing passes.
        min_effect: Smallest mean fall of the loss that counts, in units of the loss; at least 0.
        min_samples: Fewest samples that the test is read on; at least 2.

    Raises:
        ValueError: A number is outside its range, or the two are not one loss per sample of the
            same samples.
    """
    _check_numbers(level=level, min_effect=min_effect, min_samples=min_samples)
    differences = _paired_differences(reference_losses, candidate_losses)
    refusal = _refuse_to_read(differences, min_samples)
    if refusal is None and not math.isfinite(spread.factor):
        refusal = "the spread between equal runs could not be measured"
    threshold = spread.threshold(level)
    if refusal:
        return _unmeasured(refusal, level=level, spread=spread, samples=len(differences))
    effect, variance = float(differences.mean()), float(differences.var(ddof=1))
    stderr = spread.factor * math.sqrt(variance / len(differences))
    z = effect / stderr if stderr > 0.0 else None
    passed, reason = _judge(effect, z, variance, threshold=threshold, min_effect=min_effect)
    return GateVerdict(
        passed=passed,
        effect=effect,
        stderr=stderr,
        spread=spread.factor,
        z=z,
        threshold=threshold,
        level=level,
        samples=len(differences),
        reason=reason,
    )


def not_worse(
    reference_losses: ArrayLike,
    candidate_losses: ArrayLike,
    *,
    level: float,
    min_samples: int = MIN_WATCH_SAMPLES,
) -> GateVerdict:
    """Say whether the candidate's mean loss is at most the reference's on the same samples.

    The means are compared as they are. A test in their place would reward a small gate split:
    the fewer the samples, the less could be seen to be worse.

    Args:
        reference_losses: One loss per held-out sample, shape (samples,), lower is better.
        candidate_losses: The same samples in the same order.
        level: Level of the graft's gates, recorded beside the verdict; in (0, 0.5).
        min_samples: Fewest samples that are read; at least 2.

    Raises:
        ValueError: As :func:`read_gate`.
    """
    _check_numbers(level=level, min_effect=0.0, min_samples=min_samples)
    differences = _paired_differences(reference_losses, candidate_losses)
    refusal = _refuse_to_read(differences, min_samples)
    if refusal:
        return _unmeasured(refusal, level=level, samples=len(differences))
    effect = float(differences.mean())
    stderr = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    passed = effect >= 0.0
    return GateVerdict(
        passed=passed,
        effect=effect,
        stderr=stderr,
        spread=1.0,
        z=effect / stderr if stderr > 0.0 else None,
        threshold=0.0,
        level=level,
        samples=len(differences),
        reason=f"the loss {'fell' if effect > 0 else 'did not rise' if passed else 'rose'}"
        f" by {abs(effect):.3g} against the snapshot",
    )


def judge(
    reference: Measurement,
    candidate: Measurement,
    *,
    level: float,
    spread: Spread = EXACT,
    min_effect: float = 0.0,
) -> GateVerdict:
    """Read a gate on two measurements; without per-sample losses it does not pass.

    Args:
        reference: The gate split without the graft.
        candidate: The gate split with it.
        level: One-sided level, in (0, 0.5).
        spread: How far equal runs come out apart.
        min_effect: Smallest fall of the loss that counts, in units of the loss.
    """
    if reference.per_sample is None or candidate.per_sample is None:
        return _unmeasured(NO_SAMPLES, level=level)
    return read_gate(
        reference.per_sample,
        candidate.per_sample,
        level=level,
        spread=spread,
        min_effect=min_effect,
    )


def judge_not_worse(reference: Measurement, candidate: Measurement, *, level: float) -> GateVerdict:
    """Say whether one measurement is not worse than another; unmeasured is worse.

    Args:
        reference: The gate split before.
        candidate: The gate split after.
        level: Level of the graft's gates, recorded beside the verdict; in (0, 0.5).
    """
    if reference.per_sample is None or candidate.per_sample is None:
        return _unmeasured(NO_SAMPLES, level=level)
    return not_worse(reference.per_sample, candidate.per_sample, level=level)


def _check_numbers(*, level: float, min_effect: float, min_samples: int) -> None:
    if not 0.0 < level < 0.5:
        msg = f"level is a one-sided test level in (0, 0.5), got {level}"
        raise ValueError(msg)
    if not (min_effect >= 0.0 and math.isfinite(min_effect)):
        msg = f"min_effect is a fall of the loss, finite and at least 0, got {min_effect}"
        raise ValueError(msg)
    if min_samples < 2:
        msg = f"min_samples is at least 2 (one has no spread), got {min_samples}"
        raise ValueError(msg)


def _paired_differences(reference: ArrayLike, candidate: ArrayLike) -> Losses:
    reference_N = np.asarray(reference, dtype=np.float64)
    candidate_N = np.asarray(candidate, dtype=np.float64)
    if reference_N.ndim != 1 or reference_N.shape != candidate_N.shape:
        msg = (
            "a gate compares one loss per sample of the same samples; got shapes "
            f"{reference_N.shape} and {candidate_N.shape}"
        )
        raise ValueError(msg)
    with np.errstate(invalid="ignore"):  # inf - inf is a NaN, and refused as one
        return reference_N - candidate_N


def _refuse_to_read(differences: Losses, min_samples: int) -> str | None:
    if len(differences) < min_samples:
        return f"too little power: {len(differences)} samples, at least {min_samples} needed"
    num_bad = int(np.count_nonzero(~np.isfinite(differences)))
    if num_bad:
        return f"{num_bad} of {len(differences)} samples have a loss that is not finite"
    return None


def _unmeasured(
    reason: str, *, level: float, spread: Spread | None = None, samples: int = 0
) -> GateVerdict:
    known = EXACT if spread is None or not math.isfinite(spread.factor) else spread
    return GateVerdict(
        passed=False,
        effect=None,
        stderr=None,
        spread=known.factor,
        z=None,
        threshold=known.threshold(level),
        level=level,
        samples=samples,
        reason=reason,
    )


def _judge(
    effect: float, z: float | None, variance: float, *, threshold: float, min_effect: float
) -> tuple[bool, str]:
    """Compare a measured effect with the test and with the minimum."""
    if effect == 0.0 and variance == 0.0:
        return False, "it changes no loss at all"
    if z is None or variance == 0.0:
        return False, f"the loss of every sample moves by the same {effect:.3g}: no spread to judge"
    if z <= threshold:
        return False, f"not beyond luck: z = {z:.2f}, above {threshold:.2f} needed"
    if effect < min_effect:
        return False, f"too small: the loss falls by {effect:.3g}, at least {min_effect:.3g} needed"
    return True, f"the loss falls by {effect:.3g}, z = {z:.2f} above {threshold:.2f}"


def is_worse(reference: Measurement, now: Measurement, *, errors: float = 3.0) -> str | None:
    """Say by how much a measurement is worse than another, beyond its errors; None where it is not.

    Args:
        reference: The gate split before.
        now: The gate split now, of the same samples.
        errors: How many standard errors of the paired difference a rise has to exceed.
    """
    if not math.isfinite(now.loss):
        return f"the gate loss became {now.loss}"
    if reference.per_sample is None or now.per_sample is None:
        return NO_SAMPLES
    rises = now.per_sample - reference.per_sample
    if not np.isfinite(rises).all():
        return "a held-out loss is not finite"
    rise, stderr = float(rises.mean()), float(rises.std(ddof=1)) / math.sqrt(len(rises))
    if rise <= errors * stderr:
        return None
    return (
        f"the gate loss is {rise:.3g} above that before the switch, more than {errors:g} standard "
        f"errors of {stderr:.3g}"
    )


def upper_rise(reference: Measurement, now: Measurement) -> float:
    """Return the upper 95 % bound of a rise of the loss; infinite where it was not measured."""
    if reference.per_sample is None or now.per_sample is None:
        return math.inf
    with np.errstate(invalid="ignore"):  # inf - inf is a NaN, and refused as one
        rises = now.per_sample - reference.per_sample
        stderr = float(rises.std(ddof=1)) / math.sqrt(len(rises))
    bound = float(rises.mean()) + NormalDist().inv_cdf(0.95) * stderr
    return bound if math.isfinite(bound) else math.inf
