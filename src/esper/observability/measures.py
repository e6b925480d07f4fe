"""What events say in numbers: the one table of which every tool's metrics are made."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Final, TypeAlias

from esper.contracts.choices import (
    ANOMALOUS_FIGURES,
    BREAKER_WORDS,
    DEPTH_VERDICTS,
    GATES,
    REGISTRY_OPERATIONS,
    RETRIED_WORK,
    RETRY_OUTCOMES,
    SEED_STATES,
    TAKEN,
    VERDICTS,
)
from esper.contracts.events import (
    EVENT_TYPES,
    AnomalySeen,
    BreakerMoved,
    Detected,
    Evaluated,
    Event,
    Fossilized,
    GateRead,
    HealthChanged,
    KernelEmbargoed,
    KernelQuarantined,
    PassengerRemoved,
    Ranked,
    RegistryUnavailable,
    Retried,
    RolledBack,
    RunEnded,
    RunStarted,
    SeedFaulted,
    SeedMoved,
    StageChanged,
    StageWoken,
    TakenOver,
    TrialRead,
    TrialStarted,
)
from esper.contracts.lifecycle import GraftStage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Labels: TypeAlias = tuple[str, ...]

MOST_METRICS: Final = 40
"""Names of an owner's metrics that are shown; of more, the first ones are."""

OTHER: Final = "other"
"""Stands for a word that a table does not have, so that no label has values without end."""

_YES: Final = ("yes", "no")
_STAGES: Final = tuple(stage.value for stage in GraftStage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Numbers of one name.

    Attributes:
        name: Its name in Prometheus, behind ``esper_``; the unit is its end where it has one.
        text: What it is, in a sentence.
        counts: Whether it only rises, and Prometheus is to take rates of it.
        labels: Names of its labels. None may be a site, a digest or a run: those have no end.
        words: All values that the labels can have, each shown from the beginning, as 0; empty
            where the first event brings them, and without labels where it has no value before.
        starts_at: What it is before the first event; None where it is nothing.
    """

    name: str
    text: str
    counts: bool = False
    labels: Labels = ()
    words: tuple[Labels, ...] = ()
    starts_at: float | None = None


def _counter(name: str, text: str, **labels: tuple[str, ...]) -> Family:
    """Return a family that begins at 0 for every value that its labels can have."""
    words = tuple(product(*labels.values()))
    return Family(
        name=name, text=text, counts=True, labels=tuple(labels), words=words, starts_at=0.0
    )


def _gauge(name: str, text: str, starts_at: float | None = None, **labels: Labels) -> Family:
    words = tuple(product(*labels.values())) if labels else ((),)
    return Family(name=name, text=text, labels=tuple(labels), words=words, starts_at=starts_at)


FAMILIES: Final = (
    _gauge("run_active", "Whether a run is under way: 1 or 0.", 0.0),
    _gauge("run_seconds", "Seconds from the run's start to its latest event.", 0.0),
    _counter("updates", "Updates of the optimizer, at the latest event."),
    _counter("events", "Events, by their kind.", kind=(*EVENT_TYPES, OTHER)),
    _gauge("gate_loss", "Mean loss on the gate split, in the owner's unit."),
    _gauge("train_loss", "Smoothed training loss, in its own unit."),
    Family(name="metric", text="What `evaluate` returned besides, by name.", labels=("metric",)),
    _counter("decisions", "Times that the policy was asked.", verdict=(*VERDICTS, OTHER)),
    _gauge("candidates", "Kernels and places in the latest ranking.", 0.0, ranked=_YES),
    _gauge("grafts", "Grafts, by the stage that they are in.", 0.0, stage=_STAGES),
    _counter("stage_changes", "Changes of a graft's stage, by the one entered.", stage=_STAGES),
    _gauge("trial_active", "Whether a package is on trial: 1 or 0.", 0.0),
    _gauge("trial_parameters", "Parameters of the latest package that was tried.", 0.0),
    _gauge("trial_memory_bytes", "Memory that its copies were estimated to take.", 0.0),
    _counter("trials", "Trials that were read.", verdict=("taken over", "refused", OTHER)),
    _counter("work_flops", "Floating point operations that trials took."),
    _gauge("trial_effect", "Fall of the gate loss in the latest trial, in its unit."),
    _gauge("trial_stderr", "Standard error of it, in the same unit."),
    _gauge("trial_capacity", "Part of it that is the package's capacity, in the same unit."),
    _counter("gates", "Gates that were read.", gate=GATES, passed=_YES),
    _counter("takeovers", "Packages that were taken over.", taken=tuple(filter(None, TAKEN))),
    _counter("fossilized", "Grafts that were made permanent.", folded=_YES),
    _counter("rollbacks", "Grafts and packages that were put back."),
    _counter("updates_lost", "Updates that putting back undid."),
    _counter("passengers_removed", "Kernels that their package does as well without."),
    _counter("depth_stages", "Changes of planned stages of depth.", verdict=DEPTH_VERDICTS),
    _counter("seed_faults", "Calls in which a seed's kernel failed."),
    _counter("seed_moves", "Changes of a seed's state for a fault.", after=SEED_STATES),
    _counter("retries", "Tries after a failure.", what=RETRIED_WORK, outcome=RETRY_OUTCOMES),
    _counter("breaker_moves", "Changes of circuit breakers.", after=BREAKER_WORDS),
    _counter("kernels_quarantined", "Kernels put in quarantine, or let out.", released=_YES),
    _counter("kernels_embargoed", "Kernels that are not asked for, for a while or for good."),
    _counter("anomalies", "Figures of seeds that left their own history.", what=ANOMALOUS_FIGURES),
    _gauge("unhealthy", "Layers and seeds that somebody has to see to.", 0.0),
    _counter(
        "registry_unavailable",
        "Times that a registry did not answer.",
        operation=REGISTRY_OPERATIONS,
    ),
)
"""Every family. What only rises ends in ``_total`` in Prometheus."""


@dataclass(frozen=True, slots=True)
class Change:
    """A number that an event brought.

    Attributes:
        name: Of its family.
        value: The number.
        labels: Values of the labels.
        is_added: Whether it is added to what was there, in place of standing for it.
    """

    name: str
    value: float
    labels: Labels = ()
    is_added: bool = False


def changes_of(event: Event) -> Iterator[Change]:
    """Yield what an event says in numbers."""
    yield Change("run_seconds", event.time_s)
    yield Change("updates", event.update)
    yield _one("events", event.kind)
    match event:
        case RunStarted():
            yield Change("run_active", 1)
        case RunEnded():
            yield Change("run_active", 0)
            yield Change("trial_active", 0)
        case Evaluated():
            yield from _of_reading(event)
        case Detected():
            yield _one("decisions", event.verdict)
        case Ranked():
            yield Change("candidates", len(event.rows), ("yes",))
            yield Change("candidates", len(event.refused), ("no",))
        case StageWoken():
            yield _one("depth_stages", event.verdict)
        case TrialStarted() | TrialRead() | GateRead():
            yield from _of_trial(event)
        case StageChanged() | TakenOver() | Fossilized() | RolledBack() | PassengerRemoved():
            yield from _of_graft(event)
        case _:
            yield from _of_trouble(event)


def _of_trouble(event: Event) -> Iterator[Change]:
    match event:
        case SeedFaulted():
            yield Change("seed_faults", event.faults, is_added=True)
        case SeedMoved():
            yield _one("seed_moves", event.after)
        case Retried():
            yield _one("retries", event.what, event.outcome)
        case BreakerMoved():
            yield _one("breaker_moves", event.after)
        case KernelQuarantined():
            yield _one("kernels_quarantined", _yes(event.released))
        case KernelEmbargoed():
            yield _one("kernels_embargoed")
        case AnomalySeen():
            yield _one("anomalies", event.what)
        case HealthChanged():
            yield Change("unhealthy", -1 if event.healthy else 1, is_added=True)
        case RegistryUnavailable():
            yield _one("registry_unavailable", event.operation)


def _of_reading(event: Evaluated) -> Iterator[Change]:
    yield Change("gate_loss", event.gate_loss)
    if event.train_loss is not None:
        yield Change("train_loss", event.train_loss)
    for name, value in event.metrics.items():
        yield Change("metric", value, (name,))


def _of_trial(event: TrialStarted | TrialRead | GateRead) -> Iterator[Change]:
    if isinstance(event, GateRead):
        yield _one("gates", event.gate, _yes(event.passed))
        return
    if isinstance(event, TrialStarted):
        yield Change("trial_active", 1)
        yield Change("trial_parameters", event.parameters)
        if event.memory_bytes is not None:
            yield Change("trial_memory_bytes", event.memory_bytes)
        return
    yield Change("trial_active", 0)
    yield _one("trials", event.verdict)
    if event.flops is not None:
        yield Change("work_flops", event.flops, is_added=True)
    for name in ("effect", "stderr", "capacity"):
        value = getattr(event, name)
        if value is not None:
            yield Change(f"trial_{name}", value)


def _of_graft(event: Event) -> Iterator[Change]:
    match event:
        case StageChanged():
            yield _one("stage_changes", event.after)
            yield _one("grafts", event.after)
            if event.before:
                yield Change("grafts", -1, (event.before,), is_added=True)
        case TakenOver():
            yield _one("takeovers", event.taken)
        case Fossilized():
            yield _one("fossilized", _yes(event.folded))
        case RolledBack():
            yield _one("rollbacks")
            yield Change("updates_lost", event.updates_lost, is_added=True)
        case PassengerRemoved():
            yield _one("passengers_removed")


def _one(name: str, *labels: str) -> Change:
    return Change(name, 1, labels, is_added=True)


def _yes(is_so: bool) -> str:  # noqa: FBT001 - what is turned into a word
    return "yes" if is_so else "no"


class Tally:
    """Keeps the numbers of a run, for whoever asks. It can be used from several threads.

    A label has only words of its table, and one more for all others; of an owner's metrics the
    first 40 names count. So the number of series has an end, however long a run is.

    Args:
        families: What is counted.
    """

    def __init__(self, families: Iterable[Family] = FAMILIES) -> None:
        self._lock = threading.Lock()
        self._families = {family.name: family for family in families}
        self._values: dict[str, dict[Labels, float]] = {
            family.name: dict.fromkeys(family.words, family.starts_at)
            if family.starts_at is not None
            else {}
            for family in self._families.values()
        }

    def take(self, event: Event) -> list[tuple[Family, Labels, float]]:
        """Count an event; return the numbers that it changed, as they are now."""
        return self.count(changes_of(event))

    def count(self, changes: Iterable[Change]) -> list[tuple[Family, Labels, float]]:
        """Make changes; return the numbers as they are now."""
        found = []
        with self._lock:
            for change in changes:
                family = self._families[change.name]
                labels = self._known(family, change.labels)
                if labels is None:
                    continue
                values = self._values[family.name]
                before = values.get(labels, 0.0) if change.is_added else 0.0
                values[labels] = before + change.value
                found.append((family, labels, values[labels]))
        return found

    def rows(self) -> list[tuple[Family, dict[Labels, float]]]:
        """Return every family with its numbers, by the values of its labels."""
        with self._lock:
            return [(family, dict(self._values[name])) for name, family in self._families.items()]

    def _known(self, family: Family, labels: Labels) -> Labels | None:
        """Return labels with what their table does not have named as such; None if too many."""
        if family.words:
            known = [{word[at] for word in family.words} for at in range(len(labels))]
            return tuple(
                str(word) if word in words else OTHER
                for word, words in zip(labels, known, strict=True)
            )
        values = self._values[family.name]
        is_room = labels in values or family.name != "metric" or len(values) < MOST_METRICS
        return labels if is_room else None
