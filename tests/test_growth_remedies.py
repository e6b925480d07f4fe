"""Other beginnings of kernels, held by the benchmark against the defaults, are what they say."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import esper
from esper.compiler.catalog import default_catalog
from esper.compiler.linear_form import linear_form
from esper.compiler.lowering import lower
from esper.state.site import describe_site

GROWTH = Path(__file__).parent.parent / "benchmarks" / "growth"
FAMILIES = {"mlp": "4", "gated-mlp": "4", "conv-block": "0", "separable": "2", "bottleneck": "2"}
"""Families of kernels, and where each fits in the host."""


@pytest.fixture
def load(monkeypatch):
    """Import a module of the benchmark, which are scripts beside each other."""
    monkeypatch.syspath_prepend(str(GROWTH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(GROWTH)):
            del sys.modules[name]


def a_host():
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(3 * 36, 5))


def a_batch(num=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num, 1, 6, 6, generator=generator)
    return x, torch.arange(num) % 5


def grown(*families, is_linear=False):
    """Return a host that has made an update, with kernels that have just appeared."""
    model = esper.wrap(a_host())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    F.cross_entropy(model(a_batch()[0]), a_batch()[1]).backward()
    optimizer.step()
    for family in families:
        layer = esper.layers(model)[FAMILIES[family]]
        offered = default_catalog().blueprints_for(describe_site(layer))
        blueprint = next(b for b in offered if b.id.startswith(f"{family}-"))
        layer.graft(0, lower(linear_form(blueprint) if is_linear else blueprint))
    model(a_batch()[0])
    esper.sync_optimizer(model, optimizer)
    return model, optimizer


def gradients(model, placed):
    """Return how long the gradients of hidden layer and readout are."""
    x, y = a_batch()
    weights = [placed.hidden.weight, placed.out.weight]
    return [float(g.norm()) for g in torch.autograd.grad(F.cross_entropy(model(x), y), weights)]


@pytest.mark.parametrize("is_linear", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_layer_of_zeros_gets_a_gradient_and_changes_nothing(load, family, is_linear):
    """GradMax's values: the kernel gives zeros, and its zeroed layer learns at once."""
    values, (model, _) = load("initial_values"), grown(family, is_linear=is_linear)
    (placed,) = load("remedies")._placed(model)
    before = model(a_batch()[0])
    assert gradients(model, placed)[0] == 0
    values.largest_gradient_behind_(placed, values.recorded(model, [placed], a_batch())[placed])
    assert not placed.hidden.weight.any()
    assert gradients(model, placed)[0] > 0
    torch.testing.assert_close(model(a_batch()[0]), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_units_turn_to_a_larger_gradient_of_the_readout(load, family):
    """The units keep their length, the kernel gives zeros, and its readout learns faster."""
    values, (model, _) = load("initial_values"), grown(family)
    (placed,) = load("remedies")._placed(model)
    before, length = gradients(model, placed)[1], placed.hidden.weight.flatten(1).norm(dim=1)
    values.largest_gradient_before_(placed, values.recorded(model, [placed], a_batch())[placed])
    assert gradients(model, placed)[1] > 1.2 * before
    torch.testing.assert_close(placed.hidden.weight.flatten(1).norm(dim=1), length)
    assert not placed.out.weight.any()


def test_fitted_readouts_lower_the_loss_of_their_sample(load):
    """At worst they are zeros, as before."""
    values, (model, _) = load("initial_values"), grown("mlp", "conv-block")
    x, y = a_batch()
    before = F.cross_entropy(model(x), y)
    seen = values.recorded(model, load("remedies")._placed(model), (x, y))
    values.fitted_(model, seen, (x, y))
    assert F.cross_entropy(model(x), y) < 0.9 * before


def test_features_are_as_large_as_what_the_host_gives(load):
    """Their root mean square is the host's."""
    values, (model, _) = load("initial_values"), grown("mlp")
    (placed,) = load("remedies")._placed(model)
    seen = values.recorded(model, [placed], a_batch())[placed]
    values.matched_(placed, seen)
    features = values._features(placed, seen.x)
    torch.testing.assert_close(features.square().mean(), seen.h.square().mean(), rtol=0.02, atol=0)


def test_update_of_no_remedy_is_that_of_the_loss(load):
    """What a remedy comes to is not what the update around it does."""
    remedies = load("remedies")
    (ours, by_update), (theirs, by_loss) = grown("mlp"), grown("mlp")
    update = remedies.Update(remedies.Remedy(told=""), a_batch())
    for num in (16, 12, 16):
        update(ours, by_update, update.shown(ours, a_batch(num)))
        by_loss.zero_grad()
        F.cross_entropy(theirs(a_batch(num)[0]), a_batch(num)[1]).backward()
        by_loss.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("name", ["host's moments", "moments anew", "distilled", "muP"])
def test_remedy_of_the_first_updates_changes_them_and_ends(load, name):
    """The first updates are others; only muP's rate goes on to the end."""
    remedies = load("remedies")
    model, optimizer = grown("conv-block")
    other, by_loss = grown("conv-block")
    update = remedies.Update(remedies.REMEDIES[name], a_batch())
    plain = remedies.Update(remedies.Remedy(told=""), a_batch())

    def differ(batch):
        update(model, optimizer, (*a_batch(), batch))
        plain(other, by_loss, a_batch())
        return not all(map(torch.equal, model.parameters(), other.parameters()))

    answers = torch.zeros(16, 5)
    assert differ(answers)
    other.load_state_dict(model.state_dict())
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        state = {key: value.clone() for key, value in optimizer.state[ours].items()}
        state["step"].fill_(remedies.DISTILLED_UPDATES)
        optimizer.state[ours].update({key: value.clone() for key, value in state.items()})
        by_loss.state[theirs] = state
    assert differ(answers) == (name == "muP")
