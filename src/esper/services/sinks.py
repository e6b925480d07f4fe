"""Where a run of a command is told besides its log: a bus, trackers, metrics, traces, logging."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, final

from esper.bus.in_process import EventBus
from esper.bus.redis_streams import RedisSink
from esper.observability.logs import LoggingSink
from esper.observability.prometheus import PrometheusSink
from esper.observability.spans import OpenTelemetrySink
from esper.resilience.clock import MonotonicClock

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from esper.contracts.events import Event
    from esper.contracts.ports import EventSink
    from esper.services.settings import Environment

CLOSING_S: Final = 4.0
"""Seconds that the end of a run gives all sinks together."""


class RunSinks:
    """The sinks of a run, each beside the others; none can hold the run, nor its end.

    Args:
        sinks: What takes the events.
    """

    def __init__(self, sinks: Iterable[EventSink]) -> None:
        self._sinks = list(sinks)
        self._bus = EventBus(self._sinks)

    def beside(self, sink: EventSink | None) -> EventSink | None:
        """Return one sink for these and the owner's own; None where there is none at all.

        The run does not wait for it at its end: :meth:`close` does, for all of them together.
        """
        if not self._sinks:
            return sink
        if sink is not None:
            self._bus.subscribe(sink)
        return _Beside(self._bus)

    def close(self) -> None:
        """Let the sinks catch up, for a few seconds in all, and end what they have opened."""
        clock = MonotonicClock()
        until_s = clock.now() + CLOSING_S
        for sink in self._sinks:
            if isinstance(sink, RedisSink):
                sink.close()
        self._bus.flush(max(0.0, until_s - clock.now()))
        for sink in self._sinks:
            if isinstance(sink, PrometheusSink):
                sink.close()


@final
class _Beside:
    """A bus that nobody but its owner asks to catch up."""

    never_waits: ClassVar[bool] = True

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus

    def publish(self, event: Event) -> None:
        """Hand an event to every sink of the bus."""
        self._bus.publish(event)


def sinks_of(environment: Environment, *, report_to: Iterable[str] = (), folder: Path) -> RunSinks:
    """Return the sinks that a command and the environment name.

    Args:
        environment: What the process was given.
        report_to: Trackers that the command names, in place of the environment's.
        folder: Where trackers that write files do.

    Raises:
        EsperError: A tracker is not known or not installed, or an extra is not.
        ValueError: The address of the bus is none.
    """
    if environment.rank != 0:
        return RunSinks([])
    sinks: list[EventSink] = [LoggingSink()]
    names = tuple(report_to) or environment.report_to
    if names:
        from esper.integrations.trackers import tracker_sinks  # torch comes with it

        sinks += tracker_sinks(names, folder=folder)
    if environment.collector is not None:
        sinks.append(OpenTelemetrySink(environment.collector))
    if environment.metrics_port is not None:
        sinks.append(PrometheusSink(environment.metrics_port))
    if environment.bus_url is not None:
        sinks.append(RedisSink(environment.bus_url))
    return RunSinks(sinks)
