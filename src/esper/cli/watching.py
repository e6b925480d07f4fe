"""``esper watch``: what happens in a run, line by line, from its log or from a bus."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, final

import typer

from esper.cli.console import printable
from esper.cli.options import AsJson
from esper.cli.outcome import EXIT_PROBLEM, EXIT_STOPPED, answers
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
    from_start: Annotated[  # noqa: FBT002 - typer makes an option of it
        bool, typer.Option("--from-start/--from-now", help="Print what was before, too.")
    ] = True,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Follow a run from another terminal or machine; exits when it ends.

    A folder need not be there yet. With --json each event is a line as in the log.
    """
    with answers() as environment:
        from esper.contracts.events import RunEnded, event_to_json
        from esper.observability.sentences import sentence_of

        watcher = _Watcher(follow=follow, from_start=from_start)
        for event in _events(run, bus, environment, watcher):
            if watcher.shows(event):
                text = " ".join(f"{event.update:>7}  {sentence_of(event)}".splitlines())
                _print(event_to_json(event) if as_json else printable(text))
            if isinstance(event, RunEnded):
                return
        if follow:
            raise typer.Exit(EXIT_STOPPED)
        if watcher.missing and not watcher.has_seen:
            typer.echo(f"esper: nothing is known of {watcher.missing}", err=True)
            raise typer.Exit(EXIT_PROBLEM)


@final
class _Watcher:
    """Who watches: whether there is more to come for him, and what he has to see.

    Args:
        follow: Whether he waits for what is still to come.
        from_start: Whether he wants what was before.

    Attributes:
        missing: What he waits for while there is nothing at all; empty where it is there.
        has_seen: Whether there was an event.
    """

    def __init__(self, *, follow: bool, from_start: bool) -> None:
        self.follow, self._shows, self.missing, self.has_seen = follow, from_start, "", False
        self._is_told = False

    def goes_on(self) -> bool:
        """Say whether to wait, where there is nothing more; once in words, where nothing was."""
        self._shows = True
        if self.follow and self.missing and not (self.has_seen or self._is_told):
            self._is_told = True
            typer.echo(f"esper: waiting for {self.missing}", err=True)
        return self.follow

    def shows(self, event: Event) -> bool:
        """Say whether an event is to be printed: what is new, and the end in any case."""
        self.has_seen = True
        return self._shows or event.kind == "run_ended"


def _print(text: str) -> None:
    """Print a line; where nobody reads any more, as behind ``head``, end without a word.

    Raises:
        typer.Exit: Nobody does.
    """
    try:
        typer.echo(text)
    except BrokenPipeError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says it at exit
        raise typer.Exit from error


def _events(
    run: str, bus: str | None, environment: Environment, watcher: _Watcher
) -> Iterator[Event]:
    """Yield the events of what a command names: a path that is there, or a run on a bus."""
    from esper.bus.redis_streams import follow as follow_bus
    from esper.bus.redis_streams import shown
    from esper.observability.event_log import follow_log
    from esper.observability.run_folder import EVENTS_FILE

    place = place_of(run, bus, environment)
    if isinstance(place, Path):
        log = place if place.suffix == ".jsonl" else place / EVENTS_FILE
        if not (watcher.follow or log.exists()):
            raise FileNotFoundError(2, "No such file or directory", str(log))
        watcher.missing = "" if log.exists() else str(log)
        return follow_log(log, goes_on=watcher.goes_on, pause=lambda: time.sleep(_LOOKS_EVERY_S))
    watcher.missing = f"the run {place.run_id} at {shown(place.url)}"
    return follow_bus(place.url, place.run_id, goes_on=watcher.goes_on)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnBus:
    """A run on a bus.

    Attributes:
        url: Address of the bus.
        run_id: The run.
    """

    url: str
    run_id: str


def place_of(run: str, bus: str | None, environment: Environment) -> Path | OnBus:
    """Return where the run is that a command names: a path, or a run on a bus.

    Args:
        run: As it was typed.
        bus: Address of a bus, where one was named.
        environment: Has the address of one, too.

    Raises:
        EsperError: It is ``latest`` and there is no bus, or none has been told to it.
    """
    from esper.bus.redis_streams import latest_run

    path, address = Path(run), bus or environment.bus_url
    if bus is None and (path.exists() or address is None or "/" in run):
        if run == LATEST and not path.exists():
            msg = "which run? name its folder, or a bus with --bus URL or ESPER_BUS_URL"
            raise EsperError(msg)
        return path
    assert address is not None, "looked at above"
    return OnBus(url=address, run_id=latest_run(address) if run == LATEST else run)
