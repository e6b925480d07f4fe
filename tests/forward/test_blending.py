"""The graft's formula and its counts, on seeds whose kernels and shares are known exactly."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from esper.execution.host_class import adopt
from esper.forward import blending
from esper.state.layer_record import RECORD


class Times(nn.Module):
    """A kernel that gives its input times a number, or fails."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.is_bad = False

    def forward(self, x):
        if self.is_bad:
            raise RuntimeError("this kernel fails on purpose")
        return x * self.factor


@pytest.fixture
def layer():
    """A layer with four seeds whose host hands its input on, and the telemetry on."""
    host = nn.Linear(2, 2, bias=False)
    nn.init.eye_(host.weight)
    return adopt(host, name="site", num_seeds=4, telemetry_enabled=True)


X = torch.tensor([[1.0, -2.0]])


def graft(layer, seed_idx, factor, **options):
    kernel = Times(factor)
    layer.graft(seed_idx, kernel, example=X, **options)
    return kernel


def test_replacing_shares_take_their_alphas_from_the_host(layer):
    """With 1/4 and 1/2 replaced and 1/8 added: y = h/4 + 3h/4 + 5h/2 + 7h/8."""
    graft(layer, 0, 3.0, alpha=0.25, mode="replace")
    graft(layer, 1, 5.0, alpha=0.5, mode="replace")
    graft(layer, 2, 7.0, alpha=0.125)
    assert torch.equal(layer(X), X * (0.25 + 0.75 + 2.5 + 0.875))


def test_hosts_output_that_is_wholly_replaced_counts_nothing(layer):
    """Not even where it is infinite: two shares that sum to 1 leave the host no part."""
    graft(layer, 0, 0.0, alpha=0.5, mode="replace", guard="off")
    graft(layer, 1, 0.0, alpha=0.5, mode="replace", guard="off")
    with torch.no_grad():
        layer.weight.fill_(torch.inf)
    assert torch.equal(layer(X * 0 + 1.0), torch.zeros(1, 2))


def test_kernel_that_fails_leaves_the_formula_over_the_others(layer):
    """In front of a good one, too, and a replacing one gives its weight back to the host."""
    graft(layer, 0, 3.0, alpha=0.25, mode="replace").is_bad = True
    graft(layer, 1, 5.0, alpha=0.5)
    assert torch.equal(layer(X), X + 2.5 * X)


@pytest.fixture
def process_group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_kernel_that_fails_among_several_processes_has_gradients_of_zero(layer):
    """The others wait for one; the output is that of the formula over the others all the same."""
    kernel = graft(layer, 0, nn.Parameter(torch.tensor(3.0)), alpha=0.5)
    kernel.is_bad = True
    y = layer(X)
    assert torch.equal(y, X)
    y.sum().backward()
    assert torch.equal(kernel.factor.grad, torch.tensor(0.0))


def test_kernels_are_counted_call_by_call(layer):
    """Two kernels in five calls are ten executions; without telemetry nothing is counted."""
    graft(layer, 0, 3.0, alpha=0.25)
    graft(layer, 1, 5.0, alpha=0.5)
    for _ in range(5):
        layer(X)
    record = getattr(layer, RECORD)
    assert (record.active_count, record.kernel_execution_count) == (5, 10)
    layer.telemetry_enabled = False
    layer(X)
    assert (record.active_count, record.kernel_execution_count) == (5, 10)


def test_first_of_64_calls_is_timed(layer, monkeypatch):
    """In microseconds, of each kernel by itself; the 65th call is the next."""
    graft(layer, 0, 3.0, alpha=0.25)
    graft(layer, 2, 5.0, alpha=0.5)
    now_s = iter([1.0, 1.25, 2.0, 2.5, 3.0, 3.75, 4.0, 5.0])
    monkeypatch.setattr(blending.time, "perf_counter", lambda: next(now_s))
    for num_calls in (1, 63):
        for _ in range(num_calls):
            layer(X)
        assert layer.state_layout.exec_latency_us.tolist() == [250_000, 0, 500_000, 0]
    layer(X)
    assert layer.state_layout.exec_latency_us.tolist() == [750_000, 0, 1_000_000, 0]


def test_health_is_the_share_of_calls_without_a_fault(layer):
    """A timed call of a kernel that failed in one of four calls records 3/4."""
    graft(layer, 1, 3.0, alpha=0.25)
    layer.state_layout.record_calls(1, [True, False, False, False])
    assert layer.state_layout.health(1) is None
    start_s = time.perf_counter()
    assert torch.equal(layer(X), 1.75 * X)
    latency_us = int(layer.state_layout.exec_latency_us[1])
    assert 0 <= latency_us <= (time.perf_counter() - start_s) * 1e6
    assert layer.state_layout.health(1) == pytest.approx(0.75)
