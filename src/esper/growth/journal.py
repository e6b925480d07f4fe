"""What happened in a run: every event is published, and kept for the report."""

from __future__ import annotations

import contextlib
import logging
import math
import uuid
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Final, TypedDict

from esper.contracts.events import (
    AlphaChanged,
    BatchFitted,
    Detected,
    Evaluated,
    Event,
    Fossilized,
    GateRead,
    KernelEmbargoed,
    KernelPrepared,
    Noted,
    PassengerRemoved,
    Ranked,
    RegistryUnavailable,
    RolledBack,
    RunEnded,
    RunStarted,
    SeedMeasured,
    StageChanged,
    StageWoken,
    TakenOver,
    TrialRead,
    TrialStarted,
)
from esper.contracts.incidents import Incidents
from esper.contracts.lifecycle import GraftStage
from esper.contracts.owner_warning import warn_owner
from esper.contracts.report import (
    AlphaPoint,
    Evaluation,
    NotFinite,
    SeedRecord,
    TimelineEntry,
)
from esper.contracts.run_records import with_seed
from esper.seeds.fitting import told_left, told_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.choices import Gate, Preparation
    from esper.contracts.ports import Clock, EventSink
    from esper.contracts.report import GraftRecord, RunReport, SiteRecord, StageRecord, TrialRecord
    from esper.fetching.hitch import Hitch
    from esper.growth.gates import GateVerdict
    from esper.growth.graft import Graft
    from esper.growth.measurement import Measurement
    from esper.growth.ranking import RankedCandidate, RefusedCandidate
    from esper.growth.reading import Decision
    from esper.seeds.fitting import Fitted


_LOG = logging.getLogger(__name__)


_FINAL: Final = {
    "put": "the registry refused kernel {digest}, and it is not sent again: {error}; the run has "
    "it all the same",
    "report": "the registry refused what was reported of kernel {digest}, and it is not sent "
    "again: {error}; of further reports that it refuses nothing is said",
    "fetch": "kernel {digest} of the registry was refused, and is not offered: {error}",
    "search": "the registry does not say which kernels fit, and is not asked again: {error}",
}
"""What is said of a refusal, by what the registry was asked."""


class _When(TypedDict):
    """What every event begins with."""

    update: int
    time_s: float
    run_id: str
    seq: int


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
        trials: Every package as it is known now, in order.
        stages: Every planned stage of depth as it is known now, in order.
        incidents: What went wrong with seeds and sources, and came right again.
        sites: The layers with seeds, as the run found them.
        seeds: How each seed that contributed was doing, when that was last told.
        last_switch: Update at which the model last became another one; 0 where it never did.
        run_id: Names the run among all runs; with ``time_s`` all that a replay does not compare.
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
        self.trials: list[TrialRecord] = []
        self.stages: list[StageRecord] = []
        self.incidents = Incidents()
        self.sites: tuple[SiteRecord, ...] = ()
        self.seeds: tuple[SeedRecord, ...] = ()
        self.run_id = uuid.uuid4().hex
        self._num_events = 0
        self._fitted: set[tuple[str, str]] = set()
        self._has_told_of_reports = False
        self._last_reason = ""
        self.last_switch = 0

    @property
    def num_changes(self) -> int:
        """How often the run was looked at, or a graft or a stack came to another stage."""
        of_depth = sum(1 if stage.ended_at is None else 2 for stage in self.stages)
        return len(self.evaluations) + len(self.timeline) + of_depth

    def started(
        self,
        settings: JsonObject,
        sites: Sequence[SiteRecord] = (),
        parameters: int | None = None,
    ) -> None:
        """Record the effective settings of the run, and say them; its sites and parameters."""
        told = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        _LOG.info("growing with %s", told)
        self.sites = tuple(sites)
        shown: list[JsonObject] = [
            {"site": site.site, "what": site.what, "seeds": site.seeds} for site in sites
        ]
        self._sink.publish(
            RunStarted(**self._now(), settings=settings, sites=shown, parameters=parameters)
        )

    def goes_on(self, report: RunReport, said: Mapping[str, Any]) -> None:
        """Take over what another journal kept.

        Args:
            report: What that run reported when it was saved.
            said: Its :meth:`state_dict`.
        """
        self.evaluations, self.timeline = list(report.evaluations), list(report.timeline)
        self.alphas, self.notes = list(report.alphas), list(report.notes)
        self.not_finite, self.trials = list(report.not_finite), list(report.trials)
        self.stages = list(report.stages)
        self.incidents = Incidents(report.incidents)
        self.seeds = report.seeds
        self._last_reason, self.last_switch = said["last_reason"], int(said["last_switch"])

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept beside the parts of the report, as JSON can hold it."""
        return {"last_reason": self._last_reason, "last_switch": self.last_switch}

    def continues(self, run_id: str) -> None:
        """Say in the log which run goes on in this one; the report is one of both.

        Args:
            run_id: Names the run that was saved.
        """
        text = f"this run goes on from update {self._updates()} of run {run_id}, which was saved"
        _LOG.info("%s", text)
        self._sink.publish(Noted(**self._now(), text=text))

    def ended(
        self,
        reason: str,
        grafts: Sequence[GraftRecord],
        work: Mapping[str, float] | None = None,
        parameters: int | None = None,
    ) -> None:
        """Record that the controller let go of the model, of which grafts, and after what work."""
        self._sink.publish(
            RunEnded(
                **self._now(),
                grafts_admitted=sum(g.admitted_at is not None for g in grafts),
                grafts_fossilized=sum(g.stage is GraftStage.FOSSILIZED for g in grafts),
                reason=reason,
                work=None if work is None else dict(work),
                parameters=parameters,
            )
        )

    def why_nothing(self) -> None:
        """Tell the owner of a run without a graft what the policy said last."""
        if self._last_reason:
            self.note(f"nothing was grafted; the policy's last word: {self._last_reason}")

    def note(self, text: str) -> None:
        """Say a word to the owner, once: a text that was said is not repeated."""
        if self._noted(text):
            _LOG.info("%s", text)

    def warn(self, text: str) -> None:
        """Say a word to the owner, once, and at once: as a note, and as a warning."""
        if self._noted(text):
            warn_owner(text)

    def _noted(self, text: str) -> bool:
        """Keep a text for the report and the log; say whether it is new."""
        if text in self.notes:
            return False
        self.notes.append(text)
        self._sink.publish(Noted(**self._now(), text=text))
        return True

    def fitted(self, found: Fitted) -> None:
        """Record a size that was chosen; said once for each work and device."""
        self._sink.publish(
            BatchFitted(
                **self._now(),
                work=found.work,
                device=found.device,
                shapes=found.shapes,
                samples=found.samples,
                size=found.size,
                why=found.why,
            )
        )
        if (found.work, found.device) not in self._fitted:
            self._fitted.add((found.work, found.device))
            self.note(told_size(found))

    def left_whole(self, work: str, why: str) -> None:
        """Say that passes are made of whole batches whatever memory there is, and why."""
        self.note(told_left(work, why))

    def read(self, what: str, value: float, cure: str) -> None:
        """Follow whether a figure is finite; the first time that it is not, the owner is warned.

        Args:
            what: The figure, as in :class:`NotFinite`.
            value: What was read.
            cure: What to do where it is not finite.
        """
        if not self.not_finite and math.isfinite(value):
            return  # the usual case
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

    def evaluated(
        self,
        measurement: Measurement,
        train_loss: float | None,
        work: Mapping[str, float] | None = None,
        parameters: int | None = None,
    ) -> None:
        """Record a reading of the gate split; of what is not finite the owner is warned.

        The loss recorded is that of the watch's part; what is not finite is told of any sample.

        Args:
            measurement: The reading.
            train_loss: Smoothed training loss; None where there is none.
            work: FLOPs of the run up to now, by category.
            parameters: Parameters of the model.
        """
        self.read("gate loss", measurement.loss, measurement.blame)
        for name, value in measurement.metrics.items():
            self.read(name, value, "evaluate returned it so; it is left out of the log")
        if not math.isfinite(measurement.loss):
            return
        metrics = {k: v for k, v in measurement.metrics.items() if math.isfinite(v)}
        known = None if train_loss is None or not math.isfinite(train_loss) else train_loss
        kept = Evaluation(
            update=self._updates(), gate_loss=measurement.told, train_loss=known, metrics=metrics
        )
        self.evaluations.append(kept)
        self._sink.publish(
            Evaluated(
                **self._now(),
                gate_loss=kept.gate_loss,
                train_loss=known,
                metrics=kept.metrics,
                work=None if work is None else dict(work),
                parameters=parameters,
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

    @contextlib.contextmanager
    def preparing(
        self, what: Preparation, site: str, blueprint: str, artifact_id: str = ""
    ) -> Iterator[None]:
        """Record what is done to a kernel in a block, at its end, however it ends.

        Args:
            what: What is done.
            site: Name of the layer.
            blueprint: Name of the kernel's blueprint.
            artifact_id: The sha256 of the kernel's bytes; empty where there are none yet.
        """
        is_done = False
        try:
            yield
            is_done = True
        finally:
            self._sink.publish(
                KernelPrepared(
                    **self._now(),
                    what=what,
                    site=site,
                    blueprint=blueprint,
                    artifact_id=artifact_id,
                    done=is_done,
                )
            )

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
                package=record.package,
            )
        )

    def trial_started(self, record: TrialRecord, *, arms: Sequence[str]) -> None:
        """Record a package that begins to train in a twin, and what trains beside it."""
        self._keep_trial(record)
        self._sink.publish(
            TrialStarted(
                **self._now(),
                package=record.package,
                grafts=record.grafts,
                sites=record.sites,
                blueprints=record.blueprints,
                parameters=record.parameters,
                trial_updates=record.trial_updates,
                arms=tuple(arms),
                attribution=record.attribution,
                level=record.level,
                memory_bytes=record.memory_bytes,
                null_adds=record.null_adds,
            )
        )

    def trial_read(self, record: TrialRecord) -> None:
        """Record the verdict on a package; what a clock or a meter read is left to the report."""
        self._keep_trial(record)
        why = f": {record.reason}" if record.reason else ""
        _LOG.info("package %d, %s%s", record.package, record.verdict, why)
        self._sink.publish(TrialRead(**self._now(), **_read_of(record)))

    def taken_over(self, record: TrialRecord, *, folded: bool) -> None:
        """Record that the live run took a twin's state over.

        Args:
            record: The package, with the gate losses around the switch.
            folded: Whether the package went into the host's own weights at once.
        """
        self._keep_trial(record)
        self.last_switch = self._updates()
        _LOG.info("package %d: the run goes on as its %s", record.package, record.taken)
        self._sink.publish(
            TakenOver(
                **self._now(),
                package=record.package,
                taken=record.taken,
                grafts=record.grafts,
                sites=record.sites,
                folded=folded,
                gate_loss_before=record.gate_loss_before,
                gate_loss_after=record.gate_loss_after,
            )
        )

    def passenger_removed(
        self, package: int, graft: Graft, *, rise: float, upper: float, allowed: float
    ) -> None:
        """Record a kernel that its package does as well without.

        Args:
            package: Number of the package.
            graft: The kernel's graft.
            rise: Cumulative rise of the gate loss with it and those before it switched off.
            upper: Upper end of the 95 % interval of ``rise``.
            allowed: What ``upper`` stayed below.
        """
        reason = (
            f"with it and the passengers before it off the gate loss rises by {rise:.3g}, at most "
            f"{upper:.3g} where {allowed:.3g} is allowed"
        )
        self._sink.publish(
            PassengerRemoved(
                **self._now(),
                package=package,
                graft=graft.number,
                site=graft.site,
                rise=rise,
                upper=upper,
                allowed=allowed,
                reason=reason,
            )
        )

    def package_rolled_back(self, record: TrialRecord, reason: str) -> None:
        """Record that the run went back to the switch of a package; what it cost is in the record.

        Args:
            record: The package, with the updates that are lost.
            reason: Why, in a sentence.
        """
        self._keep_trial(record)
        self._sink.publish(
            RolledBack(
                **self._now(),
                graft=0,
                package=record.package,
                updates_lost=record.updates_lost,
                reason=reason,
            )
        )

    def trial_changed(self, record: TrialRecord) -> None:
        """Keep what is known of a package now, of which no event tells: for the report."""
        self._keep_trial(record)

    def stage_woken(self, record: StageRecord) -> None:
        """Record a planned stage of depth: when it begins, and again when it is done or undone."""
        for place, known in enumerate(self.stages):
            if (known.path, known.started_at) == (record.path, record.started_at):
                self.stages[place] = record
                break
        else:
            self.stages.append(record)
        self.last_switch = self._updates()
        told = {f.name: getattr(record, f.name) for f in fields(record) if f.name != "more"}
        self._sink.publish(StageWoken(**self._now(), **told))

    def _keep_trial(self, record: TrialRecord) -> None:
        for place, known in enumerate(self.trials):
            if known.package == record.package:
                self.trials[place] = record
                return
        self.trials.append(record)

    def gate(self, graft: Graft, gate: Gate, verdict: GateVerdict) -> None:
        """Record a gate that was read for a kernel that was auditioned by itself."""
        self._sink.publish(
            GateRead(
                **self._now(),
                graft=graft.number,
                gate=gate,
                passed=verdict.passed,
                effect=verdict.effect,
                stderr=verdict.stderr,
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
        """Record the removal of one graft after its admission."""
        self._sink.publish(
            RolledBack(**self._now(), graft=graft.number, updates_lost=updates_lost, reason=reason)
        )

    def happened(self, event: Event) -> None:
        """Record what was told without its moment: by seeds, or by a source of kernels."""
        stamped = replace(event, **self._now())
        self.incidents.take(stamped)
        if isinstance(stamped, SeedMeasured):
            told = {f.name: getattr(stamped, f.name) for f in fields(SeedRecord) if f.name in _TOLD}
            self.seeds = with_seed(self.seeds, SeedRecord(**told))
        self._sink.publish(stamped)

    def hitched(self, hitch: Hitch) -> None:
        """Record that a registry did not do something: not yet, or for good."""
        if hitch.is_final:
            if hitch.operation == "report" and self._has_told_of_reports:
                return
            self._has_told_of_reports |= hitch.operation == "report"
            text = _FINAL[hitch.operation].format(digest=hitch.digest[:12], error=hitch.error)
            self.note(text)
            if hitch.operation == "fetch":
                self.happened(
                    KernelEmbargoed(
                        update=0, time_s=0.0, artifact_id=hitch.digest, reason=str(hitch.error)
                    )
                )
            return
        reason = f"{type(hitch.error).__name__}: {hitch.error}"
        self.happened(
            RegistryUnavailable(
                update=0,
                time_s=0.0,
                operation=hitch.operation,
                artifact_id=hitch.digest,
                reason=reason,
            )
        )

    def _now(self) -> _When:
        """Return the envelope of the next event; each event takes one."""
        seq = self._num_events
        self._num_events += 1
        return {
            "update": self._updates(),
            "time_s": self._clock.now() - self._start_s,
            "run_id": self.run_id,
            "seq": seq,
        }


_TOLD: Final = frozenset(f.name for f in fields(SeedRecord)) - {"more"}
_OF_A_READING: Final = tuple(
    f.name for f in fields(TrialRead) if f.name not in {g.name for g in fields(Event)}
)


def _read_of(record: TrialRecord) -> dict[str, Any]:
    """Return what a verdict's event says of a package; both name it alike."""
    return {name: getattr(record, name) for name in _OF_A_READING}
