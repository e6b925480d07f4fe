"""``esper dashboard``: the page of runs in a browser, while they go on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from esper.cli.console import print_json
from esper.cli.options import AsJson
from esper.cli.outcome import EXIT_STOPPED, one_line_errors
from esper.cli.watching import LATEST, place_of
from esper.contracts.errors import EsperError

if TYPE_CHECKING:
    from esper.observability.followed_run import EventTail
    from esper.services.settings import Environment


def dashboard(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Folders of runs or their events.jsonl, which need not be there yet; on a bus "
            "their ids, or `latest`.",
        ),
    ] = None,
    bus: Annotated[
        str | None, typer.Option("--bus", metavar="URL", help="redis://, rediss:// or unix://")
    ] = None,
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
    with one_line_errors() as environment:
        try:
            from esper.server.dashboard import dashboard_server
            from esper.server.running import listen
        except ModuleNotFoundError as error:
            msg = "the dashboard needs its extra: pip install 'esper-morph[server]'"
            raise EsperError(msg) from error
        from esper.observability.live_page import LivePage
        from esper.resilience.clock import MonotonicClock
        from esper.services.registry_server import address_of

        named = runs or [LATEST]
        page = LivePage([_place(run, bus, environment) for run in named], MonotonicClock())
        with listen(host, port) as listener:
            address = address_of(host, listener.getsockname()[1])
            if as_json:
                print_json({"address": address})
            typer.echo(f"showing {', '.join(named)} on {address}", err=True)
            dashboard_server(page, host=host).run(sockets=[listener])
        raise typer.Exit(EXIT_STOPPED)


def _place(run: str, bus: str | None, environment: Environment) -> Path | EventTail:
    """Return the folder of a run, or the tail of its events on a bus."""
    place = place_of(run, bus, environment)
    if isinstance(place, Path):
        return place
    from esper.bus.redis_tail import RunTail

    return RunTail(place.url, place.run_id)
