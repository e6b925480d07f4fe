"""Kernels with lazy layers are refused while they have no shapes, at every door."""

import pytest
import torch
from torch import nn

import esper
from esper.contracts.errors import KernelRefusedError
from esper.contracts.lifecycle import SeedLifecycleState

KERNELS = {
    "linear": lambda: nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(6)),
    "nested": lambda: nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.Tanh(), nn.LazyLinear(6))),
    "statistics": lambda: nn.Sequential(nn.Linear(6, 6), nn.LazyBatchNorm1d()),
}
X = torch.linspace(-1.0, 1.0, 18).reshape(3, 6)

DOORS = {
    "made_input": lambda layer, kernel: layer.graft(0, kernel, alpha=0.5),
    "example": lambda layer, kernel: layer.graft(0, kernel, alpha=0.5, example=X),
    "shadow": lambda layer, kernel: layer.shadow(0, kernel),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", KERNELS)
def test_a_lazy_kernel_is_refused_and_nothing_has_changed(name, door):
    """The error names the tensors and the cure; layer and kernel are as before."""
    net, kernel = esper.wrap(nn.Sequential(nn.Linear(6, 6))), KERNELS[name]()
    before, keys = net(X), list(net.state_dict())
    with pytest.raises(KernelRefusedError, match=r"weight.*call it once") as caught:
        DOORS[door](net[0], kernel)
    assert caught.value.check == "lazy"
    assert net[0].state_layout.state(0) == SeedLifecycleState.DORMANT
    assert list(net.state_dict()) == keys
    assert torch.equal(net(X), before)


def test_a_lazy_kernel_leaves_the_one_that_stands_there():
    """An exchange is all or nothing, too."""
    layer, working = esper.wrap(nn.Sequential(nn.Linear(6, 6)))[0], nn.Linear(6, 6)
    layer.graft(0, working, alpha=0.5)
    before = layer(X)
    with pytest.raises(KernelRefusedError):
        layer.graft(0, nn.LazyLinear(6), alpha=1.0)
    assert layer.seed_kernel(0) is working
    assert layer.alpha(0) == 0.5
    assert torch.equal(layer(X), before)


@pytest.mark.parametrize("name", KERNELS)
def test_one_that_was_called_is_taken(name):
    """The cure works: it has its shapes then, and is a kernel like any other."""
    layer, kernel = esper.wrap(nn.Sequential(nn.Linear(6, 6)))[0], KERNELS[name]()
    before = layer(X)
    kernel(X)
    layer.graft(0, kernel, alpha=0.5)
    assert layer.seed_kernel(0) is kernel
    assert not torch.equal(layer(X), before)
