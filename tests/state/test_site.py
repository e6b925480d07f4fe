"""A site is described once for the catalog, and what the catalog offers there is accepted."""

import pytest
import torch
from execution_hosts import run
from kernel_blueprints import mlp_blueprint
from torch import nn

from esper.compiler.catalog import capacity_free, default_catalog, noise, noop
from esper.compiler.compile import compile_blueprint
from esper.compiler.lowering import lower
from esper.contracts.errors import SiteDescriptionError
from esper.execution.host_class import adopt
from esper.seeds.probe import probe
from esper.state.kernel import prepare_kernel
from esper.state.site import describe_site

HOSTS = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 9, 9)),
    "conv2d_same": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2), (4, 9, 9)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, dilation=2),
        (4, 5, 4),
    ),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (5, 8)),
    "lstm": (lambda: nn.LSTM(6, 4, batch_first=True), (5, 6)),
    "layer_norm": (lambda: nn.LayerNorm(6), (5, 6)),
    "rms_norm": (lambda: nn.RMSNorm(6), (5, 6)),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (4, 7)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(6), (6,)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(4), (4, 5, 5)),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (5, 8)),
}


@pytest.fixture(params=sorted(HOSTS))
def site(request):
    """A wrapped layer and an input for it."""
    make, shape = HOSTS[request.param]
    return adopt(make(), name="site"), torch.randn(3, *shape)


def described(layer, x):
    """Describe a layer by what it is seen to read and give."""
    return describe_site(layer, x, run(layer, x))


def test_every_catalog_entry_is_accepted_and_changes_nothing_at_birth(site):
    """Candidates pass the probe, and enter at alpha 1 with the output as it was."""
    layer, x = site
    layer.eval()
    before = run(layer, x)
    blueprints = default_catalog().blueprints_for(described(layer, x))
    assert blueprints
    for blueprint in blueprints:
        layer.graft(0, blueprint, example=x)
        assert layer.alpha(0) == 1.0
        assert torch.equal(run(layer, x), before)


@pytest.mark.parametrize(("control", "alpha"), [(noop, 1.0), (capacity_free, 1.0), (noise, 0.0)])
def test_controls_are_accepted(site, control, alpha):
    """Controls pass the probe like any kernel; noise, which is not zero, enters at alpha 0."""
    layer, x = site
    layer.graft(0, control(described(layer, x)), example=x)
    assert layer.alpha(0) == alpha


@pytest.mark.slow
def test_what_adds_no_capacity_folds(site):
    """A capacity-free kernel that was trained becomes part of the host's weights."""
    layer, x = site
    layer.graft(0, capacity_free(described(layer, x)), example=x)
    with torch.no_grad():
        for p in layer.seed_kernel(0).parameters():
            p.normal_()
        before = run(layer.eval(), x)
        certificate = layer.fossilize(0)
        takes_none = isinstance(layer, nn.TransformerEncoderLayer | nn.LSTM)
        assert certificate.folded != takes_none
        torch.testing.assert_close(run(layer, x), before, rtol=1e-4, atol=1e-4)


def test_a_probe_is_remembered_for_the_artifact_at_the_site(site):
    """The same artifact at the same site is not probed twice; weights that moved are."""
    layer, x = site
    artifact = compile_blueprint(default_catalog().blueprints_for(described(layer, x))[0])
    first = probe(layer, prepare_kernel(layer, artifact), x, is_pristine=True)
    prepared = prepare_kernel(layer, artifact)
    again = probe(layer, prepared, x, is_pristine=True)
    assert (first.is_identity, again.is_identity) == (True, True)
    assert again.remembered
    with torch.no_grad():
        for p in prepared.module.parameters():
            p.add_(0.1)
    assert not probe(layer, prepared, x).is_identity


def test_a_remembered_probe_does_not_remember_that_nothing_changes():
    """Whether a replacing kernel is the identity depends on the host's weights of today."""
    layer, x = adopt(nn.Linear(6, 6), name="site"), torch.randn(1, 6)
    kernel = mlp_blueprint(mode="replace")
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(lower(kernel)(x)[0])
    layer.graft(0, kernel, example=x)
    assert layer.alpha(0) == 1.0
    layer.unload_kernel(0)
    with torch.no_grad():
        layer.bias.mul_(2.0)
    before = layer(x)
    layer.graft(0, kernel, example=x)
    assert torch.equal(layer(x), before)


def test_padding_by_name_is_described_in_numbers():
    """'same' and 'valid' become elements per side; what pads unequally is refused."""
    assert describe_site(nn.Conv2d(2, 2, 3, padding="same", dilation=2)).padding == (2, 2)
    assert describe_site(nn.Conv1d(2, 2, 3, padding="valid")).padding == (0,)
    with pytest.raises(SiteDescriptionError, match="unequally"):
        describe_site(nn.Conv1d(2, 2, 4, padding="same"))


def test_grafts_do_not_make_a_frozen_host_trainable():
    """host_is_trainable looks at the host's parameters only."""
    layer = adopt(nn.Linear(6, 6).requires_grad_(False), name="site")
    layer.graft(0, nn.Linear(6, 6), alpha=0.5, example=torch.randn(3, 6))
    assert not describe_site(layer).host_is_trainable
