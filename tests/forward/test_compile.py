"""Under torch.compile: one graph dormant, one more once active, and none for what changes after."""

import contextvars
import functools

import pytest
import torch
from execution_hosts import KINDS, run
from kernel_blueprints import mlp_blueprint
from torch import nn
from torch._dynamo.testing import CompileCounter

from esper.execution.host_class import adopt
from esper.seeds.maintenance import maintain
from esper.state.layer_call import LayerCall

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


class Sliced(nn.Module):
    """Builds a list of modules in its forward, as LLaMA does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for layer in self.layers[:2]:
            x = layer(x)
        return x


def test_a_host_that_slices_its_layers_stays_one_graph():
    """Beside a layer with a kernel, in the host itself or in another of the process."""
    torch.compiler.reset()
    host, counter, x = Sliced(), CompileCounter(), torch.randn(5, 6)
    fast = torch.compile(host, fullgraph=True, backend=counter)
    elsewhere, *_ = grown = [adopt(nn.Linear(6, 6), name="other")]
    elsewhere.graft(0, mlp_blueprint(), alpha=0.5, example=x)
    assert torch.equal(fast(x), host(x))
    grown.append(adopt(host.layers[0], name="layers.0"))
    grown[-1].graft(0, mlp_blueprint(), alpha=0.5, example=x)
    assert torch.equal(fast(x), host(x))
    assert counter.frame_count == 2


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


class Around(nn.Module):
    """A site of any kind, behind a factor that trains."""

    def __init__(self, site):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))
        self.site = site

    def forward(self, *args, **kwargs):
        return self.factor * run(self.site, LayerCall(args, kwargs))


@pytest.mark.parametrize("name", sorted(KINDS))
@torch._dynamo.config.patch(allow_rnn=True)  # torch breaks the graph at recurrent layers otherwise
def test_every_kind_is_one_graph_dormant_and_one_active(name):
    """No graph breaks; alpha, going dormant and coming back make none; the numbers are eager's."""
    torch.compiler.reset()
    kind, counter = KINDS[name], CompileCounter()
    net = Around(adopt(kind.make_host(), name="site"))
    fast = torch.compile(net, fullgraph=True, backend=counter)
    call, graphs = LayerCall.of(kind.make_input()), []

    def graft():
        torch.manual_seed(1)
        net.site.graft(0, kind.make_kernel(), alpha=0.5, example=call)

    for change in (
        lambda: None,
        graft,
        lambda: net.site.set_alpha(0, 0.75),
        lambda: net.site.unload_kernel(0),
        graft,
    ):
        change()
        for _ in range(2):
            y = fast(*call.args, **call.kwargs)
            assert torch.allclose(y, net(*call.args, **call.kwargs), atol=1e-6)
            y.square().sum().backward()
        graphs.append(counter.frame_count)
    assert all(p.grad is not None for p in net.site.seed_kernel(0).parameters())
    assert graphs == [1, 2, 2, 2, 2]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch asks for it behind any break
def test_a_recurrent_layer_breaks_the_graph_and_grows():
    """As torch is set, it is called between two graphs; its kernel is compiled once."""
    torch.compiler.reset()
    counter = CompileCounter()
    net = Around(adopt(nn.GRU(5, 6), name="site"))
    fast, x = torch.compile(net, backend=counter), torch.randn(4, 3, 5)
    fast(x)
    before = counter.frame_count
    net.site.graft(0, nn.Linear(6, 6), alpha=0.5, example=x)
    for alpha in (0.5, 0.75):
        net.site.set_alpha(0, alpha)
        y = fast(x)
        assert torch.allclose(y, net(x), atol=1e-6)
        y.square().sum().backward()
    assert counter.frame_count == before + 1


def test_twenty_different_kernels_leave_the_model_compiled():
    """Past torch's limit of eight graphs, a new kernel makes one more and the model stays fast."""
    net, site, fast, counter = compiled()
    x = torch.randn(5, 6)
    for hidden in range(3, 23):
        kernel = nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 6))
        site.graft(0, kernel, alpha=0.5, guard="off", example=x)
        assert torch.allclose(fast(x), net(x))
    assert 8 < counter.frame_count <= 20


NOT_COUNTED = [
    "calls inside torch.compile that run no kernel with a guard",
    "calls inside torch.compile beyond the latest 256 before a reading",
]


def test_statistics_say_which_compiled_calls_are_not_counted():
    """Without a kernel counted calls are the eager ones, and the statistics say so."""
    net, site, fast, _ = compiled(telemetry_enabled=True)
    x = torch.randn(5, 6)
    fast(x)
    fast(x)
    net(x)
    found = site.get_stats()["execution_stats"]
    assert found["forward_count"] == 1
    assert found["not_counted"] == NOT_COUNTED

    site.telemetry_enabled = False
    net(x)
    found = site.get_stats()["execution_stats"]
    assert found["forward_count"] == 1
    assert found["not_counted"] == [*NOT_COUNTED, "calls while telemetry is off"]


@pytest.mark.parametrize("guard", ["always", "step"])
def test_compiled_calls_of_a_guarded_kernel_are_counted(guard):
    """By its graph: what the guard remembers tells how many there were, at the next reading."""
    net, site, fast, counter = compiled(telemetry_enabled=True)
    x = torch.randn(5, 6)
    site.enable_step_guard()
    site.graft(0, nn.Linear(6, 6), alpha=0.5, guard=guard, example=x)
    for _ in range(3):
        fast(x)
    net(x)
    graphs = counter.frame_count
    found = site.get_stats()["execution_stats"]
    assert (found["forward_count"], found["kernel_execution_count"]) == (4, 4)
    fast(x)
    assert site.get_stats()["execution_stats"]["kernel_execution_count"] == 5
    assert counter.frame_count == graphs


def test_control_compiled_calls_without_a_guard_are_not_counted():
    """Nothing in such a graph remembers a call."""
    _, site, fast, _ = compiled(telemetry_enabled=True)
    x = torch.randn(5, 6)
    site.graft(0, nn.Linear(6, 6), alpha=0.5, guard="off", example=x)
    fast(x)
    assert site.get_stats()["execution_stats"]["kernel_execution_count"] == 0


def test_kernels_that_another_context_loads_leave_the_model_compiled():
    """Torch keeps limits by context: what a task's grafts need is granted where training runs."""
    before = torch._dynamo.config.recompile_limit
    layer = adopt(nn.Linear(4, 4), name="site")
    for width in range(41, 44):
        kernel = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4))
        graft = functools.partial(layer.graft, 0, kernel, alpha=0.5, example=torch.randn(2, 4))
        contextvars.copy_context().run(graft)
    maintain(layer)
    assert torch._dynamo.config.recompile_limit >= before + 3


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own import
def test_fewer_overheads_asked_for_a_swap_gives_the_same_numbers():
    """With ``mode="reduce-overhead"``, which on a CPU is accepted and captures nothing."""
    torch.compiler.reset()
    net, x = Net(), torch.randn(5, 6)
    site = adopt(net.site, name="site")
    fast = torch.compile(net, fullgraph=True, mode="reduce-overhead")
    for _ in range(2):
        site.graft(0, mlp_blueprint(), alpha=0.5, example=x)
        torch.testing.assert_close(fast(x), net(x))
        site.unload_kernel(0)
        torch.testing.assert_close(fast(x), net(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inductor's own import
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_graphs_are_replayed_after_a_swap():
    """CUDA graphs of ``mode="reduce-overhead"`` give the eager numbers of the kernel that is in."""
    torch.compiler.reset()
    net = Net().double().cuda()
    x = torch.randn(5, 6, dtype=torch.float64, device="cuda")
    site = adopt(net.site, name="site")
    fast = torch.compile(net, fullgraph=True, mode="reduce-overhead")
    for _ in range(2):
        site.graft(0, nn.Linear(6, 6).double().cuda(), alpha=0.5, example=x)
        for _ in range(4):  # two warm up, one is captured, one is replayed
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(fast(x).clone(), net(x))
