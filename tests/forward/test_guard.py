"""A bad kernel costs its own contribution: the host trains on as if it had no seed, bit for bit."""

import concurrent.futures
import copy
import functools

import pytest
import torch
from bad_kernels import FAULTS, FENCED, FORWARD_FAULTS, GRADIENT_FAULTS, BadKernel
from guarded_updates import OPTIMIZERS, SETTINGS, UPDATES, host_parameters, plain, same
from torch import nn

from esper.continuity.optimizer import sync_optimizer
from esper.contracts.errors import KernelExecutionError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.host_class import adopt
from esper.seeds.isolation import FIRST_RETRY_READINGS
from esper.seeds.maintenance import maintain
from esper.seeds.step_guard import KeptBuffers, read_step_flags
from esper.state.observation import read

pytestmark = pytest.mark.usefixtures("with_and_without_a_look")


class Net(nn.Module):
    """A site behind a trainable layer, a batch norm behind the site, a head."""

    def __init__(self, host):
        super().__init__()
        is_linear = isinstance(host, nn.Linear)
        self.stem = nn.Linear(4, 4) if is_linear else nn.Conv2d(2, 2, 1)
        self.site = host
        self.norm = nn.BatchNorm1d(5) if is_linear else nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        y = self.norm(self.site(self.stem(x)))
        return self.head(y if y.dim() == 2 else y.mean((2, 3)))


LAYERS = {
    "linear": (lambda: nn.Linear(4, 5), (4,)),
    "conv2d": (lambda: nn.Conv2d(2, 5, 3, padding=1), (2, 5, 5)),
}


def make_net(layer):
    """Return a wrapped net, the same each time, and the shape of its input."""
    make_host, shape = LAYERS[layer]
    torch.manual_seed(0)
    net = Net(make_host())
    adopt(net.site, name="site")
    return net, shape


def graft_bad(net, shape, fault, **options):
    """Graft a kernel that contributes 0, and switch its fault on; return it."""
    kernel = BadKernel(copy.deepcopy(net.site.default_layer), fault)
    example = torch.randn(2, *shape)
    net.site.graft(0, kernel, alpha=1.0, example=example, **options)
    kernel.is_bad = True
    return kernel


def train(net, shape, make_optimizer, training, update):
    """Train for a few updates; return losses, host gradients and host state as they were."""
    net.train(training)
    optimizer = make_optimizer(net.parameters())
    generator = torch.Generator().manual_seed(1)
    trace = []
    for _ in range(UPDATES):
        x = torch.randn(6, *shape, generator=generator)
        target = torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        loss = update(net, optimizer, functools.partial(loss_of, net, x, target))
        trace += [loss.detach(), *(p.grad.clone() for n, p in host_parameters(net))]
    state = (t for n, t in net.state_dict().items() if "_seeds." not in n)
    return trace + [t.clone() for t in state]


def loss_of(net, x, target):
    return nn.functional.cross_entropy(net(x), target)


@pytest.mark.parametrize("setting", sorted(SETTINGS))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(name, marks=[] if name == "sgd" else pytest.mark.torture)
        for name in sorted(OPTIMIZERS)
    ],
)
@pytest.mark.parametrize("layer", sorted(LAYERS))
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_the_host_trains_as_without_the_seed(fault, layer, optimizer, training, setting):
    """Losses, host gradients, weights and statistics equal those of a run without the seed."""
    bare, shape = make_net(layer)
    expected = train(bare, shape, OPTIMIZERS[optimizer], training, SETTINGS[setting])
    net, shape = make_net(layer)
    kernel = graft_bad(net, shape, fault)
    found = train(net, shape, OPTIMIZERS[optimizer], training, SETTINGS[setting])
    assert same(found, expected)
    assert all(torch.isfinite(p).all() for p in kernel.parameters())


@pytest.mark.parametrize("layer", sorted(LAYERS))
@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - set(FENCED)))
def test_without_the_guard_the_host_is_spoiled(fault, layer):
    """The control: with guard='off' the same faults reach the host or the kernel's weights."""
    bare, shape = make_net(layer)
    expected = train(bare, shape, OPTIMIZERS["sgd"], True, plain)
    net, shape = make_net(layer)
    kernel = graft_bad(net, shape, fault, guard="off")
    found = train(net, shape, OPTIMIZERS["sgd"], True, plain)
    is_clean = all(torch.isfinite(p).all() for p in kernel.parameters())
    assert not (same(found, expected) and is_clean)


@pytest.mark.parametrize("layer", sorted(LAYERS))
@pytest.mark.parametrize("fault", FENCED)
def test_without_the_fence_the_forward_fails(fault, layer):
    """The control of the fence: a shadow seed is not fenced, and its fault comes out."""
    net, shape = make_net(layer)
    kernel = BadKernel(copy.deepcopy(net.site.default_layer), fault)
    kernel.is_bad = True
    with net.site.shadow(0, kernel), pytest.raises((RuntimeError, ValueError)):
        net(torch.randn(2, *shape))


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_three_faults_in_a_row_isolate_the_seed(fault):
    """After three faulty calls maintain moves the seed to ERROR_RECOVERY and out of the model."""
    net, shape = make_net("linear")
    graft_bad(net, shape, fault)
    for _ in range(3):
        net(torch.randn(6, *shape)).sum().backward()
    report = maintain(net)
    assert report.faults[0].faults == 3
    assert report.faults[0].reason
    assert net.site.state_layout.state(0) == SeedLifecycleState.ERROR_RECOVERY
    assert not any("_seeds." in key for key in net.state_dict())


def test_a_clean_call_ends_a_run_of_faults():
    """Two faults, a clean call and two faults isolate nobody."""
    net, shape = make_net("linear")
    kernel = graft_bad(net, shape, "nan")
    for bad in (True, True, False, True, True):
        kernel.is_bad = bad
        net(torch.randn(6, *shape))
    report = maintain(net)
    assert report.faults[0].faults == 4
    assert net.site.state_layout.state(0) == SeedLifecycleState.ACTIVE


@pytest.mark.parametrize("num_calls", [200, 201])
def test_five_percent_of_200_calls_isolate_the_seed(num_calls):
    """Ten faults within 200 calls isolate; ten that are spread over 201 do not."""
    net, shape = make_net("linear")
    kernel = graft_bad(net, shape, "nan")
    with torch.no_grad():
        for fault in range(10):
            kernel.is_bad = True
            net(torch.randn(2, *shape))
            kernel.is_bad = False
            for _ in range(21 + (fault == 0) * (num_calls - 199)):
                net(torch.randn(2, *shape))
            maintain(net)
    isolated = net.site.state_layout.state(0) == SeedLifecycleState.ERROR_RECOVERY
    assert isolated == (num_calls == 200)


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - set(FENCED)))
def test_what_came_in_bad_is_not_counted(fault):
    """Where the layer's input is not finite the host's output is passed on, and nothing counted."""
    net, shape = make_net("linear")
    graft_bad(net, shape, fault)
    for _ in range(3):
        net(torch.full((6, *shape), torch.nan)).sum().backward()
    assert maintain(net).faults == ()


def test_a_bad_loss_is_not_the_kernels_fault():
    """A gradient that arrives non-finite is not counted against the seed it arrives at."""
    net, shape = make_net("linear")
    kernel = graft_bad(net, shape, "nan")
    kernel.is_bad = False
    for _ in range(3):
        (net(torch.randn(6, *shape)).sum() * torch.inf).backward()
    assert maintain(net).faults == ()
    assert all(torch.isfinite(p.grad).all() for p in kernel.parameters())


@pytest.mark.parametrize("fault", sorted(FORWARD_FAULTS))
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_a_good_neighbour_stays(fault, mode):
    """Beside a bad seed, a good one contributes what it would alone, bit for bit."""
    net, shape = make_net("linear")
    site, x = net.site, torch.randn(6, *shape)
    good = nn.Linear(4, 5)
    site.graft(1, good, alpha=0.5, example=x)
    alone = site(x)
    kernel = BadKernel(nn.Linear(4, 5), fault)
    site.graft(0, kernel, alpha=0.5, mode=mode, example=x)
    kernel.is_bad = True
    assert torch.equal(site(x), alone)


@pytest.mark.parametrize("fault", sorted(GRADIENT_FAULTS.keys() - {"gradient_of_weight"}))
def test_a_bad_gradient_leaves_that_of_a_detached_kernel(fault):
    """Host gradients equal those of the same forward with the kernel's input detached."""
    net, shape = make_net("linear")
    x = torch.randn(6, *shape)
    kernel = BadKernel(nn.Linear(4, 5), fault)
    net.site.graft(0, kernel, alpha=0.5, example=x)
    with torch.no_grad():
        kernel.body.weight.normal_()

    class Detached(nn.Module):
        def forward(self, x):
            return kernel.body(x.detach())

    reference = copy.deepcopy(net)
    reference.site.graft(0, Detached(), alpha=0.5, guard="off", example=x)
    kernel.is_bad = True
    net(x).square().sum().backward()
    reference(x).square().sum().backward()
    pairs = zip(host_parameters(net), host_parameters(reference), strict=True)
    assert all(torch.equal(a.grad, b.grad) for (_, a), (_, b) in pairs)


def test_an_isolated_seed_comes_back_when_its_probe_passes():
    """A seed that was isolated and is healthy again is ACTIVE after the wait."""
    net, shape = make_net("linear")
    kernel = graft_bad(net, shape, "nan")
    for _ in range(3):
        net(torch.randn(6, *shape))
    maintain(net)
    kernel.is_bad = False
    for _ in range(FIRST_RETRY_READINGS - 1):
        assert maintain(net).transitions == ()
    assert maintain(net).transitions[0].after == SeedLifecycleState.ACTIVE
    assert net.site.seed_kernel(0) is kernel
    assert net.site.alpha(0) == 1.0


def test_an_isolated_seed_that_stays_bad_is_culled():
    """After three failed probes, each twice as late, the seed is dormant."""
    net, shape = make_net("linear")
    graft_bad(net, shape, "nan")
    for _ in range(3):
        net(torch.randn(6, *shape))
    maintain(net)
    moves = [maintain(net).transitions for _ in range(7 * FIRST_RETRY_READINGS)]
    assert [bool(m) for m in moves] == [False] * (7 * FIRST_RETRY_READINGS - 1) + [True]
    assert net.site.state_layout.state(0) == SeedLifecycleState.DORMANT


def test_a_fossil_is_never_isolated_and_raises_after_three():
    """An unfolded fossil costs each bad call, stays, and raises at the third in a row."""
    net, shape = make_net("linear")
    graft_bad(net, shape, "nan")
    assert not net.site.fossilize(0).folded
    x = torch.randn(6, *shape)
    for _ in range(2):
        assert torch.equal(net.site(x), net.site.default_layer(x))
    maintain(net)
    net.site(x)
    with pytest.raises(KernelExecutionError, match="3 times in a row"):
        maintain(net)
    assert net.site.state_layout.state(0) == SeedLifecycleState.FOSSILIZED


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - {"raises", "shape", "dtype", "type"}))
def test_the_step_guard_finds_the_seed_and_isolates_it(fault):
    """Under guard='step' a bad output or gradient is flagged at the step, and the seed is out."""
    net, shape = make_net("linear")
    net.site.enable_step_guard()
    graft_bad(net, shape, fault, guard="step")
    net(torch.randn(6, *shape)).square().sum().backward()
    flagged = read_step_flags([net.site])
    is_seen = fault != "gradient_of_input"  # reaches no parameter of the kernel
    assert [f.seed_idx for f in flagged] == [0] * is_seen
    isolated = net.site.state_layout.state(0) == SeedLifecycleState.ERROR_RECOVERY
    assert isolated == is_seen


def test_the_step_guard_leaves_a_good_seed_alone():
    """A clean step flags nobody, and a loss that is not finite blames no kernel."""
    net, shape = make_net("linear")
    net.site.enable_step_guard()
    kernel = graft_bad(net, shape, "nan", guard="step")
    kernel.is_bad = False
    net(torch.randn(6, *shape)).square().sum().backward()
    assert read_step_flags([net.site]) == []
    (net(torch.randn(6, *shape)).sum() * torch.nan).backward()
    assert read_step_flags([net.site]) == []


def test_statistics_of_a_thrown_away_step_are_put_back():
    """A bad step leaves NaN in the batch norm behind the site; the kept copy replaces it."""
    net, shape = make_net("linear")
    net.site.enable_step_guard()
    graft_bad(net, shape, "nan", guard="step")
    kept, before = KeptBuffers(net), net.norm.running_mean.clone()
    net(torch.randn(6, *shape))
    assert torch.isnan(net.norm.running_mean).any()
    kept.put_back()
    assert torch.equal(net.norm.running_mean, before)
    assert int(net.norm.num_batches_tracked) == 0


def step_guarded():
    """Return a net whose bad seed is under guard='step', its optimizer, and its input's shape."""
    net, shape = make_net("linear")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sync_optimizer(net, optimizer)
    kernel = graft_bad(net, shape, "nan", guard="step")
    sync_optimizer(net, optimizer)
    return net, shape, kernel, optimizer


@pytest.mark.parametrize("num_readings", [1, 3], ids=["read", "read_and_isolated"])
def test_reading_statistics_before_the_step_does_not_let_it_through(num_readings):
    """A bad forward that get_stats has read, and may have isolated for, still costs the step."""
    net, shape, _, optimizer = step_guarded()
    before = [p.detach().clone() for _, p in host_parameters(net)]
    for _ in range(num_readings):
        net(torch.randn(6, *shape)).square().sum().backward()
        net.site.get_stats()
    optimizer.step()
    after = [p for _, p in host_parameters(net)]
    assert all(map(torch.equal, after, before))
    assert torch.isfinite(net.norm.running_mean).all()
    assert net.site.state_layout.state(0) == SeedLifecycleState.ERROR_RECOVERY


def test_statistics_are_put_back_after_a_step_that_the_scaler_skipped():
    """GradScaler calls no hook for a bad step; the next one puts the batch norm right."""
    net, shape, kernel, optimizer = step_guarded()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for is_bad in (True, False):
        kernel.is_bad = is_bad
        optimizer.zero_grad()
        scaler.scale(net(torch.randn(6, *shape)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        maintain(net)
    assert torch.isfinite(net.norm.running_mean).all()
    assert net.site.state_layout.state(0) == SeedLifecycleState.ERROR_RECOVERY


def test_an_isolated_kernel_is_not_trained():
    """model.zero_grad() does not reach it, and an old gradient must not be applied again."""
    net, shape = make_net("linear")
    kernel = graft_bad(net, shape, "nan")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for is_bad in (False, True, True, True):
        kernel.is_bad = is_bad
        net(torch.randn(6, *shape)).square().sum().backward()
    maintain(net)
    assert net.site.state_layout.state(0) == SeedLifecycleState.ERROR_RECOVERY
    before = kernel.body.weight.detach().clone()
    net.zero_grad()
    net(torch.randn(6, *shape)).square().sum().backward()
    optimizer.step()
    assert torch.equal(kernel.body.weight, before)


def test_a_model_of_another_dtype_by_now_can_be_maintained():
    """The example of an isolated seed fits no more: its probe fails, maintain does not."""
    net, shape = make_net("linear")
    graft_bad(net, shape, "nan")
    for _ in range(3):
        net(torch.randn(6, *shape))
    maintain(net)
    net.double()
    for _ in range(FIRST_RETRY_READINGS):
        maintain(net)
    assert net.site.state_layout.state(0) == SeedLifecycleState.ERROR_RECOVERY
    assert "dtype" in net.site._kasmina.seeds[0].last_error


def test_a_buffer_of_a_new_shape_does_not_stop_a_step_that_is_thrown_away():
    """A cache that has grown since the last good step stays as it is; the rest is put back."""
    net, shape, _, optimizer = step_guarded()
    net.register_buffer("cache", torch.zeros(2))
    sync_optimizer(net, optimizer)
    net.cache = torch.ones(5)
    net(torch.randn(6, *shape)).square().sum().backward()
    optimizer.step()
    assert torch.isfinite(net.norm.running_mean).all()
    assert torch.equal(net.cache, torch.ones(5))


def test_a_call_that_arrives_while_its_seed_is_read_is_left_for_later(monkeypatch):
    """Another thread's forward may get to its sums in the middle of a reading."""
    net, shape = make_net("linear")
    kernel = graft_bad(net, shape, "nan")
    kernel.is_bad = False
    net(torch.randn(6, *shape))

    def forward_then_read(seen, **known):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(net, torch.randn(6, *shape)).result()
        return read(seen, **known)

    monkeypatch.setattr("esper.seeds.maintenance.read", forward_then_read)
    maintain(net)
    assert len(net.site._kasmina.seeds[0].seen.calls) == 1
