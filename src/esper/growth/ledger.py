"""The ledger of a run: what work was done, for what, and how much growing may still take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.growth.batch import num_samples_in
from esper.growth.budget import FORWARD, FORWARD_BACKWARD, WorkMeter, overhead_allowance

if TYPE_CHECKING:
    from esper.growth.batch import Batch
    from esper.growth.budget import Category
    from esper.growth.settings import GrowthSettings

NUM_TWINS = 3


class WorkLedger:
    """Counts the work of a run by category, one forward of one sample being 1.

    No clock is read, so that a run can be replayed.

    Args:
        settings: The run's; from them follow what growing may take, and what a graft takes.

    Attributes:
        samples_per_update: Samples in the last update that came with batches; 0 before it.
        num_overdrafts: Auditions that were given although the overhead was spent.
    """

    def __init__(self, settings: GrowthSettings) -> None:
        self._settings = settings
        self._meter = WorkMeter()
        self.samples_per_update = 0
        self.num_overdrafts = 0

    def count_update(self, batches: list[Batch]) -> None:
        """Count an update of the run itself."""
        self.samples_per_update = num_samples_in(batches) or self.samples_per_update
        self.count_pass("training", batches)

    def count_pass(self, category: Category, batches: list[Batch]) -> None:
        """Count one forward and backward over the batches."""
        self._meter.add(category, num_samples_in(batches), FORWARD_BACKWARD)

    def count_forward(self, category: Category, samples: int) -> None:
        """Count one forward of so many samples, at least 0."""
        self._meter.add(category, samples, FORWARD)

    def count_overdraft(self) -> None:
        """Count an audition that is given although the overhead is spent."""
        self.num_overdrafts += 1

    def work(self, category: Category) -> int:
        """Return the work counted in one category."""
        return self._meter.work(category)

    def by_category(self) -> dict[str, float]:
        """Return all work counted, by category."""
        return {name: float(work) for name, work in self._meter.state_dict().items()}

    def allowance_left(self, updates: int) -> float:
        """Return how much work growing may still take; negative where it took more.

        Args:
            updates: Updates done; the allowance follows from them where there is no horizon.
        """
        allowed = overhead_allowance(
            horizon=self._settings.horizon or max(updates, 1),
            samples_per_update=self.samples_per_update,
            overhead=self._settings.overhead,
        )
        return allowed - self._meter.overhead

    def num_affordable(self, updates: int) -> int:
        """Return how many auditions side by side the overhead still allows; 0 where it is spent.

        Args:
            updates: Updates done.
        """
        forked = self._settings.verify == "fork"
        one_pass = FORWARD_BACKWARD * max(self.samples_per_update, 1)
        twins = NUM_TWINS * self._settings.joint_updates * one_pass if forked else 0
        audition = self._settings.audition_updates * one_pass * (2 if forked else 1)
        return max(0, int((self.allowance_left(updates) - twins) // audition))
