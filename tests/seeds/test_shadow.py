"""A shadow pass leaves no trace: the run is bit-equal to one that never auditioned."""

import copy
import queue
import random

import numpy as np
import pytest
import torch
from torch import nn

from esper.execution.host_class import adopt
from esper.seeds.maintenance import maintain
from esper.seeds.shadow import in_shadow_pass, shadow_pass
from esper.seeds.step_guard import read_step_flags
from esper.state.kernel import prepare_kernel
from esper.state.layer_record import record_of


class Net(nn.Module):
    """Dropout and batch norm around a site: everything that a stray pass would disturb."""

    def __init__(self):
        super().__init__()
        self.site = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(5, 3)
        self.register_buffer("alias", self.norm.running_mean)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.site(x)))))


def make_net():
    torch.manual_seed(0)
    net = Net()
    adopt(net.site, name="site")
    adopt(net.head, name="head")
    return net


def audition(net, kernel, x, target):
    """Do one shadow pass; return the gradients of the kernel."""
    prepared = prepare_kernel(net.site, kernel)
    with shadow_pass(net), net.site.shadow(0, prepared):
        loss = nn.functional.cross_entropy(net(x), target)
        return torch.autograd.grad(loss, list(kernel.parameters()))


def train(net, between):
    """Train for ten updates; `between` runs after each. Returns everything there is."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(10):
        x, target = torch.randn(6, 4), torch.randint(3, (6,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), target).backward()
        optimizer.step()
        between(net, x, target)
    gradients = [p.grad for p in net.parameters()]
    return [*net.state_dict().values(), *gradients, torch.get_rng_state()]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_an_audition_leaves_the_run_bit_equal():
    """Weights, statistics, gradients and random state equal those of a run without auditions."""
    kernel = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.2), nn.Linear(3, 5))
    learned = copy.deepcopy(kernel)
    expected = train(make_net(), lambda *_: None)
    found = train(make_net(), lambda net, x, target: audition(net, learned, x, target))
    assert equal(found, expected)


def test_a_pass_outside_of_shadow_pass_is_seen():
    """The control: the same pass without shadow_pass disturbs statistics and random state."""
    expected = train(make_net(), lambda *_: None)
    found = train(make_net(), lambda net, x, target: net(x))
    assert not equal(found, expected)


def test_the_kernel_gets_gradients_and_is_no_part_of_the_model():
    """In shadow the kernel learns, while parameters() and state_dict() do not know it."""
    net, kernel = make_net(), nn.Linear(4, 5)
    names = [n for n, _ in net.named_parameters()]
    keys = list(net.state_dict())
    with net.site.shadow(0, kernel):
        assert [n for n, _ in net.named_parameters()] == names
        assert list(net.state_dict()) == keys
    gradients = audition(net, kernel, torch.randn(6, 4), torch.randint(3, (6,)))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_a_shadow_contributes_beside_active_seeds():
    """The output in shadow is the formula over the seeds that are there and the shadow."""
    net, x = make_net(), torch.randn(6, 4)
    site, active, tried = net.site, nn.Linear(4, 5), nn.Linear(4, 5)
    site.graft(1, active, alpha=0.5, example=x)
    with site.shadow(0, tried, alpha=0.25):
        found = site(x)
    assert torch.equal(found, site.default_layer(x) + 0.25 * tried(x) + 0.5 * active(x))


def test_a_shadow_takes_the_place_of_the_kernel_in_its_seed():
    """Trying an exchange leaves out the kernel that stands there, and puts it back after."""
    net, x = make_net(), torch.randn(6, 4)
    site, active, tried = net.site, nn.Linear(4, 5), nn.Linear(4, 5)
    site.graft(0, active, alpha=0.5, example=x)
    with site.shadow(0, tried):
        assert torch.equal(site(x), site.default_layer(x) + tried(x))
    assert torch.equal(site(x), site.default_layer(x) + 0.5 * active(x))


def test_layers_may_be_in_shadow_at_once_and_leave_it_by_exception():
    """Nested shadows on several layers end in any case, with the classes as before."""
    net, x = make_net(), torch.randn(6, 4)
    before = (type(net.site), type(net.head))

    def fail():
        with (
            shadow_pass(net),
            net.site.shadow(0, nn.Linear(4, 5)),
            net.head.shadow(0, nn.Linear(5, 3)),
        ):
            net(x)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert (type(net.site), type(net.head)) == before
    assert not in_shadow_pass()


def test_hooks_are_told():
    """Forward hooks run in a shadow pass, and in_shadow_pass() is True there only."""
    net, seen = make_net(), queue.SimpleQueue()
    net.norm.register_forward_hook(lambda *_: seen.put(in_shadow_pass()))
    net(torch.randn(6, 4))
    with shadow_pass(net):
        net(torch.randn(6, 4))
    assert [seen.get_nowait(), seen.get_nowait()] == [False, True]


def test_shared_buffers_stay_shared_and_come_back():
    """Inside, a buffer with two names is one clone; after, both names hold the original."""
    net = make_net()
    original = net.norm.running_mean
    with shadow_pass(net):
        assert net.alias is net.norm.running_mean
        assert net.alias is not original
    assert net.alias is original
    assert net.norm.running_mean is original


def test_random_states_of_numpy_and_python_come_back():
    """Augmentation inside a shadow pass draws nothing from the run's generators."""
    states = random.getstate(), np.random.get_state()[1].copy()
    with shadow_pass(make_net()):
        random.random()
        np.random.rand()
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()


def test_a_kernel_that_was_in_shadow_is_grafted_without_an_example():
    """The Grower's way: auditioned, trained, then grafted at alpha 0 at once, and ramped."""
    net, kernel = make_net(), nn.Linear(4, 5)
    prepared = prepare_kernel(net.site, kernel)
    net.site.reserve(0)
    with shadow_pass(net), net.site.shadow(0, prepared):
        net(torch.randn(6, 4))
    net.site.graft(0, prepared, alpha=0.0)
    assert net.site.seed_kernel(0) is kernel
    net.site.set_alpha(0, 0.5)
    x = torch.randn(6, 4)
    assert torch.equal(net.site(x), net.site.default_layer(x) + 0.5 * kernel(x))


def test_an_encoder_layer_does_not_bypass_a_seed():
    """nn.TransformerEncoderLayer's fused evaluation path is off while a child contributes."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    site = adopt(encoder.linear1, name="linear1")
    x, example = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    with torch.no_grad():
        bare = encoder(x)
        with site.shadow(0, nn.Linear(8, 16)):
            assert not torch.allclose(encoder(x), bare)
        site.graft(0, nn.Linear(8, 16), alpha=1.0, example=example)
        assert not torch.allclose(encoder(x), bare)
        site.unload_kernel(0)
        assert torch.equal(encoder(x), bare)


class Sensitive(nn.Module):
    """A kernel that fails on large inputs, in the way that is asked for."""

    def __init__(self, fault):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5))
        self.fault = fault

    def forward(self, x):
        if x.abs().max() > 1e3:
            if self.fault == "raises":
                raise RuntimeError("too large")
            return x @ self.weight.T + torch.nan
        return x @ self.weight.T


@pytest.mark.parametrize("guard", ["always", "step"])
@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_what_an_audition_feeds_to_other_seeds_is_not_held_against_them(fault, guard):
    """A seed behind the auditioned one is fed nonsense: not counted, not timed, not isolated."""
    net = make_net()
    record = record_of(net.head)
    net.head.enable_step_guard()
    record.telemetry_enabled = True
    net.head.graft(0, Sensitive(fault), alpha=1.0, guard=guard, example=torch.randn(6, 5))
    net.eval()
    loud = nn.Linear(4, 5)
    with torch.no_grad():
        loud.weight.fill_(1e6)
    x, target = torch.randn(6, 4), torch.randint(3, (6,))
    net(x).sum().backward()
    counted = record.forward_count, record.kernel_execution_count
    for _ in range(3):
        audition(net, loud, x, target)
    assert (record.forward_count, record.kernel_execution_count) == counted
    assert read_step_flags([net.head]) == []
    report = maintain(net)
    assert (report.faults, report.transitions) == ((), ())
    with net.site.shadow(0, prepare_kernel(net.site, loud)):
        net(x)
    assert maintain(net).faults[0].faults == 1
