"""What a profile sums: the time of each seed's work, by what it is called."""

from __future__ import annotations

import threading
from typing import Final, Literal, get_args

Work = Literal["forward", "backward", "probe", "trial", "verdict"]
"""What a seed's time goes to."""
WORKS: Final[tuple[Work, ...]] = get_args(Work)

RangeKey = tuple[str, int, Work]
"""A layer's name, a seed's index, and what was done."""


class RangeSums:
    """How often each range was entered while something was profiled, and how long it took."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[RangeKey, tuple[int, float]] = {}

    def add(self, key: RangeKey, seconds: float, *, calls: int) -> None:
        """Add time to a range, and calls; backwards come from threads of torch's own."""
        with self._lock:
            before_calls, before_s = self._sums.get(key, (0, 0.0))
            self._sums[key] = before_calls + calls, before_s + seconds

    def sums(self) -> dict[RangeKey, tuple[int, float]]:
        """Return calls and seconds of each range."""
        with self._lock:
            return dict(self._sums)

    def __getstate__(self) -> dict[str, object]:
        return {"_sums": self.sums()}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
