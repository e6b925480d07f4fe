"""The ledger of a run: FLOPs and seconds by what they were spent on, and what growing may take."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from esper.growth.batch import KEPT_BATCHES, num_elements
from esper.growth.budget import OVERHEAD
from esper.growth.flops import counting

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from esper.contracts.ports import Clock
    from esper.growth.batch import Batch
    from esper.growth.settings import GrowthSettings

Category = Literal["training", "evaluation", "ranking", "trial", "shadow"]
"""What work was done for: the run's own training, or one of four parts of growing."""
CATEGORIES: Final[tuple[Category, ...]] = get_args(Category)

WORK_UNIT: Final = "FLOPs"
SHARE: Final = 0.2
"""Of the overhead, what scheduled evaluations may take, and as much again what rankings may."""
NUM_TWINS: Final = 3


@dataclass(slots=True, kw_only=True, eq=False)
class Work:
    """What one block took; known once it has ended.

    Attributes:
        flops: FLOPs, those of blocks inside of it included; 0 where they were not counted.
        seconds: Seconds by the ledger's clock.
    """

    flops: int = 0
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class _Sums:
    """What was counted, by category, and the live model's updates.

    ``last_update`` is the moment of the last one, and what growing had taken until then, seconds.
    """

    flops: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CATEGORIES, 0.0))
    updates: int = 0
    num_counted: int = 0
    elements: int = 0
    last_update: tuple[float, float] | None = None


class WorkLedger:
    """Counts a run's FLOPs and seconds by category, and says what growing may still take.

    FLOPs are of what torch executed, kernels included, as :func:`~esper.growth.flops.counting`
    sees them: operations that it does not know count nothing. The live model is never run under
    the counter: what an update of it takes is learned from passes beside the run (:attr:`update`),
    what a reading of the gate split takes from the first of each structure (:attr:`reading`).
    Decisions follow from FLOPs alone, so that a run can be replayed; seconds are for the report.
    On an accelerator they are those of the thread, which waits only where a value is read.

    Growing may take ``overhead`` times the FLOPs of training over the horizon. What an update takes
    is known for the past, and expected to stay as it is for the rest. Without a horizon the
    allowance follows from the updates done.

    Args:
        settings: The run's; ``horizon`` and ``overhead``, and what an audition takes.
        clock: Dates the beginning and the end of a block.

    Attributes:
        update: What an update of the live model takes, by element of its batches.
        reading: What a reading of the gate split takes.
        scheduled: FLOPs of the readings that were made because they were due.
        asked: FLOPs of the rankings that the owner asked for. They are told, and growing may still
            take as much as without them, so that a run goes on as if nobody had asked.
        promised: FLOPs that what goes on beside the run will still take, at least 0; nothing else
            may have them.
    """

    def __init__(self, settings: GrowthSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._overhead = OVERHEAD if settings.overhead is None else settings.overhead
        self._sums = _Sums()
        self._uncounted: list[tuple[Sequence[Batch], float]] = []  # with the updates' moments
        self._open: list[Work] = []  # what blocks inside of the open ones took, the outermost first
        self.update = Meter(self, "training")
        self.reading = Meter(self, "evaluation")
        self.scheduled = self.asked = 0
        self.promised = 0.0

    @contextmanager
    def measured(self, category: Category) -> Iterator[Work]:
        """Count what torch executes in the block, forwards and backwards, and its seconds.

        Blocks may stand in one another: each FLOP and each second counts once, under the category
        of the innermost.
        """
        with self.timed(category) as work, counting() as counter:
            try:
                yield work
            finally:
                work.flops = int(counter.get_total_flops())

    @contextmanager
    def timed(self, category: Category) -> Iterator[Work]:
        """Count the seconds of the block, and no FLOPs."""
        work, inside = Work(), Work()
        self._open.append(inside)
        start_s = self._clock.now()
        try:
            yield work
        finally:
            work.seconds = self._clock.now() - start_s
            self._open.pop()
            self._add(category, max(0, work.flops - inside.flops), work.seconds - inside.seconds)
            self._tell_outer(max(work.flops, inside.flops), work.seconds)

    def count(self, category: Category, *, flops: float = 0, seconds: float = 0.0) -> None:
        """Count what was done without a block; within one, as a part of it.

        Args:
            category: What it was done for.
            flops: At least 0.
            seconds: At least 0.

        Raises:
            ValueError: The category is unknown, or a figure negative or not finite.
        """
        for name, value in (("flops", flops), ("seconds", seconds)):
            if not 0 <= value < math.inf:
                msg = f"{name} is a finite number, at least 0; got {value}"
                raise ValueError(msg)
        self._add(category, round(flops), seconds)
        self._tell_outer(round(flops), seconds)

    def meter(self, category: Category) -> Meter:
        """Return a meter for a piece of work that is done again and again."""
        return Meter(self, category)

    def count_update(self, batches: Sequence[Batch]) -> None:
        """Count an update of the live model, by the elements of its batches.

        Without batches its FLOPs are not known, and none are counted. The seconds since the update
        before it are training's, but for those that growing took of them.
        """
        self._uncounted.append((batches, self._clock.now()))
        if len(batches) > 1 or len(self._uncounted) == KEPT_BATCHES:
            self.settle()

    def settle(self) -> None:
        """Add up the updates since the last time; before anything that they are counted by changes.

        What a run does in each step should be little.
        """
        sums, uncounted, self._uncounted = self._sums, self._uncounted, []
        growing_s = sum(sums.seconds.values()) - sums.seconds["training"]
        for batches, now_s in uncounted:
            elements = sum(map(num_elements, batches))
            sums.updates += 1
            if elements:
                sums.num_counted += 1
                sums.elements += elements
            took_s = 0.0
            if sums.last_update is not None:
                took_s = now_s - sums.last_update[0] - (growing_s - sums.last_update[1])
            sums.last_update = (now_s, growing_s)
            sums.flops["training"] += self.update.flops(elements)
            sums.seconds["training"] += max(0.0, took_s)

    @property
    def _counted(self) -> _Sums:
        """Everything counted up to now."""
        if self._uncounted:
            self.settle()
        return self._sums

    def structure_changed(self) -> None:
        """Learn that the live model computes something else now: what it takes is to be measured.

        To be called where a kernel enters, first contributes, leaves or is folded, and where blocks
        wake. The next update and the next reading are measured.
        """
        self.update.forget()
        self.reading.forget()

    @property
    def spent(self) -> int:
        """FLOPs that growing has taken by itself: of every category but training."""
        flops = self._counted.flops
        return sum(flops.values()) - flops["training"] - self.asked

    @property
    def rankings(self) -> int:
        """FLOPs of the rankings that growing has made by itself."""
        return self._counted.flops["ranking"] - self.asked

    @property
    def overhead(self) -> float:
        """What growing may take, as a ratio to the FLOPs of training."""
        return self._overhead

    @property
    def update_flops(self) -> int:
        """FLOPs of an update of the live model at its usual batch; 0 before they are known."""
        return self.update.flops(self.usual_elements)

    @property
    def usual_elements(self) -> float:
        """Elements of the batches of an update, on average; 0 before any are known."""
        sums = self._counted
        return sums.elements / sums.num_counted if sums.num_counted else self.update.elements

    @property
    def reading_flops(self) -> int:
        """FLOPs of a reading of the gate split by the live model; 0 before they are known."""
        return self.reading.flops(1)

    def work(self, category: Category) -> int:
        """Return the FLOPs counted in one category."""
        return self._counted.flops[category]

    def by_category(self) -> dict[str, float]:
        """Return the FLOPs counted, by category."""
        return {name: float(flops) for name, flops in self._counted.flops.items()}

    def seconds_by_category(self) -> dict[str, float]:
        """Return the seconds counted, by category.

        Training's are those between updates that no other category has: what the owner does there,
        loading of data included.
        """
        return dict(self._counted.seconds)

    def updates_left(self, updates: int) -> int:
        """Return how many updates a run of known length still has; 0 where it is not known."""
        return max(0, (self._settings.horizon or 0) - updates)

    def limit(self, updates: int) -> int:
        """Return how many FLOPs growing may take in all, as far as it is known.

        Args:
            updates: Updates done.
        """
        to_come = self.updates_left(updates) * self.update_flops
        return math.floor(self._overhead * (self._counted.flops["training"] + to_come))

    def allowance_left(self, updates: int) -> int:
        """Return how many FLOPs growing may still take, beside what is promised; maybe negative.

        Args:
            updates: Updates done.
        """
        return self.limit(updates) - self.spent - math.ceil(self.promised)

    def share_left(self, spent: int, updates: int) -> float:
        """Return what is left of the fifth that evaluations, or rankings, may take.

        Args:
            spent: FLOPs that they took.
            updates: Updates done.
        """
        return min(SHARE * self.limit(updates) - spent, self.allowance_left(updates))

    def ranking_left(self, updates: int) -> float:
        """Return what the next ranking may take: half of what the fifth for rankings has left.

        So that others may follow it.

        Args:
            updates: Updates done.
        """
        return self.share_left(self.rankings, updates) / 2

    def affordable(self, cost: float) -> bool:
        """Say whether a trial of such a cost fits, and leaves to evaluations what is theirs.

        Args:
            cost: All of its FLOPs: updates of every twin, and the readings of its verdict.
        """
        return cost <= self.left_for_trials()

    def horizon_for(self, cost: float, *, per_update: float = 0.0) -> int | None:
        """Return how many updates a run has to have for a trial of such a cost.

        Rankings and evaluations have their fifths, or what rankings have taken already where that
        is more. None where no length would do: the overhead is 0, or less than each update takes,
        or what an update takes is not known, or nothing.

        Args:
            cost: FLOPs that the trial takes, however long the run is.
            per_update: FLOPs that it takes with each update of the run.
        """
        each = self._overhead * self.update_flops
        for_trials = each * (1 - 2 * SHARE) - per_update
        if for_trials <= 0:
            return None
        taken = max(0, self.spent - self.scheduled)
        beside_rankings = each * (1 - SHARE) - per_update
        return math.ceil(max(cost / for_trials, (cost + taken) / beside_rankings))

    def state_dict(self) -> dict[str, Any]:
        """Return everything counted and learned, as JSON can hold it."""
        sums = self._counted
        return {
            "flops": dict(sums.flops),
            "seconds": dict(sums.seconds),
            "updates": [sums.updates, sums.num_counted, sums.elements],
            "scheduled": self.scheduled,
            "asked": self.asked,
            "update": self.update.state_dict(),
            "reading": self.reading.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what another ledger had counted."""
        updates, num_counted, elements = state["updates"]
        self._sums = _Sums(
            flops={name: int(state["flops"].get(name, 0)) for name in CATEGORIES},
            seconds={name: float(state["seconds"].get(name, 0.0)) for name in CATEGORIES},
            updates=updates,
            num_counted=num_counted,
            elements=elements,
        )
        self._uncounted.clear()
        self.scheduled, self.asked = state["scheduled"], state.get("asked", 0)
        self.update.load_state_dict(state["update"])
        self.reading.load_state_dict(state["reading"])

    def left_for_trials(self) -> float:
        """Return how many FLOPs trials may still take, beside what is set apart for evaluations."""
        updates = self._counted.updates
        reserved = max(0.0, SHARE * self.limit(updates) - self.scheduled)
        return self.allowance_left(updates) - reserved

    def _add(self, category: Category, flops: int, seconds: float) -> None:
        sums = self._counted
        if category not in sums.flops:
            msg = f"work is counted as one of {', '.join(CATEGORIES)}; got {category!r}"
            raise ValueError(msg)
        sums.flops[category] += flops
        sums.seconds[category] += seconds

    def _tell_outer(self, flops: int, seconds: float) -> None:
        """Let the block around it not count once more what is counted already."""
        if self._open:
            self._open[-1].flops += flops
            self._open[-1].seconds += seconds


class Meter:
    """A piece of work that is done again and again: measured once, then counted by its figure.

    Running a model under the counter takes time, so it is not done for every update.

    Args:
        ledger: Where it is counted.
        category: As what.

    Attributes:
        is_known: Whether the figure stands; after :meth:`forget` the last one is kept for
            estimates, and the next piece of work is measured.
        elements: Elements of the piece that was measured; 0 before one was.
    """

    def __init__(self, ledger: WorkLedger, category: Category) -> None:
        self._ledger = ledger
        self._category = category
        self._measured = 0
        self.elements = 0
        self.is_known = False

    def flops(self, elements: float = 1) -> int:
        """Return what a piece of work of so many elements takes; 0 before one was measured."""
        return round(self._measured * elements / self.elements) if self.elements else 0

    def learn(self, flops: int, elements: int = 1) -> None:
        """Take over what a piece of work of so many elements took; of none it says nothing."""
        if elements:
            self._ledger.settle()
            self._measured, self.elements, self.is_known = flops, elements, True

    def forget(self) -> None:
        """Let the next piece of work be measured."""
        self.is_known = False

    @contextmanager
    def counted(self, batches: Sequence[Batch] | None = None) -> Iterator[Work]:
        """Count the block: measured where the figure does not stand, else by the figure.

        Args:
            batches: What the work is done on, and grows with; None: it is always as much.
        """
        elements = 1 if batches is None else sum(map(num_elements, batches))
        if not self.is_known:
            with self._ledger.measured(self._category) as work:
                yield work
            self.learn(work.flops, elements)
            return
        with self._ledger.timed(self._category) as work:
            yield work
        work.flops = self.flops(elements)
        self._ledger.count(self._category, flops=work.flops)

    def state_dict(self) -> list[int]:
        """Return the figure, and whether it stands."""
        return [self._measured, self.elements, int(self.is_known)]

    def load_state_dict(self, state: Sequence[int]) -> None:
        """Take over a figure."""
        self._measured, self.elements = state[0], state[1]
        self.is_known = bool(state[2])
