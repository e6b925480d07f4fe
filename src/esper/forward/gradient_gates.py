"""The gates on gradients: one that is not finite leaves a kernel as zeros, and is remembered."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.forward.finiteness import (
    gradient_mark,
    gradient_total,
    in_transform,
    is_good,
    seen_finite,
)

if TYPE_CHECKING:
    from esper.state.seed_slot import Seed


class _GradientGate(torch.autograd.Function):
    """The identity; its gradient is zeros where the gradient that arrives is not finite."""

    @staticmethod
    def forward(ctx: object, x: Tensor, sink: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004 - torch's signature
        good = is_good(gradient_mark(gradients[0]))
        bad = (~good).to(torch.float32)
        return torch.where(good, gradients[0], 0.0), torch.stack((torch.zeros_like(bad), bad))


def gated(x: Tensor, seed: Seed) -> Tensor:
    """Return ``x`` under a gate: a function where it is compiled, else a hook, which is cheaper."""
    if not x.requires_grad:
        return x
    if torch.compiler.is_compiling():
        compiled: Tensor = _GradientGate.apply(x, seed.seen.sink)  # type: ignore[no-untyped-call] # torch has none
        return compiled
    gated = x.view_as(x)
    node = gated.grad_fn
    assert node is not None
    node.register_prehook(partial(_leave, seed))  # a hook of the tensor costs four times as much
    return gated


def zeros_unless_finite(gradient: Tensor, seed: Seed, place: int) -> Tensor | None:
    """Return zeros instead of a gradient that is not finite, and remember it.

    On the CPU, outside of compiled code, this reads one number; elsewhere nothing is read.

    Args:
        gradient: What leaves the kernel.
        seed: The kernel's.
        place: Number of the parameter that it leaves for; -1 for the kernel's input.

    Returns:
        What may pass; None: the gradient as it is.
    """
    if gradient.requires_grad or in_transform():
        return torch.where(is_good(gradient_mark(gradient)), gradient, 0.0)
    if seen_finite(gradient):
        seed.seen.leave(place, 0.0)
        return None
    total = gradient_total(gradient)
    seed.seen.leave(place, total)
    if isinstance(total, Tensor):
        return torch.where(total.isfinite(), gradient, 0.0)
    return None if math.isfinite(total) else torch.zeros_like(gradient)


def _leave(seed: Seed, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """Be the gate of a kernel's input: a hook of the node that its gradient leaves through."""
    (gradient,) = gradients
    passes = None if gradient is None else zeros_unless_finite(gradient, seed, -1)
    return None if passes is None else (passes,)


def _leave_for(seed: Seed, place: int, gradient: Tensor | None) -> Tensor | None:
    """Be the gate of the kernel's parameter of that number: a hook of it."""
    return None if gradient is None else zeros_unless_finite(gradient, seed, place)


def gate_parameters(seed: Seed) -> None:
    """Put the gates on the kernel's trainable parameters; anew, wherever they were before."""
    ungate_parameters(seed)
    num_gates = 0
    for module in seed.slot.modules():
        tables = (module._parameters, module._modules)  # noqa: SLF001 - where they can be exchanged
        seed.gated += [(table, len(table)) for table in tables]
        seed.gated_values += [(table, *item) for table in tables for item in table.items()]
        for parameter in module._parameters.values():  # noqa: SLF001 - as above
            if parameter is None:
                continue
            if not parameter.requires_grad:
                seed.frozen.append(parameter)
                continue
            hook = partial(_leave_for, seed, num_gates)
            seed.handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call] # torch has none
            num_gates += 1


def ungate_parameters(seed: Seed) -> None:
    """Take the gates away."""
    for handle in seed.handles:
        handle.remove()
    seed.handles, seed.gated, seed.gated_values, seed.frozen = [], [], [], []


def keep_gated(seed: Seed) -> None:
    """Gate what became a trainable parameter of the kernel since: to be called in its backward.

    Loading, moving and sharding put others in their place; users unfreeze, add and exchange them.
    A gradient of a parameter is gated by what its hooks are when it arrives, so that the forward
    need not ask.
    """
    if seed.guard == "always" and _has_changed(seed) and not in_transform():
        gate_parameters(seed)


def _has_changed(seed: Seed) -> bool:
    for table, name, value in seed.gated_values:
        if table.get(name) is not value:
            return True
    for table, size in seed.gated:
        if len(table) != size:
            return True
    return any(parameter.requires_grad for parameter in seed.frozen)
