"""Moments through a fold: the host's stay where its gradient does, and begin anew elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import esper
from esper.continuity.ensemble import joined
from esper.continuity.warmup import UpdateFactor
from esper.growth.live_kernel import LiveKernel, make_permanent

X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
    "adamw, fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, fused=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-2),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=1e-3),
}


def backward(model, optimizer):
    optimizer.zero_grad()
    model(X).square().mean().backward()


def trained(make, **placed):
    """Return a run whose affine kernel has been trained with its host."""
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)))
    optimizer = make(model.parameters())
    model[0].graft(0, nn.Linear(4, 4), example=X, **placed)
    esper.sync_optimizer(model, optimizer)
    for _ in range(5):
        backward(model, optimizer)
        optimizer.step()
    return model, optimizer


def folded(model, optimizer):
    """Fold; return the host's moments and gradient before it, and the certificate."""
    backward(model, optimizer)
    moments = {p: copy.deepcopy(optimizer.state[p]) for p in model[0].parameters(recurse=False)}
    gradient = model[0].weight.grad.clone()
    certificate = model[0].fossilize(0)
    assert certificate.folded, certificate
    esper.sync_optimizer(model, optimizer)
    return moments, gradient, certificate


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[k], other[k]) if isinstance(one[k], torch.Tensor) else one[k] == other[k]
        for k in one
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fold_beside_the_host_keeps_its_moments(name):
    """They are of the gradient that the folded weight has: it is the same one."""
    model, optimizer = trained(OPTIMIZERS[name], position="parallel", alpha=0.5)
    moments, gradient, certificate = folded(model, optimizer)
    assert certificate.stale_moments == () == tuple(certificate.reason)
    assert len(moments) == 2
    assert all(same(optimizer.state[p], state) for p, state in moments.items())
    assert len(optimizer.state) == len(list(model.parameters()))
    backward(model, optimizer)
    torch.testing.assert_close(model[0].weight.grad, gradient, rtol=1e-5, atol=1e-6)


BEHIND = {
    "serial": {"position": "serial", "alpha": 0.5},
    "replacing": {"position": "parallel", "mode": "replace", "alpha": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("placed", ["serial", pytest.param("replacing", marks=pytest.mark.torture)])
def test_a_fold_that_changes_the_gradient_begins_anew(name, placed):
    """The certificate says whose moments, the others stay, and the run goes on."""
    model, optimizer = trained(OPTIMIZERS[name], **BEHIND[placed])
    other = copy.deepcopy(optimizer.state[model[2].weight])
    moments, gradient, certificate = folded(model, optimizer)
    assert certificate.stale_moments == ("weight", "bias")
    assert certificate.reason == "folded; moments of weight and bias begin anew"
    assert not any(optimizer.state.get(p) for p in moments)
    assert same(optimizer.state[model[2].weight], other)
    backward(model, optimizer)
    assert not torch.allclose(model[0].weight.grad, gradient, rtol=1e-2)  # why they are of no use
    optimizer.step()
    assert optimizer.state[model[0].weight]
    esper.sync_optimizer(model, optimizer)
    assert optimizer.state[model[0].weight], "once is enough"


def test_first_steps_begin_anew_with_the_moments():
    """A run that grows does not take Adam's full first step with weights that it had."""
    model, optimizer = trained(OPTIMIZERS["adamw"], **BEHIND["serial"])
    factor = UpdateFactor(joined(optimizer), warmup_updates=10)
    parameters = tuple(model[0].seed_kernel(0).parameters())
    live = LiveKernel(grafted_into=model[0], seed_idx=0, parameters=parameters)
    make_permanent(live, joined(optimizer), factor)
    assert [factor.factor(p) for p in model[0].parameters()] == [0.0, 0.0]
    assert factor.factor(model[2].weight) == 1.0
    factor.close()
