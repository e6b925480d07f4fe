"""Sentences and figures that the page and the terminal share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.contracts.report import OPPONENTS
from esper.contracts.report_text import flops_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from esper.contracts.intervals import Interval
    from esper.contracts.report import ControlRow, DemoReport, Wins

NOT_MEASURED: Final = "\u2013"

ARM_NAMES: Final = {
    "host": "host only",
    "grown": "grown",
    "random": "random choice",
    "scratch": "from scratch",
}
"""Short names of the demo's arms."""

CONTROL_NAMES: Final = {
    "noop": "no-op",
    "noise": "noise",
    "capacity_free": "capacity-free (the host layer's own shape)",
    "random_features": "frozen random features",
    "linear": "linear package, begun apart from its null",
}
"""Short names of the kinds of control packages."""

_OPPONENTS: Final = {
    "host": "the host trained on without growing",
    "random": "a random choice of kernels under the same budget and trial",
    "scratch": "a network of the grown shape trained from scratch",
}


def not_beaten(report: DemoReport) -> str:
    """Return one sentence that says what growth beat and what not, with intervals, at what work."""
    if not report.random_seeds:
        return "Growth did not beat anything here, since no random seed was completed."
    differences = {name: difference_of(report, name) for name in OPPONENTS}
    words = {
        name: f"{_OPPONENTS[name]} ({_difference_text(found, report.wins[name])})"
        for name, found in differences.items()
    }
    beaten = [words[name] for name in OPPONENTS if differences[name].is_above_zero]
    unbeaten = [words[name] for name in OPPONENTS if not differences[name].is_above_zero]
    work = _work_text(report)
    if not unbeaten:
        return (
            "There is nothing in this demo that growth did not beat, and it was compared with no "
            f"more than {_listing(beaten, 'and')}{work}."
        )
    if not beaten:
        return f"Growth did not beat {_listing(unbeaten, 'or')}{work}."
    return f"Growth beat {_listing(beaten, 'and')}, but not {_listing(unbeaten, 'or')}{work}."


def difference_of(report: DemoReport, name: str) -> Interval:
    """Return by how much the grown arm was better than another, in points.

    Args:
        report: The demo's.
        name: One of ``OPPONENTS``.
    """
    return {
        "host": report.grown_minus_host,
        "random": report.grown_minus_random,
        "scratch": report.grown_minus_scratch,
    }[name]


def wins_text(wins: Wins) -> str:
    """Return ``"9 won, 0 lost, 1 tied"``."""
    return f"{wins.won} won, {wins.lost} lost, {wins.tied} tied"


def dip_text(report: DemoReport) -> str:
    """Return the worst dip after a switch beside the host's own, in points."""
    own = number_text(report.arms["host"].worst_dip_points, ".2f")
    return f"{number_text(report.worst_dip_points, '.2f')} (the host's own {own})"


def control_counts(row: ControlRow) -> tuple[int, int, int, int, int]:
    """Return how many controls of a kind were tried, taken over, kept, called capacity, fooled.

    The last is how many a naive on/off gate would have kept.
    """
    return (row.tried, row.admitted, row.fossilized, row.capacity_claimed, row.naive_accepted)


def stage_rows(report: DemoReport) -> list[tuple[str, ...]]:
    """Return a row of text for each arm of the language model that was grown by stages."""
    return [
        (
            arm.name,
            number_text(arm.loss, ".3f"),
            flops_text(arm.flops),
            interval_text(arm.saved_at_equal_loss),
            "recorded" if arm.recorded else "this demo",
        )
        for arm in report.stages
    ]


def _work_text(report: DemoReport) -> str:
    """Return what growing took, to be put behind a sentence; nothing where it was not counted."""
    grown, taken = report.arms["grown"], []
    if grown.work is not None:
        taken.append(f"{grown.work:.2f} times the FLOPs of its own training")
    for name, whose in (("host", "the host's"), ("scratch", "those from scratch")):
        other = report.arms[name].train_flops
        if grown.train_flops and other:
            taken.append(f"{_ratio_text(grown.train_flops / other)} times {whose}")
    return f", and took {_listing(taken, 'and')}" if taken else ""


def _ratio_text(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def interval_text(interval: Interval, *, sign: bool = False) -> str:
    """Return ``"2.50 (1.10 to 3.90)"``; what is not known is a dash.

    Args:
        interval: In points or percent.
        sign: Whether every number carries its sign, as a difference does.
    """
    if interval.mean is None:
        return NOT_MEASURED
    form = "+.2f" if sign else ".2f"
    if interval.low is None or interval.high is None:
        return f"{interval.mean:{form}} (one run, no interval)"
    return f"{interval.mean:{form}} ({interval.low:{form}} to {interval.high:{form}})"


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table as plain lines; a head that begins with ``>`` is of a column of numbers.

    Args:
        heads: Names of the columns.
        rows: A cell for each column, of each row.
    """
    named = [head.removeprefix(">") for head in heads]
    widths = [max(map(len, column)) for column in zip(named, *rows, strict=True)]
    aligns = [">" if head.startswith(">") else "<" for head in heads]
    for row in (named, *rows):
        cells = zip(row, aligns, widths, strict=True)
        yield "  ".join(f"{cell:{align}{width}}" for cell, align, width in cells).rstrip()


def number_text(value: float | None, form: str = ",.2f", unit: str = "") -> str:
    """Return a number in the given format with its unit, or a dash for None."""
    if value is None:
        return NOT_MEASURED
    return f"{value:{form}} {unit}".rstrip()


def duration_text(seconds: float) -> str:
    """Return a duration as ``m:ss``, or ``h:mm:ss`` from an hour on, rounded up."""
    whole = -int(-seconds // 1)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}"


def bytes_text(value: int | None) -> str:
    """Return bytes with a binary prefix: ``"1.5 GiB"``; what is not known is a dash."""
    if value is None:
        return NOT_MEASURED
    for prefix, size in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {prefix}B"
    return f"{value} B"


def _difference_text(interval: Interval, wins: Wins) -> str:
    if interval.mean is None or interval.low is None or interval.high is None:
        return f"{number_text(interval.mean, '+.2f')} points in one run, which shows nothing"
    worse = "worse: " if interval.is_below_zero else ""
    return (
        f"{worse}{interval.mean:+.2f} points, 95 % interval {interval.low:+.2f} to "
        f"{interval.high:+.2f}, better at {wins.won} of {wins.won + wins.lost + wins.tied} "
        "random seeds"
    )


def _listing(words: Sequence[str], conjunction: str) -> str:
    """Join words as a sentence does: ``a, b or c``."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"
