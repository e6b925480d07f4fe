"""The drawing of a model on a run's page: its layers in order, with their seeds."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from esper.contracts.lifecycle import GraftStage
from esper.contracts.report import SiteRecord
from esper.observability.charts import MARK_SHAPES
from esper.observability.graft_parts import graft_style
from esper.observability.markup import Markup, element, join
from esper.observability.page_frame import figure

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from esper.contracts.report import GraftRecord, IncidentRecord, RunReport

MOST_ROWS: Final = 16
"""Layers from which on those of a row in which nothing happens are drawn as one."""
MOST_SEEDS: Final = 6
"""Seeds of a layer that are drawn; of more, those that are taken."""

LONGEST: Final = 58
"""Characters of a kernel's line; of a longer one the end is left out."""

_WIDTH, _HOST_WIDTH, _LEFT = 720.0, 200.0, 8.0
_HEAD, _ROW, _GAP = 34.0, 40.0, 10.0
_LINE = 20.0
_SEEDS_AT, _SEED_STEP = _LEFT + _HOST_WIDTH + 26.0, 22.0

STATE_MARKS: Final = {
    GraftStage.GERMINATED: "ring dashed",
    GraftStage.TRIAL: "ring dashed",
    GraftStage.AUDITION: "ring dashed",
    GraftStage.BLENDING: "admitted",
    GraftStage.HOLDING: "disc",
    GraftStage.FOSSILIZED: "fossilized",
}
"""How the seed of a graft is drawn, by its stage."""
CAPTION: Final = (
    "Layers with seeds in the model's order. Ring: a dormant seed; dashed ring: a kernel is tried "
    "outside the model; triangle: it blends in; disc: it is held under watch; diamond: it is "
    "permanent. A cross counts kernels that were refused or removed, a square with a mark tells "
    "of faults."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One row of the drawing: a layer, or several in which nothing happens.

    Attributes:
        sites: The layers.
        grafts: Those that stand in its seeds, by slot.
        gone: Those that were refused or removed.
        incidents: What went wrong there.
    """

    sites: tuple[SiteRecord, ...]
    grafts: dict[int, GraftRecord] = field(default_factory=dict)
    gone: tuple[GraftRecord, ...] = ()
    incidents: tuple[IncidentRecord, ...] = ()

    @property
    def height(self) -> float:
        """Of the row, in SVG units; each kernel has a line of its own."""
        return max(_ROW, _LINE * len(self.lines) + 12.0) + _GAP

    @property
    def lines(self) -> list[tuple[str, str]]:
        """What is said beside the seeds, with the style of each."""
        told = [(_kernel_text(slot, graft), _style(graft)) for slot, graft in self.grafts.items()]
        words = []
        if self.gone:
            words.append(f"{len(self.gone):,} refused or removed")
        if self.incidents:
            times = sum(incident.times for incident in self.incidents)
            words.append(f"faults and health: {times:,}")
        return [*told, *([(", ".join(words), "")] if words else [])]


def sites_of(report: RunReport) -> tuple[SiteRecord, ...]:
    """Return a run's layers in order; where no event told them, those in which it did something."""
    if report.sites:
        return report.sites
    named = {graft.site for graft in report.grafts}
    named |= {incident.site for incident in report.incidents if incident.seed_idx is not None}
    return tuple(SiteRecord(site=site) for site in sorted(named, key=_natural))


def model_figure(report: RunReport) -> Markup:
    """Return the drawing of a run's model, from its input down to its output."""
    rows = _folded([_row(site, report) for site in sites_of(report)])
    height = 2 * _HEAD + sum(row.height for row in rows)
    parts, y = [], _HEAD
    for row in rows:
        parts.append(_drawn(row, y))
        y += row.height
    spine = _LEFT + _HOST_WIDTH / 2
    ends = (
        element("text", "input", class_="tick middle", x=spine, y=16.0),
        element("line", class_="base", x1=spine, x2=spine, y1=22.0, y2=y + 8.0),
        element(
            "path", class_="arrow", d="M-5,-7 L0,0 L5,-7", transform=f"translate({spine} {y + 8.0})"
        ),
        element("text", "output", class_="tick middle", x=spine, y=y + 24.0),
    )
    drawing = element(
        "svg",
        element("title", "The model, layer by layer, with its seeds", id="model-title"),
        element("desc", _description(rows), id="model-desc"),
        *ends,
        *parts,
        view_box=f"0 0 {_WIDTH:g} {height:g}",
        role="img",
        aria_labelledby="model-title model-desc",
        class_="model",
    )
    return figure(drawing, CAPTION)


def _natural(site: str) -> list[tuple[int, str]]:
    """Return a key by which ``h.10`` comes after ``h.9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.]", site)]


def _row(site: SiteRecord, report: RunReport) -> _Row:
    own = [graft for graft in report.grafts if graft.site == site.site]
    inside = {g.seed_idx: g for g in own if g.stage is not GraftStage.CULLED}
    return _Row(
        sites=(site,),
        grafts=dict(sorted(inside.items())),
        gone=tuple(graft for graft in own if graft.stage is GraftStage.CULLED),
        incidents=tuple(i for i in report.incidents if i.site == site.site and i.where),
    )


def _folded(rows: Sequence[_Row]) -> list[_Row]:
    """Return the rows; of a large model, neighbours in which nothing happened are one."""
    if len(rows) <= MOST_ROWS:
        return list(rows)
    found: list[_Row] = []
    for row in rows:
        if found and not row.lines and not found[-1].lines:
            found[-1] = _Row(sites=(*found[-1].sites, *row.sites))
        else:
            found.append(row)
    return found


def _drawn(row: _Row, y: float) -> Markup:
    height = row.height - _GAP
    box = element(
        "rect",
        element("title", _box_text(row)),
        class_="host-box",
        x=_LEFT,
        y=y,
        width=_HOST_WIDTH,
        height=height,
        rx=7,
    )
    stack = [] if len(row.sites) == 1 else [_shadow(y, height)]
    return join(*stack, box, *_names(row, y, height), *_seeds(row, y, height), *_words(row, y))


def _shadow(y: float, height: float) -> Markup:
    """Return a second box behind that of several layers."""
    return element(
        "rect", class_="host-box", x=_LEFT + 4, y=y + 4, width=_HOST_WIDTH, height=height, rx=7
    )


def _names(row: _Row, y: float, height: float) -> Iterator[Markup]:
    first, last = row.sites[0], row.sites[-1]
    name, what = _short(first.site), first.what
    if len(row.sites) > 1:
        name, what = (
            f"{len(row.sites):,} layers, dormant",
            f"{_short(first.site, 12)} to {_short(last.site, 12)}",
        )
    middle = y + height / 2
    x = _LEFT + 12.0
    yield element("text", name, class_="name", x=x, y=middle - 4.0 if what else middle + 4.0)
    if what:
        yield element("text", _short(what, 28), class_="tick", x=x, y=middle + 12.0)


def _seeds(row: _Row, y: float, height: float) -> Iterator[Markup]:
    """Yield the seeds of a layer, on a line that leaves its host."""
    if len(row.sites) > 1:
        return
    num = max(row.sites[0].seeds, *(slot + 1 for slot in row.grafts), 1)
    few = num <= MOST_SEEDS or not row.grafts
    shown = range(min(num, MOST_SEEDS)) if few else list(row.grafts)[:MOST_SEEDS]
    middle = y + height / 2
    end = _SEEDS_AT + _SEED_STEP * (len(shown) - 1)
    yield element("line", class_="twig", x1=_LEFT + _HOST_WIDTH, x2=end, y1=middle, y2=middle)
    for place, slot in enumerate(shown):
        yield _seed(row.grafts.get(slot), slot, _SEEDS_AT + _SEED_STEP * place, middle)


def _seed(graft: GraftRecord | None, slot: int, x: float, y: float) -> Markup:
    at = f"translate({x:.1f} {y:.1f})"
    if graft is None:
        tip = element("title", f"seed {slot}: dormant")
        return element("circle", tip, class_="ring", r=5.5, cx=x, cy=y)
    tip, mark = element("title", _kernel_text(slot, graft)), STATE_MARKS[graft.stage]
    if mark not in MARK_SHAPES:
        return element("circle", tip, class_=f"{mark} {_style(graft)}", r=6.5, cx=x, cy=y)
    shape = MARK_SHAPES[mark]
    return element("path", tip, class_=f"mark {mark} {_style(graft)}", d=shape, transform=at)


def _words(row: _Row, y: float) -> Iterator[Markup]:
    """Yield what is said beside the seeds: the kernels, and what left or went wrong."""
    num_slots = 1 if len(row.sites) > 1 else max(row.sites[0].seeds, len(row.grafts))
    x = _SEEDS_AT + _SEED_STEP * min(num_slots, MOST_SEEDS)
    top = y + (row.height - _GAP - _LINE * len(row.lines)) / 2 + 14.0
    for place, (text, style) in enumerate(row.lines):
        at = top + _LINE * place
        if style:
            shown = text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\u2026"
            whole = [element("title", text)] if shown != text else []
            yield element("text", *whole, shown, class_=f"tick {style}", x=x, y=at)
            continue
        kind = "square" if row.incidents else "culled"
        symbol = MARK_SHAPES[kind]
        spot = f"translate({x + 6:.1f} {at - 4:.1f})"
        tip = element("title", "; ".join(i.text for i in row.incidents) or text)
        yield element("path", tip, class_=f"mark {kind} random", d=symbol, transform=spot)
        if row.incidents:
            yield element("text", "!", class_="warn middle", x=x + 6, y=at)
        yield element("text", text, class_="tick", x=x + 18, y=at)


def _style(graft: GraftRecord) -> str:
    return graft_style(graft.package or graft.graft)


def _kernel_text(slot: int, graft: GraftRecord) -> str:
    stage = "permanent" if graft.stage is GraftStage.FOSSILIZED else str(graft.stage)
    folded = ", folded into its layer" if graft.folded else ""
    package = "" if graft.package is None else f", package {graft.package}"
    return f"seed {slot}: {graft.blueprint}, {stage}{folded}{package}"


def _box_text(row: _Row) -> str:
    return "; ".join(f"{site.site or '(root)'} {site.what}".rstrip() for site in row.sites)


def _short(text: str, most: int = 26) -> str:
    """Leave the beginning out of a name that is too long for its box."""
    shown = text or "(root)"
    return shown if len(shown) <= most else f"\u2026{shown[1 - most :]}"


def _description(rows: Sequence[_Row]) -> str:
    told = defaultdict(list)
    for row in rows:
        for text, _ in row.lines:
            told[row.sites[0].site or "(root)"].append(text)
    said = "; ".join(f"{site}: {', '.join(texts)}" for site, texts in told.items())
    layers = sum(len(row.sites) for row in rows)
    return f"{layers:,} layers with seeds. {said or 'All seeds are dormant'}."
