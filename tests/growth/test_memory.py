"""What a trial needs of memory: told by part, and as much as a real one takes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from growing import compute_loss, growing, train, wrapped
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper.growth.memory import available_bytes, estimate, saved_for_backward
from esper.growth.policies import Never

FLOAT = 4


def trained(**layer):
    """A linear layer of 100 by 50 with a norm, after a step of AdamW."""
    model = nn.Sequential(nn.Linear(100, 50, **layer), nn.BatchNorm1d(50))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(8, 100, dtype=layer.get("dtype"))).sum().backward()
    optimizer.step()
    return model, optimizer


def test_every_part_is_told():
    """Of two twins: copies, buffers, moments, gradients, and averages of three arms."""
    model, optimizer = trained()
    found = estimate(model, optimizer, num_twins=2, activation_bytes=77)
    own = FLOAT * (100 * 50 + 50 + 50 + 50)
    buffers = FLOAT * (50 + 50) + 8
    assert found.parameters == found.gradients == 2 * own
    assert found.buffers == 2 * buffers
    assert found.moments == 2 * (2 * own + 4 * FLOAT)  # a count of steps each
    assert found.averages == 3 * (own + FLOAT * 100)
    assert found.activations == 77
    parts = (found.parameters, found.gradients, found.buffers, found.moments, found.averages)
    assert found.snapshot == own + buffers + 2 * own + 4 * FLOAT
    assert found.total == sum(parts) + max(77, found.snapshot)


def test_a_package_is_in_every_twin_and_not_in_the_live_run():
    """With moments, gradients and averages as the host's parameters have them."""
    model, optimizer = trained()
    without = estimate(model, optimizer, num_twins=2)
    with_it = estimate(model, optimizer, num_twins=2, package_parameters=1000)
    added = 2 * 1000 * FLOAT
    assert with_it.parameters - without.parameters == added
    assert with_it.gradients - without.gradients == added
    assert with_it.averages - without.averages == added
    assert with_it.moments - without.moments == pytest.approx(2 * added, rel=0.01)


def test_frozen_parameters_have_no_gradient():
    """They are copied and averaged all the same."""
    model, optimizer = trained()
    whole = estimate(model, optimizer, num_twins=1)
    model[0].requires_grad_(requires_grad=False)
    found = estimate(model, optimizer, num_twins=1)
    assert found.parameters == whole.parameters
    assert found.gradients == FLOAT * 100


def test_averages_of_half_precision_are_float32():
    """As they are kept."""
    halves = estimate(nn.Linear(10, 10, dtype=torch.bfloat16), no_optimizer(), num_twins=1)
    assert halves.parameters == 2 * 110
    assert halves.averages == 2 * 4 * 110


def no_optimizer():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def test_without_twins_nothing_is_needed():
    """But for what an update keeps."""
    assert estimate(*trained(), num_twins=0).total == 0


def saved_of(function, model):
    with saved_for_backward(model) as saved:
        function()
    return saved.size_bytes


def test_what_a_forward_keeps_is_counted_once_by_storage():
    """Input and hidden values; views and parameters are nothing more."""
    model = nn.Sequential(nn.Linear(100, 50), nn.Tanh(), nn.Linear(50, 10))
    x = torch.randn(8, 100)
    assert saved_of(lambda: model(x).sum(), model) == FLOAT * 8 * (100 + 50)
    x = torch.randn(8, 50, requires_grad=True)
    assert saved_of(lambda: x.exp() * x.T.T, model) == 2 * FLOAT * 8 * 50


def test_what_a_checkpoint_computes_again_is_not_kept():
    """Only what it begins with."""
    model = nn.Sequential(nn.Linear(64, 64), *(nn.Tanh() for _ in range(10)))
    x = torch.randn(32, 64, requires_grad=True)
    whole = saved_of(lambda: model(x), model)
    kept = saved_of(lambda: checkpoint(model, x, use_reentrant=False), model)
    assert kept == FLOAT * 32 * 64
    assert whole > 5 * kept


def test_counting_changes_no_gradient():
    """Bit for bit."""
    model, optimizer = wrapped()
    gradients = []
    for counts in (False, True):
        optimizer.zero_grad()
        batch = torch.arange(32)
        if counts:
            with saved_for_backward(model):
                compute_loss(model, batch).backward()
        else:
            compute_loss(model, batch).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_run_knows_what_an_update_keeps_from_its_first_batch_on():
    """Measured in the pass that tries the loss."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=Never())
    assert grower._run.activation_bytes == 0
    train(model, optimizer, 1, grower)
    expected = saved_of(lambda: compute_loss(model, torch.arange(32)), model)
    assert grower._run.activation_bytes == expected > 0


def test_a_trial_that_does_not_fit_is_named_with_its_parts():
    """And with the cure; one that fits, or whose room nobody knows, is not."""
    found = estimate(*trained(), num_twins=2)
    assert "a trial needs 0 MB of memory (parameters 0 MB" in found.shortage(1000)
    assert 'trial="shadow"' in found.shortage(1000)
    assert found.shortage(found.total) is None
    assert found.shortage(None) is None


def test_memory_that_is_left_is_asked_of_the_system():
    """Where it can be read: of the meta device nobody knows."""
    left = available_bytes(torch.device("cpu"))
    assert left is None or 0 < left < 1 << 50
    assert available_bytes(torch.device("meta")) is None


@pytest.mark.slow
@pytest.mark.parametrize("batch", [64, pytest.param(2048, marks=pytest.mark.torture)])
def test_a_real_trial_takes_what_was_estimated(batch):
    """Two twins with averages, one after another, and a switch, by the process's own peak.

    Within a fifth; most of it is copies in the one case and activations in the other.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(REAL_TRIAL), str(batch)],
        capture_output=True,
        text=True,
        check=True,
        env={"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH},
    )
    estimated, taken = map(int, done.stdout.split())
    assert estimated == pytest.approx(taken, rel=0.2)


PATH = ":".join(path for path in sys.path if path)
REAL_TRIAL = """
    import copy, resource, sys
    import torch
    from torch import nn
    from esper.continuity.ensemble import joined
    from esper.continuity.snapshot import RunSnapshot
    from esper.growth.memory import estimate, saved_for_backward

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = [part for _ in range(10) for part in (nn.Linear(1024, 1024), nn.Tanh())]
    model = nn.Sequential(nn.Linear(256, 1024), nn.Tanh(), *hidden, nn.Linear(1024, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(int(sys.argv[1]), 256)

    def update(model, optimizer):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    def peak():
        # getrusage would have the memory that the tests' own process had when it forked
        lines = open("/proc/self/status").read().splitlines()
        return 1024 * next(int(l.split()[1]) for l in lines if l.startswith("VmHWM:"))

    def resident():
        fields = open("/proc/self/statm").read().split()
        return int(fields[1]) * resource.getpagesize()

    update(model, optimizer)
    with saved_for_backward(model) as saved:
        model(x).square().mean()
    found = estimate(
        model, joined(optimizer), num_twins=2, activation_bytes=saved.size_bytes
    ).total

    before = resident()
    twins = []
    for _ in range(2):
        memo = {}
        twin = copy.deepcopy(model, memo)
        own = torch.optim.AdamW(twin.parameters(), lr=1e-3)
        for p, state in optimizer.state.items():
            own.state[memo[id(p)]] = {k: v.clone() for k, v in state.items()}
        twins.append((twin, own))
    arms = [model, *(twin for twin, _ in twins)]
    averages = [[p.detach().clone() for p in m.parameters()] for m in arms]
    for twin, own in twins:
        update(twin, own)
    snapshot = RunSnapshot(model, joined(optimizer), update=2)
    print(found, max(peak(), resident()) - before)
"""
