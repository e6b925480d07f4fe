"""What the layers and the sources of a run tell reaches each sink; the control publishes nothing.

One run in which everything happens is told to all sinks at once, as a run tells them.
"""

from __future__ import annotations

import io
import json
import logging
import re
from contextlib import ExitStack

import pytest
import torch
from accelerate import tracking
from bad_kernels import BadKernel
from collectors import collecting
from growing import growing, host, train
from live_pages import Reader, Watched
from torch import nn

pytest.importorskip("redis", reason="needs the extra redis")

from redis_servers import redis_server

import esper
from esper.bus.redis_streams import RedisSink, follow, latest_run
from esper.bus.redis_tail import RunTail
from esper.contracts.errors import KernelNotFoundError, KernelSourceUnavailable
from esper.fetching.enhanced_kernel_cache import EnhancedKernelCache
from esper.integrations.trackers import TrackerSink
from esper.observability.logs import LoggingSink
from esper.observability.prometheus import PrometheusSink
from esper.observability.spans import Collector, OpenTelemetrySink
from esper.resilience.health_monitor import HealthLimits
from esper.seeds import maintenance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.filterwarnings("ignore:nothing can grow"),
]

OF_SEEDS = ("seed_measured", "seed_moved", "retried", "anomaly_seen", "health_changed")
OF_SOURCES = ("breaker_moved", "kernel_quarantined", "kernel_embargoed")
SINKS = (
    "events.jsonl",
    "logging",
    "Prometheus",
    "traces",
    "a tracker",
    "Redis",
    "the live page",
    "the live page of a bus",
)
DIGESTS = ("ab" * 32, "cd" * 32)


class Failing:
    """A source that has nothing of one kernel, and does not answer for all others."""

    def fetch(self, digest):
        if digest == DIGESTS[0]:
            raise KernelNotFoundError(digest)
        raise KernelSourceUnavailable("nobody answers")


class Wandb(tracking.GeneralTracker):
    """Keeps what it is told, words and numbers."""

    name = "wandb"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.out = io.StringIO()

    @property
    def tracker(self):
        return self

    def log(self, values, step=None, **_):
        self.out.write(f"{' '.join(map(str, values))} ")


def everything_happens(folder, sinks):
    """Train a run whose kernel and source go wrong in each way, and come right again."""
    source = Failing()
    model = esper.wrap(host(), source=source)
    kernel = BadKernel(nn.Linear(4, 4), "nan")
    model[0].graft(0, kernel, alpha=0.5)
    model[0].health_monitor.limits = HealthLimits(error_rate=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cache = EnhancedKernelCache(source=source, quarantine_after=1)
    options = {"policy": esper.Never(), "sink": esper.EventBus(sinks), "run_dir": folder}
    with growing(model, optimizer, **options) as grower:
        train(model, optimizer, 260, grower)
        cache.load_kernel_sync(DIGESTS[0])
        cache.record_failure(DIGESTS[1], "NaN")
        cache.release(DIGESTS[1])
        for _ in range(6):
            with pytest.raises(KernelSourceUnavailable):
                cache.load_kernel_sync(DIGESTS[1])
        for is_bad in (True, False) * 4:  # seldom enough in a row not to be isolated at once
            kernel.is_bad = is_bad
            train(model, optimizer, 1 if is_bad else 12, grower)
        kernel.is_bad = True
        train(model, optimizer, 4, grower)
        kernel.is_bad = False
        train(model, optimizer, 60, grower)


def told_at_every_sink(tmp_path, caplog):
    """Return the kinds that each sink has to show, by its name, after a run."""
    from prometheus_client import generate_latest

    tracker = Wandb()
    with ExitStack() as open_:
        redis, collector = open_.enter_context(redis_server()), open_.enter_context(collecting())
        prometheus = open_.enter_context(PrometheusSink(port=0, host="127.0.0.1"))
        traces = OpenTelemetrySink(Collector(endpoint=collector.endpoint))
        open_.enter_context(caplog.at_level(logging.INFO, "esper.events"))
        bus = RedisSink(redis.url)
        sinks = [prometheus, traces, LoggingSink(), TrackerSink(tracker), bus]
        everything_happens(tmp_path / "run", sinks)
        bus.close()
        series = generate_latest(prometheus.registry).decode().splitlines()
        numbers = " ".join(line for line in series if not line.endswith(" 0.0"))
        run_id = latest_run(redis.url)
        spans = collector.spans
        pages = {
            name: Reader().take(Watched(place).look().since("")).shown
            for name, place in (
                ("the live page", tmp_path / "run"),
                ("the live page of a bus", RunTail(redis.url, run_id)),
            )
        }
        of_bus = {event.kind for event in follow(redis.url, run_id, goes_on=lambda: False)}
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    kinds = {json.loads(line)["kind"] for line in lines}
    in_run = {event.name.removeprefix("esper.") for event in spans["esper.run"][0].events}
    return {
        "events.jsonl": kinds,
        "logging": {getattr(record, "esper_kind", "") for record in caplog.records},
        "Prometheus": set(
            re.findall(r'kind="(\w+)"', "".join(n for n in numbers if n[-4:] != " 0.0"))
        ),
        "traces": in_run | ({"seed_measured"} if "esper.seed" in spans else set()),
        "a tracker": set(re.findall(r"esper/(\w+)", tracker.out.getvalue())),
        "Redis": of_bus,
        **{name: shown_on(page) for name, page in pages.items()},
    }


WORDS = {
    "seed_measured": "Seeds at work",
    "seed_moved": "active to error_recovery|error_recovery to active",
    "retried": "probe recovered",
    "anomaly_seen": "its error rate is",
    "health_changed": "(un)?healthy: |it is within its limits again",
    "breaker_moved": "the breaker of .* is open",
    "kernel_quarantined": f"kernel {DIGESTS[1][:12]} (is in|was released from) quarantine",
    "kernel_embargoed": f"kernel {DIGESTS[0][:12]} is not asked for",
}
"""What the page says of each kind."""


def shown_on(page):
    return {kind for kind, words in WORDS.items() if re.search(words, page)}


def publishing(monkeypatch, *, of_seeds, of_sources):
    """Take the publish away where it is made: of the layers, or of the sources of kernels."""
    if not of_seeds:
        silent = maintenance.maintain_layers
        monkeypatch.setattr(
            "esper.growth.grower.maintain_layers", lambda layers, **_: silent(layers)
        )
    if not of_sources:
        for room in ("kernel_cache", "enhanced_kernel_cache", "breaker_source", "error_recovery"):
            monkeypatch.setattr(f"esper.fetching.{room}.announce", lambda source, event: None)


def test_each_kind_is_at_each_sink(tmp_path, caplog):
    """Eight kinds at eight sinks."""
    told = told_at_every_sink(tmp_path, caplog)
    assert tuple(told) == SINKS
    missing = {
        (kind, sink) for kind in OF_SEEDS + OF_SOURCES for sink in SINKS if kind not in told[sink]
    }
    assert missing == set()


@pytest.mark.parametrize(
    ("of_seeds", "of_sources", "silent"),
    [(False, True, OF_SEEDS), (True, False, OF_SOURCES)],
    ids=["layers", "sources"],
)
def test_control_without_the_publish_no_sink_has_it(
    tmp_path, caplog, monkeypatch, of_seeds, of_sources, silent
):
    """The same run, in which the layers, or the sources, tell nobody."""
    publishing(monkeypatch, of_seeds=of_seeds, of_sources=of_sources)
    told = told_at_every_sink(tmp_path, caplog)
    assert {(kind, sink) for kind in silent for sink in SINKS if kind in told[sink]} == set()
    others = set(OF_SEEDS + OF_SOURCES) - set(silent)
    assert all(others <= told[sink] for sink in SINKS)
