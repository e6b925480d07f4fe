"""A run's page that is renewed while the run goes on, and can be moved back through its past.

What is shown of a run is what the page of its replayed log shows, to the byte; around it stands a
bar with the runs that are watched and a slider over the events.
"""

from __future__ import annotations

import base64
import hashlib
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from esper.contracts.events import RunEnded
from esper.observability.event_log import LogTail
from esper.observability.markup import Markup, element
from esper.observability.page_frame import document, paragraph
from esper.observability.replay import replay
from esper.observability.report_page import run_page

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from esper.contracts.events import Event

_SCRIPT: Final = Markup("""
const at = document.getElementById("at"), said = document.getElementById("said");
let follows = true, asked = 0;
const show = (html) => {
  const top = scrollY;
  document.querySelector("main").outerHTML = html;
  scrollTo(0, top);
};
const say = (text) => { said.textContent = text; };
const source = new EventSource(location.pathname + "/events");
source.onmessage = (message) => {
  const found = JSON.parse(message.data);
  at.max = found.events;
  if (follows) { at.value = found.events; show(found.main); }
  say(found.ended ? "ended" : follows ? "live" : "going on");
  if (found.ended) source.close();
};
source.onerror = () => say("not reached, trying again");
at.oninput = async () => {
  follows = at.value === at.max;
  const mine = ++asked, answer = await fetch(location.pathname + "/at/" + at.value);
  const html = await answer.text();
  if (mine === asked && answer.ok) show(html);
  say(follows ? "live" : "event " + at.value + " of " + at.max);
};
""")
_STYLE: Final = Markup("""
.live { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .4rem 1.25rem;
  align-items: center; padding: .5rem 1.25rem; background: var(--panel); color: var(--ink);
  border-bottom: 1px solid var(--rule); font-size: .9rem; }
.live nav { margin: 0; border: 0; padding: 0; }
.live nav ul { display: flex; flex-wrap: wrap; gap: .25rem .9rem; margin: 0; padding: 0; border: 0;
  list-style: none; }
.live a[aria-current] { font-weight: 600; color: inherit; text-decoration: none; }
.live label { display: flex; align-items: center; gap: .5rem; flex: 1 1 14rem; }
.live input { flex: 1; min-width: 8rem; accent-color: var(--grown); }
""")
_HASH: Final = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
POLICY: Final = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: its own script and style, and to ask its own server."""


class WatchedRun:
    """A run as far as its log goes; it can be looked at from several threads.

    Args:
        name: What it is called on the page.
        log: Its ``events.jsonl``, which need not be there yet.
    """

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self._tail = LogTail(log)
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._wrong = ""
        self._times_begun = 0

    def look(self) -> str:
        """Read what is new; return what stands for all that is there by now."""
        with self._lock:
            if not self._wrong:
                self._read()
            return f"{self._times_begun}-{len(self._events)}{'!' if self._wrong else ''}"

    def _read(self) -> None:
        try:
            new = self._tail.read()
        except (OSError, ValueError) as error:
            self._wrong = str(error)
            return
        if self._tail.times_begun != self._times_begun:
            self._times_begun = self._tail.times_begun
            self._events.clear()
        self._events += new

    @property
    def num_events(self) -> int:
        """Number of events that were read."""
        return len(self._events)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is to come."""
        return bool(self._wrong or (self._events and isinstance(self._events[-1], RunEnded)))

    def main(self, number: int | None = None) -> str:
        """Return the page's main part as it was after so many events; by default as it is.

        Args:
            number: From 1 to ``num_events``.
        """
        with self._lock:
            events, wrong = tuple(self._events[:number]), self._wrong
        if wrong:
            return _main_of(document(_TITLE, f"The log is refused: {wrong}", intro=[], sections=[]))
        if not events:
            waits = paragraph(f"{self._tail.path} has no event yet.")
            return _main_of(document(_TITLE, "The run has not begun.", intro=[waits], sections=[]))
        goes_on = not isinstance(events[-1], RunEnded)
        return _main_of(run_page(replay(events, goes_on=goes_on).report))


_TITLE: Final = "Esper: a run of growth"


def _main_of(page: str) -> str:
    start, end = page.index("<main>"), page.rindex("</main>") + len("</main>")
    return page[start:end]


def live_page(runs: Sequence[WatchedRun], index: int) -> str:
    """Return the page of one of several runs.

    Args:
        runs: All that are watched.
        index: Which of them it is, from 0.
    """
    run = runs[index]
    run.look()
    links = (
        element(
            "li",
            element("a", each.name, href=f"/runs/{i}", aria_current="page" if i == index else None),
        )
        for i, each in enumerate(runs)
    )
    latest = max(1, run.num_events)
    slider = element(
        "input", id="at", type="range", min="1", max=str(latest), value=str(latest), step="1"
    )
    bar = element(
        "header",
        element("nav", element("ul", *links), aria_label="Runs"),
        element("label", "Events", slider),
        element("output", "connecting", id="said"),
        class_="live",
    )
    head, rest = _frame()
    body = f"{bar}{run.main()}{element('script', _SCRIPT)}"
    return f"{head}{element('style', _STYLE)}{rest.replace('<main></main>', body, 1)}"


@lru_cache(maxsize=1)
def _frame() -> tuple[str, str]:
    """Return a page around an empty main part, up to the end of its head and from there."""
    page = document(_TITLE, "", intro=[], sections=[])
    empty = page.replace(_main_of(page), "<main></main>")
    head, _, rest = empty.partition("</head>")
    return head, "</head>" + rest
