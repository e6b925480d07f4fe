"""Transitions of a layer's seeds: grafting, alpha, guard, unloading. All are all-or-nothing."""

from __future__ import annotations

import difflib
import inspect
import logging
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from esper.contracts.arguments import Bounds, checked_number
from esper.contracts.choices import GUARDS
from esper.contracts.errors import KernelRefusedError, SeedLifecycleError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.class_change import choose_forward
from esper.forward.host_output import blendable
from esper.forward.host_view import has_foreign_forward, host_forward
from esper.forward.written_alphas import ALPHA_ROUNDING, take_written_alphas
from esper.resilience.attempt import Failed, attempt
from esper.seeds.kernel_parts import refuse_shared_modules
from esper.seeds.naming import kernel_named
from esper.seeds.probe import ProbeResult, probe
from esper.seeds.shadow import seen_example, shadow_pass
from esper.seeds.slots import apply_guard, forget_waiting, insert, make_seed, withdraw
from esper.seeds.structure import encoded_structure
from esper.seeds.watching import begin_watch, is_between_calls
from esper.state.kernel import (
    Kernel,
    PreparedKernel,
    check_choices,
    prepare_kernel,
    reference_tensor,
)
from esper.state.layer_call import LayerCall, Takes
from esper.state.layer_record import LayerRecord, record_of
from esper.state.made_call import made_calls
from esper.state.ranges import named_range
from esper.state.seed_slot import Seed
from esper.state.shards import mesh_beside
from esper.state.waiting import GraftOptions, GraftRequest, WaitingGraft

if TYPE_CHECKING:
    from typing import Unpack

    from esper.contracts.choices import Guard

_S: Final = SeedLifecycleState
_ALPHAS: Final = Bounds(what="a number", least=0, most=1)

_LOOKS_IN_SILENCE: Final = 3
"""After so many looks without a call of its layer a waiting graft is told."""

_logger = logging.getLogger(__name__)


def graft(
    layer: nn.Module, seed_idx: int, kernel: Kernel | str, **options: Unpack[GraftOptions]
) -> None:
    """Put a kernel into a seed; see ``KasminaLayer.graft``."""
    alpha, guard = options.get("alpha"), options.get("guard", "always")
    _check(layer, seed_idx, alpha, guard)
    example = options.get("example")
    if isinstance(kernel, str):
        kernel = kernel_named(layer, kernel, example)
    refuse_shared_modules(layer, kernel)
    prepared = prepare_kernel(
        layer,
        kernel,
        mode=options.get("mode"),
        position=options.get("position"),
        example=None if example is None else LayerCall.of(example).floating,
    )
    check_weight(layer, seed_idx, prepared, alpha or 0.0)
    request = GraftRequest(
        kernel=prepared,
        alpha=alpha,
        guard=guard,
        is_pristine=not isinstance(kernel, PreparedKernel | nn.Module),
    )
    if example is not None:
        _probe_and_install(layer, seed_idx, request, LayerCall.of(example))
        return
    seen = seen_example(layer, prepared)
    if seen is None:
        if not _install_on_made_call(layer, seed_idx, request):
            _wait(layer, seed_idx, request)
    elif alpha is not None:
        _install(layer, seed_idx, request, alpha, seen)
    else:
        _probe_and_install(layer, seed_idx, request, seen)


def check_options(layer: nn.Module, seed_idx: int, options: GraftOptions, *, asked: str) -> None:
    """Refuse what ``graft`` would refuse whatever the kernel; for who has to wait for the kernel.

    Args:
        layer: The layer.
        seed_idx: The seed.
        options: What the caller said by name.
        asked: Name of the method that was called, for messages.

    Raises:
        SeedLifecycleError: The seed is a fossil.
        TypeError: A name is unknown, or a value is of the wrong type.
        ValueError: A value is out of its range.
    """
    known = list(GraftOptions.__annotations__)
    for name in options:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            cure = f"did you mean {nearest[0]}?" if nearest else f"they are {', '.join(known)}"
            msg = f"{name!r} is none of {asked}'s arguments; {cure}"
            raise TypeError(msg)
    _check(layer, seed_idx, options.get("alpha"), options.get("guard", "always"))
    check_choices(options.get("mode"), options.get("position"))
    if options.get("example") is not None:
        LayerCall.of(options["example"])


def _check(layer: nn.Module, seed_idx: int, alpha: float | None, guard: Guard) -> None:
    record = record_of(layer)
    if record.layout.state(seed_idx) == _S.FOSSILIZED:
        msg = f"seed {seed_idx} of layer {record.name!r} is a fossil; graft into another seed"
        raise SeedLifecycleError(msg)
    if alpha is not None:
        checked_number("alpha", alpha, _ALPHAS)
    check_guard(layer, guard)
    _check_is_called(layer)


def _check_is_called(layer: nn.Module) -> None:
    """Refuse a layer that would bypass its seeds, or that is spread as no kernel can follow."""
    record = record_of(layer)
    if not has_foreign_forward(layer):
        layer.__dict__.pop("forward", None)
    else:
        msg = (
            f"layer {record.name!r} has a forward of its own in its __dict__, which would bypass "
            "its seeds; remove it (accelerate sets one: graft before it does)"
        )
        raise ValueError(msg)
    mesh_beside(layer)


def check_guard(layer: nn.Module, guard: Guard) -> None:
    """Refuse a guard that is unknown, or that nobody would read.

    Raises:
        ValueError: As said.
    """
    if guard not in GUARDS:
        msg = f"guard must be one of {', '.join(map(repr, GUARDS))}, got {guard!r}"
        raise ValueError(msg)
    if guard == "step" and not record_of(layer).has_step_guard:
        msg = (
            "guard='step' is read before an optimizer's step: call esper.sync_optimizer(model, "
            "optimizer) or make a Grower first"
        )
        raise ValueError(msg)


def check_weight(layer: nn.Module, seed_idx: int, kernel: PreparedKernel, alpha: float) -> None:
    """Refuse a replacing alpha for which the layer's other seeds leave no room.

    Raises:
        ValueError: As said.
    """
    take_written_alphas(layer)
    record = record_of(layer)
    others = sum(
        record.layout.alpha(i)
        for i, seed in record.seeds.items()
        if i != seed_idx and seed.replaces and record.layout.contributes(i)
    )
    if kernel.mode == "replace" and others + alpha > 1.0 + ALPHA_ROUNDING:
        msg = (
            f"replacing seeds of layer {record.name!r} would have alphas that sum to "
            f"{others + alpha}; at most 1 is possible (the others have {others})"
        )
        raise ValueError(msg)


def _probe_and_install(
    layer: nn.Module, seed_idx: int, request: GraftRequest, example: LayerCall
) -> None:
    try:
        with named_range(record_of(layer), seed_idx, "probe"):
            result = probe(layer, request.kernel, example, is_pristine=request.is_pristine)
    except KernelRefusedError:
        cancel(layer, seed_idx)
        raise
    alpha = _identity_alpha(result) if request.alpha is None else request.alpha
    _install(layer, seed_idx, request, alpha, example)


def _install_on_made_call(layer: nn.Module, seed_idx: int, request: GraftRequest) -> bool:
    """Probe and install with a call made from what the host says it takes; say if there was one.

    A kernel may be made for a form of its own, so each is tried until one passes. Where none does,
    the most telling refusal is raised: that of a form in which the kernel ran at all.
    """
    refusals: list[KernelRefusedError] = []
    for call in made_calls(layer):
        if not (_can_be_given(request.kernel, call) and _host_takes(layer, call)):
            continue
        try:
            _probe_and_install(layer, seed_idx, request, call)
        except KernelRefusedError as error:
            refusals.append(error)
        else:
            return True
    if not refusals:
        return False
    telling = next((e for e in refusals if e.check not in ("raises", "shape")), refusals[0])
    msg = (
        f"{telling}. It was given an input made from what the layer says it takes; if the kernel "
        "needs another one, pass example= with an input of the layer"
    )
    raise KernelRefusedError(msg, check=telling.check) from telling


def _can_be_given(kernel: PreparedKernel, call: LayerCall) -> bool:
    """Say whether a made call has all that a kernel's forward cannot do without."""
    takes = None if kernel.position == "serial" else Takes.by(kernel.module)
    if takes is None:
        return True
    given = takes.of(call)
    try:
        inspect.signature(kernel.module.forward).bind(*given.args, **given.kwargs)
    except TypeError:
        return False
    return True


def _host_takes(layer: nn.Module, call: LayerCall) -> bool:
    """Say whether the host runs on a made call; a subclass may take something else."""

    def run() -> None:
        given = call.detached()
        with shadow_pass(layer), torch.no_grad():
            blendable(host_forward(layer, *given.args, **given.kwargs))

    return not isinstance(attempt(run), Failed)


def _identity_alpha(result: ProbeResult) -> float:
    """Return the largest alpha at which the graft changes nothing."""
    return 1.0 if result.is_identity else 0.0


def _install(
    layer: nn.Module, seed_idx: int, request: GraftRequest, alpha: float, example: LayerCall
) -> None:
    kernel = request.kernel
    check_weight(layer, seed_idx, kernel, alpha)
    layout = record_of(layer).layout
    forget_waiting(layer, seed_idx)  # it was asked for earlier
    seed = make_seed(layer, seed_idx, kernel, guard=request.guard, example=example.detached())
    if layout.state(seed_idx) in (_S.DORMANT, _S.ERROR_RECOVERY):
        layout.transition_seed_state(seed_idx, _S.LOADING)
    layout.transition_seed_state(seed_idx, _S.ACTIVE, kernel.kernel_id)
    insert(layer, seed, alpha)


def _wait(layer: nn.Module, seed_idx: int, request: GraftRequest) -> None:
    record = record_of(layer)
    forget_waiting(layer, seed_idx)
    if record.layout.state(seed_idx) in (_S.DORMANT, _S.ERROR_RECOVERY):
        reserve(layer, seed_idx)
    record.waiting[seed_idx] = WaitingGraft(request=request)
    if record.note is None:
        record.note = begin_watch(layer, finish_waiting)
    choose_forward(layer)
    _logger.warning(
        "seed %d of layer %r waits for a call of its layer to probe %s, and becomes live behind "
        "that; pass example= with an input of the layer to have it live at once",
        seed_idx,
        record.name,
        request.kernel.kernel_id,
    )


def finish_waiting(layer: nn.Module) -> None:
    """Probe and install what waits for a call of a layer, if one was noted; say so if not.

    To be called where no forward and no backward is under way.
    """
    record = record_of(layer)
    if record.note is None or not is_between_calls():
        return
    call = record.note.call
    if call is None:
        _tell_of_silence(record)
        return
    if record.note.is_autocast:
        call = call.with_dtype(reference_tensor(layer).dtype)
    for seed_idx in sorted(record.waiting):
        waiting = forget_waiting(layer, seed_idx)
        if waiting is not None:
            _finish(layer, seed_idx, waiting.request, call)


def _tell_of_silence(record: LayerRecord) -> None:
    """Count the looks at which there had been no call, and say so once."""
    for seed_idx, waiting in record.waiting.items():
        waiting.num_readings += 1
        if waiting.num_readings == _LOOKS_IN_SILENCE:
            _logger.warning(
                "seed %d of layer %r still waits: no call of its layer was seen; it was not "
                "called, or only in code that was exported. Pass example= to graft",
                seed_idx,
                record.name,
            )


def _finish(layer: nn.Module, seed_idx: int, request: GraftRequest, call: LayerCall) -> None:
    """Probe and install where nobody asked for it just now, and nobody could take an error."""
    outcome = attempt(lambda: _probe_seen(layer, seed_idx, request, call))
    if isinstance(outcome, Failed):
        cancel(layer, seed_idx)
        record_of(layer).refusals[seed_idx] = str(outcome.error)
        _logger.warning("seed %d of layer %r: %s", seed_idx, record_of(layer).name, outcome.error)


def _probe_seen(layer: nn.Module, seed_idx: int, request: GraftRequest, call: LayerCall) -> None:
    if not isinstance(call.x, Tensor):
        msg = (
            f"kernel {request.kernel.kernel_id} at layer {record_of(layer).name!r} needs a tensor "
            f"as the layer's first input, found {type(call.x).__name__}"
        )
        raise KernelRefusedError(msg, check="type")
    _probe_and_install(layer, seed_idx, request, call)


def reserve(layer: nn.Module, seed_idx: int) -> None:
    """Move a seed to LOADING.

    Raises:
        SeedLifecycleError: It is neither DORMANT nor in ERROR_RECOVERY.
    """
    record_of(layer).layout.transition_seed_state(seed_idx, _S.LOADING)
    withdraw(layer, seed_idx)


def cancel(layer: nn.Module, seed_idx: int) -> bool:
    """Move a LOADING seed back to DORMANT; return whether it was one."""
    layout = record_of(layer).layout
    forget_waiting(layer, seed_idx)
    if layout.state(seed_idx) != _S.LOADING:
        return False
    layout.transition_seed_state(seed_idx, _S.DORMANT)
    return True


def unload(layer: nn.Module, seed_idx: int) -> bool:
    """Make a seed dormant; see ``KasminaLayer.unload_kernel``."""
    layout = record_of(layer).layout
    if layout.state(seed_idx) == _S.DORMANT:
        return False
    layout.transition_seed_state(seed_idx, _S.DORMANT)
    record_of(layer).loads[seed_idx].give_up()
    forget_waiting(layer, seed_idx)
    withdraw(layer, seed_idx)
    return True


def set_alpha(layer: nn.Module, seed_idx: int, alpha: float) -> None:
    """Set the alpha of an ACTIVE seed; see ``KasminaLayer.set_alpha``."""
    seed = active_seed(layer, seed_idx)
    checked_number("alpha", alpha, _ALPHAS)
    check_weight(layer, seed_idx, seed.kernel, alpha)
    layout = record_of(layer).layout
    before = layout.alpha(seed_idx)
    after = layout.set_alpha(seed_idx, alpha)
    seed.slot.set_alpha(after)
    if (before > 0.0) != (after > 0.0):
        choose_forward(layer)
    else:
        record_of(layer).changed()


def set_guard(layer: nn.Module, seed_idx: int, guard: Guard) -> None:
    """Set the guard of a contributing seed; see ``KasminaLayer.set_guard``."""
    check_guard(layer, guard)
    seed = active_seed(layer, seed_idx, or_fossil=True)
    seed.guard = guard
    seed.slot.set_structure(encoded_structure(layer, seed_idx))
    apply_guard(layer, seed)
    choose_forward(layer)  # which ends by telling those who want to know


def active_seed(layer: nn.Module, seed_idx: int, *, or_fossil: bool = False) -> Seed:
    """Return the record of an ACTIVE seed, or, if asked, of an unfolded fossil.

    Raises:
        SeedLifecycleError: The seed is in another state.
        ValueError: ``seed_idx`` is out of range.
    """
    record = record_of(layer)
    state = record.layout.state(seed_idx)
    if state == _S.ACTIVE or (or_fossil and record.layout.contributes(seed_idx)):
        return record.seeds[seed_idx]
    msg = f"seed {seed_idx} of layer {record.name!r} is {state.name}, expected ACTIVE"
    raise SeedLifecycleError(msg)
