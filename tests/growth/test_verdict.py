"""The verdict of a trial: what is taken over, what is claimed, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper.contracts.intervals import student_t_quantile
from esper.growth.extrapolation import GoingOn
from esper.growth.measurement import parse_measurement
from esper.growth.settings import GrowthSettings
from esper.growth.verdict import TrialReadings, last_is_worse, read_trial

BASE = np.random.default_rng(0).gamma(2.0, 0.5, 400)


def noise(seed):
    drawn = np.random.default_rng(seed).normal(0.0, 0.1, 400)
    return drawn - drawn.mean()


def better_by(gain, seed=1):
    """Return losses that are lower by so much than the live run's, with noise between them."""
    return parse_measurement(BASE - gain + noise(seed))


def read(candidate, null=None, *, equals=(), going_on=None, **settings):
    readings = TrialReadings(
        live=parse_measurement(BASE), candidate=candidate, null=null, equals=equals
    )
    return read_trial(readings, level=0.05, settings=GrowthSettings(**settings), going_on=going_on)


def test_candidate_that_beats_the_live_run_is_taken_over():
    """With the effect and the error of the widened test."""
    found = read(better_by(0.05))
    assert found.taken == "candidate"
    assert found.effect == pytest.approx(0.05)
    assert found.live.stderr == pytest.approx(1.6 * noise(1).std(ddof=1) / 20)
    assert found.null is found.capacity is None


@pytest.mark.parametrize("gain", [0.0, -0.05, 0.01])
def test_candidate_that_does_not_is_refused(gain):
    """As good, worse, or better within luck: nothing is taken over, and no effect is told."""
    found = read(better_by(gain))
    assert (found.taken, found.effect) == ("", 0.0)
    assert found.reason == found.live.reason


def test_gain_within_the_spread_of_equal_runs_is_luck():
    """What passes the plain error does not pass the one that equal runs have."""
    assert read(better_by(0.011), spread=1.0).taken == "candidate"
    assert read(better_by(0.011), spread=1.6).taken == ""


def test_gain_below_the_minimum_is_refused():
    """A tenth of a percent of the loss, by default."""
    tiny = parse_measurement(BASE - 0.0005 + 0.001 * noise(1))
    assert "too small" in read(tiny).reason
    assert read(tiny, min_effect=0.0).taken == "candidate"


def test_minimum_is_a_share_of_the_live_loss():
    """What is enough of a loss of 1 is too small of one that is ten times as high."""
    live, gain = parse_measurement(BASE + 9.0), parse_measurement(BASE + 9.0 - 0.005)
    for settings, said in (
        (GrowthSettings(), "too small"),
        (GrowthSettings(min_effect=1e-4), "z ="),
    ):
        wiggled = parse_measurement(gain.per_sample + 0.001 * noise(1))
        found = read_trial(
            TrialReadings(live=live, candidate=wiggled), level=0.05, settings=settings
        )
        assert said in found.reason


def test_null_is_taken_over_where_it_is_better_and_passes_by_itself():
    """Then the effect is the null's, and nothing is claimed for the package."""
    found = read(better_by(0.05), better_by(0.10, seed=2))
    assert found.taken == "null"
    assert found.effect == pytest.approx(0.10)
    assert not found.capacity.passed
    assert found.reason.startswith("made linear the package did better still")


def test_null_that_is_better_within_luck_of_the_live_run_is_not_taken_over():
    """A mean that is lower is not enough: it passes the same test against the live run."""
    shaky = parse_measurement(BASE - 0.06 + 30 * noise(2))
    found = read(better_by(0.05), shaky)
    assert shaky.loss < better_by(0.05).loss
    assert not found.null.passed
    assert found.taken == "candidate"


def test_null_that_is_better_within_the_spread_of_equal_runs_is_not_taken_over():
    """It has to beat the candidate by the same test, spread and all."""
    null = parse_measurement(BASE - 0.061 + noise(1) + noise(2))
    assert read(better_by(0.05), null, spread=1.0).taken == "null"
    assert read(better_by(0.05), null, spread=1.6).taken == "candidate"


def test_null_does_not_help_a_candidate_that_was_refused():
    """What is tried is the package, and not its linear form."""
    found = read(better_by(0.0), better_by(0.5, seed=2))
    assert found.null.passed
    assert found.taken == ""


@pytest.mark.parametrize(("null", "shown"), [(0.0, True), (0.045, False), (0.05, False)])
def test_capacity_is_the_candidate_against_the_null(null, shown):
    """By the same test, and treatment is the null against the live run."""
    found = read(better_by(0.05), better_by(null, seed=2))
    assert found.capacity.effect == pytest.approx(0.05 - null)
    assert found.null.effect == pytest.approx(null)
    assert found.capacity.passed is shown


def test_spread_of_equal_twins_takes_the_place_of_the_setting():
    """The live run is one of the equals; as many degrees of freedom as twins."""
    equals = [better_by(0.0, seed=seed) for seed in range(3, 6)]
    found = read(better_by(0.05), equals=equals, spread=5.0)
    assert found.spread.degrees == 3
    assert 1.0 <= found.spread.factor < 5.0
    assert found.live.threshold == student_t_quantile(0.95, 3)


def test_equals_without_samples_leave_the_spread_unknown():
    """And nothing passes that is not measured."""
    found = read(better_by(0.5), equals=[parse_measurement(1.0)] * 3)
    assert found.spread.factor == math.inf
    assert found.taken == ""


def test_what_has_to_pay_beats_going_on_beyond_both_errors():
    """By default it is only told."""
    gain, likely = better_by(0.05), GoingOn(gain=0.02, stderr=0.002)
    assert read(gain, pays="flops", going_on=likely).taken == "candidate"
    dears = [(0.06, 0.0), (0.02, 0.1), (0.045, 1e-9)]  # the last within the gain's own error
    for dear in (GoingOn(gain=likely, stderr=stderr) for likely, stderr in dears):
        assert read(gain, pays="flops", going_on=dear).taken == ""
        assert read(gain, pays="updates", going_on=dear).taken == "candidate"
    assert "too short" in read(gain, pays="flops").reason


def test_measure_without_samples_refuses():
    """A mean tells no luck."""
    assert "no per-sample losses" in read(parse_measurement(0.1)).reason


def test_losses_that_are_not_finite_refuse():
    """On either side; no figure of the verdict is infinite."""
    bad = parse_measurement(np.where(np.arange(400) == 7, math.nan, BASE - 1.0))
    assert read(bad).taken == ""
    found = read_trial(
        TrialReadings(live=bad, candidate=better_by(0.5)), level=0.05, settings=GrowthSettings()
    )
    assert found.taken == ""


def test_last_iterate_is_refused_where_it_is_worse_beyond_its_errors():
    """Three standard errors above the live run's own last iterate."""
    live = parse_measurement(BASE)
    assert last_is_worse(live, better_by(0.0)) is None
    assert last_is_worse(live, better_by(-0.01)) is None
    assert "its last did not" in last_is_worse(live, better_by(-0.02))
    found = read(better_by(0.05)).refused("its last is worse")
    assert (found.taken, found.effect, found.reason) == ("", 0.0, "its last is worse")
