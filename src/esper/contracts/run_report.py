"""A run of growth as a value, and what it says of itself in words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from esper.contracts.errors import EsperError
from esper.contracts.lifecycle import GraftStage
from esper.contracts.progress import GraftStatus, ProgressRow
from esper.contracts.report_text import (
    ONE_RUN_EACH,
    OPTIMISTIC,
    WORDS,
    counted,
    flops_text,
    graft_lines,
    in_brackets,
    of_packages,
    of_single_grafts,
    of_stages,
    of_untried,
    registry_lines,
    stage_text,
    trial_lines,
    with_error,
)
from esper.contracts.run_records import Comparison
from esper.contracts.value_json import Extensible, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.choices import Goal, WorkUnit
    from esper.contracts.run_records import (
        AlphaPoint,
        Evaluation,
        GraftRecord,
        IncidentRecord,
        NotFinite,
        SeedRecord,
        SiteRecord,
        StageRecord,
        TimelineEntry,
        TrialRecord,
    )

REPORT_FORMAT_VERSION: Final = "1.1"

_UNNEEDED: Final = (
    "Whether the run needed a graft nobody measured: {cure}esper grow --control trains the same "
    "job without growth."
)
_CURES: Final = {
    "shadow": 'trial="twin" holds a package against the run itself, and ',
    "none": 'attribution="trial" tells capacity from treatment, and ',
}
"""What would have measured it, by the setting that kept it from being measured."""
_UNMEASURED_END: Final = (
    "What growth brought by the end of the run nobody measured: esper grow --control trains the "
    "same job without growth."
)
_NEVER_COMPARED: Final = (
    "Nothing here was compared with a network of the final size trained from scratch, nor with a "
    "random choice of site and kernel."
)


class ReportDrawer(Protocol):
    """Draws reports for a notebook."""

    def html(self, report: RunReport) -> str:
        """Return a report as a piece of HTML that stands by itself."""
        ...

    def plot(self, report: RunReport, axes: Any = None) -> Any:
        """Draw the losses of a report on matplotlib's axes, its own where None, and return them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport(Extensible):
    """What ``grower.report()`` returns: one run of growth.

    Attributes:
        settings: The effective values of every setting.
        updates: Optimizer updates done.
        evaluations: Those with a finite gate loss, in the order in which they were made.
        not_finite: What was NaN or infinite, and when, in order.
        incidents: What went wrong with seeds and with sources of kernels, and came right again, as
            the events tell it; one for each thing that did, in the order in which it first did.
        sites: The layers with seeds, in the model's order; empty in files that do not tell them.
        seeds: How each seed that contributed was doing, when that was last told: at every 100th
            update.
        grafts: In the order in which they germinated.
        timeline: Every change of stage, in order.
        alphas: Every change of alpha that was recorded, in order.
        trials: Packages, in the order in which they were tried.
        stages: Planned stages of depth, in order.
        work: Counted work by category, in ``work_unit``; ``"training"`` is the run's own, every
            other category was spent on growing.
        work_unit: FLOPs of what was executed, or forwards of one sample as in files of format 1.
        seconds: Wall time by the same categories.
        overhead_limit: FLOPs that growing may take in all; None where it is not known.
        parameters_before: Parameters of the model when the run began; None where only a log was
            read that does not tell them.
        parameters_after: Parameters of the model now; None likewise.
        test_metrics: Read once, at the end, on a split that growth never saw; empty without one.
        notes: Words to the owner.
        interrupted: Whether the run was stopped before its end.
        control: The same job trained without growth; None where it was not asked for.
        run_id: Names the run among all runs, as in its events; empty where it has no name.
        end_capacity: Fall of the gate loss at the end of the run against a run that trained on
            with the linear package; None unless ``attribution="run"``.
        end_capacity_stderr: Standard error of ``end_capacity``.
        end_capacity_shown: Whether ``end_capacity`` passed the test.
        overhead_share: All work that is not training over training, at least 0; in files of format
            1 over all work, in [0, 1].
        format_version: Of the JSON form.
    """

    settings: JsonObject
    updates: int
    evaluations: tuple[Evaluation, ...] = ()
    not_finite: tuple[NotFinite, ...] = ()
    grafts: tuple[GraftRecord, ...] = ()
    timeline: tuple[TimelineEntry, ...] = ()
    alphas: tuple[AlphaPoint, ...] = ()
    trials: tuple[TrialRecord, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    work: dict[str, float] = field(default_factory=dict)
    work_unit: WorkUnit = "flops"
    seconds: dict[str, float] = field(default_factory=dict)
    overhead_limit: float | None = None
    parameters_before: int | None = None
    parameters_after: int | None = None
    test_metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    incidents: tuple[IncidentRecord, ...] = ()
    sites: tuple[SiteRecord, ...] = ()
    seeds: tuple[SeedRecord, ...] = ()
    control: RunReport | None = None
    run_id: str = ""
    end_capacity: float | None = None
    end_capacity_stderr: float | None = None
    end_capacity_shown: bool | None = None
    overhead_share: float = field(init=False)
    format_version: str = REPORT_FORMAT_VERSION
    drawer: ClassVar[ReportDrawer | None] = None
    """What draws reports; importing ``esper.observability.notebook`` puts it here, since a contract
    knows no picture."""

    def __post_init__(self) -> None:
        training = self.work.get("training", 0.0)
        base = training if self.work_unit == "flops" else sum(self.work.values())
        object.__setattr__(self, "overhead_share", self.overhead / base if base else 0.0)

    @property
    def overhead(self) -> float:
        """All work that was spent on growing, in ``work_unit``."""
        return sum(work for category, work in self.work.items() if category != "training")

    def progress_row(self, name: str = "run") -> ProgressRow:
        """Return where the run is, as it was told while it went on.

        Args:
            name: What runs.
        """
        last = self.evaluations[-1] if self.evaluations else None
        return ProgressRow(
            name=name,
            update=self.updates,
            gate_loss=self._gate_loss_now(),
            train_loss=None if last is None else last.train_loss,
            metrics={} if last is None else last.metrics,
            parameters=self.parameters_after,
            grafts=tuple(
                GraftStatus(
                    site=graft.site,
                    seed_idx=graft.seed_idx,
                    stage=graft.stage,
                    package=graft.package,
                )
                for graft in self.grafts
                if graft.decided_at is None
            ),
        )

    def is_lost(self, what: str) -> NotFinite | None:
        """Return since when a figure has not been finite; None where it is, or was never read.

        Args:
            what: As in :class:`NotFinite`.
        """
        return next((n for n in self.not_finite if n.what == what and n.until is None), None)

    def _gate_loss_now(self) -> float | None:
        lost = self.is_lost("gate loss")
        if lost is not None:
            return float(lost.value)
        return self.evaluations[-1].gate_loss if self.evaluations else None

    @property
    def comparison(self) -> Comparison | None:
        """The end of this run beside that of its control; None without one that was measured."""
        if self.control is None:
            return None
        pairs = (self.test_metrics.get("loss"), self.control.test_metrics.get("loss"))
        split = "test"
        if None in pairs:
            split, pairs = "gate", (_last_gate_measure(self), _last_gate_measure(self.control))
        grown, control = pairs
        if grown is None or control is None:
            return None
        goal: Goal = "max" if self.settings.get("goal") == "max" else "min"
        measure = f"{split} {'loss' if goal == 'min' else 'measure'}"
        return Comparison(measure=measure, grown=grown, control=control, goal=goal)

    @property
    def optimistic(self) -> bool:
        """Whether every figure comes from data that growth itself was decided on."""
        return not self.test_metrics

    def plot(self, axes: Any = None) -> Any:
        """Draw the losses over the updates, marked where something grew or left.

        Args:
            axes: Of matplotlib, to draw on; None makes a figure of its own.

        Returns:
            The axes; ``axes.figure`` is the figure.

        Raises:
            ImportError: matplotlib cannot be imported; the extra ``plot`` brings it.
            EsperError: Nothing that draws was imported.
        """
        if self.drawer is None:
            msg = "nothing that draws a report is there; import esper.observability.notebook first"
            raise EsperError(msg)
        return self.drawer.plot(self, axes)

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows, or None, so that it shows the text."""
        return None if self.drawer is None else self.drawer.html(self)

    def to_json(self) -> str:
        """Return the report as JSON.

        Raises:
            ValueError: A number is not finite; what was not measured is None.
        """
        return text_of(self, indent=1) + "\n"

    def __str__(self) -> str:
        return "\n".join(run_lines(self))


def _last_gate_measure(report: RunReport) -> float | None:
    """Return the last reading of the gate split in the owner's unit, as a loss is kept."""
    sign = -1.0 if report.settings.get("goal") == "max" else 1.0
    return sign * report.evaluations[-1].gate_loss if report.evaluations else None


def headline(report: RunReport) -> str:
    """Return whether it helped, what was kept, what that was held against, and what it did beat.

    It is what terminal, page and ``str(report)`` say, word for word. Only what was met is counted:
    a package whose verdict was read, a kernel that came to a gate.
    """
    return " ".join(headline_sentences(report))


def headline_sentences(report: RunReport) -> list[str]:
    """Return the sentences of the headline, for a page that sets the first one larger."""
    packages = of_packages(
        report.trials,
        report.grafts,
        optimistic=report.optimistic,
        interrupted=report.interrupted,
    )
    single = of_single_grafts(report.grafts, had_twins=report.settings.get("verify") == "fork")
    untried = of_untried(report.trials, report.grafts)
    told = [*packages, *untried, *single, *of_stages(report.stages)]
    if not told:
        told = ["Growth tried nothing here, so there is nothing that it beat."]
    return [*_did_it_help(report), *told, *_of_the_end(report)]


def _did_it_help(report: RunReport) -> Iterator[str]:
    """Answer by yes or no where the same job was trained without growth, as far as that tells."""
    found = report.comparison
    if found is None:
        return
    least = report.settings.get("min_effect")
    answer = found.answer(least if isinstance(least, float) else 0.0)
    if answer == "Yes" and found.is_of_gate:
        answer = "Not shown"
    yield f"Did it help? {answer}: {found}{_hint_of(found)}."
    yield ONE_RUN_EACH


def _of_the_end(report: RunReport) -> Iterator[str]:
    """Say what the whole run was compared with, and what nobody measured."""
    inside = _inside(report)
    alone = [
        graft
        for graft in report.grafts
        if graft.package is None
        and graft.admitted_at is not None
        and graft.stage is not GraftStage.CULLED
    ]
    if report.end_capacity is not None:
        yield _end_capacity(report)
    if (inside or alone) and report.end_capacity is None and report.comparison is None:
        met_a_null = any(trial.capacity_shown is not None for trial in inside)
        met_a_twin = any(graft.contribution is not None for graft in alone)
        yield _UNMEASURED_END if met_a_null or met_a_twin else _unneeded(report)
    if report.trials or report.grafts:
        yield _NEVER_COMPARED


def _inside(report: RunReport) -> list[TrialRecord]:
    """Return the packages that are in the model."""
    return [trial for trial in report.trials if trial.verdict in ("kept", "taken over")]


def _unneeded(report: RunReport) -> str:
    settings = report.settings
    kept_from = "shadow" if settings.get("trial") == "shadow" else settings.get("attribution")
    return _UNNEEDED.format(cure=_CURES.get(str(kept_from), ""))


def _end_capacity(report: RunReport) -> str:
    found = with_error(report.end_capacity, report.end_capacity_stderr)
    last = "last " if len(_inside(report)) > 1 else ""
    null = f"the {last}package made linear"
    if report.end_capacity_shown:
        return f"At the end of the run it beat {null} by {found}{_hint(report)}."
    return f"At the end of the run it was not shown to beat {null} ({found}{_hint(report)})."


def words_for(report: RunReport) -> dict[str, str]:
    """Return the words that a report uses and that need others to be understood."""
    single = any(graft.dependence is not None for graft in report.grafts)
    shown = set(WORDS) if report.trials else ({"dependence"} if single else set())
    return {word: text for word, text in WORDS.items() if word in shown}


def work_text(report: RunReport) -> str:
    """Say what growing took of a run, in FLOPs and in time, without an end mark."""
    if not report.work:
        return "what growing took is not known"
    if report.updates and not report.work.get("training"):
        if report.stages:
            return _work_beside_stages(report)
        return "what share of the work was growing is not known, since no batch= was given"
    if report.work_unit == "passes":
        return f"{report.overhead_share:.1%} of the work was growing"
    limit = report.overhead_limit
    most = "" if limit is None else f" of at most {flops_text(limit)}"
    took = (
        f"growing took {flops_text(report.overhead)}{most}, {report.overhead_share:.1%} of what "
        f"training did{in_brackets(beyond_limit(report))}"
    )
    training = report.seconds.get("training")
    if training is None:
        return took
    return f"{took}, and {sum(report.seconds.values()) - training:,.1f} s beside {training:,.1f} s"


def _work_beside_stages(report: RunReport) -> str:
    """Say what is known where stages alone tell what training took."""
    known = any(stage.flops is not None for stage in report.stages)
    training = "are told stage by stage" if known else "were not counted"
    took = flops_text(report.overhead) if report.overhead else "no FLOPs"
    return f"growing took {took} beside the training, whose FLOPs {training}"


def beyond_limit(report: RunReport) -> str:
    """Say what is spent whatever the limit, where growing took more than that; else nothing."""
    limit = report.overhead_limit
    if report.work_unit == "passes" or limit is None or report.overhead <= limit:
        return ""
    return (
        "whatever the limit, the first pass, update of a twin and reading are made, which tell "
        "what things take, and the ranking of each suggest()"
    )


def run_lines(report: RunReport) -> Iterator[str]:
    """Yield a run as plain text, a line at a time; the headline is the first of a whole run."""
    if report.interrupted:
        yield f"Stopped after {report.updates:,} updates, before the end of the run."
    yield headline(report)
    yield f"{report.updates:,} updates{_sizes_text(report)}; {work_text(report)}."
    yield from _loss_lines(report)
    yield from _parts_lines(report)
    if report.incidents:
        yield f"Faults and health: {len(report.incidents)}"
        yield from map(_incident_line, report.incidents)
    yield from (f"Note: {note}" for note in report.notes)


def _incident_line(incident: IncidentRecord) -> str:
    when = f"update {incident.since:,}"
    if incident.last != incident.since:
        when = f"updates {incident.since:,} to {incident.last:,}"
    times = f", {incident.times:,} times" if incident.times > 1 else ""
    where = f", {incident.where}" if incident.where else ""
    return f"  {when}{where}{times}: {incident.text}"


def _sizes_text(report: RunReport) -> str:
    before, after = report.parameters_before, report.parameters_after
    if before is None or after is None:
        return ""
    return f", {before:,} parameters before and {after:,} after"


def _hint(report: RunReport) -> str:
    return in_brackets(OPTIMISTIC if report.optimistic else "")


def _hint_of(comparison: Comparison) -> str:
    return in_brackets(OPTIMISTIC if comparison.is_of_gate else "")


def _loss_lines(report: RunReport) -> Iterator[str]:
    hint, lost = _hint(report), report.is_lost("gate loss")
    if report.evaluations:
        first, last = report.evaluations[0], report.evaluations[-1]
        what, sign = ("measure", -1.0) if report.settings.get("goal") == "max" else ("loss", 1.0)
        begin, end = _when(first, report), _when(last, report)
        found = f"{sign * last.gate_loss:.4g} {end}"
        if lost is not None:
            seen = f"{sign * last.gate_loss:.4g} at update {last.update:,}"
            found = (
                f"{lost.value} at the end (since update {lost.since:,}; the last finite: {seen})"
            )
        higher = ", higher is better" if sign < 0 else ""
        yield f"Gate {what}{hint}{higher}: {sign * first.gate_loss:.4g} {begin}, {found}."
        for name in [name for name in first.metrics if name in last.metrics]:
            values = f"{first.metrics[name]:.4g} {begin}, {last.metrics[name]:.4g} {end}"
            yield f"Gate {name}{hint}: {values}."
    elif lost is not None:
        yield f"Gate loss{hint}: {lost.value} at first, {lost.value} at the end."
    for other in report.not_finite:
        if other.what != "gate loss" and other.until is None:
            name = other.what[0].upper() + other.what[1:]
            yield f"{name}: {other.value} at the end, since update {other.since:,}."
    for name, value in report.test_metrics.items():
        yield f"Test {name}: {value:.4g}"


def _when(evaluation: Evaluation, report: RunReport) -> str:
    """Say when an evaluation was made: at first, at the end, or else at which update."""
    if evaluation.update <= 1:
        return "at first"
    if evaluation.update == report.updates:
        return "at the end"
    is_last = evaluation is report.evaluations[-1]
    return f"at update {evaluation.update:,}{', which was looked at last' if is_last else ''}"


def _parts_lines(report: RunReport) -> Iterator[str]:
    """Yield trials, grafts and stages, and then the words that they use."""
    if report.trials:
        yield f"Trials: {counted(len(report.trials), 'package')}"
        for trial in report.trials:
            yield from trial_lines(trial, OPTIMISTIC if report.optimistic else "")
    if report.grafts or not report.stages:
        yield f"Grafts: {len(report.grafts) or 'none'}"
        for graft in report.grafts:
            yield from graft_lines(graft)
        yield from registry_lines(report.grafts)
    if report.stages:
        yield f"Stages of depth: {len(report.stages)}"
        for stage in report.stages:
            work = "" if stage.flops is None else f", {flops_text(stage.flops)} at that depth"
            yield f"  update {stage.started_at:,}, {stage.path}: {stage_text(stage)}{work}"
    words = words_for(report)
    if words:
        yield "Words:"
        yield from (f"  {word}: {text}" for word, text in words.items())
