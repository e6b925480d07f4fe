"""What is known of each part of a run: readings, grafts, packages in trial, stages of depth."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from esper.contracts.lifecycle import GraftStage
from esper.contracts.value_json import WHERE_KNOWN, Extensible

if TYPE_CHECKING:
    from collections.abc import Iterable

    from esper.contracts.choices import (
        Attribution,
        DepthVerdict,
        Goal,
        GraftVerdict,
        Taken,
        TrialVerdict,
    )

LINEAR_SUFFIX: Final = "-linear"
"""What the name of a blueprint's linear form has behind the blueprint's own."""

DIGEST_SHOWN: Final = 12
"""Letters of a digest in the name of a registry's kernel."""

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
class SiteRecord(Extensible):
    """A layer with seeds, as the drawing of its model shows it.

    Attributes:
        site: Dotted name of the layer; empty where it is the whole model.
        what: What it is, with its widths: ``"Linear, 4 to 64"``.
        seeds: Seeds that it has.
    """

    site: str
    what: str = ""
    seeds: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedRecord(Extensible):
    """How a seed that contributes was doing, when it was last told.

    Attributes:
        site: Dotted name of the layer.
        seed_idx: Slot in that layer, from 0.
        update: When.
        state: Lifecycle state, in lower case.
        alpha: Its share, in [0, 1].
        calls: Calls of its kernel that were read, at least 0.
        faults: Those of them that were faulty.
        fault_rate: Share of faults in the last 200 calls, in [0, 1].
        health: Smoothed health in [0, 1]; None where there was no sample.
        latency_us: Median of the latest times that its kernel took, in microseconds; None where
            none was taken.
        size_bytes: Bytes of the kernel's parameters and buffers.
    """

    site: str
    seed_idx: int
    update: int
    state: str
    alpha: float = 1.0
    calls: int = 0
    faults: int = 0
    fault_rate: float = 0.0
    health: float | None = None
    latency_us: float | None = None
    size_bytes: int = 0


def with_seed(seeds: Iterable[SeedRecord], told: SeedRecord) -> tuple[SeedRecord, ...]:
    """Return how seeds are doing after one more was told; all are told at the same updates.

    So one that was told of at an earlier update has gone since.
    """
    same = [seed for seed in seeds if seed.update == told.update]
    others = [s for s in same if (s.site, s.seed_idx) != (told.site, told.seed_idx)]
    return (*others, told)


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentRecord(Extensible):
    """Something that went wrong with a seed or a source of kernels, or came right again.

    Attributes:
        kind: The kind of its events, for example ``"seed_moved"`` or ``"breaker_moved"``.
        site: Dotted name of the layer; empty where it is of none.
        seed_idx: Slot in that layer, from 0; None where it is of none.
        subject: What else it is about: a breaker's name, a kernel's digest, a figure; or empty.
        since: Update at which it was first told.
        last: Update at which it was last told.
        times: How often it was told, at least 1.
        text: What was said of it last.
    """

    kind: str
    site: str = ""
    seed_idx: int | None = None
    subject: str = ""
    since: int
    last: int
    times: int = 1
    text: str

    @property
    def where(self) -> str:
        """The layer and the seed that it is about; empty where none."""
        seed = "" if self.seed_idx is None else f", seed {self.seed_idx}"
        return f"{self.site or '(root)'}{seed}" if self.site or seed else ""


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
        parameters: Parameters of the kernel; None where a log was read that does not say.
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
    parameters: int | None
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

    @property
    def is_of_a_registry(self) -> bool:
        """Whether its kernel, or that of whose linear form it is, came from a registry.

        Then the kernel's name ends as its digest begins.
        """
        shown = self.artifact_id[:DIGEST_SHOWN]
        name = self.blueprint.removesuffix(LINEAR_SUFFIX)
        return bool(shown) and name.endswith(f".{shown}")


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
        memory_bytes: Memory that its copies take, and behind them the snapshot that the package can
            be put back to while it is under watch, as estimated before them.
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
    """A run and the same job trained without growth, by one number each, in the owner's unit.

    Attributes:
        measure: What the numbers are: ``"test loss"``, or ``"gate loss"`` without a test split;
            ``"test measure"`` and ``"gate measure"`` where higher is better.
        grown: Of the run that could grow.
        control: Of the run that could not.
        goal: Whether a lower or a higher number is better.
    """

    measure: str
    grown: float
    control: float
    goal: Goal = "min"

    @property
    def is_of_gate(self) -> bool:
        """Whether the numbers are of data that growth was decided on."""
        return self.measure.startswith("gate")

    def answer(self, least: float) -> Literal["Yes", "No", "Not shown"]:
        """Say whether the run ended better, as far as one run of each can tell.

        Args:
            least: Smallest difference that says anything, as a share of the control's number.
        """
        saved = (self.control - self.grown) * (1.0 if self.goal == "min" else -1.0)
        if abs(saved) <= least * abs(self.control):
            return "Not shown"
        return "Yes" if saved > 0 else "No"

    def __str__(self) -> str:
        less = self.control - self.grown
        words = f"{abs(less):.4g} {'less' if less > 0 else 'more'}" if less else "no difference"
        better = "" if self.goal == "min" else ", where higher is better"
        return (
            f"the {self.measure} was {self.grown:.4g} at the end with growth and "
            f"{self.control:.4g} without: {words}{better}"
        )
