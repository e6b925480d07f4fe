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
        title: Its heading in the document.
        told: What it is and what its arms are, a paragraph.
        section: How its results are told; a key of ``sections.SECTIONS``.
        figure: The figure of the table of arms.
        unit: What that figure is.
        digits: Digits behind its point.
        counted: What the table of arms counts: runs, or blocks of them.
        tried: What was tried before the arms were settled, and how many variants these are.
        missing: Why it cannot run here; None where it can.
    """

    name: str
    arms: tuple[str, ...]
    random_seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    quick: Mapping[str, Any]
    runs: Runs
    title: str
    told: str
    section: str
    figure: str
    unit: str
    digits: int = 3
    counted: str = "random seeds"
    tried: str = ""
    missing: Callable[[], str | None] = lambda: None
