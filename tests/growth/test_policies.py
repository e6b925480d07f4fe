"""Policies: when each of them says yes, and what it remembers."""

import json

import pytest

from esper.growth.policies import ByHand, Choice, DiminishingReturns, EveryN


def test_default_policy_asks_the_detector():
    """A plateau that the policy observed makes it grow, and it leaves the choice open."""
    policy = DiminishingReturns()
    for update in range(0, 800, 20):
        policy.observe(update, 1.0, 1.0)
    assert policy.decide(780, None).grow
    assert policy.choice() is None


def test_every_n_counts_from_the_last_germination():
    """A graft is due n updates after the start, then n after each germination."""
    policy = EveryN(100)
    assert not policy.decide(99, None).grow
    assert policy.decide(100, None).grow
    policy.germinated(130)
    assert not policy.decide(229, None).grow
    assert policy.decide(230, None).grow


def test_every_n_spares_the_end_of_a_run():
    """In the last 20 % of a known horizon not even a schedule grows."""
    assert EveryN(100).decide(800, 1000).verdict == "too_late"


def test_by_hand_goes_through_its_choices_in_order():
    """Each choice waits for its update, and the next for the germination of the one before."""
    policy = ByHand([("features.0", "mlp-16"), ("head", "mlp-8", 50)])
    assert policy.decide(0, None).grow
    assert policy.choice() == Choice(site="features.0", blueprint="mlp-16")
    policy.germinated(10)
    assert not policy.decide(49, None).grow
    assert policy.decide(50, None).grow
    assert policy.choice() == Choice(site="head", blueprint="mlp-8", update=50)
    policy.germinated(60)
    assert policy.choice() is None
    assert not policy.decide(70, None).grow


def test_deciding_changes_nothing():
    """A decision that is not carried out is given again."""
    policy = ByHand([("head", "mlp-8")])
    assert policy.decide(0, None) == policy.decide(0, None)


@pytest.mark.parametrize("entry", ["head", ("head",), ("head", "mlp-8", -1)])
def test_malformed_choice_is_refused(entry):
    """A choice that names no site and kernel is refused where it is made."""
    with pytest.raises(ValueError, match="got"):
        ByHand([entry])


@pytest.mark.parametrize(
    "build",
    [DiminishingReturns, lambda: EveryN(10), lambda: ByHand([("a", "b"), ("c", "d")])],
    ids=["diminishing", "every-n", "by-hand"],
)
def test_memory_survives_a_round_trip_through_json(build):
    """A policy with the state of another decides as it does."""
    policy, copy = build(), build()
    for update in range(0, 800, 20):
        policy.observe(update, 1.0, 1.0)
    policy.germinated(795)
    copy.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert copy.decide(800, None) == policy.decide(800, None)
    assert copy.choice() == policy.choice()
