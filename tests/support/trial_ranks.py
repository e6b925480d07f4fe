"""What each of two processes runs for the tests of trials under DistributedDataParallel."""

import datetime as dt
import logging
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from growing import SHORT, X, Y, batches
from rank_cases import run_cases
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trial_hosts import Running, held_out, network

import esper
from esper.continuity.agreement import Ranks
from esper.continuity.replicas import ranks_of
from esper.contracts.errors import GrowthError
from esper.growth.rehearsal import run_digest
from esper.growth.run import GrowthRun
from esper.growth.twins import Twin
from esper.registry.memory import MemoryRegistry
from esper.resilience.attempt import Failed, attempt

BY_HAND = [("0", "mlp-4x8-w32")]
WIDE = esper.Budget(small_graft=100_000)


def replicated(*middle, **settings):
    """Return a run whose model is replicated over the ranks."""
    return Running(network(*middle), given=DistributedDataParallel, **settings)


def grower_of(run, **settings):
    """Return a controller; every rank makes the same one."""
    options = {"policy": esper.ByHand(BY_HAND), "hold_updates": 20, "evaluate": held_out}
    return esper.Grower(
        run.given,
        run.optimizer,
        compute_loss=run.compute_loss,
        **{**SHORT, **options, **settings},
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


def failing_in_trial(run, stages):
    """Let the loss of rank 1's twins raise while a trial is under way; that of the run does not."""
    calm = run.compute_loss

    def loss(model, batch):
        in_trial = any(status.stage.value == "trial" for status in stages())
        if in_trial and model not in (run.given, run.model) and dist.get_rank() == 1:
            msg = "out of memory, say"
            raise RuntimeError(msg)
        return calm(model, batch)

    return loss


def a_twin_that_fails_on_one_rank_ends_the_trial_of_all():
    """No rank waits for it; the run goes on, and each rank's report says where it failed."""
    run, growers = replicated(), []
    run.compute_loss = failing_in_trial(run, lambda: growers[0].stages if growers else ())
    with warnings.catch_warnings(), grower_of(run) as grower:
        warnings.simplefilter("ignore", UserWarning)  # it is said
        growers.append(grower)
        for batch in own_batches(40):
            run.update(batch, grower)
            assert_ranks_agree(run.model)
        (trial,) = grower.report().trials
    assert trial.verdict == "refused"
    assert "out of memory, say" in trial.reason
    assert ("rank 1 could not go on" in trial.reason) is (dist.get_rank() == 0)


def short_of_memory(run, *, rank, most):
    """Let one rank's passes beside the training lack memory above so many samples."""
    calm = run.compute_loss

    def loss(model, batch):
        is_beside = model is not run.given
        if is_beside and dist.get_rank() == rank and len(batch) > most:
            raise torch.OutOfMemoryError(f"{len(batch)} samples do not fit")
        return calm(model, batch)

    return loss


def run_of_which_a_rank_is_short():
    """Train while rank 1 is short of memory; return its report and the sizes that each rank has."""
    run = replicated()
    run.compute_loss = short_of_memory(run, rank=1, most=10)
    torch.manual_seed(dist.get_rank())
    with grower_of(run, evaluate=short_to_evaluate(rank=1, most=100)) as grower:
        for batch in own_batches(80):
            run.update(batch, grower)
            assert_ranks_agree(run.model)
        sizes = [None, None]
        dist.all_gather_object(sizes, grower._run.fits.state_dict())
    return grower.report(), sizes


def short_to_evaluate(*, rank, most):
    """Let one rank's calls of the model lack memory in readings of more than so many samples."""

    def short(_module, given):
        if dist.get_rank() == rank and len(given[0]) > most:
            raise torch.OutOfMemoryError(f"{len(given[0])} samples do not fit")

    def evaluate(model):
        handle = model[0].register_forward_pre_hook(short)
        try:
            return held_out(model)
        finally:
            handle.remove()

    return evaluate


def all_ranks_go_by_the_smallest_sizes():
    """One rank is short of memory: the trial is judged all the same, by the same kernels."""
    report, (one, other) = run_of_which_a_rank_is_short()
    assert [trial.verdict for trial in report.trials] == ["kept"]
    assert one == other
    assert one["trial|cpu|int64[]"] == 8
    assert [size for key, size in one.items() if key.startswith("evaluation|")] == [100]
    of_rank = [note for note in report.notes if "did not fit" in note]
    assert bool(of_rank) is (dist.get_rank() == 1)


def control_ranks_that_do_not_settle_sizes_go_by_their_own():
    """Only the rank that is short then makes its passes in parts."""
    settle, GrowthRun.settle_sizes = GrowthRun.settle_sizes, lambda _: None
    try:
        _, (one, other) = run_of_which_a_rank_is_short()
    finally:
        GrowthRun.settle_sizes = settle
    assert (bool(one), bool(other)) == (False, True)


def trained(run, grower, num):
    for batch in own_batches(num):
        run.update(batch, grower)


def raised_by(work):
    try:
        work()
    except Exception as error:  # noqa: BLE001 - whatever it is
        return error
    raise AssertionError("nothing was raised")


def a_measure_that_fails_on_one_rank_stops_all():
    """Its own error there, and one that names it on the other; neither waits, nor to close."""
    run, num_read = replicated(), 0

    def evaluate(model):
        nonlocal num_read
        num_read += 1
        if num_read == 6 and dist.get_rank() == 1:
            msg = "the held-out data is gone"
            raise OSError(msg)
        return held_out(model)

    def train():
        with grower_of(run, evaluate=evaluate) as grower:
            trained(run, grower, 60)

    error = raised_by(train)
    assert type(error) is (OSError if dist.get_rank() == 1 else esper.RankFailedError)
    assert "the held-out data is gone" in str(error)
    assert_ranks_agree(run.model)


class Counting(MemoryRegistry):
    """Has a kernel on the first rank alone, and counts what is asked of it."""

    def __init__(self):
        super().__init__()
        self.num_puts = self.num_fetches = self.num_searches = 0
        site = esper.SiteSpec(kind="linear", in_features=4, out_features=8)
        blueprint = esper.default_catalog().named("mlp-4x8-w32", site, where="'0'")
        artifact = esper.compile_blueprint(blueprint)
        self.digest = artifact.artifact_id
        if dist.get_rank() == 0:
            super().put(artifact.kernel_binary)

    def put(self, data, **given):
        self.num_puts += 1
        return super().put(data, **given)

    def search(self, **asked):
        self.num_searches += 1
        return super().search(**asked)

    def fetch(self, digest):
        self.num_fetches += 1
        return super().fetch(digest)


def one_rank_fetches_a_kernel_for_all():
    """The registry of the first is asked once, that of the other never; the kernel is the same."""
    run, registry = replicated(), Counting()
    policy = esper.ByHand([("0", registry.digest)])
    with grower_of(run, registry=registry, policy=policy) as grower:
        trained(run, grower, 80)
        report = grower.report()
    assert [trial.verdict for trial in report.trials] == ["kept"]
    assert registry.num_fetches == (1 if dist.get_rank() == 0 else 0)
    assert_alike([graft.artifact_id for graft in report.grafts])
    assert_ranks_agree(run.model)


def one_rank_compiles_and_publishes_a_kernel_for_all():
    """The others are sent it, and do not put it into their registries."""
    run, registry = replicated(), Counting()
    with grower_of(run, registry=registry, min_effect=1e9) as grower:
        trained(run, grower, 30)
        report = grower.report()
    assert registry.num_puts == (1 if dist.get_rank() == 0 else 0)
    assert_alike([graft.artifact_id for graft in report.grafts])


def one_rank_asks_what_fits_for_all():
    """What the first one has at hand at the decision, both rank and try; the other never asks."""
    run, registry = replicated(), Counting()
    options = {"catalog": esper.Catalog(entries=()), "policy": esper.EveryN(30), "budget": WIDE}
    with grower_of(run, registry=registry, **options) as grower:
        first, *others = own_batches(70)
        run.update(first, grower)
        preloader = grower._run.offers._preloader
        if preloader is not None:
            assert preloader.settle(20)
        for batch in others:
            run.update(batch, grower)
    assert [graft.artifact_id for graft in grower.report().grafts] == [registry.digest]
    is_first = dist.get_rank() == 0
    assert (registry.num_searches > 0, registry.num_fetches) == (is_first, int(is_first))
    assert_ranks_agree(run.model)


def a_kernel_that_does_not_come_stops_all():
    """The first rank's registry does not have it; the other learns that, and neither waits."""
    policy = esper.ByHand([("0", "0" * 64)])
    error = raised_by(lambda: grower_of(replicated(), registry=Counting(), policy=policy))
    assert type(error) is (GrowthError if dist.get_rank() == 0 else esper.RankFailedError)
    assert "the registry does not have it" in str(error)


def shares_of_the_held_out_data_are_put_together():
    """Each rank reads every second sample, and both decide on all of them."""

    def share(model):
        mine = slice(500 + dist.get_rank(), None, 2)
        return (model(X[mine]).float() - Y[mine]).square(), {"rank": float(dist.get_rank())}

    run = replicated()
    with grower_of(run, evaluate=share) as grower:
        trained(run, grower, 80)
        report = grower.report()
    assert report.evaluations[-1].metrics == {"rank": 0.5}
    assert [(t.verdict, t.samples) for t in report.trials] == [("kept", 267)]  # two thirds of 400
    assert_alike([(t.effect, t.stderr) for t in report.trials])


def running_statistics_apart_are_no_more_samples():
    """Ranks that read the same samples with statistics of their own count each sample once."""
    run = replicated(nn.BatchNorm1d(8))
    with grower_of(run) as grower:
        trained(run, grower, 80)
        (trial,) = grower.report().trials
    assert trial.samples == 267
    assert_alike((trial.verdict, trial.effect))


def steps_in_steps_end_together():
    """Whatever fails, on whichever rank and wherever, all leave the same steps; none waits."""
    ranks = ranks_of(replicated().given)
    for rank in range(2):
        for place in ("before", "inner", "between", "behind"):
            seen = []

            def fail_at(here, rank=rank, place=place):
                if here == place and dist.get_rank() == rank:
                    msg = f"{place} on rank {rank}"
                    raise RuntimeError(msg)

            def inner(fail_at=fail_at):
                ranks.vote()
                fail_at("inner")
                return ranks.each(dist.get_rank)

            def outer(fail_at=fail_at, inner=inner, seen=seen):
                fail_at("before")
                seen.append(attempt(lambda: ranks.in_step(inner)))
                fail_at("between")
                ranks.vote()
                fail_at("behind")

            error = attempt(lambda outer=outer: ranks.in_step(outer))
            inner_failed = isinstance(seen[0], Failed) if seen else True
            assert inner_failed is (place in ("before", "inner"))
            assert isinstance(error, Failed) is (place != "inner"), place
            if place != "inner":
                assert f"{place} on rank {rank}" in str(error)
            assert ranks.vote(dist.get_rank()) == (0, 1)  # and they still understand one another


def control_a_rank_that_says_nothing_is_waited_for():
    """Outside of a step the others learn nothing, and go on only when their patience ends."""
    group = dist.new_group(timeout=dt.timedelta(seconds=0.5))
    ranks = Ranks(group, torch.device("cpu"))
    if dist.get_rank() == 0:
        assert isinstance(raised_by(ranks.vote), RuntimeError)


def folder_of_this_rank():
    """Return a folder that the other rank does not look into."""
    return Path(tempfile.mkdtemp())


def a_checkpoint_is_read_where_it_is():
    """The first rank writes it; from where only the other has it, both go on with their draws."""
    run, folder = replicated(nn.Dropout(0.3)), folder_of_this_rank()
    torch.manual_seed(dist.get_rank())
    with grower_of(run) as grower:
        trained(run, grower, 80)
        esper.save_checkpoint(folder / "run", run.given, run.optimizer, grower=grower, extra=3)
        expected = torch.rand(3), digest(run), grower.updates
    assert (folder / "run").exists() is (dist.get_rank() == 0)
    others = [None, None]
    dist.all_gather_object(others, folder)
    again = replicated(nn.Dropout(0.3))
    with grower_of(again) as grower:
        path = others[1 - dist.get_rank()] / "run"
        args = (path, again.given, again.optimizer)
        assert esper.load_checkpoint(*args, grower=grower) == 3
        drawn, *found = torch.rand(3), digest(again), grower.updates
    assert torch.equal(drawn, expected[0])
    assert tuple(found) == expected[1:]
    assert type(raised_by(lambda: esper.load_checkpoint("none", *args[1:]))) is FileNotFoundError


def a_null_beside_the_run_trains_on_after_a_checkpoint():
    """What both ranks read at the end is what they read where nothing was stopped."""
    settings = {"attribution": "run"}

    def a_run(until):
        run = replicated(nn.Dropout(0.3))
        torch.manual_seed(dist.get_rank())
        grower = grower_of(run, **settings)
        for batch in own_batches(80)[:until]:
            run.update(batch, grower)
        return run, grower

    def end(run, grower):
        found = digest(run)
        grower.close()
        report = grower.report()
        assert report.end_capacity is not None
        return found, report.end_capacity, report.end_capacity_stderr, report.work

    expected = end(*a_run(80))
    run, grower = a_run(66)
    path = folder_of_this_rank() / "run"
    esper.save_checkpoint(path, run.given, run.optimizer, grower=grower)
    again = replicated(nn.Dropout(0.3))
    goes_on = grower_of(again, **settings)
    esper.load_checkpoint(path, again.given, again.optimizer, grower=goes_on)
    for batch in own_batches(80)[66:]:
        again.update(batch, goes_on)
    assert end(again, goes_on) == expected


def what_cannot_be_loaded_on_one_rank_is_loaded_on_none():
    """Its own error there, one that names it on the other; weights and draws are as before."""
    run, path = replicated(), folder_of_this_rank() / "run"
    trained(run, None, 2)
    esper.save_checkpoint(path, run.given, run.optimizer)
    trained(run, None, 2)
    before, drawn = digest(run), torch.get_rng_state()
    other = torch.optim.SGD(run.model.parameters(), lr=0.1)
    optimizer = run.optimizer if dist.get_rank() == 0 else other
    error = raised_by(lambda: esper.load_checkpoint(path, run.given, optimizer))
    assert type(error) is (esper.RankFailedError if dist.get_rank() == 0 else ValueError)
    assert "build it as it was" in str(error)
    assert before == digest(run)
    assert torch.equal(drawn, torch.get_rng_state())


def another_number_of_ranks_goes_on_by_the_first_ones_part():
    """One process alone takes the first rank's; what a file has no part for draws by itself."""
    run, path = replicated(nn.Dropout(0.3)), folder_of_this_rank() / "run"
    trained(run, None, 2)
    esper.save_checkpoint(path, run.model, run.optimizer)  # of one process, beside the other
    before = digest(run)
    trained(run, None, 2)
    esper.load_checkpoint(path, run.given, run.optimizer)
    without_draws = {k: v for k, v in digest(run).items() if k != "random state"}
    assert without_draws == {k: v for k, v in before.items() if k != "random state"}
    drawn = [None, None]
    dist.all_gather_object(drawn, torch.rand(3).tolist())
    assert drawn[0] != drawn[1]


def assert_alike(mine):
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    assert of_ranks == [mine] * len(of_ranks)


CASES = {
    case.__name__: case
    for case in (
        a_refused_trial_leaves_every_rank_alone,
        all_ranks_go_by_the_smallest_sizes,
        control_ranks_that_do_not_settle_sizes_go_by_their_own,
        a_package_is_taken_over_by_all_ranks_at_once,
        a_twin_without_a_package_is_the_run,
        a_roll_back_takes_every_rank_back,
        ranks_with_other_batches_decide_alike,
        ranks_that_rank_apart_try_one_package,
        a_twin_that_fails_on_one_rank_ends_the_trial_of_all,
        a_measure_that_fails_on_one_rank_stops_all,
        one_rank_fetches_a_kernel_for_all,
        one_rank_compiles_and_publishes_a_kernel_for_all,
        one_rank_asks_what_fits_for_all,
        a_kernel_that_does_not_come_stops_all,
        shares_of_the_held_out_data_are_put_together,
        running_statistics_apart_are_no_more_samples,
        a_checkpoint_is_read_where_it_is,
        a_null_beside_the_run_trains_on_after_a_checkpoint,
        what_cannot_be_loaded_on_one_rank_is_loaded_on_none,
        another_number_of_ranks_goes_on_by_the_first_ones_part,
        steps_in_steps_end_together,
        control_a_rank_that_says_nothing_is_waited_for,
    )
}


def run(*group):
    """Run every case as one rank of a group."""
    logging.disable(logging.CRITICAL)
    run_cases(CASES, *group)
