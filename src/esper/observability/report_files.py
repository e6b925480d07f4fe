"""``report.json`` and ``report.html`` in the folder of a run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from esper.contracts.report import DemoReport, run_report_from_json
from esper.observability.demo_page import demo_page
from esper.observability.event_log import read_events
from esper.observability.run_folder import EVENTS_FILE
from esper.observability.time_page import page_in_time
from esper.resilience.attempt import Failed, attempt
from esper.resilience.whole_file import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from esper.contracts.report import RunReport


def write_report(report: DemoReport | RunReport, folder: Path) -> tuple[Path, Path]:
    """Write a report as data and as a page, each whole or not at all, and each without the other.

    Args:
        report: What to write.
        folder: Where; it is made.

    Returns:
        The paths of ``report.json`` and ``report.html``.

    Raises:
        OSError: A file cannot be written, and is named; one that was there before is unchanged.
        ValueError: A number of the report is not finite.
    """
    text = report.to_json()
    page = demo_page(report) if isinstance(report, DemoReport) else _page_of_run(text, folder)
    texts = {"report.json": text, "report.html": page}
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: attempt(partial(_write, folder / name, texts[name])) for name in texts}
    for outcome in written.values():
        if isinstance(outcome, Failed):
            raise outcome.error
    return folder / "report.json", folder / "report.html"


def _page_of_run(text: str, folder: Path) -> str:
    """Return a run's page; with the log of that run it can be moved back to any update.

    It is made of what is written, so that whoever reads ``report.json`` makes the same page.
    """
    report = run_report_from_json(text)
    try:
        events = read_events(folder / EVENTS_FILE)
    except (OSError, ValueError):  # the page is that of the report, with or without its past
        events = []
    is_its_own = bool(events) and events[-1].run_id == report.run_id
    return page_in_time(report, events if is_its_own else [])


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode("utf-8"))
