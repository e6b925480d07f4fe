"""What every stage between a decision to grow and its end is: advanced once per update of the run.

``advance`` returns the stage that follows, or None where there is nothing more to do; ``close``
takes away everything that the stage put anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from esper.contracts.progress import GraftStatus
    from esper.growth.batch import Batch

StageState = dict[str, Any]
"""What is saved of a stage: its ``kind``, and what that kind needs; plain values and tensors."""


class Stage(Protocol):
    """What is under way between a decision to grow and its verdict."""

    @property
    def needs_batches(self) -> bool:
        """Whether ``advance`` cannot do without the batches of the update."""
        ...

    @property
    def statuses(self) -> tuple[GraftStatus, ...]:
        """Where each graft is that is under way."""
        ...

    def advance(self, batches: list[Batch]) -> Stage | None:
        """Follow one update, given the batches that it was made of."""
        ...

    def close(self, reason: str) -> None:
        """Take away everything that is not decided yet."""
        ...

    def state_dict(self) -> StageState:
        """Return what the stage begins again from, or goes on from, after the run was loaded."""
        ...
