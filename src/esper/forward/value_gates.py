"""The gate on values: a share that is not finite is left out of the sum, and remembered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch import Tensor

from esper.forward.finiteness import in_transform, is_finite, summed
from esper.state.observation import Call

if TYPE_CHECKING:
    from esper.state.observation import Observations, Sums
    from esper.state.seed_slot import Seed


_CLEAN: Final = Call(None)
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
            seed.seen.calls.append(_CLEAN)
        return partial(torch.add, alpha * k), alpha
    if not seed.replaces:
        call = Call(None)
        seed.seen.calls.append(call)
        join = _guarded_sum if seed.guard == "always" else _observed_sum
        return partial(join, h, k, alpha, seed, call), alpha
    term = alpha * k
    sums = _sums(seed, h.detach(), k.detach(), term.detach(), alpha)
    call = Call(sums)
    seed.seen.calls.append(call)
    if seed.guard == "step":
        return partial(torch.add, term), alpha
    if k.requires_grad:
        k.register_hook(_IncomingHook(seed, call))  # type: ignore[no-untyped-call] # torch has none
    return _where_finite(sums, term, alpha)


def _sums(seed: Seed, h: Tensor, k: Tensor, term: Tensor, alpha: Tensor) -> Sums:
    """Sum ``h`` and ``h + alpha * delta``, which are finite where the sums are."""
    grafted = h + alpha * (k - h) if seed.replaces else h + term
    return summed(h), summed(grafted)


def _where_finite(sums: Sums, term: Tensor, alpha: Tensor) -> tuple[ShareAdder, Tensor]:
    """Return the join of a term, and its weight, where the sums say so; else neutral elements.

    That of addition is -0.0 (``-0.0 + 0.0 == 0.0``): a host's output to which nothing is added
    stays what it is, bit for bit.
    """
    ok = is_finite(sums[1])
    return partial(torch.add, torch.where(ok, term, -0.0)), torch.where(ok, alpha, 0.0)


def _traceable_adder(seed: Seed, h: Tensor, k: Tensor, alpha: Tensor) -> tuple[ShareAdder, Tensor]:
    """Do what :func:`share_adder` does with operations that any transformation can follow."""
    if seed.guard == "off":
        return partial(torch.add, alpha * k), alpha
    is_compiling = torch.compiler.is_compiling()
    if seed.guard == "always" and is_compiling and k.requires_grad:
        k = _Incoming.apply(k, seed.seen.sink)  # type: ignore[no-untyped-call] # torch has none
    term = alpha * k
    sums = _sums(seed, h.detach(), k.detach(), term.detach(), alpha)
    if is_compiling:
        _remember_compiled(seed, sums)
    if seed.guard == "step":
        return partial(torch.add, term), alpha
    return _where_finite(sums, term, alpha)


def _remember_compiled(seed: Seed, sums: Sums) -> None:
    row = torch.stack(sums)
    ring = seed.seen.ring
    latest = (row - row).to(device=ring.device, dtype=ring.dtype).unsqueeze(0)
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
    """Add, and sum what ``h`` becomes; where nothing else was added that is the result itself."""
    term = alpha * k
    y = so_far + term
    grafted = y if so_far is h else h + term
    call.sums = summed(h.detach()), summed(grafted.detach())
    return y


def _guarded_sum(
    h: Tensor, k: Tensor, alpha: Tensor, seed: Seed, call: Call, so_far: Tensor
) -> Tensor:
    host = None if so_far is h else h.detach()
    y: Tensor = _GuardedSum.apply(so_far, host, k, alpha, seed, call)  # type: ignore[no-untyped-call] # torch has none
    return y


class _SumContext(Protocol):
    """What a guarded sum keeps for its backward."""

    saved_tensors: tuple[Tensor, Tensor]
    seen: Observations
    call: Call

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...  # noqa: FBT001 - torch's signature


class _GuardedSum(torch.autograd.Function):
    """``so_far + alpha * k`` where the seed's share is finite, else ``so_far``; eager.

    The same as ``so_far + torch.where(ok, alpha * k, -0.0)`` in fewer passes, and without a second
    slow one in the backward: with a 0-dim condition ``where`` reads it again for every element.
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
        call.sums = sums = summed(host), summed(y)
        ok = is_finite(sums[1])
        ctx.set_materialize_grads(False)
        ctx.seen, ctx.call = seed.seen, call
        ctx.save_for_backward(alpha, ok)
        return torch.where(ok, y, host) if h is None else so_far + torch.where(ok, term, -0.0)

    @staticmethod
    def backward(ctx: _SumContext, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        g = gradients[0]
        if g is None:
            return None, None, None, None, None, None
        alpha, ok = ctx.saved_tensors
        if torch.is_grad_enabled() or in_transform():  # to be differentiated again
            return g, None, torch.where(ok, alpha * g, 0.0), None, None, None
        ctx.seen.come_in(ctx.call, summed(g))
        scaled = alpha * g
        if g.device.type != "cpu":
            scaled = torch.where(ok, scaled, 0.0)
        elif not ok.item():
            scaled = torch.zeros_like(g)
        return g, None, scaled, None, None, None


class _IncomingHook:
    """Remembers the sum of the gradient that reaches a kernel's output."""

    def __init__(self, seed: Seed, call: Call) -> None:
        self._seen, self._call = seed.seen, call

    def __call__(self, gradient: Tensor | None) -> None:
        """Remember it; the gradient passes unchanged."""
        if gradient is not None and not in_transform():
            self._seen.come_in(self._call, summed(gradient.detach()))


class _Incoming(torch.autograd.Function):
    """The identity in compiled code; marks in the sink where the gradient is not finite."""

    @staticmethod
    def forward(ctx: object, k: Tensor, sink: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return k.view_as(k)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004 - torch's signature
        bad = (~is_finite(summed(gradients[0]))).to(torch.float32)
        return gradients[0], torch.stack((bad, torch.zeros_like(bad)))
