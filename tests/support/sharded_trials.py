"""What each of two processes runs for the tests of sharded models, a controller or none."""

import itertools
import logging
import warnings

import sharded_ranks
import torch
import torch.distributed as dist
from growing import SHORT, batches
from rank_cases import run_cases
from sharded_ranks import assert_equal, full, shared_folder
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trial_hosts import Running, clips_norm, held_out, network
from trial_ranks import BY_HAND

import esper


class Sharded(Running):
    """A run whose model is sharded over the ranks."""

    def __init__(self, *middle, **settings):
        model = network(*middle)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        super().__init__(model, **settings)
        torch.manual_seed(dist.get_rank())
        self.num_updates = 0

    def update(self, batch, grower=None):
        """Make one update, and count it."""
        self.num_updates += 1
        super().update(batch, grower)


def grower_of(run, **settings):
    """Return a controller; every rank makes the same one."""
    options = {"policy": esper.ByHand(BY_HAND), "hold_updates": 20, **settings}
    return esper.Grower(
        run.model,
        run.optimizer,
        compute_loss=run.compute_loss,
        evaluate=held_out,
        **{**SHORT, **options},
    )


def own_batches(num):
    """Return batches of this rank's own."""
    return batches(num, random_seed=10 + dist.get_rank())


def state_of(run):
    moments = [v for state in run.optimizer.state.values() for v in state.values()]
    return [*full([*run.model.parameters(), *moments]), torch.get_rng_state()]


def a_package_is_tried_taken_over_and_kept():
    """Twins are built whole of shards; the ranks decide alike and hold the same kernel."""
    run = Sharded(nn.Dropout(0.3), before_step=clips_norm())
    with grower_of(run, twin=lambda: network(nn.Dropout(0.3))) as grower:
        for batch in own_batches(80):
            run.update(batch, grower)
        assert [trial.verdict for trial in grower.report().trials] == ["kept"]
        kernel = esper.layers(run.model)["0"].seed_kernel(0)
        assert {type(p).__name__ for p in kernel.parameters()} == {"DTensor"}
        told = [None] * dist.get_world_size()
        dist.all_gather_object(told, full(kernel.parameters()))
        assert_equal(*told)
        assert len({id(p) for p in kernel.parameters()} & {id(p) for p in run.optimizer.state}) == 4


def a_refused_trial_leaves_every_rank_alone():
    """Weights, moments and draws are those of a run without a controller, bit for bit."""
    runs = []
    for grows in (False, True):
        run = Sharded(nn.Dropout(0.3))
        grower = grower_of(run, twin=lambda: network(nn.Dropout(0.3)), min_effect=1e9)
        for batch in own_batches(60):
            run.update(batch, grower if grows else None)
        trials = [trial.verdict for trial in grower.report().trials]
        assert trials == (["refused"] if grows else [])
        grower.close()
        runs.append(state_of(run))
    assert_equal(*runs)


def a_spike_takes_every_rank_back():
    """Weights and moments are written into the shards as they were at the switch."""
    run = Sharded()
    stream = iter(own_batches(100))
    with grower_of(run, twin=network, hold_updates=100) as grower:
        while not any(status.stage.value == "holding" for status in grower.stages):
            run.update(next(stream), grower)
        calm, run.compute_loss = run.compute_loss, lambda m, b: 1e6 * calm(m, b)
        for _ in range(12):
            run.update(next(stream), grower)
        assert [trial.verdict for trial in grower.report().trials] == ["rolled back"]
    assert esper.layers(run.model)["0"].seed_kernel(0) is None
    assert len(list(run.model.parameters())) == len(run.optimizer.param_groups[0]["params"]) == 4


def a_watch_goes_on_from_a_checkpoint():
    """The Grower's state has the snapshot of the switch whole, and it is put back into shards."""
    path = shared_folder() / "run.esper"
    runs = []
    for resumes in (False, True):
        run = Sharded()
        stream = iter(own_batches(110))
        with grower_of(run, twin=network, hold_updates=30) as grower:
            if resumes:
                parts = {"optimizer": run.optimizer, "grower": grower}
                for _ in range(esper.load_checkpoint(path, run.model, **parts)):
                    next(stream)
            while not resumes and not any(s.stage.value == "holding" for s in grower.stages):
                run.update(next(stream), grower)
                parts = {"optimizer": run.optimizer, "grower": grower}
            if not resumes:
                esper.save_checkpoint(path, run.model, **parts, extra=run.num_updates)
            for batch in itertools.islice(stream, 40):
                run.update(batch, grower)
            runs.append([*state_of(run), grower.report().trials[0].verdict])
    assert runs[0].pop() == runs[1].pop() == "kept"
    assert_equal(*runs)


def auditions_are_refused():
    """Each rank would hold its own, and decide by it."""
    try:
        grower_of(Sharded(), trial="shadow")
    except esper.GrowthError as error:
        assert "twin=" in str(error)  # noqa: PT017 - no pytest in these processes
    else:
        raise AssertionError("an audition in shards was accepted")


def without_a_builder_the_cure_is_named():
    """A model in shards cannot be copied."""
    run = Sharded()
    with grower_of(run) as grower, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in own_batches(12):
            run.update(batch, grower)
        assert not grower.report().trials
    assert any("give the Grower twin=" in str(each.message) for each in said)


CASES = sharded_ranks.CASES | {
    case.__name__: case
    for case in (
        a_package_is_tried_taken_over_and_kept,
        auditions_are_refused,
        without_a_builder_the_cure_is_named,
    )
}

LONG_CASES = {
    case.__name__: case
    for case in (
        a_refused_trial_leaves_every_rank_alone,
        a_spike_takes_every_rank_back,
        a_watch_goes_on_from_a_checkpoint,
    )
}


def run(rank, cases, *group):
    """Run every case of a set as one rank of a group."""
    logging.disable(logging.CRITICAL)
    run_cases(cases, rank, *group)


def run_short(rank, *group):
    """Run what every test run asks for."""
    run(rank, CASES, *group)


def run_long(rank, *group):
    """Run what takes its time."""
    run(rank, LONG_CASES, *group)
