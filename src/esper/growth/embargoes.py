"""Embargoes: slots and blueprints that sit out some decisions to grow after a refusal."""

from __future__ import annotations


class Embargoes:
    """Counts decisions to grow, and says what sits the current one out.

    Decisions are counted also where nothing could germinate, so that embargoes end.

    Args:
        length: Decisions that a slot and a blueprint sit out, at least 0.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._last: dict[tuple[str, int | str], int] = {}
        self.num_decisions = 0

    def count_decision(self) -> None:
        """Count a decision to grow."""
        self.num_decisions += 1

    def lay(self, site: str, seed_idx: int, blueprint: str) -> None:
        """Let a slot and a blueprint of a site sit out the next decisions."""
        last = self.num_decisions + self._length
        self._last[site, seed_idx] = self._last[site, blueprint] = last

    def covers(self, site: str, what: int | str) -> bool:
        """Say whether a slot (a number) or a blueprint (its id) of a site sits out for now."""
        return self._last.get((site, what), -1) >= self.num_decisions
