"""The page of runs that go on: what stands on it now, and what has changed since it was sent."""

from __future__ import annotations

import json
import os
import secrets
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, final

from esper.observability.followed_run import FollowedRun, path_text
from esper.observability.report_page import TITLE
from esper.observability.side_by_side import TITLE as TITLE_OF_MANY
from esper.observability.side_by_side import as_column, comparison
from esper.observability.time_page import Column, TimePage, changes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.contracts.ports import Clock
    from esper.observability.followed_run import EventTail

LOOKS_EVERY_S: Final = 0.25
"""Least time between two looks at the files; a page that takes long to make is made less often."""
SHARE: Final = 4.0
"""Times that making a page took, before it is made again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What a page is told.

    Attributes:
        id: Names what the page shows then; who comes with it later is told what came behind it.
        text: JSON: the pieces that have changed, and the order of all.
    """

    id: str
    text: str


@final
class LivePage:
    """One page for some runs, which any number of readers look at.

    Each piece of the page is kept with the number of the look at which it last became another one.
    So a reader is told what has changed since it was told last, however long ago that was, and one
    who comes late has all that was there before.

    Args:
        places: Folders, logs or tails of the runs, at least one; they need not be there yet.
        clock: Says when to look again.
    """

    def __init__(self, places: Sequence[Path | EventTail], clock: Clock) -> None:
        self._runs = [FollowedRun(place) for place in places]
        on_disk = iter(names_of([run.path for run in self._runs if run.path is not None]))
        self._names = [run.name if run.path is None else next(on_disk) for run in self._runs]
        self._clock, self._lock = clock, threading.Lock()
        self._name, self._number = secrets.token_hex(4), 0
        self._since: dict[str, int] = {}
        self._next_look_s = 0.0
        self._page = self._made()

    @property
    def id(self) -> str:
        """Names what stands on the page now."""
        return f"{self._name}-{self._number}"

    @property
    def has_ended(self) -> bool:
        """Whether every run has ended, as far as was looked."""
        return all(run.state == "ended" for run in self._runs)

    def look(self) -> None:
        """See what was written, where it is time to look again; the page is made anew if it was."""
        with self._lock:
            begun = self._clock.now()
            if begun < self._next_look_s:
                return
            is_other = [run.look() for run in self._runs]
            if any(is_other):
                self._make()
            took = self._clock.now() - begun
            self._next_look_s = self._clock.now() + max(LOOKS_EVERY_S, SHARE * took)

    def html(self) -> str:
        """Return the whole page as it is now."""
        with self._lock:
            return str(replace(self._page, also={"live": True, "id": self.id}))

    def since(self, known: str) -> Message | None:
        """Return what a reader lacks; None where it has all.

        Args:
            known: The id of what it was told last; empty, or of another page, for nothing.
        """
        with self._lock:
            name, _, number = known.partition("-")
            told = int(number) if name == self._name and number.isdecimal() else -1
            if told >= self._number:
                return None
            columns = [
                column.as_json([p for p in column.pieces if self._since[p] > told])
                for column in self._page.columns
            ]
            return Message(id=self.id, text=json.dumps({"columns": columns, **self._page.told()}))

    def at(self, update: int) -> str:
        """Return the page as it was when so many updates had been done, as JSON."""
        with self._lock:
            columns = self._columns(update)
        return json.dumps({"columns": [column.as_json() for column in columns]})

    def _make(self) -> None:
        page = self._made()
        before = {name: piece for c in self._page.columns for name, piece in c.pieces.items()}
        if page == self._page:
            return
        self._number += 1
        for column in page.columns:
            for name, piece in column.pieces.items():
                if before.get(name) != piece:
                    self._since[name] = self._number
        self._page = page

    def _made(self) -> TimePage:
        columns = self._columns()
        for column in columns:
            for name in column.pieces:
                self._since.setdefault(name, self._number)
        heard = [run.heard for run in self._runs]
        return TimePage(
            title=TITLE if len(self._runs) == 1 else TITLE_OF_MANY,
            columns=columns,
            updates=max(run.updates for run in self._runs),
            changes=self._changes(),
            states=tuple(run.state for run in self._runs),
            heard=max((s for s in heard if s is not None), default=None),
        )

    def _changes(self) -> tuple[tuple[int, str], ...]:
        if len(self._runs) == 1:
            return changes_of(self._runs[0].events)
        found = [
            (update, f"{name}: {text}")
            for name, run in zip(self._names, self._runs, strict=True)
            for update, text in changes_of(run.events)
        ]
        return tuple(sorted(found))

    def _columns(self, update: int | None = None) -> tuple[Column, ...]:
        """Return what the page shows, now or as it was at an update."""
        if len(self._runs) == 1:
            return (Column(id="column-0", pieces=self._runs[0].parts(TITLE, update).pieces()),)
        named = list(zip(self._names, self._runs, strict=True))
        seen = [(name, run.state, run.report_at(update)) for name, run in named]
        span = max(run.updates for run in self._runs)
        first = Column(id="column-0", pieces=comparison(seen, span).pieces())
        own = (
            Column(
                id=f"column-{number}",
                pieces=as_column(run.parts(name, update).pieces(), number),
            )
            for number, (name, run) in enumerate(named, start=1)
        )
        return (first, *own)


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return what tells paths apart: what is behind the folder that all of them are in."""
    if not paths:
        return []
    whole = [path.resolve() for path in paths]
    shared = Path(os.path.commonpath([path.parent for path in whole]))
    return [path_text(path.relative_to(shared)) for path in whole]
