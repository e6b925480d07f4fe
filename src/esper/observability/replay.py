"""A run put together again from the events of its log, as its report tells it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, final

from esper.contracts.events import (
    STOPPED,
    AlphaChanged,
    Evaluated,
    Event,
    Fossilized,
    GateRead,
    Noted,
    PassengerRemoved,
    Ranked,
    RolledBack,
    RunEnded,
    RunStarted,
    SeedMeasured,
    StageChanged,
    StageWoken,
    TakenOver,
    TrialRead,
    TrialStarted,
    UnknownEvent,
)
from esper.contracts.incidents import Incidents
from esper.contracts.lifecycle import GraftStage
from esper.contracts.report import (
    AlphaPoint,
    Evaluation,
    GraftRecord,
    RunReport,
    SeedRecord,
    SiteRecord,
    StageRecord,
    TimelineEntry,
    TrialRecord,
)
from esper.contracts.run_records import with_seed
from esper.observability.event_log import ReplayedSeed, replay_structure

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.choices import GraftVerdict

NOT_IN_A_LOG: Final = {
    "RunReport": (
        "not_finite",
        "seconds",
        "overhead_limit",
        "test_metrics",
        "control",
        "end_capacity",
        "end_capacity_stderr",
        "end_capacity_shown",
    ),
    "GraftRecord": ("dependence",),
    "TrialRecord": ("seconds", "memory_peak_bytes"),
    "StageRecord": ("flops",),
}
"""Fields of a report that no event tells, by class; ``parameters`` of a graft is told where it was
ranked or is the only kernel of its package, ``flops`` of a stage up to the end of its ramp."""

ABSENT: Final = (
    "Not in a log: wall time by work, the test split, a control, what is read at the end of a run, "
    "how much the model leans on a kernel, and since when a figure was not finite. report.json of "
    "the same run has them."
)
"""The same in words."""

_FINAL: Final = (GraftStage.FOSSILIZED, GraftStage.CULLED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a log says of its run.

    Attributes:
        report: As ``report.json`` would be, with what no event tells left out: ``NOT_IN_A_LOG``.
        structure: The seeds that are in the model at the log's end, by site, by slot.
    """

    report: RunReport
    structure: dict[str, list[ReplayedSeed]]


def replay(events: Sequence[Event]) -> Replayed:
    """Put a run together again from its events.

    What is odd about a log is a note of the report: that it ends before its run did, lacks events
    in between, begins in the middle of a run, or has kinds that are not known.

    Args:
        events: Of one run, in order, as :func:`~esper.observability.event_log.read_events` gives
            them.

    Raises:
        ValueError: There is no event.
    """
    if not events:
        msg = "the log has no event: nothing had happened when it ended, so nothing can be replayed"
        raise ValueError(msg)
    course = Course()
    for event in events:
        course.take(event)
    return Replayed(
        report=course.report(oddities=tuple(oddities(events))),
        structure=replay_structure(events),
    )


def oddities(events: Sequence[Event], *, goes_on: bool = False) -> Iterable[str]:
    """Say what of the run its log cannot tell, though logs do.

    Args:
        events: Of the log, at least one.
        goes_on: Whether a run without an end is under way, which is not odd.
    """
    last = events[-1]
    if not goes_on and not isinstance(last, RunEnded):
        yield (
            f"the log ends at update {last.update:,} without the end of its run, which was killed "
            "or goes on"
        )
    lost = events[0].seq + sum(
        max(0, after.seq - before.seq - 1) for before, after in pairwise(events)
    )
    if lost:
        yield f"the log lacks {lost:,} of its run's events, which could not be written"
    unknown = Counter(event.kind for event in events if isinstance(event, UnknownEvent))
    for kind, count in unknown.items():
        yield (
            f"{count:,} of the log's events are of a kind that this Esper does not know, {kind!r}, "
            "and change nothing here"
        )


@final
class Course:
    """Follows a run through its events, one at a time.

    Attributes:
        last: The event that was taken last; None before the first.
    """

    def __init__(self) -> None:
        self.last: Event | None = None
        self._settings: JsonObject = {}
        self._sites: tuple[SiteRecord, ...] = ()
        self._evaluations: list[Evaluation] = []
        self._grafts: dict[int, GraftRecord] = {}
        self._timeline: list[TimelineEntry] = []
        self._alphas: list[AlphaPoint] = []
        self._trials: dict[int, TrialRecord] = {}
        self._stages: dict[tuple[str, int], StageRecord] = {}
        self._notes: list[str] = []
        self._incidents = Incidents()
        self._sizes: dict[tuple[str, str], int] = {}
        self._work: dict[str, float] = {}
        self._refused: set[int] = set()
        self._lost: dict[int, int] = {}
        self._seeds: tuple[SeedRecord, ...] = ()
        self._begun_with: int | None = None
        self._parameters: int | None = None

    def take(self, event: Event) -> None:  # noqa: C901 - a table of kinds, one line each
        """Follow one event; those that no part of a report comes from are passed over."""
        self.last = event
        self._incidents.take(event)
        self._count(event)
        match event:
            case RunStarted():
                self._settings = event.settings
                self._sites = tuple(map(_site, event.sites))
            case SeedMeasured():
                self._seeds = with_seed(self._seeds, _same_fields(SeedRecord, event))
            case Evaluated():
                self._evaluations.append(_same_fields(Evaluation, event))
            case Ranked():
                self._learn_sizes(event)
            case StageChanged():
                self._change_stage(event)
            case GateRead() if not event.passed:
                self._refused.add(event.graft)
            case AlphaChanged():
                self._alphas.append(_same_fields(AlphaPoint, event))
            case Fossilized():
                self._change(event.graft, folded=event.folded)
            case PassengerRemoved():
                self._change(event.graft, verdict="removed as a passenger")
            case RolledBack():
                self._roll_back(event)
            case TrialStarted():
                self._start_trial(event)
            case TrialRead():
                known = {"package", *_OF_EVERY_EVENT}
                read = {
                    f.name: getattr(event, f.name) for f in fields(event) if f.name not in known
                }
                self._change_trial(event.package, decided_at=event.update, **read)
            case TakenOver():
                self._take_over(event)
            case StageWoken():
                self._stages[event.path, event.started_at] = _same_fields(StageRecord, event)
            case Noted() if event.text not in self._notes:
                self._notes.append(event.text)

    def _count(self, event: Event) -> None:
        """Keep what the run took, and has, up to an event that tells it."""
        if isinstance(event, RunStarted):
            self._begun_with = self._parameters = event.parameters
        elif isinstance(event, (Evaluated, RunEnded)):
            self._work = event.work or self._work
            self._parameters = event.parameters or self._parameters

    @property
    def elapsed_s(self) -> float | None:
        """Seconds from the run's start to its last event; None before the first."""
        return None if self.last is None else self.last.time_s

    @property
    def has_ended(self) -> bool:
        """Whether the run said that it was over."""
        return isinstance(self.last, RunEnded)

    def report(
        self, *, updates: int | None = None, oddities: tuple[str, ...] = (), goes_on: bool = False
    ) -> RunReport:
        """Return the run as it was at the last event.

        Args:
            updates: Updates that had been done; None for those of the last event.
            oddities: Notes on the log.
            goes_on: Whether a run without an end is under way, and was not stopped.
        """
        last = self.last
        is_cut = not isinstance(last, RunEnded)
        was_stopped = isinstance(last, RunEnded) and last.reason == STOPPED
        done = 0 if last is None else last.update
        return RunReport(
            settings=self._settings,
            run_id="" if last is None else last.run_id,
            updates=done if updates is None else updates,
            evaluations=tuple(self._evaluations),
            grafts=tuple(self._grafts.values()),
            timeline=tuple(self._timeline),
            alphas=tuple(self._alphas),
            trials=tuple(self._trials.values()),
            stages=tuple(self._stages.values()),
            notes=(*self._notes, *oddities),
            incidents=self._incidents.records,
            sites=self._sites,
            seeds=self._seeds,
            work=self._work,
            parameters_before=self._begun_with,
            parameters_after=self._parameters,
            interrupted=was_stopped or (is_cut and not goes_on),
        )

    def _learn_sizes(self, event: Ranked) -> None:
        for row in event.rows:
            size = row.get("parameters")
            if isinstance(size, int):
                self._sizes[str(row.get("site")), str(row.get("blueprint"))] = size

    def _change_stage(self, event: StageChanged) -> None:
        self._timeline.append(_same_fields(TimelineEntry, event, before=event.before or None))
        known = self._grafts.get(event.graft) or self._germinated(event)
        joins = event.after in (GraftStage.BLENDING, GraftStage.HOLDING)
        changed = replace(
            known,
            stage=event.after,
            reason=event.reason,
            blueprint=event.blueprint,
            admitted_at=event.update if joins and known.admitted_at is None else known.admitted_at,
        )
        if event.after in _FINAL:
            changed = replace(
                changed,
                decided_at=event.update,
                verdict=self._verdict(event, known),
                updates_lost=self._lost.get(event.graft, 0),
            )
        self._grafts[event.graft] = changed
        self._end_trial(event)

    def _germinated(self, event: StageChanged) -> GraftRecord:
        return GraftRecord(
            graft=event.graft,
            site=event.site,
            seed_idx=event.seed_idx,
            blueprint=event.blueprint,
            artifact_id=event.artifact_id,
            stage=event.after,
            verdict="in progress",
            reason=event.reason,
            parameters=self._sizes.get((event.site, event.blueprint)),
            germinated_at=event.update,
            package=event.package,
        )

    def _verdict(self, event: StageChanged, known: GraftRecord) -> GraftVerdict:
        """Return what a final stage means, by the one before and by what was read of the graft."""
        if event.after is GraftStage.FOSSILIZED:
            return "fossilized"
        if event.package is None:
            if event.before in (GraftStage.BLENDING, GraftStage.HOLDING):
                return "culled after admission"
            return "culled at admission" if event.graft in self._refused else "culled in audition"
        if known.verdict == "removed as a passenger":
            return known.verdict
        return "rolled back" if event.before is GraftStage.HOLDING else "refused in trial"

    def _end_trial(self, event: StageChanged) -> None:
        """Say of a package that was dropped, or whose kernels have all come to their ends, so."""
        trial = self._trials.get(event.package or 0)
        if trial is None or event.after not in _FINAL:
            return
        if trial.verdict == "in trial":
            self._change_trial(trial.package, verdict="refused", reason=event.reason)
        ends = [self._grafts[graft].verdict for graft in trial.grafts if graft in self._grafts]
        if trial.taken and {*ends} <= {"fossilized", "removed as a passenger"}:
            self._change_trial(trial.package, verdict="kept")

    def _start_trial(self, event: TrialStarted) -> None:
        self._trials[event.package] = _same_fields(TrialRecord, event, started_at=event.update)
        if len(event.grafts) == 1:
            self._change(event.grafts[0], parameters=event.parameters)

    def _take_over(self, event: TakenOver) -> None:
        self._change_trial(
            event.package,
            taken=event.taken,
            gate_loss_before=event.gate_loss_before,
            gate_loss_after=event.gate_loss_after,
        )

    def _roll_back(self, event: RolledBack) -> None:
        if event.package is None:
            self._lost[event.graft] = event.updates_lost
            return
        gone = {"verdict": "rolled back", "updates_lost": event.updates_lost}
        self._change_trial(event.package, reason=event.reason, **gone)
        trial = self._trials.get(event.package)
        for graft in () if trial is None else trial.grafts:
            self._change(graft, **gone)

    def _change(self, graft: int, **changes: Any) -> None:
        if graft in self._grafts:
            self._grafts[graft] = replace(self._grafts[graft], **changes)

    def _change_trial(self, package: int, **changes: Any) -> None:
        if package in self._trials:
            self._trials[package] = replace(self._trials[package], **changes)


def _site(row: JsonObject) -> SiteRecord:
    """Return a layer as its run's first event tells it, what a newer Esper says of it left out."""
    named = {f.name for f in fields(SiteRecord)} - {"more"}
    return SiteRecord(**{name: value for name, value in row.items() if name in named})  # type: ignore[arg-type] # JSON


_OF_EVERY_EVENT: Final = frozenset(f.name for f in fields(Event))


def _own_fields(event: TrialRead) -> dict[str, Any]:
    """Return what a verdict says of its package, which a record says under the same names."""
    passed_over = {"package", *_OF_EVERY_EVENT}
    return {f.name: getattr(event, f.name) for f in fields(event) if f.name not in passed_over}


def _same_fields(cls: type[Any], event: Event, **other: Any) -> Any:
    """Return a record of the fields that an event has under the same names."""
    named = {f.name for f in fields(cls)} - {"more"}
    shared = {f.name: getattr(event, f.name) for f in fields(event) if f.name in named}
    return cls(**{**shared, **other})
