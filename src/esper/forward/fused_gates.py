"""The gates of seeds that run as one under ``guard="always"``, in host memory.

What all of them get and give is looked at once. Where it is finite, so is what each of them got
and gave; only where it is not, each kernel's part of the gradient is made by itself, behind its own
gate.
"""

from __future__ import annotations

from contextlib import contextmanager
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
from esper.forward.gradient_gates import keep_gated, zeros_unless_finite
from esper.state.observation import CLEAN_MARKS, Call

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from esper.state.seed_group import SeedGroup


class GroupGates:
    """The gates of one call of a group.

    Args:
        group: Seeds with ``guard="always"``.
        given: What their kernels read, in host memory.
        alphas: ``[seeds]``.
    """

    def __init__(self, group: SeedGroup, given: Tensor, alphas: Tensor) -> None:
        self._group, self._given, self._alphas = group, given, alphas
        self._used: list[Tensor] = []
        self._incoming: Tensor | None = None
        self._calls: Sequence[Call] = ()

    def gated(self) -> Tensor:
        """Return what the kernels read, whose gradient passes a gate."""
        if not (self._given.requires_grad and torch.is_grad_enabled()):
            return self._given
        self._used = [table[key] for table, key in self._group.parameters]
        gated = self._given.view_as(self._given)
        node = gated.grad_fn
        assert node is not None
        node.register_prehook(self._leave)
        return gated

    def remember(self, total: Tensor, shape: torch.Size) -> None:
        """Remember with each seed a call that was seen to be finite, and the gradient that comes.

        Args:
            total: The sum of their shares.
            shape: Of the host's output.
        """
        self._calls = [Call(shape, CLEAN_MARKS) for _ in self._group.seeds]
        for seed, call in zip(self._group.seeds, self._calls, strict=True):
            seed.seen.calls.append(call)
        if total.grad_fn is not None:
            total.grad_fn.register_prehook(self._come_in)

    def _come_in(self, gradients: tuple[Tensor | None, ...]) -> None:
        (gradient,) = gradients
        self._incoming = gradient
        for seed in self._group.seeds:
            keep_gated(seed)
        if gradient is None or gradient.requires_grad or in_transform():
            return
        total = 0.0 if seen_finite(gradient) else gradient_total(gradient.detach())
        for seed, call in zip(self._group.seeds, self._calls, strict=True):
            seed.seen.come_in(call, total)

    def _leave(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        """Return the gradients that may pass; None: as they are."""
        (gradient,) = gradients
        incoming, self._incoming = self._incoming, None
        if gradient is None or seen_finite(gradient):
            return None
        if incoming is None or gradient.requires_grad or in_transform():
            return (torch.where(is_good(gradient_mark(gradient)), gradient, 0.0),)
        return (self._one_by_one(incoming),)

    def _one_by_one(self, incoming: Tensor) -> Tensor:
        """Return the sum of what each kernel gives, of which what is not finite is left out."""
        total = torch.zeros_like(self._given)
        for seed, alpha in zip(self._group.seeds, self._alphas, strict=True):
            with torch.enable_grad(), _standing(self._group, self._used):
                x = self._given.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(seed.slot.kernel(x), x, alpha * incoming)
            passes = zeros_unless_finite(gradient, seed, -1)
            total += gradient if passes is None else passes
        return total


@contextmanager
def _standing(group: SeedGroup, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let the tensors of a call stand where the kernels' parameters do: others may by now."""
    now = [table[key] for table, key in group.parameters]
    try:
        for (table, key), tensor in zip(group.parameters, tensors, strict=True):
            table[key] = tensor
        yield
    finally:
        for (table, key), tensor in zip(group.parameters, now, strict=True):
            table[key] = tensor
