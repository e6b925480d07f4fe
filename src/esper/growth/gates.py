"""Gates: what a graft has to show on held-out samples, and how luck is counted.

A gate compares two models on the same held-out samples, one loss per sample, and is read once.
With the paired differences ``d_i = reference_i - candidate_i`` (positive: the candidate is
better), ``s`` their standard deviation and ``tau`` the spread between models that ought to be
equal (0 where the host is the same object),

    z = mean(d) / sqrt(s^2 / n + tau^2),

and the gate passes where ``z`` exceeds the normal quantile of ``1 - level`` and ``mean(d)`` the
minimum effect. The normal distribution stands for Student's: with the 200 samples that are asked
for at least, the two quantiles differ by less than 0.03 at every level above 0.001.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

from esper.growth.measurement import Losses, Measurement

FAMILY_LEVEL: Final = 0.05
MIN_SAMPLES: Final = 200
NO_SAMPLES: Final = "evaluate gives no per-sample losses, so luck cannot be told from gain"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateVerdict:
    """What a gate said, with everything that it was said on.

    Attributes:
        passed: Whether the graft may go on.
        effect: Mean fall of the loss, reference minus candidate; None where it was not measured.
        stderr: Standard error of the effect, with tau in it; None where it was not measured.
        tau: Spread between models that ought to be equal, in units of the loss, at least 0; None
            where it was not measured.
        z: ``effect / stderr``; None where one is missing or the error is 0.
        level: One-sided level of the test, in (0, 0.5).
        samples: Number of paired samples.
        reason: One sentence for the log.
    """

    passed: bool
    effect: float | None
    stderr: float | None
    tau: float | None
    z: float | None
    level: float
    samples: int
    reason: str


def test_level(k: int) -> float:
    """Return the level of the k-th reading of one kind of gate, ``0.05 / (k (k + 1))``.

    The levels of all readings, however many, sum to 0.05: the chance that a run ever admits a
    useless graft is at most 5 %, and so is the chance that it ever keeps one. The admission gate
    counts auditions, whose contenders share a level between them; the fossilization gate counts
    admissions.

    Args:
        k: Number of the audition, or of the admission, in its Grower, from 1.

    Raises:
        ValueError: ``k`` is less than 1.
    """
    if k < 1:
        msg = f"auditions and admissions are counted from 1, got {k}"
        raise ValueError(msg)
    return FAMILY_LEVEL / (k * (k + 1))


test_level.__test__ = False  # type: ignore[attr-defined] # the name is the statistician's, not pytest's


def read_gate(
    reference_losses: ArrayLike,
    candidate_losses: ArrayLike,
    *,
    level: float,
    tau: float = 0.0,
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
        tau: Spread between models that ought to be equal, in units of the loss; at least 0. One
            that is not finite was not measured, and nothing passes.
        min_effect: Smallest mean fall of the loss that counts, in units of the loss; at least 0.
        min_samples: Fewest samples that the test is read on; at least 2.

    Raises:
        ValueError: A number is outside its range, or the two are not one loss per sample of the
            same samples.
    """
    _check_numbers(level=level, tau=tau, min_effect=min_effect, min_samples=min_samples)
    differences = _paired_differences(reference_losses, candidate_losses)
    refusal = _refuse_to_read(differences, min_samples)
    if refusal is None and not math.isfinite(tau):
        refusal = "the spread between equal models (tau) was not measured"
    if refusal:
        return _unmeasured(refusal, level=level, tau=tau, samples=len(differences))
    effect, variance = float(differences.mean()), float(differences.var(ddof=1))
    stderr = math.sqrt(variance / len(differences) + tau**2)
    z = effect / stderr if stderr > 0.0 else None
    passed, reason = _judge(effect, z, variance, level=level, min_effect=min_effect)
    return GateVerdict(
        passed=passed,
        effect=effect,
        stderr=stderr,
        tau=tau,
        z=z,
        level=level,
        samples=len(differences),
        reason=reason,
    )


def not_worse(
    reference_losses: ArrayLike,
    candidate_losses: ArrayLike,
    *,
    level: float,
    min_samples: int = MIN_SAMPLES,
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
    _check_numbers(level=level, tau=0.0, min_effect=0.0, min_samples=min_samples)
    differences = _paired_differences(reference_losses, candidate_losses)
    refusal = _refuse_to_read(differences, min_samples)
    if refusal:
        return _unmeasured(refusal, level=level, tau=0.0, samples=len(differences))
    effect = float(differences.mean())
    stderr = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    passed = effect >= 0.0
    return GateVerdict(
        passed=passed,
        effect=effect,
        stderr=stderr,
        tau=0.0,
        z=effect / stderr if stderr > 0.0 else None,
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
    tau: float = 0.0,
    min_effect: float = 0.0,
) -> GateVerdict:
    """Read a gate on two measurements; without per-sample losses it does not pass.

    Args:
        reference: The gate split without the graft.
        candidate: The gate split with it.
        level: One-sided level, in (0, 0.5).
        tau: Spread between models that ought to be equal, in units of the loss.
        min_effect: Smallest fall of the loss that counts, in units of the loss.
    """
    if reference.per_sample is None or candidate.per_sample is None:
        return _unmeasured(NO_SAMPLES, level=level)
    return read_gate(
        reference.per_sample, candidate.per_sample, level=level, tau=tau, min_effect=min_effect
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


def _check_numbers(*, level: float, tau: float, min_effect: float, min_samples: int) -> None:
    if not 0.0 < level < 0.5:
        msg = f"level is a one-sided test level in (0, 0.5), got {level}"
        raise ValueError(msg)
    if tau < 0.0:
        msg = f"tau is a spread, at least 0, got {tau}"
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
    reason: str, *, level: float, tau: float = math.inf, samples: int = 0
) -> GateVerdict:
    return GateVerdict(
        passed=False,
        effect=None,
        stderr=None,
        tau=tau if math.isfinite(tau) else None,
        z=None,
        level=level,
        samples=samples,
        reason=reason,
    )


def _judge(
    effect: float, z: float | None, variance: float, *, level: float, min_effect: float
) -> tuple[bool, str]:
    """Compare a measured effect with the test and with the minimum."""
    if effect == 0.0 and variance == 0.0:
        return False, "it changes no loss at all"
    if z is None or variance == 0.0:
        return False, f"the loss of every sample moves by the same {effect:.3g}: no spread to judge"
    threshold = NormalDist().inv_cdf(1.0 - level)
    if z <= threshold:
        return False, f"not beyond luck: z = {z:.2f}, above {threshold:.2f} needed"
    if effect < min_effect:
        return False, f"too small: the loss falls by {effect:.3g}, at least {min_effect:.3g} needed"
    return True, f"the loss falls by {effect:.3g}, z = {z:.2f} above {threshold:.2f}"
