"""Taking over: the run has the twin's state, its objects stay the owner's, or nothing happened."""

from __future__ import annotations

import pytest
import torch
from crafted_measures import TRIAL_UPDATES, Course, Measure, chain, helps, kernels_on
from growing import X, compute_loss
from torch import nn
from torch.optim.swa_utils import AveragedModel

import esper
from esper.contracts.events import TakenOver, TrialRead
from esper.growth import takeover
from esper.growth.rehearsal import run_digest
from esper.growth.takeover import Taken
from esper.growth.tries import tries_spent
from esper.state.host_parts import is_in_a_seed

pytestmark = pytest.mark.usefixtures("short_trials")


def hosts(model):
    return {name: p for name, p in model.named_parameters() if not is_in_a_seed(name)}


def objects(model, optimizer):
    """Every object that an owner may hold on to."""
    own = list(hosts(model).values())
    held = [t for p in own for t in moments(optimizer, p).values()]
    return [*own, *model.buffers(), *optimizer.param_groups, *held]


def moments(optimizer, p):
    return {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}


def test_the_run_has_the_twins_host_bit_for_bit():
    """Parameters, buffers and moments, steps included."""
    model, optimizer = chain()
    model.insert(5, nn.BatchNorm1d(1, affine=False))  # not wrapped, and it keeps statistics
    course = Course(model, optimizer)
    twin = course.to_the_verdict().twin
    course.update()
    assert [status.stage.value for status in course.grower.stages] == ["holding"] * 2
    theirs = dict(twin.model.named_parameters())
    assert not any(is_in_a_seed(name) for name in theirs)  # the kernels have moved
    for name, p in hosts(model).items():
        assert torch.equal(p, theirs[name])
        ours, copied = moments(optimizer, p), moments(twin.optimizer, theirs[name])
        assert ours.keys() == copied.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(ours[k], copied[k]) for k in ours)
    buffers = dict(twin.model.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers() if n in buffers)
    assert torch.equal(model[5].running_mean, buffers["5.running_mean"])


def test_objects_stay_the_owners():
    """Parameters, param groups and momentum buffers are those of before, by identity."""
    model, optimizer = chain()
    course = Course(model, optimizer)
    course.to_the_verdict()
    held, first = objects(model, optimizer), list(optimizer.param_groups[0]["params"])
    course.update()
    assert len(kernels_on(model)) == 2
    now = {id(value) for value in objects(model, optimizer)}
    assert all(id(value) in now for value in held)
    own = set(map(id, hosts(model).values()))
    kept = [p for p in optimizer.param_groups[0]["params"] if id(p) in own]
    assert all(p is q for p, q in zip(first, kept, strict=True))


def test_kernels_come_with_their_moments_into_the_groups_of_their_hosts():
    """Weights where the host's weight is trained, biases where its bias is."""
    model, _ = chain()
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 5e-4}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    course = Course(model, optimizer)
    arm = course.to_the_verdict()
    kernels = [p for kernel in arm.kernels for p in kernel.parameters]
    course.update()
    own = set(map(id, hosts(model).values()))
    joined = [[p for p in g["params"] if id(p) not in own] for g in optimizer.param_groups]
    assert {id(p) for group in joined for p in group} == {id(p) for p in kernels}
    assert [{p.ndim for p in group} for group in joined] == [{2}, {1}]
    steps = {float(optimizer.state[p]["step"]) for p in kernels}
    assert (
        steps
        == {float(arm.twin.optimizer.state[p]["step"]) for p in kernels}
        == {float(TRIAL_UPDATES)}
    )
    assert all(p.grad is None or p.grad.shape == p.shape for p in kernels)


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
    "adam": lambda ps: torch.optim.Adam(ps, lr=1e-3),
    "adamw, fused": lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True),
    "adamw, foreach": lambda ps: torch.optim.AdamW(ps, lr=1e-3, foreach=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1.0),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-3, momentum=0.9),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=1e-3),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=1e-3),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=1e-3),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=1e-2),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_carries_a_run_through_growth(name):
    """Taken over with the moments of its twin, trained on, and saved and loaded by names."""
    model, _ = chain()
    optimizer = OPTIMIZERS[name](model.parameters())
    course = Course(model, optimizer)
    arm = course.to_the_verdict()
    theirs = {n: moments(arm.twin.optimizer, p) for n, p in arm.twin.model.named_parameters()}
    course.update()
    assert len(kernels_on(model)) == 2
    for each, expected in theirs.items():
        if not is_in_a_seed(each):
            found = moments(optimizer, model.get_parameter(each))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[k], expected[k]) for k in found)
    course.update()
    fresh = OPTIMIZERS[name](model.parameters())
    fresh.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        one, other = moments(optimizer, p), moments(fresh, p)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_first_steps_go_on_where_they_were():
    """A warm-up that is longer than the trial is not begun anew, nor left out."""
    model, optimizer = chain()
    course = Course(model, optimizer, warmup_updates=200)
    arm = course.to_the_verdict()
    kernel = arm.kernels[0].parameters[0]
    course.update()
    assert course.run.factor.factor(kernel) == TRIAL_UPDATES / 200
    assert course.run.factor.factor(model[0].weight) == 1.0


def test_random_state_and_schedule_are_the_runs_own():
    """They go on as if nothing had been tried."""
    states, rates = [], []
    for grows in (False, True):
        model, _ = chain()
        model[3] = nn.Dropout(0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=200)
        torch.manual_seed(7)
        policy = {} if grows else {"policy": esper.Never()}
        course = Course(model, optimizer, after=scheduler.step, **policy)
        for _ in range(64):
            course.update()
        assert bool(kernels_on(model)) is grows
        states.append(torch.get_rng_state())
        rates.append([(g["lr"], g["betas"]) for g in optimizer.param_groups])
    assert torch.equal(*states)
    assert rates[0] == rates[1]


def test_averages_that_follow_have_the_kernels():
    """From the switch on, and not before it."""
    model, optimizer = chain()
    averaged = AveragedModel(model)
    esper.follow(model, averaged)
    course = Course(model, optimizer, after=lambda: averaged.update_parameters(model))
    course.to_the_verdict()
    assert kernels_on(averaged.module) == {}
    course.update()
    assert kernels_on(averaged.module) == kernels_on(model) == {"0": "real", "2": "real"}
    course.update()
    names = [name for name, _ in averaged.module.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]


@pytest.mark.slow
def test_compiled_model_gives_what_the_eager_one_gives():
    """The graph of before is not used for the model of after."""
    model, optimizer = chain()
    compiled = torch.compile(model, backend="aot_eager")
    course = Course(compiled, optimizer)
    course.to_the_verdict()
    before = compiled(X[:8])
    course.update()
    assert kernels_on(model) == {"0": "real", "2": "real"}
    after = compiled(X[:8])
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, model(X[:8]))
    course.update()
    torch.testing.assert_close(compiled(X[:8]), model(X[:8]))


def test_loss_before_and_after_the_switch_is_told():
    """On the watch's part of the gate split, which no verdict has read."""
    model, optimizer = chain()
    course = Course(model, optimizer)
    course.to_the_verdict()
    course.update()
    (trial,) = course.trials
    third = slice(2, None, 3)
    before, after = Measure(helps({}))(model)[third], course.measure(model)[third]
    assert trial.gate_loss_before == pytest.approx(float(before.mean()))
    assert trial.gate_loss_after == pytest.approx(float(after.mean()))


# ---- a transaction


class InjectedError(RuntimeError):
    """What a test lets fail."""


def fails_at(monkeypatch, name, number):
    """Let the call of so high a number of a function of the taking over fail."""
    called = []
    original = getattr(takeover, name)

    def failing(*args, **kwargs):
        called.append(name)
        if len(called) == number:
            raise InjectedError
        return original(*args, **kwargs)

    monkeypatch.setattr(takeover, name, failing)


STEPS = [
    ("_write_state", 4),
    ("place_kernel", 2),
    ("sync_optimizer", 1),
    pytest.param("_write_state", 1, marks=pytest.mark.slow),
    pytest.param("_buffers", 1, marks=pytest.mark.slow),
    pytest.param("place_kernel", 1, marks=pytest.mark.slow),
]


def failed(monkeypatch, name, number, **settings):
    """Return a run whose taking over failed, and its digest right before and after."""
    model, optimizer = chain(optimizer_class=torch.optim.AdamW)
    course = Course(model, optimizer, **settings)
    course.to_the_verdict()
    digests = []
    own = takeover.take_over

    def watched(*args):
        digests.append(run_digest(course.run))
        fails_at(monkeypatch, name, number)
        try:
            return own(*args)
        finally:
            digests.append(run_digest(course.run))

    monkeypatch.setattr("esper.growth.trial.take_over", watched)
    course.update()
    monkeypatch.undo()
    return course, digests


@pytest.mark.parametrize(("name", "number"), STEPS)
def test_whatever_fails_the_run_is_as_it_was(monkeypatch, name, number):
    """Parameters, buffers, moments, draws and hooks; no seed is taken, and no try is spent."""
    course, (before, after) = failed(monkeypatch, name, number)
    assert before == after
    (trial,) = course.trials
    assert trial.verdict == "refused"
    assert "the run is as it was: InjectedError" in trial.reason
    assert not course.grower.stages
    assert not course.run.factor.active
    assert len(course.optimizer.param_groups[0]["params"]) == 6
    assert tries_spent(course.model) == 0
    layers = esper.layers(course.model).values()
    assert {layer.state_layout.state(0).name for layer in layers} == {"DORMANT"}
    course.update()
    course.grower.close()


class Kept:
    def __init__(self):
        self.events = []

    def publish(self, event):
        self.events.append(event)


def test_a_switch_is_told_only_where_it_was_made(monkeypatch):
    """Where it failed the log has a package that passed, and whose state nobody took over."""
    kept = Kept()
    course, _ = failed(monkeypatch, "sync_optimizer", 1, sink=kept)
    (read,) = [event for event in kept.events if isinstance(event, TrialRead)]
    assert (read.verdict, read.taken) == ("refused", "")
    assert read.reason.startswith("it passed (")
    assert "could not be taken over, and the run is as it was: InjectedError" in read.reason
    assert not any(isinstance(event, TakenOver) for event in kept.events)
    text = str(course.grower.report())
    assert "The one package that met the live run was refused: it passed (" in text
    assert "switched to" not in text


def test_a_verdict_is_told_before_its_switch():
    """The control: where it was made the log has both, in that order."""
    kept = Kept()
    Course(sink=kept).to_the_switch()
    told = [event for event in kept.events if isinstance(event, (TrialRead, TakenOver))]
    assert [type(event) for event in told] == [TrialRead, TakenOver]
    assert (told[0].verdict, told[0].taken) == ("taken over", "candidate")


def test_without_the_way_back_a_failure_is_seen(monkeypatch):
    """The control: half of a twin's state in the run is another digest."""
    monkeypatch.setattr(Taken, "undo", lambda self, run: None)
    _, (before, after) = failed(monkeypatch, "place_kernel", 2)
    assert before != after


def test_group_that_is_refused_at_the_second_kernel_undoes_the_first():
    """The owner's ``group_for`` is asked again at the switch, and may answer otherwise then."""
    model, optimizer = chain()
    asked = {"fails": False}

    def group_for(name, _parameter):
        if asked["fails"] and name.startswith("2."):
            raise InjectedError
        return 0

    course = Course(model, optimizer, group_for=group_for)
    course.to_the_verdict()
    asked["fails"] = True
    batch = next(course.batches)
    loss = compute_loss(model, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        before = [p.clone() for p in model.parameters()]
    course.grower.step(loss.detach(), batch=batch)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert kernels_on(model) == {}
    assert "could not be taken over" in course.trials[0].reason
