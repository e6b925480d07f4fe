"""``esper dashboard``: the pages of runs, renewed while they go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.console import print_json
from esper.cli.options import AsJson
from esper.cli.outcome import one_line_errors


def dashboard(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, or their events.jsonl."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port to listen at; 0 takes a free one.")
    ] = 8080,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Show runs in a browser while they go on, or as they went, until it is stopped.

    A folder need not be there yet. Anyone who reaches the address may look.
    """
    with one_line_errors():
        from esper.observability.live_page import WatchedRun
        from esper.observability.run_folder import EVENTS_FILE
        from esper.services.registry_server import address_of, serve_runs

        watched = [
            WatchedRun(str(path), path if path.suffix == ".jsonl" else path / EVENTS_FILE)
            for path in runs
        ]

        def listens(port: int) -> None:
            address = address_of(host, port)
            if as_json:
                print_json({"address": address, "runs": [run.name for run in watched]})
            typer.echo(f"showing {len(watched)} run(s) on {address}", err=True)

        serve_runs(watched, host=host, port=port, on_listening=listens)
