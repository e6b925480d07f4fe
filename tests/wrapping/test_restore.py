"""Dropping what was grafted."""

import pytest
import torch
from torch import nn
from wrapping_models import Bottleneck, Mlp

import esper
from esper import SeedLifecycleError


def test_restore_gives_the_original_model_back():
    """Classes, keys and predictions are the bare model's; a training run's tensors stay its own."""
    torch.manual_seed(0)
    model = Mlp().eval()
    x = torch.randn(4, 6)
    expected, parameters = model(x), dict(model.named_parameters())
    esper.wrap(model)
    model.fc1.graft(2, Bottleneck(6, 8), alpha=0.5, example=x)
    assert not torch.equal(model(x), expected)

    result = esper.restore(model)

    assert result.model is model
    assert type(model.fc1) is nn.Linear
    assert torch.equal(model(x), expected)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert result.restored == ("fc1", "fc2")
    assert result.dropped == ("fc1",)
    assert result.folded == ()


def test_an_unfolded_fossil_is_dropped():
    """A fossil that could not be folded is a kernel beside its host and goes too."""
    model = esper.wrap(Mlp()).eval()
    model.fc1.graft(0, Bottleneck(6, 8), alpha=1.0, example=torch.randn(4, 6))
    assert not model.fc1.fossilize(0).folded

    result = esper.restore(model)

    assert result.dropped == ("fc1",)
    assert type(model.fc1) is nn.Linear


def test_a_fold_stays_and_the_result_says_so():
    """What was folded into the weights cannot be taken out again."""
    torch.manual_seed(0)
    model = esper.wrap(Mlp()).eval()
    x = torch.randn(4, 6)
    model.fc1.graft(0, nn.Linear(6, 8), alpha=1.0, example=x)
    assert model.fc1.fossilize(0).folded
    grown = model(x)

    result = esper.restore(model)

    assert result.folded == ("fc1",)
    assert result.dropped == ()
    assert torch.equal(model(x), grown)


def test_a_graft_that_waits_for_an_example_goes_with_its_hook():
    """A seed that has not seen an input yet leaves no hook behind."""
    model = esper.wrap(Mlp())
    model.fc1.graft(0, Bottleneck(6, 8))

    esper.restore(model)

    assert type(model.fc1) is nn.Linear
    assert not model.fc1._forward_pre_hooks
    assert not model.fc1._forward_hooks


def test_a_model_in_a_shadow_pass_is_refused():
    """Inside a shadow pass nothing is restored; after it everything is."""
    model = esper.wrap(Mlp())
    with model.fc2.shadow(0, Bottleneck(8, 3)):
        with pytest.raises(SeedLifecycleError, match="'fc2' is in a shadow pass"):
            esper.restore(model)
        assert len(esper.layers(model)) == 2

    assert esper.restore(model).restored == ("fc1", "fc2")


def test_a_bare_model_is_left_alone():
    """There is nothing to restore in a model that is not wrapped."""
    result = esper.restore(Mlp())

    assert result.restored == ()
