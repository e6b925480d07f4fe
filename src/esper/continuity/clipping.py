"""Whether an owner clips gradients, told from the gradients that reach the optimizer.

Nobody hands the limit over, but it shows: the norms of clipped gradients are all the same number,
and no norm is above it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from esper.state.shards import here, largest, whole

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

WATCHED_UPDATES: Final = 64
"""Norms that are looked back on."""
_TELLING: Final = 3
"""So many updates with one and the same largest norm are no coincidence."""
_ROUNDING: Final = 1e-6
"""Relative difference of float32 norms that are equal but for rounding, and what torch adds to a
norm before it divides by it: a limited one is ``limit n / (n + 1e-6)``."""
_NEAR: Final = 2e-5
"""Relative difference of limited norms, at most: small ones that are alike may be unlimited."""
_FLOAT32: Final = 2**-24
"""Relative difference of a number and the nearest one in float32, at most."""
_DIGITS: Final = 4
"""Significant digits, at most, of the limits that people write down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipping:
    """How gradients are clipped before a step.

    Attributes:
        norm: Largest norm of all gradients together, above 0; None where it is not limited.
        value: Largest absolute value of a gradient's element, above 0; None likewise.
    """

    norm: float | None = None
    value: float | None = None

    def apply(self, params: Iterable[Tensor]) -> None:
        """Clip the gradients of parameters, in the order in which the model has them."""
        held = list(params)
        if self.value is not None:
            torch.nn.utils.clip_grad_value_(held, self.value)
        if self.norm is not None:
            torch.nn.utils.clip_grad_norm_(held, self.norm)


UNCLIPPED: Final = Clipping()
"""Gradients as they come."""


class GradientWatch:
    """Follows the size of the gradients that reach an optimizer's steps."""

    def __init__(self) -> None:
        self._norms: deque[Tensor] = deque(maxlen=WATCHED_UPDATES)
        self._values: deque[Tensor] = deque(maxlen=WATCHED_UPDATES)

    @torch.no_grad()
    def see(self, optimizer: Optimizer) -> None:
        """Take the gradients of a step that is about to be made; no device is waited for."""
        if getattr(optimizer, "grad_scale", None) is not None:
            return  # a fused optimizer takes the scale off itself, later
        gradients = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        gradients = [g for g in gradients if not g.is_sparse]
        if gradients:
            norms = _total(torch._foreach_norm(gradients))  # noqa: SLF001 - as clip_grad_norm_ does
            self._norms.append(whole(norms.norm()))
            self._values.append(_highest(gradients))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was seen, on the CPU."""
        return {"norms": _listed(self._norms), "values": _listed(self._values)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on with what another had seen."""
        for sizes, name in ((self._norms, "norms"), (self._values, "values")):
            sizes.clear()
            sizes.extend(state[name].clone().unbind())

    @property
    def clipping(self) -> Clipping:
        """How the gradients seen so far were clipped, as far as they tell."""
        value = _limit(self._values, is_exact=True)
        norm = None if value is not None else _limit(self._norms, is_exact=False)
        return Clipping(norm=norm, value=value)


def _listed(sizes: Collection[Tensor]) -> Tensor:
    return torch.stack([size.detach().cpu() for size in sizes]) if sizes else torch.empty(0)


def _highest(gradients: Sequence[Tensor]) -> Tensor:
    """Return the largest absolute value; a rank may hold nothing of a small gradient."""
    held = [part for part in map(here, gradients) if part.numel()] or [
        here(gradients[0]).new_zeros(1)
    ]
    found = _total(torch._foreach_norm(held, float("inf"))).max()  # noqa: SLF001 - as clip_grad_norm_ does
    return largest(found, gradients[0])


def _total(norms: Sequence[Tensor]) -> Tensor:
    return torch.stack([norm.float().to(norms[0].device) for norm in norms])


def _limit(sizes: Iterable[Tensor], *, is_exact: bool) -> float | None:
    """Return the largest size where several updates share it, as it was written down."""
    known = [float(size) for size in sizes]
    finite = [size for size in known if 0.0 < size < float("inf")]
    if len(finite) < _TELLING:
        return None
    largest = max(finite)
    near = 0.0 if is_exact else min(_ROUNDING * (largest + 1.0), _NEAR * largest)
    if sum(size >= largest - near for size in finite) < _TELLING:
        return None
    return _as_written(largest, near or _FLOAT32 * largest)


def _as_written(size: float, near: float) -> float:
    """Return the shortest decimal near a size, or the size itself."""
    shorter = (float(f"{size:.{digits}e}") for digits in range(_DIGITS))
    return next((plain for plain in shorter if abs(plain - size) <= near), size)
