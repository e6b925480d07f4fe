"""The null twin that trains on to the end of a run, for a claim of capacity at its end."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from esper.continuity.replicas import any_rank, in_step
from esper.contracts.errors import RankFailedError
from esper.growth.arm import Arm
from esper.growth.averaging import (
    STATISTICS_BATCHES,
    WeightAverage,
    has_statistics,
    read_average,
)
from esper.growth.gates import Spread, judge, level_of
from esper.growth.sizing import end_reading_flops
from esper.growth.twins import Twin, copied_model
from esper.resilience.attempt import Failed, attempt
from esper.seeds.fitting import device_of
from esper.state.plain_values import as_plain, from_plain
from esper.state.shards import is_in_shards
from esper.state.shortage import is_shortage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.growth.batch import Batch
    from esper.growth.gates import GateVerdict
    from esper.growth.run import GrowthRun


class NullBeside:
    """A package made linear, in a twin that goes on beside the run that took the package over.

    What a treatment brings early may be gone by the end: capacity is claimed at the end only
    where the grown model beats this twin there. What it will take of a run of known length is
    promised to it in the ledger; where the overhead buys no more of it, it is over.

    Args:
        run: The run.
        arm: The null twin of the trial.
        window: Updates that are averaged for the reading, at least 1.
        package: Number of the package that it has.

    Attributes:
        package: Number of the package that it has.
    """

    def __init__(self, run: GrowthRun, arm: Arm, window: int, *, package: int) -> None:
        self._run, self._arm, self._window = run, arm, window
        self.package = package
        self._batches: deque[Batch] = deque(maxlen=STATISTICS_BATCHES)
        self._averages = (WeightAverage(), WeightAverage())
        self._before = self._averages

    def advance(self, batches: list[Batch]) -> str | None:
        """Do the update that the live run has just done; why it can do no more, or None."""
        ledger = self._run.ledger
        ledger.promised = 0.0
        is_paid = ledger.affordable(self._each + end_reading_flops(self._run))
        if any_rank(self._run.given, here=not is_paid):
            cure = 'attribution="trial" ends it with the trial, and horizon= prices it before'
            return f"overhead={ledger.overhead:g} buys no more of it; {cure}"
        updated = attempt(lambda: in_step(self._run.given, lambda: self._update(batches)))
        if isinstance(updated, Failed):
            if not is_shortage(updated.error) and not isinstance(updated.error, RankFailedError):
                raise updated.error
            return f"it could not be trained: {updated}"
        self._run.settle_sizes()
        to_come = ledger.updates_left(self._run.updates) * self._each
        ledger.promised = to_come + end_reading_flops(self._run)
        return None

    @property
    def _each(self) -> int:
        """FLOPs of one of its updates, at the run's usual batch."""
        return self._arm.meter.flops(self._run.ledger.usual_elements)

    def _update(self, batches: list[Batch]) -> None:
        self._batches.extend(batches)
        self._arm.update(self._run, batches)
        live, null = self._averages
        if not live.fits(self._run.model):  # a kernel has left, or come, or was folded
            self._before = live, null = self._averages = (WeightAverage(), WeightAverage())
        elif live.num_updates >= self._window:
            self._before = self._averages
            live, null = self._averages = (WeightAverage(), WeightAverage())
        live.add(self._run.model)
        null.add(self._arm.twin.model)

    def read(self) -> GateVerdict | None:
        """Hold the run against the twin, on averaged weights; None where neither was trained."""
        run = self._run
        is_short = self._averages[0].num_updates < self._window // 2
        live, null = self._before if is_short else self._averages
        if not live.num_updates or not live.fits(run.model):
            return None
        pairs = ((live, copied_model(run)), (null, copied_model(run, of=self._arm.twin.model)))
        batches = list(self._batches)
        found = [read_average(run, average, model, batches) for average, model in pairs]
        return judge(
            found[1],
            found[0],
            level=level_of(run.settings.tries),
            spread=Spread(factor=run.settings.spread),
        )

    def state_dict(self) -> int | dict[str, Any]:
        """Return it as plain values and tensors on the CPU; its package's number where it cannot.

        That is where the model is in shards, or where a batch, the optimizer's state, or what the
        owner's functions keep of it, is something that only Python can hold.
        """
        if is_in_shards(self._run.model):
            return self.package
        live, null = self._averages
        has_before = self._before is not self._averages
        try:
            return {
                "package": self.package,
                "window": self._window,
                "twin": self._arm.twin.state_dict(),
                "meter": self._arm.meter.state_dict(),
                "promised": self._run.ledger.promised,
                "averages": [live.state_dict(), null.state_dict()],
                "before": [each.state_dict() for each in self._before] if has_before else None,
                "batches": as_plain(list(self._batches)) if self._needs_batches else None,
            }
        except TypeError:
            return self.package

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], run: GrowthRun) -> NullBeside:
        """Return the null that :meth:`state_dict` was taken of, beside a run that goes on.

        Args:
            state: What it returned; no number.
            run: The run, which has all else of the state.

        Raises:
            GrowthError: The model cannot be copied.
            KeyError: The state names what the model does not have.
        """
        twin, meter = Twin.from_state_dict(state["twin"], run), run.ledger.meter("trial")
        meter.load_state_dict(state["meter"])
        arm = Arm(name="null", twin=twin, meter=meter)
        made = cls(run, arm, state["window"], package=state["package"])
        device = device_of(run.model)

        def pair(saved: list[Any]) -> tuple[WeightAverage, WeightAverage]:
            live, null = (WeightAverage.from_state_dict(each, device) for each in saved)
            return live, null

        made._averages = made._before = pair(state["averages"])
        if state["before"] is not None:
            made._before = pair(state["before"])
        if state["batches"] is not None:
            made._batches.extend(from_plain(state["batches"], device))
        run.ledger.promised = state["promised"]
        return made

    @property
    def _needs_batches(self) -> bool:
        """Whether a reading computes running statistics anew."""
        models = (self._run.model, self._arm.twin.model)
        return any(has_statistics(module) for model in models for module in model.modules())

    def close(self) -> None:
        """Drop the twin."""
        self._arm.twin.close()
