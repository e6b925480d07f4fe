"""The gate on values: a share that is not finite is left out of the sum, and remembered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

from esper.forward.finiteness import (
    gradient_mark,
    gradient_total,
    host_mark,
    in_transform,
    is_good,
    seen_finite,
    share_mark,
    share_mark_by_place,
    whole,
)
from esper.forward.gradient_gates import keep_gated
from esper.state.observation import CLEAN_MARKS, Call

if TYPE_CHECKING:
    from esper.state.observation import Marks, Observations
    from esper.state.seed_slot import Seed


CLEAN: Final = Call(torch.Size(()))
"""A clean call without a guard: ends a run of errors, and nothing more is known about it."""


ShareAdder = Callable[[Tensor], Tensor]
"""Adds a seed's share to what the layer has so far."""


def share_adder(seed: Seed, h: Tensor, k: Tensor, alpha: Tensor) -> tuple[ShareAdder, Tensor]:
    """Return what adds ``alpha * k``, and the weight of that: nothing where the guard says no.

    Args:
        seed: The seed.
        h: Host output.
        k: Kernel output, like ``h``.
        alpha: 0-dim float32.
    """
    if torch.compiler.is_compiling() or in_transform():
        return _traceable_adder(seed, h, k, alpha)
    if seed.guard == "off":
        if not seed.is_shadow:
            seed.seen.calls.append(CLEAN)
        return partial(torch.add, alpha * k), alpha
    call = Call(h.shape)
    seed.seen.calls.append(call)
    if not seed.replaces:
        join = _guarded_sum if seed.guard == "always" else _observed_sum
        return partial(join, h, k, alpha, seed, call), alpha
    term = alpha * k
    call.marks = marks = _marks(seed, h.detach(), term.detach(), alpha, share_mark)
    if seed.guard == "step":
        return partial(torch.add, term), alpha
    if k.requires_grad:
        k.register_hook(partial(_reach, seed, seed.seen, call))  # type: ignore[no-untyped-call] # torch has none
    return _where_good(marks, term, alpha)


def kept(h: Tensor, weight: Tensor, share: float) -> Tensor:
    """Return the host's part, ``weight * h``: nothing where the weight is 0, whatever ``h`` is.

    Args:
        h: The host's output.
        weight: 0-dim, what the replacing shares leave: ``1 - share``, or more where some are not
            good.
        share: The sum of the replacing shares; a graph is the same for all.
    """
    part = weight * h
    if share < 1.0 and not torch.compiler.is_compiling():
        return part
    return torch.where(weight == 0.0, 0.0, part)  # 0 times infinity is NaN


def _marks(
    seed: Seed,
    h: Tensor,
    term: Tensor,
    alpha: Tensor,
    mark_share: Callable[[Tensor, Tensor], Tensor],
) -> Marks:
    """Return the marks of ``h`` and of ``h + alpha * delta``."""
    host = kept(h, 1.0 - alpha, seed.slot._alpha) if seed.replaces else h  # noqa: SLF001 - as blended
    return host_mark(h), mark_share(host + term, h)


def _where_good(marks: Marks, term: Tensor, alpha: Tensor) -> tuple[ShareAdder, Tensor]:
    """Return the join of a term, and its weight, where the marks say so; else neutral elements.

    That of addition is -0.0 (``-0.0 + 0.0 == 0.0``): a host's output to which nothing is added
    stays what it is, bit for bit.
    """
    good = is_good(marks[1])
    return partial(torch.add, torch.where(good, term, -0.0)), torch.where(good, alpha, 0.0)


def _traceable_adder(seed: Seed, h: Tensor, k: Tensor, alpha: Tensor) -> tuple[ShareAdder, Tensor]:
    """Do what :func:`share_adder` does with operations that any transformation can follow."""
    if seed.guard == "off":
        return partial(torch.add, alpha * k), alpha
    is_compiling = torch.compiler.is_compiling()
    if seed.guard == "always" and is_compiling and k.requires_grad:
        k = _Incoming.apply(k, seed.seen.sink)  # type: ignore[no-untyped-call] # torch has none
    term = alpha * k
    marks = _marks(seed, h.detach(), term.detach(), alpha, share_mark_by_place)
    if is_compiling:
        _remember_compiled(seed, marks)
    if seed.guard == "step":
        return partial(torch.add, term), alpha
    return _where_good(marks, term, alpha)


def _remember_compiled(seed: Seed, marks: Marks) -> None:
    ring = seed.seen.ring
    row = torch.stack([mark.tanh().to(ring.dtype) for mark in marks])
    latest = (row - row).to(ring.device).unsqueeze(0)
    seed.seen.ring = torch.cat((ring[1:], latest))
    seed.seen.latest = None


def _observed_sum(
    h: Tensor,
    k: Tensor,
    alpha: Tensor,
    seed: Seed,  # noqa: ARG001 - as of _guarded_sum
    call: Call,
    so_far: Tensor,
) -> Tensor:
    """Add, and mark what ``h`` becomes; where nothing else was added that is the result itself."""
    term = alpha * k
    y = so_far + term
    if seen_finite(y) and (so_far is h or seen_finite(h)):
        call.marks = CLEAN_MARKS
        return y
    host, room = h.detach(), term.detach()  # which no backward needs
    grafted = y.detach() if so_far is h else host + room
    call.marks = host_mark(host), share_mark(grafted, host, room)
    return y


def _guarded_sum(
    h: Tensor, k: Tensor, alpha: Tensor, seed: Seed, call: Call, so_far: Tensor
) -> Tensor:
    """Add where the share is good.

    A sum that is seen to be finite needs no gate: so is all that was added up to it. Of the host
    that is known then, too, unless another seed has taken its place.
    """
    if h.is_cpu:
        term = alpha * k
        y = so_far + term
        if seen_finite(y) and (so_far is h or seen_finite(h)):
            call.marks = CLEAN_MARKS
            node = y.grad_fn
            if node is not None:  # its hook costs a quarter of a tensor's
                node.register_prehook(partial(_reach_sum, seed, seed.seen, call))
            return y
    host = None if so_far is h else h.detach()
    gated: Tensor = _GuardedSum.apply(so_far, host, k, alpha, seed, call)  # type: ignore[no-untyped-call] # torch has none
    return gated


class _SumContext(Protocol):
    """What a guarded sum keeps for its backward."""

    saved_tensors: tuple[Tensor, Tensor]
    seed: Seed
    seen: Observations
    call: Call

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...  # noqa: FBT001 - torch's signature


class _GuardedSum(torch.autograd.Function):
    """``so_far + alpha * k`` where the seed's share is good, else ``so_far``; eager.

    The same as ``so_far + torch.where(good, alpha * k, -0.0)`` in fewer passes, and without a slow
    one in the backward.
    """

    @staticmethod
    def forward(
        ctx: _SumContext,
        so_far: Tensor,
        h: Tensor | None,
        k: Tensor,
        alpha: Tensor,
        seed: Seed,
        call: Call,
    ) -> Tensor:
        host = so_far if h is None else h
        term = alpha * k
        y = host + term
        joined = y if h is None else so_far + term
        call.marks = marks = host_mark(host), share_mark(y, host, room=term)
        good = is_good(marks[1])
        ctx.set_materialize_grads(False)
        ctx.seed, ctx.seen, ctx.call = seed, seed.seen, call
        ctx.save_for_backward(alpha, good)
        return whole(good, joined, so_far)

    @staticmethod
    def backward(ctx: _SumContext, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        g = gradients[0]
        if g is None:
            return None, None, None, None, None, None
        alpha, good = ctx.saved_tensors
        keep_gated(ctx.seed)
        if torch.is_grad_enabled() or in_transform():  # to be differentiated again
            return g, None, torch.where(good, alpha * g, 0.0), None, None, None
        ctx.seen.come_in(ctx.call, gradient_total(g))
        scaled = alpha * g
        if g.device.type != "cpu":
            scaled = torch.where(good, scaled, 0.0)
        elif not good.item():
            scaled = torch.zeros_like(g)
        return g, None, scaled, None, None, None


def _reach(seed: Seed, seen: Observations, call: Call, gradient: Tensor | None) -> None:
    """Remember whether the gradient that reaches a kernel's output is finite: a hook of that."""
    keep_gated(seed)
    if gradient is not None and not (gradient.requires_grad or in_transform()):
        total = 0.0 if seen_finite(gradient) else gradient_total(gradient.detach())
        seen.come_in(call, total)


def _reach_sum(
    seed: Seed, seen: Observations, call: Call, gradients: tuple[Tensor | None, ...]
) -> None:
    """Do the same as a hook of the node of a sum."""
    _reach(seed, seen, call, gradients[0])


class _Incoming(torch.autograd.Function):
    """The identity in compiled code; marks in the sink where the gradient is not finite."""

    @staticmethod
    def forward(ctx: object, k: Tensor, sink: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return k.view_as(k)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004 - torch's signature
        bad = (~is_good(gradient_mark(gradients[0]))).to(torch.float32)
        return gradients[0], torch.stack((bad, torch.zeros_like(bad)))
