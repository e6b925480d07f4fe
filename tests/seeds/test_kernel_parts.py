"""A kernel is made of modules of its own; a refusal leaves everything as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn

import esper
from esper.state.kernel import PreparedKernel


class Holds(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part, self.out = part, nn.Linear(6, 6)

    def forward(self, x):
        return self.out(self.part(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(6, 6), nn.Tanh()

    def forward(self, x):
        return self.act(self.fc(x))


def net():
    """Return a model of which two layers are wrapped and two modules are not."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), Block()
    return esper.wrap(nn.Sequential(*layers), select=["0", "2"])


TAKEN = {
    "the layer itself": lambda model: model[0],
    "the model": lambda model: model,
    "what holds the layer": lambda model: Holds(model[0]),
    "what holds it deep inside": lambda model: nn.Sequential(Holds(Holds(model[0]))),
    "what holds the model": Holds,
    "another layer": lambda model: model[2],
    "what holds another layer": lambda model: Holds(model[2]),
    "a module that is not wrapped": lambda model: model[3],
    "a part of such a module": lambda model: nn.Sequential(model[3].fc, nn.Tanh()),
    "a module without parameters": lambda model: nn.Sequential(nn.Linear(6, 6), model[1]),
    "a prepared one": lambda model: PreparedKernel(module=model[3]),
}


def assert_untouched(model, before, x, expected):
    assert [layer.structure() for layer in esper.layers(model).values()] == [[], []]
    assert list(model.state_dict()) == before
    assert list(esper.layers(model)) == ["0", "2"]
    assert torch.equal(model(x), expected)
    plain = esper.unwrap(model)
    assert torch.equal(plain(x), expected)


@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("example", [torch.randn(2, 6), None])
@pytest.mark.parametrize("taken", TAKEN)
def test_a_module_of_the_model_is_no_kernel(taken, example, is_copied):
    """It is refused by name, in a copy of the model too, and nothing has changed."""
    model, x = net(), torch.randn(3, 6)
    model = copy.deepcopy(model) if is_copied else model
    before, expected = list(model.state_dict()), model(x)
    with pytest.raises(ValueError, match=r"cannot be a kernel at layer '0': .* copy"):
        model[0].graft(0, TAKEN[taken](model), alpha=0.5, example=example)
    assert_untouched(model, before, x, expected)


@pytest.mark.parametrize("taken", TAKEN)
def test_a_module_of_the_model_is_no_shadow(taken):
    """Neither is it one in shadow."""
    model, x = net(), torch.randn(3, 6)
    before, expected = list(model.state_dict()), model(x)
    with (
        pytest.raises(ValueError, match="cannot be a kernel"),
        model[0].shadow(0, TAKEN[taken](model)),
    ):
        pass
    assert_untouched(model, before, x, expected)


def test_the_refusal_says_which_module_it_is():
    """By the name that the model has for it."""
    model = net()
    held = Block()
    held.fc = model[3].fc
    with pytest.raises(ValueError, match=r"its 'part.fc' is '3.fc' of the same model"):
        model[0].graft(0, Holds(held))
    with pytest.raises(ValueError, match="it is that layer itself"):
        model[0].graft(0, model[0])


def test_a_layer_of_its_own_part_is_refused_where_the_model_is_unknown():
    """Unpickled, a layer still knows itself and what is inside it; the rest where it is listed."""
    model = esper.wrap(nn.Sequential(nn.Linear(6, 6), Block()), select=["0", "1"])
    model = pickle.loads(pickle.dumps(model))
    for kernel in (model[1], Holds(model[1]), model[1].fc):
        with pytest.raises(ValueError, match="cannot be a kernel"):
            model[1].graft(0, kernel, example=torch.randn(2, 6))
    esper.layers(model)
    with pytest.raises(ValueError, match="it is '0' of the same model"):
        model[1].graft(0, model[0], example=torch.randn(2, 6))
    assert model[1].structure() == []


def test_a_copy_of_a_layer_is_a_kernel():
    """The cure of the message works, for a plain module and for a wrapped one."""
    model, x = net(), torch.randn(3, 6)
    expected = model(x)
    model[0].graft(0, copy.deepcopy(model[3]), alpha=0.5, example=x)
    model[0].graft(1, esper.restore(copy.deepcopy(model[2])).model, alpha=0.5, example=x)
    assert not torch.equal(model(x), expected)
    assert model[0].num_seeds == 4
    assert [s["alpha"] for s in model[0].structure()] == [0.5, 0.5]


def test_the_same_kernel_is_grafted_again():
    """What stands in a seed is no layer: it may be given again, and to a second seed."""
    model, x = net(), torch.randn(3, 6)
    kernel = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    model[0].graft(0, kernel, alpha=0.5, example=x)
    model[0].graft(0, kernel, alpha=0.25, example=x)
    model[2].graft(0, kernel, alpha=0.5, example=x)
    h = model[0].default_layer(x) + 0.25 * kernel(x)
    h = torch.tanh(h)
    expected = model[3](model[2].default_layer(h) + 0.5 * kernel(h))
    torch.testing.assert_close(model(x), expected)


def test_a_kernel_may_be_tied_to_the_model():
    """It shares a weight: outputs and gradients are the formula's; it goes, the weight stays."""
    model, x = net(), torch.randn(3, 6)
    kernel = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh())
    kernel[0].weight = tied = model[2].weight
    model[0].graft(0, kernel, alpha=0.5, example=x)
    inner = [p for m in (model[0], model[2], model[3].fc) for p in (m.weight, m.bias)]
    free = [p.detach().clone().requires_grad_() for p in inner]

    def by_hand(w0, b0, w2, b2, w3, b3):
        h = torch.tanh(x @ w0.T + b0 + 0.5 * torch.tanh(x @ w2.T))
        return torch.tanh((h @ w2.T + b2) @ w3.T + b3)

    y = model(x)
    torch.testing.assert_close(y, by_hand(*free))
    found = torch.autograd.grad(y.square().sum(), inner)
    torch.testing.assert_close(found, torch.autograd.grad(by_hand(*free).square().sum(), free))
    assert list(esper.layers(model)) == ["0", "2"]
    plain = esper.unwrap(copy.deepcopy(model))
    torch.testing.assert_close(plain(x), y)
    assert plain[0].seed_0[0].weight is plain[2].weight
    model[0].unload_kernel(0)
    assert model[2].weight is tied
    assert not tied._backward_hooks
