"""``esper dashboard``: the page of runs in a browser, while they go on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.console import print_json
from esper.cli.options import AsJson
from esper.cli.outcome import EXIT_STOPPED, one_line_errors
from esper.contracts.errors import EsperError


def dashboard(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of runs, or their events.jsonl; they need not be there yet.",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port to listen at; 0 takes a free one.")
    ] = 8050,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Serve the page of runs while they go on, several beside each other; Ctrl-C ends it.

    Whoever reaches the address can read the page: it is this machine's alone unless --host says
    otherwise. With --json the address is printed once it listens.
    """
    with one_line_errors():
        try:
            from esper.server.dashboard import dashboard_server
            from esper.server.running import listen
        except ModuleNotFoundError as error:
            msg = "the dashboard needs its extra: pip install 'esper-morph[server]'"
            raise EsperError(msg) from error
        from esper.observability.live_page import LivePage
        from esper.resilience.clock import MonotonicClock
        from esper.services.registry_server import address_of

        page = LivePage(runs, MonotonicClock())
        with listen(host, port) as listener:
            address = address_of(host, listener.getsockname()[1])
            if as_json:
                print_json({"address": address})
            typer.echo(f"showing {', '.join(map(str, runs))} on {address}", err=True)
            dashboard_server(page, host=host).run(sockets=[listener])
        raise typer.Exit(EXIT_STOPPED)
