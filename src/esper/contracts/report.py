"""What a run and the demo report, as frozen values with one JSON form each.

What follows from other fields is computed when the value is made, so that a report cannot
contradict itself; a reader of the JSON finds the results beside their sources. What a run says in
words is in ``report_text``.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, get_args

from esper.contracts.intervals import Interval, mean_interval
from esper.contracts.lifecycle import GraftStage
from esper.contracts.progress import GraftStatus, ProgressRow
from esper.contracts.value_json import (
    WHERE_KNOWN,
    Extensible,
    is_newer,
    items,
    members,
    text_of,
    value_from,
    version_to_write,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.choices import (
        Attribution,
        DepthVerdict,
        GraftVerdict,
        Taken,
        TrialVerdict,
        WorkUnit,
    )
    from esper.contracts.value_json import Parts, Reader

REPORT_FORMAT_VERSION: Final = "1.1"

Arm = Literal["host", "grown", "random", "scratch"]
"""How a model of the demo was made."""
ARMS: Final[tuple[Arm, ...]] = get_args(Arm)

ControlKind = Literal["noop", "noise", "capacity_free", "random_features"]
"""A way to make a graft that does not deserve to stay."""
CONTROL_KINDS: Final[tuple[ControlKind, ...]] = get_args(ControlKind)

OPTIMISTIC: Final = "used for growing: optimistic"
ONE_RUN_EACH: Final = "One run each: another random seed may tell otherwise."

BEYOND_LUCK: Final = 1.645
"""Standard errors that a difference has to exceed, one-sided at 5 %, where no test was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Extensible):
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
class NotFinite(Extensible):
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
class GraftRecord(Extensible):
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
        contribution: Only where a single graft had a twin, as in files of format 1: gate loss of
            the twin minus that of the grown model.
        contribution_stderr: Likewise, standard error of ``contribution``.
        dependence: Gate loss with the seed off minus with it on, which is how much the model leans
            on it, and not what it brought; None if not measured.
        host_only_contribution: As ``contribution``, against a twin that carried nothing.
        updates_lost: Updates that its removal cost.
        folded: Whether its weights went into the host's; None unless it is fossilized.
        package: Number of its package, from 1; None where it was tried by itself.
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
    contribution: float | None = field(default=None, metadata=WHERE_KNOWN)
    contribution_stderr: float | None = field(default=None, metadata=WHERE_KNOWN)
    dependence: float | None = None
    host_only_contribution: float | None = field(default=None, metadata=WHERE_KNOWN)
    updates_lost: int = 0
    folded: bool | None = None
    package: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord(Extensible):
    """One package, from the copy of the run to what became of it.

    Effects are falls of the gate loss, in its unit, read once on weights averaged over the second
    half of the trial; positive is better, None is not measured. Standard errors are widened by
    ``spread``.

    Attributes:
        package: Number of the package in its run, from 1.
        grafts: Numbers of its grafts.
        sites: Dotted names of their layers, in the same order.
        blueprints: Human names of their kernels, in the same order.
        parameters: Of all its kernels together.
        started_at: Update at which the run was copied.
        trial_updates: Updates after which the verdict is read.
        decided_at: Update of the verdict; None while there is none.
        verdict: What became of it; one of ``TrialVerdict``.
        taken: Whose state the live run took over; empty where it took nobody's.
        reason: Why, in a sentence.
        level: One-sided level of the test, in (0, 0.5).
        spread: By how much standard errors are widened for the spread between equal runs, at
            least 1.
        samples: Paired samples of the gate split, at least 0.
        effect: The candidate twin against the live run.
        stderr: Standard error of ``effect``.
        z: ``effect / stderr``.
        threshold: What ``z`` had to exceed.
        null_effect: The null twin against the live run: what the treatment alone brought.
        null_stderr: Standard error of ``null_effect``.
        capacity: The candidate twin against the null twin.
        capacity_stderr: Standard error of ``capacity``.
        capacity_shown: Whether ``capacity`` passed the test; None where there was no null.
        capacity_is_lower_bound: Whether the null adds capacity itself, so that ``capacity`` is
            less than what the package has.
        null_adds: Sites at which it does, each with the reason.
        attribution: How long a null trains beside the package.
        going_on: Fall that the same FLOPs of simply going on would have brought, by the run's own
            curve.
        going_on_stderr: Standard error of ``going_on``.
        gate_loss_before: Gate loss just before the switch.
        gate_loss_after: Gate loss just after it.
        flops: FLOPs that the trial took.
        seconds: Wall time that the trial took.
        memory_bytes: Memory that its copies take, as estimated before them.
        memory_peak_bytes: Most memory that was in use while it ran.
        updates_lost: Updates that going back to the switch cost.
        num_nulls: Equal twins that the spread was measured on; 0 where it was given.
    """

    package: int
    grafts: tuple[int, ...]
    sites: tuple[str, ...]
    blueprints: tuple[str, ...]
    parameters: int
    started_at: int
    trial_updates: int
    decided_at: int | None = None
    verdict: TrialVerdict = "in trial"
    taken: Taken = ""
    reason: str = ""
    level: float = 0.05
    spread: float = 1.0
    samples: int = 0
    effect: float | None = None
    stderr: float | None = None
    z: float | None = None
    threshold: float | None = None
    null_effect: float | None = None
    null_stderr: float | None = None
    capacity: float | None = None
    capacity_stderr: float | None = None
    capacity_shown: bool | None = None
    capacity_is_lower_bound: bool = False
    null_adds: tuple[str, ...] = ()
    attribution: Attribution = "trial"
    going_on: float | None = None
    going_on_stderr: float | None = None
    gate_loss_before: float | None = None
    gate_loss_after: float | None = None
    flops: float | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    memory_peak_bytes: int | None = None
    updates_lost: int = 0
    num_nulls: int = 0

    @property
    def was_read(self) -> bool:
        """Whether the package was held against the live run; one that was not met nothing."""
        return self.decided_at is not None and self.effect is not None

    @property
    def brought(self) -> tuple[float | None, float | None]:
        """The effect of what was taken over, or would have been, with its standard error."""
        if self.taken == "null":
            return self.null_effect, self.null_stderr
        return self.effect, self.stderr

    @property
    def beat_going_on(self) -> bool | None:
        """Whether it brought more than going on for the same FLOPs would have, beyond luck.

        None where one of the two, or its standard error, is not known.
        """
        (effect, stderr), going_on, error = self.brought, self.going_on, self.going_on_stderr
        if effect is None or stderr is None or going_on is None or error is None:
            return None
        return effect - going_on > BEYOND_LUCK * math.hypot(stderr, error)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord(Extensible):
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
class TimelineEntry(Extensible):
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
class AlphaPoint(Extensible):
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
class RunReport(Extensible):
    """What ``grower.report()`` returns: one run of growth.

    Attributes:
        settings: The effective values of every setting.
        updates: Optimizer updates done.
        evaluations: Those with a finite gate loss, in the order in which they were made.
        not_finite: What was NaN or infinite, and when, in order.
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
        parameters_before: Parameters of the model when the run began.
        parameters_after: Parameters of the model now.
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
    parameters_before: int
    parameters_after: int
    test_metrics: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    control: RunReport | None = None
    run_id: str = ""
    end_capacity: float | None = None
    end_capacity_stderr: float | None = None
    end_capacity_shown: bool | None = None
    overhead_share: float = field(init=False)
    format_version: str = REPORT_FORMAT_VERSION

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
        from esper.contracts.report_text import run_lines

        return "\n".join(run_lines(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmReport(Extensible):
    """One arm of the demo over all random seeds that were completed.

    Attributes:
        accuracy: Percent on the test split, one per random seed.
        parameters_by_seed: Parameters of the final model, one per random seed.
        train_flops: FLOPs of one run, all that growing took included; mean.
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
class ArmRun(Extensible):
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
class ControlRow(Extensible):
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
class ControlsReport(Extensible):
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
class DemoReport(Extensible):
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
    format_version: str = REPORT_FORMAT_VERSION

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


def _last_gate_loss(report: RunReport) -> float | None:
    return report.evaluations[-1].gate_loss if report.evaluations else None


def run_report_from_json(text: str) -> RunReport:
    """Read the report of a run, of this version, an earlier or a higher minor one.

    A field that is absent takes its default, one that is not known is kept in ``more`` and written
    again as it was; what follows from other fields is computed anew.

    Args:
        text: The JSON form.

    Raises:
        ValueError: The text is no report, or one of a higher major version.
    """
    found, newer = _versioned("run report", text)
    return value_from(RunReport, found, _parts(newer=newer))


def demo_report_from_json(text: str) -> DemoReport:
    """Read the report of a demo, as :func:`run_report_from_json` does that of a run.

    Args:
        text: The contents of ``report.json``.

    Raises:
        ValueError: The text is no report, one of a higher major version, or contradicts itself.
    """
    found, newer = _versioned("demo report", text)
    return value_from(DemoReport, found, _parts(newer=newer))


def _to_json(report: RunReport | DemoReport) -> str:
    return text_of(report, indent=1) + "\n"


def _versioned(what: str, text: str) -> tuple[dict[str, str], bool]:
    """Return the members of a report of a version that can be read, and whether it is newer."""
    found = members(text)
    version = json.loads(found.get("format_version", "null"))
    written = version_to_write(what, version, REPORT_FORMAT_VERSION)
    if version == 1 and what == "run report":
        found.setdefault("work_unit", '"passes"')
    found["format_version"] = json.dumps(written)
    return found, is_newer(written, REPORT_FORMAT_VERSION)


def _parts(*, newer: bool) -> Parts:
    """Return how the fields of a report are read; a newer one may have stages that are not known.

    Such a stage stays the word that it is.
    """
    own: dict[type, dict[str, Reader]] = {}

    def value(cls: type[Extensible]) -> Reader:
        return lambda text: value_from(cls, members(text), own)

    def each(cls: type[Extensible]) -> Reader:
        return lambda text: tuple(map(value(cls), items(text)))

    stage = partial(_stage, newer=newer)
    arms: Reader = lambda text: {  # noqa: E731 - one of a table of such readers
        name: value(ArmReport)(arm) for name, arm in members(text).items()
    }
    own[GraftRecord] = {"stage": stage}
    own[TimelineEntry] = {"before": stage, "after": stage}
    own[RunReport] = {
        "evaluations": each(Evaluation),
        "not_finite": each(NotFinite),
        "grafts": each(GraftRecord),
        "timeline": each(TimelineEntry),
        "alphas": each(AlphaPoint),
        "trials": each(TrialRecord),
        "stages": each(StageRecord),
        "control": _run_or_none,
    }
    own[ArmRun] = {"report": _run_or_none}
    own[ControlsReport] = {"rows": each(ControlRow)}
    own[DemoReport] = {"arms": arms, "controls": value(ControlsReport), "runs": each(ArmRun)}
    return own


def _run_or_none(text: str) -> RunReport | None:
    return None if json.loads(text) is None else run_report_from_json(text)


def _stage(text: str, *, newer: bool) -> object:
    word = json.loads(text)
    is_known = word is None or not newer or word in list(GraftStage)
    return GraftStage(word) if word is not None and is_known else word
