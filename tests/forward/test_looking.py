"""Where numbers lie in host memory a guard looks at them, and a call that is clean costs little."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import esper
from esper.forward.finiteness import seen_finite
from esper.seeds.maintenance import maintain

INF, NAN = torch.inf, torch.nan
LARGE = torch.finfo(torch.float32).max


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("values", [[INF], [-INF], [NAN], [INF, -INF], [1.0, NAN, 2.0]])
def test_what_is_not_finite_is_never_seen_to_be(values, dtype):
    """Whatever cancels whatever."""
    assert not seen_finite(torch.tensor([0.5, *values, -0.5], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_values_are_seen_in_host_memory(dtype):
    """Half precision is summed in single, where 40,000 times 60,000 is a number."""
    assert seen_finite(torch.full((200, 200), 60_000.0, dtype=dtype))
    assert seen_finite(torch.zeros(0, dtype=dtype))


def test_a_sum_that_overflows_says_nothing():
    """The careful way decides then."""
    assert not seen_finite(torch.full((4,), LARGE))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_nobody_looks_elsewhere():
    """Neither on a device, nor at a subclass, nor in what is traced."""
    assert not seen_finite(torch.zeros(4, device="meta"))
    assert not seen_finite(nn.Buffer(torch.zeros(4)).as_subclass(type("Own", (torch.Tensor,), {})))
    seen = []

    def look(x):
        seen.append(seen_finite(x))
        return x + 1

    torch.jit.trace(look, torch.zeros(4), check_trace=False)
    assert seen == [False]


class Counting(TorchDispatchMode):
    """Counts operations by their names."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def grafted(guard, num_seeds=1):
    torch.manual_seed(0)
    net = esper.wrap(nn.Sequential(nn.Linear(64, 64)), num_seeds=num_seeds)
    net[0].enable_step_guard()
    x = torch.randn(64, 64)
    for i in range(num_seeds):
        net[0].graft(i, nn.Linear(64, 64), alpha=0.5, example=x, guard=guard)
    return net, x


@pytest.mark.parametrize(("guard", "most"), [("step", 3), ("always", 3), ("off", 0)])
def test_a_clean_call_is_looked_at_once(guard, most, monkeypatch):
    """It has a sum and its reading more than the formula; without the look it has many more."""
    net, x = grafted(guard)
    plain, kernel = net[0].default_layer, net[0].seed_kernel(0)
    alpha = torch.tensor(0.5)

    def count(call):
        with torch.no_grad(), Counting() as counting:
            call()
        return len([name for name in counting.names if "detach" not in name])

    by_hand = count(lambda: plain(x) + alpha * kernel(x))
    assert count(lambda: net(x)) - by_hand <= most
    if guard != "off":
        monkeypatch.setattr("esper.forward.value_gates.seen_finite", lambda y: False)
        assert count(lambda: net(x)) - by_hand > most


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("guard", ["step", "always"])
def test_looking_changes_no_bit(guard, num_seeds, monkeypatch):
    """Outputs and all gradients are those of a guard that does not look."""

    def trained(net, x):
        x = x.clone().requires_grad_()
        y = net(x)
        (y * y.detach().cos()).sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in net.parameters())]

    net, x = grafted(guard, num_seeds)
    other = copy.deepcopy(net)
    looking = trained(net, x)
    monkeypatch.setattr("esper.forward.value_gates.seen_finite", lambda y: False)
    for ours, theirs in zip(looking, trained(other, x), strict=True):
        assert torch.equal(ours, theirs)
    assert not maintain(net).faults


def test_a_second_derivative_goes_through_a_sum_that_was_looked_at():
    """Its hook remembers first derivatives only."""
    net, x = grafted("always")
    x = x[:2].requires_grad_()
    first = torch.autograd.grad(net(x).tanh().sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), x)[0]
    assert bool(second.isfinite().all())
    assert bool(second.any())
    assert not maintain(net).faults


@pytest.mark.parametrize("guard", ["step", "always"])
def test_a_host_that_another_seed_replaces_is_looked_at_by_itself(guard):
    """The sum is finite, since nothing of the host is in it; its NaN still counts nothing."""
    torch.manual_seed(0)
    net = esper.wrap(nn.Sequential(nn.Linear(4, 4)), num_seeds=2)
    net[0].enable_step_guard()
    x = torch.randn(5, 4)
    net[0].graft(0, nn.Linear(4, 4), alpha=1.0, mode="replace", example=x, guard=guard)
    net[0].graft(1, nn.Linear(4, 4), alpha=0.5, example=x, guard=guard)
    with torch.no_grad():
        net[0].weight.fill_(torch.nan)
        assert bool(net(x).isfinite().all())
    marks = [seed.seen.calls[-1].marks for seed in net[0]._kasmina.seeds.values()]
    assert [bool(host.isnan()) for host, _ in marks] == [True, True]
