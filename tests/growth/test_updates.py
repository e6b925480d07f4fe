"""Watching updates: which steps are one, with which batches, and at which rates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper.continuity.warmup import UpdateFactor
from esper.growth.updates import UpdateWatcher


def factor_of(optimizer):
    return UpdateFactor(optimizer, warmup_updates=2, hooks=False)


def watched(**settings):
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, **settings)
    return layer, optimizer, UpdateWatcher(optimizer, factor_of(optimizer))


def step(layer, optimizer, *, gradients=True):
    optimizer.zero_grad()
    if gradients:
        layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_micro_batches_are_those_of_their_update():
    """Steps without an optimizer step are collected until there is one."""
    layer, optimizer, watcher = watched()
    for first in (0, 3):
        assert watcher.step(first) is None
        assert watcher.step(first + 1) is None
        step(layer, optimizer)
        assert watcher.step(first + 2) == [first, first + 1, first + 2]
    assert watcher.updates == 2


def test_a_step_without_a_batch_is_an_update_all_the_same():
    """Then its batches are none, and not an update's that is missing."""
    layer, optimizer, watcher = watched()
    step(layer, optimizer)
    assert watcher.step(None) == []
    assert watcher.updates == 1


def test_a_step_whose_gradients_were_thrown_away_is_no_update():
    """Its batches are not those of the next one."""
    layer, optimizer, watcher = watched()
    step(layer, optimizer, gradients=False)
    assert watcher.step("thrown away") is None
    assert watcher.num_steps_of_optimizer == 0
    step(layer, optimizer)
    assert watcher.step("kept") == ["kept"]
    assert watcher.updates == 1


def test_a_step_that_the_scaler_skipped_is_no_update():
    """The next one is."""
    layer, optimizer, watcher = watched()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for value in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(layer(torch.full((1, 2), value)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert watcher.num_steps_of_optimizer == 1


def test_a_step_is_told_to_the_warm_up():
    """As hooks of its own would: the second update is a half of what it is without."""
    for warms in (True, False):
        layer, optimizer, watcher = watched()
        if warms:
            watcher._factor.add(layer.parameters())
        first = layer.bias.detach().clone()
        step(layer, optimizer)
        middle = layer.bias.detach().clone()
        assert torch.equal(first, middle) is warms
        step(layer, optimizer)
        torch.testing.assert_close(middle - layer.bias, torch.full((2,), 0.25 if warms else 0.5))


def test_batches_of_a_skipped_step_are_left_out_by_their_number():
    """GradScaler skips a step without calling a hook; updates have as many batches as usual."""
    layer, optimizer, watcher = watched()
    step(layer, optimizer)
    assert watcher.step("first") == ["first"]
    assert watcher.step("skipped") is None
    step(layer, optimizer)
    assert watcher.step("next") == ["next"]


def test_rates_are_those_of_the_update():
    """Not those that a scheduler set after it."""
    layer, optimizer, watcher = watched()
    assert watcher.rates == []
    step(layer, optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    watcher.step(None)
    assert watcher.rates == [0.5]


def test_the_peak_is_the_highest_rate_so_far():
    """A group that came later has its own, read off what its scheduler left there."""
    layer, optimizer, watcher = watched()
    assert watcher.peaks == [0.5]
    for rate in (0.2, 0.8, 0.1):
        optimizer.param_groups[0]["lr"] = rate
        step(layer, optimizer)
    late = nn.Linear(2, 2)
    optimizer.add_param_group({"params": late.parameters(), "lr": 0.01, "initial_lr": 0.3})
    step(layer, optimizer)
    assert watcher.peaks == [0.8, 0.3]


def test_a_closed_watcher_leaves_no_hook():
    """And no step counts any more."""
    layer, optimizer, watcher = watched()
    assert optimizer._optimizer_step_pre_hooks
    watcher.close()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    step(layer, optimizer)
    assert watcher.step(None) is None


@pytest.mark.parametrize("num_steps", [1, 5])
def test_updates_are_counted_where_step_is_called_late(num_steps):
    """Several optimizer steps before one call of step are one look, and all are counted."""
    layer, optimizer, watcher = watched()
    for _ in range(num_steps):
        step(layer, optimizer)
    assert watcher.step("batch") == ["batch"]
    assert watcher.updates == num_steps
