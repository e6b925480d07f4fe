"""A site is what it does: its dtype, its device and its features are read off its behaviour."""

import pytest
import torch
from torch import nn

import esper
from esper.compiler.catalog import default_catalog
from esper.state.kernel import reference_tensor
from esper.state.site import describe_site, feature_axis

DTYPES = (torch.float64, torch.bfloat16)

BARE_NORMS = {
    "batch_norm": (lambda: nn.BatchNorm2d(4, affine=False), (3, 4, 5, 5)),
    "batch_norm_without_statistics": (
        lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        (3, 4, 5, 5),
    ),
    "layer_norm": (lambda: nn.LayerNorm(4, elementwise_affine=False), (3, 4)),
    "rms_norm": (lambda: nn.RMSNorm(4, elementwise_affine=False), (3, 4)),
    "group_norm": (lambda: nn.GroupNorm(2, 4, affine=False), (3, 4, 5, 5)),
}


def offered(layer, x):
    """Return all that the catalog offers at a layer for what it is seen to do."""
    return default_catalog().blueprints_for(describe_site(layer, x, layer(x)), capacity_only=False)


def assert_all_fit(layer, x):
    """Graft everything that is offered, one after the other; at birth nothing changes."""
    y, blueprints = layer(x), offered(layer, x)
    assert blueprints
    for blueprint in blueprints:
        layer.graft(0, blueprint, example=x)
        assert torch.equal(layer(x), y)
        layer.unload_kernel(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BARE_NORMS)
def test_a_norm_without_parameters_takes_kernels_of_what_it_reads(name, dtype):
    """Where a host has no tensor that says so, the example says dtype and device."""
    make, shape = BARE_NORMS[name]
    model = esper.wrap(nn.Sequential(make().to(dtype)), select=["0"])

    assert_all_fit(model[0], torch.randn(shape, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("moved", ["before", pytest.param("after", marks=pytest.mark.torture)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BARE_NORMS)
def test_a_norm_without_parameters_is_as_the_model_around_it(name, dtype, moved):
    """What a model is when it is wrapped, and what it becomes, holds for its bare norms too."""
    make, shape = BARE_NORMS[name]
    model = nn.Sequential(nn.Linear(shape[-1], shape[-1]), make())
    model = model.to(dtype) if moved == "before" else model
    esper.wrap(model)
    model.to(dtype)

    assert describe_site(model[1]).dtype == str(dtype).removeprefix("torch.")
    kernel = offered(model[1], model[0](torch.randn(shape, dtype=dtype)))[0]
    model[1].graft(0, kernel, alpha=0.5)
    model(torch.randn(shape, dtype=dtype))
    assert all(p.dtype == dtype for p in model[1].seed_kernel(0).parameters())
    assert not esper.maintain(model).faults


def test_a_norm_without_parameters_follows_to_another_device():
    """A move of the model reaches a layer that has nothing to move."""
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)))

    model.to("meta")

    assert reference_tensor(model[1]).device.type == "meta"


def test_autocast_does_not_narrow_the_kernels_of_a_bare_norm():
    """What a layer read under autocast is narrower than the model, whose parameters are not."""
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False)))
    h = torch.randn(3, 4, dtype=torch.bfloat16)

    assert describe_site(model[1], h, h).dtype == "float32"


class ChannelsFirst(nn.LayerNorm):
    """A LayerNorm over the channels of maps."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class RMSOnChannels(nn.RMSNorm):
    """An RMSNorm over the channels of maps."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class NormOfOnesOwn(nn.Module):
    """A norm over channels that derives from none of torch's."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))

    def forward(self, x):
        x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return x * self.weight.reshape(-1, *[1] * (x.ndim - 2))


class Permuted(nn.Module):
    """A norm over the last axis behind a change of order."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


ON_CHANNELS = {
    "layer_norm": lambda: ChannelsFirst(4),
    "rms_norm": lambda: RMSOnChannels(4),
    "own_flat": lambda: NormOfOnesOwn(4),
    "own_shaped": lambda: NormOfOnesOwn(4, 1, 1),
    "block": Permuted,
}


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (2, 4, 4, 4), (2, 4, 9), (2, 4, 3, 3, 4)])
@pytest.mark.parametrize("name", ON_CHANNELS)
def test_a_norm_over_channels_takes_kernels_over_channels(name, shape):
    """Whatever its class says, and also where another axis has as many places as channels."""
    if name == "own_shaped" and len(shape) != 4:
        pytest.skip("its weight is shaped for two axes behind the channels")
    if name == "block" and shape[-1] == 4:
        pytest.skip("nothing says of a block with a norm inside where it puts the features")
    layer, x = esper.wrap(ON_CHANNELS[name](), select=[""]), torch.randn(shape)

    spec = describe_site(layer, x, layer(x))

    assert (spec.axes, spec.out_features) == (len(shape) - 2, 4)
    assert feature_axis(layer, layer(x)) == 1
    assert_all_fit(layer, x)


def test_the_kernel_at_a_norm_over_channels_takes_maps_of_any_size():
    """A kernel for the channels was not made for the width of the maps it was tried on."""
    layer = esper.wrap(NormOfOnesOwn(4), select=[""])
    x = torch.randn(2, 4, 6, 6)
    layer.graft(0, offered(layer, x)[0], alpha=0.5, example=x)

    assert layer(torch.randn(2, 4, 3, 8)).shape == (2, 4, 3, 8)
    assert not esper.maintain(layer).faults


class BatchNormBehind(nn.BatchNorm1d):
    """A BatchNorm over the last axis."""

    def forward(self, x):
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


class LinearOnChannels(nn.Linear):
    """A linear layer over the channels of maps."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Gated(nn.Linear):
    """A linear layer that gives half of its outputs, gated by the others."""

    def forward(self, x):
        return nn.functional.glu(super().forward(x))


class ConvBehind(nn.Conv2d):
    """A convolution that gives its channels last."""

    def forward(self, x):
        return super().forward(x).movedim(1, -1)


@pytest.mark.parametrize(
    ("host", "shape", "axis"),
    [
        (BatchNormBehind(4), (3, 5, 4), 2),
        (BatchNormBehind(4), (3, 4, 4), 2),
        (LinearOnChannels(4, 6), (3, 4, 5, 5), 1),
        (Gated(4, 6), (3, 5, 4), 2),
        (ConvBehind(4, 6, 1), (3, 4, 5, 5), 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_a_subclass_that_makes_something_else_of_its_base(host, shape, axis):
    """Kernels fit what a layer was seen to give, not what its base class would give."""
    layer, x = esper.wrap(host), torch.randn(shape)

    assert feature_axis(layer, layer(x)) == axis
    assert_all_fit(layer, x)


def test_looking_at_a_layer_leaves_it_as_it_was():
    """What is tried to see how a layer arranges its features is tried on a copy."""
    layer, x = esper.wrap(BatchNormBehind(4)), torch.randn(3, 4, 4)
    y, mean, random = layer(x), layer.running_mean.clone(), torch.random.get_rng_state()

    describe_site(layer, x, y)

    assert torch.equal(layer.running_mean, mean)
    assert layer.num_batches_tracked == 1
    assert torch.equal(torch.random.get_rng_state(), random)
