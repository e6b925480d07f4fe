"""The specification's constructors, attributes and asynchronous loading."""

import asyncio
import copy
import pickle

import pytest
import torch
from kernel_blueprints import mlp_blueprint
from torch import nn

from esper.compiler.compile import compile_blueprint
from esper.contracts.errors import KernelNotFoundError, KernelSourceUnavailable, SeedLifecycleError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution import KasminaConv2dLayer, KasminaLayer
from esper.execution.host_class import adopt, refusal

S = SeedLifecycleState


class Source:
    """A kernel source over a dict, which remembers the states that it was asked in."""

    def __init__(self, *artifacts):
        self.blobs = {a.artifact_id: a.kernel_binary for a in artifacts}
        self.observe = lambda: None

    def fetch(self, digest):
        self.observe()
        if digest not in self.blobs:
            raise KernelNotFoundError(digest)
        return self.blobs[digest]


def test_the_default_host_is_linear():
    """KasminaLayer(n, m) is a fresh nn.Linear with four dormant seeds, telemetry on."""
    layer = KasminaLayer(6, 4)
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, KasminaLayer)
    assert (layer.input_size, layer.output_size, layer.num_seeds) == (6, 4, 4)
    assert layer.telemetry_enabled
    assert layer.state_layout.get_dormant_seeds().all()


def test_an_original_layer_is_taken_not_copied():
    """original_layer becomes the layer, also if it is falsy, like an empty container."""
    host = nn.Sequential()
    assert not host
    layer = KasminaLayer(1, 1, original_layer=host)
    assert layer is host
    weight = (linear := nn.Linear(6, 4)).weight
    assert KasminaLayer(6, 4, 2, original_layer=linear).weight is weight


def test_the_convolution_takes_pairs_and_all_settings():
    """A fresh convolution has the settings that were asked for, and the right fan-in."""
    layer = KasminaConv2dLayer(
        4, 6, (3, 5), stride=(1, 2), padding="valid", groups=2, bias=False, num_seeds=2
    )
    assert isinstance(layer, KasminaConv2dLayer)
    assert isinstance(layer, nn.Conv2d)
    assert layer.conv_params["kernel_size"] == (3, 5)
    assert layer.conv_params["bias"] is False
    assert (layer.input_size, layer.output_size, layer.num_seeds) == (2 * 3 * 5, 6, 2)
    assert layer(torch.randn(1, 4, 8, 9)).shape == (1, 6, 6, 3)


@pytest.mark.parametrize(
    "make",
    [lambda: KasminaLayer(3, 2), lambda: KasminaConv2dLayer(1, 2, 3)],
    ids=["linear", "conv2d"],
)
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_constructed_layers_copy_and_pickle(make, duplicate):
    """The traps of __new__: a copy is not constructed again and keeps its weights."""
    layer = make()
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    assert torch.equal(twin.weight, layer.weight)


def test_statistics_have_the_specifications_shape():
    """get_stats has the sections that were specified, and counts what ran."""
    layer, x = KasminaLayer(6, 6), torch.randn(5, 6)
    layer.graft(1, nn.Linear(6, 6), alpha=0.5, example=x)
    layer(x)
    stats = layer.get_stats()
    assert {"layer_info", "execution_stats", "seed_stats", "cache_stats", "performance"} <= (
        stats.keys()
    )
    assert stats["execution_stats"]["forward_count"] == 1
    assert stats["execution_stats"]["kernel_execution_rate"] == 1.0
    assert stats["seed_stats"]["active_seeds"] == 1
    assert stats["seed_stats"]["average_health"] == 1.0


def test_the_execution_rate_is_a_share_of_calls():
    """It is the share of calls that ran a kernel, however many kernels a call runs."""
    layer, x = KasminaLayer(6, 6), torch.randn(5, 6)
    layer(x)
    layer.graft(0, nn.Linear(6, 6), alpha=0.5, example=x)
    layer.graft(1, nn.Linear(6, 6), alpha=0.5, example=x)
    for _ in range(3):
        layer(x)
    stats = layer.get_stats()["execution_stats"]
    assert stats["kernel_execution_count"] == 6
    assert stats["kernel_execution_rate"] == 0.75


def test_a_kernel_is_loaded_from_the_source():
    """load_kernel fetches, verifies, probes and grafts; meanwhile the seed is LOADING."""
    artifact = compile_blueprint(mlp_blueprint())
    source = Source(artifact)
    layer, x = KasminaLayer(6, 6, source=source), torch.randn(5, 6)
    states = []
    source.observe = lambda: states.append(layer.state_layout.state(0))
    loaded = asyncio.run(layer.load_kernel(0, artifact.artifact_id, alpha=0.5, example=x))
    assert loaded is True
    assert states == [S.LOADING]
    assert layer.state_layout.state(0) == S.ACTIVE
    assert layer.state_layout.kernel_id(0) == artifact.artifact_id


@pytest.mark.parametrize("holds_kernel", [False, True])
@pytest.mark.parametrize("taken_again", [False, True])
def test_a_seed_that_is_unloaded_while_it_loads_stays_empty(holds_kernel, taken_again):
    """The load says so, and leaves alone whoever has reserved the seed since."""
    artifact = compile_blueprint(mlp_blueprint())
    source = Source(artifact)
    layer, x = KasminaLayer(6, 6, source=source), torch.randn(5, 6)
    if holds_kernel:
        layer.graft(0, nn.Linear(6, 6), alpha=0.5, example=x)

    def give_up():
        assert layer.unload_kernel(0)
        if taken_again:
            layer.reserve(0)

    source.observe = give_up
    with pytest.raises(SeedLifecycleError, match="given up"):
        asyncio.run(layer.load_kernel(0, artifact.artifact_id, alpha=0.5, example=x))
    assert layer.state_layout.state(0) == (S.LOADING if taken_again else S.DORMANT)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_no_reader_of_step_flags(duplicate):
    """The optimizer's hook belongs to the original; a seed under it goes on all the same."""
    layer, x = KasminaLayer(6, 6), torch.randn(5, 6)
    layer.enable_step_guard()
    layer.graft(0, nn.Linear(6, 6), alpha=0.5, guard="step", example=x)
    twin = duplicate(layer)
    assert torch.equal(twin(x), layer(x))
    with pytest.raises(ValueError, match="sync_optimizer"):
        twin.graft(1, nn.Linear(6, 6), guard="step", example=x)
    layer.graft(1, nn.Linear(6, 6), guard="step", example=x)


def test_a_seed_has_its_own_weights():
    """Two seeds from one artifact share no parameter."""
    artifact = compile_blueprint(mlp_blueprint())
    layer, x = KasminaLayer(6, 6, source=Source(artifact)), torch.randn(5, 6)
    for seed_idx in (0, 1):
        layer.load_kernel_sync(seed_idx, artifact.artifact_id, alpha=0.5, example=x)
    one, two = (set(map(id, layer.seed_kernel(i).parameters())) for i in (0, 1))
    assert not one & two


def test_not_found_is_false_and_changes_nothing():
    """An id that the source does not have gives False; a working kernel goes on."""
    layer, x = KasminaLayer(6, 6, source=Source()), torch.randn(5, 6)
    kernel = nn.Linear(6, 6)
    layer.graft(1, kernel, alpha=0.5, example=x)
    assert layer.load_kernel_sync(0, "0" * 64) is False
    assert layer.load_kernel_sync(1, "0" * 64) is False
    assert layer.state_layout.lifecycle_states.tolist() == [S.DORMANT, S.ACTIVE, 0, 0]
    assert layer.seed_kernel(1) is kernel


def test_without_a_source_the_cure_is_named():
    """Loading where nothing can be loaded from says how to give a source."""
    with pytest.raises(KernelSourceUnavailable, match="source="):
        KasminaLayer(6, 6).load_kernel_sync(0, "0" * 64)


class Named(nn.Linear):
    """A host that has a method of the layer's name."""

    def graft(self):
        """Do something else."""


REFUSED = {
    "names that a layer needs: graft": Named(2, 2),
    "lazy": nn.LazyLinear(3),
    "wrapped already": KasminaLayer(2, 2),
    "forward of its own": nn.Linear(2, 2),
}
REFUSED["forward of its own"].forward = lambda x: x


@pytest.mark.parametrize("reason", sorted(REFUSED))
def test_what_cannot_be_a_site_is_refused_with_the_reason(reason):
    """The refusal says why, adopt raises the same, and the class is not changed."""
    host = REFUSED[reason]
    before = type(host)
    assert reason in refusal(host)
    with pytest.raises(ValueError, match=reason):
        adopt(host, name="site")
    assert type(host) is before


def test_a_parametrization_survives_the_seeds():
    """weight_norm put on a wrapped layer stays through grafting and unloading."""
    layer, x = adopt(nn.Linear(6, 6), name="site"), torch.randn(5, 6)
    expected = layer(x)
    nn.utils.parametrizations.weight_norm(layer)
    wrapped = type(layer)
    layer.graft(0, nn.Linear(6, 6), alpha=0.5, example=x)
    assert isinstance(layer, KasminaLayer)
    assert nn.utils.parametrize.is_parametrized(layer)
    torch.testing.assert_close(layer(x) - 0.5 * layer.seed_kernel(0)(x), expected)
    layer.unload_kernel(0)
    assert type(layer) is wrapped
    torch.testing.assert_close(layer(x), expected)
