"""What a model keeps when it is wrapped."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import parametrize
from wrapping_models import Mlp, cnn

import esper


def count(model):
    return len(esper.layers(model))


def test_wrapping_is_in_place():
    """Wrap returns the model that it was given, with the same objects under the same names."""
    model = Mlp()
    before = dict(model.named_modules())

    wrapped = esper.wrap(model)

    assert wrapped is model
    assert all(after is before[name] for name, after in model.named_modules())
    assert isinstance(model.fc1, nn.Linear)
    assert isinstance(model.fc1, esper.KasminaLayer)


def test_parameters_and_keys_stay():
    """named_parameters gives the same objects and state_dict the same keys."""
    model = cnn()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())

    esper.wrap(model)

    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys


def test_a_state_dict_loads_in_both_directions():
    """A bare model's state loads into a wrapped one and back, strictly."""
    torch.manual_seed(0)
    bare, wrapped = cnn(), esper.wrap(cnn())

    wrapped.load_state_dict(bare.state_dict())
    other = cnn()
    other.load_state_dict(wrapped.state_dict())

    assert all(
        torch.equal(a, b) for a, b in zip(bare.parameters(), other.parameters(), strict=True)
    )


def test_modes_dtype_and_requires_grad_stay():
    """Evaluation mode, float64, a frozen weight and a missing bias survive."""
    model = Mlp().double().eval()
    model.fc1.weight.requires_grad_(False)
    model.fc2 = nn.Linear(8, 3, bias=False, dtype=torch.float64)

    esper.wrap(model)

    assert not model.fc1.training
    assert model.fc1.weight.dtype == torch.float64
    assert not model.fc1.weight.requires_grad
    assert model.fc2.bias is None
    assert model.fc2.training


def test_hooks_stay():
    """Forward, backward and state-dict hooks that were there go on being called."""
    model = Mlp()
    calls = []
    model.fc1.register_forward_hook(lambda *_: calls.append("forward"))
    model.fc1.register_full_backward_hook(lambda *_: calls.append("backward"))
    model.fc1.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))

    esper.wrap(model)
    model(torch.randn(2, 6, requires_grad=True)).sum().backward()
    model.state_dict()

    assert calls == ["forward", "backward", "state_dict"]


@pytest.mark.parametrize("make", [Mlp, cnn])
def test_copies_are_wrapped_too(make):
    """Deepcopy and pickle give wrapped models with the same numbers and parameters of their own."""
    model = esper.wrap(make()).eval()
    x = torch.randn(2, 6) if make is Mlp else torch.randn(2, 1, 8, 8)

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert count(other) == count(model)
        assert torch.equal(other(x), model(x))
        assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in model.parameters())


def test_torch_save_keeps_a_wrapped_model(tmp_path):
    """torch.save and torch.load of the whole model work."""
    model = esper.wrap(Mlp()).eval()
    torch.save(model, tmp_path / "model.pt")

    other = torch.load(tmp_path / "model.pt", weights_only=False)

    x = torch.randn(2, 6)
    assert torch.equal(other(x), model(x))


def test_tied_weights_stay_tied():
    """Two layers that share a weight go on sharing it, wrapped by request."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight

    esper.wrap(model, select=nn.Linear)

    assert model[1].weight is model[0].weight


def test_parametrized_layers_keep_their_parametrization():
    """A weight-normed layer computes what it computed, and its weight is still made."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    expected = layer(x)

    esper.wrap(layer)

    assert parametrize.is_parametrized(layer, "weight")
    assert torch.equal(layer(x), expected)


def test_a_model_that_is_a_layer_is_wrapped():
    """The root itself may be the site."""
    layer = esper.wrap(nn.Linear(3, 2))

    assert list(esper.layers(layer)) == [""]


def test_functional_call_works():
    """torch.func.functional_call replaces the parameters of a wrapped layer."""
    model = esper.wrap(Mlp()).eval()
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    out = torch.func.functional_call(model, zeros, (torch.randn(2, 6),))

    assert torch.equal(out, torch.zeros(2, 3))


@pytest.mark.slow
def test_a_dormant_model_can_be_exported_by_torch():
    """torch.export takes a wrapped dormant model and gives the same numbers."""
    model = esper.wrap(Mlp()).eval()
    x = torch.randn(2, 6)

    program = torch.export.export(model, (x,))

    assert torch.equal(program.module()(x), model(x))


def test_wrapping_twice_is_refused():
    """A second wrap names the layers that are wrapped; others can still be added by select."""
    model = esper.wrap(Mlp(), select="fc1")

    with pytest.raises(ValueError, match="'fc1' is wrapped already"):
        esper.wrap(model)
    assert type(model.fc2) is nn.Linear
    assert list(esper.layers(esper.wrap(model, select="fc2"))) == ["fc1", "fc2"]


@pytest.mark.parametrize("num_seeds", [0, -1])
def test_a_refused_wrap_changes_nothing(num_seeds):
    """A number of seeds out of range leaves every class as it was."""
    model = cnn()
    classes = [type(m) for m in model.modules()]

    with pytest.raises(ValueError, match="num_seeds"):
        esper.wrap(model, num_seeds=num_seeds)

    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("num_seeds", ["4", 2.5, True, None])
def test_a_number_of_seeds_that_is_none_is_a_type_error(num_seeds):
    """Told by its name, not by that of a layer that is not to blame; nothing changes."""
    model = cnn()
    with pytest.raises(TypeError, match="num_seeds is a whole number, at least 1; got"):
        esper.wrap(model, num_seeds=num_seeds)
    assert not esper.layers(model)


def test_only_modules_can_be_wrapped():
    """Anything else is a TypeError that says what was found."""
    with pytest.raises(TypeError, match=r"wrap takes .*\(a list\)"):
        esper.wrap([nn.Linear(2, 2)])


TAKE_A_MODEL = {
    "wrap": esper.wrap,
    "sync_optimizer": lambda model: esper.sync_optimizer(model, sgd(model)),
    "Grower": lambda model: esper.Grower(model, sgd(model)),
}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", TAKE_A_MODEL)
def test_data_parallel_is_refused(name, inside):
    """It is said what is refused, why, and what to use; also where only a part is in it."""
    model = nn.DataParallel(Mlp() if name == "wrap" else esper.wrap(Mlp()))
    model = nn.Sequential(model) if inside else model
    classes = list(map(type, model.modules()))
    with pytest.raises(TypeError, match=f"^{name} cannot.*DataParallel, which.*Distributed"):
        TAKE_A_MODEL[name](model)
    assert list(map(type, model.modules())) == classes


@pytest.mark.parametrize("name", TAKE_A_MODEL)
def test_the_first_fsdp_is_refused(name):
    """It holds the weights itself: kernels would be trained by each rank alone."""
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(model)
    model._fsdp_wrapped_module = Mlp() if name == "wrap" else esper.wrap(Mlp())
    with pytest.raises(TypeError, match=f"^{name} cannot.*each rank alone. Use FSDP2"):
        TAKE_A_MODEL[name](nn.Sequential(model))
