"""Kernels over HTTP, from servers that do what they should not: one behaviour each."""

from __future__ import annotations

import copy
import pickle
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from misbehaving_servers import (
    CHUNKED,
    DATA,
    DIGEST,
    ENDLESS,
    OK,
    PATH,
    Changed,
    Cut,
    dripping,
    raw,
    serving,
    whole,
)

from esper import registry
from esper.contracts.errors import (
    KernelCorruptError,
    KernelNotFoundError,
    KernelSourceRefused,
    KernelSourceSuspended,
    KernelSourceUnavailable,
)
from esper.fetching.breaker_source import SourceBehindBreaker
from esper.registry import http
from esper.registry.http import HttpKernelSource
from esper.registry.http_registry import HttpRegistry
from esper.registry.memory import MemoryRegistry
from esper.resilience.clock import ManualClock

pytestmark = pytest.mark.network

LIMIT_BYTES = 10_000
PATIENCE_S = 0.2


def source_of(server, **settings):
    """Return a source with little patience and little room."""
    settings = {"timeout_s": PATIENCE_S, "max_size_bytes": LIMIT_BYTES} | settings
    return HttpKernelSource(server.url, **settings)


def test_a_tls_handshake_ends_at_the_deadline():
    """A server that accepts the connection and says nothing costs no more than the time."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = HttpKernelSource(f"https://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.1)
        with pytest.raises(KernelSourceUnavailable):
            source.fetch(DIGEST)


@pytest.mark.parametrize(
    "behave",
    [
        whole(body=b"", length=LIMIT_BYTES + 1),
        dripping(CHUNKED, b"1000\r\n" + bytes(4096) + b"\r\n"),
    ],
    ids=["announced", "in chunks"],
)
def test_more_than_the_limit_is_not_read(behave):
    """An artifact that is too long is refused when that is known, not at the deadline."""
    with serving(behave) as server, pytest.raises(KernelSourceRefused, match="at most 10000"):
        source_of(server, timeout_s=60).fetch(DIGEST)


def test_a_redirect_is_not_followed():
    """An answer that points elsewhere is an error, and nothing is asked for elsewhere."""

    def behave(handler):
        if handler.path == PATH:
            handler.answer(302, b"", Location="/elsewhere")
        else:
            handler.answer()

    with serving(behave) as server:
        with pytest.raises(KernelSourceRefused, match="302"):
            source_of(server).fetch(DIGEST)
        assert [path for path, *_ in server.requests] == [PATH]


def test_an_artifact_at_the_limit_is_taken():
    """The limit itself is not too much, announced or in chunks."""

    def in_chunks(handler):
        handler.wfile.write(CHUNKED + b"1000\r\n" + DATA + b"\r\n0\r\n\r\n")

    for behave in (whole(), in_chunks):
        with serving(behave) as server:
            assert source_of(server, max_size_bytes=len(DATA)).fetch(DIGEST) == DATA


def test_a_refused_connection_is_unavailable():
    """Where nobody listens, the source did not answer."""
    with serving(whole()) as server:
        url = server.url
    with pytest.raises(KernelSourceUnavailable):
        HttpKernelSource(url).fetch(DIGEST)


def test_a_host_that_is_not_found_is_unavailable():
    """A name without an address is the source's silence, not the caller's mistake."""
    with pytest.raises(KernelSourceUnavailable):
        HttpKernelSource("http://nobody.invalid").fetch(DIGEST)


def test_every_address_of_a_host_is_tried(monkeypatch):
    """A host of two addresses is reached where only the second listens."""
    with serving(whole()) as server:
        port = server.server_port
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{i}", port)) for i in (2, 1)
        ]
        resolve = socket.getaddrinfo
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *rest, **kw: (
                found if host == "two.example" else resolve(host, *rest, **kw)
            ),
        )
        assert HttpKernelSource(f"http://two.example:{port}").fetch(DIGEST) == DATA


def test_the_environment_changes_nothing(monkeypatch):
    """Proxies of the environment are not asked."""
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with serving(whole()) as server:
        assert source_of(server).fetch(DIGEST) == DATA


def test_what_a_request_says():
    """It asks for bytes as they are, below the base's own path, and brings nothing back."""
    with serving(whole(Set_Cookie="a=b")) as server:
        source = HttpKernelSource(server.url + "/kept/here/")
        source.fetch(DIGEST)
        source.fetch(DIGEST)

    (path, headers, first), (_, again, second) = server.requests
    assert path == f"/kept/here{PATH}"
    assert headers["Accept-Encoding"] == "identity"
    assert "Cookie" not in again
    assert first == second  # one connection


def test_a_reference_is_a_digest_or_nothing_is_asked():
    """Whatever else is given, no address is made of it."""
    with serving(whole()) as server:
        for text in ("", "../" + DIGEST, DIGEST.upper(), DIGEST + "?x", "mlp:latest"):
            with pytest.raises(ValueError, match="digest"):
                source_of(server).fetch(text)
        assert server.requests == []


def test_a_failure_leaves_the_source_usable():
    """After an answer that was cut off, the next fetch gets the artifact."""
    answers = iter([raw(OK + b"Content-Length: 4096\r\n\r\n" + DATA[:9]), whole()])

    def behave(handler):
        next(answers)(handler)

    with serving(behave) as server:
        source = source_of(server)
        with pytest.raises(KernelSourceUnavailable):
            source.fetch(DIGEST)
        assert source.fetch(DIGEST) == DATA


def test_an_overloaded_server_is_left_alone_for_as_long_as_it_says():
    """Until Retry-After is over nothing is asked, and what is said is not believed for ever."""
    clock = ManualClock()
    answers = iter([whole(503, Retry_After="30"), whole(429, Retry_After="9" * 9), whole()])

    def behave(handler):
        next(answers)(handler)

    with serving(behave) as server:
        source = source_of(server, timeout_s=60, clock=clock)
        for rest_s in (30.0, 60.0):
            with pytest.raises(KernelSourceUnavailable):
                source.fetch(DIGEST)
            clock.advance(rest_s - 1.0)
            with pytest.raises(KernelSourceSuspended, match="left alone"):
                source.fetch(DIGEST)
            clock.advance(1.0)
        assert source.fetch(DIGEST) == DATA
        assert len(server.requests) == 3


STAYING = {
    **{str(status): whole(status, b"") for status in (302, 400, 401, 403, 404, 413)},
    "a page": whole(content_type="text/html"),
    "compression": whole(Content_Encoding="gzip"),
    "too long": whole(body=b"", length=1 << 40),
}


@pytest.mark.parametrize("answer", STAYING)
def test_an_answer_that_stays_is_asked_for_once_and_charges_no_breaker(answer):
    """What a server will answer again is no failure of the way to it."""
    with serving(STAYING[answer]) as server:
        behind = SourceBehindBreaker(source_of(server, timeout_s=60))
        with pytest.raises((KernelSourceRefused, KernelNotFoundError)):
            behind.fetch(DIGEST)
        assert len(server.requests) == 1
    assert behind.breaker.stats().failed == 0


def test_control_an_answer_that_may_pass_charges_the_breaker():
    """A failure of the server is one."""
    with serving(whole(500, b"")) as server:
        behind = SourceBehindBreaker(source_of(server, timeout_s=60))
        with pytest.raises(KernelSourceUnavailable):
            behind.fetch(DIGEST)
    assert behind.breaker.stats().failed == 1


def test_threads_share_a_source():
    """Any number of threads fetch through one source at a time."""
    with serving(whole()) as server, ThreadPoolExecutor(8) as threads:
        source = source_of(server, timeout_s=60)
        assert set(threads.map(source.fetch, [DIGEST] * 64)) == {DATA}


def test_copies_of_a_source():
    """A copy is the source itself; one that travelled, or was closed, connects by itself."""
    with serving(whole()) as server:
        source = source_of(server)
        source.fetch(DIGEST)
        assert copy.deepcopy(source) is copy.copy(source) is source
        assert pickle.loads(pickle.dumps(source)).fetch(DIGEST) == DATA
        source.close()
        assert source.fetch(DIGEST) == DATA


def test_a_client_of_one_s_own_sends_its_credentials():
    """Requests go through the client that is given, under the same rules, and it stays open."""
    with (
        serving(whole()) as server,
        httpx2.Client(headers={"Authorization": "Bearer x"}, follow_redirects=True) as client,
    ):
        source = source_of(server, client=client)
        assert source.fetch(DIGEST) == DATA
        source.close()
        assert not client.is_closed
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(source)

    ((_, headers, _),) = server.requests
    assert headers["Authorization"] == "Bearer x"
    assert headers["Accept-Encoding"] == "identity"


def test_a_client_of_one_s_own_cannot_outlast_the_deadline():
    """Over a transport that limits each wait by itself, a dripping body still ends in time."""
    with (
        serving(ENDLESS["a body of known length"]) as server,
        httpx2.Client() as client,
        pytest.raises(KernelSourceUnavailable, match="in time"),
    ):
        source_of(server, client=client).fetch(DIGEST)


@pytest.mark.parametrize(
    "url",
    ["", "kernels.example", "ftp://h", "http://", "http://u:p@h", "http://h?q", "http://h:99999"],
)
def test_addresses_that_are_none_are_refused(url):
    """A base is a scheme, a host and a path; credentials do not belong in it."""
    with pytest.raises(ValueError):  # noqa: PT011 - the port's error is the library's
        HttpKernelSource(url)


@pytest.mark.parametrize("settings", [{"timeout_s": 0}, {"max_size_bytes": 0}])
def test_numbers_out_of_range_are_refused(settings):
    """A fetch needs time and room."""
    with pytest.raises(ValueError, match=r"needs (time|room)"):
        HttpKernelSource("http://h", **settings)


def test_an_address_says_which_source():
    """open_registry gives a registry for every kind of address, and asks nothing of a server."""
    source = registry.open_registry("HTTPS://kernels.example/prefix/")

    assert isinstance(source, HttpRegistry)
    assert source.base_url == "HTTPS://kernels.example/prefix"
    assert isinstance(registry.open_registry("memory:"), MemoryRegistry)


def test_a_fetch_that_is_cut_off_goes_on_where_it_was():
    """However often the connection ends, every byte comes once."""
    cut = Cut(most=200)
    with serving(cut) as server:
        assert source_of(server, timeout_s=60).fetch(DIGEST) == DATA

    assert cut.num_answers == 21
    assert cut.num_sent == len(DATA)


def test_a_fetch_that_brings_nothing_more_is_given_up():
    """A connection that ends before its first byte is a failure, not a reason to go on for ever."""
    cut = Cut(most=0)
    with serving(cut) as server, pytest.raises(KernelSourceUnavailable):
        source_of(server, timeout_s=60).fetch(DIGEST)

    assert cut.num_answers == 1


def test_what_changes_midway_is_refused():
    """The rest of something else is never joined to the first half."""
    changed = Changed()
    with serving(changed) as server, pytest.raises(KernelCorruptError, match="not what it was"):
        source_of(server, timeout_s=60).fetch(DIGEST)


def test_control_without_if_range_the_rest_of_something_else_is_joined(monkeypatch):
    """Whoever only asks for the rest gets it, and finds out when all of it has come."""
    headers = http.Download.headers

    def heedless(self):
        return {name: value for name, value in headers(self).items() if name != "If-Range"}

    monkeypatch.setattr(http.Download, "headers", heedless)
    with serving(Changed()) as server, pytest.raises(KernelCorruptError, match="other bytes"):
        source_of(server, timeout_s=60, max_size_bytes=2 * LIMIT_BYTES).fetch(DIGEST)
