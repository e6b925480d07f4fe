"""What a seed remembers of its calls, and how it is read where nothing was wrong."""

from __future__ import annotations

import math

import pytest
import torch

from esper.state import observation
from esper.state.observation import CLEAN_MARKS, Call, Observations, read

CPU = torch.device("cpu")
SEVERAL, ONE = torch.Size((8, 4)), torch.Size((1, 4))
NAN = torch.tensor(math.nan)


def seen(*calls):
    found = Observations(CPU)
    found.calls.extend(calls)
    return found


def test_what_begins_anew_goes_on_with_a_ring_and_a_sink_that_are_unused():
    """And with nothing else."""
    before = seen(Call(SEVERAL))
    before.leave(0, math.nan)
    before.skip("too little")
    after = before.anew()
    assert after.ring is before.ring
    assert after.sink is before.sink
    assert after.is_unused
    assert [*after.calls, *after.leaving, *after.skipped] == []
    assert len(before.calls) == 1


@pytest.mark.parametrize("what", ["ring", "sink"])
def test_what_compiled_code_has_left_stays_behind(what):
    """A call, or a gradient; each counts in the window in which it came."""
    before = Observations(CPU)
    if what == "ring":
        before.ring = torch.cat((before.ring[1:], torch.zeros(1, 2)))
    else:
        before.sink.grad = torch.ones(2)
    after = before.anew()
    assert after.ring is not before.ring
    assert after.sink is not before.sink
    assert after.is_unused
    assert read(after).outcomes == []


@pytest.mark.parametrize(
    "calls",
    [
        (),
        (Call(torch.Size(())),),
        (Call(SEVERAL, CLEAN_MARKS), Call(SEVERAL, CLEAN_MARKS)),
        (Call(ONE, CLEAN_MARKS),),
        (Call(ONE, CLEAN_MARKS), Call(SEVERAL)),
    ],
    ids=["none", "without a guard", "two", "of one sample", "of both"],
)
@pytest.mark.parametrize("works_on_batches", [False, True])
def test_calls_without_a_fault_are_read_in_a_glance(monkeypatch, calls, works_on_batches):
    """To what a full reading comes to."""
    quick = read(seen(*calls), works_on_batches=works_on_batches)
    monkeypatch.setattr(observation, "_shows_no_fault", lambda *_: False)
    assert quick == read(seen(*calls), works_on_batches=works_on_batches)
    assert quick.outcomes == [False] * len(calls)


def with_bad_gradient():
    found = seen(Call(SEVERAL, CLEAN_MARKS))
    found.come_in(found.calls[0], 0.0)
    found.leave(-1, math.nan)
    return found


def with_bad_compiled_call():
    found = seen(Call(SEVERAL))
    found.ring = torch.cat((found.ring[1:], torch.tensor([[0.0, math.nan]])))
    return found


@pytest.mark.parametrize(
    "make",
    [
        with_bad_gradient,
        with_bad_compiled_call,
        lambda: seen(Call(SEVERAL), Call(SEVERAL, (torch.zeros(()), NAN))),
        lambda: seen(Call(SEVERAL), Call(SEVERAL, (torch.zeros(()),), raised=True)),
    ],
    ids=["gradient", "compiled", "output", "raised"],
)
def test_a_fault_among_clean_calls_is_not_passed_over(make):
    """Wherever it is remembered."""
    reading = read(make())
    assert True in reading.outcomes
    assert reading.reason
