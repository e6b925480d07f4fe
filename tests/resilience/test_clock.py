"""Clocks."""

import pytest

from esper.resilience.clock import ManualClock, MonotonicClock, wall_time_s


def test_a_manual_clock_moves_only_when_told():
    """It stands still, advances by what it was told, and starts where it was set."""
    clock = ManualClock(5.0)
    assert (clock.now(), clock.now()) == (5.0, 5.0)
    clock.advance(1.5)
    assert clock.now() == 6.5


def test_a_manual_clock_cannot_go_back():
    """It keeps the promise of a monotonic clock."""
    clock = ManualClock()
    with pytest.raises(ValueError, match="cannot go back"):
        clock.advance(-1.0)
    assert clock.now() == 0.0


def test_the_monotonic_clock_never_falls():
    """A thousand readings are in order."""
    clock = MonotonicClock()
    readings = [clock.now() for _ in range(1_000)]
    assert readings == sorted(readings)


def test_wall_time_counts_seconds_since_1970(tmp_path):
    """It is the time that the file system dates files with."""
    before_s = wall_time_s()
    (tmp_path / "file").touch()
    assert abs((tmp_path / "file").stat().st_mtime - before_s) < 60.0
