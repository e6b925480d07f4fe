"""What happens to seeds between two steps is told, as events, at every sink."""

from collections import Counter

import pytest
import torch
from bad_kernels import BadKernel
from growing import compute_loss, evaluate, growing, train, wrapped
from torch import nn

import esper
from esper.contracts.errors import KernelSourceUnavailable
from esper.contracts.report import run_report_from_json
from esper.observability.event_log import read_events
from esper.observability.replay import replay
from esper.observability.report_page import run_page
from esper.resilience.health_monitor import HealthLimits
from esper.seeds import maintenance
from esper.state.layer_record import record_of


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.events = []

    def publish(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if event.kind == kind]


class Down:
    """A source that does not answer."""

    def fetch(self, digest):
        raise KernelSourceUnavailable("nobody answers")


NEVER = pytest.mark.filterwarnings("ignore:nothing can grow")


def layer_with(fault, **options):
    """Return a wrapped model whose first layer has a kernel that can go wrong, and the kernel."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    esper.wrap(model, **options)
    kernel = BadKernel(nn.Linear(4, 4), fault)
    model[0].graft(0, kernel, alpha=0.5)
    return model, kernel


def call(model, num_calls):
    """Call a model so often, a reading behind each call; return the events of the readings."""
    sink = Kept()
    for _ in range(num_calls):
        model(torch.ones(4, 4))
        esper.maintain(model, sink=sink, update=1)
    return sink


def through_a_fault(tmp_path):
    """Train with a Grower while a kernel fails and comes back; return its two sinks' events."""
    model, optimizer = wrapped()
    kernel = BadKernel(nn.Linear(4, 4), "nan")
    model[0].graft(0, kernel, alpha=0.5)
    sink = Kept()
    options = {"policy": esper.Never(), "sink": sink, "run_dir": tmp_path / "run"}
    with growing(model, optimizer, **options) as grower:
        train(model, optimizer, 3, grower)
        kernel.is_bad = True
        train(model, optimizer, 5, grower)
        kernel.is_bad = False
        train(model, optimizer, 95, grower)
    return sink, read_events(grower.run_dir / "events.jsonl"), grower.report()


@pytest.mark.parametrize(("guard", "num_dropped"), [("step", 1), ("always", 0)])
def test_a_fault_that_the_optimizers_step_has_found_is_told_at_the_next_reading(guard, num_dropped):
    """With the isolation, once; under ``always`` it is the readings that find three of them."""
    model, kernel = layer_with("nan")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper.sync_optimizer(model, optimizer)
    model[0].set_guard(0, guard)
    sink, faults, transitions, weights = Kept(), [], [], []
    for number in range(6):
        kernel.is_bad = number > 1
        optimizer.zero_grad()
        model(torch.ones(4, 4)).square().sum().backward()
        before = model[1].weight.detach().clone()
        optimizer.step()
        weights.append(torch.equal(before, model[1].weight))
        report = esper.maintain(model, sink=sink, update=1)
        faults += report.faults
        transitions += report.transitions
    assert weights.count(True) == num_dropped
    assert len(faults) == len(sink.of("seed_faulted")) == (1 if guard == "step" else 3)
    assert [fault.faults for fault in faults] == [1] * len(faults)
    assert [(e.before, e.after) for e in sink.of("seed_moved")] == [("active", "error_recovery")]
    assert [(t.before.name, t.after.name) for t in transitions] == [("ACTIVE", "ERROR_RECOVERY")]
    assert "not finite" in transitions[0].reason


@NEVER
@pytest.mark.slow
def test_a_fault_its_isolation_and_its_end_are_at_every_sink(tmp_path):
    """And how each seed is doing, at every 100th update; the report has them as incidents."""
    sink, logged, report = through_a_fault(tmp_path)
    assert [e.id for e in logged] == [e.id for e in sink.events]
    moves = [(e.before, e.after) for e in sink.of("seed_moved")]
    assert moves == [("active", "error_recovery"), ("error_recovery", "active")]
    (retried,) = sink.of("retried")
    assert (retried.what, retried.outcome, retried.number) == ("probe", "recovered", 1)
    (measured,) = sink.of("seed_measured")
    assert (measured.update, measured.site, measured.seed_idx) == (100, "0", 0)
    assert (measured.state, measured.alpha, measured.faults) == ("active", 0.5, 3)
    assert measured.calls > 50
    assert measured.size_bytes == 4 * 20
    kinds = Counter(incident.kind for incident in report.incidents)
    assert kinds == {"seed_faulted": 1, "seed_moved": 1, "retried": 1, "health_changed": 1}
    moved = next(i for i in report.incidents if i.kind == "seed_moved")
    assert (moved.times, moved.where) == (2, "0, seed 0")
    assert "Faults and health: 4" in str(report)
    assert "<h2>Faults and health</h2>" in run_page(report)
    assert replay(logged).report.incidents == report.incidents
    assert run_report_from_json(report.to_json()).incidents == report.incidents


@NEVER
@pytest.mark.slow
def test_control_without_the_publish_nothing_is_told(tmp_path, monkeypatch):
    """So the test above looks at what the layers publish."""
    silent = maintenance.maintain_layers
    monkeypatch.setattr("esper.growth.grower.maintain_layers", lambda layers, **_: silent(layers))
    sink, _, report = through_a_fault(tmp_path)
    assert not {"seed_faulted", "seed_moved", "retried", "seed_measured"} & {
        event.kind for event in sink.events
    }
    assert report.incidents == ()


def events_of_a_fault(look):
    """Return the events of a fault and of the way back, with a look at the layer in each step."""
    model, kernel = layer_with("nan")
    sink, kernel.is_bad = Kept(), True
    for number in range(60):
        model(torch.ones(4, 4))
        look(model[0])
        esper.maintain(model, sink=sink, update=number)
        kernel.is_bad = number < 5
    return [(event.kind, event.update) for event in sink.events]


@pytest.mark.parametrize("times", [1, 3])
def test_statistics_take_no_event_from_whoever_is_told(times):
    """However often they are asked for; nor do they bring the next probe nearer."""
    unasked = events_of_a_fault(lambda layer: None)
    assert {"seed_faulted", "seed_moved", "retried"} <= {kind for kind, _ in unasked}
    assert events_of_a_fault(lambda layer: [layer.get_stats() for _ in range(times)]) == unasked


def test_a_loop_without_a_grower_publishes_by_maintain():
    """With the update that it says; how seeds are doing at every 100th only."""
    model, _ = layer_with("nan")
    sink = Kept()
    for update in (99, 100, 101):
        model(torch.ones(4, 4))
        esper.maintain(model, sink=sink, update=update)
    (found,) = sink.events
    assert (found.kind, found.update, found.calls, found.faults) == ("seed_measured", 100, 2, 0)


def test_a_seed_is_counted_from_its_kernel_s_first_call_on():
    """Through its fossilization, and anew with another kernel."""
    model, _ = layer_with("nan")
    call(model, 5)
    model[0].fossilize(0)
    call(model, 2)
    model[1].graft(0, nn.Linear(4, 4), alpha=0.5)
    call(model, 1)
    model[1].graft(0, nn.Linear(4, 4), alpha=0.5)
    call(model, 2)
    sink = Kept()
    esper.maintain(model, sink=sink, update=100)
    assert [(e.site, e.state, e.calls) for e in sink.events] == [
        ("0", "fossilized", 10),
        ("1", "active", 2),
    ]


def test_a_sink_that_raises_costs_nobody_anything(caplog):
    """It is logged."""

    class Raises:
        def publish(self, event):
            raise OSError("full")

    model, _ = layer_with("nan")
    model(torch.ones(4, 4))
    esper.maintain(model, sink=Raises(), update=100)
    assert "Raises failed on a 'seed_measured' event" in caplog.text


def test_an_error_rate_that_leaves_its_history_is_told_once():
    """A kernel that was clean fails now and then, too seldom to be isolated at once."""
    model, kernel = layer_with("raises", telemetry_enabled=True)
    call(model, 300)
    sinks = []
    for _ in range(4):
        sinks.append(call(model, 24))
        kernel.is_bad = True
        sinks.append(call(model, 1))
        kernel.is_bad = False
    told = [event for sink in sinks for event in sink.of("anomaly_seen")]
    (found,) = told
    assert (found.site, found.seed_idx, found.what) == ("0", 0, "error rate")
    assert found.value > found.limit > found.usual == 0.0


def test_a_latency_that_leaves_its_history_is_told_once():
    """Over the times that telemetry takes."""
    model, _ = layer_with("nan", telemetry_enabled=True)
    seed = record_of(model[0]).seeds[0]

    def timed(us, times):
        found = []
        for _ in range(times):
            seed.timed_us.append(us)
            seed.num_timed += 1
            found += call(model, 1).of("anomaly_seen")
        return found

    assert timed(100, 40) == []
    (found,) = timed(900, 40)
    assert (found.what, found.value, found.usual) == ("latency", 900.0, 100.0)


def test_a_layer_that_falls_ill_and_recovers_is_told_of_twice():
    """Unhealthy with the limit that was passed, and healthy again."""
    model, kernel = layer_with("raises")
    call(model, 20)
    kernel.is_bad = True
    ill = [e for _ in range(3) for e in call(model, 1).of("health_changed")]
    assert [(e.site, e.healthy) for e in ill] == [("0", False)]
    assert "error rate" in ill[0].reason
    assert 0.0 <= ill[0].score <= 1.0


@pytest.mark.parametrize("limits", [HealthLimits(seed_memory_mb=1e-6), None])
def test_a_seed_that_takes_more_than_its_own_limit_is_named(limits):
    """And, as a control, nothing is told where there is no limit."""
    model, _ = layer_with("nan")
    if limits is not None:
        model[0].health_monitor.limits = limits
    sink = Kept()
    for update in (100, 200):
        model(torch.ones(4, 4))
        esper.maintain(model, sink=sink, update=update)
    told = [(e.site, e.seed_idx, e.healthy) for e in sink.of("health_changed")]
    assert told == ([] if limits is None else [("0", 0, False)])


def recorded_sites(*, is_ill):
    """Let a Grower decide to grow; return what it ranked, and what its policy was told."""
    model, optimizer = wrapped()
    kernel = BadKernel(nn.Linear(4, 4), "raises")
    model[0].graft(0, kernel, alpha=0.5)
    sink, told = Kept(), []

    class Asks(esper.Policy):
        def decide(self, reading):
            told.append(reading.unhealthy)
            is_time = reading.update >= 15
            return esper.Decision(grow=is_time, verdict="scheduled", reason="now")

    options = {"policy": Asks(), "sink": sink, "compute_loss": compute_loss, "evaluate": evaluate}
    with growing(model, optimizer, **options) as grower:
        train(model, optimizer, 8, grower)
        kernel.is_bad = is_ill
        train(model, optimizer, 14, grower)
    rows = [row for event in sink.of("ranked") for row in [*event.rows, *event.refused]]
    return {row["site"] for row in rows}, told


@pytest.mark.slow
def test_nothing_grows_at_a_layer_that_is_not_healthy():
    """Its policy is told; a layer that is healthy is ranked, as a control."""
    sites, told = recorded_sites(is_ill=True)
    assert "0" not in sites
    assert sites
    assert ("0",) in told
    sites, told = recorded_sites(is_ill=False)
    assert "0" in sites
    assert set(told) == {()}


@NEVER
def test_what_goes_wrong_with_a_layer_s_source_is_told_in_the_run(tmp_path):
    """Retries and the breaker, at the next step."""
    model, optimizer = wrapped()
    esper.restore(model)
    esper.wrap(model, source=Down())
    sink = Kept()
    with growing(model, optimizer, policy=esper.Never(), sink=sink) as grower:
        model[0].error_recovery.base_delay = 0.0
        for _ in range(3):
            with pytest.raises(KernelSourceUnavailable):
                model[0].load_kernel_sync(0, "ab" * 32)
        train(model, optimizer, 1, grower)
    outcomes = Counter(event.outcome for event in sink.of("retried"))
    assert outcomes["given up"] == 3
    assert outcomes["tried again"] >= 1
    assert [event.after for event in sink.of("breaker_moved")] == ["open"]
    assert {e.update for e in sink.of("breaker_moved")} == {1}
