"""The budget: what does not fit is refused with a reason, and what a model costs is measured."""

import pytest
import torch
from torch import nn

from esper.growth.budget import (
    Budget,
    Cost,
    count_parameters,
    default_overhead,
    forward_flops,
    forward_latency_s,
)
from esper.resilience.clock import ManualClock

HOST = Cost(parameters=1_000_000, flops=1e6, latency_s=0.010)


@pytest.mark.parametrize(
    ("candidate", "word"),
    [
        (Cost(parameters=100_001), "parameters"),
        (Cost(parameters=1, flops=250_001.0), "FLOPs"),
        (Cost(parameters=1, latency_s=0.001001), "latency"),
    ],
)
def test_candidate_over_a_limit_is_refused(candidate, word):
    """A candidate just over the budget is refused, and the reason names the limit."""
    assert word in Budget().check(host=HOST, candidate=candidate)


def test_candidate_at_every_limit_fits():
    """The limits themselves are still within the budget."""
    candidate = Cost(parameters=100_000, flops=250_000.0, latency_s=0.001)
    assert Budget().check(host=HOST, candidate=candidate) is None


def test_grafts_add_up():
    """A third graft of 10 % does not fit in 25 %, though each fits by itself."""
    tenth = Cost(parameters=100_000)
    assert Budget().check(host=HOST, candidate=tenth, admitted=tenth) is None
    reason = Budget().check(host=HOST, candidate=tenth, admitted=Cost(parameters=200_000))
    assert reason == "parameters in all: +30.0% of the host, the budget has +25.0%"


def test_a_package_takes_half_of_what_is_left():
    """So that more than one can follow; a small host has no such limit."""
    room = Budget().room(host=HOST, admitted=Cost(parameters=50_000, flops=0.0))
    assert (room.parameters, room.flops) == (100_000, 125_000)
    assert room.takes(Cost(parameters=100_000, flops=125_000.0))
    assert not room.takes(Cost(parameters=100_001))
    assert not room.without(Cost(parameters=60_000)).takes(Cost(parameters=60_000))
    small = Budget().room(host=Cost(parameters=10), admitted=Cost(parameters=10**6))
    assert small.takes(Cost(parameters=10**9, flops=1e12))


def test_room_without_a_limit_is_endless():
    """Nor is it limited by FLOPs that nobody counted."""
    room = Budget(total_parameters=None).room(
        host=Cost(parameters=10**6), admitted=Cost(parameters=0)
    )
    assert room.takes(Cost(parameters=10**9, flops=1e12))


@pytest.mark.parametrize(("parameters", "fits"), [(10_000, True), (10_001, False)])
def test_small_host_has_an_absolute_limit_only(parameters, fits):
    """A host under 100,000 parameters may grow manyfold, by 10,000 parameters a graft."""
    host = Cost(parameters=358, flops=1.0, latency_s=1e-6)
    candidate = Cost(parameters=parameters, flops=1e9, latency_s=1.0)
    assert (Budget().check(host=host, candidate=candidate) is None) is fits


def test_limit_of_none_is_lifted():
    """A limit that the owner lifts is not checked."""
    budget = Budget(parameters=None, total_parameters=None)
    assert budget.check(host=HOST, candidate=Cost(parameters=10**9)) is None


@pytest.mark.parametrize("limit", [{"parameters": -0.1}, {"latency": float("nan")}])
def test_limit_that_is_none_is_refused(limit):
    """A negative limit, or one that is no number, is a caller's mistake."""
    with pytest.raises(ValueError, match="at least 0"):
        Budget(**limit)


def test_flops_are_those_of_the_multiplications():
    """A linear layer of 8 to 4 on three samples takes 2 * 8 * 4 * 3 FLOPs."""
    assert forward_flops(nn.Linear(8, 4), torch.zeros(3, 8)) == 192


def test_counting_flops_leaves_the_model_as_it_was():
    """Modes per module, buffers and the random state are what they were."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model[2].eval()
    buffers = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()
    forward_flops(model, torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_latency_is_the_median_by_the_given_clock():
    """The time of a forward is the clock's, and one slow forward does not move it."""
    clock = ManualClock()

    class Slow(nn.Module):
        durations = iter([9.0, 0.2, 0.1, 5.0])

        def forward(self, x):
            clock.advance(next(self.durations))
            return x

    measured = forward_latency_s(Slow(), torch.zeros(1), clock=clock, repeats=3, warmup=1)
    assert measured == pytest.approx(0.2)


def test_shared_parameters_count_once():
    """Tied weights are one parameter."""
    first = nn.Linear(3, 3, bias=False)
    second = nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    assert count_parameters(nn.Sequential(first, second)) == 9


@pytest.mark.parametrize(("parameters", "overhead"), [(99_999, 1.0), (100_000, 0.10)])
def test_small_host_has_a_larger_overhead(parameters, overhead):
    """What the budget calls small may take as much as its training; who lifts that, may not."""
    assert default_overhead(parameters, Budget()) == overhead
    assert default_overhead(parameters, Budget(small_host=0)) == 0.10
