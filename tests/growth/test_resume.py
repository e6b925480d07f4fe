"""A run that was saved, loaded into objects built anew, and trained on: the same, bit for bit."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from crafted_measures import Chosen, Course, Measure, chain, helps
from growing import GATE_X, GATE_Y, compute_loss, host
from killed_runs import Once
from sleepers import HOSTS, made, update

import esper
from esper.contracts.errors import GrowthError
from esper.growth.tries import tries_spent
from esper.seeds.shallow import depth_state
from esper.state.layer_record import record_of

pytestmark = pytest.mark.usefixtures("short_trials")

SITES = ("0", "4")
UPDATES = 50
"""Of a whole run; its package is taken over after 18, and held for 20."""


def useful():
    return Measure(helps(dict.fromkeys(SITES, 1.0)))


def useless():
    return Measure(helps({}))


def built(measure=useful, *, rate=None, **settings):
    """Build all objects of a run with running statistics, and draws in each update."""
    model = esper.wrap(host(dropout=0.3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate or (lambda _: 1.0))
    course = Course(model, optimizer, measure=measure(), sites=SITES, **settings)
    course.scheduler = scheduler
    torch.manual_seed(0)
    return course


def trained(course, until=UPDATES):
    while course.grower.updates < until:
        course.update()
        course.scheduler.step()
    return course


def saved(course):
    """Return the bytes of all that an owner saves."""
    file = io.BytesIO()
    parts = {
        "model": course.model.state_dict(),
        "optimizer": course.optimizer.state_dict(),
        "scheduler": course.scheduler.state_dict(),
        "grower": course.grower.state_dict(),
        "random": torch.get_rng_state(),
    }
    torch.save(parts, file)
    return file.getvalue()


def loaded(data, course, *, change=lambda _: None):
    """Load what was saved into a run that was just built, after a change of the Grower's part."""
    parts = torch.load(io.BytesIO(data), weights_only=True)
    change(parts["grower"])
    course.model.load_state_dict(parts["model"])
    course.optimizer.load_state_dict(parts["optimizer"])
    course.scheduler.load_state_dict(parts["scheduler"])
    course.grower.load_state_dict(parts["grower"])
    for _ in range(course.grower.updates):
        next(course.batches)
    torch.set_rng_state(parts["random"])
    return course


def told(grower):
    """Return a report without what a clock read, and without its name."""
    report = json.loads(grower.report().to_json())
    del report["run_id"], report["seconds"]
    for trial in report["trials"]:
        del trial["seconds"]
    return report


def pictured(course):
    """Return weights, buffers, moments, rates, draws and report."""
    optimizer = course.optimizer.state_dict()
    return {
        "model": course.model.state_dict(),
        "moments": optimizer["state"],
        "groups": optimizer["param_groups"],
        "random": torch.get_rng_state(),
        "report": told(course.grower),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same(one, other):
    assert one["report"] == other["report"]
    for part in ("model", "moments", "groups", "random"):
        assert same(one[part], other[part]), part


def forget(*path, to):
    def change(state):
        place = state
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to(place[path[-1]]) if callable(to) else to

    return change


def nothing(_):
    pass


@functools.cache
def saved_at(at, measure, settings):
    """Return what is saved of a run after so many updates."""
    return saved(trained(built(measure, **dict(settings)), at))


def resumed(at, measure=useful, *, change=nothing, then=nothing, fresh=None, **settings):
    """Save a run, and train on in another one; return how that one ends.

    Args:
        at: Updates after which it is saved.
        measure: Makes what judges it.
        change: Changes the Grower's part of what was saved.
        then: Called with the run that goes on, before it does.
        fresh: Settings in which that run's objects are made anew; as the others where None.
        settings: Of the controller.
    """
    data = saved_at(at, measure, tuple(settings.items()))
    course = loaded(data, built(measure, **{**settings, **(fresh or {})}), change=change)
    then(course)
    return pictured(trained(course))


@functools.cache
def ended(at, measure, then, settings):
    course = trained(built(measure, **dict(settings)), at)
    then(course)
    return pictured(trained(course))


def whole(measure=useful, *, at=0, then=nothing, **settings):
    """Return how a run ends that was not stopped."""
    return ended(at, measure, then, tuple(settings.items()))


MOMENTS = {
    "before anything": 0,
    "before the decision": 2,
    "right after taking over": 18,
    "in the watch": 25,
    "after its first look": 30,
    "fossilized": 40,
}


@pytest.mark.slow
@pytest.mark.parametrize("at", MOMENTS.values(), ids=MOMENTS)
def test_a_run_goes_on_as_if_it_had_not_stopped(at):
    """Weights, buffers, moments, draws and the report at its end are those of the whole run."""
    expected = whole()
    assert [g["verdict"] for g in expected["report"]["grafts"]] == ["fossilized"] * 2
    assert_same(resumed(at), expected)


@pytest.mark.slow
@pytest.mark.parametrize("has_ranks", [False, True])
def test_kernels_in_the_watch_are_guarded_as_they_were(has_ranks, monkeypatch):
    """At the step where ranks train together, or one of them could isolate a kernel alone."""
    data = saved(trained(built(), 25))
    with monkeypatch.context() as patch:
        if has_ranks:
            patch.setattr("esper.growth.saving.spread", lambda model: model)
        course = loaded(data, built())
    guards = {
        seed.guard
        for layer in esper.layers(course.model).values()
        for seed in record_of(layer).seeds.values()
    }
    assert guards == {"step" if has_ranks else "always"}
    course.grower.close()


@pytest.mark.slow
def test_so_it_does_after_a_refusal():
    """The try that was spent stays spent: nothing is tried again."""
    expected = whole(useless)
    assert [t["verdict"] for t in expected["report"]["trials"]] == ["refused"]
    assert_same(resumed(25, useless), expected)
    found = resumed(25, useless, change=forget("tries_spent", to=0))  # the control
    assert len(found["report"]["trials"]) == 2


def late(update):
    """Return a share of the rate that is spent when kernels appear."""
    return 1.0 if update < 6 else 0.05


@pytest.mark.slow
def test_so_it_does_under_a_schedule():
    """Rates, peaks, and the factor on parameters that appeared where the rate was spent."""
    expected = whole(rate=late)
    assert_same(resumed(20, rate=late), expected)
    found = resumed(20, rate=late, change=forget("warmup", to={}))  # the control
    assert not same(found["model"], expected["model"])


@pytest.mark.slow
def test_so_it_does_where_a_second_package_follows():
    """What the policy knows, how packages are numbered, and what the ledger has left."""
    settings = {"budget": esper.Budget(packages=2), "hold_updates": 4}
    expected = whole(**settings)
    assert [t["package"] for t in expected["report"]["trials"]] == [1, 2]
    assert_same(resumed(20, **settings), expected)


def rise(course):
    course.measure.shift = 3.0


@pytest.mark.slow
def test_a_rollback_goes_to_the_switch_though_it_was_in_another_process():
    """Weights, buffers, moments and random state of then, though nobody in this process saw it."""
    expected = whole(at=20, then=rise)
    assert [t["verdict"] for t in expected["report"]["trials"]] == ["rolled back"]
    assert_same(resumed(20, then=rise), expected)


@pytest.mark.slow
def test_objects_may_be_loaded_before_the_grower_is_made():
    """The model and the optimizer first, then a Grower on what they have become."""
    data = saved_at(25, useful, ())
    parts = torch.load(io.BytesIO(data), weights_only=True)
    course = built()
    course.grower.close()
    course.model.load_state_dict(parts["model"])
    course.optimizer.load_state_dict(parts["optimizer"])
    again = Course(course.model, course.optimizer, measure=useful(), sites=SITES)
    again.scheduler = course.scheduler
    assert_same(pictured(trained(loaded(data, again))), whole())


@pytest.mark.slow
def test_a_run_that_was_resumed_can_be_saved_again():
    """Twice saved, and twice gone on from."""
    course = trained(loaded(saved_at(20, useful, ()), built()), 26)
    assert_same(pictured(trained(loaded(saved(course), built()))), whole())


@pytest.mark.slow
def test_another_process_goes_on(tmp_path):
    """What this one knows of models, kernels and probes is not needed."""
    (tmp_path / "state.pt").write_bytes(saved_at(25, useful, ()))
    code = (
        "import pathlib, sys, torch, test_resume as own, esper.growth.sizing as sizing\n"
        "torch.set_num_threads(1)\n"
        "sizing.MIN_TRIAL = 10\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "course = own.loaded((folder / 'state.pt').read_bytes(), own.built())\n"
        "torch.save(own.pictured(own.trained(course)), folder / 'end.pt')\n"
    )
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent / "support"), *sys.path]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, check=True)
    assert_same(torch.load(tmp_path / "end.pt", weights_only=True), whole())


# ---- what is only tried begins again


@pytest.mark.slow
def test_a_recording_begins_again():
    """The run is one whose decision fell where it was saved: what was recorded is not saved."""
    found = resumed(6, policy=Once(4), fresh={"policy": Once(4)})
    assert_same(found, whole(policy=Once(6)))


@pytest.mark.slow
def test_a_trial_that_was_cut_off_begins_again_as_another_package():
    """Weights, moments and draws are those of a run whose decision fell where it was saved."""
    cut = resumed(12, policy=Once(4), fresh={"policy": Once(4)})
    expected = whole(policy=Once(12))
    for part in ("model", "moments", "groups", "random"):
        assert same(cut[part], expected[part]), part
    first, second = cut["report"]["trials"]
    assert (first["verdict"], first["decided_at"]) == ("refused", None)
    assert "cut off at update 12 by the end of the process" in first["reason"]
    (trial,) = expected["report"]["trials"]
    assert {**second, "package": 1, "grafts": [1, 2]} == trial
    stages = [(g["stage"], g["verdict"]) for g in cut["report"]["grafts"]]
    assert stages == [("culled", "refused in trial")] * 2 + [("fossilized", "fossilized")] * 2
    assert any("counts as a try" in note for note in cut["report"]["notes"])


@pytest.mark.slow
def test_a_trial_that_was_cut_off_counts_as_a_try():
    """The one in its place is the last; what is cut off beyond the tries does not begin again."""
    course = loaded(saved_at(12, useless, ()), built(useless))
    assert tries_spent(course.model) == 1
    again = loaded(saved(trained(course, 20)), built(useless))
    assert tries_spent(again.model) == 2
    report = pictured(trained(again))["report"]
    assert [t["verdict"] for t in report["trials"]] == ["refused"] * 2
    assert any("nothing more is tried" in note for note in report["notes"])


@pytest.mark.slow
def test_what_was_named_by_hand_is_named_again():
    """A kernel that the owner chose is the one whose trial begins again."""
    choices = [("0", "mlp-4x4-w64")]
    catalog_named = {"policy": esper.ByHand(choices)}
    found = resumed(8, fresh={"policy": esper.ByHand(choices)}, **catalog_named)
    blueprints = [t["blueprints"] for t in found["report"]["trials"]]
    assert blueprints == [["mlp-4x4-w64"]] * 2


# ---- the null beside the run


class Real(Measure):
    """Says what a model's weights are worth as well."""

    def __call__(self, model):
        """Return one loss per sample."""
        model.eval()
        gate = (model(GATE_X) - GATE_Y).square().mean()
        model.train()
        return super().__call__(model) + 0.1 * gate.detach().double()


def real():
    return Real(helps(dict.fromkeys(SITES, 1.0)))


NULL = {"attribution": "run"}


def with_a_null(**settings):
    return built(real, **NULL, **settings)


def warming_for_long():
    return built(lambda: Real(more_if_real), **NULL, warmup_updates=60)


def at_the_end(course):
    """Close a run; return what it looks like then."""
    course.grower.close()
    return pictured(course)


@functools.cache
def whole_to_the_end(make):
    """Return how a run ends that was not stopped, with what is read at its end."""
    found = at_the_end(trained(make()))
    assert found["report"]["end_capacity"] is not None
    return found


def resumed_to_the_end(at, make, *, change=nothing):
    """Save a run, train on in another one that is made likewise, and close it."""
    data = saved(trained(make(), at))
    return at_the_end(trained(loaded(data, make(), change=change)))


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 18, 25])
def test_a_null_beside_the_run_trains_on(at):
    """What is claimed of capacity at the end, its figures and its work, are of the whole run."""
    assert_same(resumed_to_the_end(at, with_a_null), whole_to_the_end(with_a_null))


@pytest.mark.torture
def test_a_null_of_a_trial_that_was_cut_off_is_that_of_the_one_in_its_place():
    """What is claimed is claimed as in a run whose decision fell where it was saved."""

    def decided(at):
        return built(lambda: Real(more_if_real), **NULL, policy=Once(at))

    found = resumed_to_the_end(12, lambda: decided(4))
    expected = at_the_end(trained(decided(12)))
    names = ("end_capacity", "end_capacity_stderr", "end_capacity_shown")
    assert [found["report"][n] for n in names] == [expected["report"][n] for n in names]
    assert found["report"]["end_capacity"] is not None


@pytest.mark.torture
@pytest.mark.parametrize(
    "part",
    [
        "moments",
        "random",
        *(pytest.param(n, marks=pytest.mark.torture) for n in ("values", "factors")),
    ],
)
def test_a_null_without_a_part_is_another(part):
    """The control: moments, weights, draws and warm-up of the null all decide."""
    make = warming_for_long
    earlier = trained(make(), 18).grower.state_dict()["null_beside"]["twin"][part]
    other = {"moments": ["dict", []], "factors": {}}.get(part, earlier)
    change = forget("null_beside", "twin", part, to=lambda _: other)
    found, expected = resumed_to_the_end(23, make, change=change), whole_to_the_end(make)
    assert same(found["model"], expected["model"])
    assert found["report"]["end_capacity"] != expected["report"]["end_capacity"]


@pytest.mark.slow
def test_a_null_that_was_not_saved_is_dropped_and_said():
    """A state of before has its number alone: of capacity at its end nothing is claimed."""
    change = forget("null_beside", to=lambda null: null["package"])
    found = resumed_to_the_end(25, with_a_null, change=change)
    expected = whole_to_the_end(with_a_null)
    for part in ("model", "moments", "random"):
        assert same(found[part], expected[part]), part
    assert any("until update 25 and no longer" in note for note in found["report"]["notes"])
    assert found["report"]["end_capacity"] is None


def in_a_twin_by_hand():
    return with_a_null(twin=lambda: host(dropout=0.3))


@pytest.mark.torture
def test_a_null_trains_on_in_a_twin_that_its_owner_builds():
    """Where the model cannot be copied."""
    expected = whole_to_the_end(in_a_twin_by_hand)
    assert_same(resumed_to_the_end(25, in_a_twin_by_hand), expected)


@pytest.mark.slow
def test_a_null_that_was_resumed_can_be_saved_again():
    """Twice saved, and twice gone on from."""
    course = trained(loaded(saved(trained(with_a_null(), 20)), with_a_null()), 30)
    found = at_the_end(trained(loaded(saved(course), with_a_null())))
    assert_same(found, whole_to_the_end(with_a_null))


@pytest.mark.slow
def test_a_state_that_is_refused_leaves_no_null_behind():
    """What of it was loaded before the damage showed is taken back."""
    data, course = saved(trained(with_a_null(), 25)), with_a_null()
    with pytest.raises(ValueError, match="damaged"):
        loaded(data, course, change=forget("stage", to={"kind": "holding"}))
    assert course.run.null_beside is None
    assert course.run.ledger.promised == 0


def more_if_real(on):
    """Return a loss that falls less by kernels that are linear."""
    return 5.0 - sum({"linear": 0.5, "real": 1.0}[kind] for kind in on.values())


def on_a_chain(optimizer_class=torch.optim.AdamW, *, measure=None, **settings):
    """Build a run whose layers are a chain, in which linear kernels fold."""
    torch.manual_seed(0)
    model, optimizer = chain(optimizer_class=optimizer_class)
    course = Course(model, optimizer, measure=measure or Real(more_if_real), **NULL, **settings)
    course.scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    torch.manual_seed(0)
    return course


def by_sgd():
    return on_a_chain(functools.partial(torch.optim.SGD, momentum=0.9))


def following():
    course = on_a_chain()
    average = torch.optim.swa_utils.AveragedModel(course.model)
    esper.follow(course.model, average)
    course.after = lambda: average.update_parameters(course.model)
    course.average = average
    return course


def folds_at_first(on):
    """Return a loss that falls most by a linear kernel at the first site, a real at the other."""
    return 5.0 - {"linear": 2.0, "real": 1.0}.get(on.get("0"), 0) - 2.0 * (on.get("2") == "real")


class InTurn(Chosen):
    """Takes the first site of those in turn that has not been tried."""

    def __init__(self, *sites):
        super().__init__(*sites)
        self.left = list(sites)

    def rank(self, observations, candidates):
        """Give a kernel of one site a gain."""
        self.sites = (self.left.pop(0),) if self.left else ()
        return super().rank(observations, candidates)

    def state_dict(self):
        """Return which are left."""
        return list(self.left)

    def load_state_dict(self, state):
        """Go on with those."""
        self.left = list(state)


def after_a_folded_one():
    return on_a_chain(
        measure=Real(folds_at_first),
        ranking=InTurn("0", "2"),
        budget=esper.Budget(packages=2),
        hold_updates=4,
    )


@pytest.mark.torture
@pytest.mark.parametrize("make", [by_sgd, following])
def test_a_null_trains_on_whatever_trains_the_run(make):
    """With momentum, and with an average that follows the run."""
    assert_same(resumed_to_the_end(25, make), whole_to_the_end(make))


@pytest.mark.torture
def test_a_null_trains_on_behind_a_package_that_was_kept_and_folded():
    """It stands on the host that the first package's linear form was folded into."""
    expected = whole_to_the_end(after_a_folded_one)
    assert [(t["taken"], t["verdict"]) for t in expected["report"]["trials"]] == [
        ("null", "kept"),
        ("candidate", "kept"),
    ]
    assert expected["report"]["grafts"][0]["folded"]
    assert_same(resumed_to_the_end(46, after_a_folded_one), expected)


class Augmented:
    """A loss that keeps things of its own, which the owner's loop never calls."""

    def __init__(self, keep=None):
        self.keep = keep
        self.calls, self.recent, self.seen = 0, [], {"mean": torch.zeros(())}
        self.torch, self.python = torch.Generator().manual_seed(3), random.Random(3)
        self.numpy = np.random.default_rng(3)

    def __call__(self, model, batch):
        """Draw, count and remember, all of which is in the loss."""
        self.calls += 1
        noise = torch.randn((), generator=self.torch) + self.python.random() + self.numpy.normal()
        self.recent = [*self.recent[-2:], float(noise)]
        self.seen["mean"].lerp_(noise.float(), 0.1)
        if self.keep is not None:
            self.kept = self.keep()
        extra = self.seen["mean"] + sum(self.recent) + 0.01 * self.calls
        return compute_loss(model, batch) * (1 + 0.1 * extra.float())


def augmented(keep=None):
    return built(lambda: Real(more_if_real), **NULL, compute_loss=Augmented(keep))


@pytest.mark.torture
def test_what_an_owners_loss_keeps_of_a_null_is_saved():
    """Counters, generators and tensors go on where the null's last update left them."""
    expected = whole_to_the_end(augmented)
    assert_same(resumed_to_the_end(25, augmented), expected)
    change = forget("null_beside", "twin", "apart", to={})  # the control
    found = resumed_to_the_end(25, augmented, change=change)
    assert found["report"]["end_capacity"] != expected["report"]["end_capacity"]


@pytest.mark.slow
def test_a_null_whose_loss_keeps_what_cannot_be_saved_ends_with_a_note():
    """The run goes on bit for bit."""
    make = functools.partial(augmented, object)
    found, expected = resumed_to_the_end(25, make), whole_to_the_end(make)
    assert same(found["model"], expected["model"])
    assert any("until update 25 and no longer" in note for note in found["report"]["notes"])


SHADOW = {"trial": "shadow", "audition_updates": 10, "ramp_updates": 4, "hold_updates": 8}


@pytest.mark.slow
def test_an_audition_begins_again():
    """It is culled, a try is spent, and a recording begins where the run was saved."""
    course = loaded(saved_at(12, useful, tuple(SHADOW.items())), built(**SHADOW))
    assert tries_spent(course.model) == 1
    grafts = pictured(trained(course, 24))["report"]["grafts"]
    assert [g["germinated_at"] for g in grafts] == [8, 16]
    assert (grafts[0]["verdict"], grafts[0]["decided_at"]) == ("culled in audition", 12)
    assert "cut off" in grafts[0]["reason"]


def truly_useful():
    """Also beside its linear form, which an audition is read against."""
    return Measure(lambda on: 5.0 - (on.get("0") == "real"))


IN_PROBATION = {"on the ramp": 20, "held, looked at": 27}


@pytest.mark.slow
@pytest.mark.parametrize("at", IN_PROBATION.values(), ids=IN_PROBATION)
def test_a_kernel_that_blends_in_goes_on(at):
    """Its alpha, its looks and its verdict: a run can be saved at every update."""
    expected = whole(truly_useful, **SHADOW)
    assert [g["verdict"] for g in expected["report"]["grafts"]] == ["fossilized"]
    assert_same(resumed(at, truly_useful, **SHADOW), expected)


def spoil(course):
    course.measure.loss_of = lambda _: 9.0


@pytest.mark.slow
def test_a_kernel_that_fails_goes_though_it_came_in_another_process():
    """Back to the admission, where the host without it is worse too; a control has no moments."""
    expected = whole(truly_useful, at=27, then=spoil, **SHADOW)
    assert [g["updates_lost"] for g in expected["report"]["grafts"]] == [12]
    assert_same(resumed(27, truly_useful, then=spoil, **SHADOW), expected)
    change = forget("stage", "snapshot", "state", to={})
    found = resumed(27, truly_useful, then=spoil, change=change, **SHADOW)
    assert not same(found["model"], expected["model"])


# ---- blocks that wake


X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))


class Deep:
    """A run of planned depth: six blocks, two awake, the others from update 10 of 40 on."""

    def __init__(self):
        self.model = esper.shallow(made("list"), HOSTS["list"].path, depth=2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        policy = esper.Staged({0.25: 4, 0.75: 6}, ramp=0.5)
        self.grower = esper.Grower(self.model, self.optimizer, horizon=40, policy=policy)
        self.shares = []
        torch.manual_seed(1)

    def train(self, until=40, factor=1.0):
        while self.grower.updates < until:
            self.grower.step(factor * update(self.model, self.optimizer, X, Y))
            self.shares.append(depth_state(self.model))
        return self

    def saved(self):
        file = io.BytesIO()
        parts = [each.state_dict() for each in (self.model, self.optimizer, self.grower)]
        torch.save([*parts, torch.get_rng_state()], file)
        return file.getvalue()

    def load(self, data, change=nothing):
        model, optimizer, grower, draws = torch.load(io.BytesIO(data), weights_only=True)
        change(grower)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.grower.load_state_dict(grower)
        torch.set_rng_state(draws)
        return self

    def end(self):
        return {**pictured(self), "shares": self.shares[-6:]}


@pytest.mark.slow
@pytest.mark.parametrize("at", [4, 10, 17, 26, 33])
def test_blocks_go_on_waking(at):
    """Asleep, just begun, in the ramp, awake, and in the next: shares, weights, FLOPs, report."""
    expected = Deep().train().end()
    found = Deep().load(Deep().train(at).saved()).train().end()
    assert found["report"]["stages"] == expected["report"]["stages"]
    assert found["shares"] == expected["shares"]
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the training loss was nan")
def test_blocks_go_back_to_sleep_though_they_woke_in_another_process():
    """A spike in the ramp puts back what was there before it, draws included."""
    runs = Deep().train(17), Deep().load(Deep().train(17).saved())
    ends = [course.train(20, factor=math.nan).train().end() for course in runs]
    assert ends[0]["report"]["stages"][0]["verdict"] == "put to sleep"
    assert_same(ends[1], ends[0])


ASLEEP_AGAIN = {
    "waking": None,
    "flops": lambda _: [0, None, 0, 0],
    "shares": lambda shares: dict.fromkeys(shares, 0.0),
    "courses": [],
}


@pytest.mark.slow
@pytest.mark.parametrize("part", ASLEEP_AGAIN)
def test_without_what_wakes_it_is_another_run(part):
    """The control: each part of the state of depth decides something."""
    change = forget("depth", part, to=ASLEEP_AGAIN[part])
    expected = Deep().train().end()
    found = Deep().load(Deep().train(17).saved(), change).train().end()
    assert any(not same(found[name], expected[name]) for name in found)


# ---- what does not fit is refused, and changes nothing


def growing_now(**settings):
    return built(**settings).grower


@pytest.fixture
def state():
    return growing_now().state_dict()


def other_width():
    model = esper.wrap(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 1)))
    return Course(model, torch.optim.AdamW(model.parameters()), measure=useful(), sites=("0",))


def test_a_state_of_another_model_is_refused(state):
    """By the names of what differs."""
    with pytest.raises(ValueError, match=r"differs from this one in 0\.bias, 0\.weight, 1"):
        other_width().grower.load_state_dict(state)


def test_a_state_of_other_settings_is_refused(state):
    """By the names of the settings, with both values."""
    expected = r"trial_updates \(saved: 10, here: 50\), hold_updates \(saved: 20, here: 7\)"
    course = built(hold_updates=7)
    object.__setattr__(course.run.settings, "trial_updates", 50)
    with pytest.raises(ValueError, match=expected):
        course.grower.load_state_dict(state)
    with pytest.raises(ValueError, match=r"policy \(saved: 'EveryN', here: 'Never'\)"):
        growing_now(policy=esper.Never()).load_state_dict(state)


@pytest.mark.parametrize("version", ["2.0", "1.1"])
def test_a_state_of_a_newer_esper_is_refused(state, version):
    """A checkpoint is read whole, or not at all."""
    with pytest.raises(ValueError, match=f"format '{version}' is not known here"):
        growing_now().load_state_dict({**state, "format_version": version})


def test_a_grower_that_has_stepped_takes_no_state(state):
    """Nor one that was closed."""
    stepped, closed = trained(built(), 1).grower, growing_now()
    closed.close()
    for grower in (stepped, closed):
        with pytest.raises(GrowthError, match="has stepped, or was closed"):
            grower.load_state_dict(state)


def test_kernels_that_were_not_loaded_are_named():
    """A state that is loaded before the model's says in which order."""
    course = Course(measure=Measure(helps({"0": 1.0})), sites=("0",))
    state = course.grower.state_dict()
    state["identity"]["parameters"]["0._seeds.0.kernel.weight"] = [4, 4]
    with pytest.raises(ValueError, match=r"load its state .which builds its kernels. and the"):
        Course(measure=useful()).grower.load_state_dict(state)


@pytest.mark.parametrize("path", [("schedule",), ("watcher",), ("identity", "groups"), ("stage",)])
def test_a_damaged_state_changes_nothing(state, path):
    """Whatever is missing, the Grower is as it was made, its policy included."""
    grower = growing_now()
    before = grower.state_dict()
    state["policy"], state["tries_spent"] = {"last": 3}, 5
    forget(*path[:-1], path[-1], to={})(state)
    with pytest.raises(ValueError, match=r"damaged|other parameters"):
        grower.load_state_dict(state)
    assert same(grower.state_dict(), before)


def test_a_policy_that_returns_more_than_plain_values_is_named():
    """Nothing is pickled: a set, or an array, is refused where it stands."""

    class Odd(esper.Never):
        def state_dict(self):
            return {"seen": {1, 2}}

    with pytest.raises(TypeError, match=r"state\['policy'\]\['seen'\] is a set"):
        growing_now(policy=Odd()).state_dict()


# ---- what is left, and what is written


@pytest.mark.slow
def test_no_hook_is_left_behind():
    """One Grower's worth while it runs, and none when it is closed."""
    first = trained(built(), 25)
    course = loaded(saved(first), built())
    assert num_hooks(course) == num_hooks(first)
    trained(course).grower.close()
    trained(first).grower.close()
    assert num_hooks(course) == num_hooks(first)


def num_hooks(course):
    inside = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in course.model.modules())
    optimizer = course.optimizer
    return (
        inside,
        len(optimizer._optimizer_step_pre_hooks),
        len(optimizer._optimizer_step_post_hooks),
    )


def test_the_log_names_the_run_that_goes_on(tmp_path):
    """It has a folder and a name of its own; the report is one of both."""
    first = built(run_dir=tmp_path / "first")
    again = loaded(saved(trained(first, 3)), built(run_dir=tmp_path / "second"))
    for course in (first, again):
        course.grower.close()
    lines = (tmp_path / "second/events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    own, before = again.grower.report().run_id, first.grower.report().run_id
    assert own != before
    assert {event["run_id"] for event in events} == {own}
    told = [event["text"] for event in events if event["kind"] == "noted"]
    assert any(f"from update 3 of run {before}" in text for text in told)
    assert events[0]["kind"] == "run_started"


# ---- controls: a part that is left out shows


LEFT_OUT = {
    "warm-up": (20, {"warmup_updates": 30}, forget("warmup", to={})),
    "watch": (20, {"then": rise}, forget("stage", to=None)),
    "values to go back to": (
        20,
        {"then": rise},
        forget("stage", "snapshot", "values", "0.weight", to=torch.zeros_like),
    ),
    "moments to go back to": (20, {"then": rise}, forget("stage", "snapshot", "state", to={})),
    "statistics to go back to": (20, {"then": rise}, forget("stage", "snapshot", "buffers", to={})),
    "draws to go back to": (
        20,
        {"then": rise},
        forget(
            "stage",
            "snapshot",
            "random_state",
            "devices",
            "cpu",
            to=lambda _: torch.get_rng_state(),
        ),
    ),
    "baseline": (
        20,
        {"then": rise},
        forget("stage", "before", "per_sample", to=lambda losses: losses + 10),
    ),
    "losses": (
        25,
        {"evaluate_every": 10},
        forget("losses", "losses", to=lambda losses: [x + 1 for x in losses]),
    ),
    "work": (25, {}, forget("ledger", "flops", to={})),
    "schedule": (25, {"evaluate_every": 10}, forget("schedule", "last", to=None)),
    "policy": (2, {}, forget("policy", "last", to=1)),
    "packages": (2, {}, forget("counted", "num_packages", to=3)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(part, marks=[] if i % 3 == 0 else pytest.mark.torture)
        for i, part in enumerate(LEFT_OUT)
    ],
)
def test_without_a_part_of_the_state_it_is_another_run(part):
    """The control: each part decides something."""
    at, given, change = LEFT_OUT[part]
    expected = whole(at=at, **given) if "then" in given else whole(**given)
    assert_same(resumed(at, **given), expected)
    found = resumed(at, change=change, **given)
    assert any(not same(found[name], expected[name]) for name in found)
