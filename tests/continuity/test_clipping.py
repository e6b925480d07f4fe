"""Clipping: whether an owner clips is told from the gradients, and a twin does likewise."""

from __future__ import annotations

import copy

import pytest
import torch
from growing import SHORT, batches, compute_loss, evaluate
from torch import nn

import esper
from esper.continuity.clipping import UNCLIPPED, Clipping, GradientWatch
from esper.growth.twins import Twin


def network(random_seed=0):
    torch.manual_seed(random_seed)
    return nn.Sequential(
        nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)
    )


def by_norm(limit):
    return lambda model: nn.utils.clip_grad_norm_(model.parameters(), limit)


def by_value(limit):
    return lambda model: nn.utils.clip_grad_value_(model.parameters(), limit)


def unclipped(_model):
    return None


def watched(clip, num=30, *, random_seed=0, factor=1.0, lr=1e-2, whole=False, model=None):
    """Train, and return how the gradients are said to be clipped after each update."""
    model = network(random_seed) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    watch, found = GradientWatch(), []
    optimizer.register_step_pre_hook(lambda *_: watch.see(optimizer))
    parts = [torch.arange(800)] * num if whole else batches(num, random_seed)
    for batch in parts:
        optimizer.zero_grad()
        (factor * compute_loss(model, batch)).backward()
        clip(model)
        optimizer.step()
        found.append(watch.clipping)
    return found


@pytest.mark.parametrize("limit", [0.01, 0.1, 0.25, 1 / 3, 0.5, 1.0])
def test_limit_of_the_norm_is_found_to_the_digit(limit):
    """After three updates that it held back, as it was written down."""
    found = watched(by_norm(limit), factor=100.0)
    assert found[1] == UNCLIPPED
    if limit == 1 / 3:
        assert found[-1].norm == pytest.approx(limit, rel=1e-5)
    else:
        assert {each.norm for each in found[2:]} == {limit}
    assert {each.value for each in found} == {None}


@pytest.mark.parametrize("limit", [0.01, 0.1, 0.5])
def test_limit_of_the_values_is_found(limit):
    """It is the largest element of several updates, and their norm is none's limit."""
    found = watched(by_value(limit), factor=100.0)
    assert found[1] == UNCLIPPED
    assert {each.value for each in found[2:]} == {limit}
    assert {each.norm for each in found} == {None}


def test_limit_that_is_seldom_reached_is_found():
    """Norms that lie below it are the gradients' own."""
    norms = []
    model = network()

    def clip(model):
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 2.0)))

    found = watched(clip, 60, model=model, factor=1.5)
    share = sum(norm > 2.0 for norm in norms) / len(norms)
    assert 0.05 < share < 0.8
    assert found[-1].norm == 2.0


@pytest.mark.parametrize("random_seed", range(5))
@pytest.mark.parametrize(
    "how", [{}, {"whole": True}, {"factor": 1e-4}, {"lr": 1e-6}, {"lr": 0.3}], ids=str
)
def test_no_clipping_is_invented_for_a_run_without(random_seed, how):
    """Whatever the size of its gradients, also where every batch is the whole data set."""
    assert set(watched(unclipped, 80, random_seed=random_seed, **how)) == {UNCLIPPED}


@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_no_clipping_is_invented_at_the_end_of_a_run(lr):
    """Where gradients hardly change any more."""
    model = network()
    watched(unclipped, 500, lr=lr, model=model, whole=True)
    assert set(watched(unclipped, 80, lr=lr, model=model, whole=True)) == {UNCLIPPED}


def test_gradients_that_are_not_finite_tell_nothing():
    """They are no limit, and hide none."""
    model, watch = network(), GradientWatch()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for value in (1.0, float("nan"), 1.0, float("inf"), 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        watch.see(optimizer)
    assert watch.clipping.value == 1.0


def test_optimizer_without_gradients_is_passed_over():
    """A step of nothing is none."""
    model, watch = network(), GradientWatch()
    watch.see(torch.optim.SGD(model.parameters(), lr=1e-2))
    assert watch.clipping == UNCLIPPED


def test_clipping_is_applied_as_torch_does():
    """The same gradients under the same limit, bit for bit."""
    for clipping, clip in (
        (Clipping(norm=0.5), by_norm(0.5)),
        (Clipping(value=0.1), by_value(0.1)),
    ):
        one = network()
        compute_loss(one, batches(1)[0]).backward()
        other = copy.deepcopy(one)
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            q.grad = p.grad.clone()
        clipping.apply(one.parameters())
        clip(other)
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(p.grad, q.grad) for p, q in pairs)


def beside(clip, *, num=50, groups=False):
    """Train a run with a twin beside it; return whether they are equal at the end."""
    model = esper.wrap(network())
    params = list(model.parameters())
    if groups:  # biases first: another order than the model's
        params = [{"params": params[1::2]}, {"params": params[0::2]}]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    grower = esper.Grower(
        model,
        optimizer,
        compute_loss=compute_loss,
        evaluate=evaluate,
        policy=esper.Never(),
        **SHORT,
    )
    run, twins = grower._run, []
    run.watcher.reads_scale = True
    for batch in batches(num + 5):
        loss = compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        clip(model)
        optimizer.step()
        grower.step(loss.detach(), batch=batch)
        for twin in twins:
            twin.update([batch], run.live_step())
        if run.updates == 5:
            twins.append(Twin(run))
    pairs = zip(model.parameters(), twins[0].model.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize(
    "clip",
    [by_norm(0.25), by_norm(1.0), by_value(0.05), unclipped],
    ids=["norm", "higher norm", "value", "unclipped"],
)
def test_twin_of_a_clipped_run_is_the_run_bit_for_bit(clip, groups):
    """After fifty updates, whatever the order of the optimizer's groups."""
    assert beside(clip, groups=groups)


@pytest.mark.parametrize("clip", [by_norm(0.25), by_value(0.05)], ids=["norm", "value"])
def test_twin_that_knows_of_no_clipping_is_another_run(clip, monkeypatch):
    """The control: without detection the two come apart."""
    monkeypatch.setattr(GradientWatch, "see", lambda self, optimizer: None)
    assert not beside(clip)


def test_a_trial_begins_with_what_four_updates_have_told():
    """A kernel that is named by hand is not tried unclipped in a run that clips."""
    model = esper.wrap(network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grower = esper.Grower(
        model,
        optimizer,
        compute_loss=compute_loss,
        evaluate=evaluate,
        policy=esper.ByHand([("0", "mlp-4x16-w32", 3)]),
        **{**SHORT, "record_updates": 1},
    )
    told = []
    for batch in batches(12):
        loss = compute_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        by_norm(0.25)(model)
        optimizer.step()
        grower.step(loss.detach(), batch=batch)
        if any(status.stage.value == "trial" for status in grower.stages):
            told.append(grower._run.live_step().clipping)
    assert told
    assert set(told) == {Clipping(norm=0.25)}
    grower.close()
