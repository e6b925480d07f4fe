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

from esper.contracts.intervals import Interval, mean_interval
from esper.contracts.lifecycle import GraftStage
from esper.contracts.run_records import (
    AlphaPoint,
    Comparison,
    Evaluation,
    GraftRecord,
    NotFinite,
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
    from collections.abc import Iterator

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.value_json import Parts, Reader

__all__ = [
    "ARMS",
    "CONTROL_KINDS",
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
    "NotFinite",
    "RunReport",
    "StageRecord",
    "TimelineEntry",
    "TrialRecord",
    "demo_report_from_json",
    "run_report_from_json",
]

Arm = Literal["host", "grown", "random", "scratch"]
"""How a model of the demo was made."""
ARMS: Final[tuple[Arm, ...]] = get_args(Arm)

ControlKind = Literal["noop", "noise", "capacity_free", "random_features"]
"""A way to make a graft that does not deserve to stay."""
CONTROL_KINDS: Final[tuple[ControlKind, ...]] = get_args(ControlKind)


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
