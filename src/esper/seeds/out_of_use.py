"""Kernels that others have put out of use: what was found, until somebody asks for it."""

from __future__ import annotations

import functools
import logging
import weakref
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from esper.forward.fence import run_kernel
from esper.forward.host_output import blendable
from esper.forward.host_view import completed, host_forward
from esper.resilience.attempt import Failed, attempt
from esper.seeds.isolation import SeedFault
from esper.seeds.shadow import shadow_pass
from esper.state.kernel import reference_tensor
from esper.state.layer_record import record_of

if TYPE_CHECKING:
    from esper.state.layer_call import LayerCall

_found: Final[weakref.WeakKeyDictionary[nn.Module, list[SeedFault]]] = weakref.WeakKeyDictionary()
"""What was lost below a module, by the module that holds the place."""

_looked_at: Final[weakref.WeakKeyDictionary[nn.Module, object]] = weakref.WeakKeyDictionary()
"""Layers with a forward that bypasses their seeds, and the forward that was told of."""

_logger = logging.getLogger(__name__)


def remember_loss(place: nn.Module, layer: nn.Module, seed_idx: int, reason: str) -> None:
    """Keep and log that a seed's kernel is out of use.

    Args:
        place: The module that is asked for it later: the layer, or who holds its place now.
        layer: The layer whose seed it is.
        seed_idx: Index of the seed.
        reason: What happened, and what can be done.
    """
    fault, noted = _fault(layer, seed_idx, reason), _found.setdefault(place, [])
    if fault in noted:
        return
    noted.append(fault)
    _logger.warning("seed %d of layer %r: %s", seed_idx, fault.layer, reason)


def losses(model: nn.Module) -> list[SeedFault]:
    """Return what was noted of a model's modules and was not taken."""
    modules = model.modules() if _found else ()
    return [fault for module in modules for fault in _found.get(module, ())]


def take_losses(model: nn.Module) -> list[SeedFault]:
    """Return what was noted of a model's modules, and forget it."""
    modules = model.modules() if _found else ()
    return [fault for module in modules for fault in _found.pop(module, ())]


def bypassed(layer: nn.Module, *, again: bool) -> list[SeedFault]:
    """Return the contributing seeds that a forward in the layer's ``__dict__`` does not run.

    Such a forward is tried on a call that a seed was probed with; one that calls the layer's own,
    as accelerate's does, is none. Without such a call nothing is known, and nothing said.

    Args:
        layer: A wrapped layer.
        again: Whether to tell of a forward that was told of.
    """
    forward, seeds = layer.__dict__.get("forward"), record_of(layer).plan
    if forward is None:
        return []
    told = _looked_at.get(layer) is forward
    example = next((seed.example for seed in seeds if seed.example is not None), None)
    if example is None or (told and not again) or _runs_a_kernel(layer, example):
        return []
    _looked_at[layer] = forward
    reason = (
        "it is bypassed: layer.forward was replaced after the graft; remove it with "
        "`del layer.forward`, or unload the kernel"
    )
    if not told:
        _logger.warning("layer %r: its kernels are not run; %s", record_of(layer).name, reason)
    return [_fault(layer, seed.seed_idx, reason) for seed in seeds]


def misfits(layer: nn.Module) -> dict[int, str]:
    """Return the contributing seeds whose kernels no longer fit what their host gives, and why.

    Each is tried on the call that it was probed with; one without such a call, or with one that
    the host itself does not take any more, is not among them.

    Args:
        layer: A wrapped layer.
    """
    found: dict[int, str] = {}
    for seed in record_of(layer).plan:
        if seed.example is None or seed.is_shadow:
            continue
        call = completed(layer, seed.example.detached().to(reference_tensor(layer).device))
        with shadow_pass(layer), torch.no_grad():
            given = attempt(functools.partial(_given, layer, call))
            if not isinstance(given, Failed) and run_kernel(seed, call, given.value) is None:
                found[seed.seed_idx] = seed.last_error
    return found


def _given(layer: nn.Module, call: LayerCall) -> Tensor:
    return blendable(host_forward(layer, *call.args, **call.kwargs))


def _runs_a_kernel(layer: nn.Module, example: LayerCall) -> bool:
    """Try the layer's forward, and say whether it came by a kernel, or could not be tried."""
    seen: list[bool] = []
    call = example.detached().to(reference_tensor(layer).device)
    kernels = [seed.slot.kernel for seed in record_of(layer).plan]
    handles = [k.register_forward_pre_hook(lambda *_: seen.append(True)) for k in kernels]
    try:
        with shadow_pass(layer), torch.no_grad():
            layer.forward(*call.args, **call.kwargs)
    except Exception:  # noqa: BLE001 - anybody's own, on a call that it may not take
        return True
    finally:
        for handle in handles:
            handle.remove()
    return bool(seen)


def _fault(layer: nn.Module, seed_idx: int, reason: str) -> SeedFault:
    record = record_of(layer)
    state = record.layout.state(seed_idx)
    return SeedFault(layer=record.name, seed_idx=seed_idx, faults=0, state=state, reason=reason)
