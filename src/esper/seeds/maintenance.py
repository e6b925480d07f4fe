"""Between steps: read what devices have counted, move seeds, and try isolated ones again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from esper.contracts.errors import KernelExecutionError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.recompilation import grant
from esper.seeds.layer_health import (
    UnhealthyLayer,
    report_failure,
    report_success,
    update_health,
)
from esper.seeds.occupancy import insert, withdraw
from esper.seeds.probe import probe
from esper.state.host_parts import host_parameters, is_in_a_seed
from esper.state.kernel import reference_tensor
from esper.state.layer_record import RECORD, LayerRecord, record_of
from esper.state.observation import read
from esper.state.state_layout import FAULTS_IN_A_ROW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from esper.state.seed_slot import Seed

FIRST_RETRY_READINGS: Final = 10
"""An isolated seed is probed after so many readings; each further time after twice as many."""

MAX_RETRIES: Final = 3
"""After so many failed probes the seed becomes dormant."""

_S: Final = SeedLifecycleState


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedFault:
    """Faults of one seed since the last reading.

    Attributes:
        layer: Name of the layer.
        seed_idx: Index of the seed.
        faults: How many calls were faulty.
        state: Where the seed is now.
        reason: What the last fault was.
    """

    layer: str
    seed_idx: int
    faults: int
    state: SeedLifecycleState
    reason: str


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
    """

    faults: tuple[SeedFault, ...] = ()
    transitions: tuple[SeedTransition, ...] = ()
    unhealthy: tuple[UnhealthyLayer, ...] = ()


def maintain(model: nn.Module) -> MaintenanceReport:
    """Read the counters of all seeds, isolate the faulty, and probe the isolated that are due.

    Looks at every module of the model, and makes one transfer for each contributing seed.

    Args:
        model: A model with wrapped layers, or one such layer.

    Raises:
        KernelExecutionError: A fossil that was not folded failed three times in a row; it cannot
            be isolated. Every layer has been looked at.
    """
    return maintain_layers(_layers(model))


def maintain_layers(layers: Iterable[nn.Module]) -> MaintenanceReport:
    """Do what :func:`maintain` does, for layers that are known (``Roster.busy``)."""
    faults: list[SeedFault] = []
    transitions: list[SeedTransition] = []
    failing: list[SeedFault] = []
    unhealthy: list[UnhealthyLayer] = []
    grant()
    for layer in layers:
        outcomes: list[bool] = []
        for seed_idx, seed in sorted(record_of(layer).seeds.items()):
            outcomes += _maintain_seed(layer, seed_idx, seed, faults, transitions, failing)
        unhealthy += update_health(record_of(layer), outcomes)
    if failing:
        worst = failing[0]
        msg = (
            f"fossil {worst.seed_idx} of layer {worst.layer!r} failed {FAULTS_IN_A_ROW} times in "
            f"a row and cannot be isolated: {worst.reason}; restore a snapshot from before it"
        )
        raise KernelExecutionError(msg)
    return MaintenanceReport(
        faults=tuple(faults), transitions=tuple(transitions), unhealthy=tuple(unhealthy)
    )


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if RECORD in module.__dict__]


def _maintain_seed(
    layer: nn.Module,
    seed_idx: int,
    seed: Seed,
    faults: list[SeedFault],
    transitions: list[SeedTransition],
    failing: list[SeedFault],
) -> list[bool]:
    """Read one seed's calls and act on them; return their outcomes, True at fault."""
    record = record_of(layer)
    before = record.layout.state(seed_idx)
    outcomes: list[bool] = []
    if before == _S.ERROR_RECOVERY:
        _try_again(layer, seed_idx, seed)
    else:
        outcomes = _read_calls(seed)
        longest = record.layout.record_calls(seed_idx, outcomes)
        if any(outcomes):
            fault = _isolate_if_moved(layer, seed_idx, seed, sum(outcomes))
            faults.append(fault)
            if before == _S.FOSSILIZED and longest >= FAULTS_IN_A_ROW:
                failing.append(fault)
        elif before == _S.FOSSILIZED and seed.guard == "step":
            failing += _fossil_at_fault(record, seed_idx, seed)
        if outcomes and not any(outcomes):
            report_success(record, seed)
    after = record.layout.state(seed_idx)
    if after != before:
        transitions.append(_transition(record, seed_idx, before, seed.last_error))
    return outcomes


def _read_calls(seed: Seed) -> list[bool]:
    """Return the outcomes of the calls since the last reading, True at fault; start anew.

    The optimizer's next step is still told under ``guard="step"``: the gradients may be waiting.
    """
    seed.follow_device()
    seen = seed.seen
    seed.forget_calls()  # before they are read: other threads may go on calling
    seed.seen.carried = seen.step_flags() if seed.guard == "step" else None
    outcomes, reason = read(seen)
    if reason and reason != "raised":  # the fence has said more
        seed.last_error = reason
    return outcomes


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


def _isolate_if_moved(layer: nn.Module, seed_idx: int, seed: Seed, faults: int) -> SeedFault:
    """Take the slot out where the layout has isolated the seed; return the fault."""
    record = record_of(layer)
    record.num_faults += faults
    state = record.layout.state(seed_idx)
    if state == _S.ERROR_RECOVERY:
        seed.readings_to_wait = FIRST_RETRY_READINGS << seed.num_retries
        withdraw(layer, seed_idx, keep_record=True)
        _drop_gradients(seed)
        report_failure(record, seed)
    return SeedFault(
        layer=record.name, seed_idx=seed_idx, faults=faults, state=state, reason=seed.last_error
    )


def _drop_gradients(seed: Seed) -> None:
    """Let the optimizer pass an isolated kernel by: no ``model.zero_grad()`` reaches it now."""
    for parameter in seed.slot.parameters():
        parameter.grad = None


def _try_again(layer: nn.Module, seed_idx: int, seed: Seed) -> None:
    """Count down to the next probe of an isolated seed; run it, and act on it, when due."""
    _drop_gradients(seed)  # a backward may have been under way when it was isolated
    seed.readings_to_wait -= 1
    if seed.readings_to_wait > 0:
        return
    record = record_of(layer)
    seed.num_retries += 1
    try:
        if seed.example is None:
            _give_up(layer, seed_idx, seed, "no example to probe it with")
            return
        device = reference_tensor(layer).device  # the model may have moved without it
        seed.slot.to(device)
        probe(layer, seed.kernel, seed.example.to(device))
    except Exception as error:  # noqa: BLE001 - a host of another dtype refuses the example, too
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


def _give_up(layer: nn.Module, seed_idx: int, seed: Seed, reason: str) -> None:
    seed.last_error = reason
    record_of(layer).layout.transition_seed_state(seed_idx, _S.DORMANT)
    withdraw(layer, seed_idx)


def read_step_flags(
    layers: Iterable[nn.Module], over_ranks: Callable[[Tensor], Tensor] | None = None
) -> list[SeedFault]:
    """Read the flags of all seeds under ``guard="step"``, and isolate the faulty at once.

    To be called where gradients are complete and the optimizer has not stepped. A seed is at
    fault where its output was not finite and its host's was, or where its parameters' gradients
    are not finite and those of its host are. One transfer from the device for all seeds together.

    Args:
        layers: Wrapped layers.
        over_ranks: Takes the maximum of bool flags over the ranks that train a model together, so
            that all of them drop a step or none does.

    Returns:
        The faulty seeds; the caller drops the step's gradients if there is one.
    """
    watched = [
        (layer, seed_idx, seed)
        for layer in layers
        for seed_idx, seed in record_of(layer).seeds.items()
        if seed.guard == "step"  # an isolated one, too: ranks may not have isolated it alike
    ]
    if not watched:
        return []
    stacked = torch.stack([_step_flag(layer, seed) for layer, _, seed in watched])
    flags = (stacked if over_ranks is None else over_ranks(stacked)).tolist()
    faults = []
    for (layer, seed_idx, seed), (output_bad, gradient_bad) in zip(watched, flags, strict=True):
        raised = any(call.raised for call in seed.seen.calls)
        if output_bad or gradient_bad:
            what = "output" if output_bad else "gradients"
            seed.last_error = f"its {what} were not finite where its host's were"
            faults.append(_isolate_now(layer, seed_idx, seed))
        elif not raised:
            seed.forget_calls()
            _end_run_of_faults(record_of(layer), seed_idx)
    return faults


def _end_run_of_faults(record: LayerRecord, seed_idx: int) -> None:
    """A clean step ends a run of faults; that of an isolated seed is over."""
    if record.layout.contributes(seed_idx) and int(record.layout.error_count[seed_idx]):
        record.layout.record_calls(seed_idx, [False])


def has_step_seeds(layers: Iterable[nn.Module]) -> bool:
    """Say whether any seed of the layers is under ``guard="step"``."""
    return any(seed.guard == "step" for layer in layers for seed in record_of(layer).seeds.values())


def _step_flag(layer: nn.Module, seed: Seed) -> Tensor:
    """Return a ``[2]`` bool tensor: output at fault, gradients at fault."""
    seed.follow_device()
    output_bad, host_bad = seed.seen.step_flags()
    gradient_bad = _any_not_finite(seed.slot.kernel.parameters(), like=output_bad)
    gradient_bad = gradient_bad & ~host_bad
    if not seed.is_serial:
        hosts_gradient_bad = _any_not_finite(host_parameters(layer), like=output_bad)
        gradient_bad = gradient_bad & ~hosts_gradient_bad
    return torch.stack((output_bad, gradient_bad))


def _any_not_finite(parameters: Iterable[Any], *, like: Tensor) -> Tensor:
    sums = [p.grad.sum(dtype=torch.float32) for p in parameters if p.grad is not None]
    return ~torch.isfinite(torch.stack(sums)).all() if sums else torch.zeros_like(like)


def _isolate_now(layer: nn.Module, seed_idx: int, seed: Seed) -> SeedFault:
    layout = record_of(layer).layout
    seed.forget_calls()
    if layout.state(seed_idx) == _S.ACTIVE:
        layout.isolate(seed_idx)
    elif layout.state(seed_idx) == _S.FOSSILIZED:
        layout.record_calls(seed_idx, [True])
    return _isolate_if_moved(layer, seed_idx, seed, 1)


class KeptBuffers:
    """The last good copy of a model's buffers, for steps that ``guard="step"`` throws away.

    A forward that a faulty kernel has spoiled leaves NaN in running statistics behind it.

    Args:
        model: The model; the slots of its seeds are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, Tensor] = {}
        self.keep()

    def keep(self) -> None:
        """Copy the buffers as they are now: call it after a step without faults."""
        self._kept = {name: buffer.detach().clone() for name, buffer in self._buffers()}

    def put_back(self) -> None:
        """Write the kept values into the buffers; one that is new or of a new shape stays."""
        with torch.no_grad():
            for name, buffer in self._buffers():
                if name in self._kept and self._kept[name].shape == buffer.shape:
                    buffer.copy_(self._kept[name])

    def _buffers(self) -> list[tuple[str, Tensor]]:
        named = self._model.named_buffers()
        return [(name, buffer) for name, buffer in named if not is_in_a_seed(name)]
