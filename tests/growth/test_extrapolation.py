"""What simply going on would bring: told from the run's own curve, with its uncertainty."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper.growth.extrapolation import going_on

EVERY, AT, EXTRA = 50, 2000, 400
NOISE = 0.03


def loss_at(update, power=0.3):
    """A power law over a floor, as losses of training fall."""
    return 1.0 + 4.0 * update**-power


def curve(random_seed, *, noise=NOISE, last=AT):
    rng = np.random.default_rng(random_seed)
    return [(u, loss_at(u) + rng.normal(0, noise)) for u in range(EVERY, last + 1, EVERY)]


def line_over_updates(points, extra):
    """The control: the same fit over the updates themselves."""
    used = points[len(points) // 2 :]
    mean_u = sum(u for u, _ in used) / len(used)
    mean_y = sum(y for _, y in used) / len(used)
    slope = sum((u - mean_u) * (y - mean_y) for u, y in used) / sum(
        (u - mean_u) ** 2 for u, _ in used
    )
    return -slope * extra


def test_the_true_gain_lies_within_two_standard_errors():
    """Of a noisy power law, at 85 % of the random seeds at least."""
    true = loss_at(AT) - loss_at(AT + EXTRA)
    found = [going_on(curve(seed), AT, EXTRA) for seed in range(400)]
    inside = sum(abs(gain - true) <= 2 * stderr for gain, stderr in found)
    assert inside / len(found) >= 0.85


def test_a_line_over_the_updates_promises_too_much():
    """The control: it misses where the logarithm does not, the further the more."""
    points, extra = curve(0, noise=0.0), AT
    true = loss_at(AT) - loss_at(AT + extra)
    assert going_on(points, AT, extra).gain == pytest.approx(true, rel=0.25)
    assert line_over_updates(points, extra) > 2 * true


def test_the_fit_is_that_of_least_squares():
    """A loss that is a line over the logarithm is met exactly, and no error is left."""
    points = [(u, 3.0 - 0.25 * math.log(u)) for u in (10, 20, 30, 40, 50, 60)]
    gain, stderr = going_on(points, 60, 60)
    assert gain == pytest.approx(0.25 * math.log(2))
    assert stderr == pytest.approx(0.0, abs=1e-9)


def test_only_the_later_half_counts_and_nothing_to_come():
    """The fall of the beginning says nothing, and what is later than now is left out."""
    late = [(u, 2.0 - 0.1 * math.log(u)) for u in (140, 160, 180, 200)]
    early = [(u, 50.0 / u) for u in (1, 2, 3, 4)]
    future = [(1000, 0.0), (2000, 9.0)]
    assert going_on(early + late + future, 200, 100) == going_on(late + future, 200, 100)


def test_a_loss_that_rises_promises_a_negative_gain():
    """It is said as it is."""
    assert going_on([(u, math.log(u)) for u in (1, 2, 3, 4)], 4, 4).gain < 0


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(10, 1.0), (20, 0.9), (30, 0.8)],
        [(10, 1.0), (20, math.nan), (30, 0.8), (40, 0.7)],
        [(10, 1.0), (10, 0.9), (10, 0.8), (10, 0.7)],
        [(10, 1.0), (20, 0.9), (30, 0.8), (400, 0.7)],
    ],
)
def test_too_few_points_say_nothing(points):
    """Fewer than four finite ones until now, or all at one moment."""
    assert going_on(points, 100, 50) is None


def test_no_more_updates_bring_nothing():
    """Whatever the curve."""
    assert going_on(curve(1), AT, 0) == (0.0, 0.0)
