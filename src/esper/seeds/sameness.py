"""Whether figures of the parts of a pass, put together, are those of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

Groups = list[list[Tensor]]
"""Figures in groups, each of one scale."""

TOLERANCE: Final = {torch.float64: 1e-12, torch.float32: 1e-6}
"""How far parts may come out from the whole, relative to its largest figure, by precision."""
_MOST_ROUNDING: Final = 1e3
_TIMES_ROUNDING: Final = 8.0
_NUDGES: Final = 4


def are_alike(
    model: nn.Module,
    figures: tuple[Groups, Groups],
    precision: torch.dtype,
    again: Callable[[], Groups],
) -> bool:
    """Say whether figures of parts, put together, are those of the whole but for rounding.

    Where little is left of large terms, as of a residual, rounding makes more of a difference than
    the tolerance. Then that much is allowed which rounding makes there: a few times the most that
    comes of weights that are moved by their last bit, in a few ways.

    Args:
        model: What the figures are of.
        figures: Those of the whole and those of the parts, in groups with a scale of its own each.
        precision: The lowest that they were computed in.
        again: Computes those of the whole once more.
    """
    whole, parts = figures
    tolerance = TOLERANCE.get(precision) or 2 * torch.finfo(precision).eps
    apart = [_apart(one, other) for one, other in zip(whole, parts, strict=True)]
    if all(each <= tolerance for each in apart):
        return True
    most = _MOST_ROUNDING * tolerance
    if not all(each <= most for each in apart):
        return False
    allowed = [tolerance] * len(apart)
    for random_seed in range(_NUDGES):  # of one alone the errors may happen to cancel out
        with nudged(model, torch.finfo(precision).eps, random_seed):
            moved = again()
        rounding = [_TIMES_ROUNDING * _apart(*each) for each in zip(whole, moved, strict=True)]
        allowed = [max(one, min(most, own)) for one, own in zip(allowed, rounding, strict=True)]
        if all(each <= own for each, own in zip(apart, allowed, strict=True)):
            return True
    return False


def _apart(whole: list[Tensor], parts: list[Tensor]) -> float:
    """Return how far figures are apart, relative to the largest; infinity where not comparable.

    Where both are NaN, or infinite alike, they are not apart.
    """
    if [t.shape for t in whole] != [t.shape for t in parts]:
        return math.inf
    apart = largest = 0.0
    for one, other in zip(whole, parts, strict=True):
        if not one.numel():
            continue
        a, b = one.detach().double(), other.detach().double()
        is_same = (a == b) | (a.isnan() & b.isnan())
        between = (a - b).abs().masked_fill(is_same, 0.0)
        apart = max(apart, float(between.nan_to_num(nan=math.inf, posinf=math.inf).max()))
        largest = max(largest, float(a.abs().nan_to_num(nan=0.0, posinf=0.0).max()))
    if apart == 0.0:
        return 0.0
    return apart / largest if apart <= largest else math.inf


@contextmanager
def nudged(model: nn.Module, eps: float, random_seed: int = 0) -> Iterator[None]:
    """Move every floating parameter by about its last bit; behind the block they are as before."""
    generator = torch.Generator().manual_seed(random_seed)
    kept = [(p, p.detach().clone()) for p in model.parameters() if p.is_floating_point()]
    try:
        for p, value in kept:
            noise = torch.rand(p.shape, generator=generator, dtype=torch.float64) * 2 - 1
            p.data.copy_(value.double() * (1 + eps * noise.to(p.device)))
        yield
    finally:
        for p, value in kept:
            p.data.copy_(value)


@contextmanager
def precision_seen(model: nn.Module) -> Iterator[list[torch.dtype]]:
    """Collect the floating dtypes that the modules of a model give, its parameters' included."""
    found = [p.dtype for p in model.parameters() if p.is_floating_point()]

    def see(_module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            found.append(output.dtype)

    handles = [module.register_forward_hook(see) for module in model.modules()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def lowest(precisions: list[torch.dtype]) -> torch.dtype:
    """Return the lowest of some precisions; float32 where there is none."""
    return max(precisions, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
