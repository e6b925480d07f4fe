"""One thread for every test: the machines are small and shared, and results do not change."""

import signal

import crafted_measures
import pytest
import torch
from execution_hosts import KINDS

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_tests(tmp_path_factory):
    """Let commands keep what registries gave in a folder of the tests, not in the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ESPER_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    """Each kind of layer that the engine's promises are checked on."""
    return KINDS[request.param]


@pytest.fixture
def ctrl_c():
    """Let SIGINT raise, also where the tests' shell ignores it, as it does for a job with ``&``."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def short_trials(monkeypatch):
    """Let ten updates be a trial, where a test says itself what each arrangement is worth."""
    monkeypatch.setattr("esper.growth.sizing.MIN_TRIAL", crafted_measures.TRIAL_UPDATES)


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["", "no look"])
def with_and_without_a_look(request, monkeypatch):
    """Let guards look at numbers, as they may in host memory, and not, as on a device."""
    if not request.param:
        monkeypatch.setattr("esper.forward.value_gates.seen_finite", lambda y: False)
