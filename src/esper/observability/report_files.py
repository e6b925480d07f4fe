"""``report.json`` and ``report.html`` in the folder of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.contracts.report import DemoReport, RunReport
from esper.observability.report_page import demo_page, run_page

if TYPE_CHECKING:
    from pathlib import Path


def write_report(report: DemoReport | RunReport, folder: Path) -> tuple[Path, Path]:
    """Write a report as data and as a page, each whole or not at all.

    Args:
        report: What to write.
        folder: Where; it is made.

    Returns:
        The paths of ``report.json`` and ``report.html``.

    Raises:
        OSError: A file cannot be written; one that was there before is unchanged.
        ValueError: A number of the report is not finite.
    """
    page = demo_page(report) if isinstance(report, DemoReport) else run_page(report)
    folder.mkdir(parents=True, exist_ok=True)
    return (
        _write(folder / "report.json", report.to_json()),
        _write(folder / "report.html", page),
    )


def _write(path: Path, text: str) -> Path:
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    return path
