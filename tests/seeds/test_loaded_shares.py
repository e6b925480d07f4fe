"""No load leaves a host with a negative weight."""

import pytest
import torch
from kernel_blueprints import mlp_blueprint
from torch import nn

import esper
from esper.contracts.errors import KernelLoadError
from esper.contracts.lifecycle import SeedLifecycleState


def net(**alphas):
    """Return a model with replacing kernels, of an alpha each, in seeds of its first layer."""
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))
    for seed, alpha in alphas.items():
        kernel = mlp_blueprint(init_seed=int(seed[1]), mode="replace")
        model[0].graft(int(seed[1]), kernel, alpha=alpha, example=torch.randn(2, 6))
    return model


def by_hand(layer, x):
    """The layer's formula, from its parts."""
    alphas = {i: layer.alpha(i) for i in range(layer.num_seeds)}
    y = (1.0 - sum(alphas.values())) * layer.default_layer(x)
    return y + sum(a * layer.seed_kernel(i)(x) for i, a in alphas.items() if a)


def loading(target, source, *, strict):
    """Load, and return what torch says of it."""
    try:
        return str(target.load_state_dict(source.state_dict(), strict=strict))
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("there", "loaded"),
    [({"s1": 0.7}, {"s0": 0.7}), ({"s1": 0.5, "s2": 0.5}, {"s0": 0.1}), ({"s0": 1.0}, {"s3": 1.0})],
)
def test_an_alpha_that_does_not_fit_beside_what_is_there_is_left_at_0(there, loaded, strict):
    """The seeds that are there go on as they were; a warning and a strict load's error say why."""
    target, source, x = net(**there), net(**loaded), torch.randn(3, 6)
    before = {i: target[0].alpha(i) for i in range(4)}
    expected = target(x)
    (seed,) = (int(name[1]) for name in loaded)
    with pytest.warns(UserWarning, match="alphas would sum to"):
        found = loading(target, source, strict=strict)
    assert f"0._seeds.{seed}.alpha" in found
    assert not strict or "alphas would sum to" in found
    assert {i: target[0].alpha(i) for i in range(4)} == before
    assert torch.equal(target(x), expected)
    source_kernel = dict(source[0].seed_kernel(seed).named_parameters())
    for name, parameter in target[0].seed_kernel(seed).named_parameters():
        assert torch.equal(parameter, source_kernel[name])


def test_the_cure_of_the_warning_works():
    """With the room made, the same load brings what was saved."""
    target, source, x = net(s1=0.7), net(s0=0.7), torch.randn(3, 6)
    with pytest.warns(UserWarning, match="unload what the layer has"):
        target.load_state_dict(source.state_dict(), strict=False)
    target[0].unload_kernel(1)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))


def test_a_loaded_alpha_that_fits_is_taken():
    """Seeds of which a dict does not speak stay, and their shares are counted."""
    target, source, x = net(s1=0.25, s2=0.25), net(s0=0.5), torch.randn(3, 6)
    target.load_state_dict(source.state_dict(), strict=False)
    assert [target[0].alpha(i) for i in range(3)] == [0.5, 0.25, 0.25]
    torch.testing.assert_close(target[0](x), by_hand(target[0], x))


def test_three_thirds_fit():
    """Alphas that sum to 1 but for float32's rounding are no more than 1."""
    source = net(s0=0.3, s1=0.3, s2=0.4)
    target = net()
    target.load_state_dict(source.state_dict())
    assert target[0].structure() == source[0].structure()


def overfull():
    """Return a saved dict whose own replacing alphas sum to 1.4."""
    state = net(s0=0.7, s1=0.3).state_dict()
    return {**state, "0._seeds.1.alpha": torch.tensor(0.7)}


@pytest.mark.parametrize("strict", [False, True])
def test_a_dict_that_gives_too_much_itself_is_refused(strict):
    """Nothing of that layer is loaded, whether the load is strict or not, and it says why."""
    target, x = net(s2=0.5), torch.randn(3, 6)
    with torch.no_grad():
        target[0].weight.mul_(2.0)
    before = {name: value.clone() for name, value in target[0].state_dict().items()}
    structure, expected = target[0].structure(), target[0](x)
    parameters = dict(target[0].named_parameters())
    with pytest.raises(RuntimeError, match=r"layer '0': the replacing alphas would sum to 1\.4"):
        target.load_state_dict(overfull(), strict=strict)
    assert target[0].structure() == structure
    assert torch.equal(target[0](x), expected)
    after = target[0].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p is parameters[name] for name, p in target[0].named_parameters())


def test_a_block_that_cannot_be_built_keeps_what_is_inside_it():
    """All of a site is one thing: its children are not loaded either."""
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh())), select="0")
    state = model.state_dict()
    other = esper.wrap(nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh())), select="0")
    other[0].graft(0, nn.Linear(6, 6), alpha=0.5, example=torch.randn(2, 6))
    with pytest.raises(RuntimeError, match="written by hand"):
        model.load_state_dict(other.state_dict(), strict=False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_fossil_that_does_not_fit_is_refused():
    """Its alpha could not be set any more, so it is not brought in at 0."""
    source, target = net(s0=0.7), net(s1=0.7)
    assert not source[0].fossilize(0).folded
    with pytest.raises(RuntimeError, match=r"would sum to 1\.4"):
        target.load_state_dict(source.state_dict(), strict=False)
    assert target[0].state_layout.state(0) == SeedLifecycleState.DORMANT
    assert target[0].alpha(1) == pytest.approx(0.7)


def test_a_structure_that_gives_too_much_is_not_built():
    """The same by hand: build changes nothing and says why."""
    layer = net(s2=0.5)[0]
    structure = net(s0=0.7, s1=0.3)[0].structure()
    structure[1]["alpha"] = 0.7
    before = layer.structure()
    with pytest.raises(KernelLoadError, match=r"would sum to 1\.4"):
        layer.build(structure)
    assert layer.structure() == before


def test_adding_kernels_may_sum_to_any():
    """Shares are those of replacing kernels; adding ones leave the host its weight."""
    model, other = (
        esper.wrap(nn.Sequential(nn.Linear(6, 6))),
        esper.wrap(nn.Sequential(nn.Linear(6, 6))),
    )
    for target, seed in ((model, 0), (other, 1)):
        target[0].graft(seed, mlp_blueprint(), alpha=0.9, example=torch.randn(2, 6))
    other.load_state_dict(model.state_dict(), strict=False)
    assert [other[0].alpha(i) for i in (0, 1)] == [pytest.approx(0.9)] * 2


class Fails(nn.Module):
    """A kernel that raises while it is told to."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.is_broken = False

    def forward(self, x):
        if self.is_broken:
            raise RuntimeError("broken")
        return torch.tanh(self.up(x))


@pytest.mark.parametrize("alpha", [0.7, 0.3])
def test_an_isolated_kernel_comes_back_only_where_there_is_room(alpha):
    """What was grafted meanwhile keeps its share; the kernel that waits is told why it does."""
    torch.manual_seed(0)
    model, x, kernel = esper.wrap(nn.Sequential(nn.Linear(6, 6))), torch.randn(3, 6), Fails()
    layer = model[0]
    layer.graft(0, kernel, alpha=0.7, mode="replace", example=x)
    kernel.is_broken = True
    while layer.state_layout.state(0) == SeedLifecycleState.ACTIVE:
        model(x)
        esper.maintain(model)
    kernel.is_broken = False
    layer.graft(1, Fails(), alpha=alpha, mode="replace", example=x)
    for _ in range(200):
        esper.maintain(model)
    came_back = layer.state_layout.state(0) == SeedLifecycleState.ACTIVE
    assert came_back == (alpha == 0.3)
    assert layer.state_layout.contributes(1)
    shares = [layer.alpha(i) for i in (0, 1) if layer.state_layout.contributes(i)]
    assert sum(shares) <= 1.0 + 1e-6
    h = layer.default_layer(x)
    kernels = [layer.seed_kernel(i) for i in (0, 1) if layer.state_layout.contributes(i)]
    expected = (1 - sum(shares)) * h + sum(a * k(x) for a, k in zip(shares, kernels, strict=True))
    torch.testing.assert_close(layer(x), expected)
