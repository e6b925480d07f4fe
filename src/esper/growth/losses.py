"""The recent training losses of a run, and what would be a spike among them."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LOSS_WINDOW: Final = 50
"""Losses that are kept."""
_INFINITE: Final = math.inf
LOSS_CHECK_EVERY: Final = 10
"""Updates between two looks at the training loss; each look reads the device once."""


class TrainingLosses:
    """The last fifty training losses: numbers, or on their device until somebody reads them."""

    def __init__(self) -> None:
        self._losses: deque[float | Tensor] = deque(maxlen=LOSS_WINDOW)
        self._num_unread = 0
        self._is_finite = False

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, loss: object) -> float | None:
        """Keep a loss without its graph.

        Args:
            loss: A number, or a tensor of one element; on the CPU it is read, elsewhere it stays.

        Returns:
            What was read, where it is not finite, or is so for the first time or again; else None.
            Numbers and losses on the CPU are read at once, from any other device the mean of the
            last fifty, once in fifty losses.

        Raises:
            TypeError: It is neither a number nor a tensor.
            ValueError: The tensor has more than one element, or none.
        """
        kept: float | Tensor
        if isinstance(loss, Tensor) and (not loss.ndim or loss.numel() == 1):
            kept = float(loss.item()) if loss.is_cpu else loss.detach().reshape(())
        elif isinstance(loss, bool) or not isinstance(loss, Real):
            raise _refusal(loss)
        else:
            kept = float(loss)
        self._losses.append(kept)
        if isinstance(kept, Tensor):
            self._num_unread += 1
            if self._num_unread < LOSS_WINDOW:
                return None
            self._num_unread, kept = 0, float(_together(tuple(self._losses)).mean())
        was_finite, self._is_finite = self._is_finite, -_INFINITE < kept < _INFINITE
        return None if was_finite and self._is_finite else kept

    def state_dict(self) -> dict[str, Any]:
        """Return the losses on the CPU, where each was, and how many nobody has read."""
        return {
            "losses": [_tensor(loss).to("cpu", copy=True) for loss in self._losses],
            "devices": [str(_tensor(loss).device) for loss in self._losses],
            "num_unread": self._num_unread,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the losses of another run, on the devices that they were on."""
        found = zip(state["losses"], state["devices"], strict=True)
        self._losses.clear()
        self._losses.extend(
            float(loss.item()) if device == "cpu" else loss.to(device, copy=True)
            for loss, device in found
        )
        self._num_unread = int(state["num_unread"])

    def clear(self) -> None:
        """Forget all."""
        self._losses.clear()

    def mean(self, num_last: int = LOSS_WINDOW) -> float | None:
        """Return the mean of the last losses; None where there is none."""
        if not self._losses:
            return None
        return float(_together(tuple(self._losses)[-num_last:]).mean())

    def range(self) -> tuple[float, float]:
        """Return the lowest and the highest; there is one at least."""
        losses = _together(tuple(self._losses))
        return float(losses.min()), float(losses.max())


def _refusal(loss: object) -> Exception:
    """Return what is raised for something that is no loss."""
    if isinstance(loss, Tensor):
        return ValueError(
            "the loss given to grower.step is a scalar, got a tensor of shape "
            f"{tuple(loss.shape)}; pass the mean that was trained on"
        )
    kind = type(loss).__name__
    return TypeError(f"the loss given to grower.step is a scalar tensor or a number, got {kind}")


def _tensor(loss: float | Tensor) -> Tensor:
    return loss if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)


def _together(losses: Sequence[float | Tensor]) -> Tensor:
    """Return losses as one tensor, on the device of the last; float32 where their types differ."""
    found = [_tensor(loss) for loss in losses]
    device, dtypes = found[-1].device, {loss.dtype for loss in found}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return torch.stack([loss.to(device, dtype) for loss in found])


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
