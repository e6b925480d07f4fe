"""The verdict on a trial: the candidate against the live run, and what of its gain is capacity."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from esper.growth.gates import Spread, is_worse, judge, spread_of_equals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.contracts.choices import Taken
    from esper.growth.extrapolation import GoingOn
    from esper.growth.gates import GateVerdict
    from esper.growth.measurement import Measurement
    from esper.growth.settings import GrowthSettings


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrialReadings:
    """The verdict's part of the gate split, read for every arm of a trial.

    Attributes:
        live: The live run, on averaged weights.
        candidate: The candidate twin, likewise.
        null: The twin with the package made linear, likewise; None without attribution.
        equals: Equal twins, likewise; empty where the spread is a setting.
    """

    live: Measurement
    candidate: Measurement
    null: Measurement | None = None
    equals: Sequence[Measurement] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialVerdict:
    """What a trial said.

    Attributes:
        taken: Which twin is to be taken over; empty where the package was refused.
        live: The candidate against the live run.
        null: The null against the live run: the gain that the treatment alone brings.
        capacity: The candidate against the null; the gain is capacity's where it passed.
        spread: How far equal runs come out apart.
        reason: One sentence for the log.
    """

    taken: Taken
    live: GateVerdict
    null: GateVerdict | None
    capacity: GateVerdict | None
    spread: Spread
    reason: str

    @property
    def effect(self) -> float:
        """Fall of the gate loss that what is taken over brought; 0 where nothing is."""
        found = self.null if self.taken == "null" else self.live
        return 0.0 if found is None or found.effect is None or not self.taken else found.effect

    def refused(self, reason: str) -> TrialVerdict:
        """Return the verdict with nothing taken over, for a reason that came later."""
        return replace(self, taken="", reason=reason)


def read_trial(
    readings: TrialReadings,
    *,
    level: float,
    settings: GrowthSettings,
    going_on: GoingOn | None = None,
) -> TrialVerdict:
    """Read the verdict of a trial, once.

    Args:
        readings: Every arm on the same samples.
        level: One-sided level of the test, in (0, 0.5).
        settings: Say the spread, the minimum effect, and what has to be beaten.
        going_on: What the same work would have brought by going on; None where nobody can say.
    """
    spread = _spread(readings, settings)
    known = math.isfinite(readings.live.loss)
    min_effect = settings.min_effect * abs(readings.live.loss) if known else 0.0

    def against(reference: Measurement, arm: Measurement) -> GateVerdict:
        return judge(reference, arm, level=level, spread=spread, min_effect=min_effect)

    live, null = against(readings.live, readings.candidate), readings.null
    treatment = None if null is None else against(readings.live, null)
    capacity = None if null is None else against(null, readings.candidate)
    made = TrialVerdict(
        taken="candidate" if live.passed else "",
        live=live,
        null=treatment,
        capacity=capacity,
        spread=spread,
        reason=live.reason,
    )
    if not live.passed:
        return made
    if settings.pays == "flops":
        against_going_on = _does_not_pay(live, going_on)
        if against_going_on is not None:
            return made.refused(against_going_on)
    if null is None or treatment is None or not treatment.passed:
        return made
    # what a treatment brings early is mostly gone by the end of a run, what capacity brings grows:
    # the null has to be better beyond luck, and not only by its mean
    if judge(readings.candidate, null, level=level, spread=spread).passed:
        words = f"made linear the package did better still: {treatment.reason}"
        return replace(made, taken="null", reason=words)
    return made


def last_is_worse(live: Measurement, taken: Measurement) -> str | None:
    """Say why the last iterate of what would be taken over is refused, or None.

    Args:
        live: The live run as it is.
        taken: The twin as it is.
    """
    found = is_worse(live, taken)
    return None if found is None else f"its averaged weights passed, its last did not: {found}"


def _spread(readings: TrialReadings, settings: GrowthSettings) -> Spread:
    if not readings.equals:
        return Spread(factor=settings.spread)
    losses = [m.per_sample for m in (readings.live, *readings.equals)]
    known = [own for own in losses if own is not None]
    return spread_of_equals(known) if len(known) == len(losses) else Spread(factor=math.inf)


def _does_not_pay(live: GateVerdict, going_on: GoingOn | None) -> str | None:
    """Say why a gain does not beat going on for the same work, or None."""
    if going_on is None:
        return 'pays="flops": the run is too short to say what going on would have brought'
    assert live.effect is not None
    assert live.stderr is not None
    net = live.effect - going_on.gain
    stderr = math.hypot(live.stderr, going_on.stderr)
    if stderr > 0.0 and net / stderr > live.threshold:
        return None
    return (
        f"it does not pay: the loss falls by {live.effect:.3g}, and the same work in going on "
        f"would have brought {going_on.gain:.3g} (standard error of the difference {stderr:.3g})"
    )
