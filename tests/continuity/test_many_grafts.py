"""Grafts that are taken back, however many, leave the run as it was, and nothing behind."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import esper
from esper.continuity.ensemble import joined
from esper.continuity.optimizer import remove_parameters
from esper.continuity.snapshot import RunSnapshot
from esper.growth.rehearsal import run_digest

WIDTH = 6
KERNEL = f"mlp-{WIDTH}x{WIDTH}-w32"


def a_run():
    torch.manual_seed(0)
    host = [nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.1)]
    model = esper.wrap(nn.Sequential(*host, nn.Linear(WIDTH, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    esper.sync_optimizer(model, optimizer)
    step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, WIDTH)).square().mean().backward()
    optimizer.step()


def grafted_and_taken_back(model, optimizer, *, restores=True):
    """Graft, train an update, take the kernel out, and put the run back."""
    layer = model[0]
    before = RunSnapshot(model, joined(optimizer), update=1)
    layer.graft(0, KERNEL, example=torch.randn(8, WIDTH))
    esper.sync_optimizer(model, optimizer)
    step(model, optimizer)
    kernel = list(layer.get_submodule("_seeds").parameters())
    layer.unload_kernel(0)
    remove_parameters(joined(optimizer), kernel)
    if restores:
        before.restore(joined(optimizer))
    optimizer.zero_grad()


def digest(model, optimizer):
    """Return the digest of all but the counters of a layer, which count on."""
    found = run_digest(SimpleNamespace(model=model, optimizer=joined(optimizer)))
    return {name: value for name, value in found.items() if not name.endswith("_kasmina")}


def left_behind(model, optimizer):
    """Count what a graft could leave: parameters, hooks, state, threads, files."""
    hooks = [
        *(len(v) for k, v in vars(optimizer).items() if k.startswith("_optimizer_")),
        *(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    ]
    return {
        "parameters": len(list(model.parameters())),
        "groups": [len(group["params"]) for group in optimizer.param_groups],
        "state": len(optimizer.state),
        "hooks": hooks,
        "threads": threading.active_count(),
        "files": sum(1 for _ in Path("/proc/self/fd").iterdir()),
    }


def count():
    """Return how many tensors and modules are alive."""
    gc.collect()
    kinds = (torch.Tensor, nn.Module)
    return sum(issubclass(type(each), kinds) for each in gc.get_objects())


MANY = [pytest.param(num, marks=pytest.mark.torture) for num in (100, 10_000)]


@pytest.mark.parametrize("num", [20, *MANY])
def test_grafts_that_are_taken_back_leave_nothing(num):
    """The digest of the run, every count, and the tensors and modules that are alive."""
    model, optimizer = a_run()
    grafted_and_taken_back(model, optimizer)  # what is learned once, such as the layer's example
    expected, counts, objects = digest(model, optimizer), left_behind(model, optimizer), count()
    for _ in range(num):
        grafted_and_taken_back(model, optimizer)
    assert digest(model, optimizer) == expected
    left = left_behind(model, optimizer)
    for name in ("threads", "files"):  # those of earlier tests may end meanwhile
        assert left.pop(name) <= counts.pop(name)
    assert left == counts
    assert count() - objects <= 8


def test_control_without_the_snapshot_the_run_is_another():
    """What an update changed stays changed."""
    model, optimizer = a_run()
    expected = digest(model, optimizer)
    grafted_and_taken_back(model, optimizer, restores=False)
    assert digest(model, optimizer) != expected
