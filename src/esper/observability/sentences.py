"""An event in one sentence, for tools that show words beside curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.contracts.events import (
    AlphaChanged,
    AnomalySeen,
    BatchFitted,
    BreakerMoved,
    Detected,
    Evaluated,
    Event,
    Fossilized,
    GateRead,
    HealthChanged,
    KernelEmbargoed,
    KernelPrepared,
    KernelQuarantined,
    Noted,
    PassengerRemoved,
    Ranked,
    RegistryUnavailable,
    Retried,
    RolledBack,
    RunEnded,
    RunStarted,
    SeedFaulted,
    SeedMeasured,
    SeedMoved,
    StageChanged,
    StageWoken,
    TakenOver,
    TrialRead,
    TrialStarted,
)
from esper.contracts.incidents import incident_text

if TYPE_CHECKING:
    from collections.abc import Callable


def _because(reason: str) -> str:
    return f": {reason}" if reason else ""


_SENTENCES: dict[type[Event], Callable[..., str]] = {
    RunStarted: lambda _: "the run started",
    Detected: lambda e: f"{'growing' if e.grow else 'not growing'}, {e.verdict}: {e.reason}",
    Ranked: lambda e: f"{len(e.rows)} candidates ranked, {len(e.refused)} refused",
    KernelPrepared: lambda e: (
        f"{e.what} of {e.blueprint or e.artifact_id[:12]}{f' at {e.site}' if e.site else ''} "
        + ("is done" if e.done else "failed")
        + (f", it took {e.took_s:.3g} s" if e.took_s is not None else "")
    ),
    StageChanged: lambda e: (
        f"graft {e.graft} ({e.blueprint}, at {e.site}) is {e.after}"
        + (f": {e.reason}" if e.reason else "")
    ),
    GateRead: lambda e: (
        f"gate {e.gate} of graft {e.graft} {'passed' if e.passed else 'not passed'}: {e.reason}"
    ),
    AlphaChanged: lambda e: f"alpha of graft {e.graft} is {e.alpha:g}",
    TrialStarted: lambda e: (
        f"trial of package {e.package} started at {', '.join(e.sites)}: "
        f"{', '.join(e.blueprints)}, {e.parameters:,} parameters, {e.trial_updates} updates"
    ),
    TrialRead: lambda e: f"package {e.package} {e.verdict}: {e.reason}",
    TakenOver: lambda e: f"package {e.package}: the run goes on as {e.taken}",
    Fossilized: lambda e: (
        f"graft {e.graft} at {e.site} is permanent{', folded' if e.folded else ''}"
        + (f": {e.reason}" if e.reason else "")
    ),
    RolledBack: lambda e: (
        (f"package {e.package}" if e.package is not None else f"graft {e.graft}")
        + f" was put back, {e.updates_lost} updates lost: {e.reason}"
    ),
    PassengerRemoved: lambda e: f"graft {e.graft} at {e.site} left its package: {e.reason}",
    StageWoken: lambda e: (
        f"{e.path} is {e.verdict} at {e.depth} blocks" + (f": {e.reason}" if e.reason else "")
    ),
    SeedFaulted: lambda e: (
        f"seed {e.seed_idx} at {e.site} failed in {e.faults} calls, and is {e.state}: {e.reason}"
    ),
    SeedMeasured: lambda e: (
        f"seed {e.seed_idx} at {e.site} is {e.state}, {e.faults} of {e.calls} calls failed"
        + (f", {e.latency_us:.0f} us a call" if e.latency_us is not None else "")
    ),
    SeedMoved: lambda e: f"seed {e.seed_idx} at {e.site} is {e.after}{_because(e.reason)}",
    Retried: lambda e: (
        f"{e.what}{f' at {e.site}' if e.site else ''} {e.outcome}{_because(e.reason)}"
    ),
    BreakerMoved: lambda e: f"the breaker of {e.name} is {e.after.replace('_', '-')}",
    KernelQuarantined: lambda e: (
        f"kernel {e.artifact_id[:12]} is "
        f"{'out of' if e.released else 'in'} quarantine{_because(e.reason)}"
    ),
    KernelEmbargoed: lambda e: (
        f"kernel {e.artifact_id[:12]} is not asked for "
        + (f"for {e.for_s:.3g} s" if e.for_s is not None else "any more")
        + _because(e.reason)
    ),
    AnomalySeen: lambda e: (
        f"{e.what} of seed {e.seed_idx} at {e.site} is {e.value:.3g}, usually {e.usual:.3g}"
    ),
    HealthChanged: lambda e: (
        f"{e.site}{'' if e.seed_idx is None else f', seed {e.seed_idx},'} "
        f"{'is well again' if e.healthy else 'is not well'}{_because(e.reason)}"
    ),
    RegistryUnavailable: lambda e: f"the registry did not answer ({e.operation}): {e.reason}",
    BatchFitted: lambda e: (
        f"passes for {e.work} on {e.device} are made of {e.size} samples at a time, in place of "
        f"{e.samples}: {'memory is short' if e.why == 'memory' else 'they take too long'}"
    ),
    Noted: lambda e: e.text,
    RunEnded: lambda e: (
        f"{'' if e.reason == 'the run ended' else 'the run ended: '}{e.reason}; "
        f"{e.grafts_admitted} grafts came in, "
        f"{e.grafts_fossilized} of them for good"
    ),
}

_OF_CURVES = (Evaluated, Ranked, Detected, AlphaChanged, SeedMeasured, KernelPrepared)


def is_annotation(event: Event) -> bool:
    """Say whether an event is a moment that belongs beside curves, and no point of one."""
    return not isinstance(event, _OF_CURVES)


def sentence_of(event: Event) -> str:
    """Return an event in one sentence; of one that has none, its kind."""
    if isinstance(event, Evaluated):
        return f"gate loss {event.gate_loss:.6g}"
    write = _SENTENCES.get(type(event))
    if write is None:
        return incident_text(event) or event.kind.replace("_", " ")
    return write(event)
