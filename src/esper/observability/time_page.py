"""A run's page in time: the bar with which it goes back to any update, and the script behind it."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from esper.contracts.events import (
    BreakerMoved,
    Fossilized,
    GateRead,
    HealthChanged,
    PassengerRemoved,
    RolledBack,
    RunEnded,
    SeedFaulted,
    StageWoken,
    TakenOver,
    TrialRead,
    TrialStarted,
)
from esper.observability.markup import Markup, element
from esper.observability.page_frame import STYLE, Parts, document
from esper.observability.replay import Course
from esper.observability.report_page import run_page, run_parts
from esper.observability.sentences import sentence_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.events import Event
    from esper.contracts.report import RunReport

MOST_MOMENTS, LEAST_MOMENTS = 150, 8
"""Moments that a file keeps, of a small page and of a large one."""
MOST_LETTERS: Final = 8_000_000
"""Letters of all that is packed into a file, about; to make and pack them takes a second or two."""
MOST_CHANGES: Final = 400
"""Moments at which something changed that a page tells; of more, the last."""

SCRIPT: Final = Markup(Path(__file__).with_name("page.js").read_text(encoding="utf-8"))

_TELLING: Final = (
    BreakerMoved,
    Fossilized,
    GateRead,
    HealthChanged,
    PassengerRemoved,
    RolledBack,
    RunEnded,
    SeedFaulted,
    StageWoken,
    TakenOver,
    TrialRead,
    TrialStarted,
)
"""Events that the buttons beside the slider lead to."""


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


POLICY: Final = (
    f"default-src 'none'; script-src {_digest(SCRIPT)}; style-src {_digest(STYLE)}; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
"""What a page may do: run its own script, be styled by its own sheet, ask where it came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What a page shows of one run, or of all together.

    Attributes:
        id: Of the element that holds the pieces.
        pieces: Markup by the id of its element, in order.
    """

    id: str
    pieces: Mapping[str, Markup]

    def as_json(self, ids: Sequence[str] | None = None) -> JsonObject:
        """Return the order of the pieces, and the markup of some of them; None is all."""
        wanted = list(self.pieces) if ids is None else list(ids)
        html: JsonObject = {name: str(self.pieces[name]) for name in wanted}
        return {"id": self.id, "order": list(self.pieces), "html": html}


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePage:
    """A page as it stands now, with what its script is told.

    Attributes:
        title: Of the document.
        columns: What it shows, the first one across the whole page where there are several.
        updates: Where its slider ends.
        changes: Updates at which something changed, rising, and what.
        states: Of each run: ``"not begun"``, ``"under way"``, ``"ended"`` or ``"refused"``.
        heard: Seconds since 1970 at which the last event was written; None where not known.
        also: What its script is told beside that.
    """

    title: str
    columns: tuple[Column, ...]
    updates: int
    changes: tuple[tuple[int, str], ...] = ()
    states: tuple[str, ...] = ()
    heard: float | None = None
    also: JsonObject = field(default_factory=dict)

    def __str__(self) -> str:
        body = Markup(f"{self._bar()}{self._main()}{self._scripts()}")
        return document(Parts(title=self.title, lead=("",)), body=body, policy=POLICY)

    def told(self) -> JsonObject:
        """Return what the bar shows, for the script."""
        return {
            "updates": self.updates,
            "changes": [list(change) for change in self.changes],
            "states": list(self.states),
            "heard": self.heard,
        }

    def _main(self) -> Markup:
        made = [element("div", *column.pieces.values(), id=column.id) for column in self.columns]
        if len(made) == 1:
            return element("main", *made)
        beside = element("div", *made[1:], class_="beside")
        return element("main", made[0], beside, class_="many")

    def _bar(self) -> Markup:
        end, label = self.updates, {"aria_label": "Update"}
        place = element("span", "", id="at")
        parts = (
            element("span", "", class_="state", id="state", role="status"),
            _button("back", "\u2039", "The change before", word="Change"),
            element("button", "Play", type="button", id="play", class_="play"),
            _button("forth", "\u203a", "The next change", word="Change"),
            element("input", type="range", id="moment", min=0, max=end, step=1, value=end, **label),
            element("output", element("span", "update ", class_="word"), place, for_="moment"),
            element("button", "End", type="button", id="now", class_="now"),
            element("p", "", class_="said", id="said"),
            element("p", "", class_="heard", id="heard"),
        )
        many = " many" if len(self.columns) > 1 else ""
        return element("div", element("div", *parts), class_=f"time{many}", id="time", hidden="")

    def _scripts(self) -> Markup:
        columns = [{"id": column.id, "order": list(column.pieces)} for column in self.columns]
        data = {"live": False, "columns": columns, **self.told(), **self.also}
        text = Markup(json.dumps(data).replace("<", "\\u003c"))
        kept = element("script", text, type="application/json", id="page-data")
        return Markup(f"{kept}{element('script', SCRIPT)}")


def _button(name: str, sign: str, label: str, *, word: str) -> Markup:
    """Return a button with a sign, and a word that a narrow screen has no room for."""
    parts = [element("span", word, class_="word"), Markup(" "), element("span", sign)]
    shown = parts[::-1] if name == "back" else parts
    return element(
        "button", *shown, type="button", id=name, class_=name, title=label, aria_label=label
    )


def page_in_time(report: RunReport, events: Sequence[Event]) -> str:
    """Return the page of a run that has ended, which can be moved back to any update.

    Args:
        report: The run.
        events: Its log; without an event the page has no slider.
    """
    if not events:
        return run_page(report)
    parts = run_parts(report)
    last = Column(id="column-0", pieces=parts.pieces())
    size = sum(map(len, last.pieces.values()))
    page = TimePage(
        title=parts.title,
        columns=(last,),
        updates=report.updates,
        changes=changes_of(events),
        states=("ended",),
        also={"packed": _packed(events, report.updates, size)},
    )
    return str(page)


def changes_of(events: Sequence[Event]) -> tuple[tuple[int, str], ...]:
    """Return the updates at which something changed, and what, in order."""
    told: dict[int, list[str]] = {}
    for event in events:
        if isinstance(event, _TELLING):
            told.setdefault(event.update, []).append(sentence_of(event))
    return tuple((at, "; ".join(texts)) for at, texts in told.items())[-MOST_CHANGES:]


def _packed(events: Sequence[Event], updates: int, size: int) -> str:
    """Return what a page showed at its moments, packed; text that stays is there once.

    Args:
        events: The log.
        updates: Those of the whole run.
        size: Letters of the page at its end.
    """
    texts: dict[str, int] = {}
    moments = []
    wanted = _moments(events, max(LEAST_MOMENTS, min(MOST_MOMENTS, MOST_LETTERS // size)))
    course = Course()
    for event, after in zip(events, [*events[1:], None], strict=True):
        course.take(event)
        if event.update in wanted and (after is None or after.update != event.update):
            report, elapsed_s = course.report(goes_on=True), course.elapsed_s
            parts = run_parts(report, under_way=True, span=updates, elapsed_s=elapsed_s)
            found = [
                (name, texts.setdefault(text, len(texts))) for name, text in parts.pieces().items()
            ]
            moments.append((event.update, found))
    plain = json.dumps({"texts": list(texts), "moments": moments}).encode()
    return base64.b64encode(zlib.compress(plain, 6)).decode()


def _moments(events: Sequence[Event], most: int) -> set[int]:
    """Return the updates at which a file shows the run: those of changes first, others between."""
    known = sorted({event.update for event in events})
    changed = _thinned([update for update, _ in changes_of(events)], most)
    others = _thinned(known, most - len(changed))
    return {known[0], *changed, *others}


def _thinned(updates: Sequence[int], most: int) -> list[int]:
    """Return so many of some updates at most, evenly."""
    if most <= 0:
        return []
    return list(updates[:: -(-len(updates) // most)]) if updates else []
