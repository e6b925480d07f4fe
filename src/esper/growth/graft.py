"""A graft: one try to grow, from germination to verdict, and all the grafts of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

from esper.contracts.lifecycle import ALLOWED_STAGES, GraftStage
from esper.contracts.progress import GraftStatus
from esper.contracts.report import GraftRecord
from esper.growth.budget import Cost

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from esper.contracts.choices import GraftVerdict

NO_COST: Final = Cost(parameters=0, flops=0.0, latency_s=0.0)
"""What a graft adds to a model that it is not part of."""
_IN_THE_MODEL: Final = (GraftStage.BLENDING, GraftStage.HOLDING, GraftStage.FOSSILIZED)


class GraftListener(Protocol):
    """Hears what becomes of grafts."""

    def stage_changed(self, record: GraftRecord, before: GraftStage | None) -> None:
        """Hear of a graft's stage and of the one before; None where it has just germinated."""
        ...


class Graft:
    """One try to grow. It owns its stage, and lets only those follow that may.

    Args:
        record: What is known of it; at its germination.
        cost: What its kernel costs.
        listener: Told of the germination, and of every stage that follows.
        is_known: Whether the listener has heard of it, so that it is told of what follows alone.
    """

    def __init__(
        self, record: GraftRecord, cost: Cost, listener: GraftListener, *, is_known: bool = False
    ) -> None:
        self._record = record
        self._listener = listener
        self.cost = cost
        if not is_known:
            listener.stage_changed(record, None)

    @property
    def record(self) -> GraftRecord:
        """What is known of the graft now."""
        return self._record

    @property
    def number(self) -> int:
        """Number of the graft in its run, from 1."""
        return self._record.graft

    @property
    def site(self) -> str:
        """Name of the layer."""
        return self._record.site

    @property
    def seed_idx(self) -> int:
        """The slot there."""
        return self._record.seed_idx

    @property
    def stage(self) -> GraftStage:
        """Where the graft is."""
        return self._record.stage

    @property
    def status(self) -> GraftStatus:
        """Where the graft is, as a value."""
        return GraftStatus(
            site=self.site,
            seed_idx=self.seed_idx,
            stage=self.stage,
            package=self._record.package,
        )

    @property
    def added_cost(self) -> Cost:
        """What the graft adds to the model now."""
        return self.cost if self.stage in _IN_THE_MODEL else NO_COST

    def begin_trial(self, reason: str) -> None:
        """Go on to the trial in a twin.

        Raises:
            ValueError: The graft has another stage than germinated.
        """
        self._go_on(replace(self._record, stage=GraftStage.TRIAL, reason=reason))

    def take_over(self, reason: str, *, update: int, blueprint: str) -> None:
        """Become part of the model, under watch.

        Args:
            reason: Why.
            update: Optimizer updates done.
            blueprint: What stands in the model: the graft's own, or its linear form.

        Raises:
            ValueError: The graft is in no trial.
        """
        self._go_on(
            replace(
                self._record,
                stage=GraftStage.HOLDING,
                reason=reason,
                admitted_at=update,
                blueprint=blueprint,
            )
        )

    def begin_audition(self, reason: str) -> None:
        """Go on to the audition.

        Raises:
            ValueError: The graft has another stage than germinated.
        """
        self._go_on(replace(self._record, stage=GraftStage.AUDITION, reason=reason))

    def admit(self, reason: str, *, update: int) -> None:
        """Become part of the model.

        Raises:
            ValueError: The graft is in no audition.
        """
        self._go_on(
            replace(self._record, stage=GraftStage.BLENDING, reason=reason, admitted_at=update)
        )

    def hold(self, reason: str) -> None:
        """Be held at alpha 1.

        Raises:
            ValueError: The graft is not blending.
        """
        self._go_on(replace(self._record, stage=GraftStage.HOLDING, reason=reason))

    def fossilize(self, reason: str, *, update: int, folded: bool) -> None:
        """Become permanent.

        Raises:
            ValueError: The graft is not held.
        """
        self._go_on(
            replace(
                self._record,
                stage=GraftStage.FOSSILIZED,
                reason=reason,
                verdict="fossilized",
                decided_at=update,
                folded=folded,
            )
        )

    def cull(
        self, reason: str, *, update: int, verdict: GraftVerdict, updates_lost: int = 0
    ) -> None:
        """Go.

        Raises:
            ValueError: There is a verdict already.
        """
        self._go_on(
            replace(
                self._record,
                stage=GraftStage.CULLED,
                reason=reason,
                verdict=verdict,
                decided_at=update,
                updates_lost=updates_lost,
            )
        )

    def measured_latency(self, latency_s: float) -> None:
        """Add what the kernel adds to a forward, in seconds."""
        self.cost = replace(self.cost, latency_s=latency_s)

    def record_dependence(self, dependence: float) -> None:
        """Add what switching the seed off costs, in units of the gate loss."""
        self._record = replace(self._record, dependence=_measured(dependence))

    def _go_on(self, changed: GraftRecord) -> None:
        before = self.stage
        allowed = ALLOWED_STAGES[before]
        if changed.stage not in allowed:
            may = ", ".join(sorted(stage.value for stage in allowed)) or "nothing"
            msg = (
                f"graft {self.number} at {self.site!r} is {before.value}, after which {may} may "
                f"follow; got {changed.stage.value}"
            )
            raise ValueError(msg)
        self._record = changed
        self._listener.stage_changed(changed, before)


def _measured(difference: float) -> float | None:
    """Return a difference of losses; None where one of them was not finite."""
    return difference if math.isfinite(difference) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Germination:
    """What a graft begins with.

    Attributes:
        site: Name of the layer.
        seed_idx: The slot there.
        blueprint: Name of the kernel's blueprint.
        artifact_id: The sha256 of the kernel's bytes; empty where it was not compiled.
        reason: Why it germinates.
        update: Optimizer updates done.
        package: Number of the package that it is a part of, from 1; None where it is tried by
            itself.
        cost: What the kernel costs.
    """

    site: str
    seed_idx: int
    blueprint: str
    artifact_id: str
    reason: str
    update: int
    package: int | None
    cost: Cost


class Grafts:
    """All grafts of a run, in the order in which they germinated.

    Args:
        listener: Told of every stage of each.
    """

    def __init__(self, listener: GraftListener) -> None:
        self._listener = listener
        self._grafts: list[Graft] = []

    @property
    def records(self) -> tuple[GraftRecord, ...]:
        """What is known of each."""
        return tuple(graft.record for graft in self._grafts)

    @property
    def num_packages_admitted(self) -> int:
        """How many packages were ever taken over, and kernels admitted by themselves."""
        admitted = [r for r in self.records if r.admitted_at is not None]
        alone = sum(r.package is None for r in admitted)
        return len({r.package for r in admitted} - {None}) + alone

    @property
    def added_cost(self) -> Cost:
        """What those in the model add together; a figure that was not taken counts as 0."""
        added = [graft.added_cost for graft in self._grafts]
        return Cost(
            parameters=sum(cost.parameters for cost in added),
            flops=sum(cost.flops or 0.0 for cost in added),
            latency_s=sum(cost.latency_s or 0.0 for cost in added),
        )

    @property
    def costs(self) -> list[list[float | None]]:
        """What each costs: parameters, FLOPs and seconds of a forward, as JSON can hold them."""
        return [[g.cost.parameters, g.cost.flops, g.cost.latency_s] for g in self._grafts]

    def load(self, records: Iterable[GraftRecord], costs: Iterable[Sequence[float | None]]) -> None:
        """Go on with the grafts of another run, of which nobody is told again.

        Args:
            records: What is known of each, in their order.
            costs: What each costs, as :attr:`costs` has them.
        """
        self._grafts = [
            Graft(
                record,
                Cost(parameters=int(cost[0] or 0), flops=cost[1], latency_s=cost[2]),
                self._listener,
                is_known=True,
            )
            for record, cost in zip(records, costs, strict=True)
        ]

    def numbered(self, number: int) -> Graft:
        """Return a graft by its number, from 1.

        Raises:
            IndexError: There are not so many.
        """
        return self._grafts[number - 1]

    def germinate(self, germination: Germination) -> Graft:
        """Number a graft, keep it, and return it."""
        record = GraftRecord(
            graft=len(self._grafts) + 1,
            site=germination.site,
            seed_idx=germination.seed_idx,
            blueprint=germination.blueprint,
            artifact_id=germination.artifact_id,
            stage=GraftStage.GERMINATED,
            verdict="in progress",
            reason=germination.reason,
            parameters=germination.cost.parameters,
            germinated_at=germination.update,
            package=germination.package,
        )
        graft = Graft(record, germination.cost, self._listener)
        self._grafts.append(graft)
        return graft
