"""What a long command says while it works."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.contracts.lifecycle import GraftStage


class GraftStatus(NamedTuple):
    """Where a graft is.

    Attributes:
        site: Dotted name of the layer.
        seed_idx: Slot in that layer.
        stage: Stage of the graft.
    """

    site: str
    seed_idx: int
    stage: GraftStage

    def __str__(self) -> str:
        return f"{self.site}.{self.seed_idx} {self.stage.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressRow:
    """Where one run is: what a terminal, a page and a callback of the owner's are all given.

    Attributes:
        name: What runs, for example ``"random seed 3, grown"``.
        update: Optimizer updates done.
        gate_loss: Loss on the gate split, as last read; None before the first reading.
        train_loss: Mean of recent training losses, as last read; None where it is not known.
        metrics: Whatever else was measured on the gate split, by name, as last read.
        parameters: Parameters of the model now; None before they are known.
        grafts: The grafts that are under way.
    """

    name: str
    update: int
    gate_loss: float | None = None
    train_loss: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parameters: int | None = None
    grafts: tuple[GraftStatus, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a command is.

    Attributes:
        done: Work done, in any unit; at least 0.
        total: Work in all, in the same unit; at least ``done``.
        doing: What is being done, in a few words.
        rows: One per run that is under way.
    """

    done: float
    total: float
    doing: str
    rows: tuple[ProgressRow, ...] = ()
