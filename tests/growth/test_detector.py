"""The detector: when a run has reached diminishing returns, and when it must be left alone."""

import json
import math

import numpy as np
import pytest

from esper.growth.detector import Detector
from esper.growth.reading import Reading

EVERY = 20


def feed(gate, train=None, **settings):
    """Observe losses at every 20th update; return the detector and the last update."""
    detector = Detector(**settings)
    train = gate if train is None else train
    for index, (train_loss, gate_loss) in enumerate(zip(train, gate, strict=True)):
        detector.observe(Reading(update=index * EVERY, train_loss=train_loss, gate_loss=gate_loss))
    return detector, (len(gate) - 1) * EVERY


def verdict(gate, train=None, *, horizon=None, last=None, update=None, packages=0, **settings):
    detector, now = feed(gate, train, **settings)
    return detector.decide(
        Reading(
            update=now if update is None else update,
            horizon=horizon,
            last_change_update=last,
            num_packages=packages,
        )
    )


def saturating(num, scale=1.0):
    return [scale * (0.3 + 2.0 * math.exp(-index / 6.0)) for index in range(num)]


def test_saturated_loss_is_diminishing():
    """A loss that has come to rest grows, and the reason has both falls in it."""
    decision = verdict(saturating(40))
    assert decision.grow
    assert decision.verdict == "diminishing"
    assert "since the start" in decision.reason


def test_training_loss_decides_and_not_the_gate_loss():
    """A gate loss at rest starts nothing while training pays, nor does its fall hold it up."""
    falling = [3.0 - 0.1 * index for index in range(29)]
    rests = saturating(29)[:10] + [saturating(29)[9]] * 19
    assert verdict(rests, falling).verdict == "improving"
    assert verdict(falling, rests).verdict == "diminishing"


def test_without_training_losses_nothing_is_diminishing():
    """No sample of the gate split has a say in the moment, though nothing else is known."""
    assert verdict(saturating(40), [None] * 40).verdict == "improving"


def test_falling_loss_is_left_alone():
    """A loss that falls as fast as ever does not grow."""
    decision = verdict([3.0 - 0.1 * index for index in range(29)])
    assert (decision.grow, decision.verdict) == (False, "improving")


@pytest.mark.parametrize(("last_fall", "grows"), [(0.14, True), (0.16, False)])
def test_limit_is_fifteen_percent_of_the_whole_fall(last_fall, grows):
    """Just under 15 % of the fall since the start within five evaluations grows; above does not."""
    start = [1.0] * 3 + [last_fall] * 25
    step = [last_fall * (1 - part / 3) for part in range(1, 4)] + [0.0] * 2
    assert verdict(start + step).grow is grows


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_verdict_does_not_depend_on_the_scale(scale):
    """Losses in other units give the same verdict at every point of a run."""
    for num in range(27, 45):
        assert verdict(saturating(num, scale)).verdict == verdict(saturating(num)).verdict


def test_run_that_never_learned_is_a_plateau():
    """A loss that never fell is the extreme of diminishing returns."""
    assert verdict([2.3] * 30).verdict == "diminishing"


def test_single_bad_evaluation_changes_nothing():
    """One outlier moves no median of three."""
    gate = [3.0 - 0.1 * index for index in range(29)]
    gate[-1] = 10.0
    assert verdict(gate).verdict == "improving"


def test_loss_that_is_not_finite_is_left_out_and_said():
    """A NaN is refused by observe and does not reach the rules."""
    detector, now = feed(saturating(40))
    odd = Reading(update=now + EVERY, train_loss=1.0, gate_loss=math.nan)
    assert detector.observe(odd) is False
    assert detector.decide(Reading(update=now + EVERY)).verdict == "diminishing"


def test_overfitting_is_declined():
    """Training loss down, gate loss up: more capacity is the wrong medicine."""
    gate = saturating(30) + [0.32 + 0.02 * index for index in range(12)]
    train = [2.0 / (1 + index) for index in range(42)]
    decision = verdict(gate, train, horizon=60 * EVERY, last=0)
    assert (decision.grow, decision.verdict) == (False, "overfitting")
    assert "wrong medicine" in decision.reason


def test_gate_loss_that_rises_with_the_training_loss_is_not_overfitting():
    """The control: the same rise with a training loss that rises too is something else."""
    gate = saturating(30) + [0.32 + 0.02 * index for index in range(12)]
    assert verdict(gate, gate).verdict != "overfitting"


def test_rise_with_unknown_training_loss_is_declined():
    """What cannot be told from overfitting is treated as overfitting."""
    gate = saturating(30) + [0.32 + 0.02 * index for index in range(12)]
    assert verdict(gate, [None] * 42).verdict == "overfitting"


def test_noise_on_a_plateau_is_seldom_taken_for_overfitting():
    """Pure noise around a plateau reads as overfitting in few of 200 runs."""
    wrong = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        gate = np.array(saturating(50)) + random.normal(0.0, 0.05, 50)
        train = [2.0 / (1 + index) for index in range(50)]
        wrong += verdict(gate.tolist(), train).verdict == "overfitting"
    assert wrong <= 20


def test_noise_does_not_stop_a_run_that_improves():
    """Noise on a steadily falling loss is seldom taken for diminishing returns."""
    wrong = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        gate = 3.0 - 0.1 * np.arange(28) + random.normal(0.0, 0.05, 28)
        wrong += verdict(gate.tolist()).grow
    assert wrong <= 20


@pytest.mark.parametrize(("update", "early"), [(119, True), (120, False)])
def test_nothing_grows_in_the_first_tenth(update, early):
    """A plateau before 10 % of the horizon is waited out."""
    decision = verdict([2.3] * 30, horizon=1200, update=update)
    assert (decision.verdict == "too_early") is early


@pytest.mark.parametrize(("horizon", "due"), [(1200, 120), (101, 11), (1_000_000, 500)])
def test_first_package_is_due_at_a_tenth_of_the_run(horizon, due):
    """Or after 500 updates, at that very update, whatever the losses and how few were seen."""
    detector, _ = feed([3.0, 2.9])
    for update in (due - 1, due):
        reading = Reading(update=update, horizon=horizon)
        assert (detector.first(reading) is not None) is (update == due)
        assert detector.decide(reading).verdict == ("scheduled" if update == due else "too_early")


def test_only_the_first_package_is_due_by_the_calendar():
    """The next one is when returns diminish; and without a horizon the first one is, too."""
    falling = [3.0 - 0.1 * index for index in range(29)]
    assert verdict(falling, horizon=2000, packages=0, update=560).verdict == "scheduled"
    assert verdict(falling, horizon=2000, packages=1, update=560).verdict == "improving"
    assert verdict(falling, horizon=None, packages=0, update=560).verdict == "improving"


def test_first_package_that_was_not_to_be_had_is_not_asked_for_at_every_update():
    """It was due at 200, and nothing was on offer then: the other rules go on."""
    detector, _ = feed([3.0, 2.9])
    assert detector.first(Reading(update=200, horizon=2000)) is not None
    assert detector.first(Reading(update=217, horizon=2000, last_change_update=216)) is None


def test_first_package_waits_while_the_run_overfits():
    """Its moment is no order: more capacity is the wrong medicine then too."""
    gate = saturating(30) + [0.32 + 0.02 * index for index in range(12)]
    train = [2.0 / (1 + index) for index in range(42)]
    detector, now = feed(gate, train)
    assert detector.first(Reading(update=now, horizon=60 * EVERY)) is None


@pytest.mark.parametrize("horizon", [None, 1_000_000])
@pytest.mark.parametrize(("update", "early"), [(499, True), (500, False)])
def test_first_five_hundred_updates_are_early_at_most(horizon, update, early):
    """With a long or an unknown horizon, 500 updates are waited, and no more."""
    decision = verdict([2.3] * 30, horizon=horizon, update=update)
    assert (decision.verdict == "too_early") is early


@pytest.mark.parametrize(("update", "late"), [(959, False), (960, True)])
def test_nothing_grows_in_the_last_fifth(update, late):
    """A plateau after 80 % of a known horizon is left alone."""
    decision = verdict([2.3] * 30, horizon=1200, update=update)
    assert (decision.verdict == "too_late") is late
    assert decision.grow is not late


def test_too_few_evaluations_are_too_early():
    """Five evaluations have no window of five behind them."""
    decision = verdict([2.3] * 5, update=600)
    assert decision.verdict == "too_early"
    assert "5 evaluations, 6 needed" in decision.reason


@pytest.mark.parametrize(("last", "due"), [(None, True), (81, False), (80, True)])
def test_deadline_counts_from_the_last_change(last, due):
    """Once 40 % of the horizon has passed since the last change, the gates decide."""
    gate = [3.0 - 0.1 * index for index in range(25)]
    decision = verdict(gate, horizon=1000, last=last, packages=1)
    assert (decision.verdict == "deadline") is due


def test_state_survives_a_round_trip_through_json():
    """A detector with the state of another decides as it does, and shares no list with it."""
    detector, now = feed(saturating(40))
    state = json.loads(json.dumps(detector.state_dict()))
    copy = Detector()
    copy.load_state_dict(state)
    assert copy.decide(Reading(update=now)) == detector.decide(Reading(update=now))
    copy.observe(Reading(update=now + EVERY, train_loss=1.0, gate_loss=0.0))
    assert detector.state_dict() == state


@pytest.mark.parametrize(
    "setting", [{"window": 1}, {"fraction": 0.0}, {"deadline": 1.5}, {"rise_fraction": 1.0}]
)
def test_settings_outside_their_range_are_refused(setting):
    """A setting that means nothing is a caller's mistake."""
    with pytest.raises(ValueError, match="got"):
        Detector(**setting)


def outlook(gate, *, horizon=None, last=None, packages=1):
    detector, now = feed(gate)
    return detector.outlook(
        Reading(update=now, horizon=horizon, last_change_update=last, num_packages=packages)
    )


def test_growth_is_near_where_returns_are_and_far_while_a_run_improves():
    """1 where it is due; twice the fall that is too little is a half; again far once it falls."""
    plateau = saturating(40)
    assert outlook(plateau) == 1.0
    assert outlook(plateau[:4]) == 0.0, "there is nothing to go by yet"
    assert 0.0 < outlook(saturating(7)) < 0.5
    falls_again = [plateau[-1] - 0.2 * i for i in range(1, 8)]
    assert outlook(plateau + falls_again) < 0.5


def test_growth_is_due_before_the_first_package_and_never_at_the_end():
    """A run of known length has its first package by the calendar, and none in its last fifth."""
    falling = [10.0 - i for i in range(8)]
    assert outlook(falling, horizon=10_000, packages=0) == 1.0
    assert outlook(falling, horizon=10_000, last=100) < 0.5
    assert outlook(saturating(40), horizon=800) == 0.0
    overfits = [3.0 - 0.1 * i for i in range(15)] + [1.6 + 0.2 * i for i in range(10)]
    detector, now = feed(overfits, train=[3.0 - 0.1 * i for i in range(25)])
    assert detector.outlook(Reading(update=now)) == 0.0


def test_a_deadline_comes_nearer():
    """Half of it is half."""
    falling = [10.0 - i for i in range(11)]
    assert outlook(falling, horizon=1_000, last=0) == pytest.approx(0.5)
