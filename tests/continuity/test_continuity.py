"""The optimizer through growth: who joins which group, with what state, and who leaves."""

import gc
import weakref

import pytest
import torch
from schedules import SCHEDULERS, told
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from esper.continuity.optimizer import (
    append_parameters,
    audition_optimizer,
    remove_parameters,
    sync_optimizer,
)
from esper.continuity.placement import Place

OPTIMIZERS = [
    pytest.param(lambda groups: SGD(groups, lr=0.1, momentum=0.9), id="sgd"),
    pytest.param(lambda groups: Adam(groups, lr=0.1), id="adam"),
    pytest.param(lambda groups: AdamW(groups, lr=0.1, fused=True), id="fused-adamw"),
]


def parameters(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(3, generator=generator)) for _ in range(num)]


def step(optimizer, params, index):
    for number, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * index + number)
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def in_group(number, params, names=()):
    """Places for parameters, which are all in one group."""
    names = names or [f"k.{i}" for i in range(len(params))]
    return [Place(number, name, p) for name, p in zip(names, params, strict=True)]


def two_groups(build, host):
    return build([{"params": host[:1]}, {"params": host[1:], "lr": 0.01}])


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_parameters_join_the_group_that_was_chosen(build):
    """A kernel's parameters take the settings of the group that they were given a place in."""
    host, new = parameters(2), parameters(2, seed=1)
    optimizer = two_groups(build, host)
    append_parameters(optimizer, in_group(1, new))
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert sizes == [1, 3]
    assert optimizer.param_groups[1]["lr"] == 0.01


def test_parameter_that_is_there_already_stays():
    """Appending twice does not train a parameter twice."""
    host = parameters(2)
    optimizer = SGD(host, lr=0.1)
    append_parameters(optimizer, in_group(0, host))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in host]


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_moments_of_the_audition_go_on(build):
    """After admission updates are what the audition's optimizer would have made, bit for bit."""
    host = parameters(1)
    optimizer = build(host)
    runs = []
    for admitted in (True, False):
        (p,) = parameters(1, seed=1)
        audition = audition_optimizer(optimizer, in_group(0, [p]))
        for index in range(3):
            step(audition, [p], index)
        if admitted:
            moments = dict(audition.state[p])
            append_parameters(optimizer, in_group(0, [p]), state=audition.state)
            assert all(optimizer.state[p][key] is value for key, value in moments.items())
        for index in range(3, 6):
            step(optimizer if admitted else audition, [p], index)
        runs.append(p.detach().clone())
    assert torch.equal(*runs)


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_host_goes_on_as_if_nothing_had_joined(build):
    """The host's updates, with its moments, are those of a run without the kernel."""
    runs = []
    for grown in (False, True):
        host, new = parameters(2), parameters(1, seed=1)
        optimizer = build(host)
        for index in range(6):
            if grown and index == 3:
                append_parameters(optimizer, in_group(0, new))
            step(optimizer, [*host, *(new if grown and index >= 3 else [])], index)
        runs.append([p.detach().clone() for p in host])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("build", OPTIMIZERS)
def test_removed_parameters_leave_nothing_behind(build):
    """After removal the optimizer has no group entry, no state, and no reference to them."""
    host, new = parameters(2), parameters(1, seed=1)
    optimizer = build(host)
    append_parameters(optimizer, in_group(0, new))
    step(optimizer, [*host, *new], 0)
    assert new[0] in optimizer.state
    remove_parameters(optimizer, new)
    assert optimizer.param_groups[0]["params"] == host
    assert set(map(id, optimizer.state)) == set(map(id, host))
    gone = weakref.ref(new.pop())
    gc.collect()
    assert gone() is None


def test_last_parameter_of_a_group_leaves_the_group():
    """Schedulers count groups, so that one that has become empty stays."""
    host, new = parameters(1), parameters(1, seed=1)
    optimizer = SGD([{"params": host}, {"params": new}], lr=0.1)
    remove_parameters(optimizer, new)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]


def test_named_parameters_keep_their_names():
    """An optimizer that was built from names has one for every parameter, before and after."""
    host, new = parameters(2), parameters(2, seed=1)
    optimizer = SGD([("a", host[0]), ("b", host[1])], lr=0.1)
    append_parameters(optimizer, in_group(0, new, ["k.weight", "k.bias"]))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [
        "a",
        "b",
        "k.weight",
        "k.bias",
    ]
    remove_parameters(optimizer, [host[1], new[0]])
    assert optimizer.param_groups[0]["param_names"] == ["a", "k.bias"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_keep_working(name):
    """Under every scheduler the host's rates and weights are those of a run that never grew."""
    runs = []
    for grown in (False, True):
        host, new = parameters(2), parameters(1, seed=1)
        optimizer = two_groups(lambda groups: SGD(groups, lr=0.1), host)
        scheduler = SCHEDULERS[name](optimizer)
        rates = []
        for index in range(7):
            if grown and index == 3:
                append_parameters(optimizer, in_group(1, new))
            if grown and index == 5:
                remove_parameters(optimizer, new)
            step(optimizer, host, index)
            told(scheduler)
            rates.append([group["lr"] for group in optimizer.param_groups])
        runs.append((rates, [p.detach().clone() for p in host]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_group_of_its_own_breaks_a_scheduler():
    """The control: a new group, the obvious way, does not survive LambdaLR."""
    host, new = parameters(2), parameters(1, seed=1)
    optimizer = SGD(host, lr=0.1)
    scheduler = SCHEDULERS["LambdaLR"](optimizer)
    optimizer.add_param_group({"params": new})
    step(optimizer, host, 0)
    with pytest.raises((ValueError, KeyError, IndexError)):
        scheduler.step()


@pytest.mark.parametrize(
    "build",
    [
        lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.2, maximize=True),
        lambda p: Adam(p, lr=0.1, betas=(0.5, 0.6), eps=1e-3, amsgrad=True),
        lambda p: AdamW(p, lr=0.1, weight_decay=0.3, foreach=True),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_audition_has_the_same_class_and_settings(build):
    """The audition's optimizer is what the host's group is, but for its parameters."""
    host, new = parameters(1), parameters(1, seed=1)
    optimizer = build(host)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    optimizer.param_groups[0]["lr"] = 0.05
    audition = audition_optimizer(optimizer, in_group(0, new))
    own, group = audition.param_groups[0], optimizer.param_groups[0]
    assert type(audition) is type(optimizer)
    assert own["params"] == new
    assert {key: group[key] for key in own if key != "params"} == {
        key: value for key, value in own.items() if key != "params"
    }
    other = audition_optimizer(optimizer, in_group(0, new), rates=[0.3])
    assert other.param_groups[0]["lr"] == 0.3
    assert group["lr"] == 0.05


@pytest.mark.parametrize("hand_over", [lambda o: o, lambda o: [o]], ids=["itself", "in-a-list"])
def test_lbfgs_is_refused(hand_over):
    """By name, with the reason and what to do."""
    optimizer = torch.optim.LBFGS(parameters(1))
    with pytest.raises(TypeError, match=r"LBFGS: it keeps one state.*train with any other"):
        sync_optimizer(nn.Linear(1, 1), hand_over(optimizer))
    assert isinstance(optimizer, Optimizer)
