"""Everything that happens in a run, as frozen values with one JSON form.

An event log is a line of JSON per event: ``{"format_version": 1, "kind": ..., "update": ...,
"time_s": ..., ...}``. ``time_s`` is the only field that a replay may not compare.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Final

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
    """A controller took charge of a model; ``settings`` are the effective values."""

    kind: ClassVar[str] = "run_started"
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(Event):
    """The owner's measure was read on the gate split (losses: lower is better)."""

    kind: ClassVar[str] = "evaluated"
    gate_loss: float
    train_loss: float | None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detected(Event):
    """The detector was asked whether to grow now, and answered with its reason."""

    kind: ClassVar[str] = "detected"
    grow: bool
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked(Event):
    """Candidates were ranked. ``rows`` best first; ``refused`` with a reason each."""

    kind: ClassVar[str] = "ranked"
    rows: list[dict[str, Any]]
    refused: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChanged(Event):
    """A graft moved from one stage to the next. ``before`` is empty at germination."""

    kind: ClassVar[str] = "stage_changed"
    graft: int
    site: str
    seed_idx: int
    blueprint: str
    artifact_id: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRead(Event):
    """A gate was read, once. ``effect`` is the fall of the gate loss; positive is better."""

    kind: ClassVar[str] = "gate_read"
    graft: int
    gate: str
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
    """A seed's alpha was set; along a ramp only its start and its end are events."""

    kind: ClassVar[str] = "alpha_changed"
    graft: int
    alpha: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fossilized(Event):
    """A graft was made permanent; ``folded`` says whether into the host's own weights.

    ``rel_diff`` is the measured difference of the layer's output; None where nothing was folded.
    """

    kind: ClassVar[str] = "fossilized"
    graft: int
    site: str
    folded: bool
    rel_diff: float | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(Event):
    """A graft was removed after admission. ``updates_lost`` is 0 where the host was kept."""

    kind: ClassVar[str] = "rolled_back"
    graft: int
    updates_lost: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedFaulted(Event):
    """A seed's kernel failed in a forward or a backward; ``state`` is where the seed is now."""

    kind: ClassVar[str] = "seed_faulted"
    site: str
    seed_idx: int
    faults: int
    state: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted(Event):
    """A word to the owner: advice, a fallback that was taken, a limit that was met."""

    kind: ClassVar[str] = "noted"
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(Event):
    """The controller let go of the model; every hook is removed."""

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
        ValueError: The line is not an event, is of a newer format, or has other fields.
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
    return cls(**body)
