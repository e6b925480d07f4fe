"""What the random seeds of the demo showed, put together into its report."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from esper.contracts.report import ARMS, ArmReport, ControlRow, ControlsReport, DemoReport
from esper.services.arms import EVALUATE_EVERY, HOLD_UPDATES, OVERHEAD
from esper.services.digits import LEARNING_RATE, UPDATES_PER_EPOCH
from esper.services.language import recorded_stages
from esper.services.looks import DIP_UPDATES, LOOK_EVERY, TEST_EPOCHS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.report import StageArm, TrialRecord
    from esper.services.arms import ArmResult, Grown
    from esper.services.controls import ControlResult

CLOSE: Final = 0.5
"""How near to its threshold a z may be that another machine's rounding could move across it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedResult:
    """Everything that one random seed showed.

    Attributes:
        random_seed: The random seed.
        arms: Its arms by name.
        controls: Its controls.
        gains: Predicted and measured gain of each package of the grown and the random arm.
        dormant_identical: Whether the wrapped dormant host computed the bare one's very bits.
        export_max_rel_diff: Difference of the export read in a fresh process; None unless this
            random seed exported.
        stages: Arms of the language model; empty unless this random seed trained them.
    """

    random_seed: int
    arms: dict[str, ArmResult]
    controls: tuple[ControlResult, ...]
    gains: tuple[tuple[float, float], ...]
    dormant_identical: bool
    export_max_rel_diff: float | None
    stages: tuple[StageArm, ...] = ()


def demo_report(
    results: Sequence[SeedResult],
    *,
    epochs: int,
    processes: int,
    seconds: float,
    interrupted: bool = False,
) -> DemoReport:
    """Put the results of the random seeds together.

    Args:
        results: One per completed random seed.
        epochs: Epochs of every arm.
        processes: Processes that shared the machine.
        seconds: Wall-clock seconds of all.
        interrupted: Whether the demo was stopped before its end.
    """
    ordered = sorted(results, key=lambda result: result.random_seed)
    differences = [r.export_max_rel_diff for r in ordered if r.export_max_rel_diff is not None]
    return DemoReport(
        random_seeds=tuple(r.random_seed for r in ordered),
        updates=epochs * UPDATES_PER_EPOCH,
        arms={name: _arm_report([r.arms[name] for r in ordered]) for name in ARMS},
        controls=_controls_report([one for r in ordered for one in r.controls]),
        ranking_spearman=spearman([pair for r in ordered for pair in r.gains]),
        export_max_rel_diff=max(differences) if differences else None,
        dormant_identical=all(r.dormant_identical for r in ordered) if ordered else None,
        environment=_environment(processes),
        settings=_settings(),
        runs=tuple(r.arms[name].run for r in ordered for name in ARMS),
        seconds=seconds,
        notes=(*NOTES, *_close_calls(ordered)),
        interrupted=interrupted,
        stages=(*(one for r in ordered for one in r.stages), *recorded_stages()),
    )


def gains_of(grown: Grown, random: Grown) -> tuple[tuple[float, float], ...]:
    """Return the predicted and the measured gain of each package of two arms.

    Both arms are the same run, bit for bit, until the first verdict, so that what the ranking of
    the one predicts holds for the kernels that the other chose. A package's prediction is the sum
    of its kernels'; one with a kernel that has no score is left out.

    Args:
        grown: The arm with the ranking.
        random: The arm that chose at random.
    """
    pairs = []
    for arm in (grown, random):
        report = arm.result.run.report
        for trial in () if report is None else report.trials[:1]:
            kernels = zip(trial.sites, trial.blueprints, strict=True)
            predicted = [grown.predicted.get(kernel) for kernel in kernels]
            known = [gain for gain in predicted if gain is not None]
            if trial.effect is not None and len(known) == len(predicted):
                pairs.append((sum(known), trial.effect))
    return tuple(pairs)


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return the rank correlation of two columns; None with fewer than three or without spread.

    Ties get the mean of their ranks.
    """
    if len(pairs) < 3:
        return None
    first, second = (_ranks([pair[i] for pair in pairs]) for i in range(2))
    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return statistics.correlation(first, second)


def _ranks(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]


def _arm_report(results: list[ArmResult]) -> ArmReport:
    dips = [r.dip for r in results if r.dip is not None]
    return ArmReport(
        accuracy=tuple(r.accuracy for r in results),
        accuracy_last=tuple(r.accuracy_last for r in results),
        parameters_by_seed=tuple(r.parameters for r in results),
        train_flops=statistics.fmean(r.train_flops for r in results) if results else None,
        work=_work(results),
        latency_us=statistics.fmean(r.latency_us for r in results) if results else None,
        seconds=statistics.fmean(r.seconds for r in results) if results else None,
        worst_dip_points=max(dips) if dips else None,
    )


def _work(results: list[ArmResult]) -> float | None:
    """Return all FLOPs over those of training alone: of all runs together, small and large."""
    own = sum(r.own_flops for r in results)
    return sum(r.train_flops for r in results) / own if own else None


def _controls_report(results: list[ControlResult]) -> ControlsReport:
    kinds = dict.fromkeys(result.kind for result in results)
    rows = [_control_row([r for r in results if r.kind == kind]) for kind in kinds]
    return ControlsReport(rows=tuple(rows))


def _control_row(results: list[ControlResult]) -> ControlRow:
    return ControlRow(
        kind=results[0].kind,
        tried=len(results),
        admitted=sum(r.was_admitted for r in results),
        fossilized=sum(r.was_kept for r in results),
        naive_accepted=sum(r.naive_accepted for r in results),
        capacity_claimed=sum(r.claims_capacity for r in results),
    )


def _close_calls(results: Sequence[SeedResult]) -> Iterator[str]:
    """Say which verdicts another machine, which rounds otherwise, may read the other way."""
    for result in results:
        for name, trial in _trials_of(result):
            z, threshold = trial.z, trial.threshold
            if z is not None and threshold is not None and abs(z - threshold) <= CLOSE:
                yield (
                    f"Random seed {result.random_seed}, {name}: z = {z:.2f} is close to the "
                    f"{threshold:.2f} needed, so that another machine may decide otherwise."
                )


def _trials_of(result: SeedResult) -> Iterator[tuple[str, TrialRecord]]:
    for name in ("grown", "random"):
        report = result.arms[name].run.report
        for trial in () if report is None else report.trials:
            yield f"package {trial.package} of the {name} arm", trial
    for control in result.controls:
        if control.trial is not None:
            yield f"the control {control.kind} at {control.site}", control.trial


def _settings() -> JsonObject:
    return {
        "overhead": OVERHEAD,
        "packages": 1,
        "evaluate_every": EVALUATE_EVERY,
        "hold_updates": HOLD_UPDATES,
        "learning_rate": LEARNING_RATE,
    }


def _environment(processes: int) -> JsonObject:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "processes": processes,
        "threads": 1,
    }


NOTES: Final = (
    (
        "The gate split decided what grew. Accuracies of the tables are of the test split, which "
        f"only the reporter reads, after each of the last {TEST_EPOCHS} epochs; what counts is the "
        "mean of these."
    ),
    (
        "Training FLOPs of the grown and the random arm count all that growing took: evaluations, "
        "rankings, and trials with their nulls. Work is the ratio of that to their own training; "
        "the grown network's training is itself many times the host's, since it is larger."
    ),
    (
        f"overhead={OVERHEAD:g} is the demo's own: kernels that help here are many times larger "
        "than this host, and the trial of the best of them with its null costs more than the "
        "whole of the host's training. One package is tried, it is held for "
        f"{HOLD_UPDATES} updates before kernels that it does without are taken out, and "
        f"evaluations are {EVALUATE_EVERY} updates apart. Everything else is at its default."
    ),
    (
        f"A dip is the largest fall of gate accuracy in the {DIP_UPDATES} updates after a switch, "
        f"looked at every {LOOK_EVERY}. The host's own is its largest fall in the same windows, in "
        "which nothing happened to it."
    ),
    (
        "Figures are those of this machine: another one rounds otherwise, and runs drift apart. "
        "Read them with their intervals."
    ),
)
"""What a reader has to know of every demo."""
