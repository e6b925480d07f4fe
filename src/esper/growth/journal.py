"""What happened in a run: every event is published, and kept for the report."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from esper.contracts.events import (
    AlphaChanged,
    Detected,
    Evaluated,
    Fossilized,
    GateRead,
    Noted,
    Ranked,
    RolledBack,
    RunEnded,
    RunStarted,
    SeedFaulted,
    StageChanged,
)
from esper.contracts.lifecycle import ALLOWED_STAGES, GraftStage
from esper.contracts.report import AlphaPoint, Evaluation, GraftRecord, TimelineEntry

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.contracts.ports import Clock, EventSink
    from esper.growth.gates import GateVerdict
    from esper.growth.measurement import Measurement
    from esper.growth.ranking import RankedCandidate
    from esper.growth.reading import Decision


_LOG = logging.getLogger(__name__)


class Journal:
    """Publishes what happens and keeps what the report needs.

    Args:
        sink: Takes every event.
        clock: Dates them.
        updates: Returns the number of updates done.
    """

    def __init__(self, sink: EventSink, clock: Clock, updates: Callable[[], int]) -> None:
        self._sink = sink
        self._clock = clock
        self._start_s = clock.now()
        self._updates = updates
        self.evaluations: list[Evaluation] = []
        self.timeline: list[TimelineEntry] = []
        self.alphas: list[AlphaPoint] = []
        self.notes: list[str] = []
        self._grafts: dict[int, GraftRecord] = {}

    @property
    def grafts(self) -> tuple[GraftRecord, ...]:
        """The grafts so far, in the order in which they germinated."""
        return tuple(self._grafts.values())

    def started(self, settings: dict[str, Any]) -> None:
        """Record the effective settings of the run, and say them."""
        told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        _LOG.info("growing with %s", told)
        self._publish(RunStarted, settings=settings)

    def ended(self, reason: str) -> None:
        """Record that the controller let go of the model."""
        self._publish(
            RunEnded,
            grafts_admitted=sum(g.admitted_at is not None for g in self.grafts),
            grafts_fossilized=sum(g.stage is GraftStage.FOSSILIZED for g in self.grafts),
            reason=reason,
        )

    def note(self, text: str) -> None:
        """Say a word to the owner, once: a text that was said is not repeated."""
        if text not in self.notes:
            self.notes.append(text)
            self._publish(Noted, text=text)

    def evaluated(self, evaluation: Measurement, train_loss: float | None) -> None:
        """Record a reading of the gate split; one that is not finite is a note."""
        if not math.isfinite(evaluation.loss):
            self.note(f"the gate loss was {evaluation.loss} at update {self._updates()}")
            return
        metrics = {k: v for k, v in evaluation.metrics.items() if math.isfinite(v)}
        known = None if train_loss is None or not math.isfinite(train_loss) else train_loss
        kept = Evaluation(
            update=self._updates(), gate_loss=evaluation.loss, train_loss=known, metrics=metrics
        )
        self.evaluations.append(kept)
        self._publish(Evaluated, gate_loss=kept.gate_loss, train_loss=known, metrics=metrics)

    def detected(self, decision: Decision) -> None:
        """Record what the policy answered."""
        self._publish(
            Detected, grow=decision.grow, verdict=decision.verdict, reason=decision.reason
        )

    def ranked(self, ranked: list[RankedCandidate], refused: list[dict[str, str]]) -> None:
        """Record the ranking, and what was refused before it."""
        rows = [
            {
                "site": r.site,
                "blueprint": r.blueprint,
                "gain": r.gain,
                "stderr": r.stderr,
                "parameters": r.parameters,
                "flops": r.flops,
                "reason": r.reason,
            }
            for r in ranked
        ]
        self._publish(Ranked, rows=rows, refused=refused)

    def germinated(self, record: GraftRecord, reason: str) -> None:
        """Record a graft that germinated."""
        self._grafts[record.graft] = record
        self._record_stage(record, None, reason)

    def moved(self, graft: int, stage: GraftStage, reason: str, **changes: Any) -> None:
        """Record a change of stage; ``changes`` are further fields of its record."""
        record = self._grafts[graft]
        assert stage in ALLOWED_STAGES[record.stage], f"{record.stage} -> {stage}"
        before = record.stage
        if stage in (GraftStage.FOSSILIZED, GraftStage.CULLED):
            changes = {"decided_at": self._updates(), **changes}
        changed = replace(record, stage=stage, reason=reason, **changes)
        self._grafts[graft] = changed
        self._record_stage(changed, before, reason)

    def amend(self, graft: int, **changes: Any) -> None:
        """Add what was measured to a graft's record."""
        self._grafts[graft] = replace(self._grafts[graft], **changes)

    def gate(self, graft: int, gate: str, verdict: GateVerdict) -> None:
        """Record a gate that was read."""
        self._publish(
            GateRead,
            graft=graft,
            gate=gate,
            passed=verdict.passed,
            effect=verdict.effect,
            stderr=verdict.stderr,
            tau=verdict.tau,
            z=verdict.z,
            level=verdict.level,
            samples=verdict.samples,
            reason=verdict.reason,
        )

    def alpha(self, graft: int, alpha: float) -> None:
        """Record a graft's alpha at the start or the end of a ramp."""
        self.alphas.append(AlphaPoint(update=self._updates(), graft=graft, alpha=alpha))
        self._publish(AlphaChanged, graft=graft, alpha=alpha)

    def fossilized(
        self, graft: int, site: str, *, folded: bool, rel_diff: float | None, why: str
    ) -> None:
        """Record the certificate of a graft that was made permanent."""
        self._publish(
            Fossilized, graft=graft, site=site, folded=folded, rel_diff=rel_diff, reason=why
        )

    def rolled_back(self, graft: int, updates_lost: int, reason: str) -> None:
        """Record a removal after admission."""
        self._publish(RolledBack, graft=graft, updates_lost=updates_lost, reason=reason)

    def faulted(self, site: str, seed_idx: int, faults: int, state: str, reason: str) -> None:
        """Record a seed whose kernel failed."""
        self._publish(
            SeedFaulted, site=site, seed_idx=seed_idx, faults=faults, state=state, reason=reason
        )

    def _record_stage(self, record: GraftRecord, before: GraftStage | None, reason: str) -> None:
        self.timeline.append(
            TimelineEntry(
                update=self._updates(),
                graft=record.graft,
                site=record.site,
                blueprint=record.blueprint,
                before=before,
                after=record.stage,
                reason=reason,
            )
        )
        self._publish(
            StageChanged,
            graft=record.graft,
            site=record.site,
            seed_idx=record.seed_idx,
            blueprint=record.blueprint,
            artifact_id=record.artifact_id,
            before="" if before is None else before.value,
            after=record.stage.value,
            reason=reason,
        )

    def _publish(self, event: type[Any], **fields: Any) -> None:
        time_s = self._clock.now() - self._start_s
        self._sink.publish(event(update=self._updates(), time_s=time_s, **fields))
