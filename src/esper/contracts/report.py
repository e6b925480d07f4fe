"""What a run and the demo report, as frozen values with one JSON form each.

What follows from other fields is computed when the value is made, so that a report cannot
contradict itself; a reader of the JSON finds the results beside their sources. Here are the demo's
report and the readers of both, and the names of all that a report is made of.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, get_args

from esper.contracts.intervals import UNKNOWN, Interval, mean_interval
from esper.contracts.lifecycle import GraftStage
from esper.contracts.run_records import (
    AlphaPoint,
    Comparison,
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
from esper.contracts.run_report import REPORT_FORMAT_VERSION, RunReport
from esper.contracts.value_json import (
    Extensible,
    is_newer,
    items,
    members,
    text_of,
    value_from,
    version_to_write,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.value_json import Parts, Reader

__all__ = [
    "ARMS",
    "CONTROL_KINDS",
    "OPPONENTS",
    "REPORT_FORMAT_VERSION",
    "AlphaPoint",
    "Arm",
    "ArmReport",
    "ArmRun",
    "Comparison",
    "ControlKind",
    "ControlRow",
    "ControlsReport",
    "DemoReport",
    "Evaluation",
    "GraftRecord",
    "IncidentRecord",
    "NotFinite",
    "RunReport",
    "SeedRecord",
    "SiteRecord",
    "StageArm",
    "StageRecord",
    "TimelineEntry",
    "TrialRecord",
    "Wins",
    "demo_report_from_json",
    "run_report_from_json",
]

Arm = Literal["host", "grown", "random", "scratch"]
"""How a model of the demo was made."""
ARMS: Final[tuple[Arm, ...]] = get_args(Arm)

OPPONENTS: Final[tuple[Arm, ...]] = ("host", "random", "scratch")
"""What the grown arm is held against."""

ControlKind = Literal["noop", "noise", "capacity_free", "random_features", "linear"]
"""A way to make a package that has no capacity; ``capacity_free`` is of files of format 1."""
CONTROL_KINDS: Final[tuple[ControlKind, ...]] = get_args(ControlKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmReport(Extensible):
    """One arm of the demo over all random seeds that were completed.

    Attributes:
        accuracy: Percent on the test split, one per random seed: the mean of the evaluations after
            each of the last ten epochs; in files of format 1 a single one at the end.
        parameters_by_seed: Parameters of the final model, one per random seed.
        train_flops: FLOPs of one run, all that growing took included; mean.
        latency_us: Microseconds of one forward of the final model; mean.
        seconds: Wall-clock seconds of one run; mean.
        worst_dip_points: Largest fall of gate accuracy within 200 updates after a switch, in
            points, over all random seeds. Of the host: its own largest fall in the same windows,
            though nothing was switched. None where it was not measured; in files of format 1
            less the fall of a twin.
        accuracy_last: Percent on the test split at the end, one per random seed, of a single
            evaluation each; empty in files of format 1.
        work: FLOPs of everything that its runs took over those of their own training, at least 1;
            of all runs together; None where it was not counted.
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
    accuracy_last: tuple[float, ...] = ()
    work: float | None = None
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
        if len(self.accuracy_last) not in (0, len(self.accuracy)):
            msg = (
                f"an arm has one last accuracy per random seed; got {len(self.accuracy_last)} for "
                f"{len(self.accuracy)}"
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
        test_accuracy: Percent on the test split after each of the last ten epochs, or of all where
            there are fewer; ``accuracy`` of :class:`ArmReport` is their mean.
        report: What the run's Grower reported; None for arms without one.
    """

    arm: Arm
    random_seed: int
    updates: tuple[int, ...]
    accuracy: tuple[float, ...]
    parameters: tuple[int, ...]
    test_accuracy: tuple[float, ...] = ()
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
    """What became of one kind of control package, none of which has any capacity.

    Attributes:
        kind: One of :data:`CONTROL_KINDS`.
        tried: Packages that were tried.
        admitted: Packages that were taken over at their verdict.
        fossilized: Packages that were still there after their watch.
        naive_accepted: Packages that a naive on/off gate would have kept.
        capacity_claimed: Packages that were taken over and shown to be better than themselves made
            linear; none should be.
    """

    kind: ControlKind
    tried: int
    admitted: int
    fossilized: int
    naive_accepted: int
    capacity_claimed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlsReport(Extensible):
    """The controls, by kind, and the counts that are asked for most.

    Attributes:
        rows: One per kind that was tried.
        noop_fossilized: Null kernels that were made permanent.
        noise_fossilized: Kernels of noise that were made permanent.
        capacity_free_fossilized: Kernels of the host layer's own shape that were made permanent;
            only tried in files of format 1.
        random_features_fossilized: Frozen random kernels that were made permanent.
        linear_fossilized: Linear packages that were made permanent: where treatment alone helps
            they may be.
        naive_gate_accepted: Controls of any kind that a naive on/off gate would have kept.
        capacity_claimed: Controls of any kind for which capacity was claimed.
    """

    rows: tuple[ControlRow, ...] = ()
    noop_fossilized: int = field(init=False)
    noise_fossilized: int = field(init=False)
    capacity_free_fossilized: int = field(init=False)
    random_features_fossilized: int = field(init=False)
    linear_fossilized: int = field(init=False)
    naive_gate_accepted: int = field(init=False)
    capacity_claimed: int = field(init=False)

    def __post_init__(self) -> None:
        for kind in CONTROL_KINDS:
            count = sum(row.fossilized for row in self.rows if row.kind == kind)
            object.__setattr__(self, f"{kind}_fossilized", count)
        accepted = sum(row.naive_accepted for row in self.rows)
        object.__setattr__(self, "naive_gate_accepted", accepted)
        claimed = sum(row.capacity_claimed for row in self.rows)
        object.__setattr__(self, "capacity_claimed", claimed)

    @property
    def useless(self) -> tuple[int, int]:
        """Packages that were kept and that were tried, of the kinds that help nothing at all.

        A linear package is none of them: its treatment may help, for a while.
        """
        rows = [row for row in self.rows if row.kind != "linear"]
        return sum(row.fossilized for row in rows), sum(row.tried for row in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wins:
    """How an arm fared against another, random seed by random seed.

    Attributes:
        won: Random seeds at which its accuracy was higher.
        lost: Random seeds at which it was lower.
        tied: Random seeds at which both were equal, as where every package was refused.
    """

    won: int
    lost: int
    tied: int

    @classmethod
    def of(cls, differences: Sequence[float]) -> Wins:
        """Count paired differences by their signs."""
        return cls(
            won=sum(d > 0 for d in differences),
            lost=sum(d < 0 for d in differences),
            tied=sum(d == 0 for d in differences),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageArm(Extensible):
    """One arm of a language model that was grown in depth by stages, or of its controls.

    Attributes:
        name: What was trained.
        loss: Its final held-out loss in nats; None where it was not read.
        flops: FLOPs of its training; None where they were not counted.
        saved_at_equal_loss: Percent of the FLOPs that a from-scratch run of the final size takes to
            the same loss, with its interval; None in it where nothing is claimed.
        recorded: Whether it was run before, by ``make bench-growth``, and not in this demo.
    """

    name: str
    loss: float | None = None
    flops: float | None = None
    saved_at_equal_loss: Interval = UNKNOWN
    recorded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport(Extensible):
    """What ``esper demo`` found: the contents of ``report.json``.

    Attributes:
        random_seeds: Those that were completed, in the order of every list.
        updates: Optimizer updates of one run.
        arms: Results by arm, with the keys of :data:`ARMS`.
        controls: What became of the control grafts.
        ranking_spearman: Rank correlation, over the packages of the grown and the random arm at all
            random seeds, of the gain that the default ranking predicts for a package with the gain
            that its trial measured, in [-1, 1]; None if not measured. In files of format 1 with
            the gain of each candidate in an audition.
        export_max_rel_diff: Largest relative difference between the grown model and its export
            read in a fresh process; None if not measured.
        dormant_identical: Whether the wrapped dormant host computed the bare one's very bits.
        environment: Versions, processor, threads and such.
        settings: The demo's own settings, where they differ from the defaults.
        runs: Every arm at every random seed.
        seconds: Wall-clock seconds of the whole demo.
        notes: Words to the reader.
        interrupted: Whether the demo was stopped before its end.
        stages: Arms of the language model that was grown in depth by stages; empty without one.
        grown_minus_host: Paired difference of test accuracies in points, 95 % interval.
        grown_minus_scratch: As ``grown_minus_host``.
        grown_minus_random: As ``grown_minus_host``.
        wins: Of the grown arm against each of :data:`OPPONENTS`, counted on ``accuracy``.
        worst_dip_points: That of the grown arm, to be held against the host's own.
        packages_tried: Packages of the grown arm whose verdict was read, over all random seeds.
        packages_passed: Those of them that were taken over.
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
    stages: tuple[StageArm, ...] = ()
    grown_minus_host: Interval = field(init=False)
    grown_minus_scratch: Interval = field(init=False)
    grown_minus_random: Interval = field(init=False)
    wins: dict[str, Wins] = field(init=False)
    worst_dip_points: float | None = field(init=False)
    packages_tried: int = field(init=False)
    packages_passed: int = field(init=False)
    fossilized: int = field(init=False)
    culled: int = field(init=False)
    format_version: str = REPORT_FORMAT_VERSION

    def __post_init__(self) -> None:
        if set(self.arms) != set(ARMS):
            msg = f"a demo has the arms {', '.join(ARMS)}; got {', '.join(self.arms)}"
            raise ValueError(msg)
        grown, wins = self.arms["grown"], {}
        for name in OPPONENTS:
            differences = _differences(grown, self.arms[name], name)
            object.__setattr__(self, f"grown_minus_{name}", mean_interval(differences))
            wins[name] = Wins.of(differences)
        object.__setattr__(self, "wins", wins)
        object.__setattr__(self, "worst_dip_points", grown.worst_dip_points)
        read = [trial for _, trial in self.trials("grown") if trial.was_read]
        object.__setattr__(self, "packages_tried", len(read))
        object.__setattr__(self, "packages_passed", sum(bool(trial.taken) for trial in read))
        stages = [graft.stage for _, graft in self.grafts("grown")]
        object.__setattr__(self, "fossilized", stages.count(GraftStage.FOSSILIZED))
        object.__setattr__(self, "culled", stages.count(GraftStage.CULLED))

    def runs_of(self, arm: str) -> list[ArmRun]:
        """Return the runs of one arm, in order."""
        return [run for run in self.runs if run.arm == arm]

    def trials(self, arm: str) -> Iterator[tuple[int, TrialRecord]]:
        """Yield (random seed, package) for every package of one arm, in order."""
        for run in self.runs_of(arm):
            for trial in run.report.trials if run.report else ():
                yield run.random_seed, trial

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
        return text_of(self, indent=1) + "\n"


def _differences(grown: ArmReport, other: ArmReport, name: str) -> list[float]:
    if len(grown.accuracy) != len(other.accuracy):
        msg = (
            f"paired arms have the same random seeds; grown has {len(grown.accuracy)} accuracies "
            f"and {name} has {len(other.accuracy)}"
        )
        raise ValueError(msg)
    return [a - b for a, b in zip(grown.accuracy, other.accuracy, strict=True)]


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
        "incidents": each(IncidentRecord),
        "sites": each(SiteRecord),
        "seeds": each(SeedRecord),
        "grafts": each(GraftRecord),
        "timeline": each(TimelineEntry),
        "alphas": each(AlphaPoint),
        "trials": each(TrialRecord),
        "stages": each(StageRecord),
        "control": _run_or_none,
    }
    own[ArmRun] = {"report": _run_or_none}
    own[ControlsReport] = {"rows": each(ControlRow)}
    own[StageArm] = {"saved_at_equal_loss": _interval}
    own[DemoReport] = {
        "arms": arms,
        "controls": value(ControlsReport),
        "runs": each(ArmRun),
        "stages": each(StageArm),
    }
    return own


def _run_or_none(text: str) -> RunReport | None:
    return None if json.loads(text) is None else run_report_from_json(text)


def _interval(text: str) -> Interval:
    found = json.loads(text)
    return Interval(mean=found["mean"], low=found["low"], high=found["high"])


def _stage(text: str, *, newer: bool) -> object:
    word = json.loads(text)
    is_known = word is None or not newer or word in list(GraftStage)
    return GraftStage(word) if word is not None and is_known else word
