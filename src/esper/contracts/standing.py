"""What field reports say of a kernel together: its pooled effect, and how sure that is.

Runs differ, so that reports scatter more than their standard errors say. With ``y_i`` the mean
contribution of the reports of run ``i`` of ``k``, and ``s_i^2`` the mean of their squared standard
errors (grafts of one run share its luck), a random-effects model has ``y_i ~ N(m, s_i^2 + t^2)``.

    t^2   = (f T^2 + max(0, sum((y_i - y)^2) - (k - 1) mean(s_i^2))) / (f + k - 1)
    w_i   = 1 / (s_i^2 + t^2),   w_0 = 1 / T^2
    m     = sum(w_i y_i) / (w_0 + sum(w_i))
    se    = 1 / sqrt(w_0 + sum(w_i))
    lower = m - t_quantile(0.95, f + k - 1) se

``t^2`` is the variance component of Hedges (1983), in which a prior of ``f`` degrees of freedom
says ``T^2``; ``w_0`` shrinks towards 0, what most kernels bring. So one report, however lucky,
neither has the scatter that it does not show nor the quantile of a normal. (Hedges, "A random
effects model for effect sizes", Psychological Bulletin 93, 1983; DerSimonian and Laird, "Meta-
analysis in clinical trials", 1986; the t quantile as of Hartung and Knapp, 2001.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Final

from esper.contracts.intervals import student_t_quantile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from esper.contracts.kernel_reports import FieldReport

UNIT: Final = "relative"
"""The unit of reports that are pooled: a part of the loss before. Others are of one run each."""
TYPICAL_EFFECT: Final = 0.05
"""``T``: how far contributions of kernels, and of a kernel between runs, lie apart beforehand."""
PRIOR_RUNS: Final = 2
"""``f``: how many degrees of freedom that is worth."""
CONFIDENCE: Final = 0.95
"""How sure it is that the effect is above ``lower``, one-sided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a blueprint's kernels have done in the field. Above 0 is better.

    Attributes:
        effect: Pooled contribution, as a part of the loss before, shrunk towards 0.
        standard_error: Of the effect, above 0.
        lower: What the effect is above, at 95 %, one-sided.
        num_runs: Runs whose reports were pooled, at least 1.
    """

    effect: float
    standard_error: float
    lower: float
    num_runs: int


def pooled(reports: Iterable[FieldReport]) -> Standing | None:
    """Return what reports of one blueprint say together; None where none is in the pooled unit."""
    by_run: dict[str, list[FieldReport]] = {}
    for report in reports:
        if report.unit == UNIT:
            by_run.setdefault(report.run_id, []).append(report)
    if not by_run:
        return None
    effects = [fmean(r.contribution for r in of_run) for of_run in by_run.values()]
    variances = [fmean(r.standard_error**2 for r in of_run) for of_run in by_run.values()]
    between = _variance_between(effects, variances)
    weights = [1.0 / (variance + between) for variance in variances]
    total = 1.0 / TYPICAL_EFFECT**2 + sum(weights)
    effect = sum(w * y for w, y in zip(weights, effects, strict=True)) / total
    standard_error = 1.0 / math.sqrt(total)
    quantile = student_t_quantile(CONFIDENCE, PRIOR_RUNS + len(effects) - 1)
    return Standing(
        effect=effect,
        standard_error=standard_error,
        lower=effect - quantile * standard_error,
        num_runs=len(effects),
    )


def _variance_between(effects: list[float], variances: list[float]) -> float:
    """Return ``t^2``: by how much runs differ beyond their own standard errors."""
    degrees, mean = len(effects) - 1, fmean(effects)
    beyond = sum((y - mean) ** 2 for y in effects) - degrees * fmean(variances)
    prior = PRIOR_RUNS * TYPICAL_EFFECT**2
    return (prior + max(0.0, beyond)) / (PRIOR_RUNS + degrees)
