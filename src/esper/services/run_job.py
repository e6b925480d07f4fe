"""A user's job, from its name to its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.observability.report_files import write_report
from esper.services.target import load_job

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from esper.contracts.progress import Progress
    from esper.contracts.report import RunReport
    from esper.growth.suggestion import Suggestion


def run_job(
    target: str, *, run_dir: Path, on_progress: Callable[[Progress], None] | None = None
) -> RunReport:
    """Train and grow the job that ``target`` names, write its report and export its model.

    Args:
        target: ``"package.module:function"``.
        run_dir: Where ``events.jsonl``, ``report.json`` and ``report.html`` are written, and the
            grown model under ``model``.
        on_progress: Told after every update.

    Raises:
        GrowthError: The target is wrong, or a loader gave no batch.
        ValueError: The model has no layer that can be wrapped, or cannot be written as code; its
            report is written by then.
    """
    job = load_job(target)
    from esper.growth.job import grow

    report = grow(job, run_dir=run_dir, on_progress=on_progress)
    write_report(report, run_dir)
    from esper.wrapping.export import export

    export(job.model, run_dir / "model")
    return report


def suggest_for(
    target: str, *, on_progress: Callable[[Progress], None] | None = None
) -> list[Suggestion]:
    """Train the job that ``target`` names for a while, graft nothing, and rank what could grow.

    Args:
        target: ``"package.module:function"``.
        on_progress: Told after every update.

    Raises:
        GrowthError: The target is wrong, or a loader gave no batch.
        ValueError: The model has no layer that can be wrapped.
    """
    job = load_job(target)
    from esper.growth.job import suggest

    return suggest(job, on_progress=on_progress)
