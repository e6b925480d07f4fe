"""What each of two processes runs for the tests of trials under DistributedDataParallel."""

import logging
from types import SimpleNamespace

import torch
import torch.distributed as dist
from growing import SHORT, batches
from rank_cases import run_cases
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trial_hosts import Running, held_out, network

import esper
from esper.growth.rehearsal import run_digest
from esper.growth.twins import Twin

BY_HAND = [("0", "mlp-4x8-w32")]


def replicated(*middle, **settings):
    """Return a run whose model is replicated over the ranks."""
    return Running(network(*middle), given=DistributedDataParallel, **settings)


def grower_of(run, **settings):
    """Return a controller; every rank makes the same one."""
    options = {"policy": esper.ByHand(BY_HAND), "hold_updates": 20, **settings}
    return esper.Grower(
        run.given,
        run.optimizer,
        compute_loss=run.compute_loss,
        evaluate=held_out,
        **{**SHORT, **options},
    )


def own_batches(num):
    """Return batches of this rank's own."""
    return batches(num, random_seed=10 + dist.get_rank())


def digest(run):
    """Return the digest of a run but the hooks that record it."""
    found = run_digest(SimpleNamespace(model=run.model, optimizer=run.optimizer))
    return {k: v for k, v in found.items() if not k.startswith("hooks of")}


def assert_ranks_agree(model):
    """Hold the parameters of the ranks against each other."""
    for name, p in model.named_parameters():
        mine = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(mine, p.detach())
        assert torch.equal(*mine), name


def course(run, grower=None, num=60):
    """Train, and return the digest at every update."""
    torch.manual_seed(dist.get_rank())
    found = []
    for batch in own_batches(num):
        run.update(batch, grower)
        found.append(digest(run))
    return found


def a_refused_trial_leaves_every_rank_alone():
    """Each rank's digest at each update is that of a run without a controller."""
    plain = course(replicated(nn.Dropout(0.3)))
    run = replicated(nn.Dropout(0.3))
    with grower_of(run, min_effect=1e9, attribution="trial") as grower:
        grown = course(run, grower)
        assert [trial.verdict for trial in grower.report().trials] == ["refused"]
    assert plain == grown


def a_package_is_taken_over_by_all_ranks_at_once():
    """The kernels are the same on both from the switch on, and stay the same."""
    run = replicated(nn.Dropout(0.3))
    torch.manual_seed(dist.get_rank())
    with grower_of(run) as grower:
        for batch in own_batches(80):
            run.update(batch, grower)
            assert_ranks_agree(run.model)
        (trial,) = grower.report().trials
        assert trial.verdict == "kept"
    assert esper.layers(run.model)["0"].seed_kernel(0) is not None


def a_twin_without_a_package_is_the_run():
    """Its gradients are averaged over the ranks as the run's are."""
    run = replicated(nn.Dropout(0.3))
    grower = grower_of(run, policy=esper.Never())
    own, twins = grower._run, []
    for batch in own_batches(30):
        run.update(batch, grower)
        for twin in twins:
            twin.update([batch], own.live_step())
        if own.updates == 5:
            twins.append(Twin(own))
    pairs = zip(run.model.parameters(), twins[0].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def a_roll_back_takes_every_rank_back():
    """What the loop says to be a spike ends it on both, with the parameters of the switch."""
    run = replicated()
    stream = iter(own_batches(100))
    with grower_of(run, hold_updates=100) as grower:
        while not any(status.stage.value == "holding" for status in grower.stages):
            run.update(next(stream), grower)
        calm, run.compute_loss = run.compute_loss, lambda m, b: 1e6 * calm(m, b)
        for _ in range(12):
            run.update(next(stream), grower)
        assert [trial.verdict for trial in grower.report().trials] == ["rolled back"]
    assert_ranks_agree(run.model)
    assert esper.layers(run.model)["0"].seed_kernel(0) is None


CASES = {
    case.__name__: case
    for case in (
        a_refused_trial_leaves_every_rank_alone,
        a_package_is_taken_over_by_all_ranks_at_once,
        a_twin_without_a_package_is_the_run,
        a_roll_back_takes_every_rank_back,
    )
}


def run(*group):
    """Run every case as one rank of a group."""
    logging.disable(logging.CRITICAL)
    run_cases(CASES, *group)
