"""The circuit breaker: stop asking an endpoint that does not answer, and find out when it does.

One breaker stands for one endpoint. What a call was worth is decided by the class of its error:

- *success*: it returned, or raised one of ``answers`` (the endpoint answered "no");
- *failure*: any other ``Exception``;
- *nothing*: one of ``ignored``, a cancellation, or a ``BaseException`` that is no ``Exception``.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
import random
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, ParamSpec, Self, TypeVar

from esper.contracts.errors import CircuitOpenError
from esper.resilience.attempt import Failed, attempt
from esper.resilience.clock import MonotonicClock
from esper.resilience.retry import JITTER

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from types import TracebackType

    from esper.contracts.ports import Clock

P = ParamSpec("P")
R = TypeVar("R")

_logger = logging.getLogger(__name__)


class BreakerState(StrEnum):
    """What a breaker does with the next call."""

    CLOSED = "closed"
    """Lets it through."""
    OPEN = "open"
    """Rejects it, until the wait is over."""
    HALF_OPEN = "half_open"
    """Lets it through as one of a fixed number of probes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerTransition:
    """One change of state.

    Attributes:
        name: The breaker's name.
        before: State that was left.
        after: State that was entered.
        generation: Number of the state entered; it grows by one with every transition, so that
            transitions told by different threads can be put in order.
        wait_s: Where ``after`` is OPEN, for how long, in seconds; else 0.
    """

    name: str
    before: BreakerState
    after: BreakerState
    generation: int
    wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerStats:
    """Counts since the breaker was made.

    ``permitted`` is the sum of ``succeeded``, ``failed``, ``released``, ``late`` and the permits
    that are out.

    Attributes:
        state: State now.
        generation: Number of transitions so far.
        permitted: Calls that were let through.
        rejected: Calls that were not.
        succeeded: Results that counted as a success.
        failed: Results that counted as a failure.
        released: Permits given back without a result.
        late: Results that counted nothing, because the state they began in was over.
        openings: How often it opened.
    """

    state: BreakerState
    generation: int
    permitted: int
    rejected: int
    succeeded: int
    failed: int
    released: int
    late: int
    openings: int


Listener = Callable[[BreakerTransition], None]
"""Is told of a transition."""

_ALONE: Final[dict[str, object]] = {"_on_transition": None, "_listeners": ()}
"""What a copy has in the place of the original's listeners."""


class CircuitBreaker:
    """Counts the outcomes of calls to one endpoint, and rejects calls while it is failing.

    Safe for threads and for any number of event loops. A copy, deep or pickled, is a breaker of
    its own in the same state with the same time left; permits that are out, and the listener,
    stay with the original. A forked child keeps the state and forgets the permits that are out.

    Args:
        name: The endpoint, for messages.
        window_size: Number of latest outcomes that are looked at, at least 1.
        min_calls: So many outcomes must be in the window before it can open, 1 to window_size.
        failure_rate: It opens when failures / outcomes reaches this, in (0, 1].
        base_wait_s: First wait in seconds, above 0; each further opening in a row doubles it.
        max_wait_s: Longest wait in seconds, at least ``base_wait_s``.
        jitter: Share of a wait that is random, in [0, 1]: a wait w becomes
            ``uniform((1 - jitter) w, w)``.
        num_probes: Number of probes that half-open admits, and that must succeed to close it; at
            least 1.
        half_open_limit_s: Seconds after which half-open opens again, above 0.
        answers: Errors by which the endpoint answers; they count as successes.
        ignored: Errors that say nothing about the endpoint; they count nothing.
        clock: Measures waits.
        rng: Draws the jitter.
        on_transition: Told of every transition, outside the lock; what it raises is logged.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        name: str,
        *,
        window_size: int = 20,
        min_calls: int = 5,
        failure_rate: float = 0.5,
        base_wait_s: float = 1.0,
        max_wait_s: float = 60.0,
        jitter: float = 0.1,
        num_probes: int = 1,
        half_open_limit_s: float = 30.0,
        answers: tuple[type[Exception], ...] = (),
        ignored: tuple[type[Exception], ...] = (),
        clock: Clock | None = None,
        rng: random.Random | None = None,
        on_transition: Listener | None = None,
    ) -> None:
        _check("min_calls", min_calls, "in [1, window_size]", holds=1 <= min_calls <= window_size)
        _check("failure_rate", failure_rate, "in (0, 1]", holds=0 < failure_rate <= 1)
        _check(
            "base_wait_s", base_wait_s, "in (0, max_wait_s]", holds=0 < base_wait_s <= max_wait_s
        )
        _check("jitter", jitter, "in [0, 1]", holds=0 <= jitter <= 1)
        _check("num_probes", num_probes, "at least 1", holds=num_probes >= 1)
        _check("half_open_limit_s", half_open_limit_s, "above 0", holds=half_open_limit_s > 0)
        self.name = name
        self._window_size = window_size
        self._min_calls = min_calls
        self._failure_rate = failure_rate
        self._base_wait_s = base_wait_s
        self._max_wait_s = max_wait_s
        self._jitter = jitter
        self._num_probes = num_probes
        self._half_open_limit_s = half_open_limit_s
        self._answers = answers
        self._ignored = (*ignored, concurrent.futures.CancelledError)
        self._clock = clock or MonotonicClock()
        self._rng = rng or JITTER
        self._on_transition = on_transition
        self._listeners: tuple[weakref.WeakMethod[Listener], ...] = ()
        self._next_wait_s = base_wait_s
        self._begin_closed()
        _register(self)

    def _begin_closed(self) -> None:
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._generation = 0
        self._outcomes: deque[bool] = deque()
        self._num_failures = 0
        self._until_s = 0.0
        self._probes_out = 0
        self._probes_passed = 0
        self._moves: list[BreakerTransition] = []
        self._counts = dict.fromkeys(_COUNTS, 0)

    @property
    def state(self) -> BreakerState:
        """What it is now; OPEN lasts until a call asks after the wait, which makes HALF_OPEN."""
        return self.stats().state

    def call(self, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call ``fn`` if that is permitted, and count what came of it.

        Raises:
            CircuitOpenError: It was not permitted; ``fn`` was not called.
        """
        with self.permit():
            return fn(*args, **kwargs)

    async def call_async(
        self, fn: Callable[P, Awaitable[R]], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Await ``fn`` if that is permitted, and count what came of it; as :meth:`call`."""
        with self.permit():
            return await fn(*args, **kwargs)

    def permit(self) -> Permit:
        """Return a permit for one call: a context manager, or to be settled by hand.

        Raises:
            CircuitOpenError: The endpoint is failing, or is being probed by others.
        """
        now = self._clock.now()
        with self._lock:
            self._end_half_open_if_over(now)
            if self._state is BreakerState.OPEN and now >= self._until_s:
                self._go(BreakerState.HALF_OPEN, until_s=now + self._half_open_limit_s)
            is_admitted = self._admit()
            permit = Permit(self, self._generation)
            wait_s = self._until_s - now if self._state is BreakerState.OPEN else 0.0
            moves = self._take_moves()
        with ExitStack() as undo:
            if is_admitted:
                undo.callback(permit.release)
            self._tell(moves)
            undo.pop_all()
        if not is_admitted:
            raise CircuitOpenError(self.name, retry_after_s=wait_s)
        return permit

    def listen(self, listener: Listener) -> None:
        """Tell a method of every transition as well, for as long as its object lives.

        Args:
            listener: A bound method, held weakly; else as ``on_transition``.
        """
        with self._lock:
            alive = (each for each in self._listeners if each() is not None)
            self._listeners = (*alive, weakref.WeakMethod(listener))

    def stats(self) -> BreakerStats:
        """Return the state and the counts, all of one instant."""
        now = self._clock.now()
        with self._lock:
            self._end_half_open_if_over(now)
            stats = BreakerStats(state=self._state, generation=self._generation, **self._counts)
            moves = self._take_moves()
        self._tell(moves)
        return stats

    def __getstate__(self) -> dict[str, object]:
        now = self._clock.now()
        with self._lock:
            state = self.__dict__ | {
                "_outcomes": self._outcomes.copy(),
                "_counts": {**self._counts},
            }
            left_s = self._until_s - now
        del state["_lock"]
        return state | {"_until_s": left_s, "_probes_out": 0, "_moves": [], **_ALONE}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._until_s += self._clock.now()
        self._lock = threading.Lock()
        _register(self)

    # ---- under the lock

    def _admit(self) -> bool:
        is_half_open = self._state is BreakerState.HALF_OPEN
        has_room = self._probes_out + self._probes_passed < self._num_probes
        is_admitted = self._state is BreakerState.CLOSED or (is_half_open and has_room)
        self._counts["permitted" if is_admitted else "rejected"] += 1
        self._probes_out += is_admitted and is_half_open
        return is_admitted

    def _end_half_open_if_over(self, now: float) -> None:
        if self._state is BreakerState.HALF_OPEN and now >= self._until_s:
            self._open(since_s=self._until_s)

    def _open(self, *, since_s: float) -> None:
        wait_s = self._next_wait_s * self._rng.uniform(1.0 - self._jitter, 1.0)
        self._next_wait_s = min(self._max_wait_s, self._next_wait_s * 2.0)
        self._counts["openings"] += 1
        self._go(BreakerState.OPEN, until_s=since_s + wait_s, wait_s=wait_s)

    def _go(self, state: BreakerState, *, until_s: float = 0.0, wait_s: float = 0.0) -> None:
        """Enter a state: nothing counted in the one before it counts in this one."""
        before, self._state = self._state, state
        self._generation += 1
        self._until_s = until_s
        self._outcomes.clear()
        self._num_failures = self._probes_out = self._probes_passed = 0
        self._moves.append(
            BreakerTransition(
                name=self.name,
                before=before,
                after=state,
                generation=self._generation,
                wait_s=wait_s,
            )
        )

    def _count_probe(self, *, has_failed: bool, now: float) -> None:
        if has_failed:
            self._open(since_s=now)
            return
        self._probes_out -= 1
        self._probes_passed += 1
        if self._probes_passed == self._num_probes:
            self._next_wait_s = self._base_wait_s
            self._go(BreakerState.CLOSED)

    def _count_call(self, *, has_failed: bool, now: float) -> None:
        if len(self._outcomes) == self._window_size:
            self._num_failures -= self._outcomes.popleft()
        self._outcomes.append(has_failed)
        self._num_failures += has_failed
        num_calls = len(self._outcomes)
        if num_calls >= self._min_calls and self._num_failures / num_calls >= self._failure_rate:
            self._open(since_s=now)

    def _take_moves(self) -> list[BreakerTransition]:
        moves, self._moves = self._moves, []
        return moves

    # ---- outside the lock

    def _settle(self, permit: Permit, *, has_failed: bool | None) -> None:
        """Count the result of a permit, or None for none; the first time only."""
        now = self._clock.now()
        with self._lock:
            if permit.is_settled:
                return
            permit.is_settled = True
            self._end_half_open_if_over(now)
            if permit.generation != self._generation:
                self._counts["late"] += 1
            elif has_failed is None:
                self._counts["released"] += 1
                self._probes_out -= self._state is BreakerState.HALF_OPEN
            else:
                self._counts["failed" if has_failed else "succeeded"] += 1
                is_probe = self._state is BreakerState.HALF_OPEN
                count = self._count_probe if is_probe else self._count_call
                count(has_failed=has_failed, now=now)
            moves = self._take_moves()
        self._tell(moves)

    def _has_failed(self, error: BaseException) -> bool | None:
        """Return whether an error is a failure of the endpoint; None where it says nothing."""
        if not isinstance(error, Exception) or isinstance(error, self._ignored):
            return None
        return not isinstance(error, self._answers)

    def _tell(self, moves: list[BreakerTransition]) -> None:
        if not moves:
            return
        found = (self._on_transition, *(each() for each in self._listeners))
        listeners = [listener for listener in found if listener is not None]
        for move in moves:
            for listener in listeners:
                told = attempt(functools.partial(listener, move))
                if isinstance(told, Failed):
                    text = "breaker %r: its listener failed"
                    _logger.warning(text, self.name, exc_info=told.error)

    def _start_again_in_child(self) -> None:
        """Forget, after a fork, the lock and the permits of threads that are not here."""
        self._lock = threading.Lock()
        if self._probes_out:
            self._generation += 1
            self._probes_out = 0


class Permit:
    """Leave for one call; what came of it is counted once, in the state that it began in.

    As a context manager it is settled by how the block ends. By hand, exactly one of the three
    methods takes effect, the first that is called, from any thread.
    """

    __slots__ = ("_breaker", "generation", "is_settled")

    def __init__(self, breaker: CircuitBreaker, generation: int) -> None:
        self._breaker = breaker
        self.generation = generation
        self.is_settled = False

    def succeed(self) -> None:
        """Count a success."""
        self._breaker._settle(self, has_failed=False)  # noqa: SLF001 - the other half of it

    def fail(self) -> None:
        """Count a failure."""
        self._breaker._settle(self, has_failed=True)  # noqa: SLF001 - the other half of it

    def release(self) -> None:
        """Give the permit back and count nothing."""
        self._breaker._settle(self, has_failed=None)  # noqa: SLF001 - the other half of it

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        breaker = self._breaker
        has_failed = False if error is None else breaker._has_failed(error)  # noqa: SLF001 - as above
        breaker._settle(self, has_failed=has_failed)  # noqa: SLF001 - the other half of it


def _check(name: str, value: float, expected: str, *, holds: bool) -> None:
    if not holds:
        msg = f"{name} must be {expected}, found {value}"
        raise ValueError(msg)


_COUNTS: Final = ("permitted", "rejected", "succeeded", "failed", "released", "late", "openings")

_BREAKERS: Final[weakref.WeakSet[CircuitBreaker]] = weakref.WeakSet()
_BREAKERS_LOCK: Final = threading.Lock()
_HELD: Final[list[CircuitBreaker]] = []
"""The breakers whose locks are held while the process forks."""


def _register(breaker: CircuitBreaker) -> None:
    with _BREAKERS_LOCK:
        _BREAKERS.add(breaker)


def _before_fork() -> None:
    """Wait until no breaker is half changed, so that no child begins with one that is."""
    _BREAKERS_LOCK.acquire()
    _HELD.extend(_BREAKERS)
    for breaker in _HELD:
        breaker._lock.acquire()  # noqa: SLF001 - its own module


def _after_fork_in_parent() -> None:
    while _HELD:
        _HELD.pop()._lock.release()  # noqa: SLF001 - its own module
    _BREAKERS_LOCK.release()


def _after_fork_in_child() -> None:
    while _HELD:
        _HELD.pop()._start_again_in_child()  # noqa: SLF001 - its own module
    _BREAKERS_LOCK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
