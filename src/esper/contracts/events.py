"""Everything that happens in a run, as frozen values with one JSON form.

An event log is a line of JSON per event: ``{"format_version": "1.1", "kind": ..., "run_id": ...,
"seq": ..., "id": ..., "update": ..., "time_s": ..., ...}``. ``time_s`` and ``run_id``, of which
``id`` is made, are the only fields that a replay may not compare.

A log of a higher minor version can be read: a field that is absent takes its default, one that is
not known is kept in ``more``, and an event of another kind is an :class:`UnknownEvent`. They are
written again byte for byte. Only a higher major version is refused.
"""

from __future__ import annotations

import itertools
import json
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final

from esper.contracts.choices import (
    ANOMALOUS_FIGURES,
    ATTRIBUTIONS,
    BREAKER_WORDS,
    DEPTH_VERDICTS,
    FIT_REASONS,
    GATES,
    PASS_WORK,
    PREPARATIONS,
    REGISTRY_OPERATIONS,
    RETRIED_WORK,
    RETRY_OUTCOMES,
    SEED_STATES,
    TAKEN,
    TRIAL_VERDICTS,
)
from esper.contracts.lifecycle import GraftStage
from esper.contracts.value_json import (
    WHERE_KNOWN,
    Extensible,
    is_newer,
    members,
    text_of,
    value_from,
    version_to_write,
)

if TYPE_CHECKING:
    from typing import Literal

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.choices import (
        AnomalousFigure,
        Attribution,
        BreakerWord,
        DepthVerdict,
        FitReason,
        Gate,
        PassWork,
        Preparation,
        RegistryOperation,
        RetriedWork,
        RetryOutcome,
        SeedState,
        Taken,
        TrialVerdict,
        Verdict,
    )

EVENT_FORMAT_VERSION: Final = "1.1"

STOPPED: Final = "the run was stopped"
"""Why a run ended that its owner interrupted, in :class:`RunEnded`."""

_OF_NO_RUN: Final = uuid.uuid4().hex
"""Names the events of this process that belong to no run."""

_numbers: Final = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Extensible):
    """Base of all events.

    Attributes:
        update: Number of optimizer updates done when it happened; 0 before the first.
        time_s: Seconds since the run started, by the injected clock.
        run_id: Names the run among all runs. An event outside of any has the name of its process;
            one that was read from a log without it has none.
        seq: Number of the event in its run: 0, 1, 2 and so on.

    Who published an event is no part of what it says: two are equal where their other fields are.
    """

    kind: ClassVar[str] = ""
    update: int
    time_s: float
    run_id: str = field(default=_OF_NO_RUN, compare=False)
    seq: int = field(default_factory=lambda: next(_numbers), compare=False)

    @property
    def id(self) -> str:
        """Names the event among all events, so that one that comes twice is known."""
        return f"{self.run_id}-{self.seq}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """A controller took charge of a model.

    Attributes:
        settings: Effective value of every setting of the controller, by name.
        sites: One per layer with seeds, in the model's order: ``site``, ``what`` it is, ``seeds``.
        parameters: Parameters of the model; None where not told.
    """

    kind: ClassVar[str] = "run_started"
    settings: JsonObject
    sites: list[JsonObject] = field(default_factory=list)
    parameters: int | None = field(default=None, metadata=WHERE_KNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """The owner's measure was read on the gate split.

    Attributes:
        gate_loss: Mean loss on the gate split, in the owner's unit, finite; lower is better,
            whatever the owner's goal.
        train_loss: Smoothed training loss, in its own unit; None where there is none yet, or it
            is not finite.
        metrics: Whatever else ``evaluate`` returned, by name; what is not finite is left out.
        work: FLOPs up to then by category, as :class:`~esper.RunReport` has them; None where not
            told.
        parameters: Parameters of the model then; None where not told.
    """

    kind: ClassVar[str] = "evaluated"
    gate_loss: float
    train_loss: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] | None = field(default=None, metadata=WHERE_KNOWN)
    parameters: int | None = field(default=None, metadata=WHERE_KNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected(Event):
    """The policy was asked whether to grow now.

    Attributes:
        grow: What it answered.
        verdict: The rule that decided, in a word: ``"diminishing"``, ``"deadline"``,
            ``"overfitting"``, ``"too_early"``, ``"too_late"``, ``"improving"``, ``"scheduled"``,
            ``"waiting"``. A file may have a word of an owner's policy, which is read as it is.
        reason: Why, in a sentence.
    """

    kind: ClassVar[str] = "detected"
    grow: bool
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked(Event):
    """Candidates were ranked.

    Attributes:
        rows: One per candidate, best first. Each has ``site`` and ``blueprint``; ``gain``, the
            score in the ranking's own unit, and its ``stderr``, both None without a
            score; ``parameters`` of the kernel; ``flops`` of a forward of one sample, None where
            not counted; and ``reason``, why there is no score.
        refused: One per place or kernel that was not scored, with ``site``, ``blueprint`` (empty
            where the whole site was refused) and ``reason``.
    """

    kind: ClassVar[str] = "ranked"
    rows: list[JsonObject]
    refused: list[JsonObject] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPrepared(Event):
    """Something was done to a kernel before it could be tried.

    What the run does itself begins with the event before it, so that ``time_s`` of both says how
    long it took. A fetch is beside the run, and is told at the step that hears of it.

    Attributes:
        what: ``"fetch"`` from a registry, with verification; ``"compile"``; ``"load"``, which
            builds its module; or ``"probe"``, which runs it at its layer.
        site: Dotted name of the layer; empty where it is for none yet.
        blueprint: Human name of the kernel's blueprint; empty of a fetch, which goes by digest.
        artifact_id: The sha256 of the kernel's bytes; empty before it was compiled.
        done: Whether it was done; where it was not, a word to the owner says why.
        took_s: Seconds that a fetch took, at least 0; a clock makes it. None of all else.
    """

    kind: ClassVar[str] = "kernel_prepared"
    what: Preparation
    site: str = ""
    blueprint: str = ""
    artifact_id: str = ""
    done: bool = True
    took_s: float | None = field(default=None, metadata=WHERE_KNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChanged(Event):
    """A graft moved from one stage to the next.

    Attributes:
        graft: Number of the graft in its run, from 1.
        site: Dotted name of the layer.
        seed_idx: Slot in that layer, from 0.
        blueprint: Human name of the kernel's blueprint.
        artifact_id: The sha256 of the kernel's bytes; empty before it was compiled.
        before: Stage that was left; empty at germination.
        after: Stage that was entered.
        reason: Why, in a sentence.
        package: Number of its package, from 1; None where it was tried by itself.

    Raises:
        ValueError: A stage is none.
    """

    kind: ClassVar[str] = "stage_changed"
    graft: int
    site: str
    seed_idx: int
    blueprint: str
    artifact_id: str
    before: GraftStage | Literal[""]
    after: GraftStage
    reason: str
    package: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", GraftStage(self.after))
        if self.before:
            object.__setattr__(self, "before", GraftStage(self.before))


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRead(Event):
    """A gate was read, once, for a kernel that was auditioned by itself.

    Attributes:
        graft: Number of the graft, from 1.
        gate: ``"admission"`` or ``"fossilization"``.
        passed: Whether the graft may go on.
        effect: Mean fall of the gate loss, reference minus candidate, in units of the loss;
            positive is better. None where it was not measured.
        stderr: Standard error of ``effect``, in units of the loss, at least 0; None where it was
            not measured.
        z: ``effect / stderr``; None where one is missing or the error is 0.
        level: One-sided level of the test, in (0, 0.5).
        samples: Number of paired samples of the gate split, at least 0.
        reason: What was decided and on what, in a sentence.
        tau: Only in logs of format 1: spread between two models that ought to be equal.
    """

    kind: ClassVar[str] = "gate_read"
    graft: int
    gate: Gate
    passed: bool
    effect: float | None
    stderr: float | None
    z: float | None
    level: float
    samples: int
    reason: str
    tau: float | None = field(default=None, metadata=WHERE_KNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlphaChanged(Event):
    """A seed's alpha was set; along a ramp only its start and its end are events.

    Attributes:
        graft: Number of the graft, from 1.
        alpha: Its share from now on, in [0, 1].
    """

    kind: ClassVar[str] = "alpha_changed"
    graft: int
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fossilized(Event):
    """A graft was made permanent.

    Attributes:
        graft: Number of the graft, from 1.
        site: Dotted name of the layer.
        folded: Whether its weights went into the host's own.
        rel_diff: Largest difference of the layer's outputs before and after folding, relative to
            the largest output, at least 0; None where it was not measured.
        reason: Why it was not folded, or which moments of its host begin anew, in a few words;
            empty where neither.
    """

    kind: ClassVar[str] = "fossilized"
    graft: int
    site: str
    folded: bool
    rel_diff: float | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(Event):
    """A graft, or a whole package, was removed after it had come into the model.

    Attributes:
        graft: Number of the graft, from 1; 0 where it was a package.
        updates_lost: Optimizer updates that were undone, at least 0; 0 where the host was kept.
        reason: Why, in a sentence.
        package: Number of the package, from 1; None where it was one graft.
    """

    kind: ClassVar[str] = "rolled_back"
    graft: int
    updates_lost: int
    reason: str
    package: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStarted(Event):
    """The run was copied, and a package began to train in a twin.

    Attributes:
        package: Number of the package in its run, from 1.
        grafts: Numbers of its grafts.
        sites: Dotted names of their layers, in the same order.
        blueprints: Human names of their kernels, in the same order.
        parameters: Of all its kernels together.
        trial_updates: Updates after which there is a verdict.
        arms: What trains beside one another, for example ``"live"``, ``"candidate"``, ``"null"``.
        attribution: How long the null trains.
        level: One-sided level of the test, in (0, 0.5).
        memory_bytes: Memory that the copies take, and the snapshot behind them, estimated
            beforehand; None where it was not.
        null_adds: Sites at which the linear package adds capacity itself, each with the reason.
    """

    kind: ClassVar[str] = "trial_started"
    package: int
    grafts: tuple[int, ...]
    sites: tuple[str, ...]
    blueprints: tuple[str, ...]
    parameters: int
    trial_updates: int
    arms: tuple[str, ...] = ()
    attribution: Attribution = "trial"
    level: float = 0.05
    memory_bytes: int | None = None
    null_adds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRead(Event):
    """The verdict on a package was read, once, on weights averaged over half of the trial.

    Falls are of the gate loss, in its unit; positive is better. What was not measured is None.

    Attributes:
        package: Number of the package, from 1.
        sites: Dotted names of its layers.
        verdict: ``"taken over"`` or ``"refused"``.
        taken: Whose state the live run took over; empty where it took nobody's.
        reason: What was decided and on what, in a sentence.
        level: One-sided level of the test, in (0, 0.5).
        spread: By how much standard errors were widened for the spread between equal runs, at
            least 1.
        samples: Paired samples of the gate split, at least 0.
        effect: Fall of the candidate twin against the live run.
        stderr: Standard error of ``effect``, widened, at least 0.
        z: ``effect / stderr``.
        threshold: What ``z`` had to exceed.
        null_effect: Fall of the null twin against the live run: the treatment's part.
        null_stderr: Standard error of ``null_effect``, widened.
        capacity: Fall of the candidate twin against the null twin.
        capacity_stderr: Standard error of ``capacity``, widened.
        capacity_shown: Whether ``capacity`` passed the test; None where there was no null.
        capacity_is_lower_bound: Whether the null adds capacity itself.
        null_adds: Sites at which it does, each with the reason.
        attribution: How long the null trains.
        going_on: Fall that the same FLOPs of simply going on would have brought.
        going_on_stderr: Standard error of ``going_on``.
        flops: What the trial took.
        num_nulls: Equal twins that the spread was measured on; 0 where it was given.
    """

    kind: ClassVar[str] = "trial_read"
    package: int
    sites: tuple[str, ...]
    verdict: TrialVerdict
    taken: Taken = ""
    reason: str
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
    flops: float | None = None
    num_nulls: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenOver(Event):
    """The live run took the state of a twin over, between two updates.

    Attributes:
        package: Number of the package, from 1.
        taken: Whose state: ``"candidate"`` or ``"null"``.
        grafts: Numbers of its grafts.
        sites: Dotted names of their layers, in the same order.
        folded: Whether the package went into the host's own weights at once, as a null may.
        gate_loss_before: Gate loss just before the switch; None where it was not read.
        gate_loss_after: Gate loss just after it; None where it was not read.
    """

    kind: ClassVar[str] = "taken_over"
    package: int
    taken: Taken
    grafts: tuple[int, ...]
    sites: tuple[str, ...]
    folded: bool = False
    gate_loss_before: float | None = None
    gate_loss_after: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PassengerRemoved(Event):
    """A kernel of a kept package left, since the package does without it.

    Attributes:
        package: Number of the package, from 1.
        graft: Number of the graft, from 1.
        site: Dotted name of its layer.
        rise: Cumulative rise of the gate loss, on the watch's samples, with this kernel and the
            passengers before it switched off.
        upper: Upper end of the 95 % interval of ``rise``.
        allowed: What ``upper`` had to stay below.
        reason: The same in a sentence.
    """

    kind: ClassVar[str] = "passenger_removed"
    package: int
    graft: int
    site: str
    rise: float
    upper: float
    allowed: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWoken(Event):
    """A planned stage of depth began, was done, or was taken back.

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
        verdict: ``"waking"``, ``"awake"`` or ``"put to sleep"``.
        reason: Why, in a sentence.
    """

    kind: ClassVar[str] = "stage_woken"
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
class SeedFaulted(Event):
    """A seed's kernel failed in a forward or a backward.

    Attributes:
        site: Dotted name of the layer.
        seed_idx: Slot in that layer, from 0.
        faults: Calls that were faulty since the last look, at least 1.
        state: Lifecycle state that the seed is in now, in lower case, for example ``"active"``
            or ``"error_recovery"``.
        reason: What the last fault was.
    """

    kind: ClassVar[str] = "seed_faulted"
    site: str
    seed_idx: int
    faults: int
    state: SeedState
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedMeasured(Event):
    """How a seed that contributes is doing, told now and then.

    Latency and health are there where telemetry is on, and a clock makes the latency: it differs
    between two runs that are otherwise equal.

    Attributes:
        site: Dotted name of the layer.
        seed_idx: Slot in that layer, from 0.
        state: Lifecycle state that the seed is in, in lower case.
        alpha: Its share, in [0, 1].
        calls: Calls of its kernel that were read since it came, at least 0.
        faults: Those of them that were faulty.
        fault_rate: Share of faults in the last 200 calls, in [0, 1].
        health: Smoothed health in [0, 1]; None where there is no sample.
        latency_us: Median of the latest times that its kernel took, in microseconds; None where
            none was taken.
        size_bytes: Bytes of the kernel's parameters and buffers.
    """

    kind: ClassVar[str] = "seed_measured"
    site: str
    seed_idx: int
    state: SeedState
    alpha: float = 1.0
    calls: int = 0
    faults: int = 0
    fault_rate: float = 0.0
    health: float | None = None
    latency_us: float | None = None
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedMoved(Event):
    """A seed was isolated, came back, or was given up: its lifecycle state changed for a fault.

    Attributes:
        site: Dotted name of the layer.
        seed_idx: Slot in that layer, from 0.
        before: State that was left: ``"active"`` or ``"error_recovery"``.
        after: State that was entered: ``"error_recovery"`` where it was isolated, ``"active"``
            where a probe has passed, ``"dormant"`` where it was given up.
        reason: Why.
    """

    kind: ClassVar[str] = "seed_moved"
    site: str
    seed_idx: int
    before: SeedState
    after: SeedState
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """Something that had failed was tried again.

    Attributes:
        what: ``"probe"`` of an isolated seed, or ``"load"`` of a kernel.
        outcome: ``"tried again"``, which says nothing yet, ``"recovered"``, ``"failed"`` where
            there may be another try, or ``"given up"``.
        number: Which retry it was, from 1; 0 where none was made.
        site: Dotted name of the layer; empty where it is not known.
        seed_idx: Slot in that layer, from 0; None where it is not known.
        artifact_id: The sha256 of the kernel's bytes; empty where it is not known.
        reason: What had failed.
    """

    kind: ClassVar[str] = "retried"
    what: RetriedWork
    outcome: RetryOutcome
    number: int = 0
    site: str = ""
    seed_idx: int | None = None
    artifact_id: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerMoved(Event):
    """A circuit breaker opened, tries again, or closed.

    Attributes:
        name: What it stands before.
        before: State that was left: ``"closed"``, ``"open"`` or ``"half_open"``.
        after: State that was entered.
        wait_s: Where it has opened, for how long nothing is asked, in seconds; else 0.
    """

    kind: ClassVar[str] = "breaker_moved"
    name: str
    before: BreakerWord
    after: BreakerWord
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelQuarantined(Event):
    """A kernel failed too often in a row, and is not loaded until it is released.

    Attributes:
        artifact_id: The sha256 of the kernel's bytes.
        released: Whether it was let out again, rather than put in.
        reason: What the last failure was; empty where it was released.
    """

    kind: ClassVar[str] = "kernel_quarantined"
    artifact_id: str
    released: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelEmbargoed(Event):
    """A kernel is not asked for, for a while or for the rest of the run.

    Attributes:
        artifact_id: The sha256 of the kernel's bytes.
        for_s: Seconds; None for the rest of the run.
        reason: Why.
    """

    kind: ClassVar[str] = "kernel_embargoed"
    artifact_id: str
    for_s: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnomalySeen(Event):
    """A figure of a seed has left its own history; told once, until it has come back.

    Attributes:
        site: Dotted name of the layer.
        seed_idx: Slot in that layer, from 0.
        what: ``"latency"``, in microseconds, or ``"error rate"``, in [0, 1].
        value: What it is now, over the latest samples.
        usual: What it was before, over many.
        limit: What it has passed.
        reason: The same in a sentence.
    """

    kind: ClassVar[str] = "anomaly_seen"
    site: str
    seed_idx: int
    what: AnomalousFigure
    value: float
    usual: float
    limit: float
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthChanged(Event):
    """Somebody has to see to a layer or to one of its seeds, or need not any more.

    Attributes:
        site: Dotted name of the layer; nothing grows there while it is not healthy.
        healthy: Whether it is.
        score: Health in [0, 1]; None where it is of a seed, which has limits and no score.
        seed_idx: The seed that has passed a limit of its own; None where it is the layer.
        reason: Which limit was passed, with both numbers.
    """

    kind: ClassVar[str] = "health_changed"
    site: str
    healthy: bool
    score: float | None = None
    seed_idx: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryUnavailable(Event):
    """A registry did not answer; the run went on without, and it is asked again.

    Attributes:
        operation: What was asked: ``"put"`` to publish a kernel, ``"fetch"`` to have one,
            ``"search"`` which ones fit, ``"report"`` to take a field report.
        artifact_id: The sha256 of the kernel's bytes; empty for a search.
        reason: What came in place of an answer.
    """

    kind: ClassVar[str] = "registry_unavailable"
    operation: RegistryOperation
    artifact_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFitted(Event):
    """A size was chosen for passes that are made beside the training.

    Attributes:
        work: What they are made for: ``"evaluation"``, ``"ranking"``, ``"trial"`` or ``"probe"``.
        device: Where, as torch names it.
        shapes: Dtypes and shapes of the batch without the axis of samples.
        samples: Samples of the batch, at least 2.
        size: Samples of a pass from now on, at least 1.
        why: What chose it: ``"memory"`` or ``"time"``.
    """

    kind: ClassVar[str] = "batch_fitted"
    work: PassWork
    device: str
    shapes: str
    samples: int
    size: int
    why: FitReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted(Event):
    """A word to the owner: advice, a fallback that was taken, a limit that was met.

    Attributes:
        text: The word, in a sentence or more.
    """

    kind: ClassVar[str] = "noted"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(Event):
    """The controller let go of the model; every hook is removed.

    Attributes:
        grafts_admitted: Grafts that entered the model, at least 0.
        grafts_fossilized: Those of them that were made permanent.
        reason: What ended the run, in a sentence.
        work: FLOPs of the whole run by category; None where not told.
        parameters: Parameters of the model; None where not told.
    """

    kind: ClassVar[str] = "run_ended"
    grafts_admitted: int
    grafts_fossilized: int
    reason: str
    work: dict[str, float] | None = field(default=None, metadata=WHERE_KNOWN)
    parameters: int | None = field(default=None, metadata=WHERE_KNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownEvent(Event):
    """An event that a newer Esper wrote; it is passed on as it is.

    Attributes:
        kind: Its kind.
        body: The whole event, as JSON, byte for byte.
    """

    kind: str  # type: ignore[misc] # of the value here, of the class elsewhere
    body: str


EVENT_TYPES: Final[dict[str, type[Event]]] = {
    cls.kind: cls
    for cls in (
        RunStarted,
        Evaluated,
        Detected,
        Ranked,
        KernelPrepared,
        StageChanged,
        GateRead,
        AlphaChanged,
        Fossilized,
        RolledBack,
        TrialStarted,
        TrialRead,
        TakenOver,
        PassengerRemoved,
        StageWoken,
        SeedFaulted,
        SeedMeasured,
        SeedMoved,
        Retried,
        BreakerMoved,
        KernelQuarantined,
        KernelEmbargoed,
        AnomalySeen,
        HealthChanged,
        RegistryUnavailable,
        BatchFitted,
        Noted,
        RunEnded,
    )
}

_STAGES: Final = tuple(stage.value for stage in GraftStage)
_CLOSED: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "anomaly_seen": {"what": ANOMALOUS_FIGURES},
    "batch_fitted": {"work": PASS_WORK, "why": FIT_REASONS},
    "breaker_moved": {"before": BREAKER_WORDS, "after": BREAKER_WORDS},
    "gate_read": {"gate": GATES},
    "kernel_prepared": {"what": PREPARATIONS},
    "registry_unavailable": {"operation": REGISTRY_OPERATIONS},
    "retried": {"what": RETRIED_WORK, "outcome": RETRY_OUTCOMES},
    "seed_faulted": {"state": SEED_STATES},
    "seed_measured": {"state": SEED_STATES},
    "seed_moved": {"before": SEED_STATES, "after": SEED_STATES},
    "stage_changed": {"before": ("", *_STAGES), "after": _STAGES},
    "trial_started": {"attribution": ATTRIBUTIONS},
    "trial_read": {"verdict": TRIAL_VERDICTS, "taken": TAKEN, "attribution": ATTRIBUTIONS},
    "taken_over": {"taken": TAKEN},
    "stage_woken": {"verdict": DEPTH_VERDICTS},
}
"""Fields that hold a word of a closed set, and the set, by the kind of the event."""


def event_to_json(event: Event) -> str:
    """Write one event as one line of JSON, without the newline.

    Raises:
        ValueError: A number in the event is not finite; a gate records None instead.
    """
    if isinstance(event, UnknownEvent):
        return event.body
    also = {"format_version": EVENT_FORMAT_VERSION, "kind": event.kind, "id": event.id}
    return text_of(event, also=also)


def event_from_json(line: str) -> Event:
    """Read one event back; the inverse of :func:`event_to_json`.

    Raises:
        ValueError: The line is not an event, is of a higher major format, lacks a field that has
            no default, has another type of value in one, or a word that is none of its set.
    """
    found = members(line)
    version = json.loads(found.pop("format_version", "null"))
    written = version_to_write("event", version, EVENT_FORMAT_VERSION)
    kind = json.loads(found.pop("kind", "null"))
    if not isinstance(kind, str):
        msg = f"an event has a kind, which is a word; found {kind!r}"
        raise ValueError(msg)  # noqa: TRY004 - a malformed file is a value, not a caller's type
    newer = is_newer(written, EVENT_FORMAT_VERSION)
    wrong = _wrong_word(kind, found)
    if kind not in EVENT_TYPES or (newer and wrong):
        return _unknown(kind, found, line)
    if wrong:
        raise ValueError(wrong)
    if newer:
        found["format_version"] = json.dumps(written)
    found = {"run_id": '""', "seq": "0", **found}
    return value_from(EVENT_TYPES[kind], found, {}, derived=("id",))


def _wrong_word(kind: str, found: dict[str, str]) -> str:
    """Say which field of an event holds a word that is none of its set; empty where none does."""
    for name, words in _CLOSED.get(kind, {}).items():
        word = json.loads(found.get(name, json.dumps(words[0])))
        if word not in words:
            return (
                f"the field {name!r} of a {kind!r} event is one of {', '.join(map(repr, words))}, "
                f"found {word!r}"
            )
    return ""


def _unknown(kind: str, found: dict[str, str], line: str) -> UnknownEvent:
    """Keep an event as it is; when and in which run it happened is read as far as it can be."""
    envelope: dict[str, Any] = {"update": 0, "time_s": 0.0, "run_id": "", "seq": 0}
    for name, default in envelope.items():
        value = json.loads(found.get(name, json.dumps(default)))
        if type(value) is type(default):
            envelope[name] = value
    return UnknownEvent(**envelope, kind=kind, body=line)
