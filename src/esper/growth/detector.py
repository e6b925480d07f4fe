"""When to grow: diminishing returns of a run, and the signs that more capacity is not the cure.

All rules compare losses with losses of the same run, so none depends on their scale. Losses are
smoothed by the median of three successive evaluations, which a single bad one cannot move.
"""

from __future__ import annotations

import itertools
import math
from statistics import median
from typing import Final

from esper.contracts.arguments import Bounds, checked_number
from esper.growth.reading import Decision, PolicyState, Reading

_STATE_VERSION: Final = 1


class Detector:
    """Decides from the losses of a run whether it is time to grow.

    The first rule that applies decides:

    1. *too late*: in the last 20 % of a run of known length.
    2. *too early*: in the first 10 % of the run or 500 updates, whichever is less. Where the
       length is known, the first package is due there (*scheduled*), whatever the losses: early
       was better in every trial, and a moment that is fixed beforehand costs no luck.
    3. *overfitting*: the smoothed gate loss is above its lowest value, reached at least three
       evaluations ago, by more than 2 % of all that it had fallen and by more than three times
       the typical (median) change between two of the last evaluations; and the training loss
       has fallen since (or is unknown).
    4. *diminishing*: over the last ``window`` evaluations the smoothed training loss fell by less
       than ``fraction`` of what it has fallen since the start. A plateau is its extreme. The
       training loss decides, so that no sample of the gate split has a say in the moment.
    5. *deadline*: ``deadline`` of the horizon has passed since the start or the last change.

    Args:
        window: Evaluations looked back on; at least 2.
        fraction: Share of the fall since the start, in (0, 1).
        deadline: Share of the horizon, in (0, 1].
        rise_fraction: Share of the fall since the start that a real rise exceeds, in (0, 1).

    Raises:
        TypeError: A setting is no number.
        ValueError: A setting is outside its range.
    """

    EARLY_FRACTION: Final = 0.10
    EARLY_UPDATES: Final = 500
    LATE_FRACTION: Final = 0.80
    NOISE_FACTOR: Final = 3.0
    MIN_SINCE_BEST: Final = 3

    def __init__(
        self,
        window: int = 5,
        fraction: float = 0.15,
        *,
        deadline: float = 0.40,
        rise_fraction: float = 0.02,
    ) -> None:
        evaluations = Bounds(what="a number of evaluations", least=2)
        self.window = int(checked_number("window", window, evaluations, kind=int))
        share = Bounds(what="a share", above=0, below=1)
        of_horizon = Bounds(what="a share of the horizon", above=0, most=1)
        self.fraction = checked_number("fraction", fraction, share)
        self.deadline = checked_number("deadline", deadline, of_horizon)
        self.rise_fraction = checked_number("rise_fraction", rise_fraction, share)
        self._updates: list[int] = []
        self._gate: list[float] = []
        self._train: list[float | None] = []

    def observe(self, reading: Reading) -> bool:
        """Take one evaluation.

        Returns:
            False where the gate loss is not finite: such an evaluation tells nothing about
            returns and is left out.
        """
        if reading.gate_loss is None or not math.isfinite(reading.gate_loss):
            return False
        train_loss = reading.train_loss
        known = train_loss is not None and math.isfinite(train_loss)
        self._updates.append(reading.update)
        self._gate.append(float(reading.gate_loss))
        self._train.append(train_loss if known else None)
        return True

    def first(self, reading: Reading) -> Decision | None:
        """Say yes to the first package where a run of known length has come to its moment.

        Where none was to be had at it, the other rules say when to look for one again.
        """
        if reading.horizon is None or _had_one(reading):
            return None
        if out_of_time(reading) or self._too_early(reading) or self._overfits():
            return None
        start = self._start(reading)
        reason = f"the first package is due at update {start} of {reading.horizon}"
        return Decision(grow=True, verdict="scheduled", reason=reason)

    def first_at(self, reading: Reading) -> float:
        """Return the first update at which :meth:`first` may say yes, should nothing be observed.

        Args:
            reading: As for :meth:`first`, which said no.
        """
        if reading.horizon is None or _had_one(reading) or out_of_time(reading) or self._overfits():
            return math.inf
        return self._start(reading)

    def decide(self, reading: Reading) -> Decision:
        """Apply the rules to the evaluations so far; of the reading only times count."""
        outside = out_of_time(reading) or self._too_early(reading)
        if outside:
            return outside
        enough = len(self._gate) > self.window
        if enough:
            decision = self._overfitting() or self.first(reading) or self._diminishing()
            if decision:
                return decision
        return self.first(reading) or self._deadline(reading) or self._not_yet(enough=enough)

    def outlook(self, reading: Reading) -> float:
        """Say how near a yes is, in [0, 1]: 1 where it is due, 0.5 where returns are twice enough.

        Nothing is near where nothing may grow any more, or more capacity is the wrong medicine.
        """
        if out_of_time(reading) or self._overfits():
            return 0.0
        if reading.horizon is not None and not _had_one(reading):
            return 1.0
        return max(self._nearness_of_returns(), self._nearness_of_deadline(reading))

    def state_dict(self) -> PolicyState:
        """Return what was observed, as JSON-able values of its own."""
        return {
            "format_version": _STATE_VERSION,
            "updates": list(self._updates),
            "gate": list(self._gate),
            "train": list(self._train),
        }

    def load_state_dict(self, state: PolicyState) -> None:
        """Take over what another detector observed; the settings stay this one's.

        Raises:
            ValueError: The state is of another format, or something is missing.
        """
        if state.get("format_version") != _STATE_VERSION:
            msg = (
                f"detector state of format {state.get('format_version')!r}, "
                f"this Esper reads {_STATE_VERSION}"
            )
            raise ValueError(msg)
        missing = [name for name in ("updates", "gate", "train") if name not in state]
        if missing:
            msg = f"detector state without {', '.join(missing)}; give it what state_dict() returned"
            raise ValueError(msg)
        self._updates = list(state["updates"])
        self._gate = list(state["gate"])
        self._train = list(state["train"])

    def _overfits(self) -> bool:
        return len(self._gate) > self.window and self._overfitting() is not None

    def _start(self, reading: Reading) -> int:
        if reading.horizon is None:
            return self.EARLY_UPDATES
        return min(self.EARLY_UPDATES, math.ceil(self.EARLY_FRACTION * reading.horizon))

    def _too_early(self, reading: Reading) -> Decision | None:
        start = self._start(reading)
        if reading.update >= start:
            return None
        return Decision(
            grow=False,
            verdict="too_early",
            reason=f"update {reading.update}: nothing grows before update {start}",
        )

    def _overfitting(self) -> Decision | None:
        gate = _smoothed(self._gate)
        best = min(range(len(gate)), key=gate.__getitem__)
        rise = gate[-1] - gate[best]
        if len(gate) - 1 - best < self.MIN_SINCE_BEST or not self._is_real(rise, gate[best]):
            return None
        known = [loss for loss in self._train[best:] if loss is not None]
        if len(known) > 1 and _smoothed(known)[-1] >= known[0]:
            return None
        since = f"since update {self._updates[best]}"
        training = "the training loss fell" if len(known) > 1 else "the training loss is unknown"
        return Decision(
            grow=False,
            verdict="overfitting",
            reason=f"the gate loss rose by {rise:.3g} {since} while {training}: "
            "more capacity is the wrong medicine",
        )

    def _is_real(self, rise: float, best: float) -> bool:
        """Tell a rise of the gate loss from its noise."""
        recent = self._gate[-2 * self.window - 1 :]
        noise = median(abs(b - a) for a, b in itertools.pairwise(recent))
        fallen = max(self._gate[0] - best, 0.0)
        return rise > self.NOISE_FACTOR * noise and rise > self.rise_fraction * fallen

    def _diminishing(self) -> Decision | None:
        known = [loss for loss in self._train if loss is not None]
        if len(known) <= self.window:
            return None
        train = _smoothed(known)
        recently = train[-1 - self.window] - train[-1]
        in_all = max(train[0] - train[-1], 0.0)
        if recently > 0.0 and recently >= self.fraction * in_all:
            return None
        return Decision(
            grow=True,
            verdict="diminishing",
            reason=f"the training loss fell by {recently:.3g} over the last {self.window} "
            f"evaluations, by {in_all:.3g} since the start",
        )

    def _nearness_of_returns(self) -> float:
        """Return the fall that would be too little, over the last one; 1 where that was less."""
        known = [loss for loss in self._train if loss is not None]
        if len(known) <= self.window:
            return 0.0
        train = _smoothed(known)
        recently = train[-1 - self.window] - train[-1]
        enough = self.fraction * max(train[0] - train[-1], 0.0)
        return 1.0 if recently <= enough else enough / recently

    def _nearness_of_deadline(self, reading: Reading) -> float:
        if reading.horizon is None:
            return 0.0
        since = reading.update - (reading.last_change_update or 0)
        return min(1.0, since / (self.deadline * reading.horizon))

    def _deadline(self, reading: Reading) -> Decision | None:
        change = reading.last_change_update
        if reading.horizon is None:
            return None
        if reading.update - (change or 0) < self.deadline * reading.horizon:
            return None
        since = "the start" if change is None else f"update {change}"
        return Decision(
            grow=True,
            verdict="deadline",
            reason=f"{self.deadline:.0%} of the run passed since {since}: the gates decide",
        )

    def _not_yet(self, *, enough: bool) -> Decision:
        if enough:
            return Decision(grow=False, verdict="improving", reason="the training loss still falls")
        return Decision(
            grow=False,
            verdict="too_early",
            reason=f"{len(self._gate)} evaluations, {self.window + 1} needed",
        )


def _had_one(reading: Reading) -> bool:
    """Say whether the run has had a package, or its model has changed."""
    return bool(reading.num_packages) or reading.last_change_update is not None


def out_of_time(reading: Reading) -> Decision | None:
    """Decline in the last 20 % of a run of known length; None otherwise."""
    update, horizon = reading.update, reading.horizon
    if horizon is None or update < Detector.LATE_FRACTION * horizon:
        return None
    return Decision(
        grow=False,
        verdict="too_late",
        reason=f"update {update} of {horizon}: nothing grows in the last "
        f"{1 - Detector.LATE_FRACTION:.0%} of a run",
    )


def _smoothed(losses: list[float]) -> list[float]:
    """Return the median of each loss and the two before it; the first stays as it is."""
    return [losses[0], *(median(losses[max(0, i - 2) : i + 1]) for i in range(1, len(losses)))]
