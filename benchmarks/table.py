"""The table, as text and as a document: what was measured beside what was meant to be."""

from dataclasses import asdict, dataclass
from typing import Any

from goals import GOALS, Goal
from measure import Figure

FORMAT_VERSION = 2
UNEXPLAINED = "NOBODY HAS SAID WHY: profile it, and write the reason beside its goal in goals.py"
_BY_KEY = {goal.key: goal for goal in GOALS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line: a goal and its figure."""

    goal: Goal
    figure: Figure

    @classmethod
    def of(cls, figure: Figure) -> "Line":
        """Find the goal of a figure."""
        return cls(goal=_BY_KEY[figure.key], figure=figure)

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"``, ``"not measured"``, or ``"-"`` where there is no goal."""
        if self.figure.value is None:
            return "not measured"
        is_met = self.goal.is_met(self.figure.value)
        return "-" if is_met is None else "met" if is_met else "missed"

    @property
    def reason(self) -> str:
        """Why the goal is missed; empty where it is not."""
        return (self.goal.reason or UNEXPLAINED) if self.verdict == "missed" else ""

    def to_document(self) -> dict[str, Any]:
        """Return the line for JSON."""
        goal = {k: v for k, v in asdict(self.goal).items() if k != "reason"}
        figure = {k: v for k, v in asdict(self.figure).items() if k != "key"}
        return {**goal, **figure, "verdict": self.verdict, "reason": self.reason}


def cells(line: dict[str, Any]) -> tuple[str, ...]:
    """Return a document's line under :data:`HEADS`."""
    unit = line["unit"]
    value = "-" if line["value"] is None else _number(line["value"], unit)
    low_high = line["spread"]
    spread = "" if low_high is None else " to ".join(_number(v, unit) for v in low_high)
    at = ">=" if line["at_least"] else "<="
    goal = "" if line["limit"] is None else f"{at} {_limit(line['limit'], unit)}"
    best = "" if line["best"] is None else _number(line["best"], unit)
    row, what, beside, verdict = str(line["row"]), line["what"], line["beside"], line["verdict"]
    return row, what, value, spread, best, beside, goal, verdict


HEADS = ("row", "what", "median", "quartiles", "best round", "beside it", "goal", "verdict")
_WIDTHS = (3, 86, 10, 20, 10, 44, 10, 12)


def as_text(cells: tuple[str, ...]) -> str:
    """Return one line of the table for a terminal."""
    padded = (cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
    return "  ".join(padded).rstrip()


def remarks(lines: list[dict[str, Any]]) -> list[str]:
    """Return what is to be said below a table: reasons of what was missed, then notes."""
    missed = [f"Row {li['row']}, {li['what']}: {li['reason']}" for li in lines if li["reason"]]
    notes = [f"Row {li['row']}, {li['what']}: {li['note']}." for li in lines if li["note"]]
    return missed + notes


def _number(value: float, unit: str) -> str:
    if not unit:
        return f"{value:g}"
    digits = {"x": 3, "us": 2, "ms": 2, "B": 1}[unit]
    return _with_unit(f"{value:.{digits}f}", unit)


def _limit(value: float, unit: str) -> str:
    return _with_unit(f"{value:.2f}" if unit == "x" else f"{value:g}", unit)


def _with_unit(number: str, unit: str) -> str:
    return f"{number}{unit}" if unit in ("x", "") else f"{number} {unit}"
