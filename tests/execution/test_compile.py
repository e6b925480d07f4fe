"""Under torch.compile: one graph dormant, one more once active, and none for what changes after."""

import pytest
import torch
from test_state_dict import mlp_blueprint
from torch import nn
from torch._dynamo.testing import CompileCounter

from esper.execution.host_class import adopt

pytestmark = pytest.mark.slow


class Net(nn.Module):
    """A site and a head."""

    def __init__(self):
        super().__init__()
        self.site = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.relu(self.site(x)))


def compiled(**options):
    """Return a wrapped net, its site, the compiled net and the counter of its graphs."""
    torch.compiler.reset()
    net, counter = Net(), CompileCounter()
    site = adopt(net.site, name="site", **options)
    site.enable_step_guard()
    return net, site, torch.compile(net, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("guard", ["always", "step", "off"])
def test_the_number_of_graphs(guard):
    """1 dormant, 2 once active; still 2 after alpha, exchange, dormant and active again."""
    net, site, fast, counter = compiled(telemetry_enabled=True)
    x, graphs = torch.randn(5, 6), []

    def graft(init_seed):
        site.graft(0, mlp_blueprint(init_seed=init_seed), alpha=0.5, guard=guard, example=x)

    for change in (
        lambda: None,
        lambda: graft(1),
        lambda: site.set_alpha(0, 0.75),
        lambda: graft(2),
        lambda: site.unload_kernel(0),
        lambda: graft(3),
    ):
        change()
        for _ in range(2):
            y = fast(x)
            assert torch.allclose(y, net(x))
            y.sum().backward()
        graphs.append(counter.frame_count)
    assert graphs == [1, 2, 2, 2, 2, 2]


def test_a_fault_in_a_compiled_forward_is_stopped_and_counted():
    """Compiled, a kernel that is not finite costs its contribution and is isolated."""
    net, site, fast, _ = compiled()
    x = torch.randn(5, 6)
    site.graft(0, mlp_blueprint(), alpha=0.5, example=x)
    with torch.no_grad():
        site.seed_kernel(0).steps[-1].bias.fill_(torch.nan)
    site_free = net.head(torch.relu(site.default_layer(x)))
    for _ in range(3):
        y = fast(x)
        assert torch.allclose(y, site_free)
        y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    assert site.get_stats()["seed_stats"]["error_recovery_seeds"] == 1
    assert torch.allclose(fast(x), site_free)
