"""Trials: a refused one leaves the run as if it had never been, whatever the run is made of."""

from __future__ import annotations

import contextlib
import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from growing import SHORT, batches
from torch import nn
from trial_hosts import HOSTS, Running, held_out, mean_loss, network, site_of

import esper
from esper.continuity.ensemble import joined
from esper.growth.rehearsal import run_digest
from esper.growth.twins import Twin
from esper.state.set_aside import Apart

UPDATES = 60
"""In so many a package that is named by hand has its verdict."""
SKIPS = {"loss scale": 80}
"""Where some are skipped it takes more."""


def seeded():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def grower_of(run, site="0", blueprint="mlp-4x8-w32", **settings):
    """Return a controller that refuses what was named by hand."""
    options = {"policy": esper.ByHand([(site, blueprint)]), "min_effect": 1e9, **settings}
    return esper.Grower(
        run.given,
        run.optimizer,
        compute_loss=run.compute_loss,
        evaluate=held_out,
        **{**SHORT, **options},
    )


def digest(run):
    """Return the digest of all of a run but the hooks that record it."""
    view = SimpleNamespace(model=run.model, optimizer=joined(run.optimizer))
    return {k: v for k, v in run_digest(view).items() if not k.startswith("hooks of")}


def course(run, grower=None, num=UPDATES):
    """Train, and return the digest at every update."""
    found = []
    for batch in batches(num):
        run.update(batch, grower)
        found.append(digest(run))
    return found


def first_difference(one, other):
    """Return the first update at which two courses differ, and in what; None where they do not."""
    for update, (a, b) in enumerate(zip(one, other, strict=True), start=1):
        if a != b:
            return update, [name for name in a | b if a.get(name) != b.get(name)]
    return None


def with_and_without(make, num=UPDATES, **settings):
    """Return the first difference that a refused trial makes to a run."""
    seeded()
    plain = course(make(), num=num)
    seeded()
    run = make()
    with grower_of(run, **settings) as grower:
        grown = course(run, grower, num)
        assert [trial.verdict for trial in grower.report().trials] == ["refused"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in run.model.modules())
    return first_difference(plain, grown)


SLOWER = ("plain", "groups", "two optimizers", "images", "sequences", "loss scale")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOWER)) for n in HOSTS]
)
def test_refused_trial_leaves_the_run_as_it_was_at_every_update(name):
    """Parameters, buffers, moments, random state and all that modules keep, bit for bit."""
    site, blueprint = site_of(name)
    settings = {"site": site, "blueprint": blueprint, "num": SKIPS.get(name, UPDATES)}
    assert with_and_without(HOSTS[name], **settings) is None


@pytest.mark.torture
@pytest.mark.parametrize("name", ["keeper", "closure", "batch norm", "two optimizers", "images"])
def test_refused_trial_of_every_arm_leaves_the_run_as_it_was(name):
    """With the null beside it and three equal twins, and what was tried chosen by the ranking."""
    settings = {"attribution": "trial", "nulls": 3, "policy": esper.EveryN(3), "tries": 1}
    assert with_and_without(HOSTS[name], **settings) is None


def compiled():
    return Running(network(nn.Dropout(0.3)), given=lambda m: torch.compile(m, backend="aot_eager"))


@pytest.mark.slow
def test_refused_trial_of_a_compiled_model_makes_no_graph():
    """The twin is eager: the live model is compiled no more often than without a controller."""
    graphs = []
    for grows in (False, True):
        torch._dynamo.reset()
        seeded()
        run = compiled()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with grower_of(run) if grows else contextlib.nullcontext() as grower:
            graphs.append((course(run, grower), None))
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        graphs[-1] = (graphs[-1][0], made)
    assert first_difference(graphs[0][0], graphs[1][0]) is None
    assert graphs[0][1] == graphs[1][1]


# ---- controls: what would leave a trace is seen


def test_draw_that_cannot_be_put_back_is_seen_and_named():
    """A generator of Python's goes on where a twin has left it; the owner was warned of it."""

    def make():
        drawn = (0.1 * (i % 7) for i in itertools.count())
        return Running(
            network(),
            compute_loss=lambda model, batch: mean_loss(model, batch) * (1 + next(drawn)),
        )

    with pytest.warns(UserWarning, match="drawn.*cannot be kept apart"):
        update, names = with_and_without(make)
    assert update <= 2
    assert "0.weight" in names


def test_without_setting_aside_a_trial_is_seen(monkeypatch):
    """What a closure keeps is the run's: a twin that wrote to it would change the run."""
    monkeypatch.setattr(Apart, "inside", lambda self, values=(): contextlib.nullcontext())
    seeded()
    plain = course(HOSTS["closure"]())
    seeded()
    run = HOSTS["closure"]()
    with grower_of(run) as grower:
        grown = course(run, grower)
    assert first_difference(plain, grown) is not None


def test_trial_in_the_live_model_is_seen(monkeypatch):
    """A twin that shares the run's random state makes the run draw other numbers."""
    monkeypatch.setattr("esper.growth.twins.set_random_state", lambda state: None)
    seeded()
    plain = course(HOSTS["dropout"]())
    seeded()
    run = HOSTS["dropout"]()
    with pytest.warns(UserWarning, match=r"changes the live run \(random state\)"):
        grown = course(run, grower_of(run))
    update, _ = first_difference(plain, grown)
    assert update == 1


# ---- a twin without a package is the run


@pytest.mark.parametrize("name", HOSTS)
def test_twin_without_a_package_is_the_run_bit_for_bit(name):
    """After fifty updates: same batches, settings, draws, scale and clipping."""
    seeded()
    run = HOSTS[name]()
    assert twin_beside(run, 50) == []


def twin_beside(run, num, before=8):
    """Train, with a twin beside it after a few updates; return where the two differ."""
    grower = grower_of(run, policy=esper.Never())
    own, twins, heard = grower._run, [], []
    own.watcher.reads_scale = True
    own.ledger.count_update = heard.append  # what the controller hands to a trial
    for batch in batches(before + num):
        run.update(batch, grower)
        for parts in heard:
            for twin in twins:
                twin.update(parts, own.live_step())
        heard.clear()
        if own.updates == before:
            twins.append(Twin(own))
    (twin,) = twins
    one, other = run.model.state_dict(), twin.model.state_dict()
    return [name for name in one if not torch.equal(one[name], other[name])]


def test_a_host_with_a_mask_of_infinities_is_judged_by_numbers():
    """As attention has one in a buffer: the average that the verdict reads keeps it as it is."""
    run = Running(network())
    run.model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    with grower_of(run) as grower:
        for batch in batches(UPDATES):
            run.update(batch, grower)
        (trial,) = grower.report().trials
    assert trial.effect is not None, trial.reason
