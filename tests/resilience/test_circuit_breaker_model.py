"""The circuit breaker against a model that keeps every event and recomputes from it."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.contracts.errors import CircuitOpenError
from esper.resilience.circuit_breaker import CircuitBreaker
from esper.resilience.clock import ManualClock

WINDOW, MIN_CALLS, RATE, BASE_S, CAP_S, LIMIT_S = 3, 2, 0.5, 8.0, 30.0, 6.0


class Model:
    """What the breaker's documentation says, as slowly and plainly as it can be written."""

    def __init__(self, num_probes):
        self.num_probes = num_probes
        self.epochs = [("closed", None)]  # every state so far, with the end of its wait or limit
        self.results = []  # of the state now
        self.out = 0  # permits of the state now that are not settled
        self.num_openings_in_a_row = 0

    @property
    def state(self):
        return self.epochs[-1][0]

    def enter(self, state, until=None):
        self.epochs.append((state, until))
        self.results, self.out = [], 0

    def open(self, since):
        wait = min(CAP_S, BASE_S * 2**self.num_openings_in_a_row)
        self.num_openings_in_a_row += 1
        self.enter("open", since + wait)

    def look(self, now):
        state, until = self.epochs[-1]
        if state == "half_open" and now >= until:
            self.open(until)

    def ask(self, now):
        """Return the number of the state that a permit belongs to, or None."""
        self.look(now)
        state, until = self.epochs[-1]
        if state == "open" and now >= until:
            self.enter("half_open", now + LIMIT_S)
        num_taken = self.out + len(self.results)
        if self.state == "open" or (self.state == "half_open" and num_taken >= self.num_probes):
            return None
        self.out += 1
        return len(self.epochs)

    def settle(self, epoch, result, now):
        self.look(now)
        if epoch != len(self.epochs):
            return
        self.out -= 1
        if result == "release":
            return
        self.results.append(result)
        if self.state == "half_open":
            if result == "fail":
                self.open(now)
            elif len(self.results) == self.num_probes:
                self.num_openings_in_a_row = 0
                self.enter("closed")
        else:
            window = self.results[-WINDOW:]
            if len(window) >= MIN_CALLS and window.count("fail") / len(window) >= RATE:
                self.open(now)


RESULTS = st.sampled_from(["succeed", "succeed", "fail", "fail", "release"])
MOVES = st.one_of(
    st.just(("ask",)),
    st.tuples(st.just("call"), RESULTS),
    st.tuples(st.just("settle"), st.integers(0, 30), RESULTS),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 6.0, 8.0, 16.0, 30.0])),
)


def follow(moves, num_probes):
    """Make the same moves with both; they must agree after each."""
    clock = ManualClock()
    model = Model(num_probes)
    breaker = CircuitBreaker(
        "endpoint",
        window_size=WINDOW,
        min_calls=MIN_CALLS,
        failure_rate=RATE,
        base_wait_s=BASE_S,
        max_wait_s=CAP_S,
        jitter=0.0,
        num_probes=num_probes,
        half_open_limit_s=LIMIT_S,
        clock=clock,
    )
    permits = []
    num_asked = 0
    for move, *details in moves:
        if move == "wait":
            clock.advance(*details)
        elif move in ("ask", "call"):
            num_asked += 1
            epoch = model.ask(clock.now())
            try:
                permits.append((breaker.permit(), epoch))
                assert epoch is not None
            except CircuitOpenError:
                assert epoch is None
                continue
        if move in ("call", "settle") and permits:
            number, result = (-1, *details)[-2:]
            permit, epoch = permits.pop(number % len(permits))
            getattr(permit, result)()
            model.settle(epoch, result, clock.now())
        model.look(clock.now())
        stats = breaker.stats()
        assert stats.state == model.state
        assert stats.generation == len(model.epochs) - 1
        assert stats.permitted + stats.rejected == num_asked
        settled = stats.succeeded + stats.failed + stats.released + stats.late
        assert stats.permitted == settled + len(permits)


@given(moves=st.lists(MOVES, min_size=20, max_size=80), num_probes=st.integers(1, 2))
@settings(max_examples=200, deadline=None)
def test_the_breaker_does_what_the_model_does(moves, num_probes):
    """In any order of calls, results and waits both are in the same state after every move."""
    follow(moves, num_probes)


@pytest.mark.torture
@given(moves=st.lists(MOVES, min_size=20, max_size=80), num_probes=st.integers(1, 2))
@settings(max_examples=100_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_breaker_does_what_the_model_does_a_hundred_thousand_times(moves, num_probes):
    """The same, for as long as it takes."""
    follow(moves, num_probes)
