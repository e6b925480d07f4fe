"""What the layers tell reaches each sink; the control is the same run without it."""

import io
import logging

import pytest
from accelerate import tracking
from collectors import collecting

from esper.contracts import events
from esper.integrations.trackers import TrackerSink
from esper.observability.event_log import EventLog
from esper.observability.logs import LoggingSink
from esper.observability.prometheus import PrometheusSink
from esper.observability.spans import Collector, OpenTelemetrySink

AT = {"update": 5, "time_s": 1.0, "run_id": "0" * 32, "seq": 1}
SEED = {"site": "a", "seed_idx": 0}
TOLD = [
    events.SeedMeasured(**AT, **SEED, state="active", latency_us=3.0),
    events.SeedMoved(**AT, **SEED, before="active", after="error_isolated"),
    events.Retried(**AT, what="registry", outcome="recovered"),
    events.BreakerMoved(**AT, name="registry", before="closed", after="open"),
    events.KernelQuarantined(**AT, artifact_id="b" * 64),
    events.KernelEmbargoed(**AT, artifact_id="b" * 64),
    events.AnomalySeen(**AT, **SEED, what="latency", value=9.0, usual=1.0, limit=3.0),
    events.HealthChanged(**AT, site="a", healthy=False),
]


def run(told):
    at = {"time_s": 2.0, "run_id": "0" * 32}
    yield events.RunStarted(update=0, seq=0, settings={}, **at)
    yield from told
    yield events.RunEnded(
        update=9, seq=2, reason="done", grafts_admitted=0, grafts_fossilized=0, **at
    )


def publish(sink, told):
    for event in run(told):
        sink.publish(event)


def in_a_log(told, tmp_path, caplog):
    log = EventLog(tmp_path / f"{len(told)}.jsonl")
    publish(log, told)
    log.close()
    return (tmp_path / f"{len(told)}.jsonl").read_text()


def in_logging(told, tmp_path, caplog):
    caplog.clear()
    with caplog.at_level(logging.INFO, "esper.events"):
        publish(LoggingSink(), told)
    return " ".join(record.esper_kind for record in caplog.records)


def in_prometheus(told, tmp_path, caplog):
    from prometheus_client import generate_latest

    sink = PrometheusSink(port=0, host="127.0.0.1")
    publish(sink, told)
    text = generate_latest(sink.registry).decode()
    sink.close()
    return " ".join(line for line in text.splitlines() if not line.endswith(" 0.0"))


def in_traces(told, tmp_path, caplog):
    with collecting() as server:
        publish(OpenTelemetrySink(Collector(endpoint=server.endpoint)), told)
        (span,) = server.spans["esper.run"]
    return " ".join(event.name for event in span.events)


class Wandb(tracking.GeneralTracker):
    name = "wandb"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.out = io.StringIO()

    @property
    def tracker(self):
        return self

    def log(self, values, step=None, **_):
        self.out.write(f"{values} ")


def in_a_tracker(told, tmp_path, caplog):
    tracker = Wandb()
    publish(TrackerSink(tracker), told)
    return tracker.out.getvalue()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("seen", [in_a_log, in_logging, in_prometheus, in_traces, in_a_tracker])
@pytest.mark.parametrize("event", TOLD, ids=lambda event: event.kind)
def test_it_is_at_the_sink_and_without_it_is_not(event, seen, tmp_path, caplog):
    """A figure of a seed is no moment: traces and words leave it to those that have curves."""
    is_left_out = event.kind == "seed_measured" and seen in (in_traces, in_a_tracker)
    assert (event.kind in seen([event], tmp_path, caplog)) != is_left_out
    assert event.kind not in seen([], tmp_path, caplog)
