"""Loading through a layer's door while the source and the kernels fail."""

import asyncio
import contextlib
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from kernel_blueprints import mlp_blueprint
from torch import nn

import esper
from esper.compiler.compile import compile_blueprint
from esper.contracts.errors import (
    KernelCorruptError,
    KernelLoadError,
    KernelNotFoundError,
    KernelRefusedError,
    KernelSourceRefused,
    KernelSourceSuspended,
    KernelSourceUnavailable,
    SeedLifecycleError,
)
from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution import EnhancedKernelCache, ErrorRecoveryManager, KasminaLayer, KernelCache
from esper.execution.host_class import adopt
from esper.state.state_layout import FAULTS_IN_A_ROW

S = SeedLifecycleState
KERNEL, OTHER = (compile_blueprint(mlp_blueprint(init_seed=number)) for number in range(2))
NOBODY = "0" * 64


class FlappingSource:
    """A source that fails as often as it is told to before it answers, and may hang."""

    def __init__(self, num_failures=0):
        self.blobs = {a.artifact_id: a.kernel_binary for a in (KERNEL, OTHER)}
        self.num_failures = num_failures
        self.threads = []
        self.released = threading.Event()
        self.released.set()

    def fetch(self, digest):
        self.threads.append(threading.get_ident())
        assert self.released.wait(60)
        if self.num_failures:
            self.num_failures -= 1
            raise KernelSourceUnavailable("down")
        if digest not in self.blobs:
            raise KernelNotFoundError(digest)
        return self.blobs[digest]


def layer_of(source, **settings):
    """Return a layer whose retries follow each other at once."""
    layer = KasminaLayer.adopt_as(nn.Linear(6, 6), name="fc", source=source, **settings)
    budget = layer.error_recovery._budget
    manager = ErrorRecoveryManager(base_delay=0.0, budget=budget)
    layer._kasmina.shared.keep(ErrorRecoveryManager, manager)
    return layer


def load(layer, seed_idx=0, artifact=KERNEL, how="sync"):
    options = {"alpha": 0.5, "example": torch.ones(5, 6)}
    if how == "sync":
        return layer.load_kernel_sync(seed_idx, artifact.artifact_id, **options)
    return asyncio.run(layer.load_kernel(seed_idx, artifact.artifact_id, **options))


# ---- the source


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_source_that_flaps_is_asked_again(how):
    """Two failures and an answer are a loaded kernel; the training thread asked at most once."""
    source = FlappingSource(num_failures=2)
    layer = layer_of(source)

    assert load(layer, how=how) is True

    assert layer.state_layout.state(0) == S.ACTIVE
    assert len(source.threads) == 3
    assert threading.get_ident() not in source.threads[1:]
    recovered = layer.get_stats()["recovery_stats"]["recovered"]
    assert recovered["network_error"] == 1


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_source_that_stays_down_changes_nothing(how):
    """The error reaches the caller after the last retry, and the seed is dormant again."""
    source = FlappingSource(num_failures=99)
    layer = layer_of(source)
    with pytest.raises(KernelSourceUnavailable, match="down"):
        load(layer, how=how)
    assert len(source.threads) == 4
    assert layer.state_layout.state(0) == S.DORMANT


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_layer_whose_breaker_is_open_is_served_from_the_cache(how):
    """What is held is grafted with the source down; what is not is refused without being asked."""
    source = FlappingSource()
    first, second = layer_of(source), layer_of(source)
    load(first)
    source.num_failures = 99
    while first.kernel_cache.get_stats()["breaker_state"] == "closed":
        with pytest.raises(KernelSourceUnavailable):
            load(first, 1, OTHER)
    num_asked = len(source.threads)

    assert load(second, how=how) is True
    with pytest.raises(KernelSourceSuspended):
        load(second, 1, OTHER, how=how)

    assert len(source.threads) == num_asked
    assert second.state_layout.lifecycle_states.tolist() == [S.ACTIVE, S.DORMANT, 0, 0]


def test_an_answer_is_not_asked_for_again():
    """A source that has no such kernel is asked once."""
    source = FlappingSource()
    assert layer_of(source).load_kernel_sync(0, NOBODY) is False
    assert len(source.threads) == 1


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize(
    "answer",
    [KernelNotFoundError, KernelCorruptError, KernelSourceRefused],
    ids=lambda a: a.__name__,
)
def test_a_permanent_answer_is_asked_for_once_and_charges_no_breaker(answer, how):
    """However often it is given; the control is an answer that may pass."""
    for error, num_asked, state in (
        (answer, 12, "closed"),
        (KernelSourceUnavailable, None, "open"),
    ):
        source = FlappingSource()
        source.fetch = lambda digest, error=error, source=source: _refuse(source, error)
        layer = layer_of(source, cache_size_mb=8)
        for number in range(12):
            with contextlib.suppress(KernelLoadError):
                load(layer, artifact=_Named(f"{number:064x}"), how=how)
        assert num_asked in (None, len(source.threads))
        assert layer.kernel_cache.get_stats()["breaker_state"] == state


def _refuse(source, error):
    source.threads.append(threading.get_ident())
    raise error("no")


@dataclass
class _Named:
    artifact_id: str


class Gates:
    """A source that holds each kernel back until a test lets it go."""

    def __init__(self, missing=()):
        self.blobs = {a.artifact_id: a.kernel_binary for a in (KERNEL, OTHER)}
        self.gates = {a.artifact_id: threading.Event() for a in (KERNEL, OTHER)}
        self.missing = {a.artifact_id for a in missing}

    def fetch(self, digest):
        assert self.gates[digest].wait(60)
        if digest in self.missing:
            raise KernelNotFoundError(digest)
        return self.blobs[digest]


async def two_loads(layer, source, first_to_arrive, between=lambda: None):
    """Ask for KERNEL, then for OTHER; return what came of both."""
    options = {"alpha": 0.5, "example": torch.ones(5, 6)}
    loads = []
    for artifact in (KERNEL, OTHER):
        loads.append(asyncio.create_task(layer.load_kernel(0, artifact.artifact_id, **options)))
        await asyncio.sleep(0.01)
    between()
    later = OTHER if first_to_arrive is KERNEL else KERNEL
    source.gates[first_to_arrive.artifact_id].set()
    await asyncio.wait(loads, return_when=asyncio.FIRST_COMPLETED)
    assert layer.state_layout.state(0) != S.DORMANT
    source.gates[later.artifact_id].set()
    return await asyncio.gather(*loads, return_exceptions=True)


@pytest.mark.parametrize("first_to_arrive", [KERNEL, OTHER], ids=["in order", "out of order"])
def test_of_two_loads_the_one_asked_for_later_stands(first_to_arrive):
    """Whichever of them arrives first; the one that came too late is told so."""
    source = Gates()
    layer = layer_of(source)

    first, second = asyncio.run(two_loads(layer, source, first_to_arrive))

    assert layer.state_layout.kernel_id(0) == OTHER.artifact_id
    assert second is True
    if first_to_arrive is OTHER:
        assert isinstance(first, SeedLifecycleError)
        assert "asked for later" in str(first)


@pytest.mark.parametrize("first_to_arrive", [KERNEL, OTHER], ids=["in order", "out of order"])
def test_a_load_that_fails_stands_in_nobodys_way(first_to_arrive):
    """The one before it is put in place, whichever ends first."""
    source = Gates(missing=[OTHER])
    layer = layer_of(source)

    results = asyncio.run(two_loads(layer, source, first_to_arrive))

    assert results == [True, False]
    assert layer.state_layout.kernel_id(0) == KERNEL.artifact_id


def test_loads_that_all_fail_leave_the_seed_dormant():
    """It is kept for as long as one of them may come."""
    source = Gates(missing=[KERNEL, OTHER])
    layer = layer_of(source)
    assert asyncio.run(two_loads(layer, source, KERNEL)) == [False, False]
    assert layer.state_layout.state(0) == S.DORMANT


def test_a_graft_by_hand_stands_against_loads_that_were_asked_for_before():
    """It was asked for last."""
    source = Gates()
    layer, kernel = layer_of(source), nn.Linear(6, 6)

    def by_hand():
        layer.graft(0, kernel, alpha=0.5, example=torch.ones(5, 6))

    results = asyncio.run(two_loads(layer, source, KERNEL, by_hand))

    assert layer.seed_kernel(0) is kernel
    assert all(isinstance(result, SeedLifecycleError) for result in results)


def test_a_graft_that_still_waits_gives_way_to_a_later_one():
    """Its input comes when another kernel stands there already."""

    class Silent(nn.Module):
        """A host that does not say what it takes."""

        def forward(self, x):
            return 2 * x

    layer, earlier, kernel = adopt(Silent(), name="site"), nn.Linear(6, 6), nn.Linear(6, 6)
    layer.graft(0, earlier, alpha=0.5)
    assert layer.state_layout.state(0) == S.LOADING
    layer.graft(0, kernel, alpha=0.5, example=torch.ones(5, 6))
    layer(torch.ones(5, 6))
    esper.maintain(layer)
    assert layer.seed_kernel(0) is kernel


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_made_during_a_load_can_be_used(duplicate):
    """Its seed is dormant, for the load is the original's; which ends as if there were no copy."""
    source = Gates()
    layer = layer_of(source)
    copies = []

    def copied():
        copies.append(duplicate(layer))

    asyncio.run(two_loads(layer, source, KERNEL, copied))

    assert layer.state_layout.kernel_id(0) == OTHER.artifact_id
    assert copies[0].state_layout.state(0) == S.DORMANT
    copies[0].graft(0, nn.Linear(6, 6), alpha=0.5, example=torch.ones(5, 6))
    assert copies[0].state_layout.state(0) == S.ACTIVE


def test_a_missing_source_is_not_waited_for():
    """Another try does not bring one."""
    layer = KasminaLayer(6, 6)
    with pytest.raises(KernelSourceUnavailable, match="source="):
        layer.load_kernel_sync(0, NOBODY)
    assert layer.error_recovery.get_stats()["retries"] == 0


def test_layers_of_one_source_share_its_budget_of_retries():
    """A model of many layers does not multiply the load on what is down."""
    source = FlappingSource(num_failures=99)
    layers = [layer_of(source) for _ in range(4)]
    for layer in layers:
        with pytest.raises(KernelSourceUnavailable):
            load(layer)
    assert sum(layer.error_recovery.get_stats()["retries"] for layer in layers) == 3


def train(layer, num_steps):
    """Take steps on fixed data; return the losses."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    x = torch.linspace(-1.0, 1.0, 30).reshape(5, 6)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_training_goes_on_while_a_source_hangs():
    """Two thousand steps pass beside a load that waits, bit for bit as without it."""
    source = FlappingSource(num_failures=1)
    source.released.clear()
    layer = layer_of(source)
    plain = nn.Linear(6, 6)
    plain.load_state_dict(layer.state_dict())

    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load, layer, how="async")
        try:
            losses = train(layer, 2_000)
            assert layer.state_layout.state(0) in (S.DORMANT, S.LOADING)
            assert not loading.done()
        finally:
            source.released.set()
        assert loading.result(60) is True

    assert torch.equal(losses, train(plain, 2_000))
    assert layer.state_layout.state(0) == S.ACTIVE
    assert threading.get_ident() not in source.threads


# ---- the kernels


def poison(layer, seed_idx):
    """Make a loaded kernel give NaN, and let maintenance see it."""
    for parameter in layer.seed_kernel(seed_idx).parameters():
        parameter.data.fill_(torch.nan)
    for _ in range(FAULTS_IN_A_ROW):
        layer(torch.ones(5, 6))
    return esper.maintain(layer)


def test_a_kernel_that_is_isolated_again_and_again_is_put_in_quarantine():
    """After three seeds had to be isolated it is not served to a fourth, until it is released."""
    layer = layer_of(FlappingSource())
    for seed_idx in range(3):
        load(layer, seed_idx)
        poison(layer, seed_idx)
    with pytest.raises(KernelRefusedError, match="not finite") as caught:
        load(layer, 3)
    assert caught.value.check == "quarantine"
    layer.kernel_cache.release(KERNEL.artifact_id)
    assert load(layer, 3) is True


def test_a_kernel_that_does_its_work_ends_a_run_of_failures():
    """Clean calls are told to the cache as well."""
    layer = layer_of(FlappingSource())
    for seed_idx in range(3):
        load(layer, seed_idx)
        layer(torch.ones(5, 6))
        esper.maintain(layer)
        poison(layer, seed_idx)
    assert layer.kernel_cache.quarantined() == {}
    assert layer.kernel_cache.get_stats()["recorded_successes"] == 3


def test_a_kernel_by_hand_is_no_business_of_the_cache():
    """Only what came as an artifact can be fetched again, so only that is judged."""
    layer = layer_of(FlappingSource())
    layer.graft(0, nn.Linear(6, 6), alpha=0.5, example=torch.ones(5, 6))
    poison(layer, 0)
    stats = layer.kernel_cache.get_stats()
    assert (stats["recorded_failures"], stats["recorded_successes"]) == (0, 0)


@pytest.mark.parametrize("waits", [False, True])
def test_what_a_seed_uses_is_not_evicted(waits):
    """A kernel is pinned as long as a seed holds it or waits for an example, and no longer."""
    layer = layer_of(FlappingSource())
    cache = EnhancedKernelCache(max_entries=1, source=layer.kernel_cache.source)
    layer._kasmina.shared.keep(KernelCache, cache)
    options = {} if waits else {"example": torch.ones(5, 6)}
    layer.load_kernel_sync(0, KERNEL.artifact_id, alpha=0.5, **options)
    assert cache.get_stats()["pinned"] == 1

    cache.prewarm([OTHER.artifact_id])
    assert list(cache._entries) == [KERNEL.artifact_id]
    layer.unload_kernel(0)
    cache.prewarm([OTHER.artifact_id])
    assert list(cache._entries) == [OTHER.artifact_id]
    assert cache.get_stats()["pinned"] == 0


# ---- health


def test_faults_make_a_layer_unhealthy_and_maintenance_says_so(caplog):
    """The monitor is fed with what the calls were, and names the limit that was passed."""
    layer = layer_of(FlappingSource())
    load(layer)
    for _ in range(20):
        layer(torch.ones(5, 6))
    assert esper.maintain(layer).unhealthy == ()

    (unhealthy,) = poison(layer, 0).unhealthy

    assert unhealthy.reason == "error rate is 0.13, its limit 0.1"
    assert unhealthy.health_score == 1 - 3 / 23
    assert unhealthy.reason in caplog.text
    health = layer.get_stats()["health"]
    assert (health["calls"], health["latency_ms"], health["memory_percent"]) == (23, None, None)
    assert layer.health_monitor.should_intervene()[0] is True


def test_latency_is_measured_where_telemetry_is_on():
    """What blending timed reaches the monitor in milliseconds."""
    layer = layer_of(FlappingSource(), telemetry_enabled=True)
    load(layer)
    layer.state_layout.update_telemetry(0, 2_500, 1.0)
    layer._kasmina.active_count = 5  # not one of the calls that are timed
    layer(torch.ones(5, 6))
    esper.maintain(layer)
    assert layer.health_monitor.get_stats()["latency_ms"] == 2.5


def test_copies_share_the_recovery_and_pickles_make_their_own():
    """It belongs to the source's process, as the cache does; health belongs to the layer."""
    layer = layer_of(FlappingSource())
    load(layer)
    layer(torch.ones(5, 6))
    esper.maintain(layer)
    layer._kasmina.source = None
    arrived = pickle.loads(pickle.dumps(layer))
    assert copy.deepcopy(layer).error_recovery is layer.error_recovery
    assert arrived.error_recovery is not layer.error_recovery
    assert arrived.health_monitor.get_stats()["calls"] == 1


@pytest.mark.parametrize("how", ["load_kernel", "load_kernel_sync"])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"alphas": 0.5}, TypeError, "'alphas' is none of {how}'s arguments; did you mean alpha"),
        ({"zzz": 0.5}, TypeError, "'zzz' is none of {how}'s arguments; they are alpha, mode"),
        ({"alpha": "1"}, TypeError, "alpha is a number"),
        ({"alpha": 1.5}, ValueError, "alpha is a number"),
        ({"mode": "ad"}, ValueError, "mode must be None or one of"),
        ({"position": "before"}, ValueError, "position must be None or one of"),
        ({"guard": "never"}, ValueError, "guard must be one of"),
        ({"guard": "step"}, ValueError, "sync_optimizer"),
        ({"example": [1.0]}, TypeError, "an example is a tensor"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_before_anything_is_fetched(
    how, options, error, words
):
    """By the name of the method that was called; the seed stays as it was."""
    source = FlappingSource()
    layer = KasminaLayer(8, 8, source=source)

    async def load():
        asked = getattr(layer, how)(0, KERNEL.artifact_id, **options)
        return asked if isinstance(asked, bool) else await asked

    with pytest.raises(error, match=words.format(how=how)):
        asyncio.run(load())
    assert source.threads == []
    assert layer.state_layout.state(0) == S.DORMANT
