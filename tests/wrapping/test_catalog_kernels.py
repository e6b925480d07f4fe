"""Every kernel of the catalog, and every control, on its way out: unwrapped and exported."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from wrapping_grown import load_grafts

import esper
from esper.compiler import catalog
from esper.state.site import describe_site

pytestmark = pytest.mark.slow

HOSTS = {
    "linear": (lambda: nn.Linear(6, 8), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, bias=False), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 3, padding=1), (2, 4, 5, 6, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 4)),
    "layer_norm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 5, 6)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(6), (4, 6)),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), (2, 3, 8)),
}
CONTROLS = (
    catalog.noop,
    catalog.capacity_free,
    catalog.own_shape_zeroed,
    catalog.random_features,
)


def blueprints(host, shape):
    """Return all that the catalog has for a host, capacity or not."""
    x = torch.zeros(shape)
    site = describe_site(host, x, host(x))
    offered = catalog.default_catalog().blueprints_for(site, capacity_only=False)
    return [*offered, *(control(site) for control in CONTROLS)]


def grown(make, shape, index):
    """Return a model with a kernel of the catalog whose tensors are all random."""
    torch.manual_seed(index)
    model = nn.Sequential(make())
    blueprint = blueprints(model[0], shape)[index]
    esper.wrap(model, select="0").eval()
    model[0].graft(0, blueprint, alpha=0.5, example=torch.randn(shape))
    with torch.no_grad():
        for parameter in model[0].seed_kernel(0).parameters():
            parameter.normal_(std=0.3)
    return model


LONG = ("conv1d", "conv3d", "conv_transpose2d", "batch_norm1d", "encoder_layer")
"""Hosts whose kernels take long together and differ little from those of the others."""

CASES = [
    pytest.param(
        *(name, index),
        id=f"{name}-{blueprint.id}",
        marks=[pytest.mark.torture] if name in LONG else [],
    )
    for name, (make, shape) in HOSTS.items()
    for index, blueprint in enumerate(blueprints(make(), shape))
]


@pytest.mark.parametrize(("name", "index"), CASES)
def test_a_catalog_kernel_predicts_the_same_unwrapped_and_exported(name, index, tmp_path):
    """Unwrapped and rebuilt models are equal to the wrapped one, to 1e-6 where it was folded."""
    make, shape = HOSTS[name]
    model = grown(make, shape, index)
    x = torch.randn(shape)
    expected = model(x)

    esper.export(model, tmp_path)
    plain = esper.unwrap(copy.deepcopy(model))
    rebuilt = load_grafts(tmp_path).build(nn.Sequential(make())).eval()
    rebuilt.load_state_dict(load_file(tmp_path / "model.safetensors"))

    assert torch.equal(rebuilt(x), plain(x))
    if type(plain[0]) is type(make()):
        difference = (plain(x) - expected).abs().max() / expected.abs().max()
        assert difference.item() <= 1e-6
    else:
        assert torch.equal(plain(x), expected)
