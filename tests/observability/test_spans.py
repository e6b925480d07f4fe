"""What a run tells a collector of traces, over HTTP."""

import logging
import random

import pytest
from collectors import collecting
from told_runs import told_run

from esper.bus.in_process import EventBus
from esper.observability.spans import MOST_KEPT, REST_S, Collector, OpenTelemetrySink
from esper.resilience.clock import ManualClock, MonotonicClock
from esper.services.settings import read_environment

pytestmark = pytest.mark.network


def told(sink, events):
    for event in events:
        sink.publish(event)
    return sink


def attributes_of(span):
    return {
        a.key: getattr(a.value, a.value.WhichOneof("value"))
        for a in span.attributes
        if a.value.WhichOneof("value") != "array_value"
    }


def test_spans_are_made_of_events():
    """Decision, trial, gate and holding are inside the run's span, with their times and words."""
    with collecting() as server:
        sink = told(OpenTelemetrySink(Collector(endpoint=server.endpoint)), told_run(2))
    spans = server.spans
    (run,) = spans["esper.run"]
    assert {name: len(found) for name, found in spans.items()} == {
        "esper.run": 1,
        "esper.decision": 2,
        "esper.kernel": 4,
        "esper.trial": 2,
        "esper.holding": 1,
        "esper.gate": 2,
    }
    children = [s for name, found in spans.items() if name != "esper.run" for s in found]
    assert {s.parent_span_id for s in children} == {run.span_id}
    assert sink.num_sent == len(children) + 1
    trial = spans["esper.trial"][0]
    assert trial.end_time_unix_nano - trial.start_time_unix_nano == pytest.approx(5e8, abs=1e6)
    said = attributes_of(trial)
    assert (said["esper.verdict"], said["esper.effect"]) == ("taken over", 0.5)
    assert "esper.seed_faulted" in {event.name for event in run.events}


def test_the_standards_variables_say_where_to():
    """Endpoint, headers, compression and the service's name are those of OpenTelemetry."""
    with collecting() as server:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": server.endpoint.removesuffix("/v1/traces"),
            "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20abc,x-team = growth",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        }
        told(OpenTelemetrySink(read_environment(variables).collector), told_run())
    assert {(h["authorization"], h["x-team"]) for h in server.headers} == {("Bearer abc", "growth")}
    (resource, *_) = [r for request in server.requests for r in request.resource_spans]
    (name,) = [a for a in resource.resource.attributes if a.key == "service.name"]
    assert name.value.string_value == "esper"
    assert read_environment({}).collector is None


def test_a_collector_that_fails_is_left_alone_and_asked_again(caplog):
    """It is asked once, warned of once without its password, and then has everything."""
    clock = ManualClock()
    with collecting(500) as server, caplog.at_level(logging.WARNING):
        endpoint = server.endpoint.replace("http://", "http://ann:secret@")
        sink = OpenTelemetrySink(Collector(endpoint=endpoint), clock=clock)
        *events, last = told_run(3)
        told(sink, events)
        assert (len(server.requests), sink.num_sent) == (1, 0)
        server.status = 200
        clock.advance(REST_S)
        told(sink, [last])
        assert sink.num_sent == sum(map(len, server.spans.values())) - 1  # the first came twice
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "it answered 500" in caplog.text
    assert "secret" not in caplog.text


def test_what_is_kept_for_a_collector_has_an_end():
    """One that never answers costs no more memory than a number of spans."""
    sink = OpenTelemetrySink(Collector(endpoint="http://127.0.0.1:9/v1/traces"))
    told(sink, told_run(700))
    assert sink.num_sent == 0
    assert sink.num_dropped > 0
    assert len(sink._ended) == MOST_KEPT


def test_no_random_number_of_the_training_is_drawn():
    """Python's own generator stands where it stood, whether the collector answers or not."""
    for status in (200, 500):
        with collecting(status) as server:
            before = random.getstate()
            told(OpenTelemetrySink(Collector(endpoint=server.endpoint)), told_run())
            assert random.getstate() == before


def end_of(sink):
    """Return how many seconds the end of a run takes that is told to a sink which hangs."""
    bus, clock = EventBus([sink]), MonotonicClock()
    for event in told_run():
        bus.publish(event)
    start_s = clock.now()
    bus.flush(0.3)
    if hasattr(sink, "shutdown"):
        sink.shutdown()
    return clock.now() - start_s


@pytest.mark.slow
def test_a_collector_that_hangs_does_not_hold_the_end():
    """What is waited for at the end is what the end of a run has."""
    with collecting(None) as server:
        assert end_of(OpenTelemetrySink(Collector(endpoint=server.endpoint))) < 1.5


@pytest.mark.slow
def test_control_the_kits_own_shutdown_holds_it():
    """OpenTelemetry's own processor and exporter wait for as long as their timeout."""
    with collecting(None) as server:
        assert end_of(OwnShutdown(server.endpoint)) > 1.2


class OwnShutdown:
    """A sink as the documents of OpenTelemetry have it."""

    def __init__(self, endpoint):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider(shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=1.5)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("control")

    def publish(self, event):
        with self._tracer.start_as_current_span(event.kind):
            pass

    def shutdown(self):
        self._provider.shutdown()
