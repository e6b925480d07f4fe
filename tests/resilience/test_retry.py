"""Retries."""

import asyncio
import copy
import pickle
import random

import pytest

from esper.contracts.errors import CircuitOpenError
from esper.resilience.circuit_breaker import CircuitBreaker
from esper.resilience.clock import ManualClock
from esper.resilience.deadline import Deadline
from esper.resilience.retry import Retry, RetryBudget, RetryPolicy

POLICIES = {ConnectionError: RetryPolicy(max_retries=3, base_delay_s=1.0, max_delay_s=3.0)}


class Endpoint:
    """Raises its errors one after the other, then answers."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.num_calls = 0

    def __call__(self, deadline=None):
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


class LongestRandom(random.Random):
    """Draws the longest wait that is allowed."""

    def uniform(self, a, b):
        return b


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def slept():
    return []


@pytest.fixture
def retry(clock, slept):
    """A retry that advances the clock instead of sleeping, and always waits the longest."""

    def sleep(seconds):
        slept.append(seconds)
        clock.advance(seconds)

    async def sleep_async(seconds):
        sleep(seconds)

    budget = RetryBudget(clock=clock)
    return Retry(POLICIES, budget=budget, sleep=sleep, sleep_async=sleep_async, rng=LongestRandom())


def call(retry, endpoint, how, **settings):
    if how == "sync":
        return retry.call(endpoint, **settings)

    async def endpoint_async():
        return endpoint()

    return asyncio.run(retry.call_async(endpoint_async, **settings))


@pytest.mark.parametrize("how", ["sync", "async"])
def test_transient_errors_are_retried_until_the_answer(retry, slept, how):
    """Three failures and an answer are four calls; waits double up to the cap."""
    endpoint = Endpoint(*[ConnectionError() for _ in range(3)])
    assert call(retry, endpoint, how) == "answer"
    assert endpoint.num_calls == 4
    assert slept == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("how", ["sync", "async"])
def test_who_asked_is_told_of_each_retry(retry, how):
    """Its number, from 1, and the error that it answers; of an error without a retry, nothing."""
    first, second = ConnectionError("first"), ConnectionResetError("second")
    told = []
    endpoint = Endpoint(first, second, ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        call(retry, endpoint, how, on_retry=lambda number, error: told.append((number, error)))
    assert told == [(1, first), (2, second)]


@pytest.mark.parametrize("how", ["sync", "async"])
def test_an_interrupt_is_never_repeated(slept, how):
    """Whatever has a policy: what is no Exception goes through at once."""
    retry = Retry({Exception: RetryPolicy()}, sleep=slept.append)
    endpoint = Endpoint(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        call(retry, endpoint, how)
    assert endpoint.num_calls == 1
    assert slept == []


@pytest.mark.parametrize("how", ["sync", "async"])
def test_the_last_error_is_raised_as_it_came(retry, how):
    """After the last retry the caller sees the error of the last attempt itself."""
    errors = [ConnectionError(number) for number in range(9)]
    endpoint = Endpoint(*errors)
    with pytest.raises(ConnectionError) as caught:
        call(retry, endpoint, how)
    assert caught.value is errors[3]
    assert endpoint.num_calls == 4


def test_a_policy_s_number_of_retries_is_the_limit():
    """Two retries are three attempts, however large the budget."""
    retry = Retry({ConnectionError: RetryPolicy(max_retries=2)}, sleep=lambda seconds: None)
    endpoint = Endpoint(*[ConnectionError() for _ in range(9)])
    with pytest.raises(ConnectionError):
        retry.call(endpoint)
    assert endpoint.num_calls == 3


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_class_without_a_policy_is_not_retried(retry, slept, how):
    """A ValueError is raised at once; a subclass of a class with a policy is retried."""
    endpoint = Endpoint(ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        call(retry, endpoint, how)
    assert (endpoint.num_calls, slept) == (1, [])
    assert call(retry, Endpoint(ConnectionResetError()), how) == "answer"


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError])
def test_interrupts_are_never_retried(retry, error):
    """What is no Exception goes straight through."""
    endpoint = Endpoint(error())
    with pytest.raises(error):
        retry.call(endpoint)
    assert endpoint.num_calls == 1


@pytest.mark.parametrize("how", ["sync", "async"])
def test_no_wait_ends_after_the_deadline(retry, slept, clock, how):
    """A retry that would begin at the deadline or after it is not waited for."""
    deadline = Deadline.after(3.0, clock)
    endpoint = Endpoint(*[ConnectionError() for _ in range(9)])
    with pytest.raises(ConnectionError):
        call(retry, endpoint, how, deadline=deadline)
    assert slept == [1.0]  # 1 and then 2 would be 3


def test_waits_are_drawn_from_zero_to_the_longest(clock):
    """Full jitter: over many draws both ends of the range are come near, and none is outside."""
    retry = Retry({ConnectionError: RetryPolicy(max_retries=9)}, rng=random.Random(0))
    budget_free = RetryBudget(min_retries=10_000)
    retry._budget = budget_free
    drawn = [retry.next_delay_s(ConnectionError(), 2, Deadline.never()) for _ in range(1_000)]
    assert 0.0 <= min(drawn) < 0.01
    assert 0.39 < max(drawn) <= 0.4


def test_the_first_wait_can_be_kept_short():
    """A limit of its own holds for the first retry only; huge retry numbers do not overflow."""
    policy = RetryPolicy(base_delay_s=1.0, max_delay_s=8.0, max_first_delay_s=0.01)
    assert [policy.longest_delay_s(n) for n in (0, 1, 2, 3, 100_000)] == [0.01, 2, 4, 8, 8]


# ---- the budget


def num_retries_of(budget):
    taken = 0
    while budget.take_retry():
        taken += 1
    return taken


def test_three_retries_are_allowed_however_few_calls_there_were(clock):
    """The share of one call is less than one retry; three there are."""
    budget = RetryBudget(clock=clock)
    budget.count_call()
    assert num_retries_of(budget) == 3


def test_a_fifth_of_the_calls_may_be_repeated(clock):
    """A hundred calls have twenty retries, ninety-nine have nineteen."""
    budget = RetryBudget(clock=clock)
    for _ in range(99):
        budget.count_call()
    assert num_retries_of(budget) == 19
    budget.count_call()
    assert num_retries_of(budget) == 1


def test_the_budget_fills_again_when_retries_leave_the_window(clock):
    """What was spent counts until the window has passed, and then no more."""
    budget = RetryBudget(window_s=10.0, clock=clock)
    assert num_retries_of(budget) == 3
    clock.advance(9.5)
    assert num_retries_of(budget) == 0
    clock.advance(0.5)
    assert num_retries_of(budget) == 3
    assert len(budget._spans) <= 11


def test_a_spent_budget_ends_the_retries(retry, slept):
    """The fourth retry of a few calls is not made, whoever asks for it."""
    with pytest.raises(ConnectionError):
        retry.call(Endpoint(*[ConnectionError() for _ in range(9)]))
    endpoint = Endpoint(ConnectionError())
    with pytest.raises(ConnectionError):
        retry.call(endpoint)
    assert endpoint.num_calls == 1


def test_a_copied_budget_has_its_settings(clock):
    """Locks do not travel; the numbers do."""
    budget = RetryBudget(min_retries=5, clock=clock)
    for copied in (copy.deepcopy(budget), pickle.loads(pickle.dumps(budget))):
        assert num_retries_of(copied) == 5


@pytest.mark.parametrize("settings", [{"share": -1}, {"min_retries": -1}, {"window_s": 0}])
def test_a_budget_has_ranges(settings):
    """Numbers below nothing are refused."""
    with pytest.raises(ValueError, match="at least 0"):
        RetryBudget(**settings)


@pytest.mark.parametrize("name", ["max_retries", "base_delay_s", "max_delay_s"])
def test_a_policy_has_ranges(name):
    """So are those of a policy."""
    with pytest.raises(ValueError, match="at least 0"):
        RetryPolicy(**{name: -1})


# ---- the order: retry, breaker, deadline, call


def test_an_opening_breaker_ends_the_retries(retry, clock):
    """The breaker is asked before every attempt; its rejection is not retried."""
    breaker = CircuitBreaker("endpoint", window_size=2, min_calls=2, clock=clock, base_wait_s=60.0)
    deadline = Deadline.after(100.0, clock)
    endpoint = Endpoint(*[ConnectionError() for _ in range(9)])

    with pytest.raises(CircuitOpenError):
        retry.call(lambda: breaker.call(deadline.call, "a fetch", endpoint), deadline=deadline)

    assert endpoint.num_calls == 2
