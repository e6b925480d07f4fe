"""What is saved and loaded, copied and moved: a layer does it as its host does."""

import copy
import io

import pytest
import torch
from ecosystem_hosts import HOSTS, cast, graft, result, wrapped
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import esper


def output(module, call):
    return result(module.eval()(*call))


def is_seed(name):
    return name.startswith("_seeds.")


@pytest.fixture(params=HOSTS)
def host(request):
    return HOSTS[request.param]


def test_plain_and_dormant_state_are_one(host):
    """Either loads the other's state_dict, strictly, under equal keys."""
    plain, layer = host.make(), wrapped(host)
    call = host.make_call()

    layer.load_state_dict(plain.state_dict())
    assert torch.equal(output(layer, call), output(plain, call))

    other = host.make()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(output(other, call), output(plain, call))


def test_a_grown_layer_takes_plain_state_unless_strict(host):
    """The host's tensors are loaded, the kernel stays; strict names what is missing."""
    layer, plain = graft(wrapped(host), host), host.make()
    kernel = copy.deepcopy(layer.seed_kernel(0).state_dict())

    with pytest.raises(RuntimeError, match=r"Missing key.*_seeds\.0\.alpha"):
        layer.load_state_dict(plain.state_dict())
    found = layer.load_state_dict(plain.state_dict(), strict=False)

    assert not found.unexpected_keys
    assert found.missing_keys
    assert all(map(is_seed, found.missing_keys))
    call = host.make_call()
    assert torch.equal(output(layer.default_layer, call), output(plain, call))
    assert all(torch.equal(kernel[k], t) for k, t in layer.seed_kernel(0).state_dict().items())


def test_a_plain_layer_takes_grown_state_unless_strict(host):
    """The host's tensors are loaded; strict names the seeds' keys, which alone are unexpected."""
    layer, plain = graft(wrapped(host), host), host.make()

    with pytest.raises(RuntimeError, match=r"Unexpected key.*_seeds\.0\.alpha"):
        plain.load_state_dict(layer.state_dict())
    found = plain.load_state_dict(layer.state_dict(), strict=False)

    assert not found.missing_keys
    assert all(map(is_seed, found.unexpected_keys))
    call = host.make_call()
    assert torch.equal(output(layer.default_layer, call), output(plain, call))


def through_torch_save(state, folder):
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def through_safetensors(state, folder):
    save_file(state, folder / "state.safetensors")
    return load_file(folder / "state.safetensors")


@pytest.mark.parametrize("through", [through_torch_save, through_safetensors])
def test_grown_state_survives_a_file(host, through, tmp_path):
    """What was read back loads strictly into a layer that holds such a kernel."""
    layer = graft(wrapped(host), host)
    other = graft(wrapped(host), host, alpha=0.25)

    other.load_state_dict(through(layer.state_dict(), tmp_path))

    call = host.make_call()
    assert other.alpha(0) == 0.5
    assert torch.equal(output(other, call), output(layer, call))


def test_safetensors_saves_a_whole_model(host, tmp_path):
    """save_model and load_model take a grown model, strictly."""
    model = nn.ModuleDict({"site": graft(wrapped(host), host)})
    other = nn.ModuleDict({"site": graft(wrapped(host), host, alpha=0.25)})

    save_model(model, tmp_path / "model.safetensors")
    load_model(other, tmp_path / "model.safetensors")

    call = host.make_call()
    assert torch.equal(output(other["site"], call), output(model["site"], call))


def test_torch_save_keeps_a_grown_model(host):
    """torch.save and torch.load of the object give an equal layer that can go on changing."""
    layer, file = graft(wrapped(host), host), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)

    other = torch.load(file, weights_only=False)

    call = host.make_call()
    assert torch.equal(output(other, call), output(layer, call))
    other.unload_kernel(0)
    assert torch.equal(output(other, call), output(layer.default_layer, call))


def test_a_copy_can_be_made_between_forward_and_backward(host):
    """What a forward has left behind does not stop a deepcopy, nor the backward after it."""
    layer = graft(wrapped(host), host)
    y = result(layer(*host.make_call()))

    twin = copy.deepcopy(layer)
    y.sum().backward()

    assert all(p.grad is None for p in twin.parameters())
    assert all(p.grad is not None for p in layer.seed_kernel(0).parameters())


def test_parameters_keep_their_order(host):
    """The host's parameters come first and in their order; the kernel's are appended."""
    layer = wrapped(host)
    names = [name for name, _ in layer.named_parameters()]
    assert names == [name for name, _ in host.make().named_parameters()]

    graft(layer, host)

    grown = [name for name, _ in layer.named_parameters()]
    assert grown[: len(names)] == names
    assert grown[len(names) :]
    assert all(map(is_seed, grown[len(names) :]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_grown_layer_changes_its_dtype(host, dtype):
    """Parameters and output follow; alpha stays float32 and 0.5."""
    layer = graft(wrapped(host), host).eval().to(dtype)

    y = output(layer, cast(host.make_call(), dtype))

    assert y.dtype == dtype
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.alpha(0) == 0.5
    assert layer.state_dict()["_seeds.0.alpha"] == torch.tensor(0.5, dtype=torch.float32)


def on_meta(host):
    with torch.device("meta"):
        return esper.wrap(host.make(), select="")


def by_to_empty(layer, state):
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)


def by_assignment(layer, state):
    layer.load_state_dict(state, assign=True)


@pytest.mark.parametrize("materialise", [by_to_empty, by_assignment])
def test_a_layer_wrapped_on_meta_becomes_real(host, materialise):
    """Wrapped without memory, then filled: it computes what the host does, and grows."""
    layer, plain = on_meta(host), host.make()
    call = host.make_call()

    materialise(layer, plain.state_dict())

    assert torch.equal(output(layer, call), output(plain, call))
    grown = output(graft(layer, host), call)
    assert not torch.equal(grown, output(plain, call))
    assert {p.device.type for p in layer.parameters()} == {"cpu"}
    assert layer.get_stats()["execution_stats"]["fault_count"] == 0


def over_meta(layer, state):
    layer.to("meta")
    layer.to_empty(device="cpu")
    layer.load_state_dict(state)


EXCHANGES = [over_meta, by_assignment]
"""Ways in which every parameter becomes another object."""


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_grown_layer_survives_an_exchange_of_its_tensors(host, exchange):
    """With its state loaded again, a layer whose tensors were all exchanged is what it was."""
    layer = graft(wrapped(host), host)
    call = host.make_call()
    expected, state = output(layer, call), copy.deepcopy(layer.state_dict())

    exchange(layer, state)

    assert torch.equal(output(layer, call), expected)


def test_alpha_and_structure_need_no_memory(host):
    """to_empty leaves parameters to chance; what a seed is does not live in them."""
    layer = graft(wrapped(host), host)
    before = layer.state_dict()

    layer.to("meta")
    layer.to_empty(device="cpu")

    for name in ("_seeds.0.alpha", "_seeds.0.structure"):
        assert torch.equal(layer.state_dict()[name], before[name])


class BadGradient(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nan


class Spoiled(nn.Module):
    """A kernel whose gradient can be spoiled."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.is_bad = False

    def forward(self, x):
        y = self.body(x)
        return BadGradient.apply(y) if self.is_bad else y


@pytest.mark.parametrize("exchange", [pytest.param(None, id="none"), *EXCHANGES])
def test_the_guard_follows_an_exchange_of_tensors(host, exchange):
    """Bad gradients of a kernel become zeros in whatever parameters it has by then."""
    layer = wrapped(host)
    kernel = Spoiled(host.make_kernel())
    layer.graft(0, kernel, alpha=0.5, position=host.position, example=host.make_call())
    if exchange is not None:
        exchange(layer, copy.deepcopy(layer.state_dict()))
    kernel.is_bad = True

    result(layer(*host.make_call())).sum().backward()

    assert all((p.grad == 0).all() for p in kernel.parameters())
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_a_grown_layer_loads_by_assignment(host):
    """load_state_dict(assign=True) puts the given tensors into host and kernel."""
    layer = graft(wrapped(host), host)
    other = graft(wrapped(host), host, alpha=0.25)

    other.load_state_dict(layer.state_dict(), assign=True)

    call = host.make_call()
    assert torch.equal(output(other, call), output(layer, call))
    other.set_alpha(0, 0.25)
    assert layer.alpha(0) == 0.5
    assert not torch.equal(output(other, call), output(layer, call))


def test_averaged_models_follow(host):
    """An average of weights is kept of a grown model as of any other."""
    model = graft(wrapped(host), host)
    averaged = torch.optim.swa_utils.AveragedModel(model)

    averaged.update_parameters(model)

    call = host.make_call()
    assert torch.equal(output(averaged, call), output(model, call))


def test_ensembles_are_stacked(host):
    """stack_module_state and vmap run several grown models at once."""
    if not host.can_be_mapped:
        pytest.skip("torch cannot map over such a host")
    models = [graft(wrapped(host), host).eval() for _ in range(3)]
    call = host.make_call()
    state = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    found = torch.vmap(
        lambda s: result(torch.func.functional_call(base, s, call)), randomness="error"
    )(state)

    for y, model in zip(found, models, strict=True):
        assert torch.allclose(y, output(model, call), atol=1e-6)
