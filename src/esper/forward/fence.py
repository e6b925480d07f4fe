"""The fence: a kernel that raises, or gives what cannot be added, costs its own share of a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from esper.forward.finiteness import host_mark, in_transform
from esper.forward.gradient_gates import gated
from esper.state.observation import Call
from esper.state.shortage import are_shortages_told, is_shortage

if TYPE_CHECKING:
    from esper.state.layer_call import LayerCall
    from esper.state.seed_slot import Seed


Launch = Callable[[Callable[[], object]], object]
"""Runs a kernel elsewhere, and returns what it returned."""


def run_kernel(
    seed: Seed, call: LayerCall, h: Tensor, launch: Launch | None = None
) -> Tensor | None:
    """Return the kernel's output, or None where the fence took a fault.

    Under ``torch.compile`` there is no fence: what does not trace was refused at load.

    Args:
        seed: The seed; a shadow seed is not fenced.
        call: What the layer was given.
        h: The host's output; the result has its shape, dtype and device.
        launch: Where an eager kernel runs, and nothing but the kernel; None: here.
    """
    if torch.compiler.is_compiling():
        return _conform(_output(seed, call, h), h)
    if seed.is_shadow:
        if seed.example is None:
            seed.example = call.detached()
        return _conform(_output(seed, call, h), h)
    try:
        if launch is not None:
            return _conform(launch(partial(_output, seed, call, h)), h)
        return _conform(_output(seed, call, h), h)
    except Exception as error:
        if are_shortages_told() and is_shortage(error):
            raise
        _remember_raised(seed, h, error)
        return None


class _ZeroGradients(torch.autograd.Function):
    """The identity of its first argument; the others get zeros as their gradients."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters  # no value of theirs is used: they may be written meanwhile
        return h.clone()  # FSDP2 warns of a view, which others may write to

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros_like(p) for p in ctx.parameters)


def left_out(h: Tensor, seed: Seed) -> Tensor:
    """Return ``h`` where a kernel has failed; among several processes, its weights get zeros.

    The others wait for a gradient of each parameter that they average: none at all would leave them
    waiting for ever.
    """
    if not (dist.is_available() and dist.is_initialized() and torch.is_grad_enabled()):
        return h
    parameters = [p for p in seed.slot.parameters() if p.requires_grad]
    if not parameters or in_transform():
        return h
    connected: Tensor = _ZeroGradients.apply(h, *parameters)  # type: ignore[no-untyped-call] # torch has none
    return connected


def _output(seed: Seed, call: LayerCall, h: Tensor) -> object:
    """Run a kernel on what it reads: ``h``, the layer's first input, or its whole call."""
    kernel = seed.slot._modules["kernel"]  # noqa: SLF001 - getattr costs a microsecond
    assert kernel is not None
    is_gated = seed.guard == "always" and torch.is_grad_enabled()
    if seed.takes is None:
        given = h if seed.is_serial else call.x
        return kernel(gated(given, seed) if is_gated else given)
    taken = seed.takes.of(call)
    if is_gated:
        taken = taken.with_tensors(lambda t: gated(t, seed))
    return kernel(*taken.args, **taken.kwargs)


def _conform(k: object, h: Tensor) -> Tensor:
    """Return ``k`` if it can be added to ``h``; autocast may have chosen another dtype."""
    if isinstance(k, tuple) and k:  # as of an attention: its output and its weights
        k = k[0]
    if not isinstance(k, Tensor) or k.shape != h.shape or k.device != h.device:
        raise ValueError(_unlike(k, h))
    if k.dtype == h.dtype:
        return k
    if not torch.is_autocast_enabled(h.device.type):
        raise ValueError(_unlike(k, h))
    return k.to(h.dtype)


def _unlike(k: object, h: Tensor) -> str:
    found = f"{tuple(k.shape)}, {k.dtype}" if isinstance(k, Tensor) else type(k).__name__
    return f"kernel output: expected {tuple(h.shape)}, {h.dtype}, on {h.device}; found {found}"


def _remember_raised(seed: Seed, h: Tensor, error: Exception) -> None:
    seed.last_error = f"{type(error).__name__}: {error}"
    if not in_transform():
        seed.seen.calls.append(Call(h.shape, (host_mark(h.detach()),), raised=True))
