"""Whether a figure has left its own history: told once, until it has come back."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_LATEST: Final = 5
_LEAST_USUAL: Final = 20
_MOST_USUAL: Final = 200
_SPREADS: Final = 6.0
_OF_NORMAL: Final = 1.4826
"""Standard deviation of a normal figure over its median absolute deviation."""

_CALLS: Final = 25
_LATEST_CHUNKS: Final = 2
_LEAST_USUAL_CHUNKS: Final = 8
_MOST_USUAL_CHUNKS: Final = 80
_ERRORS_OF_LUCK: Final = 4.0
_LEAST_RISE: Final = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """A figure has left its history.

    Attributes:
        value: What it is now, over the latest samples.
        usual: What it was before.
        limit: What it has passed.
    """

    value: float
    usual: float
    limit: float


class UsualTime:
    """A time that is taken now and then, and what it usually is.

    It has left its history where the median of the latest 5 samples is above twice the median of
    up to 200 before them, and above that median by 6 of their standard deviations (robust). It
    takes 20 of those. While it is out nothing is learned; it has come back once it is nearer to
    what it was than to the limit.
    """

    def __init__(self) -> None:
        self._usual: deque[float] = deque(maxlen=_MOST_USUAL)
        self._latest: deque[float] = deque(maxlen=_LATEST)
        self._is_out = False

    def state_dict(self) -> dict[str, Any]:
        """Return the history, as JSON can hold it."""
        return {"usual": [*self._usual], "latest": [*self._latest], "is_out": self._is_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a history that :meth:`state_dict` returned."""
        self._usual.extend(state["usual"])
        self._latest.extend(state["latest"])
        self._is_out = bool(state["is_out"])

    def take(self, value: float) -> Departure | None:
        """Take a sample, at least 0; return a departure where it is the news."""
        if len(self._latest) == _LATEST and not self._is_out:
            self._usual.append(self._latest[0])
        self._latest.append(value)
        if len(self._usual) < _LEAST_USUAL:
            return None
        now, usual = statistics.median(self._latest), statistics.median(self._usual)
        spread = statistics.median(abs(each - usual) for each in self._usual)
        limit = usual + max(usual, _SPREADS * _OF_NORMAL * spread)
        was_out, self._is_out = (
            self._is_out,
            now > (usual + limit) / 2 if self._is_out else (now > limit),
        )
        news = self._is_out and not was_out
        return Departure(value=now, usual=usual, limit=limit) if news else None


class UsualRate:
    """A share of calls that fail, and what it usually is.

    It has left its history where, of the latest 50 calls, more failed than up to 2,000 before them
    explain: by 4 standard errors, and by 2 % at least. It takes 200 of those. While it is out
    nothing is learned; it has come back once it is nearer to what it was than to the limit.
    """

    def __init__(self) -> None:
        self._usual: deque[int] = deque(maxlen=_MOST_USUAL_CHUNKS)
        self._latest: deque[int] = deque(maxlen=_LATEST_CHUNKS)
        self._calls = self._errors = 0
        self._is_out = False

    def state_dict(self) -> dict[str, Any]:
        """Return the history, as JSON can hold it."""
        return {
            "usual": [*self._usual],
            "latest": [*self._latest],
            "chunk": [self._calls, self._errors],
            "is_out": self._is_out,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a history that :meth:`state_dict` returned."""
        self._usual.extend(state["usual"])
        self._latest.extend(state["latest"])
        self._calls, self._errors = state["chunk"]
        self._is_out = bool(state["is_out"])

    def take(self, *, has_failed: bool) -> Departure | None:
        """Take the outcome of a call; return a departure where it is the news."""
        self._calls += 1
        self._errors += has_failed
        if self._calls < _CALLS:
            return None
        return self._end_chunk()

    def _end_chunk(self) -> Departure | None:
        if len(self._latest) == _LATEST_CHUNKS and not self._is_out:
            self._usual.append(self._latest[0])
        self._latest.append(self._errors)
        self._calls = self._errors = 0
        if len(self._usual) < _LEAST_USUAL_CHUNKS:
            return None
        latest_calls, usual_calls = _CALLS * len(self._latest), _CALLS * len(self._usual)
        now, usual = sum(self._latest) / latest_calls, sum(self._usual) / usual_calls
        expected = (sum(self._usual) + 1) / (usual_calls + 2)
        stderr = math.sqrt(expected * (1 - expected) / latest_calls)
        limit = usual + max(_LEAST_RISE, _ERRORS_OF_LUCK * stderr)
        was_out, self._is_out = (
            self._is_out,
            now > (usual + limit) / 2 if self._is_out else (now > limit),
        )
        news = self._is_out and not was_out
        return Departure(value=now, usual=usual, limit=limit) if news else None
