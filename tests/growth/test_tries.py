"""Tries: refusals by a verdict are counted, for the model, and the last one ends its growth."""

from __future__ import annotations

import pytest
import torch
from crafted_measures import Course, Measure, chain, helps, kernels_on, trying

import esper
from esper.growth import run as growth_run
from esper.growth.budget import Budget
from esper.growth.gates import level_of
from esper.growth.tries import tries_spent

pytestmark = pytest.mark.usefixtures("short_trials")


USELESS = {"0": 0.0, "2": 0.0}


def useless(**settings):
    """Return a run whose packages bring nothing."""
    model, optimizer = chain()
    return Course(model, optimizer, measure=Measure(helps(USELESS)), **settings)


@pytest.mark.parametrize("tries", [1, 2])
def test_the_last_refusal_ends_growth_of_the_model(tries):
    """Each package is tested at its share of 5 %, and after so many refusals none is tried."""
    course = useless(tries=tries, budget=None)
    for _ in range(tries * 20 + 30):
        course.update()
    assert [trial.verdict for trial in course.trials] == ["refused"] * tries
    assert {trial.level for trial in course.trials} == {level_of(tries)}
    assert tries_spent(course.model) == tries
    notes = course.grower.report().notes
    assert any(note.startswith("nothing more is tried") for note in notes)


def test_tries_belong_to_the_model_and_not_to_a_grower():
    """A second one on the same model says so when it is made, and tries nothing."""
    course = useless()
    course.to_the_switch()
    course.grower.close()
    measure = Measure(helps({"0": 1.0, "2": 1.0}))
    with pytest.warns(
        UserWarning, match="nothing more is tried: one package of this model was refused"
    ):
        grower = trying(course.model, course.optimizer, measure, "0", "2")
    course.grower = grower
    for _ in range(30):
        course.update()
    assert not grower.report().trials
    grower.close()
    with trying(course.model, course.optimizer, measure, "0", "2", tries=2) as more:
        course.grower = more
        for _ in range(10):
            course.update()
        assert len(more.report().trials) == 1


def test_another_model_has_its_own_tries():
    """A refusal in one says nothing of the next."""
    useless().to_the_switch()
    course = Course()
    assert course.to_the_switch().verdict == "taken over"


def test_a_package_that_passes_costs_no_try():
    """Growth goes on at the same level until the first refusal."""
    course = Course(hold_updates=0)
    course.to_the_end()
    assert tries_spent(course.model) == 0


def test_a_trial_that_was_cut_off_costs_no_try():
    """It has no verdict: the run ended, or its model was changed from outside."""
    course = useless()
    course.to_the_verdict()
    course.grower.close()
    assert (course.trials[0].verdict, tries_spent(course.model)) == ("refused", 0)
    course = useless()
    course.to_the_verdict()
    layer = esper.layers(course.model)["4"]
    layer.graft(0, "mlp-4x1-w32", example=torch.randn(3, 4))
    course.update()
    assert "changed from outside" in course.trials[0].reason
    assert tries_spent(course.model) == 0
    assert kernels_on(course.model) == {"4": "real"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"budget": Budget(small_graft=1)},
            "no candidate with a predicted gain is within the budget",
        ),
        ({"overhead": 0.001, "horizon": 1000}, "overhead=0.001 buys no "),
        ({"horizon": 77}, "too few are left of 77"),
    ],
    ids=["budget", "overhead", "horizon"],
)
def test_what_was_not_tried_is_no_try(settings, words):
    """By budget, overhead or time; the reason is told."""
    course = useless(**settings)
    for _ in range(20):
        course.update()
    assert not course.trials
    assert any(words in note for note in course.grower.report().notes)
    assert tries_spent(course.model) == 0


def test_memory_that_is_short_is_no_try(monkeypatch):
    """It is asked before a twin is made, and what it would take is told."""
    monkeypatch.setattr(growth_run, "available_bytes", lambda device: 10)
    course = useless()
    for _ in range(20):
        course.update()
    assert not course.trials
    (note,) = [n for n in course.grower.report().notes if "of memory" in n]
    assert 'trial="shadow"' in note
    assert tries_spent(course.model) == 0
    graft = course.grower.report().grafts[0]
    assert graft.verdict == "refused in trial"


def test_an_audition_that_is_refused_is_a_try_of_the_same_model():
    """One kernel is a package too."""
    course = useless(trial="shadow", audition_updates=5)
    for _ in range(30):
        course.update()
    assert tries_spent(course.model) == 1
    assert [g.verdict for g in course.grower.report().grafts] == ["culled at admission"]
