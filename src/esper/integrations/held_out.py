"""Per-sample losses on held-out batches, where the owner names a loss and no measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

SampleLoss = Literal["cross_entropy", "mse"] | Callable[[Tensor, Tensor], Tensor]
"""A loss by name, or ``(output, target)`` to losses whose first axis is the samples'."""


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    classes_last = output.ndim > target.ndim
    flat = output.flatten(0, -2) if classes_last else output
    losses = F.cross_entropy(
        flat.float(), target.flatten() if classes_last else target.float(), reduction="none"
    )
    return losses.view(target.shape) if classes_last else losses


def _mse(output: Tensor, target: Tensor) -> Tensor:
    return (output.float() - target.float().view_as(output)).square()


_BY_NAME: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "cross_entropy": _cross_entropy,
    "mse": _mse,
}


def sample_loss(loss: SampleLoss) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what gives the losses of a batch, shape (samples,).

    Args:
        loss: ``"cross_entropy"`` (classes on the last axis, target indices without it), ``"mse"``,
            or a function ``(output, target)`` to losses whose first axis is the samples'.

    Raises:
        ValueError: The name is none of these.
        TypeError: It is neither a name nor a function.
    """
    if isinstance(loss, str) and loss not in _BY_NAME:
        msg = f"loss is one of {', '.join(map(repr, _BY_NAME))} or a function, got {loss!r}"
        raise ValueError(msg)
    function: object = _BY_NAME[loss] if isinstance(loss, str) else loss
    if not callable(function):
        msg = f"loss is a name or a function (output, target) -> losses, got {loss!r}"
        raise TypeError(msg)

    def losses(output: Tensor, target: Tensor) -> Tensor:
        found: Tensor = function(output, target)
        return found.reshape(found.shape[0], -1).mean(1)

    return losses


def joined(losses: Iterable[Tensor]) -> Tensor:
    """Return the losses of all batches on the CPU, float64, shape (samples,)."""
    return torch.cat([each.detach().double().cpu() for each in losses])
