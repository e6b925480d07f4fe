"""Health from what was measured: a score, and whether somebody has to step in."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping

CRITICAL_SCORE: Final = 0.3
"""Below it somebody has to step in."""

RECOVERED_SCORE: Final = 0.5
"""From it on nobody has to any more."""

_RELIEF: Final = 0.8
"""A limit that was passed counts as passed until what it limits is below this share of it."""

_MIN_CALLS: Final = 10
_MIN_UPDATES: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthLimits:
    """What is still healthy.

    Attributes:
        error_rate: Failed share of the calls, in (0, 1).
        latency_ms: Median latency in milliseconds, above 0.
        memory_percent: Median use of memory in percent, in (0, 100).
        seed_memory_mb: MiB that one seed's kernel may take, above 0; None: as many as it likes.
    """

    error_rate: float = 0.1
    latency_ms: float = 10.0
    memory_percent: float = 90.0
    seed_memory_mb: float | None = None

    def __post_init__(self) -> None:
        is_valid = 0 < self.error_rate < 1 and self.latency_ms > 0 and 0 < self.memory_percent < 100
        if not is_valid or (self.seed_memory_mb is not None and not self.seed_memory_mb > 0):
            msg = f"limits are in (0, 1), above 0, in (0, 100) and above 0, found {self}"
            raise ValueError(msg)


class HealthStats(TypedDict):
    """What :meth:`HealthMonitor.get_stats` returns.

    Attributes:
        health_score: In [0, 1].
        error_rate: In [0, 1]; None where it was not measured, like the next two.
        latency_ms: Median latency in milliseconds.
        memory_percent: Median use of memory, in [0, 100].
        updates: Updates in the window.
        calls: Calls in the window.
        should_intervene: Whether somebody has to step in.
        reason: Why; "Healthy" where nobody has to.
    """

    health_score: float
    error_rate: float | None
    latency_ms: float | None
    memory_percent: float | None
    updates: int
    calls: int
    should_intervene: bool
    reason: str


class HealthMonitor:
    """Looks at the latest updates together: no single one decides.

    Somebody has to step in when the score falls below 0.3 or a limit is passed, and until the
    score is 0.5 or more and all is below 80 % of its limit. It takes 10 calls or 3 updates to say
    so. What was not measured is left out.

    Args:
        window_size: Number of updates that are looked at, at least 1.
        limits: What is still healthy.

    Raises:
        ValueError: ``window_size`` is less than 1.
    """

    def __init__(self, window_size: int = 100, *, limits: HealthLimits | None = None) -> None:
        if window_size < 1:
            msg = f"window_size is at least 1, found {window_size}"
            raise ValueError(msg)
        self.window_size = window_size
        self.limits = limits or HealthLimits()
        self._samples: deque[_Sample] = deque(maxlen=window_size)
        self._found = self._measured()
        self._reason: str | None = None

    def update_metrics(
        self,
        errors: int,
        total: int,
        latency_ms: float | None = None,
        memory_percent: float | None = None,
    ) -> None:
        """Take what was measured since the last update.

        Args:
            errors: Calls that failed, in [0, total].
            total: Calls, at least 0.
            latency_ms: Latency of a call in milliseconds, at least 0.
            memory_percent: Memory in use, in [0, 100].

        Raises:
            ValueError: A number is out of its range.
        """
        is_valid = 0 <= errors <= total and (latency_ms is None or latency_ms >= 0)
        if not (is_valid and (memory_percent is None or 0 <= memory_percent <= 100)):
            msg = (
                "expected 0 <= errors <= total, latency_ms >= 0, 0 <= memory_percent <= 100, found "
                f"{errors}, {total}, {latency_ms}, {memory_percent}"
            )
            raise ValueError(msg)
        self._samples.append(
            _Sample(
                errors=errors, total=total, latency_ms=latency_ms, memory_percent=memory_percent
            )
        )
        self._found = self._measured()
        self._reason = self._judge()

    def compute_health_score(self) -> float:
        """Return the health in [0, 1]; 1 where nothing was measured.

        The product of ``1 - error rate``, ``limit / latency`` where the median latency is above
        its limit, and the share of ``100 - limit`` that is free where the median use of memory is
        above its limit. So each of the three alone can make it 0 or nearly.
        """
        return self._score(self._found)

    def _score(self, found: _Measured) -> float:
        score = 1.0 - (found.error_rate or 0.0)
        if found.latency_ms is not None and found.latency_ms > self.limits.latency_ms:
            score *= self.limits.latency_ms / found.latency_ms
        if found.memory_percent is not None and found.memory_percent > self.limits.memory_percent:
            score *= (100.0 - found.memory_percent) / (100.0 - self.limits.memory_percent)
        return score

    def should_intervene(self) -> tuple[bool, str]:
        """Return whether somebody has to step in, and why; "Healthy" where nobody has to."""
        return self._reason is not None, self._reason or "Healthy"

    def get_stats(self) -> HealthStats:
        """Return the score, what it is made of, and whether somebody has to step in."""
        found = self._found
        must, reason = self.should_intervene()
        return {
            "health_score": self.compute_health_score(),
            "error_rate": found.error_rate,
            "latency_ms": found.latency_ms,
            "memory_percent": found.memory_percent,
            "updates": len(self._samples),
            "calls": found.calls,
            "should_intervene": must,
            "reason": reason,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured, as JSON can hold it; limits are the owner's, and not in it."""
        samples = [[s.errors, s.total, s.latency_ms, s.memory_percent] for s in self._samples]
        return {"samples": samples, "reason": self._reason}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state_dict` returned."""
        self._samples.clear()
        for errors, total, latency_ms, memory_percent in state["samples"]:
            self._samples.append(
                _Sample(
                    errors=errors, total=total, latency_ms=latency_ms, memory_percent=memory_percent
                )
            )
        self._found = self._measured()
        self._reason = state["reason"]

    def _measured(self) -> _Measured:
        samples = list(self._samples)
        calls = sum(sample.total for sample in samples)
        errors = sum(sample.errors for sample in samples)
        latencies = [each.latency_ms for each in samples if each.latency_ms is not None]
        memory = [each.memory_percent for each in samples if each.memory_percent is not None]
        return _Measured(
            calls=calls,
            error_rate=errors / calls if calls else None,
            latency_ms=statistics.median(latencies) if latencies else None,
            memory_percent=statistics.median(memory) if memory else None,
        )

    def _judge(self) -> str | None:
        """Return why somebody has to step in, or None; what has begun ends later than it began."""
        found = self._found
        if found.calls < _MIN_CALLS and len(self._samples) < _MIN_UPDATES:
            return None
        has_begun = self._reason is not None
        score = self._score(found)
        if score < (RECOVERED_SCORE if has_begun else CRITICAL_SCORE):
            how = "critical" if score < CRITICAL_SCORE else "still low"
            return f"health score {score:.2f} is {how}"
        share = _RELIEF if has_begun else 1.0
        measured = {
            "error rate": (found.error_rate, self.limits.error_rate),
            "latency in ms": (found.latency_ms, self.limits.latency_ms),
            "memory in percent": (found.memory_percent, self.limits.memory_percent),
        }
        for name, (value, limit) in measured.items():
            if value is not None and value > share * limit:
                reason = f"{name} is {value:.3g}, its limit {limit:.3g}"
                return reason if value > limit else f"{reason}: still near"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """One update.

    Attributes:
        errors: Calls that failed.
        total: Calls.
        latency_ms: Latency of a call in milliseconds; None if not measured.
        memory_percent: Memory in use, in [0, 100]; None if not measured.
    """

    errors: int
    total: int
    latency_ms: float | None
    memory_percent: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """The window as a whole; None where nothing was measured.

    Attributes:
        calls: Calls.
        error_rate: Failed share of them, in [0, 1].
        latency_ms: Median latency in milliseconds.
        memory_percent: Median use of memory, in [0, 100].
    """

    calls: int
    error_rate: float | None
    latency_ms: float | None
    memory_percent: float | None
