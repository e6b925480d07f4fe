"""Sentences and figures that the page and the terminal share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.contracts.lifecycle import GraftStage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.contracts.intervals import Interval
    from esper.contracts.progress import ProgressRow
    from esper.contracts.report import DemoReport, RunReport

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

_OPPONENTS: Final = {
    "host": "the host trained on without growing",
    "random": "a random choice of site and kernel under the same budget and gates",
    "scratch": "a network of the grown shape trained from scratch",
}


def not_beaten(report: DemoReport) -> str:
    """Return one sentence that says what growth did not beat, with the intervals."""
    differences = {
        "host": report.grown_minus_host,
        "random": report.grown_minus_random,
        "scratch": report.grown_minus_scratch,
    }
    if not report.random_seeds:
        return "Growth did not beat anything here, since no random seed was completed."
    unbeaten = [name for name, interval in differences.items() if not interval.is_above_zero]
    shown = unbeaten or list(differences)
    words = [f"{_OPPONENTS[name]} ({_difference_text(differences[name])})" for name in shown]
    if unbeaten:
        return f"Growth did not beat {_listing(words, 'or')}."
    return (
        "There is nothing in this demo that growth did not beat, and it was compared with no "
        f"more than {_listing(words, 'and')}."
    )


def not_beaten_in_run(report: RunReport) -> str:
    """Return one sentence that says what a single run of growth did not beat or never tried."""
    tries = len(report.grafts)
    wins = sum(
        graft.stage is GraftStage.FOSSILIZED and (graft.contribution or 0.0) > 0.0
        for graft in report.grafts
    )
    missing = (
        "was compared neither with a larger network trained from scratch nor with a random choice"
    )
    if not tries:
        return f"Growth did not beat anything here: no graft was tried, and the run {missing}."
    if wins == tries:
        return f"Growth beat a twin without it in {wins} of {tries} tries, but {missing}."
    return (
        f"Growth was not shown to beat a twin without it in {tries - wins} of {tries} tries, "
        f"and {missing}."
    )


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


def flops_text(value: float | None) -> str:
    """Return FLOPs with a decimal prefix: ``"1.24 GFLOP"``."""
    if value is None:
        return NOT_MEASURED
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}FLOP"
    return f"{value:.0f} FLOP"


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
