"""What ``make bench-growth`` is made of: tasks, each with arms that share what they can."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from store import Result

Runs = Callable[[int, Collection[str], Mapping[str, Any]], Iterator[Result]]
"""Of a random seed, the arms that are missing and the settings: each result once it is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        name: Its name, and its folder among the results.
        arms: Names of its arms.
        random_seeds: Those that are run where nobody asks for others.
        settings: What its runs depend on; results of other settings do not count.
        quick: Settings of a run that shows that it works, and nothing else.
        runs: Runs arms of one random seed.
        missing: Why it cannot run here; None where it can.
    """

    name: str
    arms: tuple[str, ...]
    random_seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    quick: Mapping[str, Any]
    runs: Runs
    missing: Callable[[], str | None] = lambda: None
