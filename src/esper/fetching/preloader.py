"""Kernels that a run is likely to ask for, fetched and verified before it does.

A registry is asked which kernels fit the sites of a run, those that have worked first. While the
run is likely to grow, the best few of every site are fetched through the run's cache, best first,
up to a number of bytes. What came is verified; what is refused gives way to the next.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Final, Protocol

from esper.contracts.errors import KernelNotFoundError
from esper.contracts.layer_kind import positions_at
from esper.fetching.hitch import Hitch, is_answer
from esper.resilience.attempt import Done, attempt
from esper.resilience.clock import MonotonicClock
from esper.resilience.forked import Forked

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Unpack

    from esper.contracts.artifact import CompiledKernelArtifact
    from esper.contracts.choices import RegistryOperation
    from esper.contracts.ports import Clock, RegistryEntry, SearchCriteria, SearchOrder
    from esper.fetching.kernel_cache import KernelCache

DEFAULT_BYTES: Final = 32 << 20
"""Bytes of kernels that a run fetches before they are asked for, unless it is told otherwise."""
PER_SITE: Final = 4
"""Kernels that are fetched for one kind of site."""
LINGER_S: Final = 60.0
"""Seconds that a thread with nothing to do stays: who starts one waits until it runs, and on a
machine that is busy that took 85 ms of a step."""
PAGE: Final = 32
"""Entries that one question asks for; the ones behind the best few take the place of refused."""


class Searchable(Protocol):
    """What of a registry is asked here, beside what its cache fetches."""

    def search(
        self,
        *,
        limit: int | None = None,
        after: int | None = None,
        order: SearchOrder = "oldest",
        **criteria: Unpack[SearchCriteria],
    ) -> list[RegistryEntry]:
        """Return what is published and meets every criterion."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What fits a site, as ``SiteSpec`` describes it.

    Attributes:
        kind: Kind of the site.
        in_features: Input features or channels.
        out_features: Output features or channels.
        dtype: Of what it reads and gives.
        num_axes: Axes behind the channels; None where the kind says it.
        capacity_only: Whether only kernels are wanted that add capacity.
        max_parameters: Most parameters; None where there is no limit.
    """

    kind: str
    in_features: int
    out_features: int
    dtype: str
    num_axes: int | None
    capacity_only: bool
    max_parameters: int | None

    def criteria(self) -> SearchCriteria:
        """Return what a registry is asked."""
        asked: SearchCriteria = {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": self.dtype,
            "deprecated": False,
        }
        positions = positions_at(self.kind)
        if len(positions) == 1:
            asked["position"] = positions[0]
        if self.num_axes is not None:
            asked["num_axes"] = self.num_axes
        if self.capacity_only:
            asked["adds_capacity"] = True
        if self.max_parameters is not None:
            asked["max_parameter_count"] = self.max_parameters
        return asked


@dataclass(frozen=True, slots=True, kw_only=True)
class AtHand:
    """A kernel that was fetched and verified.

    Attributes:
        artifact: The kernel.
        entry: What the registry says of it; None of one that was asked for by its digest.
    """

    artifact: CompiledKernelArtifact
    entry: RegistryEntry | None


class Preloader(Forked):
    """Asks and fetches on a thread of its own, which lives while there is something to do.

    No method waits for a registry but :meth:`load` and :meth:`settle`. What does not answer is
    asked again when :meth:`ask` is called again, and not before.

    Args:
        registry: What is asked which kernels fit.
        cache: Fetches and verifies them, and keeps them.
        budget_bytes: Bytes that are fetched in all, at least 0; at 0 nothing is asked.
        clock: Measures how long :meth:`load` may take.

    Attributes:
        num_bytes: Bytes that were fetched so far.
    """

    def __init__(
        self,
        registry: Searchable,
        cache: KernelCache,
        *,
        budget_bytes: int = DEFAULT_BYTES,
        clock: Clock | None = None,
    ) -> None:
        self.num_bytes = 0
        self._registry = registry
        self._cache = cache
        self._budget_bytes = budget_bytes
        self._clock = clock or MonotonicClock()
        self._is_closed = self._is_likely = self._is_refused = self._is_unanswered = False
        self._questions: deque[Question] = deque()
        self._answers: dict[Question, list[RegistryEntry]] = {}
        self._by_digest: deque[str] = deque()
        self._artifacts: dict[str, CompiledKernelArtifact] = {}
        self._refused: set[str] = set()
        self._silent: set[str] = set()
        self._is_down = False
        self._hitches: deque[Hitch] = deque()
        super().__init__()

    def _begin(self) -> None:
        """Begin without a thread; the next question starts one."""
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None
        self._is_busy = False

    def ask(self, questions: Iterable[Question]) -> None:
        """Ask what fits; an earlier answer stays until there is another. Never waits."""
        wanted = list(dict.fromkeys(questions))
        with self._changed:
            self._silent.clear()
            self._is_unanswered = False
            self._answers = {q: self._answers[q] for q in wanted if q in self._answers}
            self._questions = deque(wanted)
            self._start()

    def expect(self, *, is_likely: bool) -> None:
        """Say whether kernels are likely to be wanted; what is not fetched yet goes by it."""
        with self._changed:
            self._is_likely = is_likely
            self._start()

    @property
    def has_answers(self) -> bool:
        """Whether nothing that was asked is without an answer."""
        with self._changed:
            return not (self._questions or self._silent or self._is_unanswered)

    def at_hand(self) -> list[AtHand]:
        """Return what was fetched, best first: of every site the first, then the second."""
        with self._changed:
            entries = {entry.digest: entry for entry in self._wanted()}
            named = {digest: None for digest in self._artifacts if digest not in entries}
            found = {**entries, **named}
            return [
                AtHand(artifact=self._artifacts[digest], entry=entry)
                for digest, entry in found.items()
                if digest in self._artifacts
            ]

    def load(self, digests: Iterable[str], *, timeout_s: float) -> list[str]:
        """Fetch kernels by their digests, whatever is likely, and wait for them.

        Args:
            digests: Of the kernels.
            timeout_s: How long is waited, in seconds; what comes later is at hand then.

        Returns:
            Digests of those that are not at hand.
        """
        wanted = list(digests)
        until_s = self._clock.now() + timeout_s
        with self._changed:
            self._by_digest.extend(d for d in wanted if d not in self._artifacts)
            self._start()
            self._changed.wait_for(
                lambda: self._is_settled() or all(d in self._artifacts for d in wanted),
                max(0.0, until_s - self._clock.now()),
            )
            return [d for d in wanted if d not in self._artifacts]

    def settle(self, timeout_s: float) -> bool:
        """Wait until there is nothing to do for now; say whether it came to that in time."""
        with self._changed:
            return self._changed.wait_for(self._is_settled, timeout_s)

    def hitches(self) -> list[Hitch]:
        """Return what went wrong since the last call; of an outage its beginning."""
        found = []
        while self._hitches:
            found.append(self._hitches.popleft())
        return found

    def close(self) -> None:
        """Ask nothing more; a request under way is left to its own end."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _start(self) -> None:
        if not self._has_work():
            return
        if self._worker is None:
            worker = threading.Thread(target=self._work, name="esper preloader", daemon=True)
            with suppress(RuntimeError):  # too many threads: the next question tries again
                worker.start()
                self._worker = worker
        self._changed.notify_all()

    def _is_settled(self) -> bool:
        return self._worker is None or not (self._is_busy or self._has_work())

    def _has_work(self) -> bool:
        return self._next() is not None

    def _next(self) -> Question | str | None:
        """Return what is done next: a question, a kernel, or nothing."""
        if self._is_closed or self._is_refused or self._budget_bytes == 0:
            return None
        if self._by_digest:
            return self._by_digest[0]
        if self._questions:
            return self._questions[0]
        if not self._is_likely:
            return None
        for entry in self._wanted():
            is_new = entry.digest not in self._artifacts and entry.digest not in self._silent
            if is_new and self.num_bytes + entry.size_bytes <= self._budget_bytes:
                return entry.digest
        return None

    def _wanted(self) -> list[RegistryEntry]:
        """Return the best few of every answer, the first of each before the second of any."""
        best = (
            islice((e for e in answer if e.digest not in self._refused), PER_SITE)
            for answer in self._answers.values()
        )
        in_turn = (entry for row in zip_longest(*best) for entry in row if entry is not None)
        return list({entry.digest: entry for entry in in_turn}.values())

    def _work(self) -> None:
        while self._has_more_soon():
            self._catch_up()

    def _has_more_soon(self) -> bool:
        """Wait for something to do, for a while; say whether there is."""
        with self._changed:
            self._is_busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_closed or self._has_work(), LINGER_S)
            self._is_busy = self._has_work()
            if not self._is_busy:
                self._worker = None
            return self._is_busy

    def _catch_up(self) -> None:
        """Do what there is to do."""
        while True:
            with self._changed:
                task = self._next()
            if task is None:
                return
            if isinstance(task, Question):
                self._answer(task)
            else:
                self._fetch(task)

    def _answer(self, question: Question) -> None:
        found = attempt(
            lambda: self._registry.search(limit=PAGE, order="proven", **question.criteria())
        )
        with self._changed:
            if question in self._questions:  # nobody has asked anew meanwhile
                self._questions.remove(question)
            if isinstance(found, Done):
                self._is_down = False
                self._answers[question] = found.value
                return
            self._is_unanswered = True
            self._is_refused = is_answer(found.error)
            self._tell("search", "", found.error)

    def _fetch(self, digest: str) -> None:
        found = attempt(lambda: self._cache.load_kernel_sync(digest))
        with self._changed:
            if digest in self._by_digest:
                self._by_digest.remove(digest)
            if isinstance(found, Done) and found.value is not None:
                self._is_down = False
                self._artifacts[digest] = found.value
                self.num_bytes += len(found.value.kernel_binary)
                self._changed.notify_all()
                return
            if isinstance(found, Done):
                error: Exception = KernelNotFoundError(f"the registry has no kernel {digest}")
            else:
                error = found.error
            (self._refused if is_answer(error) else self._silent).add(digest)
            self._tell("fetch", digest, error)

    def _tell(self, operation: RegistryOperation, digest: str, error: Exception) -> None:
        is_final = is_answer(error)
        if is_final or not self._is_down:
            self._hitches.append(
                Hitch(operation=operation, digest=digest, error=error, is_final=is_final)
            )
        self._is_down = self._is_down or not is_final
