"""What keeps a kernel's faults away from its host: the fence, the finite gate, gradient gates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from esper.execution.seed_slot import Seed


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


def observe(seed: Seed, h: Tensor, k: Tensor, term: Tensor, alpha: Tensor) -> Tensor:
    """Look whether ``h`` and ``h + alpha * delta`` are finite, and remember it.

    Args:
        seed: The seed.
        h: Host output.
        k: Kernel output.
        term: ``alpha * k``.
        alpha: 0-dim float32.

    Returns:
        ``[2]`` on the device of ``h``: for each of the two, 0 where it is finite and else NaN.
    """
    h, k, term = h.detach(), k.detach(), term.detach()
    grafted = h + alpha * (k - h) if seed.replaces else h + term
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    sums = torch.stack((h.sum(dtype=wide), grafted.sum(dtype=wide)))
    row = sums - sums
    if torch.compiler.is_compiling():
        seed.ring = torch.cat((seed.ring[1:], row.to(seed.ring.dtype).unsqueeze(0)))
    else:
        seed.rows.append(row)
    return row


class _GradientGate(torch.autograd.Function):
    """The identity; its gradient is zeros where the gradient that arrives is not finite."""

    @staticmethod
    def forward(x: Tensor, seed: Seed | None) -> Tensor:  # noqa: ARG004 - for the backward
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.seed = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return zeros_unless_finite(gradients[0], ctx.seed), None


def _gate(x: Tensor, seed: Seed) -> Tensor:
    owner = None if torch.compiler.is_compiling() else seed
    gated: Tensor = _GradientGate.apply(x, owner)  # type: ignore[no-untyped-call] # torch has none
    return gated


def zeros_unless_finite(gradient: Tensor, seed: Seed | None) -> Tensor:
    """Return the gradient, or zeros where its sum is not finite; the seed remembers the sum."""
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    total = gradient.sum(dtype=wide)
    if seed is not None:
        seed.gradients.append((seed.incoming, total))
    return torch.where(is_finite(total), gradient, 0.0)


class _ParameterGate:
    """Hook of one kernel parameter."""

    def __init__(self, seed: Seed) -> None:
        self._seed = seed

    def __call__(self, gradient: Tensor) -> Tensor:
        return zeros_unless_finite(gradient, self._seed)


class OutputGate:
    """Hook of a kernel's output: remembers whether what came in, both ways, was finite.

    Args:
        seed: The seed.
        row: What :func:`observe` gave for the forward; a backward after a bad one counts nothing.
    """

    def __init__(self, seed: Seed, row: Tensor) -> None:
        self._seed, self._row = seed, row

    def __call__(self, gradient: Tensor) -> None:
        """Remember the sum of the gradient; it passes unchanged."""
        self._seed.incoming = gradient.sum(dtype=torch.float32) + self._row.sum()


def gate_parameters(seed: Seed) -> None:
    """Put the gates on the kernel's trainable parameters; anew, wherever they were before."""
    ungate_parameters(seed)
    gate = _ParameterGate(seed)
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
    rows = torch.cat((seed.ring, torch.stack(tuple(seed.rows)))) if seed.rows else seed.ring
    known = [row for row in rows.tolist() if row[0] == 0]
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


def _faulty_backwards(seed: Seed) -> int:
    """Count the backwards in which a finite gradient came in and another left the kernel."""
    known = [(i, o) for i, o in seed.gradients if i is not None]
    if not known:
        return 0
    sums = torch.stack([torch.stack((i.float(), o.float())) for i, o in known])
    finite = torch.isfinite(sums).tolist()
    pairs = zip(known, finite, strict=True)
    faulty = {id(i) for (i, _), (came, left) in pairs if came and not left}
    if faulty:
        seed.last_error = "its gradient was not finite where the incoming one was"
    return len(faulty)
