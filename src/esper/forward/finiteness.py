"""Whether numbers are finite, asked without a transfer, and where that cannot be asked at all.

Finite is a property of the values and not of their sum, which may overflow; and what a host gives
may be infinite on purpose, as a score that is masked is. A *mark* is a 0-dim tensor that says such
a thing: NaN where something is wrong, else any number, infinity among them.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.autograd import forward_ad

_FEW: Final = 2048
"""Up to so many elements ``torch.where`` is the cheapest choice on the CPU too."""

_WIDE: Final = frozenset({torch.float32, torch.float64})
"""Types whose sums are accumulated in themselves."""

_BITS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def in_transform() -> bool:
    """Return whether ``torch.func`` or forward-mode differentiation transforms the code that runs.

    Their tensors must not be kept, and refuse to become numbers.
    """
    functorch: bool = torch._C._are_functorch_transforms_active()  # noqa: SLF001 - there is no public one
    return functorch or forward_ad._current_level >= 0  # noqa: SLF001 - neither is there here


def is_good(mark: Tensor) -> Tensor:
    """Return a bool tensor: where a mark says that nothing is wrong. One small operation."""
    return mark.eq(mark)


def seen_finite(y: Tensor) -> bool:
    """Look whether every element is finite, where that costs one pass and no transfer.

    That is in host memory, outside of what is traced. True is sure: infinities of both signs make
    a NaN of the sum. False says nothing: it is elsewhere, or the sum is not finite, as where it
    overflows.

    Args:
        y: Floating, and not in a transformation of ``torch.func``.
    """
    if type(y) is not Tensor or not y.is_cpu or torch._C._get_tracing_state() is not None:  # noqa: SLF001 - torch.jit is banned
        return False
    return math.isfinite(_sum(y.detach() if y.requires_grad else y).item())


def host_mark(h: Tensor) -> Tensor:
    """Return a mark: NaN where a host's output has a NaN in it. Infinities are data."""
    return h.amax() if h.numel() else h.sum()


def share_mark(y: Tensor, h: Tensor, room: Tensor | None = None) -> Tensor:
    """Return a mark: NaN where ``y`` is not finite and not what ``h`` is at the same place.

    So a place where the host is infinite must stay as it is, and a NaN of the host's excuses
    nothing.

    Args:
        y: What the host's output becomes with a share in it.
        h: The host's output, like ``y``.
        room: Is overwritten; None for memory of its own.
    """
    if y.numel() <= _FEW:
        return share_mark_by_place(y, h)
    lowest, highest = _extremes(y)
    spread = lowest - highest
    leaked = torch.sub(y, h, out=room).nansum(dtype=_summed_in(y))  # inf: where h is not infinite
    return torch.fmin(spread - spread, leaked - leaked) + highest  # NaN: where y has one


def share_mark_by_place(y: Tensor, h: Tensor) -> Tensor:
    """Do what :func:`share_mark` does in fewer calls, of which many elements make slow ones.

    In compiled code it is one pass, whatever the shape.
    """
    return torch.where(y == h, 0.0, y - y).sum()


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return least and greatest, in what is faster; NaN where there is one."""
    if values.device.type == "cpu" and values.element_size() > 2:
        return values.amin(), values.amax()
    found = torch.aminmax(values)
    return found.min, found.max


def _summed_in(values: Tensor) -> torch.dtype | None:
    return torch.float32 if values.dtype == torch.float16 else None


def whole(good: Tensor, y: Tensor, h: Tensor) -> Tensor:
    """Return ``y`` where ``good`` is true, else ``h``, bit for bit; ``y`` may be written to.

    On the CPU ``torch.where`` with a 0-dim condition reads it again for every element, which costs
    more than three passes over the bits.

    Args:
        good: 0-dim bool.
        y: Owned by the caller, and not needed for a gradient.
        h: Like ``y``.
    """
    bits = _BITS.get(y.element_size())
    if y.device.type != "cpu" or y.numel() <= _FEW or bits is None or h.is_neg():
        return torch.where(good, y, h)
    theirs = h.view(bits)
    y.view(bits).bitwise_xor_(theirs).bitwise_and_(good.to(bits).neg()).bitwise_xor_(theirs)
    return y


def gradient_mark(gradient: Tensor) -> Tensor:
    """Return a mark: NaN where a gradient is not finite; with operations that can be traced."""
    return gradient.sub(gradient).sum()


def gradient_total(gradient: Tensor) -> Tensor | float:
    """Return what is finite where a gradient is: on the CPU a number, which is read.

    Elsewhere a 0-dim tensor: a sum, accumulated where it cannot overflow.
    """
    if gradient.is_cpu:
        total = _sum(gradient).item()
        if math.isfinite(total) or not bool(_values(gradient).isfinite().all()):
            return total
        return 0.0
    if gradient.device.type == "cuda":
        return gradient.sum(dtype=torch.float64)
    return _sum(gradient)


def _sum(values: Tensor) -> Tensor:
    """Return the sum, accumulated in float32 or wider."""
    if values.dtype in _WIDE:
        return values.sum()
    return values.sum(dtype=torch.float32)


def _values(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient
