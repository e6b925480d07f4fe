"""A registry behind a cache: what is asked of it, and what is served where it is silent."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from cached_ranks import fetch_and_tell
from far_registries import FarRegistry
from kernel_artifacts import artifact
from misbehaving_servers import DATA, DIGEST, Changed, Cut, raw, serving, whole

from esper import registry as registries
from esper.contracts.errors import (
    KernelCorruptError,
    KernelNotFoundError,
    KernelRefusedError,
    KernelSourceRefused,
    KernelSourceSuspended,
    KernelSourceUnavailable,
)
from esper.contracts.signature import KernelSignature
from esper.fetching.breaker_source import SourceBehindBreaker
from esper.fetching.kernel_cache import KernelCache
from esper.registry import disk_cache
from esper.registry.cached_registry import CachedRegistry
from esper.registry.disk_cache import DiskCache
from esper.registry.endpoint import Endpoint
from esper.registry.http_registry import HttpRegistry
from esper.registry.memory import MemoryRegistry
from esper.registry.oci_registry import OciRegistry
from esper.registry.trusted_source import TrustedSource
from esper.resilience.clock import ManualClock

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def far():
    return FarRegistry(MemoryRegistry())


@pytest.fixture
def near(far, tmp_path):
    """Return the registry behind a cache, which is empty."""
    return CachedRegistry(far, DiskCache(tmp_path), wall_s=lambda: 1_000.0)


def test_an_artifact_is_fetched_once(near, far):
    """The second time it comes from the disk, whoever asks."""
    digest = near.put(artifact(1))

    assert [near.fetch(digest) for _ in range(3)] == [artifact(1)] * 3
    assert near.stat(digest) == len(artifact(1))
    assert near.read(digest, 3, 5) == artifact(1)[3:8]
    assert (far.asked["fetch"], far.asked["stat"], far.asked["read"]) == (1, 0, 0)


class Crowd:
    """Lets a far registry answer a fetch when so many are there: at it, or waiting for it."""

    def __init__(self, num_expected, far, monkeypatch):
        self._num_expected = num_expected
        self._here = set()
        self._all_are_here = threading.Event()
        answer = far.fetch

        def fetch(*args, **kwargs):
            self._come()
            assert self._all_are_here.wait(30)
            return answer(*args, **kwargs)

        monkeypatch.setattr(far, "fetch", fetch)
        monkeypatch.setattr(disk_cache.time, "sleep", lambda _: self._come())

    def _come(self):
        self._here.add(threading.get_ident())
        if len(self._here) == self._num_expected:
            self._all_are_here.set()


def fetched_at_once(near, digest, num_threads):
    """Return what so many threads get that fetch at the same time."""
    with ThreadPoolExecutor(num_threads) as threads:
        return list(threads.map(near.fetch, [digest] * num_threads))


def test_many_at_once_are_one_download(near, far, monkeypatch):
    """Who comes while another fetches has the other's bytes."""
    digest = near.put(artifact(1))
    far.endpoint.timeout_s = 60.0
    Crowd(8, far, monkeypatch)

    assert fetched_at_once(near, digest, 8) == [artifact(1)] * 8
    assert far.asked["fetch"] == 1


def test_control_without_a_wait_each_fetches(near, far, monkeypatch):
    """It is the wait that spares the registry."""
    digest = near.put(artifact(1))
    far.endpoint.timeout_s = 0.0
    Crowd(8, far, monkeypatch)

    assert fetched_at_once(near, digest, 8) == [artifact(1)] * 8
    assert far.asked["fetch"] == 8


def test_one_that_stalls_is_waited_for_half_of_the_time(near, far, tmp_path):
    """A stopped process costs a fetch half of its deadline, and the other half is left for it."""
    digest = near.put(artifact(1))
    far.endpoint.timeout_s = 0.1

    with DiskCache(tmp_path).receive(digest):
        assert near.fetch(digest) == artifact(1)

    assert 0.05 <= far.waited_s < 10


def test_what_was_waited_is_taken_from_the_deadline():
    """A call whose time has passed is not made; another has what is left of it."""
    endpoint = Endpoint("far", timeout_s=10.0, clock=(clock := ManualClock()))

    assert endpoint.call(lambda until_s: until_s - clock.now(), may_repeat=True, waited_s=4) == 6.0
    assert endpoint.call(lambda until_s: until_s - clock.now(), may_repeat=True, waited_s=40) == 0.0


@pytest.mark.slow
def test_a_dead_process_holds_up_nobody(tmp_path):
    """Of four processes one fetches; it is killed, and another goes on where it was for all."""
    context = multiprocessing.get_context("spawn")
    told, half_sent = context.Queue(), threading.Event()

    def behave(handler):
        if len(handler.server.requests) > 1:
            Cut(most=len(DATA))(handler)
            return
        Cut(most=300)(handler)
        half_sent.set()
        handler.server.is_over.wait(30)

    with serving(behave) as server:
        ranks = [
            context.Process(target=fetch_and_tell, args=(tmp_path, server.url, DIGEST, told))
            for _ in range(4)
        ]
        ranks[0].start()
        assert half_sent.wait(30)
        for rank in ranks[1:]:
            rank.start()
        assert [told.get(timeout=30) for _ in range(3)] == ["waits"] * 3
        os.kill(ranks[0].pid, signal.SIGKILL)
        assert [told.get(timeout=30) for _ in range(3)] == [len(DATA)] * 3
        for rank in ranks:
            rank.join()

    assert len(server.requests) == 2


def test_what_was_had_is_had_while_the_registry_is_down(near, far):
    """Digest and name:tag are what they were; what was never had is not there."""
    digest, other = near.put(artifact(1)), near.put(artifact(2))
    near.tag("mlp", "prod", digest)
    near.fetch(near.resolve("mlp:prod"))
    far.is_down = True

    assert near.fetch(near.resolve("mlp:prod")) == artifact(1)
    for ask in (lambda: near.fetch(other), lambda: near.resolve("mlp:dev"), near.names):
        with pytest.raises(KernelSourceUnavailable, match="cut"):
            ask()
    far.is_down = False
    assert near.fetch(other) == artifact(2)


def test_a_tag_is_asked_for_while_the_registry_answers(near, far):
    """What is remembered never stands in the way of a move, or of a tag that was taken away."""
    first, second = near.put(artifact(1)), near.put(artifact(2))
    near.tag("mlp", "prod", first)
    near.resolve("mlp:prod")
    near.tag("mlp", "prod", second)

    assert near.resolve("mlp:prod") == second
    near.untag("mlp", "prod")
    with pytest.raises(KernelNotFoundError):
        near.resolve("mlp:prod")
    far.is_down = True
    with pytest.raises(KernelSourceUnavailable):
        near.resolve("mlp:prod")


def signature_of(digest):
    """Return a signature that nobody made."""
    return KernelSignature(artifact_id=digest, key_id="0" * 64, signed_at_s=7, signature="0" * 128)


class AnySignature:
    """Trusts whoever has signed."""

    def check(self, digest, signatures):
        if not list(signatures):
            raise KernelRefusedError("nobody has signed it", check="signature")


def test_what_is_signed_is_trusted_while_the_registry_is_down(near, far, tmp_path):
    """Signatures are where the artifact is; altered ones are none, and unsigned stays refused."""
    digest, unsigned = near.put(artifact(1)), near.put(artifact(2))
    near.attach_signature(signature_of(digest))
    trusting = TrustedSource(near, AnySignature())
    assert trusting.fetch(digest) == artifact(1)
    with pytest.raises(KernelRefusedError):
        trusting.fetch(unsigned)
    far.is_down = True

    assert trusting.fetch(digest) == artifact(1)
    with pytest.raises(KernelRefusedError):
        trusting.fetch(unsigned)
    (kept,) = (tmp_path / "signatures").rglob(digest)
    kept.write_text('[{"artifact_id": 7}]')
    with pytest.raises(KernelSourceUnavailable, match="cut"):
        trusting.fetch(digest)


def test_that_there_is_none_is_not_remembered(near):
    """What is published a moment later is there; so is what a failure hid."""
    digest = hashlib.sha256(artifact(1)).hexdigest()
    with pytest.raises(KernelNotFoundError):
        near.fetch(digest)
    near.put(artifact(1))

    assert near.fetch(digest) == artifact(1)


def test_a_refusal_is_an_answer_and_no_silence(near, far, monkeypatch):
    """Who may not ask any more is told so, and gets nothing that was remembered."""
    near.tag("mlp", "prod", near.put(artifact(1)))
    near.resolve("mlp:prod")

    def refuse(_):
        raise KernelSourceRefused("no right")

    monkeypatch.setattr(far, "resolve", refuse, raising=False)
    with pytest.raises(KernelSourceRefused):
        near.resolve("mlp:prod")


@pytest.fixture
def no_socket(monkeypatch):
    """Let nobody open a socket, and count who tried."""
    tried = []

    def refuse(*_, **__):
        tried.append(1)
        raise OSError("no sockets in this test")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


@pytest.mark.parametrize("address", [NOWHERE, "https://kernels.example"])
def test_offline_no_socket_is_opened(tmp_path, no_socket, address):
    """Digest and name:tag come from the cache; all else is refused at once, and nobody asked."""
    cache = DiskCache(tmp_path)
    with cache.receive(DIGEST) as part:
        part.append(DATA)
        part.is_whole = True
    cache.remember(address, "mlp:prod", DIGEST, 1_000.0)

    offline = registries.open_registry(address, cache=tmp_path, offline=True)

    assert offline.fetch(offline.resolve("mlp:prod")) == DATA
    assert offline.exists(DIGEST)
    assert not offline.exists("0" * 64)
    for ask in (
        lambda: offline.fetch("0" * 64),
        lambda: offline.resolve("mlp:dev"),
        lambda: offline.put(artifact(1)),
        offline.search,
        offline.names,
    ):
        with pytest.raises(KernelSourceSuspended, match="offline"):
            ask()
    assert no_socket == []


def test_control_asking_for_the_tag_first_opens_one(tmp_path, no_socket):
    """A client that is only slow to give up asks the network before it looks at the disk."""
    DiskCache(tmp_path).remember(NOWHERE, "mlp:prod", DIGEST, 1_000.0)

    online = registries.open_registry(NOWHERE, cache=tmp_path)

    assert online.resolve("mlp:prod") == DIGEST
    assert no_socket


def test_offline_without_a_cache_is_refused():
    """Nothing could ever be had, and that is said when it is opened."""
    with pytest.raises(ValueError, match="without a cache"):
        registries.open_registry(NOWHERE, offline=True)


def test_bytes_are_compared_before_they_are_kept_or_parsed(near, far, monkeypatch):
    """A registry that gives other bytes leaves nothing in the cache."""
    digest = near.put(artifact(1))
    far_fetch = far.fetch
    monkeypatch.setattr(
        far,
        "fetch",
        lambda digest, shelf, **_: (shelf.append(b"x"), far_fetch(digest)[::-1])[1],
    )
    with pytest.raises(KernelCorruptError, match="other bytes"):
        near.fetch(digest)
    monkeypatch.undo()

    assert near.fetch(digest) == artifact(1)


def test_a_kernel_from_the_disk_is_verified_before_it_is_parsed(near, tmp_path):
    """Altered on disk, it is fetched again: no decoder ever sees it."""
    digest = near.put(artifact(1))
    near.fetch(digest)
    path = tmp_path / "artifacts" / digest
    path.write_bytes(path.read_bytes()[::-1])
    seen = []

    cache = KernelCache(source=near, decode=lambda data, artifact_id: seen.append(data))
    cache.load_kernel_sync(digest)

    assert seen == [artifact(1)]


def test_what_is_on_the_disk_is_served_while_the_breaker_is_open(near, far):
    """A source that looks after itself is asked, since it may have it at hand."""
    digest = near.put(artifact(1))
    near.fetch(digest)
    for _ in range(5):
        far.endpoint.breaker.permit().fail()

    behind = SourceBehindBreaker(near)

    assert behind.breaker is far.endpoint.breaker
    assert str(behind.breaker.state) == "open"
    assert behind.fetch(digest) == artifact(1)


def cached(server, folder, **settings):
    """Return the registry of a server behind a cache, which does not wait before a retry."""
    from esper.registry.http_registry import HttpRegistry

    far = HttpRegistry(server.url, sleep=lambda _: None, **({"timeout_s": 60.0} | settings))
    return CachedRegistry(far, DiskCache(folder))


@pytest.mark.network
def test_a_download_goes_on_in_another_client(tmp_path):
    """What came before a server went silent is not sent again."""
    cut = Cut(most=600)

    def behave(handler):
        if cut.num_answers < 3 or len(server.requests) > 8:
            cut(handler)
        else:
            handler.hang_up()

    with serving(behave) as server:
        with pytest.raises(KernelSourceUnavailable):
            cached(server, tmp_path).fetch(DIGEST)
        assert cached(server, tmp_path).fetch(DIGEST) == DATA
        assert cached(server, tmp_path).fetch(DIGEST) == DATA

    assert cut.num_sent == len(DATA)


FETCH = """
import sys
from esper import registry
address, cache, digest = sys.argv[1:]
registry.open_registry(address, cache=cache).fetch(digest)
"""


@pytest.mark.slow
@pytest.mark.network
def test_a_download_goes_on_after_kill_9(tmp_path):
    """A process that dies in the middle of a download leaves what has come to the next."""
    cut, has_half = Cut(most=2_000), threading.Event()

    def stalling(handler):
        cut(handler)
        if cut.num_answers == 1:
            has_half.set()
            handler.close_connection = False
            server.is_dead.wait(30)

    with serving(stalling) as server:
        server.is_dead = threading.Event()
        process = subprocess.Popen([sys.executable, "-c", FETCH, server.url, tmp_path, DIGEST])
        assert has_half.wait(60)
        part = tmp_path / "partial" / DIGEST
        while not (part.exists() and part.stat().st_size == 2_000):
            os.sched_yield()
        process.kill()
        process.wait()
        server.is_dead.set()
        assert cached(server, tmp_path).fetch(DIGEST) == DATA

    assert cut.num_sent == len(DATA)


@pytest.mark.network
def test_one_that_travels_has_the_same_cache(tmp_path):
    """A copy in another process finds on disk what the first one fetched."""
    with serving(whole()) as server:
        near = registries.open_registry(server.url, cache=tmp_path)
        assert near.fetch(DIGEST) == DATA
        assert pickle.loads(pickle.dumps(near)).fetch(DIGEST) == DATA
        assert len(server.requests) == 1


@pytest.mark.network
def test_what_changed_meanwhile_is_refused_and_not_joined(tmp_path):
    """The rest of something else is never put behind the half that is kept."""
    changed = Changed(most=600)
    with serving(changed) as server:
        with pytest.raises(KernelCorruptError):
            cached(server, tmp_path).fetch(DIGEST)
        with pytest.raises(KernelCorruptError, match="other bytes"):
            cached(server, tmp_path).fetch(DIGEST)

    assert list((tmp_path / "artifacts").iterdir()) == []
    assert list((tmp_path / "partial").iterdir()) == []


@pytest.mark.network
def test_a_damaged_half_costs_one_more_request(tmp_path):
    """What was altered on the disk is found at the end, and all of it is asked for again."""
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / DIGEST).write_bytes(b"x" * 600)
    cut = Cut(most=len(DATA))
    with serving(cut) as server:
        assert cached(server, tmp_path).fetch(DIGEST) == DATA
    assert cut.num_answers == 2


@pytest.mark.network
@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 413])
def test_an_answer_that_stays_is_asked_for_once(tmp_path, status):
    """It is repeated by nobody, and charges no breaker."""
    with serving(whole(status, b"")) as server:
        far = cached(server, tmp_path)
        with pytest.raises((KernelSourceRefused, KernelNotFoundError)):
            far.fetch(DIGEST)
        assert len(server.requests) == 1
    assert far.endpoint.breaker.stats().failed == 0


def test_whether_reports_are_kept_is_said_by_who_is_asked(tmp_path):
    """A cache before a registry of images keeps none either; a server keeps them."""
    cache = DiskCache(tmp_path)
    images = OciRegistry("oci://127.0.0.1:1/team/kernels")
    assert not CachedRegistry(images, cache).keeps_reports
    assert CachedRegistry(HttpRegistry("http://127.0.0.1:1"), cache).keeps_reports


@pytest.mark.network
def test_control_a_failure_that_may_pass_is_asked_again(tmp_path):
    """Twice a failure, then the artifact: the caller sees only the artifact."""
    answers = iter([whole(500, b""), raw(b""), whole()])

    def behave(handler):
        next(answers)(handler)

    with serving(behave) as server:
        far = cached(server, tmp_path)
        assert far.fetch(DIGEST) == DATA
    assert far.endpoint.breaker.stats().failed == 2


@pytest.mark.network
def test_retries_have_a_budget_and_a_breaker_ends_them(tmp_path):
    """Ten callers of a server that always fails: three retries, and then it is left alone."""
    with serving(whole(500, b"")) as server:
        far = cached(server, tmp_path)
        for _ in range(10):
            with pytest.raises(KernelSourceUnavailable):
                far.fetch(DIGEST)
        assert len(server.requests) == 5
    assert far.endpoint.breaker.stats().openings == 1
