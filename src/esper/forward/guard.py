"""What keeps a kernel's faults away from its host: the fence, the finite gate, gradient gates."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

from esper.state.observation import Call

if TYPE_CHECKING:
    from esper.state.layer_call import LayerCall
    from esper.state.observation import Sums
    from esper.state.seed_slot import Seed

_CLEAN: Final = Call(None)
"""A clean call without a guard: ends a run of errors, and nothing more is known about it."""


def is_finite(total: Tensor) -> Tensor:
    """Return a bool tensor: where a sum is finite. Two small operations, no transfer."""
    return total.sub(total).logical_not()


def in_transform() -> bool:
    """Return whether ``torch.func`` or forward-mode differentiation transforms the code that runs.

    Their tensors must not be kept, and refuse to become numbers.
    """
    functorch: bool = torch._C._are_functorch_transforms_active()  # noqa: SLF001 - there is no public one
    return functorch or forward_ad._current_level >= 0  # noqa: SLF001 - neither is there here


Launch = Callable[[Callable[[], Any]], Any]
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
    if seed.guard == "always":
        _keep_gated(seed)
    try:
        if launch is not None:
            return _conform(launch(partial(_output, seed, call, h)), h)
        return _conform(_output(seed, call, h), h)
    except Exception as error:  # noqa: BLE001 - the one broad fence
        _note(seed, h, error)
        return None


def _output(seed: Seed, call: LayerCall, h: Tensor) -> Any:
    """Run a kernel on what it reads: ``h``, the layer's first input, or its whole call."""
    kernel: Any = seed.slot._modules["kernel"]  # noqa: SLF001 - getattr costs a microsecond
    is_gated = seed.guard == "always" and torch.is_grad_enabled()
    if seed.takes is None:
        given = h if seed.is_serial else call.x
        return kernel(_gate(given, seed) if is_gated else given)
    taken = seed.takes.of(call)
    if is_gated:
        taken = taken.with_tensors(lambda t: _gate(t, seed))
    return kernel(*taken.args, **taken.kwargs)


def _conform(k: Any, h: Tensor) -> Tensor:
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


def _unlike(k: Any, h: Tensor) -> str:
    found = f"{tuple(k.shape)}, {k.dtype}" if isinstance(k, Tensor) else type(k).__name__
    return f"kernel output: expected {tuple(h.shape)}, {h.dtype}, on {h.device}; found {found}"


def _note(seed: Seed, h: Tensor, error: Exception) -> None:
    seed.last_error = f"{type(error).__name__}: {error}"
    if not in_transform():
        seed.seen.calls.append(Call((_sum(h.detach()),), raised=True))


def _sum(values: Tensor) -> Tensor:
    """Return the sum, accumulated in float32 or wider."""
    if values.dtype in (torch.float32, torch.float64):
        return values.sum()
    return values.sum(dtype=torch.float32)


Join = Callable[[Tensor], Tensor]
"""Adds a seed's share to what the layer has so far."""


def joining(seed: Seed, h: Tensor, k: Tensor, alpha: Tensor) -> tuple[Join, Tensor]:
    """Return what adds ``alpha * k``, and the weight of that: nothing where the guard says no.

    Args:
        seed: The seed.
        h: Host output.
        k: Kernel output, like ``h``.
        alpha: 0-dim float32.
    """
    if torch.compiler.is_compiling() or in_transform():
        return _traceable_joining(seed, h, k, alpha)
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
    return _sum(h), _sum(grafted)


def _where_finite(sums: Sums, term: Tensor, alpha: Tensor) -> tuple[Join, Tensor]:
    """Return the join of a term, and its weight, where the sums say so; else neutral elements.

    That of addition is -0.0 (``-0.0 + 0.0 == 0.0``): a host's output to which nothing is added
    stays what it is, bit for bit.
    """
    ok = is_finite(sums[1])
    return partial(torch.add, torch.where(ok, term, -0.0)), torch.where(ok, alpha, 0.0)


def _traceable_joining(seed: Seed, h: Tensor, k: Tensor, alpha: Tensor) -> tuple[Join, Tensor]:
    """Do what :func:`joining` does with operations that any transformation can follow."""
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
    call.sums = _sum(h.detach()), _sum(grafted.detach())
    return y


def _guarded_sum(
    h: Tensor, k: Tensor, alpha: Tensor, seed: Seed, call: Call, so_far: Tensor
) -> Tensor:
    host = None if so_far is h else h.detach()
    y: Tensor = _GuardedSum.apply(so_far, host, k, alpha, seed, call)  # type: ignore[no-untyped-call] # torch has none
    return y


class _GuardedSum(torch.autograd.Function):
    """``so_far + alpha * k`` where the seed's share is finite, else ``so_far``; eager.

    The same as ``so_far + torch.where(ok, alpha * k, -0.0)`` in fewer passes, and without a second
    slow one in the backward: with a 0-dim condition ``where`` reads it again for every element.
    """

    @staticmethod
    def forward(
        ctx: Any, so_far: Tensor, h: Tensor | None, k: Tensor, alpha: Tensor, seed: Seed, call: Call
    ) -> Tensor:
        host = so_far if h is None else h
        term = alpha * k
        y = host + term
        call.sums = sums = _sum(host), _sum(y)
        ok = is_finite(sums[1])
        ctx.set_materialize_grads(False)
        ctx.seen, ctx.call = seed.seen, call
        ctx.save_for_backward(alpha, ok)
        return torch.where(ok, y, host) if h is None else so_far + torch.where(ok, term, -0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        g = gradients[0]
        if g is None:
            return None, None, None, None, None, None
        alpha, ok = ctx.saved_tensors
        if torch.is_grad_enabled() or in_transform():  # to be differentiated again
            return g, None, torch.where(ok, alpha * g, 0.0), None, None, None
        ctx.seen.come_in(ctx.call, _sum(g))
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
        """Take note; the gradient passes unchanged."""
        if gradient is not None and not in_transform():
            self._seen.come_in(self._call, _sum(gradient.detach()))


class _Incoming(torch.autograd.Function):
    """The identity in compiled code; marks in the sink where the gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, sink: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return k.view_as(k)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004 - torch's signature
        bad = (~is_finite(_sum(gradients[0]))).to(torch.float32)
        return gradients[0], torch.stack((bad, torch.zeros_like(bad)))


class _GradientGate(torch.autograd.Function):
    """The identity; its gradient is zeros where the gradient that arrives is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sink: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004 - torch's signature
        ok = is_finite(_sum(gradients[0]))
        bad = (~ok).to(torch.float32)
        return torch.where(ok, gradients[0], 0.0), torch.stack((torch.zeros_like(bad), bad))


def _gate(x: Tensor, seed: Seed) -> Tensor:
    """Return ``x`` under a gate: a function where it is compiled, else a hook, which is cheaper."""
    if not x.requires_grad:
        return x
    if torch.compiler.is_compiling():
        compiled: Tensor = _GradientGate.apply(x, seed.seen.sink)  # type: ignore[no-untyped-call] # torch has none
        return compiled
    gated = x.view_as(x)
    node: Any = gated.grad_fn
    node.register_prehook(_InputHook(seed))  # a hook of the tensor costs four times as much
    return gated


def _zeros_unless_finite(gradient: Tensor, seed: Seed, place: int) -> Tensor:
    """Return the gradient, or zeros where its sum is not finite, and remember the sum.

    On the CPU, outside of compiled code, this reads one number; elsewhere nothing is read.
    """
    total = _sum(gradient)
    if gradient.requires_grad or in_transform():
        return torch.where(is_finite(total), gradient, 0.0)
    if gradient.device.type != "cpu":
        seed.seen.leave(place, total)
        return torch.where(is_finite(total), gradient, 0.0)
    number = total.item()
    seed.seen.leave(place, number)
    return gradient if math.isfinite(number) else torch.zeros_like(gradient)


class _InputHook:
    """The gate of a kernel's input, as a hook of the node that its gradient leaves through."""

    def __init__(self, seed: Seed) -> None:
        self._seed = seed

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        """Return the gradients that may pass; None where there is none."""
        (gradient,) = gradients
        return None if gradient is None else (_zeros_unless_finite(gradient, self._seed, -1),)


class _ParameterHook:
    """The gate of one of a kernel's parameters, as a hook.

    Args:
        seed: The seed, which remembers the sums of what passes.
        place: Number of the parameter.
    """

    def __init__(self, seed: Seed, place: int) -> None:
        self._seed, self._place = seed, place

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        """Return the gradient that may pass."""
        return None if gradient is None else _zeros_unless_finite(gradient, self._seed, self._place)


def gate_parameters(seed: Seed) -> None:
    """Put the gates on the kernel's trainable parameters; anew, wherever they were before."""
    ungate_parameters(seed)
    for module in seed.slot.modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001 - where they can be exchanged
            if parameter is not None and parameter.requires_grad:
                hook = _ParameterHook(seed, len(seed.gated))
                seed.handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call] # torch has none
                seed.gated.append((module._parameters, name, parameter))  # noqa: SLF001


def ungate_parameters(seed: Seed) -> None:
    """Take the gates away."""
    for handle in seed.handles:
        handle.remove()
    seed.handles, seed.gated = [], []


def _keep_gated(seed: Seed) -> None:
    """Gate what has come into the place of the parameters: loading, moving and sharding do that."""
    for table, name, parameter in seed.gated:
        if table.get(name) is not parameter:
            if not in_transform():
                gate_parameters(seed)
            return
