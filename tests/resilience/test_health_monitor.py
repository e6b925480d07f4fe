"""Health."""

import copy
import pickle

import pytest

from esper.resilience.health_monitor import HealthLimits, HealthMonitor


def fed(*updates, **settings):
    monitor = HealthMonitor(**settings)
    for update in updates:
        monitor.update_metrics(*update)
    return monitor


def test_nothing_measured_is_healthy():
    """No news gives no cause to step in."""
    assert HealthMonitor().compute_health_score() == 1.0
    assert HealthMonitor().should_intervene() == (False, "Healthy")
    assert HealthMonitor().get_stats()["error_rate"] is None


def test_errors_alone_are_critical():
    """With every call failing and nothing slow or full, the score is 0 and somebody steps in."""
    monitor = fed((100, 100, 0.0, 0.0))
    assert monitor.compute_health_score() == 0.0
    assert monitor.should_intervene() == (True, "health score 0.00 is critical")


def test_latency_within_its_budget_costs_nothing():
    """At the limit the score is full, at twice the limit half."""
    assert fed((0, 10, 10.0, 0.0)).compute_health_score() == 1.0
    assert fed((0, 10, 20.0, 0.0)).compute_health_score() == 0.5


def test_memory_within_its_budget_costs_nothing():
    """At the limit the score is full, half-way from there to all of it half, and then 0."""
    assert fed((0, 10, 0.0, 90.0)).compute_health_score() == 1.0
    assert fed((0, 10, 0.0, 95.0)).compute_health_score() == 0.5
    assert fed((0, 10, 0.0, 100.0)).compute_health_score() == 0.0


def test_the_error_rate_is_that_of_all_calls():
    """Ten failures of ten calls weigh as ten calls beside ninety that went well."""
    monitor = fed((0, 90), (10, 10))
    assert monitor.get_stats()["error_rate"] == 0.1
    assert monitor.should_intervene()[0] is False  # at the limit, not above it


def test_one_bad_sample_does_not_decide():
    """A lone slow and full update among good ones moves no median."""
    good = [(0, 10, 1.0, 88.0)] * 4
    assert fed(*good, (0, 10, 5_000.0, 100.0)).should_intervene() == (False, "Healthy")


def test_too_little_evidence_does_not_decide():
    """Nine calls in two updates are too few; a tenth call, or a third update, is enough."""
    assert fed((5, 5), (4, 4)).should_intervene()[0] is False
    assert fed((5, 5), (5, 5)).should_intervene()[0] is True
    assert fed((1, 1), (1, 1), (1, 1)).should_intervene()[0] is True


@pytest.mark.parametrize(
    ("update", "name"),
    [
        ((11, 100, 0.0, 0.0), "error rate is 0.11, its limit 0.1"),
        ((0, 100, 10.5, 0.0), "latency in ms is 10.5, its limit 10"),
        ((0, 100, 0.0, 90.5), "memory in percent is 90.5, its limit 90"),
    ],
)
def test_each_limit_is_watched_for_itself(update, name):
    """What is above its limit is named with both numbers, long before the score is critical."""
    assert fed(update).should_intervene() == (True, name)


def test_what_has_begun_ends_only_well_below_the_limit():
    """An error rate that hovers at the limit does not switch back and forth."""
    monitor = fed((12, 100), window_size=1)
    assert monitor.should_intervene()[0] is True
    monitor.update_metrics(9, 100)
    assert monitor.should_intervene()[0] is True
    monitor.update_metrics(7, 100)
    assert monitor.should_intervene()[0] is False
    monitor.update_metrics(9, 100)
    assert monitor.should_intervene()[0] is False


def test_a_score_that_was_critical_has_to_recover_to_a_half():
    """Between 0.3 and 0.5 it depends on where one comes from."""
    limits = HealthLimits(error_rate=0.9)
    monitor = fed((60, 100), window_size=1, limits=limits)
    assert monitor.should_intervene()[0] is False
    monitor.update_metrics(75, 100)
    assert monitor.should_intervene()[0] is True
    monitor.update_metrics(60, 100)
    assert monitor.should_intervene() == (True, "health score 0.40 is still low")
    monitor.update_metrics(80, 100)
    assert monitor.should_intervene() == (True, "health score 0.20 is critical")
    monitor.update_metrics(60, 100)
    monitor.update_metrics(50, 100)
    assert monitor.should_intervene()[0] is False


def test_the_window_forgets():
    """What left the window has no say."""
    monitor = fed((10, 10), *[(0, 10)] * 3, window_size=3)
    assert monitor.get_stats()["error_rate"] == 0.0
    assert monitor.get_stats()["calls"] == 30


def test_what_was_not_measured_is_left_out():
    """Updates without latency and memory say nothing of them."""
    monitor = fed((0, 10), (0, 10, 4.0, None))
    stats = monitor.get_stats()
    assert (stats["latency_ms"], stats["memory_percent"]) == (4.0, None)
    assert stats["health_score"] == 1.0


def test_a_copy_goes_on_by_itself():
    """Copied and pickled monitors keep what was measured."""
    monitor = fed((5, 10))
    for copied in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert copied.get_stats() == monitor.get_stats()
        copied.update_metrics(0, 90)
    assert monitor.get_stats()["calls"] == 10


@pytest.mark.parametrize(
    "update",
    [(-1, 1), (2, 1), (0, 1, -1.0), (0, 1, float("nan")), (0, 1, 0.0, 101.0), (0, 1, 0.0, -1.0)],
)
def test_impossible_measurements_are_refused(update):
    """They would spoil the window for its whole length."""
    with pytest.raises(ValueError, match="expected 0 <= errors"):
        HealthMonitor().update_metrics(*update)


@pytest.mark.parametrize(
    "limits",
    [{"error_rate": 0.0}, {"error_rate": 1.0}, {"latency_ms": 0.0}, {"memory_percent": 100.0}],
)
def test_limits_have_ranges(limits):
    """A limit that nothing or everything passes is refused."""
    with pytest.raises(ValueError, match="limits are in"):
        HealthLimits(**limits)


def test_a_window_holds_something():
    """A window of nothing could never say anything."""
    with pytest.raises(ValueError, match="at least 1, found 0"):
        HealthMonitor(0)
