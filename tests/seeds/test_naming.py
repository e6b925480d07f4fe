"""Kernels by the names that suggestions and reports print."""

import pytest
import torch
from execution_hosts import KINDS
from growing import SHORT, compute_loss, evaluate, train, wrapped
from torch import nn

import esper
from esper.contracts.errors import KernelRefusedError
from esper.contracts.lifecycle import SeedLifecycleState


def names_at(layer, example):
    """Return every name that the catalog has at a layer, as a wrong one is told them."""
    with pytest.raises(ValueError, match="the catalog has no 'nothing'") as refusal:
        layer.graft(0, "nothing", example=example)
    offered = str(refusal.value).split("it has ")[1].split(". A kernel")[0]
    return [name for name in offered.split(", ") if name != "none there"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_of_the_catalog_can_be_grafted(kind):
    """At each kind of layer each name that there is gives its kernel, which changes nothing."""
    case = KINDS[kind]
    torch.manual_seed(0)
    host, example = case.make_host().eval(), case.make_input()
    layer = esper.wrap(host, select=lambda _name, module: module is host).eval()
    names = names_at(layer, example)
    assert names or kind in ("embedding_bag", "rnn_without_batch", "cross_attention")
    for name in names:
        try:
            layer.graft(0, name, example=example)
        except KernelRefusedError:
            assert kind == "cross_attention"  # its query alone is not what the catalog knows
            continue
        assert layer.structure()[0]["blueprint"]["id"] == name


def test_every_suggestion_can_be_used_by_name():
    """What ``grower.suggest()`` names, ``layer.graft`` takes."""
    model, optimizer = wrapped()
    grower = esper.Grower(model, optimizer, compute_loss=compute_loss, evaluate=evaluate, **SHORT)
    train(model, optimizer, 3, grower)
    rows = grower.suggest()
    grower.close()
    assert rows
    for row in rows:
        esper.layers(model)[row.site].graft(1, row.blueprint, example=torch.randn(3, 4))


def test_layer_that_says_nothing_of_itself_asks_for_an_example():
    """A batch norm over features is known by what it gives, and the message says what to pass."""
    layer = esper.wrap(nn.Sequential(nn.BatchNorm1d(4)))[0]
    with pytest.raises(ValueError, match="nobody knows without example="):
        layer.graft(0, "mlp-behind-4x4-w32")


def test_name_without_an_example_waits_as_a_blueprint_does():
    """A name is a kernel like any other: what can be known without an example is enough."""
    layer = esper.wrap(nn.Sequential(nn.Linear(4, 8)))[0]
    layer.graft(0, "mlp-4x8-w64")
    layer(torch.randn(3, 4))
    assert layer.structure()[0]["blueprint"]["id"] == "mlp-4x8-w64"


def test_wrong_name_changes_nothing_and_names_the_catalog():
    """The kernels of the catalog for this very layer are told, and the seed is as it was."""
    layer = esper.wrap(nn.Sequential(nn.Linear(4, 8)))[0]
    words = r"the catalog has no 'mlp-4x8-w63' for layer '0'; it has mlp-4x8-w32, mlp-4x8-w64"
    with pytest.raises(ValueError, match=words):
        layer.graft(0, "mlp-4x8-w63", example=torch.randn(3, 4))
    assert layer.state_layout.state(0) is SeedLifecycleState.DORMANT


def test_name_is_no_artifact():
    """Loading goes by digest; a name is told where it belongs."""
    layer = esper.wrap(nn.Sequential(nn.Linear(4, 8)))[0]
    with pytest.raises(ValueError, match=r"name of a kernel of the catalog goes to layer\.graft"):
        layer.load_kernel_sync(0, "mlp-4x8-w64")
