"""What a run shows to Prometheus."""

import logging
import subprocess
import sys
from dataclasses import replace

import httpx2
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from real_servers import free_ports
from told_runs import told_run

from esper.observability.measures import FAMILIES, MOST_METRICS, OTHER, Change, Family, Tally
from esper.observability.prometheus import PrometheusSink

pytestmark = pytest.mark.network

MOST_SERIES = 300


def samples_of(sink):
    text = generate_latest(sink.registry).decode()
    return [s for family in text_string_to_metric_families(text) for s in family.samples]


def value(samples, name, **labels):
    (found,) = [s.value for s in samples if s.name == name and s.labels == labels]
    return found


def told(sink, events):
    for event in events:
        sink.publish(event)
    return samples_of(sink)


def test_a_page_shows_what_happened():
    """Gauges are as they are now, what only rises ends in _total, and both are at the port."""
    with PrometheusSink(0, "127.0.0.1") as sink:
        told(sink, told_run(2))
        page = httpx2.get(f"http://127.0.0.1:{sink.port}/metrics", trust_env=False).text
    found = [s for family in text_string_to_metric_families(page) for s in family.samples]
    assert value(found, "esper_gate_loss") == 0.5
    assert value(found, "esper_metric", metric="accuracy") == 0.5
    assert value(found, "esper_trials_total", verdict="taken over") == 1
    assert value(found, "esper_trials_total", verdict="refused") == 1
    assert value(found, "esper_work_flops_total") == 2e9
    assert value(found, "esper_seed_faults_total") == 6
    assert value(found, "esper_grafts", stage="trial") == 4
    assert value(found, "esper_grafts", stage="germinated") == 0
    assert value(found, "esper_updates_lost_total") == 5
    assert value(found, "esper_run_active") == 0


def test_what_has_not_happened_is_shown_as_nothing_yet():
    """A rate can be taken of every closed word from the first scrape on."""
    found = samples_of(PrometheusSink())
    assert value(found, "esper_takeovers_total", taken="null") == 0
    assert value(found, "esper_gates_total", gate="admission", passed="no") == 0


def test_a_thousand_grafts_make_no_more_series():
    """After 1,000 grafts at as many sites there are at most 300, no label a site or digest."""
    found = told(PrometheusSink(), told_run(500))
    assert len(found) <= MOST_SERIES
    assert value(found, "esper_events_total", kind="stage_changed") == 2000
    words = {word for sample in found for word in sample.labels.values()}
    assert not any(word.startswith("layer.") or len(word) >= 32 for word in words)


def test_control_a_site_as_a_label_makes_more():
    """A family that had the site as a label would break the limit."""
    family = Family(name="grafts_at", text="Grafts.", labels=("site",))
    tally = Tally([*FAMILIES, family])
    sink = PrometheusSink(tally=tally)
    for event in told_run(500):
        for site in getattr(event, "sites", ()):
            tally.count([Change("grafts_at", 1, (site,))])
    assert len(samples_of(sink)) > MOST_SERIES


def test_words_and_names_without_end_are_kept_out():
    """A policy's own word is another, and of an owner's metrics the first forty are shown."""
    sink = PrometheusSink()
    for event in told_run():
        if event.kind == "detected":
            for number in range(1_000):
                sink.publish(replace(event, verdict=f"rule {number}"))
        if event.kind == "evaluated":
            for number in range(1_000):
                sink.publish(replace(event, metrics={f"m{number}": 1.0}))
    found = samples_of(sink)
    assert value(found, "esper_decisions_total", verdict=OTHER) == 1_000
    assert sum(s.name == "esper_metric" for s in found) == MOST_METRICS
    assert len(found) <= MOST_SERIES


def test_a_port_that_is_taken_is_one_warning(caplog):
    """The second run on a machine has no page, says so once, and goes on."""
    with PrometheusSink(0, "127.0.0.1") as first, caplog.at_level(logging.WARNING):
        with PrometheusSink(first.port, "127.0.0.1") as second:
            assert second.port is None
            told(second, told_run())
        (said,) = [r.message for r in caplog.records]
        assert said.startswith(f"metrics are not shown at port {first.port}: Address already in")


RANK = """
import sys
from pathlib import Path
from esper.observability.prometheus import PrometheusSink
from esper.services.settings import read_environment
from esper.services.sinks import sinks_of
variables = {"ESPER_METRICS_PORT": sys.argv[1]} | ({"RANK": sys.argv[2]} if sys.argv[2] else {})
sinks = sinks_of(read_environment(variables), folder=Path("runs"))
print("ready", flush=True)
sys.stdin.read()
sinks.close()
"""


def ranks(port, names):
    """Start a process for each rank, all at once; return what they wrote as warnings."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(port), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    page = httpx2.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    assert "esper_run_active" in page
    return [process.communicate()[1] for process in started]


@pytest.mark.slow
def test_eight_ranks_never_clash_over_a_port():
    """Only the first of eight shows its metrics, and no other says a word."""
    assert ranks(free_ports(1)[0], map(str, range(8))) == [""] * 8


@pytest.mark.slow
def test_control_processes_that_do_not_know_their_rank_clash():
    """Two that both think they are the first want the same port, and one warns."""
    said = ranks(free_ports(1)[0], ["", ""])
    assert sum("are not shown at port" in text for text in said) == 1
