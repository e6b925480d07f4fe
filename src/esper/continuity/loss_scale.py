"""The scale of a loss in mixed precision, read where it is used."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch.amp.grad_scaler import GradScaler

if TYPE_CHECKING:
    from types import FrameType


def loss_scale_of_step() -> float:
    """Return by what a GradScaler has multiplied the loss of the optimizer's step under way.

    To be called in the optimizer's step, by a hook. Nobody hands the scaler over and an optimizer
    does not know it, but it is the scaler that calls the step: it stands further down the stack.
    Its scale is a number on the device, which is waited for.

    Returns:
        The scale, above 0; 1 where no scaler calls the step.
    """
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 - the stack has no other door
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, GradScaler):
            return float(caller.get_scale())
        frame = frame.f_back
    return 1.0
