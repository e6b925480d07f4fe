"""Grafts that are made permanent, and what their certificates and outputs must say."""

import torch

from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.host_class import adopt


def fossilize(host, kernel, x, **options):
    """Graft at alpha 0.5, fossilize; return layer, certificate, outputs before and after."""
    layer = adopt(host, name="site")
    layer.graft(0, kernel, **{"alpha": 0.5, "example": x, **options})
    with torch.no_grad():
        before = layer(x)
        certificate = layer.fossilize(0)
        return layer, certificate, before, layer(x)


def assert_folded(layer, certificate, before, after):
    assert certificate.folded, certificate.reason
    assert 0.0 < certificate.rel_diff <= certificate.tolerance == 1e-6
    assert type(layer).forward is type(layer.default_layer).forward
    assert not any("_seeds" in key for key in layer.state_dict())
    assert layer.state_layout.state(0) == SeedLifecycleState.FOSSILIZED
    assert not layer.state_layout.has_active_seeds()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def assert_kept(layer, certificate, before, after, reason):
    assert not certificate.folded
    assert reason in certificate.reason
    assert layer.state_layout.has_active_seeds()
    assert torch.equal(after, before)
