"""A run's numbers for Prometheus, at a port of the process; needs the extra ``metrics``."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, ClassVar, Final, Self, final

from esper.contracts.errors import EsperError
from esper.observability.measures import Tally

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

    from esper.contracts.events import Event

_LOG = logging.getLogger(__name__)

EVERY_ADDRESS: Final = "0.0.0.0"  # noqa: S104 - a port that somebody named is there to be scraped


class PrometheusSink:
    """Counts what happens, and shows it to a Prometheus that asks.

    It has a registry of its own, so that nothing of it mixes with what the process measures
    besides; a process that has a page of metrics adds ``registry`` to it. A port that is taken
    costs one warning and the page, never the run. No label is a site, a digest or a run, so that
    the number of series stays small however much a run grows.

    Args:
        port: Port of the page, from 0, which takes a free one; None shows none.
        host: Address that the page is shown at; by default all of the machine.
        tally: Keeps the numbers; one of its own by default.

    Raises:
        EsperError: The extra is not installed.

    Attributes:
        registry: What is shown, for ``prometheus_client``.
        port: Port of the page; None where there is none.
    """

    never_waits: ClassVar[bool] = True

    def __init__(
        self, port: int | None = None, host: str = EVERY_ADDRESS, *, tally: Tally | None = None
    ) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ModuleNotFoundError as error:
            msg = "metrics need the extra: pip install 'esper-morph[metrics]'"
            raise EsperError(msg) from error
        self._tally = Tally() if tally is None else tally
        self.registry: CollectorRegistry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Collector(self._tally))
        self._server = None if port is None else self._listen(port, host)
        self.port: int | None = None if self._server is None else self._server.server_port

    def publish(self, event: Event) -> None:
        """Count one event."""
        self._tally.take(event)

    def close(self) -> None:
        """Take the page away. Closing twice does nothing."""
        server, self._server, self.port = self._server, None, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _listen(self, port: int, host: str) -> WSGIServer | None:
        from prometheus_client import start_http_server

        try:
            server, _ = start_http_server(port, host, self.registry)
        except OSError as error:
            _LOG.warning(
                "metrics are not shown at port %d: %s; the run goes on without",
                port,
                error.strerror or error,
            )
            return None
        server.handle_error = _say_nothing  # type: ignore[method-assign, assignment] # it takes both
        return server


def _say_nothing(_: object, client_address: object) -> None:
    """Keep quiet about a request that broke off, which the standard library would print."""
    _LOG.debug("a request of %s broke off: %s", client_address, sys.exc_info()[1])


@final
class _Collector:
    """The numbers of a tally, as families of Prometheus."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def describe(self) -> list[Metric]:
        """Say nothing beforehand: no other collector is in the registry."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        for family, values in self._tally.rows():
            made = CounterMetricFamily if family.counts else GaugeMetricFamily
            found = made(f"esper_{family.name}", family.text, labels=family.labels)
            for labels, value in values.items():
                found.add_metric(labels, value)
            yield found
