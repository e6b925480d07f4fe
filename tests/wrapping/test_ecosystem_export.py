"""torch.export and ONNX of a model that is dormant, and of one that grew and was unwrapped."""

import pytest
import torch
from ecosystem_hosts import HOSTS, graft, result
from torch import nn
from wrapping_models import cnn

import esper

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.onnx and onnxscript's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def mlp():
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 4)).eval()


def image_net():
    return cnn().eval()


MODELS = {"mlp": (mlp, (3, 6), ("0", "3")), "image_net": (image_net, (2, 1, 8, 8), ("3", "8"))}


def grown(name):
    """A model with kernels by hand at two sites, one of them beside and one after its host."""
    make, shape, (first, last) = MODELS[name]
    model, x = esper.wrap(make()), torch.randn(shape)
    sites = esper.layers(model)
    beside = nn.Conv2d(4, 4, 3, padding=1) if name == "image_net" else nn.Linear(6, 6)
    sites[first].graft(0, nn.Sequential(beside, nn.Tanh()), alpha=0.5)
    outputs = sites[last].out_features
    after = nn.Sequential(nn.Linear(outputs, 5), nn.Tanh(), nn.Linear(5, outputs))
    sites[last].graft(0, after, alpha=0.25, position="serial")
    model(x)
    return model, x


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def exported(model, *call):
    return torch.export.export(model, call).module()(*call)


def through_onnx(model, x):
    """Run a model in onnxruntime."""
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    (y,) = program(x)
    return y


def test_a_dormant_model_is_exported_as_the_bare_one(name):
    """The graph has the bare model's operations, and gives its numbers."""
    make, shape, _ = MODELS[name]
    bare, x = make(), torch.randn(shape)
    expected = [str(n.target) for n in torch.export.export(bare, (x,)).graph.nodes]
    y = bare(x)

    model = esper.wrap(bare)

    assert [str(n.target) for n in torch.export.export(model, (x,)).graph.nodes] == expected
    assert torch.equal(exported(model, x), y)


def test_a_grown_model_is_exported_wrapped_and_unwrapped(name):
    """Both give the numbers that the grown model gives."""
    model, x = grown(name)
    y = model(x)

    wrapped_y = exported(model, x)

    assert torch.allclose(wrapped_y, y, atol=1e-6)
    assert torch.allclose(exported(esper.unwrap(model), x), y, atol=1e-6)


def test_a_batch_of_any_size_goes_through_the_exported_model(name):
    """A dynamic batch stays dynamic, in dormant models and in unwrapped ones that grew."""
    model, x = grown(name)
    batch = ({0: torch.export.Dim("batch", min=2)},)
    for plain in (esper.wrap(MODELS[name][0]()), esper.unwrap(model)):
        program = torch.export.export(plain, (x,), dynamic_shapes=batch).module()
        larger = torch.cat((x, x + 1))
        assert torch.allclose(program(larger), plain(larger), atol=1e-6)


def test_onnx_runs_a_dormant_model(name):
    """Onnxruntime gives the numbers of the wrapped model."""
    make, shape, _ = MODELS[name]
    model, x = esper.wrap(make()), torch.randn(shape)

    assert torch.allclose(through_onnx(model, x), model(x), atol=1e-5)


def test_onnx_runs_a_grown_model(name):
    """Onnxruntime gives the numbers of the unwrapped model that grew."""
    model, x = grown(name)
    y = model(x)

    assert torch.allclose(through_onnx(esper.unwrap(model), x), y, atol=1e-5)


@pytest.mark.parametrize("name_of_host", HOSTS)
@pytest.mark.filterwarnings("ignore:The tensor attributes self.*_flat_weights")  # bare ones too
def test_every_kind_of_host_is_exported(name_of_host):
    """A dormant layer of each kind, and a grown one unwrapped, give their own numbers."""
    host = HOSTS[name_of_host]
    bare, call = host.make().eval(), host.make_call()
    expected = result(exported(bare, *call))
    layer = esper.wrap(bare, select="")

    assert torch.equal(result(exported(layer, *call)), expected)
    y = result(graft(layer, host).eval()(*call))
    assert torch.allclose(result(exported(esper.unwrap(layer), *call)), y, atol=1e-5)
