"""Between steps: read what devices have counted, move seeds, and try isolated ones again."""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Final

from torch import nn

from esper.contracts.choices import SEED_STATES
from esper.contracts.errors import KernelExecutionError
from esper.contracts.events import Retried, SeedFaulted, SeedMoved
from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.gradient_gates import keep_gated
from esper.forward.recompilation import grant
from esper.forward.written_alphas import take_written_alphas
from esper.resilience.attempt import Failed, attempt
from esper.seeds.grafting import check_weight, finish_waiting
from esper.seeds.isolation import (
    FIRST_RETRY_READINGS,
    SeedFault,
    SkippedCalls,
    count_skipped,
    drop_gradients,
    isolate_if_moved,
    take_untold,
)
from esper.seeds.layer_health import (
    UnhealthyLayer,
    report_success,
    update_health,
)
from esper.seeds.out_of_use import bypassed, take_losses
from esper.seeds.probe import probe
from esper.seeds.seed_figures import figures_of
from esper.seeds.slots import insert, withdraw
from esper.state.host_parts import check_module
from esper.state.kernel import reference_tensor
from esper.state.layer_record import RECORD, LayerRecord, record_of
from esper.state.observation import Reading, read
from esper.state.ranges import named_range
from esper.state.shards import is_sharded
from esper.state.state_layout import FAULTS_IN_A_ROW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from esper.contracts.choices import RetryOutcome
    from esper.contracts.events import Event
    from esper.contracts.ports import EventSink
    from esper.state.layer_call import LayerCall
    from esper.state.seed_slot import Seed


_logger = logging.getLogger(__name__)

_STARTED_S: Final = time.monotonic()
"""When events without a Grower begin to be dated."""

MEASURED_EVERY: Final = 100
"""At one update in so many is told how each contributing seed is doing."""

MAX_RETRIES: Final = 3
"""After so many failed probes the seed becomes dormant."""


_S: Final = SeedLifecycleState


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedTransition:
    """A seed was moved.

    Attributes:
        layer: Name of the layer.
        seed_idx: Index of the seed.
        before: Where it was.
        after: Where it is.
        reason: Why.
    """

    layer: str
    seed_idx: int
    before: SeedLifecycleState
    after: SeedLifecycleState
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MaintenanceReport:
    """What :func:`maintain` found and did.

    Attributes:
        faults: Seeds that were at fault, in the model's order.
        transitions: Seeds that were moved, in the model's order.
        unhealthy: Layers that somebody has to see to, of those whose kernels were called.
        skipped: Calls that went on without a kernel for no fault of its own.
    """

    faults: tuple[SeedFault, ...] = ()
    transitions: tuple[SeedTransition, ...] = ()
    unhealthy: tuple[UnhealthyLayer, ...] = ()
    skipped: tuple[SkippedCalls, ...] = ()


def maintain(
    model: nn.Module, *, sink: EventSink | None = None, update: int = 0
) -> MaintenanceReport:
    """Read the counters of all seeds, isolate the faulty, and probe the isolated that are due.

    What waits for a call of its layer, and has seen one, becomes live. Looks at every module of the
    model, and makes one transfer for each contributing seed. Kernels that others have put out of
    use, as by exchanging their layer or its forward, are among the faults, with 0 faulty calls and
    the reason.

    Args:
        model: A model with wrapped layers, or one such layer.
        sink: Takes what has happened as events, for a loop without a Grower, which publishes them
            itself. How each contributing seed is doing is among them at every 100th update.
        update: Optimizer updates done, for the events.

    Raises:
        TypeError: ``model`` is no module.
        KernelExecutionError: A fossil that was not folded failed three times in a row; it cannot
            be isolated. Every layer has been looked at, and what has happened was told.
    """
    check_module("maintain", model)
    tell = None if sink is None else functools.partial(_publish, sink, update)
    measures = sink is not None and update % MEASURED_EVERY == 0
    return _maintain(_layers(model), take_losses(model), again=True, measures=measures, tell=tell)


def maintain_layers(
    layers: Iterable[nn.Module],
    *,
    measures: bool = False,
    tell: Callable[[Event], None] | None = None,
) -> MaintenanceReport:
    """Do what :func:`maintain` does, for layers that are known (``Roster.busy``).

    What bypasses a layer's kernels is told once.

    Args:
        layers: The layers.
        measures: Whether is told how each contributing seed is doing.
        tell: Takes what has happened, as events without their moment.
    """
    found = list(layers)
    if not found:  # the usual case, in each step of a run that has not grown
        grant()
        return MaintenanceReport()
    lost = [loss for layer in found for loss in take_losses(layer)]
    return _maintain(found, lost, again=False, measures=measures, tell=tell)


def read_calls(layer: nn.Module) -> None:
    """Read what a layer's calls have shown, and let the next look at it tell what has happened.

    A seed that is out of use comes no nearer to its next probe.
    """
    found, record = _Found(), record_of(layer)
    in_use = [i for i in record.seeds if record.layout.state(i) != _S.ERROR_RECOVERY]
    grant()
    _maintain_layer(layer, found, again=False, measures=False, tries_again=False)
    for i in in_use:
        if record.layout.state(i) == _S.ERROR_RECOVERY:
            record.seeds[i].readings_to_wait += 1  # the next look tells of it, and does not wait
    found.unhealthy.clear()  # which is how it is, and no news
    record.own.keep(_Found, found)


def _publish(sink: EventSink, update: int, event: Event) -> None:
    outcome = attempt(
        lambda: sink.publish(replace(event, update=update, time_s=time.monotonic() - _STARTED_S))
    )
    if isinstance(outcome, Failed):
        _logger.warning("%s failed on a %r event", type(sink).__name__, event.kind)


@dataclass(slots=True)
class _Found:
    """What one look at some layers has found, so far."""

    faults: list[SeedFault] = field(default_factory=list)
    transitions: list[SeedTransition] = field(default_factory=list)
    failing: list[SeedFault] = field(default_factory=list)
    unhealthy: list[UnhealthyLayer] = field(default_factory=list)
    skipped: list[SkippedCalls] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def add(self, other: _Found) -> None:
        """Add what another look has found."""
        for each in fields(self):
            getattr(self, each.name).extend(getattr(other, each.name))

    def moved(self, transition: SeedTransition) -> None:
        """Add that a seed was moved."""
        self.transitions.append(transition)
        self.events.append(_moved(transition))


def _maintain(
    layers: Iterable[nn.Module],
    lost: list[SeedFault],
    *,
    again: bool,
    measures: bool,
    tell: Callable[[Event], None] | None,
) -> MaintenanceReport:
    found = _Found(faults=list(lost))
    grant()
    for layer in layers:
        _maintain_layer(layer, found, again=again, measures=measures)
    if tell is not None:
        for event in (*map(_faulted, found.faults), *found.events):
            tell(event)
    if found.failing:
        worst = found.failing[0]
        msg = (
            f"fossil {worst.seed_idx} of layer {worst.layer!r} failed {FAULTS_IN_A_ROW} times in "
            f"a row and cannot be isolated: {worst.reason}; restore a snapshot from before it"
        )
        raise KernelExecutionError(msg)
    return MaintenanceReport(
        faults=tuple(found.faults),
        transitions=tuple(found.transitions),
        unhealthy=tuple(found.unhealthy),
        skipped=tuple(found.skipped),
    )


def _maintain_layer(
    layer: nn.Module, found: _Found, *, again: bool, measures: bool, tries_again: bool = True
) -> None:
    finish_waiting(layer)
    outcomes: list[bool] = []
    take_written_alphas(layer)
    found.faults += bypassed(layer, again=again)
    record = record_of(layer)
    _add_untold(record, found)
    num_compiled = 0
    for seed_idx, seed in sorted(record.seeds.items()):
        if not tries_again and record.layout.state(seed_idx) == _S.ERROR_RECOVERY:
            continue
        num_before = len(outcomes)
        num_compiled = max(num_compiled, _maintain_seed(layer, seed_idx, seed, found, outcomes))
        if record.layout.contributes(seed_idx) or len(outcomes) > num_before:
            found.events += figures_of(record).take(record, seed, outcomes[num_before:])
    if record.telemetry_enabled:
        record.active_count += num_compiled
    ill, news = update_health(record, outcomes)
    if ill is not None:
        found.unhealthy.append(ill)
    if news is not None:
        found.events.append(news)
    for seed in record.plan if measures else ():
        if not seed.is_shadow:
            found.events += figures_of(record).measured(record, seed)


def _add_untold(record: LayerRecord, found: _Found) -> None:
    """Add what was found since the last look: by statistics, and by an optimizer's step."""
    untold = record.own.find(_Found)
    if untold is not None:
        found.add(untold)
        record.own.keep(_Found, _Found())
    for before, fault in take_untold(record):
        found.faults.append(fault)
        if fault.state != before:
            moved = _transition(record, fault.seed_idx, before, fault.reason)
            found.moved(replace(moved, after=fault.state))  # it may have gone on since


def _faulted(fault: SeedFault) -> SeedFaulted:
    return SeedFaulted(
        update=0,
        time_s=0.0,
        site=fault.layer,
        seed_idx=fault.seed_idx,
        faults=fault.faults,
        state=SEED_STATES[fault.state],
        reason=fault.reason,
    )


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if RECORD in module.__dict__]


def _maintain_seed(
    layer: nn.Module, seed_idx: int, seed: Seed, found: _Found, outcomes: list[bool]
) -> int:
    """Read one seed's calls and act on them.

    Args:
        layer: The layer.
        seed_idx: The seed.
        seed: Its record.
        found: Takes what happens.
        outcomes: Takes the outcomes of the calls, True at fault.

    Returns:
        How many calls were made in compiled code.
    """
    record = record_of(layer)
    before = record.layout.state(seed_idx)
    num_compiled = 0
    if before == _S.ERROR_RECOVERY:
        found.events += _try_again(layer, seed_idx, seed)
    else:
        reading = _read_calls(seed)
        num_compiled = reading.num_compiled
        if record.telemetry_enabled:
            record.kernel_execution_count += num_compiled
        outcomes += reading.outcomes
        found.skipped += count_skipped(record, seed, reading.skipped)
        longest = record.layout.record_calls(seed_idx, reading.outcomes)
        if any(reading.outcomes):
            fault = isolate_if_moved(layer, seed_idx, seed, sum(reading.outcomes))
            found.faults.append(fault)
            if before == _S.FOSSILIZED and longest >= FAULTS_IN_A_ROW:
                found.failing.append(fault)
        elif before == _S.FOSSILIZED and seed.guard == "step":
            found.failing += _fossil_at_fault(record, seed_idx, seed)
        if reading.outcomes and not any(reading.outcomes):
            report_success(record, seed)
    after = record.layout.state(seed_idx)
    if after != before:
        found.moved(_transition(record, seed_idx, before, seed.last_error))
    return num_compiled


def _read_calls(seed: Seed) -> Reading:
    """Return what the calls since the last reading have shown; start anew.

    The optimizer's next step is still told under ``guard="step"``: the gradients may be waiting.
    """
    seed.follow_device()
    seen = seed.seen
    seed.forget_calls()  # before they are read: other threads may go on calling
    seed.seen.carried = seen.step_flags() if seed.guard == "step" else None
    reading = read(seen, works_on_batches=seed.works_on_batches)
    seed.works_on_batches = reading.works_on_batches
    seed.runs_compiled |= reading.has_compiled
    if seed.runs_compiled:
        keep_gated(seed)  # no backward of a graph does
    if reading.reason and reading.reason != "raised":  # the fence has said more
        seed.last_error = reading.reason
    return reading


def _fossil_at_fault(record: LayerRecord, seed_idx: int, seed: Seed) -> list[SeedFault]:
    """Return the fault of a fossil whose last steps, read by the optimizer, were all dropped."""
    faults = int(record.layout.error_count[seed_idx])
    if faults < FAULTS_IN_A_ROW:
        return []
    state = record.layout.state(seed_idx)
    return [
        SeedFault(
            layer=record.name,
            seed_idx=seed_idx,
            faults=faults,
            state=state,
            reason=seed.last_error,
        )
    ]


def _transition(
    record: LayerRecord, seed_idx: int, before: SeedLifecycleState, reason: str
) -> SeedTransition:
    after = record.layout.state(seed_idx)
    return SeedTransition(
        layer=record.name, seed_idx=seed_idx, before=before, after=after, reason=reason
    )


def _moved(moved: SeedTransition) -> SeedMoved:
    return SeedMoved(
        update=0,
        time_s=0.0,
        site=moved.layer,
        seed_idx=moved.seed_idx,
        before=SEED_STATES[moved.before],
        after=SEED_STATES[moved.after],
        reason=moved.reason,
    )


def _try_again(layer: nn.Module, seed_idx: int, seed: Seed) -> list[Event]:
    """Count down to the next probe of an isolated seed; run it when due, and say what came."""
    drop_gradients(seed)  # a backward may have been under way when it was isolated
    seed.readings_to_wait -= 1
    if seed.readings_to_wait > 0:
        return []
    record, fault = record_of(layer), seed.last_error
    _probe_again(layer, seed_idx, seed)
    outcomes: dict[SeedLifecycleState, RetryOutcome] = {
        _S.ACTIVE: "recovered",
        _S.DORMANT: "given up",
    }
    outcome = outcomes.get(record.layout.state(seed_idx), "failed")
    retried = Retried(
        update=0,
        time_s=0.0,
        what="probe",
        outcome=outcome,
        number=seed.num_retries,
        site=record.name,
        seed_idx=seed_idx,
        artifact_id=seed.kernel.artifact_id or "",
        reason=fault if outcome == "recovered" else seed.last_error,
    )
    return [retried]


def _probe_again(layer: nn.Module, seed_idx: int, seed: Seed) -> None:
    """Probe an isolated seed that is due, and act on it."""
    record = record_of(layer)
    seed.num_retries += 1
    if seed.example is None:
        _give_up(layer, seed_idx, seed, "no example to probe it with")
        return
    if is_sharded(layer):
        reason = "its layer is sharded, and a probe would wait for ranks that may not make it"
        _give_up(layer, seed_idx, seed, f"{reason}: {seed.last_error}")
        return
    probed = attempt(functools.partial(_probe, layer, seed, seed.example))
    if isinstance(probed, Failed):  # a kernel, or a host of another dtype that refuses the example
        error = probed.error
        seed.last_error = str(error)
        seed.readings_to_wait = FIRST_RETRY_READINGS << seed.num_retries
        if seed.num_retries >= MAX_RETRIES:
            _give_up(layer, seed_idx, seed, f"{MAX_RETRIES} probes failed, the last: {error}")
        return
    if seed.num_retries > MAX_RETRIES:
        _give_up(layer, seed_idx, seed, f"isolated again after {MAX_RETRIES} retries")
        return
    seed.last_error = "the probe passed"
    seed.forget_calls()
    record.layout.transition_seed_state(seed_idx, _S.ACTIVE)
    insert(layer, seed, record.layout.alpha(seed_idx))


def _probe(layer: nn.Module, seed: Seed, example: LayerCall) -> None:
    device = reference_tensor(layer).device  # the model may have moved without it
    seed.slot.to(device)
    with named_range(record_of(layer), seed.seed_idx, "probe"):
        probe(layer, seed.kernel, example.to(device))
    check_weight(layer, seed.seed_idx, seed.kernel, record_of(layer).layout.alpha(seed.seed_idx))


def _give_up(layer: nn.Module, seed_idx: int, seed: Seed, reason: str) -> None:
    seed.last_error = reason
    record_of(layer).layout.transition_seed_state(seed_idx, _S.DORMANT)
    withdraw(layer, seed_idx)
