"""The order in which kernels were asked for at one seed: what was asked for later stands."""

from __future__ import annotations


class LoadOrder:
    """Loads of one seed, numbered as they are asked for.

    A load that is done may put its kernel in place only if nothing that was asked for later stands
    there, and nobody has given the seed up since. One that fails stands in nobody's way.

    Attributes:
        num_under_way: Loads that are not done.
        is_reserved: Whether a load found the seed dormant and keeps it in LOADING.
    """

    def __init__(self) -> None:
        self.num_under_way = 0
        self.is_reserved = False
        self._num_asked = 0
        self._settled = 0

    def begin(self) -> int:
        """Return the number of a load that is asked for now."""
        self._num_asked += 1
        self.num_under_way += 1
        return self._num_asked

    def is_wanted(self, number: int) -> bool:
        """Say whether a load's kernel may still be put in place."""
        return number > self._settled

    def settle(self, number: int) -> None:
        """Take note that what stands in the seed was asked for by this load."""
        self._settled = max(self._settled, number)

    def supersede(self) -> None:
        """Let no load that is under way put its kernel in place: something later stands there."""
        self._settled = self._num_asked

    def give_up(self) -> None:
        """Let no load that is under way have the seed: its owner gave it up."""
        self.supersede()
        self.is_reserved = False
