"""Timing side by side: what is compared takes turns, round by round, on one thread."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

US, MS = 1e6, 1e3

Prepare = Callable[[], Callable[[], object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured figure.

    Attributes:
        key: Which line of the table it belongs to.
        value: The median over the rounds, or what was counted, in the line's unit; None where it
            could not be measured.
        spread: Lower and upper quartile over the rounds; None for what is counted.
        best: The same figure of each contender's fastest round; None for what is counted.
        beside: What the peer that the line names needs, measured in the same run.
        note: Why it was not measured, or what else is worth saying.
    """

    key: str
    value: float | None
    spread: tuple[float, float] | None = None
    best: float | None = None
    beside: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a call of one contender, one figure a round."""

    rounds_s: tuple[float, ...]

    @property
    def best_s(self) -> float:
        """The fastest round."""
        return min(self.rounds_s)

    @property
    def median_s(self) -> float:
        """The round in the middle."""
        return median(self.rounds_s)

    def ratio(self, other: "Timing", key: str, *, beside: str = "") -> Figure:
        """Return how many times as long as ``other`` it takes."""
        each = [a / b for a, b in zip(self.rounds_s, other.rounds_s, strict=True)]
        return figure_of(each, key, best=self.best_s / other.best_s, beside=beside)

    def added(self, other: "Timing", key: str, unit: float, *, beside: str = "") -> Figure:
        """Return how much longer than ``other`` it takes, in units of ``1 / unit`` seconds."""
        each = [(a - b) * unit for a, b in zip(self.rounds_s, other.rounds_s, strict=True)]
        return figure_of(each, key, best=(self.best_s - other.best_s) * unit, beside=beside)

    def took(self, key: str, unit: float, *, beside: str = "") -> Figure:
        """Return how long it takes, in units of ``1 / unit`` seconds."""
        each = [s * unit for s in self.rounds_s]
        return figure_of(each, key, best=self.best_s * unit, beside=beside)


def figure_of(rounds: Sequence[float], key: str, *, best: float, beside: str = "") -> Figure:
    """Return the figure whose rounds these are, in its line's unit."""
    low, middle, high = quantiles(rounds, n=4)
    return Figure(key=key, value=middle, spread=(low, high), best=best, beside=beside)


def take_turns(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, number: int
) -> dict[str, Timing]:
    """Time calls in turn; the order is turned round every second round.

    Args:
        calls: What to time, by name.
        rounds: Number of rounds, at least 2.
        number: Calls of each in a round.
    """
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for name in names:
            took[name].append(_seconds(calls[name], number))
    return {name: Timing(tuple(seconds)) for name, seconds in took.items()}


def _seconds(call: Callable[[], object], number: int) -> float:
    repeats = range(number)
    gc.collect(0)
    gc.disable()
    try:
        start_s = time.perf_counter()
        for _ in repeats:
            call()
        return (time.perf_counter() - start_s) / number
    finally:
        gc.enable()


def one_by_one(prepare: Prepare, *, rounds: int) -> Timing:
    """Time a call that needs a fresh subject every time; ``prepare`` makes it, untimed."""
    return turns_one_by_one({"": prepare}, rounds=rounds)[""]


def turns_one_by_one(prepares: Mapping[str, Prepare], *, rounds: int) -> dict[str, Timing]:
    """Time calls in turn that need a fresh subject every time, which is made untimed."""
    took: dict[str, list[float]] = {name: [] for name in prepares}
    for _ in range(max(rounds, 2)):
        for name, prepare in prepares.items():
            took[name].append(_seconds(prepare(), 1))
    return {name: Timing(tuple(seconds)) for name, seconds in took.items()}
