"""A run that is looked at while it goes on, from its folder or from wherever its events are."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, final

from esper.contracts.errors import EsperError
from esper.contracts.report import run_report_from_json
from esper.observability.event_log import LogTail
from esper.observability.page_frame import Parts
from esper.observability.replay import Course, oddities
from esper.observability.report_page import TITLE, run_parts
from esper.observability.run_folder import EVENTS_FILE

if TYPE_CHECKING:
    from esper.contracts.events import Event
    from esper.contracts.report import RunReport

REPORT_FILE: Final = "report.json"


class EventTail(Protocol):
    """What a run has had since the last look, wherever its events are kept."""

    @property
    def name(self) -> str:
        """What tells it from other runs."""
        ...

    @property
    def num_begun(self) -> int:
        """How often it began, from 1: after a rise what was taken before is of another run."""
        ...

    @property
    def heard(self) -> float | None:
        """Seconds since 1970 at which something was last written; None where nothing was."""
        ...

    @property
    def trouble(self) -> str:
        """Why nothing comes for now, in words; empty where nothing is in the way."""
        ...

    def take(self) -> list[Event] | None:
        """Return what has come since the last call; None where nothing has. Waits for no event.

        Raises:
            OSError, EsperError: It cannot be read.
            ValueError: What is there is no event, or of a newer format.
        """
        ...


@final
class FollowedRun:
    """A run by its events as they are written, and by its report once that is there.

    Args:
        place: Its folder, or its log, of which neither needs to be there yet; or the tail of
            events that are kept elsewhere, beside which there is no report.

    Attributes:
        path: Its folder, or its log where that has another name than a log in a folder has; None
            where its events are elsewhere.
        name: The path, or what its tail is called.
        events: What its log has had so far.
        report: What its ``report.json`` says; None before it is there.
    """

    def __init__(self, place: Path | EventTail) -> None:
        self.path, self._tail, self._report_file = _where(place)
        self.name, self._num_begun = self._tail.name, 1
        self._course = Course()
        self.events: list[Event] = []
        self.report: RunReport | None = None
        self._report_stamp: tuple[int, int] | None = None
        self._problem = self._trouble = ""

    def look(self) -> bool:
        """Read what was written since the last look; say whether that changes anything."""
        try:
            found = self._tail.take()
            is_other = self._see_report()
        except (OSError, EsperError, ValueError) as error:
            is_other, self._problem = self._problem != path_text(error), path_text(error)
            return is_other
        is_other = is_other or bool(self._problem) or self._trouble != self._tail.trouble
        self._problem, self._trouble = "", self._tail.trouble
        if self._tail.num_begun != self._num_begun:
            self._num_begun, self._course, self.events = self._tail.num_begun, Course(), []
        for event in found or ():
            self.events.append(event)
            self._course.take(event)
        return is_other or bool(found)

    def _see_report(self) -> bool:
        """Read the report where it was written anew; say whether it is another one.

        One that is none, or of a newer format, is left alone: the log tells of the run.
        """
        before, file = self.report, self._report_file
        if file is None:
            return False
        try:
            state = file.stat()
            stamp = (state.st_mtime_ns, state.st_size)
            if stamp == self._report_stamp:
                return False
            self._report_stamp, self.report = stamp, None
            text = file.read_text(encoding="utf-8")
            self.report = run_report_from_json(text)
        except FileNotFoundError:
            self._report_stamp = self.report = None
        except ValueError:
            if self.heard is None:
                self._report_stamp = None  # the next look says it again
                raise
        return before != self.report

    @property
    def state(self) -> str:
        """``"not begun"``, ``"under way"``, ``"ended"``, or ``"refused"`` where it is not read."""
        if self._problem:
            return "refused"
        if self._final is not None or self._course.has_ended:
            return "ended"
        return "under way" if self.events else "not begun"

    @property
    def updates(self) -> int:
        """Updates that were done, as far as is known."""
        if self._final is not None:
            return self._final.updates
        return 0 if self._course.last is None else self._course.last.update

    @property
    def heard(self) -> float | None:
        """Seconds since 1970 at which its log was written last; None where there is none."""
        return self._tail.heard

    @property
    def _final(self) -> RunReport | None:
        """The report, where it is of the run that the log tells of, or there is no log."""
        last = self._course.last
        if self.report is None or last is None:
            return self.report
        return self.report if self._course.has_ended and self.report.run_id == last.run_id else None

    def report_at(self, update: int | None = None) -> RunReport | None:
        """Return the run as it was when so many updates had been done; None before its first event.

        Args:
            update: Updates; None, or no fewer than it has done, for the run as it is now.
        """
        if update is not None and update < self.updates and self.events:
            return self._past(update)
        if self._final is not None or not self.events:
            return self._final
        goes_on = not self._course.has_ended
        told = tuple(oddities(self.events, goes_on=goes_on))
        return self._course.report(oddities=told, goes_on=goes_on)

    def _past(self, update: int) -> RunReport:
        course = Course()
        for event in self.events:
            if event.update <= update:
                course.take(event)
        return course.report(updates=update, goes_on=True)

    def parts(self, title: str = TITLE, update: int | None = None) -> Parts:
        """Return what its page says, or what it said at an update.

        Args:
            title: Its heading.
            update: As :meth:`report_at` takes it.
        """
        if self._problem:
            return _only(title, f"This run cannot be shown: {self._problem}")
        report = self.report_at(update)
        if report is None:
            return _only(title, f"Nothing has happened yet in {self.name}.", self._trouble)
        goes_on, horizon = self.state == "under way", report.settings.get("horizon")
        span = max(self.updates, horizon if goes_on and isinstance(horizon, int) else 0)
        is_past = report.updates < self.updates
        made = run_parts(
            report,
            title=title,
            under_way=goes_on or is_past,
            span=span,
            elapsed_s=self._elapsed_s(report.updates if is_past else self.updates),
        )
        if not (goes_on and self._trouble):
            return made
        return replace(made, lead=(*made.lead, f"Nothing comes for now: {self._trouble}."))

    def _elapsed_s(self, update: int) -> float | None:
        """Return the time of the last event up to an update; None where there is none."""
        until = (event.time_s for event in reversed(self.events) if event.update <= update)
        return next(until, None)


def _where(place: Path | EventTail) -> tuple[Path | None, EventTail, Path | None]:
    """Return the path of a run, the tail of its events, and where its report will be."""
    if not isinstance(place, Path):
        return None, place, None
    is_log = place.suffix == ".jsonl"
    folder = place.parent if is_log else place
    log = place if is_log else place / EVENTS_FILE
    path = folder if log.name == EVENTS_FILE else place
    return path, _LogFile(log, path_text(path)), folder / REPORT_FILE


@final
class _LogFile:
    """The tail of a log in a file."""

    trouble: Final = ""

    def __init__(self, log: Path, name: str) -> None:
        self._log, self._tail, self.name = log, LogTail(log), name

    @property
    def num_begun(self) -> int:
        return self._tail.num_begun

    @property
    def heard(self) -> float | None:
        try:
            return self._log.stat().st_mtime
        except OSError:
            return None

    def take(self) -> list[Event] | None:
        return self._tail.take()


def path_text(path: Path | Exception) -> str:
    """Return a path, or an error that names one, as a page can say it: in letters that exist."""
    return os.fsencode(str(path)).decode("utf-8", errors="replace")


def _only(title: str, *texts: str) -> Parts:
    return Parts(title=title, lead=tuple(filter(None, texts)))
