"""How many samples fit into one pass, for a device and shapes, by its memory and by a clock.

A pass that Esper makes beside the training is tried on its whole batch, as if none of this were
there. Where memory is missing it is made again in parts of half as many samples, and again, until
one fits; where it takes longer than it may, the next ones are made in parts. What was found is
remembered. Before a pass is cut it is measured on a few samples whether its parts add up to the
whole, and after 1, 2, 4, 8 and so on cut passes again, since the next batch may be another. Where
they do not, the batch is left whole, and that is said.
"""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from esper.contracts.choices import FitReason, PassWork
from esper.contracts.errors import KernelRefusedError
from esper.contracts.ports import Clock
from esper.resilience.attempt import Failed, attempt
from esper.resilience.clock import MonotonicClock
from esper.seeds.batch_rows import NoRowsError, cuts, num_rows, rows_of, shapes_of
from esper.state.shortage import ShortagesTold, is_shortage

Cuts = list[tuple[int, int]]
"""Where parts begin and end."""

T = TypeVar("T")
_LOG = logging.getLogger(__name__)

IN_SHARDS: Final = "the ranks of a sharded model make each pass together"
"""Why nothing is cut there: ranks wait for each other in every pass."""
_FOR_PAIRS: Final = 4
CHECKED_SAMPLES: Final = 32
"""Samples on which it is measured whether parts add up, at most."""


class Fitted(NamedTuple):
    """A size that was chosen.

    Attributes:
        work: What the passes are made for.
        device: Where.
        shapes: Dtypes and shapes of the batch without the axis of samples.
        samples: Samples of the batch.
        size: Samples of a pass from now on, at most.
        why: What chose it.
    """

    work: PassWork
    device: str
    shapes: str
    samples: int
    size: int
    why: FitReason


class Planned(NamedTuple):
    """A size that another run chose.

    Attributes:
        update: Updates that it had done then.
        key: Of which passes, as :func:`key_of` names them.
        size: Samples of a pass from then on, at most.
    """

    update: int
    key: str
    size: int


def _nothing() -> None:
    """Take back nothing."""


@dataclass(slots=True, kw_only=True, eq=False)
class Rule:
    """Whether parts of a pass add up to the whole, as it was measured last.

    Attributes:
        against: Why they do not; empty where they do.
        is_sum: Whether a loss is the sum over its samples; else it is their mean.
        least: Samples that a part has at least.
        draws: Whether the pass draws random numbers, so that parts have to draw the same.
        num_uses: Passes that were cut.
        due: Of how many it is measured again.
    """

    against: str = ""
    is_sum: bool = False
    least: int = 1
    draws: bool = False
    num_uses: int = 0
    due: int = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass(Generic[T]):
    """A pass that may be made in parts.

    Attributes:
        work: What it is made for.
        batch: What is cut.
        device: Where it is made.
        parted: Makes it in parts, which the rule says how to add up.
        measure: Learns on so many of the first samples whether parts add up.
        rules: What was measured before, of the same work on the same model.
        undo: Takes back what a pass that lacked memory has left.
    """

    work: PassWork
    batch: object
    device: torch.device
    parted: Callable[[Cuts, Rule], T]
    measure: Callable[[int, Rule], None]
    rules: dict[str, Rule] = field(default_factory=dict)
    undo: Callable[[], None] = _nothing


@dataclass(frozen=True, slots=True)
class _Made(Generic[T]):
    value: T


class Fits:
    """Sizes that fit, by work, device and shapes.

    Args:
        clock: Measures how long a pass takes.
        pass_s: Seconds that one pass may take; None: as long as it likes.
        tell: Told of each size that was chosen.
        tell_left: Told what is left whole, and why, once for each.
        off: Why nothing is cut; empty where passes may be.

    Attributes:
        num_changes: How often a size was chosen, or taken over from elsewhere.
        is_news: Whether one was chosen since :attr:`is_news` was last set to False.
    """

    def __init__(
        self,
        clock: Clock | None = None,
        *,
        pass_s: float | None = None,
        tell: Callable[[Fitted], None] | None = None,
        tell_left: Callable[[str, str], None] | None = None,
        off: str = "",
    ) -> None:
        self._clock = clock or MonotonicClock()
        self._pass_s = pass_s
        self._tell = tell or _log_fitted
        self._tell_left = tell_left or _log_left
        self._off = off
        self._sizes: dict[str, int] = {}
        self._undo: Callable[[], None] = _nothing
        self._took: dict[str, float] = {}  # seconds of a sample in the last pass
        self._planned: list[Planned] = []
        self._updates: Callable[[], int] = lambda: 0
        self._left: set[tuple[str, str]] = set()
        self.num_changes = 0
        self.is_news = False

    def state_dict(self) -> dict[str, int]:
        """Return the sizes, as plain values."""
        return dict(self._sizes)

    def take(self, sizes: Mapping[str, int]) -> None:
        """Take over sizes that were chosen elsewhere; of two the smaller one stands."""
        for key, size in sizes.items():
            if size < self._sizes.get(key, size + 1):
                self._sizes[key] = size
                self.num_changes += 1

    def follow(self, planned: Iterable[Planned], updates: Callable[[], int]) -> None:
        """Take over sizes where another run chose them.

        Args:
            planned: What was chosen there, and at which update.
            updates: Returns the number of updates done here.
        """
        self._planned = sorted(planned, key=lambda each: -each.update)
        self._updates = updates

    @contextmanager
    def in_use(self, *, undo: Callable[[], None] | None = None) -> Iterator[None]:
        """Let passes that are handed no sizes of their own go by these.

        Args:
            undo: Takes back, beside what a pass takes back itself, what one has left that lacked
                memory.
        """
        token, before = _in_use.set(self), self._undo
        self._undo = undo or _nothing
        try:
            yield
        finally:
            self._undo = before
            _in_use.reset(token)

    def run(self, whole: Callable[[], T], make: Callable[[], Pass[T]]) -> T:
        """Make a pass: whole where that fits, or may not be cut, else in parts that fit.

        Inside of another pass it is made as it is: the one outside is what can be cut.

        Args:
            whole: Makes it on the whole batch.
            make: Describes it; called where that alone is not enough.

        Raises:
            Whatever the pass raises; a lack of memory only where fewer samples are of no use.
        """
        if _is_inside.get():
            return whole()
        if self._planned:
            self._take_planned()
        work = make() if self._sizes or self._pass_s is not None else None
        size = None if work is None else self._known(work)
        shortage: BaseException | None = None
        if size is None:
            made = self._tried(whole, make if work is None else lambda: work, 1)
            if isinstance(made, _Made):
                return made.value
            shortage = made
        return self._in_parts(work or make(), whole, size, shortage)

    def _take_planned(self) -> None:
        while self._planned and self._planned[-1].update <= self._updates():
            each = self._planned.pop()
            self.take({each.key: each.size})

    def _known(self, work: Pass[Any]) -> int | None:
        """Return the size that is known for a pass; None where it is made whole."""
        if self._off:
            return None
        try:
            key, num = _key(work), num_rows(work.batch)
        except NoRowsError:
            return None
        size = self._sizes.get(key)
        if size is None or size >= num or self._against(work, key, size):
            return None
        return size

    def _in_parts(
        self,
        work: Pass[T],
        whole: Callable[[], T],
        size: int | None,
        shortage: BaseException | None,
    ) -> T:
        """Make a pass in parts; whole, or not at all, where one raises what is no lack of memory.

        Args:
            work: The pass.
            whole: Makes it on the whole batch.
            size: The size that is known to fit; None where the whole batch did not.
            shortage: What the pass on the whole batch raised; None where a size is known.
        """
        key, num = _key(work), num_rows(work.batch)
        before = size
        now = num if size is None else size
        while True:
            if shortage is not None:
                if now == 1:
                    shortage.add_note("(one sample at a time was tried, which did not fit either)")
                    raise shortage
                now //= 2
                _raise_if_left(shortage, self._against(work, key, now))
            parts = cuts(num, now)
            rule = work.rules[key]
            call = functools.partial(work.parted, parts, rule)
            outcome = attempt(functools.partial(self._tried, call, lambda: work, len(parts)))
            if isinstance(outcome, Failed):
                self._take_back(work, rule, outcome)
                if shortage is not None:
                    _raise_if_left(shortage, rule.against)
                return _inside(whole)
            if isinstance(outcome.value, _Made):
                break
            shortage = outcome.value
        rule.num_uses += 1
        if now != before:
            self._choose(work, key, now, "memory")
        return outcome.value.value

    def _take_back(self, work: Pass[Any], rule: Rule, failed: Failed) -> None:
        """Take back what parts have left of which one failed; such a pass is cut no more.

        Raises:
            KernelRefusedError: That is what the pass was to find out.
        """
        if isinstance(failed.error, KernelRefusedError):
            raise failed.error
        rule.against = f"a part of it cannot be made ({failed})"
        self._leave(work, rule.against)
        failed.error.with_traceback(None)  # its frames hold what has to be free
        work.undo()
        self._undo()

    def _choose(self, work: Pass[Any], key: str, size: int, why: FitReason) -> None:
        self._sizes[key] = size
        self.num_changes += 1
        self.is_news = True
        device, shapes = str(work.device), shapes_of(work.batch)
        self._tell(Fitted(work.work, device, shapes, num_rows(work.batch), size, why))

    def _against(self, work: Pass[Any], key: str, size: int) -> str:
        """Say why a pass may not be cut; measured where it is time to."""
        rule = work.rules.get(key)
        if rule is None or (not rule.against and rule.num_uses >= rule.due):
            num_uses = 0 if rule is None else rule.num_uses
            rule = work.rules[key] = Rule(num_uses=num_uses, due=max(1, 2 * num_uses))
            num = min(num_rows(work.batch), max(size, 2), CHECKED_SAMPLES)
            failed = self._measure(work, num, rule)
            if failed is not None and num >= _FOR_PAIRS:
                rule.least = 2  # many a model, or loss, cannot do with a single sample
                failed = self._measure(work, num, rule)
            if failed is not None:
                rule.against = f"it cannot be made of a few samples alone ({failed})"
        against = rule.against
        if not against and min(b - a for a, b in cuts(num_rows(work.batch), size)) < rule.least:
            against = "it cannot be made of a single sample"
        if against:
            self._leave(work, against)
        return against

    def _measure(self, work: Pass[Any], num: int, rule: Rule) -> Failed | None:
        """Measure whether parts add up; return what was raised."""
        look = functools.partial(work.measure, num, rule)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the owner's code, on fewer samples than usual
            outcome = attempt(lambda: _inside(look))
        return outcome if isinstance(outcome, Failed) else None

    def _leave(self, work: Pass[Any], why: str) -> None:
        if (work.work, why) not in self._left:
            self._left.add((work.work, why))
            self._tell_left(work.work, why)

    def _tried(
        self, call: Callable[[], T], make: Callable[[], Pass[T]], num_parts: int
    ) -> _Made[T] | BaseException:
        """Return what a pass gives, or what it raised for lack of memory, without its frames."""
        start_s = self._now() if self._pass_s is not None else 0.0
        try:
            made = _Made(_inside(call))
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            work = make()
            if self._why_not(work):
                raise
            shortage = error
        else:
            if self._pass_s is not None:
                self._see_time(make(), num_parts, self._now() - start_s)
            return made
        work.undo()
        self._undo()
        shortage.__context__ = shortage.__cause__ = None
        return shortage.with_traceback(None)  # its frames hold what has to be free

    def _why_not(self, work: Pass[Any]) -> str:
        """Say why a pass can never be cut, whatever it computes; empty where it may be."""
        why = self._off
        if not why:
            try:
                num_rows(work.batch)
            except NoRowsError as error:
                why = str(error)
        if why:
            self._leave(work, why)
        return why

    def _now(self) -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # a launch is not a duration
        return self._clock.now()

    def _see_time(self, work: Pass[Any], num_parts: int, took_s: float) -> None:
        """Choose a smaller size where two passes in a row, the first may warm up, took too long."""
        if self._why_not(work):
            return
        key, num = _key(work), num_rows(work.batch)
        size, limit_s = -(-num // num_parts), self._pass_s
        assert limit_s is not None
        each_s = took_s / num
        before_s = self._took.pop(key, None)
        if before_s is None:
            self._took[key] = each_s
            return
        best_s = min(before_s, each_s)
        smaller = size
        while smaller > 1 and best_s * smaller > limit_s:
            smaller //= 2
        if smaller < size and not self._against(work, key, smaller):
            self._choose(work, key, smaller, "time")
        elif smaller == size:
            self._took[key] = each_s


_in_use: ContextVar[Fits | None] = ContextVar("fits_in_use", default=None)
_is_inside: ContextVar[bool] = ContextVar("is_inside_a_pass", default=False)


def _raise_if_left(shortage: BaseException, against: str) -> None:
    """Raise a lack of memory where something stands against cutting the batch."""
    if against:
        shortage.add_note(f"(the batch is not cut for Esper's passes: {against})")
        raise shortage


def _inside(call: Callable[[], T]) -> T:
    """Make a pass, or look at one: what is made in it is not cut, and a lack of memory is told."""
    token = _is_inside.set(True)
    try:
        with ShortagesTold():
            return call()
    finally:
        _is_inside.reset(token)


def uneven(num: int, rule: Rule) -> Cuts:
    """Return cuts of ``num`` samples, at least 2, by which means and sums are told apart.

    One sample stands alone, if it may: one that weighs otherwise than the others shows there.
    """
    first = min(rule.least, num - 1)
    middle = first + max(first, (num - first) // 3)
    edges = [0, first, middle, num] if middle + first <= num else [0, first, num]
    return list(pairwise(edges))


def of_parts(example: Tensor, figure: Callable[[Tensor], float]) -> float:
    """Return a figure of an example, or the sum over parts of it that fit into memory.

    Args:
        example: Some samples.
        figure: What some samples take.
    """
    return fits_in_use().run(
        lambda: figure(example),
        lambda: Pass(
            work="probe",
            batch=example,
            device=example.device,
            parted=lambda cuts, _: sum(figure(rows_of(example, *part)) for part in cuts),
            measure=lambda *_: None,
        ),
    )


def device_of(model: nn.Module) -> torch.device:
    """Return where a model is; the CPU where it has no parameters and no buffers."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    first = next(tensors, None)
    return torch.device("cpu") if first is None else first.device


def _key(work: Pass[Any]) -> str:
    return key_of(work.work, str(work.device), shapes_of(work.batch))


def key_of(work: str, device: str, shapes: str) -> str:
    """Return the name under which a size is remembered, from what an event says of it."""
    return f"{work}|{device}|{shapes}"


def _log_fitted(found: Fitted) -> None:
    _LOG.info("%s", told_size(found))


def told_size(found: Fitted) -> str:
    """Say what was chosen, for people."""
    reason = "did not fit into its memory" if found.why == "memory" else "took longer than it may"
    return (
        f"a pass of {found.samples} samples for {found.work} on {found.device} {reason}: "
        f"such passes are made of {found.size} at a time"
    )


def told_left(work: str, why: str) -> str:
    """Say what is left whole, for people."""
    return f"batches of Esper's passes for {work} are left whole, whatever memory there is: {why}"


def _log_left(work: str, why: str) -> None:
    _LOG.info("%s", told_left(work, why))


_ELSEWHERE: Final = Fits()
"""Sizes of passes that belong to no run: a probe of a graft by hand, an evaluation by hand."""


def fits_in_use() -> Fits:
    """Return the sizes to go by here."""
    return _in_use.get() or _ELSEWHERE
