"""How the live run made an update, as far as a twin has to do likewise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.continuity.clipping import UNCLIPPED, Clipping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.continuity.ensemble import ParamGroup
    from esper.continuity.replicas import AverageGradients


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveStep:
    """How the live run made its last update, as far as a twin has to do likewise.

    Attributes:
        settings: What each param group was set to, its rate among it; schedules move momenta, too.
        loss_scale: By what the loss was multiplied for the backward; 1 where nothing did.
        clipping: How the gradients were clipped.
        average: Averages the gradients over the ranks; None where there is one.
    """

    settings: Sequence[ParamGroup]
    loss_scale: float = 1.0
    clipping: Clipping = UNCLIPPED
    average: AverageGradients | None = None
