"""``esper report``: what a finished run said of itself, printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from esper.cli.console import console
from esper.cli.options import AsJson
from esper.cli.outcome import EXIT_PROBLEM, one_line_errors

if TYPE_CHECKING:
    from esper.contracts.report import DemoReport, RunReport

REPORT_FILE: Final = "report.json"

Run = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="The folder of a run, or its report.json or events.jsonl by itself."
    ),
]


def report(
    run: Run,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Print what a run said at its end; exit with 1 where there is none, or it is refused.

    From its report.json, or put together from its events.jsonl where there is no other: of a run
    that was killed or goes on, and of one without a command. `esper replay` shows the log alone.
    """
    with one_line_errors():
        from esper.cli.errors import error_text
        from esper.contracts.report import DemoReport

        try:
            found = read_run(run)
        except (FileNotFoundError, ValueError) as error:
            typer.echo(error_text(error), err=True)
            raise typer.Exit(EXIT_PROBLEM) from error
        if as_json:
            typer.echo(found.to_json(), nl=False)
        elif isinstance(found, DemoReport):
            from esper.cli.tables import print_demo

            print_demo(console(), found)
        else:
            typer.echo(str(found))


def read_run(run: Path) -> RunReport | DemoReport:
    """Return the report of a run, or of a demo.

    Args:
        run: A folder, of which ``report.json`` is taken before ``events.jsonl``; or such a file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is neither a report nor a log, or one of a newer major version.
        OSError: It cannot be read.
    """
    from esper.observability.event_log import read_events
    from esper.observability.replay import replay
    from esper.observability.run_folder import EVENTS_FILE

    path = run
    if run.is_dir():
        names = (REPORT_FILE, EVENTS_FILE)
        path = next((run / name for name in names if (run / name).is_file()), run)
        if path == run:
            msg = f"{run} is no folder of a run: it has neither {names[0]} nor {names[1]}"
            raise FileNotFoundError(msg)
    if path.suffix == ".jsonl":
        return replay(read_events(path)).report
    return _report_in(path)


def _report_in(path: Path) -> RunReport | DemoReport:
    from esper.contracts.report import demo_report_from_json, run_report_from_json
    from esper.contracts.value_json import members

    text = path.read_text(encoding="utf-8")
    try:
        is_demo = "arms" in members(text)
        return demo_report_from_json(text) if is_demo else run_report_from_json(text)
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error
