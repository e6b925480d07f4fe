"""What a long command says while it works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.contracts.lifecycle import GraftStage


@dataclass(frozen=True, slots=True, kw_only=True)
class GraftStatus:
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
    """Where one run is.

    Attributes:
        name: What runs, for example ``"random seed 3, grown"``.
        update: Optimizer updates done.
        accuracy: Percent on the gate split, as last read; None before the first reading.
        parameters: Parameters of the model now; None before they are known.
        stages: Stage of each seed that is not dormant, for example ``"0.0 audition"``.
    """

    name: str
    update: int
    accuracy: float | None = None
    parameters: int | None = None
    stages: tuple[str, ...] = ()


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
