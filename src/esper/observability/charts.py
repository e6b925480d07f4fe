"""Charts as inline SVG: lines with marks on them, lanes of stages, and effects with their errors.

Colours are classes that the page's style sheet fills in, once for light and once for dark. No
line is told from another by colour alone: each has its own dashes and its label beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Final

from esper.observability.markup import Markup, element, join

if TYPE_CHECKING:
    from collections.abc import Sequence

LABEL_GAP: Final = 16.0
LANE_HEIGHT: Final = 36.0
GLYPH_WIDTH: Final = 7.2
"""Width of a character of a label, about, in SVG units."""
LONGEST_LABEL: Final = 110
"""Characters of a lane's label; a longer one has its middle left out."""

MARK_SHAPES: Final = {
    "admitted": "M0,-6 L5.5,4 L-5.5,4 Z",
    "fossilized": "M0,-6.5 L6.5,0 L0,6.5 L-6.5,0 Z",
    "culled": "M-4.5,-4.5 L4.5,4.5 M4.5,-4.5 L-4.5,4.5",
    "woken": "M-7,-3 L7,-3 L7,3 L-7,3 Z",
    "disc": "M-5.5,0 A5.5,5.5 0 1 0 5.5,0 A5.5,5.5 0 1 0 -5.5,0 Z",
    "square": "M-5,-5 L5,-5 L5,5 L-5,5 Z",
}
"""Outline of each mark around its point: a triangle, a diamond, a cross, a block, and so on."""

PLACES: Final = 300
"""Places across a chart at each of which a line has four points at most."""

EFFECT_HEIGHT: Final = 24.0
"""Height of a row of a chart of effects; a group's title takes another."""

STAGE_HEIGHTS: Final = {
    "germinated": 4.0,
    "trial": 4.0,
    "audition": 4.0,
    "blending": 8.0,
    "holding": 12.0,
}
"""Height of a stage's bar in its lane, so that stages differ in shape and not only in colour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The size of a drawing and of the margins around its area, in SVG units.

    Attributes:
        width: Of the whole drawing.
        height: Of the whole drawing.
        left: Margin for the vertical axis.
        right: Margin for the labels at the ends of the lines.
        top: Margin above.
        bottom: Margin for the horizontal axis.
    """

    width: float
    height: float
    left: float = 64.0
    right: float = 126.0
    top: float = 14.0
    bottom: float = 48.0

    @property
    def area_right(self) -> float:
        """Coordinate of the right edge of the area."""
        return self.width - self.right

    @property
    def area_bottom(self) -> float:
        """Coordinate of the lower edge of the area."""
        return self.height - self.bottom


LARGE: Final = Frame(width=880.0, height=350.0)
SMALL: Final = Frame(width=440.0, height=230.0, left=52.0, right=120.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a chart.

    Attributes:
        style: Name of its style class, for example ``"grown"``.
        points: (x, y), x rising.
        label: Written at its end; empty for a faint line behind the others.
        steps: Whether a value holds until the next point, instead of moving there in a line.
    """

    style: str
    points: tuple[tuple[float, float], ...]
    label: str = ""
    steps: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A symbol at a point.

    Attributes:
        kind: A key of :data:`MARK_SHAPES`.
        x: Where, in values of the horizontal axis.
        y: Where, in values of the vertical axis.
        text: Its tooltip.
        style: Name of its style class; empty for the one of its kind.
        label: Written above it; empty for none.
    """

    kind: str
    x: float
    y: float
    text: str
    style: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines over one horizontal axis.

    Attributes:
        name: Unique on the page, for the ids of its title and description.
        title: What it shows, for people who cannot see it.
        description: What can be read off it, for people who cannot see it.
        x_label: Name of the horizontal axis.
        y_label: Name and unit of the vertical axis.
        series: Lines, drawn in order.
        marks: Symbols, drawn over the lines.
        x_range: First and last value of the horizontal axis.
        y_range: Lowest and highest value shown; None takes them from the lines.
        frame: Its size.
    """

    name: str
    title: str
    description: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    x_range: tuple[float, float]
    y_range: tuple[float, float] | None = None
    frame: Frame = LARGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The map from a value to a coordinate.

    Attributes:
        low: Value at ``start``.
        high: Value at ``end``.
        start: Coordinate, in SVG units.
        end: Coordinate, in SVG units.
    """

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the coordinate of ``value``."""
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A stage of a graft.

    Attributes:
        stage: Its name; those in :data:`STAGE_HEIGHTS` have a height of their own.
        start: Update at which it began.
        end: Update at which it was over.
        text: Its tooltip.
    """

    stage: str
    start: float
    end: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One graft's life.

    Attributes:
        label: Written above it, at its beginning, which a narrow screen shows first.
        bars: Its stages, in order.
        style: Name of the label's style class; empty for the plain one.
        verdict: How it ended, ``"fossilized"`` or ``"culled"``; empty if it has not.
    """

    label: str
    bars: tuple[Bar, ...]
    style: str = ""
    verdict: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """A measured difference.

    Attributes:
        label: What was compared, written at its left.
        kind: Its symbol, a key of :data:`MARK_SHAPES`.
        style: Name of its style class.
        value: The difference.
        stderr: Its standard error, at least 0.
        text: Its tooltip.
    """

    label: str
    kind: str
    style: str
    value: float
    stderr: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectGroup:
    """Differences that belong together.

    Attributes:
        label: Written above them.
        effects: In the order of their rows.
    """

    label: str
    effects: tuple[Effect, ...]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers within [low, high], rising.

    They are multiples of 1, 2 or 5 times a power of ten.
    """
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def draw_lines(chart: Chart) -> Markup:
    """Return a chart as an SVG element, or a sentence if there is nothing to draw."""
    heights = [y for series in chart.series for _, y in series.points]
    if not heights:
        return element("p", f"{chart.title}: nothing was recorded.", class_="empty")
    low, high = chart.y_range or _padded(heights)
    frame = _fitting(chart, low, high)
    x_scale = _x_scale(frame, *chart.x_range)
    y_scale = Scale(low=low, high=high, start=frame.area_bottom, end=frame.top)
    clip = f"{chart.name}-area"
    lines = [_line(series, x_scale, y_scale) for series in chart.series if series.points]
    marks = [_mark(mark, x_scale, y_scale) for mark in chart.marks if low <= mark.y <= high]
    return _svg(
        chart.name,
        chart.title,
        chart.description,
        frame,
        _clip(clip, frame),
        *_y_axis(y_scale, chart.y_label, frame),
        *_x_axis(x_scale, chart.x_label, frame.area_bottom),
        element("g", *lines, clip_path=f"url(#{clip})"),
        element("g", *marks),
        *_end_labels(chart.series, x_scale, y_scale),
    )


def _fitting(chart: Chart, low: float, high: float) -> Frame:
    """Return the chart's frame, with margins that the labels of its lines and axis fit into."""
    names = [len(series.label) for series in chart.series if series.points]
    numbers = [len(f"{value:,g}") for value in ticks(low, high)]
    return replace(
        chart.frame,
        left=max(chart.frame.left, GLYPH_WIDTH * max(numbers) + 34.0),
        right=max(chart.frame.right, GLYPH_WIDTH * max(names) + 16.0),
    )


def legend(chart: Chart) -> Markup:
    """Return the names of a chart's lines in their colours, for screens that cut the chart off."""
    named = [line for line in chart.series if line.label and line.points]
    if not named:
        return Markup("")
    keys = (element("li", line.label, class_=line.style) for line in named)
    return element("ul", *keys, class_="legend")


def draw_lanes(
    name: str,
    title: str,
    description: str,
    lanes: Sequence[Lane],
    last_update: float,
    *,
    span: float = 0.0,
) -> Markup:
    """Return lives of grafts as lanes over the updates, or a sentence if there are none.

    Args:
        name: Unique on the page, for ids.
        title: What it shows, for people who cannot see it.
        description: What can be read off it, for people who cannot see it.
        lanes: One per graft.
        last_update: Up to where grafts have lived.
        span: Updates that there is room for, where those are more.
    """
    if not lanes:
        return element("p", f"{title}: no graft was tried.", class_="empty")
    frame = Frame(width=880.0, height=LANE_HEIGHT * len(lanes) + 62.0, left=16.0, right=24.0)
    x_scale = _x_scale(frame, 0.0, max(span, last_update))
    rows = [
        _lane(lane, x_scale, frame.top + LANE_HEIGHT * row + 26.0, last_update)
        for row, lane in enumerate(lanes)
    ]
    axis = _x_axis(x_scale, "updates", frame.area_bottom)
    return _svg(name, title, description, frame, *axis, *rows)


def draw_effects(
    *,
    name: str,
    title: str,
    description: str,
    groups: Sequence[EffectGroup],
    x_label: str,
    zero_label: str,
) -> Markup:
    """Return differences as symbols with bars of one standard error, or a sentence without any.

    Args:
        name: Unique on the page, for ids.
        title: What it shows, for people who cannot see it.
        description: What can be read off it, for people who cannot see it.
        groups: What belongs together.
        x_label: Name and unit of the differences.
        zero_label: What stands at 0, which all of them are differences from.
    """
    effects = [effect for group in groups for effect in group.effects]
    if not effects:
        return element("p", f"{title}: nothing was measured.", class_="empty")
    rows = len(effects) + len(groups)
    frame = Frame(width=440.0, height=EFFECT_HEIGHT * rows + 84.0, left=84.0, right=16.0, top=28.0)
    ends = [end for e in effects for end in (e.value - e.stderr, e.value + e.stderr)]
    scale = _x_scale(frame, *_padded([0.0, *ends]))
    zero = scale(0.0)
    parts = [
        element("line", class_="base", x1=zero, x2=zero, y1=frame.top - 6, y2=frame.area_bottom),
        element("text", zero_label, class_="tick middle", x=zero, y=frame.top - 12),
        *_x_axis(scale, x_label, frame.area_bottom),
    ]
    y = frame.top + EFFECT_HEIGHT / 2
    for group in groups:
        parts.append(element("text", group.label, class_="name halo", x=8.0, y=y + 4))
        for effect in group.effects:
            y += EFFECT_HEIGHT
            parts.append(_effect(effect, scale, y))
        y += EFFECT_HEIGHT
    return _svg(name, title, description, frame, *parts)


def _effect(effect: Effect, scale: Scale, y: float) -> Markup:
    x1, x2 = scale(effect.value - effect.stderr), scale(effect.value + effect.stderr)
    level = Scale(low=0.0, high=1.0, start=y, end=y)
    mark = Mark(kind=effect.kind, x=effect.value, y=0.0, text=effect.text, style=effect.style)
    return join(
        element("text", effect.label, class_=f"tick {effect.style}", x=8.0, y=y + 4),
        element("line", class_=f"whisker {effect.style}", x1=x1, x2=x2, y1=y, y2=y),
        _mark(mark, scale, level),
    )


def _svg(name: str, title: str, description: str, frame: Frame, *children: Markup) -> Markup:
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", description, id=f"{name}-desc"),
        *children,
        view_box=f"0 0 {frame.width:g} {frame.height:g}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def _x_scale(frame: Frame, low: float, high: float) -> Scale:
    return Scale(low=low, high=high, start=frame.left, end=frame.area_right)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return low - room, high + room


def _clip(name: str, frame: Frame) -> Markup:
    area = element(
        "rect",
        x=frame.left,
        y=frame.top - 2,
        width=frame.area_right - frame.left + 2,
        height=frame.area_bottom - frame.top + 4,
    )
    return element("clipPath", area, id=name)


def _y_axis(scale: Scale, label: str, frame: Frame) -> list[Markup]:
    parts = []
    for value in ticks(scale.low, scale.high):
        y = scale(value)
        grid = element("line", class_="grid", x1=frame.left, x2=frame.area_right, y1=y, y2=y)
        text = element("text", f"{value:,g}", class_="tick end", x=frame.left - 8, y=y + 4)
        parts += [grid, text]
    middle = (scale.start + scale.end) / 2
    turned = f"translate(14 {middle:g}) rotate(-90)"
    return [*parts, element("text", label, class_="axis middle", transform=turned)]


def _x_axis(scale: Scale, label: str, bottom: float) -> list[Markup]:
    parts = [element("line", class_="base", x1=scale.start, x2=scale.end, y1=bottom, y2=bottom)]
    for value in ticks(scale.low, scale.high, max(2, round((scale.end - scale.start) / 110))):
        x = scale(value)
        parts.append(element("line", class_="base", x1=x, x2=x, y1=bottom, y2=bottom + 5))
        parts.append(element("text", f"{value:,g}", class_="tick middle", x=x, y=bottom + 19))
    middle = (scale.start + scale.end) / 2
    return [*parts, element("text", label, class_="axis middle", x=middle, y=bottom + 38)]


_DASH: Final = 3.0
"""Half of what stands for a line that has one point."""


def _line(series: Series, x_scale: Scale, y_scale: Scale) -> Markup:
    path, before = [], None
    for x, y in thinned(series.points):
        if series.steps and before is not None:
            path.append(f"{x_scale(x):.1f},{y_scale(before):.1f}")
        path.append(f"{x_scale(x):.1f},{y_scale(y):.1f}")
        before = y
    if len(series.points) == 1:  # a line of one point has no ink
        ((x, y),) = series.points
        at, height = x_scale(x), y_scale(y)
        path = [f"{at - _DASH:.1f},{height:.1f}", f"{at + _DASH:.1f},{height:.1f}"]
    weight = "line" if series.label else "line faint"
    return element("polyline", class_=f"{weight} {series.style}", points=" ".join(path))


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return points that draw the same line on a screen; of few points, those that there are.

    Of neighbours that share a place there, the first, the lowest, the highest and the last stay.
    """
    if len(points) <= 4 * PLACES:
        return list(points)
    first = min(x for x, _ in points)
    width = (max(x for x, _ in points) - first) / PLACES or 1.0
    kept: list[tuple[float, float]] = []
    for _, group in groupby(points, key=lambda point: int((point[0] - first) / width)):
        near = list(group)
        ends = [0, len(near) - 1]
        extremes = [pick(range(len(near)), key=lambda i: near[i][1]) for pick in (min, max)]
        kept += [near[i] for i in sorted({*ends, *extremes})]
    return kept


def _mark(mark: Mark, x_scale: Scale, y_scale: Scale) -> Markup:
    place = f"translate({x_scale(mark.x):.1f} {y_scale(mark.y):.1f})"
    tip = element("title", mark.text)
    shape = MARK_SHAPES[mark.kind]
    classes = f"mark {mark.kind} {mark.style}".rstrip()
    symbol = element("path", tip, class_=classes, d=shape, transform=place)
    if not mark.label:
        return symbol
    x, y = x_scale(mark.x), y_scale(mark.y) - 11.0
    label = element("text", mark.label, class_=f"tick middle halo {mark.style}".rstrip(), x=x, y=y)
    return join(symbol, label)


def _end_labels(series: Sequence[Series], x_scale: Scale, y_scale: Scale) -> list[Markup]:
    """Return the labels of the lines, at the right edge, moved apart where they would overlap."""
    named = [line for line in series if line.label and line.points]
    low, high = sorted((y_scale.start, y_scale.end))
    ends = {line: min(max(y_scale(line.points[-1][1]), low), high) for line in named}
    named.sort(key=lambda line: ends[line])
    heights, y = [], -math.inf
    for line in named:
        y = max(ends[line], y + LABEL_GAP)
        heights.append(y)
    limit = high
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], limit)
        limit = heights[i] - LABEL_GAP
    return [
        element(
            "text",
            line.label,
            class_=f"name {line.style}",
            x=max(x_scale.start, x_scale.end) + 10,  # beyond the last mark
            y=height + 4,
        )
        for line, height in zip(named, heights, strict=True)
    ]


def _lane(lane: Lane, scale: Scale, y: float, last_update: float) -> Markup:
    bars = [_bar(bar, scale, y) for bar in lane.bars]
    end = lane.bars[-1].end if lane.bars else 0.0
    life = []
    if lane.verdict == "fossilized":
        x1, x2 = scale(end), scale(last_update)
        life.append(element("line", class_="fossil-life", x1=x1, x2=x2, y1=y, y2=y))
    if lane.verdict:
        level = Scale(low=0.0, high=1.0, start=y, end=y)
        mark = Mark(kind=lane.verdict, x=end, y=0.0, text=f"{lane.verdict} at update {end:,g}")
        life.append(_mark(mark, scale, level))
    shown = _shortened(lane.label)
    tip = [element("title", lane.label)] if shown != lane.label else []
    classes = f"tick {lane.style}".rstrip()
    label = element("text", *tip, shown, class_=classes, x=scale.start, y=y - 12)
    return join(*bars, *life, label)


def _shortened(text: str) -> str:
    """Leave the middle out of a text that is too long, so that both of its ends can be read."""
    if len(text) <= LONGEST_LABEL:
        return text
    half = LONGEST_LABEL // 2 - 1
    return f"{text[:half]} \u2026 {text[-half:]}"


def _bar(bar: Bar, scale: Scale, y: float) -> Markup:
    height = STAGE_HEIGHTS.get(bar.stage, 4.0)
    return element(
        "rect",
        element("title", bar.text),
        class_=f"stage {bar.stage}",
        x=scale(bar.start),
        y=y - height / 2,
        width=max(scale(bar.end) - scale(bar.start), 0.5),
        height=height,
    )
