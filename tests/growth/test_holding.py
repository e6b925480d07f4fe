"""After the switch: what the watch puts back, and which kernels a package does without."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from crafted_measures import Course, Measure, chain, helps, kernels_on
from torch import nn

import esper
from esper.contracts.lifecycle import GraftStage
from esper.growth.rehearsal import run_digest
from esper.growth.tries import tries_spent

pytestmark = pytest.mark.usefixtures("short_trials")


def with_dropout():
    """Return a chain whose updates draw, and what trains it."""
    model, _ = chain()
    model[3] = nn.Dropout(0.3)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def digest(course):
    found = run_digest(SimpleNamespace(model=course.model, optimizer=course.optimizer))
    return {k: v for k, v in found.items() if not k.startswith("hooks of")}


def before_the_switch(updates):
    """Return the digest of a run that grows nothing, after so many updates."""
    torch.manual_seed(0)
    plain = Course(*with_dropout(), policy=esper.Never())
    for _ in range(updates):
        plain.update()
    return digest(plain)


def held(**settings):
    """Return a run whose package has just been taken over."""
    torch.manual_seed(0)
    course = Course(*with_dropout(), **settings)
    trial = course.to_the_switch()
    assert [status.stage.value for status in course.grower.stages] == ["holding"] * 2
    return course, trial.decided_at


def rise(course):
    course.measure.shift = 2.35  # of 2.0 that the package had brought, and 5 errors of 0.07


def spike(course, factor=1e6):
    for _ in range(10):
        course.update(factor=factor)


def not_finite(course):
    with pytest.warns(UserWarning, match="training loss was nan"):
        spike(course, math.nan)


@pytest.mark.parametrize("trouble", [rise, spike, not_finite])
def test_trouble_after_the_switch_puts_the_snapshot_back(trouble):
    """Weights, buffers, moments and draws are those of the switch, bit for bit; nothing is left."""
    course, switch = held()
    trouble(course)
    while course.grower.stages:
        course.update()
    assert digest(course) == before_the_switch(switch)
    assert kernels_on(course.model) == {}
    assert len(course.optimizer.param_groups[0]["params"]) == 6
    assert not course.run.factor.active


def test_what_going_back_cost_is_told():
    """By the package and by each graft; and it counts as a refusal."""
    course, _ = held()
    rise(course)
    while course.grower.stages:
        course.update()
    (trial,) = course.trials
    report = course.grower.report()
    assert (trial.verdict, trial.updates_lost) == ("rolled back", 10)
    assert {(g.verdict, g.updates_lost) for g in report.grafts} == {("rolled back", 10)}
    assert {g.stage for g in report.grafts} == {GraftStage.CULLED}
    assert tries_spent(course.model) == 1


def test_without_the_snapshot_the_run_would_be_another(monkeypatch):
    """The control: without its kernels the run that trained on is not that of the switch."""
    monkeypatch.setattr("esper.continuity.snapshot.RunSnapshot.restore", lambda *_: None)
    course, switch = held()
    spike(course)
    assert digest(course) != before_the_switch(switch)


def test_rise_within_three_standard_errors_is_no_trouble():
    """Two of them are luck, and the package stays."""
    course, _ = held()
    course.measure.shift = 2.15
    while course.grower.stages:
        course.update()
    assert course.trials[0].verdict == "kept"


@pytest.mark.parametrize("hold_updates", [0, 20])
def test_hold_without_trouble_makes_the_package_permanent(hold_updates):
    """After so many updates, with what each kernel is worth to the model."""
    course = Course(hold_updates=hold_updates)
    trial = course.to_the_end()
    assert trial.verdict == "kept"
    grafts = course.grower.report().grafts
    assert [g.verdict for g in grafts] == ["fossilized"] * 2
    assert [g.dependence for g in grafts] == pytest.approx([1.0, 1.0], rel=0.2)
    assert {g.decided_at for g in grafts} == {trial.decided_at + max(1, hold_updates)}
    states = [layer.state_layout.state(0).name for layer in esper.layers(course.model).values()]
    assert states == ["FOSSILIZED", "FOSSILIZED", "DORMANT"]
    assert tries_spent(course.model) == 0


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "kept"), (3.0, "rolled back")])
def test_watch_that_the_end_cuts_short_is_decided_by_one_more_look(shift, verdict):
    """What has not risen stays, and what has goes."""
    course, _ = held()
    course.measure.shift = shift
    course.update()
    course.grower.close()
    assert course.trials[0].verdict == verdict
    assert bool(kernels_on(course.model)) is (verdict == "kept")


# ---- passengers


def stands_in(on):
    """Of two kernels one is as good as both."""
    return 3.0 if on else 5.0


def test_two_kernels_that_stand_in_for_one_another_do_not_both_leave():
    """Each alone costs nothing; together they are all that the package brought."""
    course = Course(measure=Measure(stands_in))
    course.to_the_end()
    verdicts = sorted(g.verdict for g in course.grower.report().grafts)
    assert verdicts == ["fossilized", "removed as a passenger"]
    assert len(kernels_on(course.model)) == 1


def test_kernel_that_costs_nothing_leaves_and_takes_everything_along():
    """Parameters, moments, first steps and seed; the one that is needed stays."""
    course = Course(measure=Measure(helps({"0": 1.0})), warmup_updates=200)
    course.to_the_switch()
    layer = esper.layers(course.model)["2"]
    gone = list(layer.seed_kernel(0).parameters())
    while course.grower.stages:
        course.update()
    one, other = course.grower.report().grafts
    assert (one.verdict, other.verdict) == ("fossilized", "removed as a passenger")
    assert kernels_on(course.model) == {"0": "real"}
    trained = {id(p) for group in course.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in gone}
    assert not any(p in course.optimizer.state for p in gone)
    assert not any("2._seeds" in name for name, _ in course.model.named_parameters())
    assert layer.state_layout.state(0).name == "DORMANT"
    course.update()


def test_kernels_leave_by_what_they_cost_together():
    """Two leave that cost less than half of the effect together; of two that cost more, one."""
    gains = {"0": 1.0, "2": 0.5, "4": 0.4}
    course = Course(measure=Measure(helps(gains), wiggle=0.05), sites=("0", "2", "4"))
    trial = course.to_the_end()
    assert trial.effect == pytest.approx(1.9, rel=0.05)
    verdicts = {g.site: g.verdict for g in course.grower.report().grafts}
    assert verdicts == {
        "0": "fossilized",
        "2": "removed as a passenger",
        "4": "removed as a passenger",
    }
    course = Course(measure=Measure(helps({**gains, "4": 0.6}), wiggle=0.05), sites=("0", "2", "4"))
    course.to_the_end()
    verdicts = {g.site: g.verdict for g in course.grower.report().grafts}
    assert (verdicts["2"], verdicts["4"]) == ("removed as a passenger", "fossilized")


class Wavers(Measure):
    """Says of a package without a kernel at ``2`` that it is whole, but not when asked again."""

    def __call__(self, model):
        """Return one loss per sample."""
        found = super().__call__(model)
        is_pruned = kernels_on(model) == {"0": "real"}
        return found + (3.0 if is_pruned and self.seen.count({"0": "real"}) > 2 else 0.0)


def test_package_that_fails_without_its_passengers_is_put_back_entire():
    """The kernels that would have left contribute again, at their alpha, and become permanent."""
    course = Course(measure=Wavers(helps({"0": 1.0})))
    assert course.to_the_end().verdict == "kept"
    assert [g.verdict for g in course.grower.report().grafts] == ["fossilized"] * 2
    assert kernels_on(course.model) == {"0": "real", "2": "real"}
    assert [esper.layers(course.model)[site].alpha(0) for site in ("0", "2")] == [1.0, 1.0]


def test_passengers_are_judged_on_samples_that_no_verdict_reads():
    """A kernel that helps those of the verdict alone leaves; on the watch's it brings nothing."""

    class Apart(Measure):
        def __call__(self, model):
            found = super().__call__(model)
            if "2" in kernels_on(model):
                found = found - torch.arange(len(found)).remainder(3).ne(2).double()
            return found

    course = Course(measure=Apart(helps({"0": 1.0})))
    course.to_the_end()
    assert [g.verdict for g in course.grower.report().grafts] == [
        "fossilized",
        "removed as a passenger",
    ]
