"""Recorded gradients are those of each sample's own loss, however a loop computes them."""

from __future__ import annotations

import pytest
import torch
from growing import GATE_X, GATE_Y, SHORT, X, Y, batches
from torch import nn

import esper
from esper.growth.policies import EveryN
from esper.growth.recording import Recorder


def host():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1), nn.Flatten(0))


def losses(model, batch):
    return (model(X[batch]).float() - Y[batch]).square()


class Scaler(torch.amp.GradScaler):
    """A framework's own, which overrides a step."""

    def step(self, optimizer, *args, **kwargs):
        return super().step(optimizer, *args, **kwargs)


class Rankings:
    def __init__(self):
        self.gains = []

    def publish(self, event):
        if event.kind == "ranked":
            self.gains.append({(r["site"], r["blueprint"]): r["gain"] for r in event.rows})


def gains(scaler, *, num=12, clips=False):
    """Train under a scaler and return the first ranking."""
    model = esper.wrap(host())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = Rankings()
    grower = esper.Grower(
        model,
        optimizer,
        compute_loss=lambda m, b: losses(m, b).mean(),
        evaluate=lambda m: (m(GATE_X) - GATE_Y).square(),
        policy=EveryN(5),
        sink=seen,
        horizon=1000,
        **SHORT,
    )
    for batch in batches(num):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = losses(model, batch).mean()
        scaler.scale(loss).backward()
        if clips:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
        grower.step(loss, batch=batch)
    grower.close()
    return seen.gains[0]


@pytest.fixture(scope="module")
def unscaled():
    return gains(torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.parametrize("scale", [2.0, 2.0**10, 2.0**15])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("make", [torch.amp.GradScaler, Scaler])
def test_gains_are_those_without_a_scale(unscaled, scale, clips, make):
    """Whatever the scale, and whether the loop unscales by hand before it clips."""
    found = gains(make("cpu", init_scale=scale, growth_interval=10**6), clips=clips)
    assert list(found) == list(unscaled)
    assert found == pytest.approx(unscaled, rel=0.02)


def test_gains_do_not_depend_on_a_scale_that_changes(unscaled):
    """Each update is brought to true units by the scale that it had."""
    found = gains(torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1))
    assert found == pytest.approx(unscaled, rel=0.02)


def recorded(model, parts, *, divide, calls=None, share_kept=1.0):
    """Record one update made of micro-batches; every sample is kept."""
    recorder = Recorder({"0": model[0], "2": model[2]}, samples_per_step=64)
    with recorder:
        for part in parts:
            (losses(model, part).mean() / divide).backward()
        num_batches = len(parts) if calls is None else calls
        recorder.end_update(num_batches=num_batches, share_kept=share_kept)
    return {name: torch.cat(o.gradients) for name, o in recorder.observations.items()}


@pytest.mark.parametrize("calls", [None, 1])
def test_micro_batches_of_an_update_are_as_one_batch(calls):
    """Whether step is called for each of them, or once for the update."""
    model, batch = host(), torch.arange(48)
    whole = recorded(model, [batch], divide=1)
    parts = recorded(model, batch.split(12), divide=4, calls=calls)
    for name, wanted in whole.items():
        torch.testing.assert_close(parts[name], wanted)


def test_layer_called_twice_in_a_forward_is_no_micro_batch():
    """The site that was called least says how many backwards there were."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.inner(self.inner(x))).flatten()

    torch.manual_seed(0)
    model, batch = Twice(), torch.arange(24)
    found = []
    for parts in ([batch], batch.split(12)):
        with Recorder({"i": model.inner, "h": model.head}, samples_per_step=64) as recorder:
            for part in parts:
                (losses(model, part).mean() / len(parts)).backward()
            recorder.end_update()
        found.append(recorder.observations["h"].gradients)
    torch.testing.assert_close(*map(torch.cat, found))


def test_micro_batches_that_were_thrown_away_are_not_recorded():
    """A step that a scaler skipped leaves gradients of another scale behind."""
    model, batch = host(), torch.arange(48)
    kept = recorded(model, [batch[24:]], divide=1)
    both = recorded(model, batch.split(24), divide=1, calls=1, share_kept=0.5)
    for name, wanted in kept.items():
        torch.testing.assert_close(both[name], wanted)


def test_half_precision_gradient_does_not_overflow_in_a_product():
    """Large finite gradients of half precision times a batch are finite."""
    layer = nn.Linear(2, 2).half()
    x = torch.zeros(64, 2, dtype=torch.float16)
    with Recorder({"0": layer}, samples_per_step=64) as recorder:
        layer(x).backward(torch.full((64, 2), 3e4, dtype=torch.float16))
    (gradient,) = recorder.observations["0"].gradients
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, torch.full((64, 2), 3e4).half().float() * 64)


def test_skipped_steps_of_a_scaler_are_left_out_of_the_ranking(unscaled):
    """A scale that grows till it overflows costs steps, and changes no unit."""
    found = gains(torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=2), num=30)
    assert found.keys() == unscaled.keys()
    best = max(unscaled, key=unscaled.get)
    assert 0.5 < found[best] / unscaled[best] < 2
