"""What ranks tell one another between two steps: that they go on, what they chose, what they have.

Whatever may fail on one rank alone is done in a *step* (:meth:`Ranks.in_step`), and steps may stand
in steps. Every call begins, and every step ends, with a vote: one small reduction that has the same
shape everywhere. A rank that fails casts the vote at the end of its step at once. It meets the next
vote of the others, wherever they are in that step: they leave it, too, without another word. So all
learn of it, and none waits for a rank that does not come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from esper.contracts.errors import RankFailedError
from esper.resilience.attempt import Failed, attempt

CHUNK_BYTES: Final = 64 * 2**20
"""How much of long data is sent at a time, and stands on the device that ranks talk on."""

T = TypeVar("T")

_DEEPEST: Final = 1 << 20


class _Left(NamedTuple):
    """A step that another rank has left: how deep it stands, and why."""

    depth: int
    reason: str


class Ranks:
    """The ranks that train one model, at least two. Every rank makes the same calls in one order.

    Args:
        group: Who they are.
        device: Where they talk.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self._device = device
        self._depth = 0
        self._left: _Left | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.group.rank() == 0

    def vote(self, choice: int = 0) -> tuple[int, int]:
        """Vote for going on; return the least and the largest choice of the ranks.

        Args:
            choice: What this rank chose, a small number.

        Raises:
            RankFailedError: Another rank has left the step.
        """
        found = (choice, choice) if self._left is not None else self._cast(choice)
        if self._left is not None:
            raise RankFailedError(self._left.reason)
        return found

    def in_step(self, work: Callable[[], T]) -> T:
        """Do what may fail on one rank alone: it returns on every rank, or raises on every rank.

        Args:
            work: May call this object itself, in the same order on every rank.

        Raises:
            RankFailedError: Another rank failed. On that one its own error is raised.
        """
        self._depth += 1
        try:
            outcome = attempt(work)
            failure = str(outcome) if isinstance(outcome, Failed) else ""
            if self._left is None:
                self._cast(failure=failure)
        finally:
            self._depth -= 1
        left = self._left
        if left is not None and left.depth > self._depth:
            self._left = None
        if isinstance(outcome, Failed):
            raise outcome.error
        if left is not None:
            raise RankFailedError(left.reason)
        return outcome.value

    def each(self, work: Callable[[], T]) -> list[T]:
        """Do something on every rank as :meth:`in_step` does; return what each has, in order.

        Args:
            work: Returns plain values, that pickle takes.
        """
        return self._gathered(self.in_step(work))

    def to_first(self, mine: T) -> list[T] | None:
        """Return on the first rank what each rank has, in order; None on the others.

        Args:
            mine: Plain values, that pickle takes.
        """
        self.vote()
        found = [mine] * self.group.size() if self.is_first else None
        dist.gather_object(mine, found, group=self.group, group_dst=0)
        return found

    def of_one(self, rank: int, make: Callable[[], bytes]) -> bytes:
        """Return the bytes that one rank makes.

        Args:
            rank: Its number in the group.
            make: Called on that rank alone.
        """
        data = self.in_step(make if self.group.rank() == rank else bytes)
        size = torch.tensor([len(data)], device=self._device)
        dist.broadcast(size, group=self.group, group_src=rank)
        found = bytearray(int(size))
        for start in range(0, len(found), CHUNK_BYTES):
            sent = torch.empty(
                min(CHUNK_BYTES, len(found) - start), dtype=torch.uint8, device=self._device
            )
            if data:
                part = bytearray(data[start : start + CHUNK_BYTES])
                sent.copy_(torch.frombuffer(part, dtype=torch.uint8))
            dist.broadcast(sent, group=self.group, group_src=rank)
            found[start : start + CHUNK_BYTES] = sent.cpu().numpy().tobytes()
        return bytes(found)

    def _cast(self, choice: int = 0, failure: str = "") -> tuple[int, int]:
        """Cast a vote, and remember which step a rank has left, the outermost of several."""
        failed = _DEEPEST - self._depth if failure else 0
        cast = torch.tensor([failed, choice, -choice], device=self._device)
        dist.all_reduce(cast, dist.ReduceOp.MAX, group=self.group)
        failed, most, least = cast.tolist()
        if failed:
            said = self._gathered(failure)
            rank, why = next((i, text) for i, text in enumerate(said) if text)
            reason = f"rank {rank} could not go on, so no rank did: {why}"
            self._left = _Left(_DEEPEST - failed, reason)
        return -least, most

    def _gathered(self, mine: T) -> list[T]:
        found = [mine] * self.group.size()
        dist.all_gather_object(found, mine, group=self.group)
        return found
