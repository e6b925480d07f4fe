"""The frame of a report page: the document, its style sheet, its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from esper.observability.markup import Markup, element, join

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

COLOURS: Final = {
    "paper": "#ffffff",
    "ink": "#1b1f24",
    "soft": "#57606a",
    "rule": "#d5dae0",
    "panel": "#f5f7f9",
    "host": "#57606a",
    "grown": "#0067a8",
    "random": "#b34d00",
    "scratch": "#00795a",
    "graft-1": "#0067a8",
    "graft-2": "#b34d00",
    "graft-3": "#00795a",
    "graft-4": "#7a3fd0",
    "graft-5": "#b01f6f",
    "graft-6": "#6b5d00",
    "graft-7": "#a61b1b",
    "graft-8": "#00707f",
}
"""What things are drawn in on light paper, by the name of their style."""

_ON_LIGHT: Final = " ".join(f"--{name}: {colour};" for name, colour in COLOURS.items())

_RINGS: Final = "\n".join(
    f".ring.dashed.graft-{n} {{ stroke: var(--graft-{n}); }}" for n in range(1, 9)
)

_ICON_ADDRESS: Final = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath "
    "d='M8 1 15 8 8 15 1 8Z' fill='%2300795a'/%3E%3C/svg%3E"
)
_ICON: Final = element("link", rel="icon", href=_ICON_ADDRESS)
"""A diamond, as what is permanent has."""

TOP: Final = "part-top"
"""Id of the head of a page, which stands before its sections."""

STYLE: Final = Markup(
    """
:root { color-scheme: light dark; ON_LIGHT }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171b; --ink: #e7eaee; --soft: #a3adb8; --rule: #3a424c; --panel: #1d2228;
  --host: #a9b3bd; --grown: #62b6f0; --random: #f0a04b; --scratch: #3ecfa4;
  --graft-1: #62b6f0; --graft-2: #f0a04b; --graft-3: #3ecfa4; --graft-4: #b79bff;
  --graft-5: #f386c2; --graft-6: #d0c048; --graft-7: #ff8a80; --graft-8: #4dd0d8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.75rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { font-size: 1.35rem; line-height: 1.4; margin: 0 0 1rem; }
.rest { max-width: 50rem; margin: 0 0 1rem; }
.words { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: .2rem 1.5rem; margin: .75rem 0 1.25rem; font-size: .9rem; color: var(--soft); }
.words dt { display: inline; font-weight: 600; color: var(--ink); }
.words dt::after { content: ":"; }
.words dd { display: inline; margin: 0 0 0 .35em; }
th[title] { text-decoration: underline dotted; text-underline-offset: .2em; cursor: help; }
.stopped { border-left: 4px solid var(--random); padding-left: .75rem; }
.caption, .empty, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0; }
.wide { overflow-x: auto; }
.wide:focus-visible { outline: 2px solid var(--grown); outline-offset: 2px; }
svg { display: block; width: 100%; min-width: 38rem; height: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; margin: .75rem 0; }
figure.table figcaption { margin-bottom: .35rem; max-width: 46rem; }
.legend { display: none; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; margin: 1.25rem 0;
  padding: .6rem 0; border: solid var(--rule); border-width: 1px 0; }
a { color: var(--grown); }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0;
  border-bottom: 1px solid var(--rule); }
thead th { font-weight: 600; border-bottom: 2px solid var(--rule); vertical-align: bottom; }
tbody th { font-weight: 600; }
thead th:first-child, tbody th { position: sticky; left: 0; background: var(--paper); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
td.text { min-width: 13rem; overflow-wrap: anywhere; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; padding: 0; }
.facts div { background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; }
.facts dt { color: var(--soft); font-size: .85rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.small { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.small svg { min-width: 0; } .small figure { margin: .5rem 0; }
.narrow svg { min-width: 0; max-width: 36rem; }
svg text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  fill: var(--ink); }
svg .tick, svg .axis { fill: var(--soft); } svg .end { text-anchor: end; }
svg .halo { paint-order: stroke; stroke: var(--paper); stroke-width: 6px; }
svg .middle { text-anchor: middle; } svg .name { font-weight: 600; }
.grid { stroke: var(--rule); stroke-width: 1; } .base { stroke: var(--soft); stroke-width: 1; }
.line { fill: none; stroke-width: 2.5; stroke-linejoin: round; }
.faint { stroke-width: 1; opacity: .35; }
.line.host { stroke: var(--host); stroke-dasharray: 2 4; }
.line.grown { stroke: var(--grown); }
.line.random { stroke: var(--random); stroke-dasharray: 9 4; }
.line.scratch { stroke: var(--scratch); stroke-dasharray: 9 3 2 3; }
text.host { fill: var(--host); } text.grown { fill: var(--grown); }
text.random { fill: var(--random); } text.scratch { fill: var(--scratch); }
li.host { color: var(--host); } li.grown { color: var(--grown); }
li.random { color: var(--random); } li.scratch { color: var(--scratch); }
.mark { stroke: var(--paper); stroke-width: 1; }
.mark.admitted { fill: var(--grown); } .mark.fossilized { fill: var(--scratch); }
.mark.culled { fill: none; stroke: var(--random); stroke-width: 2.5; }
.line.graft-1 { stroke: var(--graft-1); }
text.graft-1, .mark.graft-1 { fill: var(--graft-1); } li.graft-1 { color: var(--graft-1); }
.mark.culled.graft-1 { fill: none; stroke: var(--graft-1); }
.line.graft-2 { stroke: var(--graft-2); stroke-dasharray: 9 4; }
text.graft-2, .mark.graft-2 { fill: var(--graft-2); } li.graft-2 { color: var(--graft-2); }
.mark.culled.graft-2 { fill: none; stroke: var(--graft-2); }
.line.graft-3 { stroke: var(--graft-3); stroke-dasharray: 9 3 2 3; }
text.graft-3, .mark.graft-3 { fill: var(--graft-3); } li.graft-3 { color: var(--graft-3); }
.mark.culled.graft-3 { fill: none; stroke: var(--graft-3); }
.line.graft-4 { stroke: var(--graft-4); stroke-dasharray: 2 4; }
text.graft-4, .mark.graft-4 { fill: var(--graft-4); } li.graft-4 { color: var(--graft-4); }
.mark.culled.graft-4 { fill: none; stroke: var(--graft-4); }
.line.graft-5 { stroke: var(--graft-5); stroke-dasharray: 14 4; }
text.graft-5, .mark.graft-5 { fill: var(--graft-5); } li.graft-5 { color: var(--graft-5); }
.mark.culled.graft-5 { fill: none; stroke: var(--graft-5); }
.line.graft-6 { stroke: var(--graft-6); stroke-dasharray: 6 3; }
text.graft-6, .mark.graft-6 { fill: var(--graft-6); } li.graft-6 { color: var(--graft-6); }
.mark.culled.graft-6 { fill: none; stroke: var(--graft-6); }
.line.graft-7 { stroke: var(--graft-7); stroke-dasharray: 12 3 3 3 3 3; }
text.graft-7, .mark.graft-7 { fill: var(--graft-7); } li.graft-7 { color: var(--graft-7); }
.mark.culled.graft-7 { fill: none; stroke: var(--graft-7); }
.line.graft-8 { stroke: var(--graft-8); stroke-dasharray: 4 4; }
text.graft-8, .mark.graft-8 { fill: var(--graft-8); } li.graft-8 { color: var(--graft-8); }
.mark.culled.graft-8 { fill: none; stroke: var(--graft-8); }
.whisker { stroke-width: 2; } .whisker.grown { stroke: var(--grown); }
.whisker.random { stroke: var(--random); } .whisker.host { stroke: var(--host); }
.mark.grown { fill: var(--grown); } .mark.random { fill: var(--random); }
.mark.host { fill: var(--host); } .mark.woken { fill: var(--ink); }
.stage.germinated, .stage.trial, .stage.audition { fill: var(--host); }
.stage.blending { fill: var(--random); }
.stage.holding { fill: var(--grown); }
svg.model { max-width: 46rem; min-width: 30rem; }
.host-box { fill: var(--panel); stroke: var(--rule); stroke-width: 1.5; }
.twig { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 3; }
.arrow { fill: none; stroke: var(--soft); stroke-width: 1.5; }
.ring { fill: var(--paper); stroke: var(--soft); stroke-width: 1.5; }
.ring.dashed { stroke-width: 2.5; stroke-dasharray: 3.5 2.5; stroke: var(--host); }
RINGS
.mark.square.random { fill: var(--random); }
svg text.warn { fill: var(--paper); font-weight: 700; font-size: 11px; }
.time { position: sticky; top: 0; z-index: 2; background: var(--paper);
  border-bottom: 1px solid var(--rule); }
.time > div { max-width: 62rem; margin: 0 auto; padding: .55rem 1.25rem .4rem; display: grid;
  align-items: center; gap: .3rem .6rem;
  grid-template: "state back play forth moment at now" "said said said said said heard heard"
    / auto auto 4.2rem auto 1fr auto 4rem; }
.time .state { grid-area: state; display: inline-flex; align-items: center; gap: .4rem;
  font-weight: 600; white-space: nowrap; margin-right: .4rem; }
.time .state::before { content: ""; flex: none; width: .6rem; height: .6rem; border-radius: 50%;
  background: var(--host); }
.time[data-state="live"] .state::before { background: var(--scratch); }
.time[data-state="past"] .state::before { background: var(--random); border-radius: 0; }
.time[data-state="away"] .state::before { background: none; border: 2px solid var(--random); }
.time input { grid-area: moment; width: 100%; min-width: 0; accent-color: var(--grown); margin: 0; }
.time output { grid-area: at; font-variant-numeric: tabular-nums; white-space: nowrap; }
.time p { margin: 0; max-width: none; min-height: 1.4em; color: var(--soft); font-size: .88rem;
  line-height: 1.4; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.time .said { grid-area: said; } .time .heard { grid-area: heard; text-align: right; }
.time .back { grid-area: back; } .time .play { grid-area: play; }
.time .forth { grid-area: forth; } .time .now { grid-area: now; }
.time button:disabled { color: var(--soft); cursor: default; }
.time button { font: inherit; font-size: .9rem; color: var(--ink); background: var(--panel);
  border: 1px solid var(--rule); border-radius: .4rem; padding: .2rem .6rem; cursor: pointer; }
.time button:hover { border-color: var(--soft); }
button:focus-visible, input:focus-visible, a:focus-visible, summary:focus-visible {
  outline: 2px solid var(--grown); outline-offset: 2px; }
.time ~ main section, .time ~ main header { scroll-margin-top: 6.5rem; }
main.many { max-width: 100rem; }
.time.many > div { max-width: 100rem; }
.beside { display: grid; gap: 0 2.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }
.beside > div { min-width: 0; border-top: 3px solid var(--rule); margin-top: 2.5rem; }
.beside h2 { margin-top: 1.25rem; overflow-wrap: anywhere; }
.beside h3 { font-size: 1.15rem; margin-top: 2rem; }
.beside svg { min-width: 30rem; } .beside .small svg, .beside .narrow svg { min-width: 0; }
.fossil-life { stroke: var(--scratch); stroke-width: 2; }
@media (max-width: 40rem) { .legend { display: flex; flex-wrap: wrap; gap: 0 1rem; margin: 0;
    padding: 0; list-style: none; font-size: .9rem; font-weight: 600; }
  main { padding: 1.25rem 1rem 3rem; }
  .time > div { padding: .5rem 1rem .35rem; grid-template: "state back play forth now"
    "moment moment moment moment moment" "at at heard heard heard" "said said said said said"
    / minmax(0, 1fr) auto 4.2rem auto 4rem; }
  .time .word { display: none; } .time .state { margin-right: 0; }
  .time output { font-size: .9rem; }
  .lead { font-size: 1.15rem; } thead th:first-child, tbody th { max-width: 9rem; }
  .facts { grid-template-columns: 1fr 1fr; } td:not(.number) { min-width: 7rem; } }
@media print { main { max-width: none; padding: 0; } details > * { display: block; } }
""".replace("ON_LIGHT", _ON_LIGHT).replace("RINGS", _RINGS)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of a table.

    Attributes:
        head: What its cells are, with the unit.
        kind: ``"number"`` (set to the right), ``"text"`` (may be long) or ``""``.
        tip: What the head means, shown where a pointer rests on it; empty where it needs no word.
    """

    head: str
    kind: str = ""
    tip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of a page with a heading of its own, which the contents lead to.

    Attributes:
        title: Its heading; no other section of the page has it.
        body: What belongs to it.
    """

    title: str
    body: Markup

    @property
    def anchor(self) -> str:
        """What addresses it within the page."""
        return "part-" + "-".join(self.title.lower().split())

    def __str__(self) -> str:
        return element("section", element("h2", self.title), self.body, id=self.anchor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a page says of one thing, a run or a demo: its head, and its sections.

    Attributes:
        title: Its heading.
        lead: The first sentences that a reader meets; only the very first is set large.
        intro: What follows them, in order.
        sections: What the contents name, in order.
    """

    title: str
    lead: tuple[str, ...]
    intro: tuple[Markup, ...] = ()
    sections: tuple[Section, ...] = ()

    def pieces(self) -> dict[str, Markup]:
        """Return the markup of the head and of each section, in order, by their ids."""
        return {TOP: self._top(), **{s.anchor: Markup(s) for s in self.sections}}

    def _top(self) -> Markup:
        rest = [element("p", " ".join(self.lead[1:]), class_="rest")] if self.lead[1:] else []
        return element(
            "header",
            element("h1", self.title),
            element("p", self.lead[0], class_="lead"),
            *rest,
            *self.intro,
            _contents(self.sections),
            id=TOP,
        )


def parts_of(
    title: str, *lead: str, intro: Sequence[Markup], sections: Sequence[Section | None]
) -> Parts:
    """Return the parts of a page; a section that is None is left out."""
    shown = tuple(section for section in sections if section is not None)
    return Parts(title=title, lead=lead, intro=tuple(intro), sections=shown)


def document(
    parts: Parts, *, base: str | None = None, body: Markup | None = None, policy: str | None = None
) -> str:
    """Return a whole page that needs no network.

    Args:
        parts: What it says.
        base: Address that its links start from; None is its own.
        body: All of it, where that is more than the parts one after another.
        policy: What the page may load and run, as a Content-Security-Policy; it has an icon then,
            which a browser would ask a server for.
    """
    rules = {"http_equiv": "Content-Security-Policy", "content": policy}
    head = element(
        "head",
        element("meta", charset="utf-8"),
        *([] if policy is None else [element("meta", **rules), _ICON]),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", parts.title),
        *([] if base is None else [element("base", href=base)]),
        element("style", STYLE),
    )
    whole = element("main", *parts.pieces().values()) if body is None else body
    page = element("html", head, element("body", whole), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def section(title: str, *parts: str) -> Section:
    """Return a heading of the second order with what belongs to it."""
    return Section(title=title, body=join(*parts))


def _contents(sections: Sequence[Section]) -> Markup:
    """Return links to the parts of the page."""
    if len(sections) < 2:
        return Markup("")
    links = (element("a", part.title, href=f"#{part.anchor}") for part in sections)
    items = (element("li", link) for link in links)
    return element("nav", element("ul", *items), aria_label="Contents")


def paragraph(text: str, style: str | None = None) -> Markup:
    """Return one paragraph of plain text."""
    return element("p", text, class_=style)


def figure(drawing: Markup, caption: str, key: str = "", *, style: str | None = None) -> Markup:
    """Return a drawing with its caption; it scrolls sideways where the screen is narrow.

    Args:
        drawing: The drawing.
        caption: What it shows.
        key: The names of its lines, which a narrow screen shows above it.
        style: Name of a style class: ``"narrow"`` for one that a narrow screen has room for.
    """
    parts = (key, _scrolling(drawing, caption), element("figcaption", caption))
    return element("figure", *parts, class_=style)


def table(
    caption: str, columns: Sequence[Column], rows: Iterable[Sequence[str]], empty: str
) -> Markup:
    """Return a table whose first column names the row, or the sentence ``empty``.

    On a narrow screen the cells scroll sideways, and neither the caption nor the first column do.

    Args:
        caption: What the table shows.
        columns: Heads and kinds, one per cell of a row.
        rows: Cells as text, in the order of the columns.
        empty: Said instead where there is no row.
    """
    body = [element("tr", *_cells(columns, row)) for row in rows]
    if not body:
        return paragraph(empty, "empty")
    heads = [
        element("th", c.head, scope="col", class_=c.kind or None, title=c.tip or None)
        for c in columns
    ]
    whole = element(
        "table",
        element("thead", element("tr", *heads)),
        element("tbody", *body),
    )
    return element(
        "figure", element("figcaption", caption), _scrolling(whole, caption), class_="table"
    )


def facts(pairs: Mapping[str, str]) -> Markup:
    """Return a few figures with their names, side by side."""
    groups = [
        element("div", element("dt", name), element("dd", value)) for name, value in pairs.items()
    ]
    return element("dl", *groups, class_="facts")


def folded(summary: str, *parts: Markup) -> Markup:
    """Return parts that are shown when the reader opens them."""
    return element("details", element("summary", summary), *parts)


def settings_table(caption: str, values: Mapping[str, object]) -> Markup:
    """Return names and values as a table, sorted by name; what has parts has a row for each."""
    flat = dict(_flat(values))
    rows = [(name, str(flat[name])) for name in sorted(flat)]
    columns = [Column(head="name"), Column(head="value", kind="text")]
    return table(caption, columns, rows, "Nothing was recorded.")


def _flat(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}: {inner}", found) for inner, found in _flat(value))
        else:
            yield name, value


def notes(texts: Sequence[str]) -> Section | None:
    """Return the notes as a list under a heading, or nothing."""
    if not texts:
        return None
    return section("Notes", element("ul", *(element("li", text) for text in texts)))


def _scrolling(inner: Markup, label: str) -> Markup:
    return element("div", inner, class_="wide", role="region", aria_label=label, tabindex="0")


def _cells(columns: Sequence[Column], row: Sequence[str]) -> list[Markup]:
    cells = []
    for index, (column, text) in enumerate(zip(columns, row, strict=True)):
        kind = column.kind or None
        if index == 0:
            cells.append(element("th", text, scope="row", class_=kind))
        else:
            cells.append(element("td", text, class_=kind))
    return cells
