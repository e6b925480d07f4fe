"""``esper watch``: what happens in a run, line by line, from its log or from a bus."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from esper.cli.options import AsJson
from esper.cli.outcome import EXIT_STOPPED, answers
from esper.contracts.errors import EsperError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.contracts.events import Event
    from esper.services.settings import Environment

ENVIRONMENT: Final = "Environment: ESPER_BUS_URL stands for --bus."
LATEST: Final = "latest"
_LOOKS_EVERY_S: Final = 0.2


def watch(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run's folder or events.jsonl; on a bus its id, or `latest`.",
        ),
    ] = LATEST,
    bus: Annotated[
        str | None, typer.Option("--bus", metavar="URL", help="redis://, rediss:// or unix://")
    ] = None,
    follow: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool, typer.Option(help="Wait for what is still to come, until the run ends.")
    ] = True,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Follow a run from another terminal or machine; exits when it ends.

    A folder need not be there yet. With --json each event is a line as in the log.
    """
    with answers() as environment:
        from esper.contracts.events import RunEnded, event_to_json
        from esper.observability.sentences import sentence_of

        for event in _events(run, bus, environment, follow=follow):
            text = f"{event.update:>7}  {sentence_of(event)}"
            typer.echo(event_to_json(event) if as_json else text)
            if isinstance(event, RunEnded):
                return
        if follow:
            raise typer.Exit(EXIT_STOPPED)


def _events(
    run: str, bus: str | None, environment: Environment, *, follow: bool
) -> Iterator[Event]:
    """Yield the events of what a command names: a path that is there, or a run on a bus."""
    from esper.bus.redis_streams import follow as follow_bus
    from esper.bus.redis_streams import latest_run
    from esper.observability.event_log import follow_log
    from esper.observability.run_folder import EVENTS_FILE

    path, address = Path(run), bus or environment.bus_url
    if bus is None and (path.exists() or address is None or "/" in run):
        if run == LATEST and not path.exists():
            msg = "which run? name its folder, or a bus with --bus URL or ESPER_BUS_URL"
            raise EsperError(msg)
        log = path if path.suffix == ".jsonl" else path / EVENTS_FILE
        if not (follow or log.exists()):
            raise FileNotFoundError(2, "No such file or directory", str(log))
        return follow_log(log, goes_on=lambda: follow, pause=lambda: time.sleep(_LOOKS_EVERY_S))
    assert address is not None, "looked at above"
    run_id = latest_run(address) if run == LATEST else run
    return follow_bus(address, run_id, goes_on=lambda: follow)
