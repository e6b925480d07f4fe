"""What is likely to be wanted is at hand before it is asked for."""

import os
import signal
import threading

import pytest
from kernel_artifacts import artifact

from esper.contracts.artifact_format import digest_of
from esper.contracts.errors import KernelSourceRefused, KernelSourceUnavailable
from esper.fetching.kernel_cache import KernelCache
from esper.fetching.preloader import PAGE, PER_SITE, Preloader, Question
from esper.registry.memory import MemoryRegistry

NUM = 8


class Decoded:
    """Stands for an artifact: kernels of these tests have no blueprint."""

    def __init__(self, data, artifact_id):
        if digest_of(data) != artifact_id:
            raise ValueError("other bytes")
        self.kernel_binary, self.artifact_id = data, artifact_id


def decode(data, *, artifact_id):
    return Decoded(data, artifact_id)


class Watched(MemoryRegistry):
    """Counts what it is asked, and answers when it may."""

    def __init__(self):
        super().__init__()
        self.searches, self.fetched, self.threads = [], [], set()
        self.error = self.tampered = None
        self.may_answer = threading.Event()
        self.may_answer.set()

    def search(self, **asked):
        self._wait()
        self.searches.append(asked)
        return super().search(**asked)

    def fetch(self, digest):
        self._wait()
        self.fetched.append(digest)
        return b"other bytes" if digest == self.tampered else super().fetch(digest)

    def _wait(self):
        self.threads.add(threading.current_thread())
        self.may_answer.wait(10)
        if self.error is not None:
            raise self.error


def question(**fields):
    return Question(
        **{
            "kind": "linear",
            "in_features": 4,
            "out_features": 4,
            "dtype": "float32",
            "num_axes": None,
            "capacity_only": True,
            "max_parameters": None,
            **fields,
        }
    )


@pytest.fixture
def registry():
    made = Watched()
    made.digests = [made.put(artifact(number)) for number in range(NUM)]
    return made


def preloader(registry, **settings):
    return Preloader(registry, KernelCache(source=registry, decode=decode), **settings)


def settle(loader):
    """Wait until it has nothing to do."""
    assert loader.settle(10)


def test_the_best_few_of_a_site_are_at_hand(registry):
    """In the order of the registry; asked once, in one bounded page, on another thread."""
    loader = preloader(registry)
    loader.expect(is_likely=True)
    loader.ask([question(), question()])
    settle(loader)

    assert [each.artifact.artifact_id for each in loader.at_hand()] == registry.digests[:PER_SITE]
    (asked,) = registry.searches
    assert (asked["limit"], asked["order"], asked["deprecated"]) == (PAGE, "proven", False)
    assert threading.current_thread() not in registry.threads
    assert loader.has_answers


@pytest.mark.parametrize(("kind", "position"), [("linear", None), ("channel_norm", "serial")])
def test_a_site_that_takes_serial_kernels_only_asks_for_those(registry, kind, position):
    """The others would take the places of those that may stand there."""
    loader = preloader(registry)
    loader.ask([question(kind=kind)])
    settle(loader)
    assert registry.searches[0].get("position") == position


def test_nothing_is_fetched_that_is_not_likely(registry):
    """Questions are asked all the same; what was called off is fetched once it is likely again."""
    loader = preloader(registry)
    loader.ask([question()])
    settle(loader)
    assert (len(registry.searches), registry.fetched) == (1, [])

    registry.may_answer.clear()
    loader.expect(is_likely=True)
    loader.expect(is_likely=False)
    registry.may_answer.set()
    settle(loader)
    assert len(registry.fetched) <= 1, "what is under way is not broken off"

    loader.expect(is_likely=True)
    settle(loader)
    assert registry.fetched == registry.digests[:PER_SITE]


def test_no_more_bytes_are_fetched_than_allowed(registry):
    """And none at all, nor a question, where there is no room."""
    size = len(artifact(0))
    loader = preloader(registry, budget_bytes=2 * size + 1)
    loader.expect(is_likely=True)
    loader.ask([question()])
    settle(loader)
    assert (len(registry.fetched), loader.num_bytes) == (2, 2 * size)

    closed = preloader(registry, budget_bytes=0)
    closed.expect(is_likely=True)
    closed.ask([question()])
    settle(closed)
    assert len(registry.searches) == 1


def test_what_is_refused_gives_way_to_the_next(registry):
    """It is told of once, and never at hand."""
    bad = registry.digests[0]
    registry.tampered = bad
    loader = preloader(registry)
    loader.expect(is_likely=True)
    for _ in range(2):
        loader.ask([question()])
        settle(loader)

    found = [each.artifact.artifact_id for each in loader.at_hand()]
    assert found == registry.digests[1 : PER_SITE + 1]
    assert [(h.operation, h.digest, h.is_final) for h in loader.hitches()] == [("fetch", bad, True)]


def test_an_outage_is_told_once_and_asked_about_at_the_next_decision(registry):
    """Not by itself: nothing is asked between two calls."""
    registry.error = KernelSourceUnavailable("it did not answer")
    loader = preloader(registry)
    loader.expect(is_likely=True)
    for _ in range(3):
        loader.ask([question()])
        settle(loader)
        assert not loader.has_answers
    assert [(h.operation, h.is_final) for h in loader.hitches()] == [("search", False)]

    registry.error = None
    loader.ask([question()])
    settle(loader)
    assert loader.has_answers
    assert len(loader.at_hand()) == PER_SITE


def test_who_may_not_ask_asks_once(registry):
    """A refusal stays one."""
    registry.error = KernelSourceRefused("no right to read")
    loader = preloader(registry)
    for _ in range(3):
        loader.ask([question()])
        settle(loader)
    assert [(h.operation, h.is_final) for h in loader.hitches()] == [("search", True)]


def test_kernels_that_a_run_had_are_loaded_by_digest(registry):
    """What does not come in time is named; closing waits for nothing."""
    loader = preloader(registry)
    assert loader.load(registry.digests[-2:], timeout_s=10) == []
    assert [e.artifact.artifact_id for e in loader.at_hand()] == registry.digests[-2:]

    registry.may_answer.clear()
    missing = registry.digests[0]
    assert loader.load([missing], timeout_s=0.01) == [missing]
    loader.close()
    registry.may_answer.set()


def asked_with_a_pause(loader, registry):
    """Ask, let everything come, and ask anew; return the threads that were seen."""
    for _ in range(3):
        loader.ask([question()])
        assert loader.settle(10)
    return registry.threads


def test_a_thread_stays_for_the_next_question(registry):
    """Who starts one waits until the machine lets it run, which a step must not do each time."""
    loader = preloader(registry)
    assert len(asked_with_a_pause(loader, registry)) == 1
    loader.close()
    (worker,) = registry.threads
    worker.join(10)
    assert not worker.is_alive(), "closing ends it"


def test_control_a_thread_that_does_not_stay_is_started_each_time(registry, monkeypatch):
    """As it was."""
    monkeypatch.setattr("esper.fetching.preloader.LINGER_S", 0.0)
    loader = preloader(registry)
    for num in range(1, 4):
        loader.ask([question()])
        assert loader.settle(10)
        for worker in registry.threads:
            worker.join(10)
        assert len(registry.threads) == num


def test_where_no_thread_starts_the_next_question_tries(registry, monkeypatch):
    """A machine that has no room for one more costs no step."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    loader = preloader(registry)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        loader.ask([question()])
    assert not loader.has_answers
    loader.ask([question()])
    assert loader.settle(10)
    assert loader.has_answers


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_a_thread_of_its_own(registry):
    """The parent's, which stays for its next question, is not there."""
    loader = preloader(registry)
    loader.ask([question()])
    assert loader.settle(10)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        loader.ask([question()])
        os._exit(0 if loader.settle(10) and len(registry.searches) == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
