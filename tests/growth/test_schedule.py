"""The schedule of evaluations."""

from __future__ import annotations

import pytest

from esper.growth.schedule import EVALUATE_EVERY, READINGS_AT_FIRST, EvaluationSchedule

SAMPLES = 32


def scheduled(*, every=None, overhead=0.9, first=1, work=0):
    schedule = EvaluationSchedule(every=every, overhead=overhead)
    schedule.evaluated(first, READINGS_AT_FIRST * work)
    return schedule


def first_due(schedule, *, after=1, until=10_000):
    return next(u for u in range(after, until) if schedule.is_due(u, SAMPLES))


def test_the_first_evaluation_is_due_at_once():
    """Whatever the owner wants later."""
    assert EvaluationSchedule(every=100, overhead=0.1).is_due(1, SAMPLES)
    assert EvaluationSchedule(every=None, overhead=0.0).is_due(1, SAMPLES)


def test_an_update_is_evaluated_once():
    """At the step or at the end of its epoch, not at both."""
    schedule = scheduled(every=1)
    schedule.end_epoch()
    assert not schedule.is_due(1, SAMPLES)
    assert schedule.is_due(2, SAMPLES)


@pytest.mark.parametrize("every", [1, 10])
def test_the_owner_says_how_often(every):
    """Then neither epochs nor the overhead count."""
    schedule = scheduled(every=every, overhead=0.0, work=10**9)
    schedule.end_epoch()
    assert first_due(schedule) == 1 + every


def test_without_a_word_it_is_every_fifty_updates():
    """As long as no epoch has ended."""
    assert first_due(scheduled()) == 1 + EVALUATE_EVERY


def test_where_there_are_epochs_it_is_at_their_ends():
    """And no longer every fifty updates."""
    schedule = scheduled()
    schedule.end_epoch()
    assert schedule.is_due(10, SAMPLES)
    schedule.evaluated(10, 0)
    assert not any(schedule.is_due(update, SAMPLES) for update in range(11, 1000))
    schedule.end_epoch()
    assert schedule.is_due(1000, SAMPLES)


@pytest.mark.parametrize("overhead", [0.1, 0.5])
def test_evaluations_take_at_most_half_of_the_overhead(overhead):
    """The gap grows with the work of one reading, so that the share is kept."""
    work = 10_000
    schedule = scheduled(overhead=overhead, work=work)
    gap = first_due(schedule) - 1
    training = 3 * SAMPLES * gap
    assert work / (work + training) <= overhead / 2
    shorter = training - 3 * SAMPLES
    assert gap == EVALUATE_EVERY or work / (work + shorter) > overhead / 2


def test_only_the_first_evaluation_reads_three_times():
    """Its work is divided by them, that of the others is not."""
    schedule = scheduled(overhead=0.5, work=10_000)
    gap = first_due(schedule) - 1
    schedule.evaluated(1 + gap, 10_000)
    assert first_due(schedule, after=2 + gap) == 1 + 2 * gap


def test_without_an_overhead_it_is_as_without_a_word():
    """Nothing would be affordable, and the policy is to see something all the same."""
    schedule = scheduled(overhead=0.0, work=100)
    schedule.end_epoch()
    assert first_due(schedule) == 1 + EVALUATE_EVERY
