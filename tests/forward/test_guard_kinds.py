"""The guard on every kind of layer: each fault costs its own contribution and nothing else."""

import pytest
import torch
from bad_kernels import FAULTS, FENCED, BadKernel
from execution_hosts import KINDS, in_dtype, run
from guarded_updates import OPTIMIZERS, SETTINGS, UPDATES, host_parameters, same
from torch import nn

from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.host_class import adopt
from esper.seeds.isolation import FIRST_RETRY_READINGS
from esper.seeds.maintenance import maintain
from esper.seeds.step_guard import read_step_flags
from esper.state.layer_call import LayerCall

pytestmark = pytest.mark.slow  # test_guard.py holds the same, of fewer kinds and faults


class Net(nn.Module):
    """Trainable factors before the site, and a square behind it.

    There is one for each element of the first input. A factor that several elements or inputs
    share would have its gradient summed, in an order that follows from the memory layout and the
    branches of the graph: one more branch changes it in the last bit, healthy or not.
    """

    def __init__(self, site, first):
        super().__init__()
        self.factors = nn.Parameter(torch.ones(first.shape))
        self.site = site

    def forward(self, call):
        first = call.x * self.factors if call.x.is_floating_point() else call.x
        scaled = LayerCall((first, *call.args[1:]), call.kwargs)
        return run(self.site, scaled).square().mean()


def make_net(kind):
    torch.manual_seed(0)
    return Net(adopt(kind.make_host(), name="site"), LayerCall.of(kind.make_input()).x)


def graft_bad(net, kind, fault, **options):
    """Graft a kernel of one layer that contributes 0, and switch its fault on; return it.

    It is parallel where one linear layer can be, else pointwise on the host's output.
    """
    ends = list(kind.make_kernel().children())
    if all(isinstance(end, nn.Linear) for end in (ends[0], ends[-1])) and len(ends) == 3:
        body, position = nn.Linear(ends[0].in_features, ends[-1].out_features), None
    else:
        last = list(kind.make_serial().children())[-1]
        size = last.weight.shape[0]
        pointwise = isinstance(last, nn.Linear)
        body = nn.Linear(size, size) if pointwise else type(last)(size, size, 1)
        position = "serial"
    kernel = BadKernel(body, fault)
    net.site.graft(0, kernel, alpha=1.0, position=position, example=kind.make_input(), **options)
    kernel.is_bad = True
    return kernel


def train(net, kind, case):
    """Train for a few updates; return losses, host gradients and host state as they were."""
    training, optimizer, setting = CASES[case]
    net.train(training)
    torch.manual_seed(1)
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    trace = []
    for _ in range(UPDATES):
        call = in_dtype(kind.make_input(), torch.float32)
        optimizer.zero_grad()
        loss = SETTINGS[setting](net, optimizer, lambda call=call: net(call))
        gradients = (p.grad for _, p in host_parameters(net) if p.grad is not None)
        trace += [loss.detach(), *(g.clone() for g in gradients)]
    return trace + [t.clone() for n, t in net.state_dict().items() if "_seeds." not in n]


CASES = {
    "train": (True, "sgd", "plain"),
    "eval": (False, "adamw", "clip"),
    "scaler": (True, "sgd", "scaler"),
    "closure": (True, "adamw", "closure"),
    "accumulated": (True, "sgd", "accumulated"),
}
EVERY_FAULT = ("train", "eval")
"""Cases that are tried with every fault; the others with one of each sort."""
OF_EACH_SORT = ("raises", "nan", "gradient_nan")


def tried():
    """Yield all faults in all cases; what is not of each sort, but once, takes long together."""
    for case in CASES:
        for fault in sorted(FAULTS) if case in EVERY_FAULT else OF_EACH_SORT:
            is_often = case == "train" or fault in OF_EACH_SORT
            yield pytest.param(fault, case, marks=[] if is_often else pytest.mark.torture)


@pytest.mark.parametrize(("fault", "case"), list(tried()))
@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_host_trains_as_without_the_seed(name, fault, case):
    """Losses, host gradients, weights and statistics equal those of a run without the seed."""
    kind = KINDS[name]
    expected = train(make_net(kind), kind, case)
    net = make_net(kind)
    kernel = graft_bad(net, kind, fault)
    assert same(train(net, kind, case), expected)
    assert all(torch.isfinite(p).all() for p in kernel.parameters())


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - set(FENCED)))
@pytest.mark.parametrize("name", sorted(KINDS))
def test_without_the_guard_the_host_is_spoiled(name, fault):
    """The control: with guard='off' the same faults reach the host or the kernel's weights."""
    kind = KINDS[name]
    expected = train(make_net(kind), kind, "train")
    net = make_net(kind)
    kernel = graft_bad(net, kind, fault, guard="off")
    found = train(net, kind, "train")
    is_clean = all(torch.isfinite(p).all() for p in kernel.parameters())
    assert not (same(found, expected) and is_clean)


@pytest.mark.parametrize("fault", OF_EACH_SORT)
@pytest.mark.parametrize("name", sorted(KINDS))
def test_three_faults_isolate_and_a_passed_probe_brings_back(name, fault):
    """After the third fault the layer is its host; the healthy kernel is back after the wait."""
    net = make_net(KINDS[name])
    kernel = graft_bad(net, KINDS[name], fault)
    isolate(net, KINDS[name])
    kernel.is_bad = False
    moves = [m for _ in range(FIRST_RETRY_READINGS) for m in maintain(net).transitions]

    assert [move.after for move in moves] == [SeedLifecycleState.ACTIVE]
    assert net.site.seed_kernel(0) is kernel


@pytest.mark.parametrize("fault", OF_EACH_SORT)
@pytest.mark.parametrize("name", sorted(KINDS))
def test_three_failed_probes_cull(name, fault):
    """A kernel that stays bad is gone after three probes, each twice as late."""
    net = make_net(KINDS[name])
    graft_bad(net, KINDS[name], fault)
    isolate(net, KINDS[name])
    moves = [m for _ in range(7 * FIRST_RETRY_READINGS) for m in maintain(net).transitions]

    assert [move.after for move in moves] == [SeedLifecycleState.DORMANT]


def isolate(net, kind):
    """Call a net three times, backward included, and see its seed isolated."""
    for fault in range(3):
        assert net.site.state_layout.state(0) == SeedLifecycleState.ACTIVE, fault
        net(LayerCall.of(kind.make_input())).backward()
        maintain(net)
    assert net.site.state_layout.state(0) == SeedLifecycleState.ERROR_RECOVERY
    assert not net.site.state_layout.has_active_seeds()


@pytest.mark.parametrize("fault", ["nan", "gradient_of_weight"])
@pytest.mark.parametrize("name", sorted(KINDS))
def test_the_step_guard_isolates_at_the_step(name, fault):
    """Under guard='step' one bad step is flagged, and the seed is out at once."""
    net = make_net(KINDS[name])
    net.site.enable_step_guard()
    graft_bad(net, KINDS[name], fault, guard="step")
    net(LayerCall.of(KINDS[name].make_input())).backward()

    assert [f.seed_idx for f in read_step_flags([net.site])] == [0]
    assert net.site.state_layout.state(0) == SeedLifecycleState.ERROR_RECOVERY
