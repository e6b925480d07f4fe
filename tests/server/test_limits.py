"""What one request may take, and what is said to those who take more."""

import contextlib
import json
import socket

import httpx2
import pytest
from kernel_artifacts import artifact
from registries import served, token_for

pytest.importorskip("fastapi", reason="needs the extra server")

from esper.registry.memory import MemoryRegistry
from esper.server.limits import Limits

pytestmark = [pytest.mark.network, pytest.mark.slow]

QUICK = Limits(requests=1, body_grace_s=0.2, body_bytes_per_s=1e6)
PATIENT = Limits(body_grace_s=60.0)


@contextlib.contextmanager
def half_sent(address, token, length=100_000):
    """Begin to publish, and send no more than a byte of the body."""
    host, port = address.removeprefix("http://").split(":")
    head = (
        "POST /api/v1/kernels HTTP/1.1\r\nHost: here\r\n"
        f"Authorization: Bearer {token}\r\nContent-Length: {length}\r\n"
        "Expect: 100-continue\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1_000).startswith(b"HTTP/1.1 100 ")  # it is being served now
        connection.sendall(b"x")
        yield connection


def answered(connection):
    """Return the status of what comes, and the rest of it; the connection ends then."""
    data = b""
    while part := connection.recv(65_536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_a_slow_body_ends_by_its_deadline():
    """Whoever sends a byte and then nothing is told so, and leaves nothing behind."""
    registry = MemoryRegistry()
    token = token_for(registry, "publish")
    with served(registry, limits=QUICK) as address, half_sent(address, token) as connection:
        status, said = answered(connection)

    assert status == 408
    assert "send faster" in said["detail"]
    assert registry.verify().unreferenced == ()


def test_control_without_the_deadline_a_slow_body_is_waited_for():
    """The same body is still waited for where more time is given."""
    registry = MemoryRegistry()
    token = token_for(registry, "publish")
    with served(registry, limits=PATIENT) as address, half_sent(address, token) as connection:
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)


SLOW_HEADERS = {
    "silent": b"",
    "half a line": b"GET /heal",
    "half": b"GET /health HTTP/1.1\r\nHost:",
}


@contextlib.contextmanager
def connected(**limits):
    """Serve within limits, and connect without a word."""
    with served(MemoryRegistry(), limits=Limits(**limits)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            yield connection


@pytest.mark.parametrize("sent", SLOW_HEADERS.values(), ids=SLOW_HEADERS)
def test_slow_headers_end_by_their_deadline(sent):
    """Who connects and says nothing, or never ends the headers, is told so, and is gone."""
    with connected(headers_s=0.2) as connection:
        connection.sendall(sent)
        said = connection.recv(1_000)
        assert connection.recv(1) == b""
    assert said.startswith(b"HTTP/1.1 408 ")


def test_headers_of_a_further_request_end_by_their_deadline_too():
    """A connection that was good for two requests is watched as it begins the next."""
    with connected(headers_s=0.2) as connection:
        for _ in range(2):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
            said = b""
            while not said.endswith(b"}"):
                said += connection.recv(1_000)
            assert said.startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET /health")
        assert connection.recv(1_000).startswith(b"HTTP/1.1 408 ")


def test_control_without_the_deadline_slow_headers_are_waited_for():
    """The same half of a request still has its place where more time is given."""
    with connected(headers_s=60.0) as connection:
        connection.sendall(SLOW_HEADERS["half"])
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_overload_is_said_at_once():
    """More requests than are served are told when to come again; health is always answered."""
    registry = MemoryRegistry()
    token = token_for(registry, "publish", "read")
    limits = Limits(requests=1, body_grace_s=60.0)
    headers = {"Authorization": f"Bearer {token}"}
    with (
        served(registry, limits=limits) as address,
        httpx2.Client(base_url=address, headers=headers, trust_env=False) as client,
    ):
        assert client.get("/api/v1/kernels").status_code == 200
        with half_sent(address, token):
            answer = client.get("/api/v1/kernels")
            assert answer.status_code == 429
            assert answer.headers["Retry-After"] == "1"
            assert client.get("/health").status_code == 200
        while client.get("/api/v1/kernels").status_code == 429:
            pass  # the other connection is closing


def test_a_body_that_is_too_long_is_refused():
    """Announced or in chunks, an artifact and a document have their limits."""
    registry = MemoryRegistry(max_artifact_bytes=10_000)
    token = token_for(registry, "publish", "promote")
    headers = {"Authorization": f"Bearer {token}"}
    data = artifact(1, size=10_000)

    def chunks():
        yield data[:9_000]
        yield data[9_000:]

    with (
        served(registry) as address,
        httpx2.Client(base_url=f"{address}/api/v1", headers=headers, trust_env=False) as client,
    ):
        for answer in (
            client.post("/kernels", content=data),
            client.post("/kernels", content=chunks()),
            client.put("/names/a/tags/b", content=b" " * (1 << 19)),
        ):
            assert answer.status_code == 413
        encoded = client.post("/kernels", content=b"", headers={"Content-Encoding": "gzip"})
        assert encoded.status_code == 415
    assert registry.search() == []
