"""A kernel source behind its circuit breaker: one breaker for one source, whoever asks it."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Final, Protocol

from esper.contracts.errors import (
    CircuitOpenError,
    KernelCorruptError,
    KernelNotFoundError,
    KernelRefusedError,
    KernelSourceRefused,
    KernelSourceSuspended,
)
from esper.contracts.events import BreakerMoved
from esper.fetching.incidents import announce
from esper.resilience.circuit_breaker import BreakerState, BreakerTransition, CircuitBreaker
from esper.resilience.retry import RetryBudget

if TYPE_CHECKING:
    from esper.contracts.ports import KernelSource

ANSWERS: Final = (
    KernelNotFoundError,
    KernelCorruptError,
    KernelRefusedError,
    KernelSourceRefused,
)
"""Errors by which a source answers: it was reached, and it is no use to ask it again."""

_logger = logging.getLogger(__name__)


class Guard(Protocol):
    """What a source that looks after itself has as its ``endpoint``.

    It asks its server behind that, and gives what it has at hand while the server fails.
    """

    breaker: CircuitBreaker
    retry_budget: RetryBudget


class SourceBehindBreaker:
    """A source that is not asked for a while after it has failed too often.

    Args:
        source: What is asked.
        breaker: Counts its failures; where not given it is the source's own, or made.

    Attributes:
        retry_budget: Bounds the retries of all who ask the source.
    """

    def __init__(self, source: KernelSource, breaker: CircuitBreaker | None = None) -> None:
        self.source = source
        own: Guard | None = None if breaker is not None else getattr(source, "endpoint", None)
        self._is_guarded = own is not None
        if own is not None:
            self.breaker, self.retry_budget = own.breaker, own.retry_budget
            self.breaker.listen(self._announce)
            return
        name = f"the kernel source {type(source).__name__}"
        self.retry_budget = RetryBudget()
        self.breaker = breaker or CircuitBreaker(name, answers=ANSWERS, on_transition=_log)
        self.breaker.listen(self._announce)

    def _announce(self, move: BreakerTransition) -> None:
        moved = BreakerMoved(
            update=0,
            time_s=0.0,
            name=move.name,
            before=move.before.value,
            after=move.after.value,
            wait_s=move.wait_s,
        )
        announce(self.source, moved)

    def fetch(self, digest: str) -> bytes:
        """Return the artifact whose sha256 is ``digest``; see ``KernelSource.fetch``.

        Raises:
            KernelSourceSuspended: The source has been failing and is not asked for now.
        """
        if self._is_guarded:
            return self.source.fetch(digest)
        try:
            permit = self.breaker.permit()
        except CircuitOpenError as error:
            msg = f"kernel {digest} is not in the cache, and {error}"
            raise KernelSourceSuspended(msg) from error
        with permit:
            return self.source.fetch(digest)


def behind_breaker(source: KernelSource) -> SourceBehindBreaker:
    """Return a source behind its breaker of this process; one object while anyone holds it."""
    with _KNOWN_LOCK:
        known = _KNOWN.get(id(source))
        if known is None:
            known = _KNOWN[id(source)] = SourceBehindBreaker(source)
        return known


def _log(move: BreakerTransition) -> None:
    if move.after is BreakerState.OPEN:
        _logger.warning("%s fails and is not asked for %.3g s", move.name, move.wait_s)
    else:
        _logger.info("%s: %s", move.name, move.after)


_KNOWN_LOCK: Final = threading.Lock()
_KNOWN: Final[weakref.WeakValueDictionary[int, SourceBehindBreaker]] = weakref.WeakValueDictionary()
"""By the identity of the source, which the value keeps alive."""
