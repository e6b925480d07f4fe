"""The route of what is measured, in the text form of Prometheus; needs the extra ``metrics``."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, final

from fastapi import APIRouter, Request, Response

from esper.server import answers
from esper.server.authority import Reader
from esper.server.kernels import registry_of
from esper.server.metering import BOUNDS_S
from esper.server.problems import problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from esper.registry.stored import StoredRegistry
    from esper.server.metering import Meter

router = APIRouter(tags=["upkeep"], responses=answers.REFUSALS)


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {}}, "description": "In the text form of Prometheus"},
        501: {**answers.REFUSALS[400], "description": "The extra `metrics` is not installed"},
    },
)
def metrics(request: Request, _: Reader) -> Response:
    """Return what is measured: requests, durations, bytes, kernels and jobs."""
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
    except ModuleNotFoundError:
        return problem(501, "metrics need the extra: pip install 'esper-morph[server,metrics]'")
    collected = CollectorRegistry(auto_describe=False)
    collected.register(_Collector(request.app.state.meter, registry_of(request)))
    return Response(generate_latest(collected), media_type=CONTENT_TYPE_PLAIN_0_0_4)


@final
class _Collector:
    """What is measured, as families of Prometheus."""

    def __init__(self, meter: Meter, registry: StoredRegistry) -> None:
        self._meter = meter
        self._registry = registry

    def describe(self) -> list[Metric]:
        """Say nothing beforehand: the registry is made for one answer."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        yield from self._of_requests()
        yield from self._of_stores()

    def _of_requests(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily

        meter = self._meter
        requests = CounterMetricFamily(
            "esper_requests", "Answers.", labels=("method", "route", "status")
        )
        for labels, count in list(meter.requests.items()):
            requests.add_metric(labels, count)
        yield requests
        durations = HistogramMetricFamily(
            "esper_request_seconds", "Seconds until an answer was sent.", labels=("route",)
        )
        ends = [*map(str, BOUNDS_S), "+Inf"]
        for route, counts in list(meter.buckets.items()):
            buckets = list(zip(ends, accumulate(counts), strict=True))
            durations.add_metric((route,), buckets, sum_value=meter.seconds[route])
        yield durations
        moved = CounterMetricFamily("esper_body_bytes", "Bytes of bodies.", labels=("direction",))
        moved.add_metric(("received",), meter.received_bytes)
        moved.add_metric(("sent",), meter.sent_bytes)
        yield moved

    def _of_stores(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import GaugeMetricFamily

        with self._registry.reporting("count what is kept"):
            num_kernels, size_bytes = self._registry.book.artifacts.totals()
            jobs = self._registry.book.jobs.totals()
        yield GaugeMetricFamily("esper_kernels", "Published kernels.", value=num_kernels)
        yield GaugeMetricFamily("esper_kernel_bytes", "Bytes of them.", value=size_bytes)
        by_status = GaugeMetricFamily("esper_jobs", "Blueprints to compile.", labels=("status",))
        for status, count in jobs.items():
            by_status.add_metric((status,), count)
        yield by_status
