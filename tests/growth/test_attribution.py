"""What a gain is owed to: capacity or treatment, luck among equal runs, or going on."""

from __future__ import annotations

import copy
import math
import zlib

import pytest
import torch
from crafted_measures import NOISE, TRIAL_UPDATES, Course, Measure, chain, helps, kernels_on
from growing import X, growing, train, wrapped
from torch import nn

import esper
from esper.contracts.events import Fossilized, TrialStarted
from esper.contracts.intervals import student_t_quantile
from esper.growth.budget import Budget, count_parameters
from esper.growth.policies import ByHand
from esper.growth.twins import Twin
from esper.growth.verdict import TrialReadings
from esper.wrapping.unwrap import unwrap

pytestmark = pytest.mark.usefixtures("short_trials")


def by_kind(real, linear):
    """Return a loss that falls by so much for a package, and by so much for it made linear."""

    def loss(on):
        gain = {"real": real, "linear": linear, None: 0.0}[next(iter(on.values()), None)]
        return 5.0 - gain * (1.0 if len(on) == 2 else 0.2)  # each kernel is needed

    return Measure(loss, wiggle=0.2)


class Kept:
    def __init__(self):
        self.events = []

    def publish(self, event):
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


# ---- the null


@pytest.mark.slow
def test_null_that_does_better_is_taken_over_and_leaves_no_trace():
    """It folds: the model has its shape, its cost and its classes back, and its weights moved."""
    kept, (model, optimizer) = Kept(), chain()
    host, shapes = count_parameters(model), [p.shape for p in model.parameters()]
    course = Course(
        model, optimizer, measure=by_kind(1.0, 2.0), attribution="trial", sink=kept, hold_updates=5
    )
    trial = course.to_the_switch()
    assert (trial.verdict, trial.taken) == ("taken over", "null")
    assert kernels_on(model) == {"0": "linear", "2": "linear"}
    while course.grower.stages:
        course.update()
    assert course.trials[0].verdict == "kept"
    grafts = course.grower.report().grafts
    assert all(g.blueprint.endswith("-linear") and g.folded for g in grafts)
    assert all(event.folded and event.rel_diff <= 1e-6 for event in kept.of(Fossilized))
    assert count_parameters(model) == host
    assert [p.shape for p in model.parameters()] == shapes
    assert len(optimizer.param_groups[0]["params"]) == 6
    assert not course.run.factor.active
    course.update()
    before = model(X[:8])
    assert torch.equal(unwrap(model)(X[:8]), before)
    assert [type(m) for m in model] == [
        nn.Linear,
        nn.ReLU,
        nn.Linear,
        nn.Tanh,
        nn.Linear,
        nn.Flatten,
    ]


@pytest.mark.slow
def test_fold_of_a_null_changes_no_output():
    """Right before and right after it became permanent the model computes the same."""
    course = Course(measure=by_kind(1.0, 2.0), attribution="trial", hold_updates=5)
    course.to_the_switch()
    outputs = []
    fossilize = course.grower._stage._fossilize

    def watched(reason):
        outputs.append(course.model(X[:64]).detach())
        fossilize(reason)
        outputs.append(course.model(X[:64]).detach())

    course.grower._stage._fossilize = watched
    while course.grower.stages:
        course.update()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("real", "linear", "taken", "shown"),
    [
        (2.0, 1.0, "candidate", True),
        (2.0, 1.998, "candidate", False),
        (1.0, 2.0, "null", False),
        pytest.param(2.0, 2.0, "candidate", False, marks=pytest.mark.slow),
        pytest.param(0.0, 2.0, "", None, marks=pytest.mark.slow),
    ],
)
def test_capacity_is_claimed_only_where_the_candidate_beats_the_null(real, linear, taken, shown):
    """By the same test; and where the package did not pass nothing is claimed."""
    course = Course(measure=by_kind(real, linear), attribution="trial")
    trial = course.to_the_switch()
    assert trial.taken == taken
    assert trial.null_effect == pytest.approx(linear, abs=0.05)
    assert trial.capacity == pytest.approx(real - linear, abs=0.05)
    if taken:
        assert trial.capacity_shown is shown


def test_without_attribution_nothing_is_claimed():
    """There is one twin, and no figure of a null."""
    kept = Kept()
    course = Course(measure=by_kind(2.0, 0.0), attribution="none", sink=kept)
    trial = course.to_the_switch()
    assert trial.taken == "candidate"
    assert trial.null_effect is trial.capacity is trial.capacity_shown is None
    assert kept.of(TrialStarted)[0].arms == ("candidate",)
    assert not any("linear" in on.values() for on in course.measure.seen)


@pytest.mark.parametrize(
    ("linear", "shown"), [pytest.param(0.5, True, marks=pytest.mark.slow), (2.0, False)]
)
def test_attribution_of_the_run_is_read_at_its_end(linear, shown):
    """Against the null that trained on; what was shown at the trial may be gone by then."""
    measure = by_kind(2.0, 0.5)
    course = Course(measure=measure, attribution="run")
    course.to_the_end()
    assert course.grower.report().end_capacity is None
    for _ in range(30):
        course.update()
    measure.loss_of = by_kind(2.0, linear).loss_of
    course.grower.close()
    report = course.grower.report()
    assert report.trials[0].capacity_shown
    assert report.end_capacity == pytest.approx(2.0 - linear, abs=0.05)
    assert report.end_capacity_shown is shown


@pytest.mark.slow
def test_null_beside_trains_on_when_passengers_leave():
    """The run's averages begin anew with the kernels that it has then."""
    needs_one = Measure(lambda on: 5.0 - (2.0 if on.get("0") == "real" else 0.5 if on else 0.0))
    course = Course(measure=needs_one, attribution="run", hold_updates=5)
    course.to_the_end()
    assert [g.verdict for g in course.grower.report().grafts] == [
        "fossilized",
        "removed as a passenger",
    ]
    for _ in range(40):
        course.update()
    course.grower.close()
    assert course.grower.report().end_capacity == pytest.approx(1.5, abs=0.1)


class Ballast(nn.Module):
    """Takes work and changes nothing: kernels are small beside a host that ends in it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.zeros(1, 4096))

    def forward(self, y):
        return y + (y[:, None] @ self.weight).sum(1)


@pytest.mark.parametrize(
    ("horizon", "words"),
    [
        (120, 'of its null to the end of the run (attribution="run") in this run'),
        pytest.param(None, "overhead=0.7 buys no more of it", marks=pytest.mark.slow),
    ],
)
def test_the_overhead_pays_for_a_null_to_the_end_of_the_run(horizon, words):
    """Before its trial where the end is known, else for as long as it is earned."""
    model, optimizer = chain()
    model.append(Ballast())
    course = Course(
        model, optimizer, attribution="run", horizon=horizon, overhead=0.7, hold_updates=5
    )
    for _ in range(120):
        course.update()
    course.grower.close()
    report = course.grower.report()
    assert report.overhead <= report.overhead_limit
    assert report.end_capacity is None
    assert sum(words in note for note in report.notes) == 1


@pytest.mark.slow
def test_a_null_to_the_end_of_the_run_is_had_where_it_is_paid_for():
    """The control: a larger overhead buys it, and is kept to."""
    model, optimizer = chain()
    model.append(Ballast())
    course = Course(model, optimizer, attribution="run", horizon=120, overhead=1.8, hold_updates=5)
    for _ in range(120):
        course.update()
    course.grower.close()
    report = course.grower.report()
    assert report.end_capacity is not None
    assert 1.0 < report.overhead_share <= 1.8


def test_what_is_promised_to_a_null_buys_nothing_else():
    """While it trains, and no longer."""
    course = Course(attribution="run", horizon=200, overhead=50.0)
    course.to_the_switch()
    course.update()
    ledger = course.run.ledger
    assert ledger.promised >= (200 - course.grower.updates) * ledger.update_flops / 2
    left = ledger.left_for_trials()
    course.grower.close()
    assert ledger.promised == 0
    assert ledger.left_for_trials() > left


@pytest.mark.slow
@pytest.mark.parametrize("rolled_back", [False, True])
def test_a_null_is_let_go_where_it_measures_its_package_no_more(rolled_back):
    """What was taken over behind it, or undone, would be in the figure as well."""
    course = Course(sites=("0",), attribution="run", hold_updates=5, budget=Budget(packages=2))
    course.to_the_switch()
    if rolled_back:
        course.measure.shift = 9.0
    course.run.ranking.sites = ("2",)
    first = course.run.null_beside
    for _ in range(60):
        course.update()
    assert first is not None
    assert course.run.null_beside is not first
    why = "package 1 was rolled back" if rolled_back else "package 2 was taken over"
    assert sum(why in note for note in course.grower.report().notes) == 1


@pytest.mark.slow
def test_running_statistics_at_the_end_are_those_of_the_averaged_weights():
    """On the last batches, as for the verdict; a mean of running statistics is no weights'."""
    model, optimizer = chain()
    model.insert(5, nn.BatchNorm1d(1, affine=False))  # not wrapped
    seen = []

    class Remembers(Measure):
        def __call__(self, model):
            seen.append(copy.deepcopy(model))
            return super().__call__(model)

    course = Course(
        model, optimizer, measure=Remembers(helps({"0": 1.0, "2": 1.0})), attribution="run"
    )
    course.to_the_end()
    last = [next(course.batches) for _ in range(34)]
    course.batches = iter(last)
    for _ in last:
        course.update()
    seen.clear()
    course.grower.close()
    assert len(seen) == 2
    for read in seen:
        means = [read[:5].train()(X[batch]).mean(0) for batch in last[-16:]]
        torch.testing.assert_close(read[5].running_mean, torch.stack(means).mean(0).detach())


def test_a_null_that_adds_capacity_makes_the_figure_a_lower_bound():
    """At a frozen layer the package made linear learns what the layer cannot."""
    model, optimizer = wrapped()
    model[0].requires_grad_(False)
    grower = growing(model, optimizer, policy=ByHand([("0", "mlp-4x4-w32")]), attribution="trial")
    train(model, optimizer, 20, grower)
    (trial,) = grower.report().trials
    assert trial.capacity_is_lower_bound
    assert trial.null_adds[0].startswith("0: ")
    assert "frozen" in trial.null_adds[0]


# ---- equal twins


class Lucky(Measure):
    """Gives every run a luck of its own: each sample, and all of them together.

    Args:
        drift: How far runs come out apart.
    """

    def __init__(self, loss_of, drift=0.0):
        super().__init__(loss_of)
        self.drift = drift

    def __call__(self, model):
        """Return one loss per sample."""
        weight = model[0].weight.detach().numpy().tobytes()
        luck = torch.Generator().manual_seed(zlib.crc32(weight))
        own = 0.3 * torch.randn(len(NOISE), generator=luck)
        return super().__call__(model) + own + self.drift * torch.randn((), generator=luck)


@pytest.mark.parametrize("nulls", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_spread_is_measured_on_equal_twins(nulls):
    """With Student's quantile for as many; the readings are of so many runs without a package."""
    course = Course(measure=Lucky(helps({"0": 1.0, "2": 1.0})), nulls=nulls)
    trial = course.to_the_switch()
    assert trial.num_nulls == nulls
    assert trial.spread >= 1.0
    assert trial.threshold == pytest.approx(student_t_quantile(0.95, nulls))


@pytest.mark.slow
def test_spread_that_equal_twins_show_is_in_the_verdict():
    """Where equal runs come out far apart, a package that helps as much as they differ fails."""
    found = [
        Course(measure=Lucky(helps({"0": 0.2, "2": 0.2}), drift), nulls=3).to_the_switch()
        for drift in (0.0, 0.5)
    ]
    assert [trial.verdict for trial in found] == ["taken over", "refused"]
    assert found[1].spread > 5.0 > found[0].spread


def test_equal_twins_that_were_not_perturbed_tell_nothing(monkeypatch):
    """The control: they are bit-equal to the run, so that no spread is known and nothing passes."""
    monkeypatch.setattr(Twin, "perturb", lambda self, random_seed: None)
    course = Course(nulls=3)
    twins = [arm.twin.model for arm in [course.to_the_verdict(), *course.grower._stage._arms[1:]]]
    course.update()
    (trial,) = course.trials
    for twin in twins[1:]:
        pairs = zip(course.model.parameters(), twin.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert trial.verdict == "refused"
    assert "spread between equal runs could not be measured" in trial.reason


def test_perturbed_twins_differ_from_the_run_and_from_one_another():
    """By a thousandth at their birth, and by what became of it."""
    course = Course(nulls=3)
    course.to_the_verdict()
    models = [course.model, *(arm.twin.model for arm in course.grower._stage._arms[1:])]
    weights = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models]
    for i, one in enumerate(weights):
        for other in weights[:i]:
            assert not torch.equal(one, other)
            torch.testing.assert_close(one, other, rtol=0.1, atol=0.05)


# ---- what going on would have brought


class Falls(Measure):
    """Its loss falls by itself, as the logarithm of the updates."""

    def __init__(self, loss_of, slope):
        super().__init__(loss_of)
        self.slope = slope
        self.grower = None

    def __call__(self, model):
        """Return one loss per sample."""
        updates = 1 if self.grower is None else max(1, self.grower.updates)
        return super().__call__(model) - self.slope * math.log(updates)


@pytest.mark.parametrize(
    ("pays", "slope", "verdict"),
    [
        ("flops", 5.0, "refused"),
        pytest.param("updates", 5.0, "taken over", marks=pytest.mark.slow),
        pytest.param("flops", 0.1, "taken over", marks=pytest.mark.slow),
    ],
)
def test_a_package_that_has_to_pay_is_held_against_going_on(pays, slope, verdict):
    """For the FLOPs of the trial; by default it is said, and does not decide."""
    measure = Falls(helps({"0": 1.0, "2": 1.0}), slope)
    course = Course(measure=measure, pays=pays, evaluate_every=5)
    measure.grower = course.grower
    trial = course.to_the_switch()
    assert trial.verdict == verdict
    assert (trial.going_on > trial.effect) is (slope > 1.0)
    assert ("it does not pay" in trial.reason) is (verdict == "refused")


def test_a_run_that_is_too_short_to_tell_refuses_what_has_to_pay():
    """Unmeasured means no."""
    course = Course(pays="flops", evaluate_every=1000)
    trial = course.to_the_switch()
    assert trial.going_on is None
    assert "too short to say" in trial.reason


# ---- what the readings are of


def test_verdict_is_read_on_averages_over_the_second_half():
    """Of every arm alike: the mean of its weights after each of those updates."""

    class Remembers(Measure):
        def __call__(self, model):
            self.weights = [*getattr(self, "weights", []), model[0].weight.detach().clone()]
            return super().__call__(model)

    course = Course(measure=Remembers(helps({"0": 1.0, "2": 1.0})), evaluate_every=1000)
    lives, twins = [], []
    while not course.trials or course.updates_left > 1:
        course.update()
        if course.trials and course.updates_left < TRIAL_UPDATES // 2:
            remember(course, lives, twins)
    num_before = len(course.measure.weights)
    read = course.grower._stage._readings
    seen = []

    def watched():
        remember(course, lives, twins)
        found = read()
        seen.extend(course.measure.weights[num_before:])
        return found

    course.grower._stage._readings = watched
    course.update()
    assert len(lives) == len(twins) == TRIAL_UPDATES // 2
    candidate, live = seen
    torch.testing.assert_close(candidate, torch.stack(twins).mean(0))
    torch.testing.assert_close(live, torch.stack(lives).mean(0))


def remember(course, lives, twins):
    (arm,) = course.grower._stage._arms
    lives.append(course.model[0].weight.detach().clone())
    twins.append(arm.twin.model[0].weight.detach().clone())


def test_readings_hold_the_verdicts_samples_alone():
    """Two thirds of the gate split, of every arm."""
    course = Course(attribution="trial", nulls=3)
    course.to_the_verdict()
    read, seen = course.grower._stage._readings, []

    def watched():
        seen.append(read())
        return seen[-1]

    course.grower._stage._readings = watched
    course.update()
    (readings,) = seen
    assert isinstance(readings, TrialReadings)
    arms = [readings.live, readings.candidate, readings.null, *readings.equals]
    assert [len(m.per_sample) for m in arms] == [400] * 6


def test_last_iterate_that_is_worse_is_refused_though_its_average_passed():
    """What is taken over is the last iterate, and it is looked at as well."""

    class LastIsBad(Measure):
        """Bad news of a twin itself, none of a copy at its averaged weights."""

        twin = None

        def __call__(self, model):
            return super().__call__(model) + (9.0 if model is self.twin else 0.0)

    measure = LastIsBad(helps({"0": 1.0, "2": 1.0}))
    course = Course(measure=measure)
    measure.twin = course.to_the_verdict().twin.model
    course.update()
    (trial,) = course.trials
    assert trial.verdict == "refused"
    assert "its averaged weights passed, its last did not" in trial.reason


def test_grown_model_is_plain_torch_at_its_end():
    """Kernels and hosts, without esper."""
    course = Course()
    course.to_the_end()
    course.grower.close()
    before = course.model(X[:8])
    plain = esper.unwrap(course.model)
    torch.testing.assert_close(plain(X[:8]), before)
    assert not any(type(m).__module__.startswith("esper") for m in plain.modules())
