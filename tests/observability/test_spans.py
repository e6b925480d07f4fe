"""What a run tells a collector of traces, over HTTP."""

import logging
import random
from dataclasses import replace

import pytest
from collectors import collecting
from told_runs import told_run

from esper.bus.in_process import EventBus
from esper.contracts import events
from esper.observability.spans import MOST_KEPT, REST_S, Collector, OpenTelemetrySink
from esper.resilience.clock import ManualClock, MonotonicClock
from esper.services.settings import read_environment

pytestmark = pytest.mark.network


def told(sink, happened):
    for event in happened:
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


def a_kernel(what_is_done):
    """Yield a run of one kernel, of which what was done to it is told, and how it began and ended.

    Times are chosen: it is compiled for 2 s, loaded for 1 s and probed for 4 s; a fetch that came
    to an end just before took 8 s.
    """

    def at(time_s):
        return {"update": 7, "time_s": time_s, "run_id": "0" * 32, "seq": int(time_s)}

    kernel = {"site": "a", "blueprint": "mlp"}
    yield events.RunStarted(**at(0.0), settings={})
    if "fetch" in what_is_done:
        yield events.KernelPrepared(**at(9.0), what="fetch", artifact_id="b" * 64, took_s=8.0)
    yield events.Ranked(**at(10.0), rows=[])
    for what, time_s in (("compile", 12.0), ("load", 13.0), ("probe", 17.0)):
        if what in what_is_done:
            yield events.KernelPrepared(**at(time_s), **kernel, what=what)
    yield events.StageChanged(
        **at(18.0),
        **kernel,
        graft=1,
        seed_idx=0,
        artifact_id="b" * 64,
        before="",
        after="germinated",
        reason="first",
    )
    yield events.RunEnded(**at(20.0), grafts_admitted=0, grafts_fossilized=0, reason="done")


def spans_of(told_events):
    with collecting() as server:
        told(OpenTelemetrySink(Collector(endpoint=server.endpoint)), told_events)
    return {name: span for name, (span,) in server.spans.items()}


def seconds_of(span):
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_fetch_compile_load_and_probe_are_spans_by_themselves():
    """Each as long as it took; what the run did itself is inside of its kernel's span."""
    spans = spans_of(a_kernel(("fetch", "compile", "load", "probe")))
    took = {"fetch": 8.0, "compile": 2.0, "load": 1.0, "probe": 4.0, "kernel": 8.0}
    for name, seconds in took.items():
        assert seconds_of(spans[f"esper.{name}"]) == pytest.approx(seconds, abs=1e-3), name
    inside = {spans[f"esper.{name}"].parent_span_id for name in ("compile", "load", "probe")}
    assert inside == {spans["esper.kernel"].span_id}
    assert spans["esper.fetch"].parent_span_id == spans["esper.run"].span_id
    assert attributes_of(spans["esper.load"])["esper.blueprint"] == "mlp"


def test_control_a_run_that_does_not_tell_them_has_the_kernels_span_alone():
    """As of a log that was written before they were told."""
    spans = spans_of(a_kernel(()))
    assert spans.keys() == {"esper.run", "esper.decision", "esper.kernel"}
    assert seconds_of(spans["esper.kernel"]) == pytest.approx(8.0, abs=1e-3)


def test_a_kernel_that_failed_ends_with_what_it_failed_at():
    """And the one after it has a span of its own."""
    *before, compiled, loaded, probed, germinated, ended = a_kernel(("compile", "load", "probe"))
    refused = replace(loaded, done=False)
    with collecting() as server:
        sink = OpenTelemetrySink(Collector(endpoint=server.endpoint))
        told(sink, [*before, compiled, refused, compiled, loaded, probed, germinated, ended])
    first, second = server.spans["esper.kernel"]
    assert attributes_of(first)["esper.done"] is False
    assert "esper.graft" not in attributes_of(first)
    assert attributes_of(second)["esper.graft"] == 1
    assert len(server.spans["esper.compile"]) == len(server.spans["esper.load"]) == 2


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
        *before, last = told_run(3)
        told(sink, before)
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
