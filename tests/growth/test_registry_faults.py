"""A registry that is down or worse, on a real socket: a run neither waits for it nor notices."""

import gc
import statistics
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from growing import batches, compute_loss, equal_states, growing, state_of, wrapped
from misbehaving_registries import REGISTRIES, TOKEN

from esper.fetching.outbox import Outbox
from esper.fetching.preloader import Preloader
from esper.growth.policies import EveryN
from esper.registry.http_registry import HttpRegistry
from esper.resilience.attempt import attempt

TIMEOUT_S = 1.0
"""Of a request; a step that waits for one shows it."""
LEAST_S = 0.05
"""By how much the longest step may be longer, on a machine of one's own."""
SHARED_S = 0.5
"""The same where others work beside; what waits for a request takes longer yet."""


class Recorded:
    """Remembers by which thread a registry was asked."""

    def __init__(self, registry):
        self._registry, self.threads = registry, []

    def __getattr__(self, name):
        asked = getattr(self._registry, name)
        if name not in ("put", "get", "fetch", "search", "report_outcome"):
            return asked

        def noted(*args, **more):
            self.threads.append(threading.current_thread())
            return asked(*args, **more)

        return noted


def without_a_core_s():
    """Return how long this thread was ready to go on and others had the cores; 0 where unknown."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0


class NotItsOwn:
    """How long a thread was kept by what no run of it did: a context manager.

    Others had the cores; or the garbage of all runs was looked through, everything that has lived
    for a while, which takes 0.2 s once in thousands of steps and falls to whoever comes by then.
    """

    def __enter__(self):
        self.took_s, self._collecting_s = -without_a_core_s(), 0.0
        gc.callbacks.append(self._note)
        return self

    def __exit__(self, *_):
        gc.callbacks.remove(self._note)
        self.took_s += without_a_core_s() + self._collecting_s

    def _note(self, phase, info):
        if info["generation"] == 2:
            now_s = time.perf_counter() - without_a_core_s()
            self._collecting_s += now_s if phase == "stop" else -now_s


@dataclass
class Run:
    """One of two runs that go on step by step in turn.

    ``held_s`` is what its steps took without what was not their own: what they did themselves, and
    what they waited for.
    """

    registry: object
    steps_s: list = field(default_factory=list)
    held_s: list = field(default_factory=list)

    def __post_init__(self):
        torch.manual_seed(0)
        self.model, self.optimizer = wrapped()
        policy = EveryN(20)
        self.grower = growing(self.model, self.optimizer, policy=policy, registry=self.registry)

    def step(self, batch):
        with NotItsOwn() as others:
            began = time.perf_counter()
            loss = compute_loss(self.model, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.grower.step(loss, batch=batch)
            self.steps_s.append(time.perf_counter() - began)
        self.held_s.append(self.steps_s[-1] - others.took_s)

    def close(self):
        began = time.perf_counter()
        self.grower.close()
        return time.perf_counter() - began


def beside(address, num, *, num_alone):
    """Return a run with a registry and some without, and how long its closing took.

    They are trained in turn, each as often the first and the last of a round as any other.
    """
    registry = HttpRegistry(address, token=TOKEN, timeout_s=TIMEOUT_S)
    runs = [Run(Recorded(registry)), *(Run(None) for _ in range(num_alone))]
    try:
        for i, batch in enumerate(batches(num)):
            for turn in range(len(runs)):
                runs[(i + turn) % len(runs)].step(batch)
    finally:
        closing_s = runs[0].close()
        for each in runs[1:]:
            each.close()
        registry.close()
    return runs[0], runs[1:], closing_s


def both(address, num):
    """Return a run with a registry and one without, trained in turn, and how long closing took."""
    run, (alone,), closing_s = beside(address, num, num_alone=1)
    return run, alone, closing_s


def trace_kernels(num):
    """Trace every kernel of a run once, which would make a step of the first one long."""
    run = Run(None)
    for batch in batches(num):
        run.step(batch)
    run.close()


@pytest.fixture(scope="module", autouse=True)
def compiled():
    trace_kernels(80)


def check(run, alone, closing_s):
    """What holds whatever the registry does, and however long the run is."""
    assert run.registry.threads, "it was never asked"
    assert threading.current_thread() not in run.registry.threads
    assert equal_states(state_of(run.model), state_of(alone.model))
    assert any(t.taken for t in run.grower.report().trials)
    assert closing_s <= 5.0


def shared_s(alone):
    """By how much a step may be longer where others work beside: a busy machine slows both runs."""
    return max(SHARED_S, *alone.held_s)


def p99_s(run):
    return statistics.quantiles(run.held_s, n=100)[-1]


def check_times(run, alone):
    """What holds of the steps of a run, beside those of runs of which none has a registry."""
    usual = statistics.median(s for each in alone for s in each.held_s)
    assert statistics.median(run.held_s) <= 1.02 * usual
    tails = [p99_s(each) for each in alone]
    largest = max(tails) / min(tails)  # of any of them beside any other
    assert p99_s(run) / statistics.median(tails) <= largest


@pytest.mark.slow
@pytest.mark.parametrize("fault", REGISTRIES)
def test_a_run_does_not_notice_what_its_registry_does(fault):
    """A package is taken over, bit for bit as without one; no step and no end waits."""
    with REGISTRIES[fault]() as address:
        run, alone, closing_s = both(address, 80)
    check(run, alone, closing_s)
    assert max(run.held_s) <= max(alone.held_s) + shared_s(alone)


@pytest.mark.torture
@pytest.mark.parametrize("num", [2_000, 10_000])
@pytest.mark.parametrize("fault", REGISTRIES)
def test_long_runs_take_no_longer(fault, num):
    """The median step is at most 2 % longer, beside five runs without one; the tail is as theirs.

    Steps are looked at without what was not their own, the longest to 50 ms. Where others have the
    cores, a thread more that wants one is felt all the same: leave it a machine of its own.
    """
    trace_kernels(num)
    with REGISTRIES[fault]() as address:
        run, alone, closing_s = beside(address, num, num_alone=5)
    slowest = max(alone, key=lambda each: max(each.held_s))
    check(run, slowest, closing_s)
    assert max(run.held_s) <= max(slowest.held_s) + LEAST_S
    check_times(run, alone)


def ask_on_the_steps_thread(monkeypatch):
    """Let a step itself ask the registry, as it was before."""

    def deliver(box, parcel):
        attempt(lambda: parcel.deliver(box._registry))

    monkeypatch.setattr(Outbox, "send", deliver)
    monkeypatch.setattr(Preloader, "_start", lambda loader: loader._catch_up())


def test_what_is_not_a_step_s_own_is_told_apart():
    """A collection of everything is taken off; what a step waits for, and does, is not."""
    with NotItsOwn() as others:
        began = time.perf_counter()
        gc.collect()
        collected_s = time.perf_counter() - began
    assert others.took_s >= 0.5 * collected_s

    with NotItsOwn() as others:
        began = time.perf_counter()
        gc.collect(1)
        threading.Event().wait(0.05)
        own_s = time.perf_counter() - began
    assert own_s - others.took_s >= 0.05 - 0.001


@pytest.mark.slow
def test_a_run_that_asks_on_its_own_thread_does(monkeypatch):
    """The control: a step waits for a server that says nothing."""
    ask_on_the_steps_thread(monkeypatch)
    with REGISTRIES["black hole"]() as address:
        run, alone, _ = both(address, 30)
    assert threading.current_thread() in run.registry.threads
    assert max(run.held_s) > max(alone.held_s) + shared_s(alone)
