"""Everything that happens in a run, as frozen values with one JSON form.

An event log is a line of JSON per event: ``{"format_version": 1, "kind": ..., "update": ...,
"time_s": ..., ...}``. ``time_s`` is the only field that a replay may not compare.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar, Final

from esper.contracts.choices import GATES, SEED_STATES
from esper.contracts.lifecycle import GraftStage

if TYPE_CHECKING:
    from typing import Literal

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.choices import Gate, SeedState, Verdict

EVENT_FORMAT_VERSION: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
        update: Number of optimizer updates done when it happened; 0 before the first.
        time_s: Seconds since the run started, by the injected clock.
    """

    kind: ClassVar[str] = ""
    update: int
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """A controller took charge of a model.

    Attributes:
        settings: Effective value of every setting of the controller, by name.
    """

    kind: ClassVar[str] = "run_started"
    settings: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """The owner's measure was read on the gate split.

    Attributes:
        gate_loss: Mean loss on the gate split, in the owner's unit, finite; lower is better,
            whatever the owner's goal.
        train_loss: Smoothed training loss, in its own unit; None where there is none yet, or it
            is not finite.
        metrics: Whatever else ``evaluate`` returned, by name; what is not finite is left out.
    """

    kind: ClassVar[str] = "evaluated"
    gate_loss: float
    train_loss: float | None
    metrics: dict[str, float] = field(default_factory=dict)


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
            predicted gain in the ranking's own unit, and its ``stderr``, both None without a
            score; ``parameters`` of the kernel; ``flops`` of a forward of one sample, None where
            not counted; and ``reason``, why there is no score.
        refused: One per place or kernel that was not scored, with ``site``, ``blueprint`` (empty
            where the whole site was refused) and ``reason``.
    """

    kind: ClassVar[str] = "ranked"
    rows: list[JsonObject]
    refused: list[JsonObject] = field(default_factory=list)


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

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", GraftStage(self.after))
        if self.before:
            object.__setattr__(self, "before", GraftStage(self.before))


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRead(Event):
    """A gate was read, once.

    Attributes:
        graft: Number of the graft, from 1.
        gate: ``"admission"`` or ``"fossilization"``.
        passed: Whether the graft may go on.
        effect: Mean fall of the gate loss, reference minus candidate, in units of the loss;
            positive is better. None where it was not measured.
        stderr: Standard error of ``effect`` with tau in it, in units of the loss, at least 0;
            None where it was not measured.
        tau: Spread between models that ought to be equal, in units of the loss, at least 0; None
            where it was not measured.
        z: ``effect / stderr``; None where one is missing or the error is 0.
        level: One-sided level of the test, in (0, 0.5).
        samples: Number of paired samples of the gate split, at least 0.
        reason: What was decided and on what, in a sentence.
    """

    kind: ClassVar[str] = "gate_read"
    graft: int
    gate: Gate
    passed: bool
    effect: float | None
    stderr: float | None
    tau: float | None
    z: float | None
    level: float
    samples: int
    reason: str


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
        reason: Why it was not folded, in a few words; empty where it was.
    """

    kind: ClassVar[str] = "fossilized"
    graft: int
    site: str
    folded: bool
    rel_diff: float | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(Event):
    """A graft was removed after admission.

    Attributes:
        graft: Number of the graft, from 1.
        updates_lost: Optimizer updates that were undone, at least 0; 0 where the host was kept.
        reason: Why, in a sentence.
    """

    kind: ClassVar[str] = "rolled_back"
    graft: int
    updates_lost: int
    reason: str


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
    """

    kind: ClassVar[str] = "run_ended"
    grafts_admitted: int
    grafts_fossilized: int
    reason: str


EVENT_TYPES: Final[dict[str, type[Event]]] = {
    cls.kind: cls
    for cls in (
        RunStarted,
        Evaluated,
        Detected,
        Ranked,
        StageChanged,
        GateRead,
        AlphaChanged,
        Fossilized,
        RolledBack,
        SeedFaulted,
        Noted,
        RunEnded,
    )
}

_STAGES: Final = tuple(stage.value for stage in GraftStage)
_CLOSED: Final[dict[str, tuple[str, ...]]] = {
    "gate": GATES,
    "state": SEED_STATES,
    "before": ("", *_STAGES),
    "after": _STAGES,
}
"""Fields that hold a word of a closed set, and the set."""


def event_to_json(event: Event) -> str:
    """Write one event as one line of JSON, without the newline.

    Raises:
        ValueError: A number in the event is not finite; a gate records None instead.
    """
    body = {"format_version": EVENT_FORMAT_VERSION, "kind": event.kind, **asdict(event)}
    return json.dumps(body, sort_keys=True, allow_nan=False, ensure_ascii=False)


def event_from_json(line: str) -> Event:
    """Read one event back; the inverse of :func:`event_to_json`.

    Raises:
        ValueError: The line is not an event, is of a newer format, has other fields, or has a word
            in one that is none of its set.
    """
    body = json.loads(line)
    if not isinstance(body, dict):
        msg = f"an event is a JSON object, found {type(body).__name__}"
        raise ValueError(msg)  # noqa: TRY004 - a malformed file is a value, not a caller's type
    version = body.pop("format_version", None)
    if not isinstance(version, int) or version > EVENT_FORMAT_VERSION:
        msg = (
            f"event format {version!r} is not known here (this Esper reads up to "
            f"{EVENT_FORMAT_VERSION}); read it with a newer Esper"
        )
        raise ValueError(msg)
    kind = body.pop("kind", None)
    cls = EVENT_TYPES.get(kind)
    if cls is None:
        msg = f"unknown event kind {kind!r}; known: {', '.join(sorted(EVENT_TYPES))}"
        raise ValueError(msg)
    known = {f.name for f in fields(cls)}
    if known != body.keys():
        odd = sorted(known ^ body.keys())
        msg = f"a {kind!r} event has the fields {sorted(known)}; these do not match: {odd}"
        raise ValueError(msg)
    for name, words in _CLOSED.items():
        if name in body and body[name] not in words:
            msg = (
                f"the field {name!r} of a {kind!r} event is one of {', '.join(map(repr, words))}, "
                f"found {body[name]!r}"
            )
            raise ValueError(msg)
    return cls(**body)
