"""Clocks: the real one, and one that a test moves by hand."""

from __future__ import annotations

import datetime as dt
import time


def wall_time_s() -> float:
    """Return seconds since 1970, for what must be dated or must outlive the process.

    It may jump either way: nothing may be lost or broken by it, and no duration is taken from it.
    """
    return dt.datetime.now(tz=dt.UTC).timestamp()


class MonotonicClock:
    """Seconds of the machine's monotonic clock.

    Its ``now()`` returns seconds since an arbitrary start, and never falls.
    """

    now = staticmethod(time.perf_counter)


class ManualClock:
    """A clock that stands still until it is told to advance.

    Args:
        start_s: First reading, in seconds.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """Return the current reading in seconds."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move the clock forward.

        Args:
            seconds: How far; at least 0.

        Raises:
            ValueError: ``seconds`` is negative.
        """
        if seconds < 0:
            msg = f"a monotonic clock cannot go back: got {seconds} s, expected at least 0"
            raise ValueError(msg)
        self._now_s += seconds
