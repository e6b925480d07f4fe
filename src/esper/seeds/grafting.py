"""Transitions of a layer's seeds: grafting, alpha, guard, unloading. All are all-or-nothing."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from torch import Tensor, nn

from esper.contracts.choices import GUARDS
from esper.contracts.errors import KernelRefusedError, SeedLifecycleError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.class_change import choose_forward
from esper.forward.host_view import has_foreign_forward
from esper.seeds.probe import ProbeResult, probe
from esper.seeds.shadow import seen_example
from esper.seeds.slots import apply_guard, forget_waiting, insert, make_seed, withdraw
from esper.seeds.structure import encoded_structure
from esper.state.kernel import Kernel, PreparedKernel, prepare_kernel
from esper.state.layer_call import Example, LayerCall
from esper.state.layer_record import record_of
from esper.state.seed_slot import Seed

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_S: Final = SeedLifecycleState
_ALPHA_ROUNDING: Final = 2.0**-23
"""Alphas are float32: 0.6 and 0.4, which sum to 1, are stored as a little more."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Waiting:
    """A graft that waits for an input of its layer.

    Attributes:
        kernel: What is to be grafted.
        alpha: As given to ``graft``.
        guard: As given to ``graft``.
        is_pristine: Whether an earlier probe of the same artifact may answer.
        handle: The one-shot hook.
    """

    kernel: PreparedKernel
    alpha: float | None
    guard: str
    is_pristine: bool
    handle: RemovableHandle


def graft(
    layer: nn.Module,
    seed_idx: int,
    kernel: Kernel,
    *,
    alpha: float | None,
    mode: str | None,
    position: str | None,
    guard: str,
    example: Example | None,
) -> None:
    """Put a kernel into a seed; see ``KasminaLayer.graft``."""
    _check(layer, seed_idx, alpha, guard)
    prepared = prepare_kernel(layer, kernel, mode=mode, position=position)
    _check_weight(layer, seed_idx, prepared, alpha or 0.0)
    is_pristine = not isinstance(kernel, PreparedKernel | nn.Module)
    seen = seen_example(layer, prepared)
    if example is None and seen is None:
        _wait(layer, seed_idx, prepared, alpha, guard, is_pristine)
    elif example is None and alpha is not None:
        _install(layer, seed_idx, prepared, alpha, guard, seen)
    else:
        known = seen if example is None else LayerCall.of(example)
        assert known is not None
        _probe_and_install(layer, seed_idx, prepared, known, alpha, guard, is_pristine)


def _check(layer: nn.Module, seed_idx: int, alpha: float | None, guard: str) -> None:
    record = record_of(layer)
    if record.layout.state(seed_idx) == _S.FOSSILIZED:
        msg = f"seed {seed_idx} of layer {record.name!r} is a fossil; graft into another seed"
        raise SeedLifecycleError(msg)
    if alpha is not None and not 0.0 <= alpha <= 1.0:
        msg = f"alpha must be None or in [0, 1], got {alpha}"
        raise ValueError(msg)
    check_guard(layer, guard)
    _check_is_called(layer)


def _check_is_called(layer: nn.Module) -> None:
    """Refuse a layer that would bypass its seeds, or whose parameters a kernel cannot join."""
    record = record_of(layer)
    if not has_foreign_forward(layer):
        layer.__dict__.pop("forward", None)
    else:
        msg = (
            f"layer {record.name!r} has a forward of its own in its __dict__, which would bypass "
            "its seeds; remove it (accelerate sets one: graft before it does)"
        )
        raise ValueError(msg)
    if any(type(parameter).__name__ == "DTensor" for parameter in layer.parameters()):
        msg = (
            f"layer {record.name!r} is sharded (its parameters are DTensors), and a kernel would "
            "not be: graft before fully_shard"
        )
        raise ValueError(msg)


def check_guard(layer: nn.Module, guard: str) -> None:
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


def _check_weight(layer: nn.Module, seed_idx: int, kernel: PreparedKernel, alpha: float) -> None:
    record = record_of(layer)
    others = sum(
        record.layout.alpha(i)
        for i, seed in record.seeds.items()
        if i != seed_idx and seed.replaces and record.layout.contributes(i)
    )
    if kernel.mode == "replace" and others + alpha > 1.0 + _ALPHA_ROUNDING:
        msg = (
            f"replacing seeds of layer {record.name!r} would have alphas that sum to "
            f"{others + alpha}; at most 1 is possible (the others have {others})"
        )
        raise ValueError(msg)


def _probe_and_install(
    layer: nn.Module,
    seed_idx: int,
    kernel: PreparedKernel,
    example: LayerCall,
    alpha: float | None,
    guard: str,
    is_pristine: bool,  # noqa: FBT001 - all of them are needed, in this order
) -> None:
    try:
        result = probe(layer, kernel, example, is_pristine=is_pristine)
    except KernelRefusedError:
        cancel(layer, seed_idx)
        raise
    if alpha is None:
        alpha = _identity_alpha(result)
    _install(layer, seed_idx, kernel, alpha, guard, example)


def _identity_alpha(result: ProbeResult) -> float:
    """Return the largest alpha at which the graft changes nothing."""
    return 1.0 if result.is_identity else 0.0


def _install(
    layer: nn.Module,
    seed_idx: int,
    kernel: PreparedKernel,
    alpha: float,
    guard: str,
    example: LayerCall | None,
) -> None:
    _check_weight(layer, seed_idx, kernel, alpha)
    layout = record_of(layer).layout
    kept = None if example is None else example.detached()
    seed = make_seed(layer, seed_idx, kernel, guard=guard, example=kept)
    if layout.state(seed_idx) in (_S.DORMANT, _S.ERROR_RECOVERY):
        layout.transition_seed_state(seed_idx, _S.LOADING)
    layout.transition_seed_state(seed_idx, _S.ACTIVE, kernel.kernel_id)
    insert(layer, seed, alpha)


def _wait(
    layer: nn.Module,
    seed_idx: int,
    kernel: PreparedKernel,
    alpha: float | None,
    guard: str,
    is_pristine: bool,  # noqa: FBT001 - all of them are needed, in this order
) -> None:
    record = record_of(layer)
    forget_waiting(layer, seed_idx)
    if record.layout.state(seed_idx) in (_S.DORMANT, _S.ERROR_RECOVERY):
        reserve(layer, seed_idx)
    observer = _Observer(seed_idx)
    record.waiting[seed_idx] = Waiting(
        kernel=kernel,
        alpha=alpha,
        guard=guard,
        is_pristine=is_pristine,
        handle=layer.register_forward_pre_hook(observer, with_kwargs=True),
    )
    _logger.info(
        "seed %d of layer %r waits for its next forward to probe %s",
        seed_idx,
        record.name,
        kernel.kernel_id,
    )


class _Observer:
    """The one-shot hook: takes the layer's input, removes itself, finishes the graft."""

    def __init__(self, seed_idx: int) -> None:
        self._seed_idx = seed_idx

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waiting: Waiting | None = forget_waiting(layer, self._seed_idx)
        if waiting is not None:
            _finish(layer, self._seed_idx, waiting, LayerCall(args, kwargs))


def _finish(layer: nn.Module, seed_idx: int, waiting: Waiting, call: LayerCall) -> None:
    """Probe and install from within a forward, which may not fail for it."""
    try:
        if not isinstance(call.x, Tensor):
            _refuse_input(layer, waiting, call.x)
        _probe_and_install(
            layer,
            seed_idx,
            waiting.kernel,
            call,
            waiting.alpha,
            waiting.guard,
            waiting.is_pristine,
        )
    except Exception as error:  # noqa: BLE001 - the user's forward may not fail for a seed
        cancel(layer, seed_idx)
        record_of(layer).refusals[seed_idx] = str(error)
        _logger.warning("seed %d of layer %r: %s", seed_idx, record_of(layer).name, error)


def _refuse_input(layer: nn.Module, waiting: Waiting, x: Any) -> NoReturn:
    msg = (
        f"kernel {waiting.kernel.kernel_id} at layer {record_of(layer).name!r} needs a tensor as "
        f"the layer's first input, found {type(x).__name__}"
    )
    raise KernelRefusedError(msg, check="type")


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
    record_of(layer).num_unloads[seed_idx] += 1
    forget_waiting(layer, seed_idx)
    withdraw(layer, seed_idx)
    return True


def set_alpha(layer: nn.Module, seed_idx: int, alpha: float) -> None:
    """Set the alpha of an ACTIVE seed; see ``KasminaLayer.set_alpha``."""
    seed = active_seed(layer, seed_idx)
    if not 0.0 <= alpha <= 1.0:
        msg = f"alpha must be in [0, 1], got {alpha}"
        raise ValueError(msg)
    _check_weight(layer, seed_idx, seed.kernel, alpha)
    layout = record_of(layer).layout
    before = layout.alpha(seed_idx)
    after = layout.set_alpha(seed_idx, alpha)
    seed.slot.set_alpha(after)
    if (before > 0.0) != (after > 0.0):
        choose_forward(layer)


def set_guard(layer: nn.Module, seed_idx: int, guard: str) -> None:
    """Set the guard of a contributing seed; see ``KasminaLayer.set_guard``."""
    check_guard(layer, guard)
    seed = active_seed(layer, seed_idx, or_fossil=True)
    seed.guard = guard
    seed.slot.set_structure(encoded_structure(layer, seed_idx))
    apply_guard(layer, seed)


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
