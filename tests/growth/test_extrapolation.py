"""What simply going on would bring: told from the run's own curve, with its uncertainty."""

from __future__ import annotations

import math

import numpy as np
import pytest
from growing import growing, train, wrapped

from esper.contracts.report import Evaluation
from esper.growth.extrapolation import going_on
from esper.growth.policies import Never

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


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0, 2.0])
def test_a_curve_of_a_known_shape_is_met(power):
    """Without scatter the shape that it has outweighs the others, and no error is left."""
    points = [(u, 0.5 + 2.0 * (u / 60) ** -power) for u in range(10, 70, 5)]
    gain, stderr = going_on(points, 65, 60)
    expected = points[-1][1] - (0.5 + 2.0 * (125 / 60) ** -power)
    assert gain == pytest.approx(expected, rel=1e-3)
    assert stderr == pytest.approx(0.0, abs=1e-3)


def test_no_loss_falls_below_nothing():
    """However steep the beginning was; a line over the logarithm ends far below."""
    points = [(u, 9.0 - 1.45 * math.log(u)) for u in (47, 94, 141, 188, 235, 282)]
    gain, stderr = going_on(points, 282, 4000)
    assert gain + stderr < points[-1][1] + stderr
    assert 1.45 * math.log1p(4000 / 282) > points[-1][1]


def test_a_loss_that_was_below_nothing_may_fall_further():
    """As a log-likelihood, or a measure of which higher is better, with its sign turned."""
    points = [(u, -1.0 - 0.5 * math.log(u)) for u in (47, 94, 141, 188, 235, 282)]
    assert going_on(points, 282, 4000).gain > 0.5


def test_a_curve_near_its_floor_is_not_taken_for_one_that_falls_for_ever():
    """The error says how far the shapes disagree, and the truth lies within it."""
    points = [(u, 0.4 + 100 * u**-1.5) for u in range(44, 480, 44)]
    true = points[-1][1] - 0.4 - 100 * 1500**-1.5
    gain, stderr = going_on(points, points[-1][0], 1500 - points[-1][0])
    assert abs(gain - true) < 2 * stderr + 0.005
    assert gain < 2 * true


def test_only_the_last_third_counts_and_nothing_to_come():
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


def test_what_fell_at_a_switch_is_no_part_of_the_curve():
    """A package that was taken over moved the loss; going on is told from what came after it."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=Never())
    train(model, optimizer, 1, grower)
    run = grower._run
    run.watcher.updates = 200
    losses = {u: 2.0 - 0.01 * u for u in (160, 170, 180)} | dict.fromkeys((185, 190, 195, 200), 0.1)
    run.journal.evaluations[:] = [Evaluation(update=u, gate_loss=v) for u, v in losses.items()]
    run.journal.evaluations[:0] = [Evaluation(update=u, gate_loss=2.0) for u in range(20, 160, 10)]
    flops = 100 * run.ledger.update_flops
    assert run.going_on(flops).gain > 0.01
    run.journal.last_switch = 185
    assert run.going_on(flops).gain == pytest.approx(0.0, abs=1e-9)
    grower.close()
