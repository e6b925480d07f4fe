"""The schedule of evaluations."""

from __future__ import annotations

import itertools

import pytest

from esper.growth.ledger import WorkLedger
from esper.growth.schedule import EVALUATE_EVERY, EvaluationSchedule
from esper.growth.settings import GrowthSettings
from esper.resilience.clock import ManualClock

UPDATE, ELEMENTS = 1000, 1
HORIZON = 5000


def scheduled(*, every=None, reading=0, overhead=1.0, horizon=HORIZON, first=True):
    """A schedule whose first evaluation, of three readings, was at update 1."""
    ledger = WorkLedger(GrowthSettings(overhead=overhead, horizon=horizon), ManualClock())
    ledger.update.learn(UPDATE, ELEMENTS)
    ledger.reading.learn(reading)
    schedule = EvaluationSchedule(ledger, every=every)
    if first:
        ledger.count_update([None])
        read(schedule, 1, 3 * reading)
    return schedule


def read(schedule, update, flops=None):
    """Make an evaluation."""
    flops = schedule._ledger.reading_flops if flops is None else flops
    schedule._ledger.count("evaluation", flops=flops)
    schedule.evaluated(update, flops)


def train(schedule, until, *, start=1, epoch=None):
    """Train on, evaluating whenever that is due; return when it was."""
    made = []
    for update in range(start + 1, until + 1):
        schedule._ledger.count_update([None])
        if schedule.is_due(update):
            made.append(update)
            read(schedule, update)
        if epoch and update % epoch == 0:
            schedule.end_epoch(update)
            if schedule.is_due(update):
                made.append(update)
                read(schedule, update)
    return made


@pytest.mark.parametrize(("every", "overhead"), [(100, 0.1), (None, 0.0)])
def test_the_first_evaluation_is_due_at_once(every, overhead):
    """Whatever the owner wants later, and whatever it takes."""
    assert scheduled(every=every, overhead=overhead, reading=10**9, first=False).is_due(1)


def test_an_update_is_evaluated_once():
    """At the step or at the end of its epoch, not at both."""
    schedule = scheduled(every=1)
    schedule.end_epoch(1)
    assert not schedule.is_due(1)
    assert schedule.is_due(2)


@pytest.mark.parametrize("every", [1, 10])
def test_the_owner_says_how_often(every):
    """Then epochs do not count."""
    assert train(scheduled(every=every), 31, epoch=7) == list(range(1 + every, 32, every))


def test_without_a_word_it_is_every_fifty_updates():
    """As long as no epoch has ended."""
    assert train(scheduled(), 120) == [1 + EVALUATE_EVERY, 1 + 2 * EVALUATE_EVERY]


def test_where_there_are_epochs_it_is_at_their_ends():
    """And no longer every fifty updates."""
    assert train(scheduled(), 300, epoch=70) == [51, 70, 140, 210, 280]


@pytest.mark.parametrize("horizon", [HORIZON, None])
@pytest.mark.parametrize("overhead", [0.1, 2.0])
@pytest.mark.parametrize("every", [1, None])
def test_evaluations_take_at_most_a_fifth_of_the_overhead(horizon, overhead, every):
    """Those of a whole run, the first three readings among them; and most of that fifth."""
    schedule = scheduled(horizon=horizon, overhead=overhead, every=every, reading=8 * UPDATE)
    made = train(schedule, HORIZON)
    fifth = 0.2 * overhead * HORIZON * UPDATE
    readings = 3 + len(made)
    wanted = HORIZON // (every or EVALUATE_EVERY)
    assert readings * 8 * UPDATE <= fifth
    assert (readings + 3) * 8 * UPDATE > fifth or len(made) >= wanted - 2


def test_a_stretched_interval_is_even_and_told_once():
    """Over a known horizon, in updates, with the cure."""
    schedule = scheduled(every=10, overhead=0.1, reading=2 * UPDATE)
    interval = schedule.interval
    assert interval == pytest.approx(4999 * 2 / (0.2 * 0.1 * 5000 - 6), abs=1)
    told = schedule.stretched()
    assert f"{interval} updates apart, where 10 were wanted" in told
    assert "readings for verdicts and watches are made all the same, and come beside it" in told
    assert "raise overhead=" in told
    assert schedule.stretched() is None
    made = train(schedule, HORIZON)
    gaps = {b - a for a, b in itertools.pairwise(made)}
    assert max(gaps) - min(gaps) <= 0.1 * interval


def test_an_interval_that_is_as_wanted_is_not_told():
    """There is nothing to say."""
    schedule = scheduled(every=10, reading=1)
    assert schedule.interval == 10
    assert schedule.stretched() is None


def test_the_end_of_an_epoch_that_is_too_early_is_made_up_for():
    """As soon as that is affordable; what was wanted is told in updates, once it is known."""
    schedule = scheduled(overhead=0.1, reading=2 * UPDATE)
    assert schedule.stretched() is None  # there may be epochs still
    made = train(schedule, 900, epoch=40)
    assert {b - a for a, b in itertools.pairwise(made)} <= {*range(95, 125)}
    assert "where 40 were wanted" in schedule.stretched()


def test_where_no_more_is_affordable_that_is_told():
    """At once: there will be no second evaluation to tell it at."""
    schedule = scheduled(overhead=0.0, reading=1)
    assert schedule.interval is None
    assert "no more evaluations are due" in schedule.stretched()
    assert train(schedule, 500) == []


def test_where_nobody_knows_what_training_takes_nothing_is_stretched():
    """Without batches there is no ratio to keep."""
    ledger = WorkLedger(GrowthSettings(overhead=0.1), ManualClock())
    ledger.reading.learn(10**9)
    schedule = EvaluationSchedule(ledger, every=None)
    read(schedule, 1)
    assert train(schedule, 101) == [51, 101]


def test_a_run_that_goes_on_beyond_its_horizon_is_evaluated_by_what_it_earns():
    """Then an evaluation is due whenever a fifth of the overhead has paid for it."""
    schedule = scheduled(every=1, horizon=100, reading=2 * UPDATE)
    train(schedule, 100)
    assert 9 <= len(train(schedule, 200, start=100)) <= 11
