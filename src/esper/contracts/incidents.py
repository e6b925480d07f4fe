"""What went wrong with seeds and sources in a run, and came right again, told by its events."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from esper.contracts.events import (
    AnomalySeen,
    BreakerMoved,
    Event,
    HealthChanged,
    KernelEmbargoed,
    KernelQuarantined,
    RegistryUnavailable,
    Retried,
    SeedFaulted,
    SeedMoved,
)
from esper.contracts.run_records import DIGEST_SHOWN, IncidentRecord

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST: Final = 500
"""Different things that a report tells; the log has them all."""

_Key = tuple[str, str, int | None, str]


class Incidents:
    """One record for each thing that went wrong, however often it did.

    Args:
        records: Those of a run that goes on.
    """

    def __init__(self, records: Iterable[IncidentRecord] = ()) -> None:
        self._records: dict[_Key, IncidentRecord] = {
            (r.kind, r.site, r.seed_idx, r.subject): r for r in records
        }

    @property
    def records(self) -> tuple[IncidentRecord, ...]:
        """What went wrong, in the order in which it first did."""
        return tuple(self._records.values())

    def take(self, event: Event) -> None:
        """Follow one event; those that tell of nothing that went wrong are passed over."""
        text = incident_text(event)
        if not text:
            return
        site, seed_idx = getattr(event, "site", ""), getattr(event, "seed_idx", None)
        subject = _subject(event)
        key = (event.kind, site, seed_idx, subject)
        known = self._records.get(key)
        if known is not None:
            self._records[key] = replace(known, last=event.update, times=known.times + 1, text=text)
        elif len(self._records) < MOST:
            self._records[key] = IncidentRecord(
                kind=event.kind,
                site=site,
                seed_idx=seed_idx,
                subject=subject,
                since=event.update,
                last=event.update,
                times=1,
                text=text,
            )


def _subject(event: Event) -> str:
    match event:
        case BreakerMoved():
            return event.name
        case RegistryUnavailable():
            return event.operation
        case AnomalySeen():
            return event.what
        case Retried() | KernelQuarantined() | KernelEmbargoed():
            return event.artifact_id
    return ""


def incident_text(event: Event) -> str:  # noqa: C901 - a table of kinds, one each
    """Say in a few words what an event tells that went wrong, or came right; else nothing."""
    match event:
        case SeedFaulted():
            calls = f"{event.faults} faulty calls" if event.faults else "out of use"
            return f"{calls}: {event.reason}"
        case SeedMoved():
            return f"{event.before} to {event.after}: {event.reason}"
        case Retried():
            number = f", retry {event.number}" if event.number else ""
            return f"{event.what} {event.outcome}{number}: {event.reason}"
        case BreakerMoved():
            wait = f", for {event.wait_s:.3g} s" if event.wait_s else ""
            return f"the breaker of {event.name} is {event.after.replace('_', ' ')}{wait}"
        case KernelQuarantined():
            kernel = f"kernel {event.artifact_id[:DIGEST_SHOWN]}"
            if event.released:
                return f"{kernel} was released from quarantine"
            return f"{kernel} is in quarantine: {event.reason}"
        case KernelEmbargoed():
            how_long = "again in this run" if event.for_s is None else f"for {event.for_s:.3g} s"
            kernel = f"kernel {event.artifact_id[:DIGEST_SHOWN]}"
            return f"{kernel} is not asked for {how_long}: {event.reason}"
        case AnomalySeen():
            return event.reason or f"its {event.what} is {event.value:.3g}"
        case HealthChanged():
            return f"{'healthy' if event.healthy else 'unhealthy'}: {event.reason}"
        case RegistryUnavailable():
            return f"the registry did not answer a {event.operation}: {event.reason}"
    return ""
