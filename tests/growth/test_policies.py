"""Policies: when each of them says yes, and what it remembers."""

import inspect
import json
import math
import textwrap
from dataclasses import replace

import pytest
import torch
from growing import X, Y, equal_states, evaluate, growing, host, train, wrapped
from torch import nn

from esper.contracts.errors import GrowthError
from esper.contracts.events import KernelEmbargoed
from esper.fetching.incidents import announce
from esper.growth.detector import Detector
from esper.growth.policies import (
    AllOf,
    AnyOf,
    ByHand,
    DiminishingReturns,
    EveryN,
    Never,
    Policy,
    choices_of,
    outlook_of,
    waits_until,
)
from esper.growth.ranking import FirstOrderGain, GradientNorm, RandomChoice
from esper.growth.reading import Choice, Decision, Reading
from esper.growth.staged import Staged
from esper.wrapping.wrap import wrap


def test_default_policy_asks_the_detector():
    """A plateau that the policy observed makes it grow, and it leaves the choice open."""
    policy = DiminishingReturns()
    for update in range(0, 800, 20):
        policy.observe(Reading(update=update, train_loss=1.0, gate_loss=1.0))
    decision = policy.decide(Reading(update=780))
    assert decision.grow
    assert decision.choice is None


def test_default_policy_says_yes_to_the_first_package_between_evaluations_too():
    """Its moment is fixed beforehand, and no loss has a say in it."""
    policy = DiminishingReturns()
    for update, grows in ((99, False), (100, True)):
        assert policy.decide(Reading(update=update, horizon=1000)).grow is grows
    assert not policy.decide(Reading(update=101, horizon=1000, num_packages=1)).grow


def test_default_policy_says_yes_at_evaluations_only():
    """Between two of them its losses are stale."""
    policy = DiminishingReturns()
    for update in range(0, 800, 20):
        policy.observe(Reading(update=update, train_loss=1.0, gate_loss=1.0))
    assert policy.decide(Reading(update=781)).verdict == "waiting"


def test_every_n_counts_from_the_last_germination():
    """A graft is due n updates after the start, then n after each germination."""
    policy = EveryN(100)
    assert not policy.decide(Reading(update=99)).grow
    assert policy.decide(Reading(update=100)).grow
    policy.germinated(130, None)
    assert not policy.decide(Reading(update=229)).grow
    assert policy.decide(Reading(update=230)).grow


def test_every_n_spares_the_end_of_a_run():
    """In the last 20 % of a known horizon not even a schedule grows."""
    assert EveryN(100).decide(Reading(update=800, horizon=1000)).verdict == "too_late"


def test_by_hand_goes_through_its_choices_in_order():
    """Each choice waits for its update, and the next for the germination of the one before."""
    policy = ByHand([("features.0", "mlp-16"), ("head", "mlp-8", 50)])
    first = policy.decide(Reading(update=0))
    assert first.grow
    assert first.choice == Choice(site="features.0", blueprint="mlp-16")
    policy.germinated(10, first.choice)
    assert not policy.decide(Reading(update=49)).grow
    second = policy.decide(Reading(update=50))
    assert second.choice == Choice(site="head", blueprint="mlp-8", update=50)
    policy.germinated(60, second.choice)
    assert not policy.decide(Reading(update=70)).grow


def test_by_hand_does_not_count_what_others_germinated():
    """Beside another policy its own choices stay to be done."""
    policy = ByHand([("head", "mlp-8")])
    policy.germinated(10, None)
    policy.germinated(20, Choice(site="features.0", blueprint="mlp-16"))
    assert policy.decide(Reading(update=30)).choice == Choice(site="head", blueprint="mlp-8")


def test_never_grows_at_no_update():
    """Neither at the start nor late."""
    assert not any(Never().decide(Reading(update=update)).grow for update in (0, 10**6))


def test_any_of_follows_the_first_that_says_yes():
    """With its verdict and its choice; where none does, every reason is told."""
    policy = AnyOf(EveryN(100), ByHand([("head", "mlp-8", 50)]))
    named = policy.decide(Reading(update=60))
    assert named.choice == Choice(site="head", blueprint="mlp-8", update=50)
    assert policy.decide(Reading(update=100)).choice is None
    assert policy.decide(Reading(update=49)).reason == (
        "the next graft is due at 100; 'head' is due at update 50"
    )


def test_any_of_tells_each_what_germinated():
    """The schedule counts from a graft by hand, and by hand does not take the schedule's."""
    policy = AnyOf(EveryN(100), ByHand([("head", "mlp-8", 150)]))
    policy.germinated(100, policy.decide(Reading(update=100)).choice)
    assert not policy.decide(Reading(update=149)).grow
    by_hand = policy.decide(Reading(update=150))
    policy.germinated(150, by_hand.choice)
    assert not policy.decide(Reading(update=249)).grow
    assert policy.decide(Reading(update=250)).choice is None


def test_all_of_grows_where_each_would():
    """A graft by hand, but not before the run has been on for a while."""
    policy = AllOf(EveryN(100), ByHand([("head", "mlp-8")]))
    assert not policy.decide(Reading(update=99)).grow
    both = policy.decide(Reading(update=100))
    assert both.choice == Choice(site="head", blueprint="mlp-8")
    assert both.reason == "a graft was due at 100; 'head' was named by hand"
    assert not AllOf(EveryN(1), Never()).decide(Reading(update=100)).grow


def test_choices_by_hand_are_found_inside_composed_policies():
    """So that a site that does not exist is refused wherever it was named."""
    by_hand = ByHand([("head", "mlp-8")])
    assert choices_of(AnyOf(EveryN(5), AllOf(EveryN(5), by_hand))) == by_hand.choices
    assert choices_of(Never()) == ()
    with pytest.raises(GrowthError, match="'7' is no site"):
        growing(*wrapped(), policy=AnyOf(EveryN(5), ByHand([("7", "mlp-8")])))


class OnlyDecides:
    def decide(self, reading):
        raise AssertionError


class ObservesThree(Policy):
    """A policy that wants to be told three things one by one."""

    def observe(self, update, train_loss, gate_loss):
        raise AssertionError

    def decide(self, reading):
        raise AssertionError


class DecidesWithoutReading(Policy):
    def decide(self):
        raise AssertionError


NO_POLICIES = [
    (EveryN, "the class EveryN; make one of it"),
    ("often", r"the method observe\(\); str has none"),
    (OnlyDecides(), r"the method observe\(\); OnlyDecides has none; derive it from esper.Policy"),
    (ObservesThree(), r"observe\(reading\); ObservesThree has observe\(update, train_loss"),
    (DecidesWithoutReading(), r"decide\(reading\); DecidesWithoutReading has decide\(\)"),
]


@pytest.mark.parametrize(("part", "words"), NO_POLICIES, ids=lambda part: type(part).__name__)
def test_what_is_no_policy_is_refused_at_every_door(part, words):
    """The Grower and the composed policies refuse the same, and say the same of it."""
    for door in (
        lambda: growing(*wrapped(), policy=part),
        lambda: AnyOf(EveryN(1), part),
        lambda: AllOf(part),
    ):
        with pytest.raises(TypeError, match=words):
            door()


@pytest.mark.parametrize("kind", [AnyOf, AllOf])
def test_policies_are_composed_one_by_one(kind):
    """Nothing, and a list of policies, is refused with the cure."""
    with pytest.raises(TypeError, match=f"{kind.__name__} is made of one policy or more, got none"):
        kind()
    with pytest.raises(TypeError, match=f"one by one: {kind.__name__}"):
        kind([EveryN(1), Never()])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: EveryN("3"), TypeError, r"updates is a whole number.*'3' \(a str\)"),
        (lambda: EveryN(True), TypeError, "updates is a whole number.*True"),
        (lambda: EveryN(2.5), TypeError, r"updates is a whole number.*2\.5"),
        (lambda: EveryN(0), ValueError, "updates is a whole number, at least 1; got 0"),
        (lambda: DiminishingReturns(3), TypeError, "detector is a Detector.*3"),
        (lambda: ByHand([("0", "mlp", "x")]), TypeError, "update of '0' is a whole number.*'x'"),
        (lambda: ByHand([(0, "mlp")]), TypeError, "site is the name of a layer; got 0"),
        (
            lambda: ByHand(Choice(site="0", blueprint="mlp")),
            TypeError,
            r"choices is a list of choices, also of one: \[choice\]; got Choice",
        ),
        (lambda: ByHand(None), TypeError, "choices is a list.*None"),
        (lambda: Choice(site=3, blueprint=4), TypeError, "site is the name of a layer; got 3"),
        (lambda: Choice(site="0", blueprint=4), TypeError, "blueprint is a BlueprintIR.*4"),
        (lambda: Choice(site="0", blueprint="b", update=-1), ValueError, "update of '0'.*-1"),
        (
            lambda: Decision(grow=True, verdict="nonsense", reason=""),
            ValueError,
            "verdict is 'diminishing'.*'nonsense'",
        ),
        (
            lambda: Decision(grow=True, verdict="waiting", reason="", choice=("0", "mlp")),
            TypeError,
            "choice is an esper.Choice or None.*tuple",
        ),
        (lambda: FirstOrderGain(random_seed="x"), TypeError, "random_seed is a whole number.*'x'"),
        (lambda: FirstOrderGain(ridge="x"), TypeError, "ridge is a finite number.*'x'"),
        (lambda: FirstOrderGain(ridge=0.0), ValueError, "ridge is a finite number.*0"),
        (lambda: RandomChoice(1.5), TypeError, r"random_seed is a whole number.*1\.5"),
        (lambda: GradientNorm(random_seed=None), TypeError, "random_seed is a whole number"),
    ],
)
def test_an_argument_that_makes_no_sense_is_named(make, error, words):
    """Where it is given, not when it is first used."""
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("policy", "missing"),
    [
        (DiminishingReturns(), "observed_at"),
        (EveryN(3), "last"),
        (ByHand([]), "num_done"),
        (AnyOf(Never()), "policies"),
    ],
    ids=["diminishing", "every-n", "by-hand", "any-of"],
)
def test_a_state_that_lacks_something_is_refused_by_its_name(policy, missing):
    """And the policy remembers what it did."""
    before = policy.state_dict()
    with pytest.raises(ValueError, match=f"has '{missing}'.*state_dict"):
        policy.load_state_dict({})
    assert policy.state_dict() == before


def test_policy_of_ones_own_is_as_short_as_its_documentation_says():
    """The example in the protocol's docstring runs, and grows where it says."""
    code = inspect.cleandoc(Policy.__doc__).split("::\n\n")[1].split("\n\nThe other")[0]
    namespace = {"Policy": Policy, "Reading": Reading, "Decision": Decision}
    exec(textwrap.dedent(code), namespace)
    policy = namespace["WhenRateIsSpent"]()
    assert not policy.decide(Reading(update=10, rates=(1e-2, 1e-5))).grow
    assert policy.decide(Reading(update=10, rates=(1e-5,))).grow


def test_policy_sees_what_the_owner_measures():
    """The reading has losses, metrics, rates and times, and the last evaluation's in between."""
    seen, asked = [], []

    class Watching(Never):
        def observe(self, reading):
            seen.append(reading)

        def decide(self, reading):
            asked.append(reading)
            return super().decide(reading)

    model, optimizer = wrapped(lr=1e-2)
    measure = lambda m: (evaluate(m), {"spread": m[0].weight.std()})  # noqa: E731
    grower = growing(model, optimizer, policy=Watching(), evaluate=measure, horizon=50)
    train(model, optimizer, 25, grower)
    assert [reading.update for reading in seen] == [1, 11, 21]
    assert [reading.update for reading in asked] == list(range(1, 26))
    assert asked[15] == replace(seen[1], update=16)
    last = grower.report().evaluations[-1]
    assert (seen[-1].gate_loss, seen[-1].train_loss) == (last.gate_loss, last.train_loss)
    assert seen[-1].metrics == last.metrics
    assert seen[-1].metrics.keys() == {"spread"}
    assert (seen[-1].rates, seen[-1].horizon) == ((1e-2,), 50)


def test_deciding_changes_nothing():
    """A decision that is not carried out is given again."""
    policy = ByHand([("head", "mlp-8")])
    assert policy.decide(Reading(update=0)) == policy.decide(Reading(update=0))


@pytest.mark.parametrize("entry", ["head", ("head",), ("head", "mlp-8", -1)])
def test_malformed_choice_is_refused(entry):
    """A choice that names no site and kernel is refused where it is made."""
    with pytest.raises(ValueError, match="got"):
        ByHand([entry])


@pytest.mark.parametrize(
    "build",
    [
        DiminishingReturns,
        lambda: EveryN(10),
        lambda: ByHand([("a", "b"), ("c", "d")]),
        Never,
        lambda: AnyOf(EveryN(100), ByHand([("a", "b"), ("c", "d", 2000)])),
        lambda: AllOf(DiminishingReturns(), AnyOf(EveryN(10), Never())),
    ],
    ids=["diminishing", "every-n", "by-hand", "never", "any-of", "all-of"],
)
def test_memory_survives_a_round_trip_through_json(build):
    """A policy with the state of another decides as it does."""
    policy, copy = build(), build()
    for update in range(0, 800, 20):
        policy.observe(Reading(update=update, train_loss=1.0, gate_loss=1.0))
    policy.germinated(700, Choice(site="a", blueprint="b"))
    copy.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    for update in (709, 780, 800, 2000):
        assert copy.decide(Reading(update=update)) == policy.decide(Reading(update=update))


def test_memory_of_another_composition_is_refused():
    """A policy more or less is not the same policy."""
    with pytest.raises(ValueError, match="of 1 policies, this is made of 2"):
        AnyOf(EveryN(1), Never()).load_state_dict(AnyOf(Never()).state_dict())


def test_a_policy_that_was_used_before_begins_anew():
    """A second run's first updates come before the last germination of the first."""
    policy = EveryN(20)
    policy.germinated(480, None)
    assert not policy.decide(Reading(update=10, horizon=500)).grow
    assert policy.decide(Reading(update=20, horizon=500)).grow


def test_a_policy_says_how_near_its_yes_is():
    """Of any the nearest, of all the farthest; who says nothing may say yes at any time."""
    reading = Reading(update=25)
    every, silent = EveryN(100), type("Silent", (Policy,), {"decide": None})()
    assert outlook_of(every, reading) == 0.25
    assert outlook_of(EveryN(10), reading) == 1.0
    assert outlook_of(EveryN(10), Reading(update=90, horizon=100)) == 0.0
    assert outlook_of(silent, reading) == outlook_of(object(), reading) == 1.0
    assert outlook_of(Never(), reading) == outlook_of(ByHand([]), reading) == 0.0
    assert outlook_of(AnyOf(Never(), every), reading) == 0.25
    assert outlook_of(AllOf(Never(), every), reading) == 0.0


def overfitting():
    """A policy that has observed a rising held-out loss."""
    policy = DiminishingReturns()
    for update in range(0, 400, 20):
        policy.observe(
            Reading(update=update, train_loss=1.0 / (1 + update), gate_loss=1.0 + update)
        )
    return policy


WAITS = {
    "every so many": (lambda: EveryN(100), {}, 100),
    "by hand": (lambda: ByHand([("head", "mlp-8", 50)]), {}, 50),
    "the first of two": (lambda: AnyOf(EveryN(100), ByHand([("head", "mlp-8", 50)])), {}, 50),
    "of both the later": (lambda: AllOf(EveryN(10), EveryN(20)), {}, 20),
    "first package": (DiminishingReturns, {"horizon": 1000}, 100),
    "never": (Never, {}, math.inf),
    "depth": (lambda: Staged({0.5: 2}), {}, math.inf),
    "nothing named": (lambda: ByHand([]), {}, math.inf),
    "at evaluations": (DiminishingReturns, {}, math.inf),
    "had one": (DiminishingReturns, {"horizon": 1000, "num_packages": 1}, math.inf),
    "overfitting": (overfitting, {"horizon": 1000}, math.inf),
    "too late": (lambda: EveryN(100), {"horizon": 4}, math.inf),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_policy_that_says_until_when_it_waits_says_no_until_then(what):
    """Asked all the same it says no before, and not only because it is early then."""
    make, given, expected = WAITS[what]
    policy = make()
    assert waits_until(policy, Reading(update=4, **given)) == expected
    last = min(expected, 2_000) - 1
    assert not any(policy.decide(Reading(update=u, **given)).grow for u in range(4, last + 1))
    if expected < math.inf:
        assert policy.decide(Reading(update=expected, **given)).grow


class Early(EveryN):
    """Decides otherwise than the class that it derives from."""

    def decide(self, reading):
        return replace(super().decide(reading), reason=f"asked at {reading.update}")


class OwnRule(Detector):
    """Has a first package at a moment of its own."""

    def first(self, reading):
        return None


def test_whoever_decides_alone_is_asked_after_every_update():
    """A subclass, an object with a function of its own, and what is no Policy at all."""
    patched = EveryN(100)
    patched.decide = Never().decide
    asked = (Early(100), patched, OnlyDecides(), DiminishingReturns(OwnRule()))
    for policy in (*asked, AnyOf(EveryN(100), Early(100))):
        assert waits_until(policy, Reading(update=7, horizon=1000)) == 7
    assert waits_until(EveryN(100), Reading(update=7)) == 100


class Asked(EveryN):
    """Counts how often it is asked: after every update, since it says nothing of waiting."""

    num_asked = 0

    def decide(self, reading):
        self.num_asked += 1
        return super().decide(reading)


class Quiet(Asked):
    """Is asked where the class that it derives from waits no longer."""

    def decide(self, reading):
        return super().decide(reading)

    def waits_until(self, reading):
        return super().waits_until(reading)


@pytest.mark.parametrize("epochs", [False, True])
def test_a_run_that_is_quiet_is_the_run_that_is_asked_after_every_update(epochs):
    """Weights, evaluations, grafts, trials and work, with a kernel by hand in the middle."""
    found = []
    for policy in (Quiet(60), Asked(60)):
        torch.manual_seed(3)
        model, optimizer = wrapped()
        every = None if epochs else 20
        grower = growing(model, optimizer, policy=policy, evaluate_every=every, trial_updates=50)
        for part in range(5):
            train(model, optimizer, 15, grower, random_seed=part)
            if epochs:
                grower.end_epoch()
            if part == 1:
                model[4].graft(0, nn.Linear(4, 1), alpha=0.1, example=X[:8])
                found.append(policy.num_asked)
        grower.close()
        found.append((model.state_dict(), grower.report()))
    seldom, (quiet, one), always, (asked, other) = found
    assert seldom < 10 < 29 <= always
    assert equal_states(quiet, asked)
    for name in ("evaluations", "grafts", "trials", "timeline", "updates", "work", "alphas"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.timeline


def test_a_policy_that_is_asked_too_late_grows_too_late():
    """The control: what a policy says of its waiting is believed."""

    class Sleepy(EveryN):
        def decide(self, reading):
            return super().decide(reading)

        def waits_until(self, reading):
            return 15

    begun = []
    for policy in (EveryN(5), Sleepy(5)):
        model, optimizer = wrapped()
        grower = growing(model, optimizer, policy=policy, evaluate_every=50)
        train(model, optimizer, 40, grower)
        begun.append(grower._run.journal.timeline[0].update)
        grower.close()
    assert begun[1] - begun[0] == 10


class Told:
    """Keeps which kinds of events there were."""

    def __init__(self):
        self.kinds = set()

    def publish(self, event):
        self.kinds.add(event.kind)


class Source:
    """Has no kernel."""

    def fetch(self, digest):
        raise AssertionError


@pytest.mark.parametrize("what", ["a kernel by hand", "a source's trouble"])
def test_what_happens_in_a_quiet_run_is_seen_at_the_next_update(what):
    """Though nothing is due for long: a faulty kernel is isolated, and an incident is logged."""
    source, told = Source(), Told()
    model = wrap(host(), source=source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grower = growing(model, optimizer, policy=Never(), evaluate_every=1_000, sink=told)
    train(model, optimizer, 20, grower)
    assert grower._quiet_until == 1_001
    if what == "a kernel by hand":
        kernel = nn.Linear(4, 4)
        model[0].graft(0, kernel, alpha=0.1, example=X[:8])
        kernel.register_forward_hook(lambda *_: torch.full((32, 4), torch.nan))
        train(model, optimizer, 6, grower)
        assert "seed_faulted" in told.kinds
    else:
        announce(source, KernelEmbargoed(update=0, time_s=0.0, artifact_id="0" * 64))
        train(model, optimizer, 1, grower)
        assert "kernel_embargoed" in told.kinds
    grower.close()


def test_a_layer_that_is_exchanged_in_a_quiet_run_is_followed_at_the_next_update():
    """A kernel comes and its layer is exchanged between two steps: both are seen by the second."""
    model = wrap(host())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grower = growing(model, optimizer, policy=Never(), evaluate_every=1_000)
    train(model, optimizer, 20, grower)
    assert grower._quiet_until == 1_001
    model[0].graft(0, nn.Linear(4, 4), alpha=0.1, example=X[:8])
    before, model[0] = model[0], nn.Linear(4, 4)
    train(model, optimizer, 1, grower)
    assert grower._run.layers["0"] is model[0] is not before
    assert grower._quiet_until == 0
    grower.close()


def test_a_run_is_not_quiet_before_it_is_known_what_an_update_takes():
    """Of a batch without samples nothing is learnt, so that the next one is looked at."""
    model = wrap(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def compute_loss(model, batch):
        return (model(X[batch]) - Y[batch]).square().sum()

    grower = growing(
        model, optimizer, policy=Never(), compute_loss=compute_loss, evaluate_every=1_000
    )
    for num_samples in (0, 32, 32):
        batch = torch.arange(num_samples)
        loss = compute_loss(model, batch)
        loss.backward()
        optimizer.step()
        grower.step(loss, batch=batch)
    flops = 2 * 2 * 32 * 4  # forward, and the gradient of the weight, of each of two updates
    assert grower.report().work["training"] == 2 * flops
    grower.close()
