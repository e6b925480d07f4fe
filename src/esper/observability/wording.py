"""Sentences and figures that the page and the terminal share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.contracts.intervals import Interval
    from esper.contracts.progress import ProgressRow
    from esper.contracts.report import DemoReport

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
}
"""Short names of the kinds of control grafts."""

_SHARES: Final = frozenset({"accuracy"})
"""Metrics that are shares in [0, 1], and shown in percent."""

_ORDER: Final = ("host", "random", "scratch")
_OPPONENTS: Final = {
    "host": "the host trained on without growing",
    "random": "a random choice of site and kernel under the same budget and gates",
    "scratch": "a network of the grown shape trained from scratch",
}


def not_beaten(report: DemoReport) -> str:
    """Return one sentence that says what growth beat and what not, with the intervals."""
    differences = {
        "host": report.grown_minus_host,
        "random": report.grown_minus_random,
        "scratch": report.grown_minus_scratch,
    }
    if not report.random_seeds:
        return "Growth did not beat anything here, since no random seed was completed."
    words = {name: f"{_OPPONENTS[name]} ({_difference_text(differences[name])})" for name in _ORDER}
    beaten = [words[name] for name in _ORDER if differences[name].is_above_zero]
    unbeaten = [words[name] for name in _ORDER if not differences[name].is_above_zero]
    if not unbeaten:
        return (
            "There is nothing in this demo that growth did not beat, and it was compared with no "
            f"more than {_listing(beaten, 'and')}."
        )
    if not beaten:
        return f"Growth did not beat {_listing(unbeaten, 'or')}."
    return f"Growth beat {_listing(beaten, 'and')}, but not {_listing(unbeaten, 'or')}."


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


def measured_text(row: ProgressRow) -> dict[str, str]:
    """Return everything that was measured in a run so far, as text by name.

    The losses come first, then the owner's metrics in their order; what was not read yet is left
    out.
    """
    losses = {"gate loss": row.gate_loss, "training loss": row.train_loss}
    known = {name: f"{loss:.4g}" for name, loss in losses.items() if loss is not None}
    return known | {name: metric_text(name, value) for name, value in row.metrics.items()}


def metric_text(name: str, value: float) -> str:
    """Return a metric with its unit: ``"93.2 %"`` for a share, else four digits."""
    return f"{100 * value:.1f} %" if name in _SHARES else f"{value:.4g}"


def number_text(value: float | None, form: str = ",.2f", unit: str = "") -> str:
    """Return a number in the given format with its unit, or a dash for None."""
    if value is None:
        return NOT_MEASURED
    return f"{value:{form}} {unit}".rstrip()


def bytes_text(value: int | None) -> str:
    """Return bytes with a binary prefix: ``"1.5 GiB"``; what is not known is a dash."""
    if value is None:
        return NOT_MEASURED
    for prefix, size in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {prefix}B"
    return f"{value} B"


def _difference_text(interval: Interval) -> str:
    if interval.mean is None or interval.low is None or interval.high is None:
        return f"{number_text(interval.mean, '+.2f')} points in one run, which shows nothing"
    worse = "worse: " if interval.is_below_zero else ""
    return (
        f"{worse}{interval.mean:+.2f} points, 95 % interval {interval.low:+.2f} to "
        f"{interval.high:+.2f}"
    )


def _listing(words: Sequence[str], conjunction: str) -> str:
    """Join words as a sentence does: ``a, b or c``."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} {conjunction} {words[-1]}"
