"""The recent training losses of a run, and what would be a spike among them."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

LOSS_WINDOW: Final = 50
"""Losses that are kept."""
LOSS_CHECK_EVERY: Final = 10
"""Updates between two looks at the training loss; each look reads the device once."""


class TrainingLosses:
    """The last fifty training losses, on their device until somebody reads them."""

    def __init__(self) -> None:
        self._losses: deque[Tensor] = deque(maxlen=LOSS_WINDOW)

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, loss: Tensor) -> None:
        """Keep a loss, a scalar tensor, without its graph."""
        self._losses.append(loss.detach())

    def clear(self) -> None:
        """Forget all."""
        self._losses.clear()

    def mean(self, num_last: int = LOSS_WINDOW) -> float | None:
        """Return the mean of the last losses; None where there is none."""
        if not self._losses:
            return None
        return float(torch.stack(tuple(self._losses)[-num_last:]).mean())

    def range(self) -> tuple[float, float]:
        """Return the lowest and the highest; there is one at least."""
        losses = torch.stack(tuple(self._losses))
        return float(losses.min()), float(losses.max())


@dataclass(frozen=True, slots=True, kw_only=True)
class SpikeLimit:
    """What would be a spike after an admission, from the training losses before it.

    A spike is a mean of the last ten losses above ``highest + 2 (highest - lowest)`` of the up
    to fifty before: a rule that neither a scale nor an offset of the loss changes.

    Attributes:
        limit: Largest mean that is no spike; None where too little was seen.
    """

    limit: float | None

    @classmethod
    def after(cls, losses: TrainingLosses) -> SpikeLimit:
        """Look at the losses so far; fewer than ten give no limit."""
        if len(losses) < LOSS_CHECK_EVERY:
            return cls(limit=None)
        lowest, highest = losses.range()
        limit = highest + 2 * (highest - lowest)
        return cls(limit=limit if math.isfinite(limit) else None)

    def trouble(self, losses: TrainingLosses) -> str | None:
        """Say what is wrong with the last losses, or None."""
        recent = losses.mean(LOSS_CHECK_EVERY)
        if recent is None:
            return None
        if not math.isfinite(recent):
            return f"the training loss became {recent}"
        if self.limit is not None and recent > self.limit:
            return f"the training loss spiked: {recent:.3g}, at most {self.limit:.3g} expected"
        return None
