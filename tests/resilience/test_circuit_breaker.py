"""The circuit breaker, one state after the other."""

import asyncio
import concurrent.futures
import copy
import pickle
import random
import traceback

import pytest

from esper.contracts.errors import CircuitOpenError, KernelNotFoundError
from esper.resilience.circuit_breaker import BreakerState, CircuitBreaker
from esper.resilience.clock import ManualClock

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


class EndpointDownError(Exception):
    """What a failing endpoint raises."""


def fail():
    raise EndpointDownError


def give_up(breaker, times=1):
    """Let ``times`` calls fail."""
    for _ in range(times):
        with pytest.raises(EndpointDownError):
            breaker.call(fail)


@pytest.fixture
def clock():
    return ManualClock()


def breaker_of(clock, **settings):
    """Return a breaker that opens after 2 failures of 4 calls, for 10 s, then 20, 40, 50."""
    wanted = {
        "window_size": 4,
        "min_calls": 2,
        "failure_rate": 0.5,
        "base_wait_s": 10.0,
        "max_wait_s": 50.0,
        "jitter": 0.0,
        "half_open_limit_s": 5.0,
    }
    return CircuitBreaker("endpoint", clock=clock, **{**wanted, **settings})


def opened(clock, **settings):
    breaker = breaker_of(clock, **settings)
    give_up(breaker, settings.get("min_calls", 2))
    assert breaker.state == OPEN
    return breaker


def half_open(clock, **settings):
    """Return a half-open breaker none of whose probes is taken."""
    breaker = opened(clock, **settings)
    clock.advance(10.0)
    breaker.permit().release()
    assert breaker.state == HALF_OPEN
    return breaker


# ---- closed


def test_results_and_errors_pass_through(clock):
    """The breaker changes neither what a call returns nor what it raises."""
    breaker = breaker_of(clock)
    assert breaker.call(divmod, 7, 2) == (3, 1)
    assert breaker.call(dict, a=1) == {"a": 1}
    give_up(breaker)


def test_it_does_not_open_below_the_minimum_of_calls(clock):
    """One failure of one call is a rate of 1, and too little to go by."""
    breaker = breaker_of(clock, min_calls=3)
    give_up(breaker, 2)
    assert breaker.state == CLOSED
    give_up(breaker)
    assert breaker.state == OPEN


def test_it_opens_when_the_rate_is_reached_not_when_it_is_passed(clock):
    """At a threshold of 7 %, the 7th failure of 100 calls opens, and 6 do not."""
    breaker = breaker_of(clock, window_size=100, min_calls=100, failure_rate=0.07)
    give_up(breaker, 6)
    for _ in range(94):
        breaker.call(int)
    assert breaker.state == CLOSED
    breaker = breaker_of(clock, window_size=100, min_calls=100, failure_rate=0.07)
    give_up(breaker, 7)
    for _ in range(93):
        breaker.call(int)
    assert breaker.state == OPEN


def test_the_window_forgets_the_oldest(clock):
    """A failure that four later calls have pushed out counts no more."""
    breaker = breaker_of(clock)
    breaker.call(int)
    give_up(breaker)
    assert breaker.state == OPEN  # one of two
    breaker = breaker_of(clock, min_calls=4)
    give_up(breaker)
    for _ in range(4):
        breaker.call(int)
    give_up(breaker)
    assert breaker.state == CLOSED  # one of four, the first is gone
    give_up(breaker)
    assert breaker.state == OPEN


# ---- open


def test_open_rejects_until_its_wait_is_over(clock):
    """Nobody is asked before the wait has passed; at its very end somebody is."""
    breaker = opened(clock)
    clock.advance(9.5)
    with pytest.raises(CircuitOpenError, match=r"endpoint .* in 0\.5 s") as caught:
        breaker.call(pytest.fail)
    assert caught.value.retry_after_s == 0.5
    clock.advance(0.5)
    assert breaker.call(lambda: "answer") == "answer"
    assert breaker.state == CLOSED


def test_each_opening_in_a_row_doubles_the_wait_up_to_a_cap(clock):
    """10, 20, 40, 50, 50 seconds; a success starts again at 10."""
    waits_s = []
    breaker = breaker_of(clock, on_transition=lambda move: waits_s.append(move.wait_s))
    give_up(breaker, 2)
    for wait_s in (10.0, 20.0, 40.0, 50.0):
        clock.advance(wait_s)
        give_up(breaker)
    clock.advance(50.0)
    breaker.call(int)
    give_up(breaker, 2)
    assert [wait_s for wait_s in waits_s if wait_s] == [10.0, 20.0, 40.0, 50.0, 50.0, 10.0]
    stats = breaker.stats()
    assert (stats.openings, stats.succeeded, stats.failed) == (6, 1, 8)


def test_jitter_shortens_a_wait_by_the_injected_generator(clock):
    """A wait of w seconds is drawn from ((1 - jitter) w, w), the same for the same generator."""

    def waits_s(seed):
        told = []
        breaker = breaker_of(clock, jitter=0.3, rng=random.Random(seed), on_transition=told.append)
        give_up(breaker, 2)
        for _ in range(9):
            clock.advance(50.0)
            give_up(breaker)
        return [move.wait_s for move in told if move.after == OPEN]

    assert waits_s(1) == waits_s(1) != waits_s(2)
    for drawn, full in zip(waits_s(3), [10.0, 20.0, 40.0] + [50.0] * 7, strict=True):
        assert 0.7 * full <= drawn <= full
    assert len(set(waits_s(3)[3:])) > 1


def test_a_hundred_rejections_are_a_hundred_errors_of_one_length(clock):
    """A rejected call raises an error of its own, whose traceback does not grow."""
    breaker = opened(clock)
    lengths = set()
    errors = []
    for _ in range(100):
        with pytest.raises(CircuitOpenError) as caught:
            breaker.call(int)
        errors.append(caught.value)
        lengths.add(len(traceback.extract_tb(caught.value.__traceback__)))
        assert caught.value.__context__ is None
    assert len(lengths) == 1
    assert len({id(error) for error in errors}) == 100
    assert breaker.stats().rejected == 100


def test_a_rejection_can_be_pickled():
    """It crosses a process boundary whole."""
    error = pickle.loads(pickle.dumps(CircuitOpenError("urza", 1.5)))
    assert (error.name, error.retry_after_s, str(error)[:5]) == ("urza", 1.5, "urza ")


# ---- half-open


def test_half_open_admits_its_probes_and_no_more(clock):
    """With three probes out, the fourth caller is rejected."""
    breaker = half_open(clock, num_probes=3)
    probes = [breaker.permit() for _ in range(3)]
    with pytest.raises(CircuitOpenError) as caught:
        breaker.permit()
    assert caught.value.retry_after_s == 0.0  # nobody knows how long the probes take
    probes[0].succeed()
    with pytest.raises(CircuitOpenError):  # one passed, two are out: three in all
        breaker.permit()


def test_all_probes_must_succeed_to_close(clock):
    """Two of three leave it half-open."""
    breaker = half_open(clock, num_probes=3)
    breaker.call(int)
    breaker.call(int)
    assert breaker.state == HALF_OPEN
    breaker.call(int)
    assert breaker.state == CLOSED


def test_it_closes_with_an_empty_window(clock):
    """What was counted before it opened is no part of the minimum of calls after it closed."""
    breaker = half_open(clock, min_calls=3, failure_rate=0.3)
    breaker.call(int)
    give_up(breaker, 2)
    assert breaker.state == CLOSED
    give_up(breaker)
    assert breaker.state == OPEN


def test_any_failed_probe_opens(clock):
    """One failure undoes two successes, and the others' results count no more."""
    breaker = half_open(clock, num_probes=3)
    breaker.call(int)
    slow = breaker.permit()
    give_up(breaker)
    assert breaker.state == OPEN
    slow.succeed()
    assert breaker.stats().late == 1
    clock.advance(20.0)
    breaker.call(int)
    assert breaker.state == HALF_OPEN  # it takes three again


@pytest.mark.parametrize("error", [KernelNotFoundError, asyncio.CancelledError, KeyboardInterrupt])
def test_a_probe_that_says_nothing_gives_its_place_back(clock, error):
    """An ignored error, a cancellation or an interrupt neither closes nor opens."""
    breaker = half_open(clock, num_probes=1, ignored=(KernelNotFoundError,))
    for _ in range(3):
        with pytest.raises(error), breaker.permit():
            raise error
        assert breaker.state == HALF_OPEN
    breaker.call(int)
    assert breaker.state == CLOSED


def test_half_open_has_a_time_limit(clock):
    """Probes that never come back open it again, from the limit on, for twice as long."""
    breaker = half_open(clock)
    lost = breaker.permit()
    clock.advance(4.5)
    assert breaker.state == HALF_OPEN
    clock.advance(0.5)
    assert breaker.state == OPEN
    clock.advance(19.5)
    with pytest.raises(CircuitOpenError):
        breaker.permit()
    clock.advance(0.5)
    probe = breaker.permit()
    lost.succeed()
    assert breaker.state == HALF_OPEN
    probe.succeed()
    assert breaker.state == CLOSED


def test_a_success_after_the_time_limit_comes_too_late(clock):
    """The limit holds whether or not anybody looked in between."""
    breaker = half_open(clock)
    probe = breaker.permit()
    clock.advance(5.0)
    probe.succeed()
    assert breaker.state == OPEN


# ---- what counts


@pytest.mark.parametrize(
    "error",
    [
        KernelNotFoundError("no"),
        asyncio.CancelledError(),
        concurrent.futures.CancelledError(),
        KeyboardInterrupt(),
        GeneratorExit(),
    ],
)
def test_what_says_nothing_counts_nothing(clock, error):
    """Any number of them leave the window as it was."""
    breaker = breaker_of(clock, ignored=(KernelNotFoundError,))
    for _ in range(5):
        with pytest.raises(type(error)), breaker.permit():
            raise error
    stats = breaker.stats()
    assert (stats.released, stats.succeeded, stats.failed) == (5, 0, 0)
    give_up(breaker)
    assert breaker.state == CLOSED  # the window holds one call


def test_an_answer_is_a_success_whatever_it_says(clock):
    """An error by which the endpoint answered closes a half-open breaker."""
    breaker = half_open(clock, answers=(KernelNotFoundError,))
    with pytest.raises(KernelNotFoundError), breaker.permit():
        raise KernelNotFoundError("none such")
    assert breaker.state == CLOSED


def test_a_late_result_counts_nothing_and_releases_nothing(clock):
    """A call that began before the breaker opened does not take a probe's place or speak for it."""
    breaker = breaker_of(clock)
    early = [breaker.permit() for _ in range(3)]
    give_up(breaker, 2)
    clock.advance(10.0)
    probe = breaker.permit()
    early[0].fail()
    early[1].succeed()
    early[2].release()
    assert breaker.state == HALF_OPEN
    with pytest.raises(CircuitOpenError):
        breaker.permit()
    probe.succeed()
    assert breaker.state == CLOSED
    assert breaker.stats().late == 3


def test_a_permit_is_settled_once(clock):
    """The first word counts, also when the block around it ends otherwise."""
    breaker = breaker_of(clock)
    permit = breaker.permit()
    permit.succeed()
    permit.fail()
    with pytest.raises(EndpointDownError), permit:
        raise EndpointDownError
    stats = breaker.stats()
    assert (stats.permitted, stats.succeeded, stats.failed) == (1, 1, 0)


# ---- listeners


def test_transitions_are_told_in_order_with_their_generation(clock):
    """A listener hears what was left, what was entered, and which change it was."""
    told = []
    breaker = breaker_of(clock, on_transition=told.append)
    give_up(breaker, 2)
    clock.advance(10.0)
    breaker.call(int)
    steps = [(m.name, m.before, m.after, m.generation) for m in told]
    assert steps == [
        ("endpoint", CLOSED, OPEN, 1),
        ("endpoint", OPEN, HALF_OPEN, 2),
        ("endpoint", HALF_OPEN, CLOSED, 3),
    ]
    assert breaker.stats().generation == 3


def test_a_listener_may_use_the_breaker_and_cannot_break_it(clock, caplog):
    """It runs outside the lock, and what it raises reaches the log and not the caller."""

    def listen(move):
        seen.append(breaker.state)
        raise RuntimeError("a listener's own fault")

    seen = []
    breaker = breaker_of(clock, on_transition=listen)
    give_up(breaker, 2)
    assert seen == [OPEN]
    assert "breaker 'endpoint': its listener failed" in caplog.text
    assert "a listener's own fault" in caplog.text
    clock.advance(10.0)
    breaker.call(int)
    assert breaker.state == CLOSED


def test_an_interrupted_listener_does_not_keep_a_probe(clock):
    """An interrupt while the listener hears of half-open gives the place back."""

    def listen(move):
        if move.after == HALF_OPEN:
            raise KeyboardInterrupt

    breaker = breaker_of(clock, on_transition=listen)
    give_up(breaker, 2)
    clock.advance(10.0)
    with pytest.raises(KeyboardInterrupt):
        breaker.permit()
    breaker.call(int)
    assert breaker.state == CLOSED


# ---- sync and async


def test_async_calls_count_in_the_same_window(clock):
    """One failure awaited and one called open it; two event loops in turn may use it."""
    breaker = breaker_of(clock)

    async def fail_later():
        raise EndpointDownError

    with pytest.raises(EndpointDownError):
        asyncio.run(breaker.call_async(fail_later))
    give_up(breaker)
    assert breaker.state == OPEN

    async def answer(value):
        return value

    with pytest.raises(CircuitOpenError):
        asyncio.run(breaker.call_async(answer, 1))
    clock.advance(10.0)
    assert asyncio.run(breaker.call_async(answer, 1)) == 1
    assert asyncio.run(breaker.call_async(answer, value=2)) == 2
    assert breaker.state == CLOSED


def test_a_cancelled_probe_neither_closes_nor_opens(clock):
    """A task that is cancelled while it waits for the endpoint gives its place to the next."""
    breaker = half_open(clock)

    async def main():
        waiting = asyncio.create_task(breaker.call_async(asyncio.Event().wait))
        await asyncio.sleep(0)
        with pytest.raises(CircuitOpenError):
            breaker.permit()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(main())
    assert breaker.state == HALF_OPEN
    breaker.call(int)
    assert breaker.state == CLOSED


# ---- copies


def copies_of(breaker):
    return [copy.copy(breaker), copy.deepcopy(breaker), pickle.loads(pickle.dumps(breaker))]


def test_a_copy_is_a_breaker_of_its_own_in_the_same_state(clock):
    """An open breaker's copies are open for as long, and what they do is not the original's."""
    breaker = opened(clock, on_transition=lambda move: None)
    clock.advance(9.0)
    for copied in copies_of(breaker):
        with pytest.raises(CircuitOpenError) as caught:
            copied.permit()
        assert caught.value.retry_after_s == 1.0
    assert breaker.stats().rejected == 0


def test_a_copy_owes_nothing_to_permits_that_are_out(clock):
    """A probe of the original takes no place in the copy."""
    breaker = half_open(clock)
    probe = breaker.permit()
    for copied in copies_of(breaker):
        copied.call(int)
        assert copied.state == CLOSED
    probe.fail()
    assert breaker.state == OPEN


def test_a_copy_shares_no_window(clock):
    """Failures of a copy do not open the original, whose listener does not hear of them."""
    told = []
    breaker = breaker_of(clock, min_calls=3, on_transition=told.append)
    for copied in copies_of(breaker):
        give_up(copied)
    give_up(breaker, 2)
    assert breaker.state == CLOSED
    for copied in copies_of(breaker):
        give_up(copied)
        assert copied.state == OPEN
    assert breaker.state == CLOSED
    assert told == []


def test_a_listener_hears_nothing_of_copies(clock):
    """Also where the first call of a copy makes it half-open."""
    told = []
    breaker = opened(clock, on_transition=told.append)
    clock.advance(10.0)
    for copied in copies_of(breaker):
        copied.call(int)
        assert copied.state == CLOSED
    assert breaker.state == OPEN
    assert [move.after for move in told] == [OPEN]


# ---- settings


@pytest.mark.parametrize(
    "settings",
    [
        {"min_calls": 0},
        {"min_calls": 5},
        {"min_calls": 2, "window_size": 0},
        {"failure_rate": 0.0},
        {"failure_rate": 1.1},
        {"base_wait_s": 0.0},
        {"base_wait_s": 51.0},
        {"jitter": -0.1},
        {"jitter": 1.1},
        {"num_probes": 0},
        {"half_open_limit_s": 0.0},
        {"failure_rate": float("nan")},
    ],
)
def test_settings_have_ranges(clock, settings):
    """A breaker that could never open, close or wait is refused, and the setting is named."""
    (name, value), *_ = settings.items()
    with pytest.raises(
        ValueError, match=rf"^{name} must be (in|at least|above) .*, found {value}$"
    ):
        breaker_of(clock, **settings)


def test_settings_may_be_at_the_ends_of_their_ranges(clock):
    """A wait that never grows, is drawn from 0 on, or is shorter than a second is legal."""
    breaker = breaker_of(
        clock,
        window_size=1,
        min_calls=1,
        failure_rate=1.0,
        base_wait_s=0.5,
        max_wait_s=0.5,
        jitter=1.0,
        half_open_limit_s=0.5,
    )
    give_up(breaker)
    clock.advance(0.5)
    breaker.call(int)
    assert breaker.state == CLOSED


def test_defaults_are_those_of_the_documentation(clock):
    """Five calls at least, of the last 20; waits of 1 s to 60 s; 30 s for those who try."""
    told = []
    breaker = CircuitBreaker("endpoint", clock=clock, jitter=0.0, on_transition=told.append)
    for _ in range(11):
        breaker.call(int)
    give_up(breaker, 9)
    assert breaker.state == CLOSED
    give_up(breaker)  # ten of the last twenty
    for _ in range(7):
        clock.advance(told[-1].wait_s)
        breaker.permit()
        clock.advance(29.5)
        assert breaker.state == HALF_OPEN
        clock.advance(0.5)
        assert breaker.state == OPEN
    waits_s = [move.wait_s for move in told if move.after == OPEN]
    assert waits_s == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    breaker = CircuitBreaker("endpoint", clock=clock)
    give_up(breaker, 4)
    assert breaker.state == CLOSED
    give_up(breaker)
    assert breaker.state == OPEN
