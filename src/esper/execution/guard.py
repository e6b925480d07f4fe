"""What keeps a kernel's faults away from its host: the fence, the finite gate, gradient gates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from esper.execution.seed_slot import Seed


Sums = tuple[Tensor, Tensor]
"""Sums of the host's output, and of that with the seed's share."""


def is_finite(total: Tensor) -> Tensor:
    """Return a bool tensor: where a sum is finite. Two small operations, no transfer."""
    return (total - total) == 0


def run_kernel(seed: Seed, x: Tensor, h: Tensor) -> Tensor | None:
    """Return the kernel's output, or None where the fence took a fault.

    Under ``torch.compile`` there is no fence: what does not trace was refused at load.

    Args:
        seed: The seed; a shadow seed is not fenced.
        x: The layer's input.
        h: The host's output; the result has its shape, dtype and device.
    """
    kernel: Any = seed.slot._modules["kernel"]  # noqa: SLF001 - getattr costs a microsecond
    assert kernel is not None
    given = h if seed.is_serial else x
    if seed.guard == "always" and given.requires_grad and torch.is_grad_enabled():
        given = _gate(given, seed)
    if seed.is_shadow and seed.example is None:
        seed.example = x.detach().clone()
    if seed.is_shadow or torch.compiler.is_compiling():
        return _conform(kernel(given), h)
    try:
        k = _conform(kernel(given), h)
    except Exception as error:  # noqa: BLE001 - the one broad fence
        _note(seed, error)
        return None
    if seed.errors:
        seed.errors.append(False)
    return k


def _conform(k: Any, h: Tensor) -> Tensor:
    """Return ``k`` if it can be added to ``h``; autocast may have chosen another dtype."""
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


def _note(seed: Seed, error: Exception) -> None:
    seed.last_error = f"{type(error).__name__}: {error}"
    seed.errors.append(True)


def observe(seed: Seed, h: Tensor, k: Tensor, term: Tensor, alpha: Tensor) -> Sums:
    """Sum ``h`` and ``h + alpha * delta``, which are finite where the sums are; remember both.

    Args:
        seed: The seed.
        h: Host output.
        k: Kernel output.
        term: ``alpha * k``.
        alpha: 0-dim float32.

    Returns:
        The two sums, 0-dim, float32 or wider, on the device of ``h``.
    """
    h, k, term = h.detach(), k.detach(), term.detach()
    grafted = h + alpha * (k - h) if seed.replaces else h + term
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    sums = (h.sum(dtype=wide), grafted.sum(dtype=wide))
    if torch.compiler.is_compiling():
        row = torch.stack(sums)
        latest = (row - row).to(seed.ring.dtype).unsqueeze(0)
        seed.ring = torch.cat((seed.ring[1:].to(row.device), latest))
    else:
        seed.rows.append(sums)
    return sums


class _GradientGate(torch.autograd.Function):
    """The identity; its gradient is zeros where the gradient that arrives is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return zeros_unless_finite(gradients[0], None)


def _gate(x: Tensor, seed: Seed) -> Tensor:
    """Return ``x`` under a gate: a function where it is compiled, else a hook, which is cheaper."""
    if torch.compiler.is_compiling():
        compiled: Tensor = _GradientGate.apply(x)  # type: ignore[no-untyped-call] # torch has none
        return compiled
    gated = x.view_as(x)
    gated.register_hook(_GradientHook(seed))  # type: ignore[no-untyped-call] # torch has none
    return gated


def zeros_unless_finite(gradient: Tensor, seed: Seed | None) -> Tensor:
    """Return the gradient, or zeros where its sum is not finite; the seed remembers the sum.

    On the CPU, outside of compiled code, this reads one number; elsewhere nothing is read.
    """
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    total = gradient.sum(dtype=wide)
    if seed is not None:
        seed.gradients.append((seed.incoming, total))
    if seed is None or gradient.device.type != "cpu" or gradient.requires_grad:
        return torch.where(is_finite(total), gradient, 0.0)
    return gradient if math.isfinite(total.item()) else torch.zeros_like(gradient)


class _GradientHook:
    """The gate as a hook: of the kernel's input in a forward, and of each of its parameters."""

    def __init__(self, seed: Seed) -> None:
        self._seed = seed

    def __call__(self, gradient: Tensor) -> Tensor:
        return zeros_unless_finite(gradient, self._seed)


class OutputGate:
    """Hook of a kernel's output: remembers whether what came in, both ways, was finite.

    Args:
        seed: The seed.
        sums: What :func:`observe` gave for the forward; a backward after a bad one counts nothing.
    """

    def __init__(self, seed: Seed, sums: Sums) -> None:
        self._seed, self._sums = seed, sums

    def __call__(self, gradient: Tensor) -> None:
        """Remember the sum of the gradient; it passes unchanged."""
        self._seed.incoming = (gradient.sum(dtype=torch.float32), *self._sums)


def gate_parameters(seed: Seed) -> None:
    """Put the gates on the kernel's trainable parameters; anew, wherever they were before."""
    ungate_parameters(seed)
    gate = _GradientHook(seed)
    parameters = (p for p in seed.slot.parameters() if p.requires_grad)
    seed.handles = [p.register_hook(gate) for p in parameters]  # type: ignore[no-untyped-call] # torch has none


def ungate_parameters(seed: Seed) -> None:
    """Take the gates away."""
    for handle in seed.handles:
        handle.remove()
    seed.handles = []


def read_calls(seed: Seed) -> list[bool]:
    """Return the outcomes of the calls since the last reading, oldest first: True at fault.

    A call whose input or host output was not finite counts neither way, and a gradient counts
    only where what reached the kernel's output was finite. One transfer from the device.
    """
    known = [row for row in observed_rows(seed).tolist() if row[0] == 0]
    outcomes = [row[1] != 0 for row in known] + list(seed.errors)
    faulty_backwards = _faulty_backwards(seed)
    for i in reversed(range(len(outcomes))):
        if faulty_backwards and not outcomes[i]:
            outcomes[i] = True
            faulty_backwards -= 1
    if any(row[1] != 0 for row in known):
        seed.last_error = "its output was not finite where its host's was"
    seed.forget_calls()
    return outcomes + [True] * faulty_backwards


def observed_rows(seed: Seed) -> Tensor:
    """Return ``[n, 2]``, one row a call: 0 where (host, host and seed) were finite, else NaN.

    A row that begins with NaN says nothing about the seed.
    """
    if seed.ring.device != seed.slot.alpha.device:  # the model was moved since
        seed.forget_calls()
    if not seed.rows:
        return seed.ring
    sums = torch.stack([s for pair in seed.rows for s in pair]).view(-1, 2)
    return torch.cat((seed.ring, (sums - sums).to(seed.ring.dtype)))


def _faulty_backwards(seed: Seed) -> int:
    """Count the backwards in which a finite gradient came in and another left the kernel."""
    known = [(i, o) for i, o in seed.gradients if i is not None]
    if not known:
        return 0
    sums = torch.stack([s for came, left in known for s in (*came, left)]).view(len(known), -1)
    finite = torch.isfinite(sums).tolist()
    pairs = zip(known, finite, strict=True)
    faulty = {id(came) for (came, _), flags in pairs if all(flags[:-1]) and not flags[-1]}
    if faulty:
        seed.last_error = "its gradient was not finite where the incoming one was"
    return len(faulty)
