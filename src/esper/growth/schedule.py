"""The schedule of evaluations: when the gate split is read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from esper.growth.ledger import SHARE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.growth.ledger import WorkLedger

EVALUATE_EVERY: Final = 50
"""Updates between two evaluations where the owner says nothing and calls no ``end_epoch``."""


class EvaluationSchedule:
    """Says when an evaluation is due: at first at once, then as the owner wants it.

    But so seldom that evaluations take at most a fifth of the overhead. The first is made
    whatever it takes: it tells what a reading takes. Readings for a verdict or a watch are none of
    the schedule's. Where it is not known what an update takes (nothing says how the model is
    trained, or no batches are given), nothing is stretched.

    Args:
        ledger: Knows what a reading and an update take.
        every: Updates between two; None: at the ends of epochs, or every 50 updates where there
            are none. Where the end of an epoch is too early, it is later, within the next one.

    Attributes:
        last: Update of the last evaluation; None before the first.
    """

    def __init__(self, ledger: WorkLedger, *, every: int | None) -> None:
        self._ledger = ledger
        self._every = every
        self._epoch_ended = False
        self._last_end: int | None = None
        self._epoch_updates: int | None = None
        self._has_told = False
        self._num_made = 0
        self.last: int | None = None

    def end_epoch(self, update: int) -> None:
        """Learn that an epoch ended after so many updates."""
        self._epoch_updates = update - (self._last_end or 0)
        self._last_end, self._epoch_ended = update, True

    def is_due(self, update: int) -> bool:
        """Say whether the gate split is to be read now; once an update at most.

        Args:
            update: Updates done.
        """
        if self.last is None:
            return True
        since = update - self.last
        if not self.is_wanted(update):
            return False
        return since >= self._least_gap(update) and self._is_earned(update)

    def is_wanted(self, update: int) -> bool:
        """Say whether the gate split would be read now, if it is earned: by updates alone.

        Args:
            update: Updates done.
        """
        since = update - (self.last or 0)
        return self.last is not None and since > 0 and self._is_past(since)

    def waits_until(self, update: int) -> float:
        """Return the first update at which the gate split may be read, should no epoch end.

        Args:
            update: Updates done, at which it is not to be read.
        """
        if self.last is None or self.is_wanted(update):
            return update
        has_epochs = self._every is None and self._last_end is not None
        return math.inf if has_epochs else self.last + self.wanted

    def evaluated(self, update: int, flops: int) -> None:
        """Learn that the gate split was read because it was due.

        Args:
            update: Updates done.
            flops: What that took.
        """
        self._ledger.scheduled += flops
        self._epoch_ended = False
        self._num_made += 1
        self.last = update

    @property
    def wanted(self) -> int:
        """Updates between two evaluations that the owner wants, or that are usual."""
        if self._every is not None:
            return self._every
        return self._epoch_updates or EVALUATE_EVERY

    @property
    def interval(self) -> int | None:
        """Updates between two evaluations as they are now; None where no more are affordable."""
        least = self._least_gap(self.last or 0)
        return None if least == math.inf else max(self.wanted, math.ceil(least))

    def stretched(self) -> str | None:
        """Say once that evaluations are further apart than wanted, and why; else None."""
        interval = self.interval
        may_have_epochs = self._every is None and self._last_end is None and self._num_made < 2
        if self._has_told or interval == self.wanted or (may_have_epochs and interval is not None):
            return None
        self._has_told = True
        share = f"a fifth of overhead={self._ledger.overhead:g}"
        beside = "readings for verdicts and watches are made all the same, and come beside it"
        cure = "raise overhead=, or let evaluate read fewer samples"
        if interval is None:
            return (
                f"no more evaluations are due: one more takes more than {share}; {beside}; {cure}"
            )
        return (
            f"evaluations are {interval} updates apart, where {self.wanted} were wanted, so that "
            f"they take at most {share}; {beside}; {cure}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return when evaluations and ends of epochs were, as JSON can hold it."""
        return {
            "epoch_ended": self._epoch_ended,
            "last_end": self._last_end,
            "epoch_updates": self._epoch_updates,
            "has_told": self._has_told,
            "num_made": self._num_made,
            "last": self.last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another schedule was."""
        self._epoch_ended, self._has_told = bool(state["epoch_ended"]), bool(state["has_told"])
        self._last_end, self._epoch_updates = state["last_end"], state["epoch_updates"]
        self._num_made, self.last = int(state["num_made"]), state["last"]

    def _is_past(self, since: int) -> bool:
        if self._every is None and self._last_end is not None:
            return self._epoch_ended
        return since >= self.wanted

    def _least_gap(self, update: int) -> float:
        """Updates between evaluations that keep them within a fifth of the overhead."""
        reading, update_flops = self._ledger.reading_flops, self._ledger.update_flops
        if reading == 0 or update_flops == 0:
            return 0.0
        left = self._ledger.updates_left(update)
        if left:
            share = self._share_left(update)
            return left * reading / share if share >= reading else math.inf
        per_update = SHARE * self._ledger.overhead * update_flops
        return reading / per_update if per_update > 0 else math.inf

    def _is_earned(self, update: int) -> bool:
        known = self._ledger.update_flops > 0
        return not known or self._share_left(update) >= self._ledger.reading_flops

    def _share_left(self, update: int) -> float:
        return self._ledger.share_left(self._ledger.scheduled, update)
