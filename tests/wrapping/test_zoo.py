"""A zoo of architectures: with a kernel at each of its layers, a model runs unwrapped."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from wrapping_grown import load_grafts

import esper
from esper.state.site import describe_site

pytest.importorskip("transformers")
import zoo

pytestmark = pytest.mark.slow


def own_kernel(layer):
    """Return a kernel for a layer that the catalog has none for before it was called."""
    if isinstance(layer, nn.GroupNorm):
        return nn.Conv1d(layer.num_channels, layer.num_channels, 1)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh())


def grown(name, select=None):
    """Return a model with a kernel that contributes at every site that takes one."""
    model, given = zoo.make(name)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    esper.wrap(model, select=select)
    before = zoo.output(model, given)
    for layer in esper.layers(model).values():
        offered = esper.default_catalog().blueprints_for(describe_site(layer))
        kernel = next((k for k in offered if k.adds_capacity), None)
        layer.graft(0, kernel or own_kernel(layer), alpha=0.5)
    zoo.output(model, given)
    kernels = [layer.seed_kernel(0) for layer in esper.layers(model).values()]
    for parameter in nn.ModuleList(k for k in kernels if k is not None).parameters():
        nn.init.normal_(parameter, std=0.2)
    assert not torch.allclose(zoo.output(model, given), before, atol=1e-4)
    return model, given


QUICK = ("bert", "gpt2", "llama", "resnet", "albert")
"""An encoder, decoders, a net of convolutions and shared blocks; the others take long together."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.torture]) for n in zoo.MODELS],
)
def test_a_model_grown_at_each_of_its_layers_runs_unwrapped(name, tmp_path):
    """Outputs stay, also copied, pickled where torch allows it, and exported to a fresh model."""
    model, given = grown(name)
    expected = zoo.output(model, given)
    esper.export(model, tmp_path)
    own_class = type(model)

    plain = esper.unwrap(model)

    rebuilt = load_grafts(tmp_path).build(zoo.make(name)[0]).eval()
    rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))
    found = [plain, copy.deepcopy(plain), rebuilt, copy.deepcopy(rebuilt)]
    if name != "wav2vec2":  # it is parametrized, which torch refuses to pickle
        found.append(pickle.loads(pickle.dumps(plain)))
    for each in found:
        assert type(each) is own_class
        torch.testing.assert_close(zoo.output(each, given), expected, rtol=1e-4, atol=1e-5)
    assert not any(type(part).__module__.startswith("esper") for part in plain.modules())


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.torture]) for n in zoo.BLOCKS],
)
def test_a_model_grown_at_its_blocks_runs_unwrapped(name):
    """Whole blocks, whose owners read what is inside them, are asked as layers are."""
    model, given = grown(name, zoo.BLOCKS[name])
    expected = zoo.output(model, given)

    plain = esper.unwrap(model)

    for each in (plain, copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        torch.testing.assert_close(zoo.output(each, given), expected, rtol=1e-4, atol=1e-5)
