"""Pictures of the document: losses over FLOPs, and differences with their intervals."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 70, 50, 20, 150
COLOURS = ("#3b6fb6", "#c2502e", "#3d8b5f", "#8a5ab0", "#8b7d3a", "#555555")
STYLE = (
    "<style>text { font: 12px system-ui, sans-serif; fill: #333 } "
    "@media (prefers-color-scheme: dark) { text { fill: #ccc } }</style>"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Points of one kind: FLOPs and a loss each."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A mean and its interval."""

    name: str
    mean: float
    low: float
    high: float


def losses(lines: Sequence[Line], unit: str) -> str:
    """Draw losses over the logarithm of FLOPs."""
    xs = [math.log10(x) for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    across = _Scale(low=min(xs), high=max(xs), start=LEFT, end=WIDTH - RIGHT)
    up = _Scale(low=min(ys), high=max(ys), start=HEIGHT - BOTTOM, end=TOP)
    parts = [_text(LEFT, HEIGHT - 12, "FLOPs"), _text(6, TOP - 6, unit)]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = up.low + share * (up.high - up.low)
        parts.append(_rule(LEFT, up(y), WIDTH - RIGHT, up(y)) + _text(20, up(y) + 4, f"{y:.3f}"))
        x = across.low + share * (across.high - across.low)
        parts.append(_text(across(x) - 20, HEIGHT - BOTTOM + 18, f"{10**x:.2g}"))
    for number, (line, colour) in enumerate(zip(lines, COLOURS, strict=False)):
        places = [(across(math.log10(x)), up(y)) for x, y in line.points]
        parts.append(_path(places, colour))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places]
        y = TOP + 20 * number
        parts.append(f'<circle cx="{WIDTH - RIGHT + 12}" cy="{y}" r="4" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 22, y + 4, line.name))
    return _svg(parts, HEIGHT)


def bars(found: Sequence[Bar], unit: str) -> str:
    """Draw means with their intervals, where 0 is and how far they reach."""
    ends = [0.0, *(b.low for b in found), *(b.high for b in found)]
    across = _Scale(low=min(ends), high=max(ends), start=220, end=WIDTH - 30)
    height = 40 + 28 * len(found)
    parts = [
        _rule(across(0.0), 10, across(0.0), height - 26),
        _text(across(0.0) - 3, height - 10, "0"),
        _text(6, height - 10, unit),
    ]
    reach = [end for end in (across.low, across.high) if abs(across(end) - across(0.0)) > 40]
    parts += [_text(across(end) - 8, height - 10, f"{end:+.2g}") for end in reach]
    for number, bar in enumerate(found):
        y = 24 + 28 * number
        colour = COLOURS[0] if bar.low > 0 or bar.high < 0 else COLOURS[-1]
        parts.append(_text(6, y + 4, bar.name))
        parts.append(_path([(across(bar.low), y), (across(bar.high), y)], colour))
        parts.append(f'<circle cx="{across(bar.mean):.1f}" cy="{y}" r="5" fill="{colour}"/>')
    return _svg(parts, height)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = (self.high - self.low) or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def _svg(parts: Sequence[str], height: int) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    return "\n".join([head, STYLE, *parts, "</svg>", ""])


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="#999" stroke-width="0.7"/>'


def _path(places: Sequence[tuple[float, float]], colour: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
