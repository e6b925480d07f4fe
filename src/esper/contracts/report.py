"""What a run and the demo report, as frozen values with one JSON form each.

What follows from other fields is computed when the value is made, so that a report cannot
contradict itself; a reader of the JSON finds the results beside their sources.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final, Literal, get_args

from esper.contracts.intervals import Interval, mean_interval
from esper.contracts.lifecycle import GraftStage
from esper.contracts.progress import GraftStatus, ProgressRow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.choices import DepthVerdict, GraftVerdict

REPORT_FORMAT_VERSION: Final = 1

Arm = Literal["host", "grown", "random", "scratch"]
"""How a model of the demo was made."""
ARMS: Final[tuple[Arm, ...]] = get_args(Arm)

ControlKind = Literal["noop", "noise", "capacity_free", "random_features"]
"""A way to make a graft that does not deserve to stay."""
CONTROL_KINDS: Final[tuple[ControlKind, ...]] = get_args(ControlKind)

OPTIMISTIC: Final = "used for growing: optimistic"
ONE_RUN_EACH: Final = "One run each: another random seed may tell otherwise."


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One reading of the owner's measure on the gate split.

    Attributes:
        update: Optimizer updates done.
        gate_loss: Mean loss on the gate split; lower is better.
        train_loss: Smoothed training loss; None before the first.
        metrics: Whatever else ``evaluate`` returned, by name.
    """

    update: int
    gate_loss: float
    train_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NotFinite:
    """A figure of a run that was NaN or infinite for a while.

    Attributes:
        what: The figure: ``"gate loss"``, ``"training loss"``, or a metric's name.
        value: What it was first: ``"nan"``, ``"inf"`` or ``"-inf"``.
        since: Update at which it was first seen so.
        until: Update at which it was seen finite again; None while it was not.
    """

    what: str
    value: str
    since: int
    until: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GraftRecord:
    """One try to grow, from germination to verdict. Losses are those of the gate split.

    Attributes:
        graft: Number of the graft in its run, from 1.
        site: Dotted name of the layer.
        seed_idx: Slot in that layer.
        blueprint: Human name of the kernel's blueprint.
        artifact_id: The sha256 of the kernel's bytes; empty before it was compiled.
        stage: Where the graft is; ``fossilized`` and ``culled`` are final.
        verdict: What was decided, in a word or three; one of ``GraftVerdict``.
        reason: Why, in a sentence.
        parameters: Parameters of the kernel.
        germinated_at: Update at which the graft was chosen.
        admitted_at: Update at which it entered the model; None if it never did.
        decided_at: Update of the verdict; None while there is none.
        contribution: Gate loss of the twin minus that of the grown model; None if not measured.
        contribution_stderr: Standard error of ``contribution``, the twins' own spread included.
        dependence: Gate loss with the seed off minus with it on; None if not measured.
        host_only_contribution: As ``contribution``, against a twin that carries nothing.
        updates_lost: Updates that its removal cost.
        folded: Whether its weights went into the host's; None unless it is fossilized.
    """

    graft: int
    site: str
    seed_idx: int
    blueprint: str
    artifact_id: str
    stage: GraftStage
    verdict: GraftVerdict
    reason: str
    parameters: int
    germinated_at: int
    admitted_at: int | None = None
    decided_at: int | None = None
    contribution: float | None = None
    contribution_stderr: float | None = None
    dependence: float | None = None
    host_only_contribution: float | None = None
    updates_lost: int = 0
    folded: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """One planned stage of depth: blocks that slept and were woken. No gate decides about it.

    Attributes:
        path: Dotted name of the stack of blocks.
        depth: Blocks of it that are awake after the stage.
        blocks: Dotted names of those that it wakes.
        init: What a waking block begins with: ``"fresh"`` or ``"copy"``.
        started_at: Update at which it began.
        ramp_updates: Updates over which its blocks come in.
        ended_at: Update at which they were in, or asleep again; None before that.
        loss_before: Loss when it began; None where it was not read.
        loss_after: Loss at its end; None where it was not read.
        flops: FLOPs of the updates that were made at this depth; None where not counted.
        verdict: What became of it; one of ``DepthVerdict``.
        reason: Why, in a sentence.
    """

    path: str
    depth: int
    blocks: tuple[str, ...]
    init: str = "fresh"
    started_at: int
    ramp_updates: int
    ended_at: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    flops: float | None = None
    verdict: DepthVerdict = "waking"
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineEntry:
    """One change of stage.

    Attributes:
        update: Optimizer updates done.
        graft: Number of the graft in its run, from 1.
        site: Dotted name of the layer.
        blueprint: Human name of the kernel's blueprint.
        before: Stage that was left; None at germination.
        after: Stage that was entered.
        reason: Why, in a sentence.
    """

    update: int
    graft: int
    site: str
    blueprint: str
    before: GraftStage | None
    after: GraftStage
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AlphaPoint:
    """A graft's alpha from an update on.

    Attributes:
        update: Optimizer updates done.
        graft: Number of the graft in its run, from 1.
        alpha: Its share, in [0, 1].
    """

    update: int
    graft: int
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A run and the same job trained without growth, by one number each; lower is better.

    Attributes:
        measure: What the numbers are: ``"test loss"``, or ``"gate loss"`` without a test split.
        grown: Of the run that could grow.
        control: Of the run that could not.
    """

    measure: str
    grown: float
    control: float

    def __str__(self) -> str:
        saved = self.control - self.grown
        words = f"{abs(saved):.4g} {'less' if saved > 0 else 'more'}" if saved else "no difference"
        return (
            f"the {self.measure} was {self.grown:.4g} at the end with growth and "
            f"{self.control:.4g} without: {words}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What ``grower.report()`` returns: one run of growth.

    Attributes:
        settings: The effective values of every setting.
        updates: Optimizer updates done.
        evaluations: Those with a finite gate loss, in the order in which they were made.
        not_finite: What was NaN or infinite, and when, in order.
        grafts: In the order in which they germinated.
        timeline: Every change of stage, in order.
        alphas: Every change of alpha that was recorded, in order.
        stages: Planned stages of depth, in the order in which they began.
        work: Counted work by category, one forward of one sample being 1; ``"training"`` is the
            run's own, every other category was spent on growing.
        parameters_before: Parameters of the model when the run began.
        parameters_after: Parameters of the model now.
        test_metrics: Read once, at the end, on a split that growth never saw; empty without one.
        notes: Words to the owner.
        interrupted: Whether the run was stopped before its end.
        control: The same job trained without growth; None where it was not asked for.
        overhead_share: All work spent on growing over all work, in [0, 1].
        format_version: Of the JSON form.
    """

    settings: JsonObject
    updates: int
    evaluations: tuple[Evaluation, ...] = ()
    not_finite: tuple[NotFinite, ...] = ()
    grafts: tuple[GraftRecord, ...] = ()
    timeline: tuple[TimelineEntry, ...] = ()
    alphas: tuple[AlphaPoint, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    work: dict[str, float] = field(default_factory=dict)
    parameters_before: int
    parameters_after: int
    test_metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    control: RunReport | None = None
    overhead_share: float = field(init=False)
    format_version: int = REPORT_FORMAT_VERSION

    def __post_init__(self) -> None:
        total = sum(self.work.values())
        share = (total - self.work.get("training", 0.0)) / total if total else 0.0
        object.__setattr__(self, "overhead_share", share)

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
                GraftStatus(site=graft.site, seed_idx=graft.seed_idx, stage=graft.stage)
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
        measure = "test loss"
        if None in pairs:
            measure = "gate loss"
            pairs = (_last_gate_loss(self), _last_gate_loss(self.control))
        grown, control = pairs
        if grown is None or control is None:
            return None
        return Comparison(measure=measure, grown=grown, control=control)

    @property
    def optimistic(self) -> bool:
        """Whether every figure comes from data that growth itself was decided on."""
        return not self.test_metrics

    def to_json(self) -> str:
        """Return the report as JSON.

        Raises:
            ValueError: A number is not finite; what was not measured is None.
        """
        return _to_json(self)

    def __str__(self) -> str:
        return "\n".join(_run_lines(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmReport:
    """One arm of the demo over all random seeds that were completed.

    Attributes:
        accuracy: Percent on the test split, one per random seed.
        parameters_by_seed: Parameters of the final model, one per random seed.
        train_flops: FLOPs of one run, shadow passes, probes and twins included; mean.
        latency_us: Microseconds of one forward of the final model; mean.
        seconds: Wall-clock seconds of one run; mean.
        worst_dip_points: Largest fall of gate accuracy after a change, less that of the twin, in
            points, over all random seeds; None for an arm that changes nothing.
        accuracy_mean: Mean of ``accuracy``; None where it is empty.
        accuracy_std: Sample standard deviation of ``accuracy``; None with fewer than two.
        accuracy_interval: 95 % t interval of the mean.
        parameters: Mean of ``parameters_by_seed``; None where it is empty.
    """

    accuracy: tuple[float, ...]
    parameters_by_seed: tuple[int, ...]
    train_flops: float | None
    latency_us: float | None
    seconds: float | None
    worst_dip_points: float | None = None
    accuracy_mean: float | None = field(init=False)
    accuracy_std: float | None = field(init=False)
    accuracy_interval: Interval = field(init=False)
    parameters: float | None = field(init=False)

    def __post_init__(self) -> None:
        if len(self.accuracy) != len(self.parameters_by_seed):
            msg = (
                f"an arm has one accuracy and one parameter count per random seed; got "
                f"{len(self.accuracy)} and {len(self.parameters_by_seed)}"
            )
            raise ValueError(msg)
        interval = mean_interval(self.accuracy)
        std = statistics.stdev(self.accuracy) if len(self.accuracy) > 1 else None
        parameters = statistics.fmean(self.parameters_by_seed) if self.parameters_by_seed else None
        object.__setattr__(self, "accuracy_mean", interval.mean)
        object.__setattr__(self, "accuracy_std", std)
        object.__setattr__(self, "accuracy_interval", interval)
        object.__setattr__(self, "parameters", parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRun:
    """One arm at one random seed, looked at along the way.

    Attributes:
        arm: One of :data:`ARMS`.
        random_seed: Number that started the run's random generators.
        updates: Optimizer updates done at each look, rising.
        accuracy: Percent on the gate split, one per look.
        parameters: Parameters of the model, one per look.
        report: What the run's Grower reported; None for arms without one.
    """

    arm: Arm
    random_seed: int
    updates: tuple[int, ...]
    accuracy: tuple[float, ...]
    parameters: tuple[int, ...]
    report: RunReport | None = None

    def __post_init__(self) -> None:
        if not len(self.updates) == len(self.accuracy) == len(self.parameters):
            msg = (
                f"{self.arm} at random seed {self.random_seed} has {len(self.updates)} looks, "
                f"{len(self.accuracy)} accuracies and {len(self.parameters)} parameter counts; "
                "they must be as many"
            )
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlRow:
    """What became of one kind of control graft, none of which deserves to stay.

    Attributes:
        kind: One of :data:`CONTROL_KINDS`.
        tried: Grafts that were tried.
        admitted: Grafts that passed the admission gate.
        fossilized: Grafts that passed the fossilization gate as well.
        naive_accepted: Grafts that a naive on/off gate would have kept.
    """

    kind: ControlKind
    tried: int
    admitted: int
    fossilized: int
    naive_accepted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlsReport:
    """The controls, by kind, and the counts that are asked for most.

    Attributes:
        rows: One per kind that was tried.
        noop_fossilized: Null kernels that were made permanent.
        noise_fossilized: Kernels of noise that were made permanent.
        capacity_free_fossilized: Kernels of the host layer's own shape that were made permanent.
        random_features_fossilized: Frozen random kernels that were made permanent.
        naive_gate_accepted: Controls of any kind that a naive on/off gate would have kept.
    """

    rows: tuple[ControlRow, ...] = ()
    noop_fossilized: int = field(init=False)
    noise_fossilized: int = field(init=False)
    capacity_free_fossilized: int = field(init=False)
    random_features_fossilized: int = field(init=False)
    naive_gate_accepted: int = field(init=False)

    def __post_init__(self) -> None:
        for kind in CONTROL_KINDS:
            count = sum(row.fossilized for row in self.rows if row.kind == kind)
            object.__setattr__(self, f"{kind}_fossilized", count)
        accepted = sum(row.naive_accepted for row in self.rows)
        object.__setattr__(self, "naive_gate_accepted", accepted)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What ``esper demo`` found: the contents of ``report.json``.

    Attributes:
        random_seeds: Those that were completed, in the order of every list.
        updates: Optimizer updates of one run.
        arms: Results by arm, with the keys of :data:`ARMS`.
        controls: What became of the control grafts.
        ranking_spearman: Rank correlation of the ranking with the admission gain of every
            candidate after its shadow passes, in [-1, 1]; None if not measured.
        export_max_rel_diff: Largest relative difference between the grown model and its export
            read in a fresh process; None if not measured.
        dormant_identical: Whether the wrapped dormant host computed the bare one's very bits.
        environment: Versions, processor, threads and such.
        settings: The demo's own settings, where they differ from the defaults.
        runs: Every arm at every random seed.
        seconds: Wall-clock seconds of the whole demo.
        notes: Words to the reader.
        interrupted: Whether the demo was stopped before its end.
        grown_minus_host: Paired difference of test accuracies in points, 95 % interval.
        grown_minus_scratch: As ``grown_minus_host``.
        grown_minus_random: As ``grown_minus_host``.
        worst_dip_points: That of the grown arm.
        fossilized: Grafts of the grown arm that were made permanent, over all random seeds.
        culled: Grafts of the grown arm that were removed, over all random seeds.
        format_version: Of the JSON form.
    """

    random_seeds: tuple[int, ...]
    updates: int
    arms: dict[str, ArmReport]
    controls: ControlsReport
    ranking_spearman: float | None = None
    export_max_rel_diff: float | None = None
    dormant_identical: bool | None = None
    environment: JsonObject = field(default_factory=dict)
    settings: JsonObject = field(default_factory=dict)
    runs: tuple[ArmRun, ...] = ()
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    grown_minus_host: Interval = field(init=False)
    grown_minus_scratch: Interval = field(init=False)
    grown_minus_random: Interval = field(init=False)
    worst_dip_points: float | None = field(init=False)
    fossilized: int = field(init=False)
    culled: int = field(init=False)
    format_version: int = REPORT_FORMAT_VERSION

    def __post_init__(self) -> None:
        if set(self.arms) != set(ARMS):
            msg = f"a demo has the arms {', '.join(ARMS)}; got {', '.join(self.arms)}"
            raise ValueError(msg)
        grown = self.arms["grown"]
        for name in ("host", "scratch", "random"):
            difference = mean_interval(_differences(grown, self.arms[name], name))
            object.__setattr__(self, f"grown_minus_{name}", difference)
        object.__setattr__(self, "worst_dip_points", grown.worst_dip_points)
        stages = [graft.stage for _, graft in self.grafts("grown")]
        object.__setattr__(self, "fossilized", stages.count(GraftStage.FOSSILIZED))
        object.__setattr__(self, "culled", stages.count(GraftStage.CULLED))

    def runs_of(self, arm: str) -> list[ArmRun]:
        """Return the runs of one arm, in order."""
        return [run for run in self.runs if run.arm == arm]

    def grafts(self, arm: str) -> Iterator[tuple[int, GraftRecord]]:
        """Yield (random seed, graft) for every graft of one arm, in order."""
        for run in self.runs_of(arm):
            for graft in run.report.grafts if run.report else ():
                yield run.random_seed, graft

    def to_json(self) -> str:
        """Return the report as JSON, the text of ``report.json``.

        Raises:
            ValueError: A number is not finite; what was not measured is None.
        """
        return _to_json(self)


def _differences(grown: ArmReport, other: ArmReport, name: str) -> list[float]:
    if len(grown.accuracy) != len(other.accuracy):
        msg = (
            f"paired arms have the same random seeds; grown has {len(grown.accuracy)} accuracies "
            f"and {name} has {len(other.accuracy)}"
        )
        raise ValueError(msg)
    return [a - b for a, b in zip(grown.accuracy, other.accuracy, strict=True)]


def _to_json(report: RunReport | DemoReport) -> str:
    return json.dumps(asdict(report), indent=1, sort_keys=True, allow_nan=False) + "\n"


def _run_lines(report: RunReport) -> Iterator[str]:
    """Yield the report as plain text, a line at a time."""
    if report.interrupted:
        yield f"Stopped after {report.updates:,} updates, before the end of the run."
    share = f"{report.overhead_share:.1%} of the work was growing"
    if report.updates and not report.work.get("training"):
        share = "what share of the work was growing is not known, since no batch= was given"
    yield (
        f"{report.updates:,} updates, {report.parameters_before:,} parameters before and "
        f"{report.parameters_after:,} after; {share}."
    )
    yield from _loss_lines(report)
    if report.comparison is not None:
        hint = f" ({OPTIMISTIC})" if report.optimistic else ""
        found = str(report.comparison)
        yield f"Did it help? {found[0].upper()}{found[1:]}{hint}. {ONE_RUN_EACH}"
    yield f"Grafts: {len(report.grafts) or 'none'}"
    for graft in report.grafts:
        yield from _graft_lines(graft)
    for stage in report.stages:
        yield from _stage_lines(stage)
    for note in report.notes:
        yield f"Note: {note}"


def _last_gate_loss(report: RunReport) -> float | None:
    return report.evaluations[-1].gate_loss if report.evaluations else None


def _loss_lines(report: RunReport) -> Iterator[str]:
    hint = f" ({OPTIMISTIC})" if report.optimistic else ""
    lost = report.is_lost("gate loss")
    if report.evaluations:
        first, last = report.evaluations[0], report.evaluations[-1]
        if lost is None:
            end = f"{last.gate_loss:.4g} at the end"
        else:
            seen = f"{last.gate_loss:.4g} at update {last.update:,}"
            end = f"{lost.value} at the end (since update {lost.since:,}; the last finite: {seen})"
        yield f"Gate loss{hint}: {first.gate_loss:.4g} at first, {end}."
        for name in [name for name in first.metrics if name in last.metrics]:
            values = f"{first.metrics[name]:.4g} at first, {last.metrics[name]:.4g} at the end"
            yield f"Gate {name}{hint}: {values}."
    elif lost is not None:
        yield f"Gate loss{hint}: {lost.value} at first, {lost.value} at the end."
    for other in report.not_finite:
        if other.what != "gate loss" and other.until is None:
            name = other.what[0].upper() + other.what[1:]
            yield f"{name}: {other.value} at the end, since update {other.since:,}."
    for name, value in report.test_metrics.items():
        yield f"Test {name}: {value:.4g}"


def _stage_lines(stage: StageRecord) -> Iterator[str]:
    end = "" if stage.ended_at is None else f", done at update {stage.ended_at:,}"
    yield (
        f"Depth {stage.depth} of {stage.path} from update {stage.started_at:,}{end}: "
        f"{stage.verdict} ({stage.reason})"
    )
    losses = [f"{loss:.4g}" for loss in (stage.loss_before, stage.loss_after) if loss is not None]
    known = [f"training loss {' to '.join(losses)}"] if losses else []
    known += [] if stage.flops is None else [f"{stage.flops:.3g} FLOPs at this depth"]
    if known:
        yield f"     {', '.join(known)}"


def _graft_lines(graft: GraftRecord) -> Iterator[str]:
    yield (
        f"  {graft.graft}. {graft.blueprint} at {graft.site}, {graft.parameters:,} parameters: "
        f"{graft.verdict} ({graft.reason})"
    )
    measured = {
        "contribution": graft.contribution,
        "against the host alone": graft.host_only_contribution,
        "dependence": graft.dependence,
    }
    known = [f"{name} {value:+.4g}" for name, value in measured.items() if value is not None]
    if known:
        yield f"     loss saved: {', '.join(known)}"
    if graft.updates_lost:
        yield f"     its removal cost {graft.updates_lost:,} updates"
