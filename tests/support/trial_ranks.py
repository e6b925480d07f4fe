"""What each of two processes runs for the tests of trials under DistributedDataParallel."""

import logging
from dataclasses import replace
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
WIDE = esper.Budget(small_graft=100_000)


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


class Apart(esper.FirstOrderGain):
    """Ranks the other way round on every second rank."""

    def rank(self, observations, candidates):
        found = super().rank(observations, candidates)
        known = [entry for entry in found if entry.gain]
        gains = [abs(entry.gain) for entry in known]
        if dist.get_rank():
            gains = gains[::-1]
        return [replace(entry, gain=g) for entry, g in zip(known, gains, strict=True)]


def assert_ranks_tried_the_same(grower, model):
    """Hold the packages of the ranks against each other, and what became of the model."""
    tried = [(t.trial_updates, t.sites, t.blueprints) for t in grower.report().trials]
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, tried)
    assert tried
    assert of_ranks == [tried] * len(of_ranks)
    assert_ranks_agree(model)


def ranks_with_other_batches_decide_alike():
    """What an update takes differs by rank, and what is tried, for how long, and when does not."""
    run = replicated()
    size = 32 if dist.get_rank() == 0 else 8
    with grower_of(run, horizon=400, overhead=3.5, trial_updates=150) as grower:
        for batch in own_batches(100):
            run.update(batch[:size], grower)
        assert_ranks_tried_the_same(grower, run.model)
        assert 50 <= grower.report().trials[0].trial_updates < 150  # as the first rank can pay


def ranks_that_rank_apart_try_one_package():
    """That of the first rank."""
    run = replicated()
    with grower_of(run, policy=esper.EveryN(5), ranking=Apart(), budget=WIDE) as grower:
        for batch in own_batches(80):
            run.update(batch, grower)
        assert_ranks_tried_the_same(grower, run.model)


CASES = {
    case.__name__: case
    for case in (
        a_refused_trial_leaves_every_rank_alone,
        a_package_is_taken_over_by_all_ranks_at_once,
        a_twin_without_a_package_is_the_run,
        a_roll_back_takes_every_rank_back,
        ranks_with_other_batches_decide_alike,
        ranks_that_rank_apart_try_one_package,
    )
}


def run(*group):
    """Run every case as one rank of a group."""
    logging.disable(logging.CRITICAL)
    run_cases(CASES, *group)
