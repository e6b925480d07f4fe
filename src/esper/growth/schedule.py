"""The schedule of evaluations: when the gate split is read."""

from __future__ import annotations

import math
from typing import Final

from esper.growth.budget import FORWARD_BACKWARD

EVALUATE_EVERY: Final = 50
"""Updates between two evaluations where the owner says nothing and calls no ``end_epoch``."""
READINGS_AT_FIRST: Final = 3
"""The evaluator reads the first time twice more, to see whether the order of samples holds."""


class EvaluationSchedule:
    """Says when an evaluation is due: at first at once, then as the owner wants it.

    Args:
        every: Updates between two; None: at the ends of epochs, or every 50 updates where there
            are none, but so seldom that evaluations take at most half of ``overhead``.
        overhead: Share of the run's counted work that growing may take, in [0, 1).

    Attributes:
        last: Update of the last evaluation; None before the first.
    """

    def __init__(self, *, every: int | None, overhead: float) -> None:
        self._every = every
        self._share = overhead / 2
        self._epoch_ended = self._has_epochs = False
        self._work = 0
        self.last: int | None = None

    def end_epoch(self) -> None:
        """Learn that an epoch ended."""
        self._epoch_ended = self._has_epochs = True

    def is_due(self, update: int, samples_per_update: int) -> bool:
        """Say whether the gate split is to be read now; once an update at most.

        Args:
            update: Updates done.
            samples_per_update: Samples in an update; 0 where unknown.
        """
        if self.last is None:
            return True
        since = update - self.last
        if since == 0:
            return False
        if self._every is not None:
            return since >= self._every
        due = self._epoch_ended or (not self._has_epochs and since >= EVALUATE_EVERY)
        return due and since >= self._least_gap(samples_per_update)

    def evaluated(self, update: int, work: int) -> None:
        """Learn that the gate split was read.

        Args:
            update: Updates done.
            work: Work of that evaluation, one forward of one sample being 1.
        """
        self._work = work // (READINGS_AT_FIRST if self.last is None else 1)
        self._epoch_ended = False
        self.last = update

    def _least_gap(self, samples_per_update: int) -> int:
        """Updates between evaluations that keep them within half of the overhead."""
        affordable = self._share / (1 - self._share)
        per_update = FORWARD_BACKWARD * max(samples_per_update, 1) * affordable
        return math.ceil(self._work / per_update) if per_update else EVALUATE_EVERY
