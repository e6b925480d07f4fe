"""What happened in a run: every event is published, and kept for the report."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict

from esper.contracts.choices import SEED_STATES
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
from esper.contracts.lifecycle import GraftStage
from esper.contracts.owner_warning import warn_owner
from esper.contracts.report import AlphaPoint, Evaluation, NotFinite, TimelineEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.choices import Gate
    from esper.contracts.ports import Clock, EventSink
    from esper.contracts.report import GraftRecord, StageRecord
    from esper.growth.gates import GateVerdict
    from esper.growth.graft import Graft
    from esper.growth.measurement import Measurement
    from esper.growth.ranking import RankedCandidate, RefusedCandidate
    from esper.growth.reading import Decision
    from esper.seeds.isolation import SeedFault


_LOG = logging.getLogger(__name__)


class _When(TypedDict):
    """What every event begins with."""

    update: int
    time_s: float


class Journal:
    """Publishes what happens and keeps what the report needs. It listens to the grafts.

    Args:
        sink: Takes every event.
        clock: Dates them.
        updates: Returns the number of updates done.

    Attributes:
        evaluations: Readings of the gate split, in order.
        timeline: Every stage of every graft, in order.
        alphas: Every alpha that was recorded, in order.
        notes: Words to the owner, each once.
        not_finite: What was NaN or infinite, and when, in order.
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
        self.not_finite: list[NotFinite] = []
        self._last_reason = ""

    def started(self, settings: JsonObject) -> None:
        """Record the effective settings of the run, and say them."""
        told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        _LOG.info("growing with %s", told)
        self._sink.publish(RunStarted(**self._now(), settings=settings))

    def ended(self, reason: str, grafts: Sequence[GraftRecord]) -> None:
        """Record that the controller let go of the model, and of which grafts."""
        self._sink.publish(
            RunEnded(
                **self._now(),
                grafts_admitted=sum(g.admitted_at is not None for g in grafts),
                grafts_fossilized=sum(g.stage is GraftStage.FOSSILIZED for g in grafts),
                reason=reason,
            )
        )

    def why_nothing(self) -> None:
        """Tell the owner of a run without a graft what the policy said last."""
        if self._last_reason:
            self.note(f"nothing was grafted; the policy's last word: {self._last_reason}")

    def note(self, text: str) -> None:
        """Say a word to the owner, once: a text that was said is not repeated."""
        if text not in self.notes:
            self.notes.append(text)
            self._sink.publish(Noted(**self._now(), text=text))

    def warn(self, text: str) -> None:
        """Say a word to the owner, once, and at once: as a note, and as a warning."""
        if text not in self.notes:
            self.note(text)
            warn_owner(text)

    def read(self, what: str, value: float, cure: str) -> None:
        """Follow whether a figure is finite; the first time that it is not, the owner is warned.

        Args:
            what: The figure, as in :class:`NotFinite`.
            value: What was read.
            cure: What to do where it is not finite.
        """
        place = next(
            (i for i, n in enumerate(self.not_finite) if n.what == what and n.until is None), None
        )
        if math.isfinite(value):
            if place is not None:
                back = replace(self.not_finite[place], until=self._updates())
                self.not_finite[place] = back
        elif place is None:
            is_first = all(n.what != what for n in self.not_finite)
            lost = NotFinite(what=what, value=str(float(value)), since=self._updates())
            self.not_finite.append(lost)
            if is_first:
                self.warn(f"the {what} was {lost.value} at update {lost.since}: {cure}")

    def evaluated(self, measurement: Measurement, train_loss: float | None) -> None:
        """Record a reading of the gate split; of what is not finite the owner is warned."""
        self.read("gate loss", measurement.loss, measurement.blame)
        for name, value in measurement.metrics.items():
            self.read(name, value, "evaluate returned it so; it is left out of the log")
        if not math.isfinite(measurement.loss):
            return
        metrics = {k: v for k, v in measurement.metrics.items() if math.isfinite(v)}
        known = None if train_loss is None or not math.isfinite(train_loss) else train_loss
        kept = Evaluation(
            update=self._updates(), gate_loss=measurement.loss, train_loss=known, metrics=metrics
        )
        self.evaluations.append(kept)
        self._sink.publish(
            Evaluated(
                **self._now(), gate_loss=kept.gate_loss, train_loss=known, metrics=kept.metrics
            )
        )

    def detected(self, decision: Decision) -> None:
        """Record what the policy answered; its reason is what :meth:`why_nothing` says."""
        self._last_reason = decision.reason
        self._sink.publish(
            Detected(
                **self._now(),
                grow=decision.grow,
                verdict=decision.verdict,
                reason=decision.reason,
            )
        )

    def ranked(self, order: Sequence[RankedCandidate], refused: Sequence[RefusedCandidate]) -> None:
        """Record the ranking, and what was refused before it."""
        rows: list[JsonObject] = [
            {
                "site": entry.site,
                "blueprint": entry.blueprint,
                "gain": entry.gain,
                "stderr": entry.stderr,
                "parameters": entry.parameters,
                "flops": entry.flops,
                "reason": entry.reason,
            }
            for entry in order
        ]
        others: list[JsonObject] = [
            {"site": entry.site, "blueprint": entry.blueprint, "reason": entry.reason}
            for entry in refused
        ]
        self._sink.publish(Ranked(**self._now(), rows=rows, refused=others))

    def stage_changed(self, record: GraftRecord, before: GraftStage | None) -> None:
        """Record a graft's stage; ``before`` is None where it has just germinated."""
        self.timeline.append(
            TimelineEntry(
                update=self._updates(),
                graft=record.graft,
                site=record.site,
                blueprint=record.blueprint,
                before=before,
                after=record.stage,
                reason=record.reason,
            )
        )
        self._sink.publish(
            StageChanged(
                **self._now(),
                graft=record.graft,
                site=record.site,
                seed_idx=record.seed_idx,
                blueprint=record.blueprint,
                artifact_id=record.artifact_id,
                before="" if before is None else before,
                after=record.stage,
                reason=record.reason,
            )
        )

    def gate(self, graft: Graft, gate: Gate, verdict: GateVerdict) -> None:
        """Record a gate that was read."""
        self._sink.publish(
            GateRead(
                **self._now(),
                graft=graft.number,
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
        )

    def alpha(self, graft: Graft, alpha: float) -> None:
        """Record a graft's alpha at the start or the end of a ramp."""
        self.alphas.append(AlphaPoint(update=self._updates(), graft=graft.number, alpha=alpha))
        self._sink.publish(AlphaChanged(**self._now(), graft=graft.number, alpha=alpha))

    def fossilized(self, graft: Graft, *, folded: bool, rel_diff: float | None, why: str) -> None:
        """Record the certificate of a graft that was made permanent."""
        self._sink.publish(
            Fossilized(
                **self._now(),
                graft=graft.number,
                site=graft.site,
                folded=folded,
                rel_diff=rel_diff,
                reason=why,
            )
        )

    def rolled_back(self, graft: Graft, updates_lost: int, reason: str) -> None:
        """Record a removal after admission."""
        self._sink.publish(
            RolledBack(**self._now(), graft=graft.number, updates_lost=updates_lost, reason=reason)
        )

    def stage_woken(self, record: StageRecord) -> None:
        """Record a planned stage of depth that began, was done, or was taken back."""
        _LOG.info("%s at depth %d: %s", record.path, record.depth, record.reason)

    def faulted(self, fault: SeedFault) -> None:
        """Record a seed whose kernel failed."""
        self._sink.publish(
            SeedFaulted(
                **self._now(),
                site=fault.layer,
                seed_idx=fault.seed_idx,
                faults=fault.faults,
                state=SEED_STATES[fault.state],
                reason=fault.reason,
            )
        )

    def _now(self) -> _When:
        return {"update": self._updates(), "time_s": self._clock.now() - self._start_s}
