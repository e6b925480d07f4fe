"""A figure that leaves its own history is told once, until it has come back."""

import pytest

from esper.resilience.own_history import UsualRate, UsualTime

STEADY = [100.0, 104.0, 96.0, 101.0, 99.0] * 6


def departures(history, samples):
    """Return what was told of each sample."""
    return [found for sample in samples if (found := history.take(sample)) is not None]


def outcomes(rate, num_calls, *, bad_every=0):
    """Let calls come, of which one in so many fails; return what was told."""
    told = (
        rate.take(has_failed=bool(bad_every) and i % bad_every == 0)
        for i in range(1, num_calls + 1)
    )
    return [found for found in told if found is not None]


def test_a_steady_time_is_no_news():
    """Nor is one slow sample among many."""
    history = UsualTime()
    assert departures(history, [*STEADY, 5000.0, *STEADY]) == []


def test_a_time_that_has_doubled_is_told_once():
    """With what it is, what it was, and the limit between."""
    history = UsualTime()
    departures(history, STEADY)
    (found,) = departures(history, [300.0] * 50)
    assert found.value == 300.0
    assert 96.0 <= found.usual <= 104.0
    assert found.usual < found.limit < found.value


def test_a_time_that_came_back_is_told_anew():
    """When it leaves again."""
    history = UsualTime()
    departures(history, STEADY)
    assert len(departures(history, [300.0] * 9)) == 1
    assert departures(history, STEADY) == []
    assert len(departures(history, [300.0] * 9)) == 1


def test_a_time_without_a_history_is_no_news():
    """The first samples of a kernel are the slow ones."""
    assert departures(UsualTime(), [900.0] * 3 + [100.0] * 10) == []


def test_a_time_that_wobbles_has_a_wider_limit():
    """Twice the usual is luck where it is often so."""
    history = UsualTime()
    wobbling = [50.0, 100.0, 200.0, 300.0, 150.0] * 6
    departures(history, wobbling)
    assert departures(history, [330.0] * 20) == []


@pytest.mark.parametrize("bad_every", [0, 100])
def test_a_steady_rate_is_no_news(bad_every):
    """Whatever it is."""
    assert outcomes(UsualRate(), 3000, bad_every=bad_every) == []


def test_a_rate_that_has_risen_is_told_once():
    """From none to one call in ten."""
    rate = UsualRate()
    assert outcomes(rate, 300) == []
    (found,) = outcomes(rate, 300, bad_every=10)
    assert found.usual == 0.0
    assert found.value > found.limit >= 0.02


def test_a_rate_without_a_history_is_no_news():
    """A kernel that fails from its first call on has left no history."""
    assert outcomes(UsualRate(), 200, bad_every=5) == []
