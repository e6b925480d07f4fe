"""Gates follow a kernel's parameters: what is trainable in the backward is gated there."""

import copy
import pickle

import pytest
import torch
from torch import nn

import esper
from esper.seeds.maintenance import maintain

pytestmark = pytest.mark.usefixtures("with_and_without_a_look")


class Spoil(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, w):
        return w.clone()

    @staticmethod
    def backward(ctx, g):
        return g * float("nan")


class Kernel(nn.Module):
    """Spoils the gradients of its weights, once it is told to."""

    def __init__(self):
        super().__init__()
        self.body, self.is_bad = nn.Linear(4, 4), False

    def forward(self, x):
        weight, bias = self.body.weight, self.body.bias
        if self.is_bad:
            weight, bias = Spoil.apply(weight), Spoil.apply(bias)
        extra = 0.0
        for name, parameter in self.named_parameters():
            if not name.startswith("body."):
                extra = extra + (Spoil.apply(parameter) if self.is_bad else parameter).sum()
        return nn.functional.linear(x, weight, bias) + extra


def grafted(*, is_frozen=False, mode="add", host_frozen=False):
    torch.manual_seed(0)
    net = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    net.requires_grad_(not host_frozen)
    kernel = Kernel().requires_grad_(not is_frozen)
    net[0].graft(0, kernel, alpha=0.5, mode=mode, example=torch.randn(3, 4))
    return net, kernel


def unfreeze(kernel):
    kernel.requires_grad_(True)


def unfreeze_bias(kernel):
    kernel.body.bias.requires_grad_(True)


def toggle(kernel):
    kernel.requires_grad_(False).requires_grad_(True)


def exchange_a_parameter(kernel):
    kernel.body.weight = nn.Parameter(torch.randn(4, 4))


def exchange_a_module(kernel):
    kernel.body = nn.Linear(4, 4)


def add_a_parameter(kernel):
    kernel.shift = nn.Parameter(torch.zeros(1))


def add_a_module(kernel):
    kernel.extra = nn.Linear(2, 2)


CHANGES = {
    f.__name__: f
    for f in (
        unfreeze,
        unfreeze_bias,
        toggle,
        exchange_a_parameter,
        exchange_a_module,
        add_a_parameter,
        add_a_module,
    )
}


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("host_frozen", [False, True], ids=["host_trains", "host_frozen"])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_became_trainable_after_the_graft_is_gated(change, is_frozen, host_frozen, mode):
    """A gradient that is not finite reaches no parameter of the kernel, and the fault is told."""
    net, kernel = grafted(is_frozen=is_frozen, mode=mode, host_frozen=host_frozen)
    x = torch.randn(3, 4, requires_grad=True)
    net(x).sum().backward()
    change(kernel)
    kernel.is_bad = True
    net(x).sum().backward()
    gradients = [p.grad for p in kernel.parameters() if p.requires_grad and p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)
    assert maintain(net).faults


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_gates_its_own(copied):
    """Parameters that are unfrozen in a copy are gated there."""
    net, _ = grafted(is_frozen=True)
    other = copied(net)
    kernel = other[0].seed_kernel(0)
    kernel.requires_grad_(True)
    kernel.is_bad = True
    other(torch.randn(3, 4)).sum().backward()
    assert kernel.body.weight.grad.isfinite().all()


def test_without_the_guard_nothing_is_gated():
    """The control: with guard='off' the same gradient arrives."""
    net, kernel = grafted(is_frozen=True)
    net[0].set_guard(0, "off")
    kernel.requires_grad_(True)
    kernel.is_bad = True
    net(torch.randn(3, 4)).sum().backward()
    assert kernel.body.weight.grad.isnan().all()
