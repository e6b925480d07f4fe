"""First steps under what a run may do: every scheduler, and every way to make an update."""

import copy
import inspect

import guarded_updates
import pytest
import torch
from schedules import SCHEDULERS, told
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

from esper.continuity.optimizer import append_parameters
from esper.continuity.placement import Place
from esper.continuity.warmup import UpdateFactor
from esper.growth.updates import UpdateWatcher

WARM_UP = 2


def test_no_scheduler_is_left_out():
    """The table has all that torch has."""
    named = [getattr(lr_scheduler, name) for name in lr_scheduler.__all__]
    assert {*SCHEDULERS} == {c.__name__ for c in named if inspect.isclass(c)} - {"LRScheduler"}


def grown(name, *, peak):
    """Let a parameter appear in the middle of a schedule.

    Returns:
        Rates, the host's values, and the updates of the parameter, whose gradient is 1.
    """
    host, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    optimizer = SGD([host], lr=0.1)
    scheduler = SCHEDULERS[name](optimizer)
    factor = UpdateFactor(optimizer, warmup_updates=WARM_UP)
    rates, hosts, updates = [], [], []
    for number in range(8):
        if number == 3 and peak is not None:
            append_parameters(optimizer, [Place(0, "late", late)])
            factor.add([late], peaks=[peak])
        before = late.detach().clone()
        host.grad, late.grad = torch.ones(2), torch.ones(1)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        told(scheduler)
        hosts.append(host.detach().clone())
        updates.append(float(before - late.detach()))
    return rates, hosts, updates


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("is_spent", [False, True], ids=["fresh", "spent"])
def test_first_steps_follow_every_schedule(name, is_spent):
    """Warm-up, and 0.3 of the peak where the rate is spent, which goes on with the schedule."""
    plain, hosts, _ = grown(name, peak=None)
    start = plain[3]
    peak = 100 * start if is_spent else start
    rates, found, updates = grown(name, peak=peak)
    assert rates == plain
    assert all(torch.equal(one, other) for one, other in zip(found, hosts, strict=True))
    warmth = [min(1.0, i / WARM_UP) for i in range(5)]
    boost = [max(1.0, 0.3 * peak / max(r, start)) if is_spent else 1.0 for r in rates[3:]]
    wanted = [f * b * r for f, b, r in zip(warmth, boost, rates[3:], strict=True)]
    assert updates[3:] == pytest.approx(wanted, rel=1e-4)


OPTIMIZERS = {
    "sgd": lambda groups: SGD(groups, lr=0.1, momentum=0.9),
    "adamw, fused": lambda groups: AdamW(groups, lr=0.01, fused=True),
}


@pytest.mark.parametrize("way", guarded_updates.SETTINGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_steps_are_a_share_of_every_kind_of_update(name, way):
    """Clipped, scaled, by a closure or accumulated, a group without decay beside one with it."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    x = torch.randn(4, 3)
    ends = []
    for warm_up in (4, 0):
        model = copy.deepcopy(first)
        groups = [{"params": model[0].parameters()}]
        groups += [{"params": model[2].parameters(), "weight_decay": 0.0}]
        optimizer = OPTIMIZERS[name](groups)
        factor = UpdateFactor(optimizer, [model[2].weight], warmup_updates=warm_up)
        if warm_up:  # a quarter of the way: what is compared is one update from equal values
            factor.load_state_dict([{**_BEGUN, "num_updates": 1}], [model[2].weight])
        guarded_updates.SETTINGS[way](model, optimizer, lambda m=model: m(x).square().mean())
        ends.append(model)
        if warm_up:
            assert factor.factor(model[2].weight) == 0.5
    warm, full = ends
    assert all(
        torch.equal(a, b) for a, b in zip(warm[0].parameters(), full[0].parameters(), strict=True)
    )
    assert torch.equal(warm[2].bias, full[2].bias)
    moved, whole = (m[2].weight - first[2].weight for m in ends)
    torch.testing.assert_close(moved, 0.25 * whole, rtol=1e-4, atol=1e-7)


_BEGUN = {"num_updates": 0, "ceiling": 0.0, "start_rate": 0.0}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_first_step_is_a_step_that_the_scaler_skipped(name):
    """Also where it is the fused optimizer itself that skips it, and hooks are called."""
    p = nn.Parameter(torch.ones(1))
    optimizer = OPTIMIZERS[name]([p])
    factor = UpdateFactor(optimizer, [p], warmup_updates=10, hooks=False)
    watcher = UpdateWatcher(optimizer, factor)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for value in (1.0, float("inf"), float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((p * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert watcher.num_steps_of_optimizer == 2
    assert factor.factor(p) == 0.2
