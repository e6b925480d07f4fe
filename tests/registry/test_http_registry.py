"""A registry over HTTP, from a server that answers what no registry would say."""

import json
import tracemalloc

import httpx2
import pytest
from kernel_artifacts import artifact
from registries import served, token_for

pytest.importorskip("fastapi", reason="needs the extra server")

from esper.contracts import artifact_format
from esper.contracts.artifact import KernelMetadata
from esper.contracts.errors import (
    CircuitOpenError,
    KernelNotFoundError,
    KernelSourceRefused,
    KernelSourceSuspended,
    KernelSourceUnavailable,
    KernelSourceUnreadable,
)
from esper.contracts.ports import RegistryEntry
from esper.registry import documents
from esper.registry.exchange import Exchange
from esper.registry.http_registry import HttpRegistry
from esper.registry.memory import MemoryRegistry
from esper.registry.oci_registry import OciRegistry
from esper.server.limits import Limits

pytestmark = pytest.mark.network

DIGEST = "0" * 64
QUESTIONS = [
    lambda registry: registry.search(),
    lambda registry: registry.names(),
    lambda registry: registry.tags("mlp"),
    lambda registry: registry.resolve("mlp:prod"),
    lambda registry: registry.history("mlp", "prod"),
    lambda registry: registry.outcomes(DIGEST),
    lambda registry: registry.validations(DIGEST),
    lambda registry: registry.verify(),
    lambda registry: registry.collect(),
    lambda registry: registry.put(b""),
]
ANSWERS = {
    "no JSON": b"<html>",
    "a list": b"[]",
    "nothing": b"",
    "another object": b"{}",
    "numbers where lists are": b'{"kernels":7,"names":7,"tags":7,"moves":7}',
    "lists of numbers": b'{"kernels":[7],"names":[7],"moves":[7],"after":null}',
    "nesting": b"[" * 100_000,
}
ENTRY = documents.of_entry(
    RegistryEntry(
        digest=DIGEST,
        size_bytes=1,
        metadata=KernelMetadata.from_document(
            artifact_format.parse(artifact(1)).header["metadata"]
        ),
        record={},
        tags=("mlp:prod",),
        number=1,
        published_at_s=1.0,
    )
)
PARTS = {
    "more than was asked for": (b"x" * 5_000, "bytes 0-4999/5000"),
    "more than it says": (b"x" * 5_000, "bytes 0-9/5000"),
    "another part": (b"x" * 10, "bytes 77-86/5000"),
    "less": (b"x" * 3, "bytes 0-2/5000"),
    "a part of nothing": (b"x" * 10, ""),
}


@pytest.fixture
def answering():
    """Return a function that makes a registry whose server gives one answer to everything."""

    def made(body, status=200, **headers):
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        transport = httpx2.MockTransport(
            lambda request: httpx2.Response(status, headers=sent, stream=httpx2.ByteStream(body))
        )
        client = httpx2.Client(transport=transport)
        registry = HttpRegistry("http://kernels.example", sleep=lambda _: None)
        registry._exchange = Exchange("http://kernels.example", timeout_s=9.0, client=client)
        return registry

    return made


@pytest.fixture(params=["http", "oci"])
def given_s(request):
    """Return a function that asks a registry of a deadline of 9 s, and says what a request had."""

    def asked(ask):
        given = []

        def refuse(sent):
            given.append(sent.extensions["timeout"]["read"])
            return httpx2.Response(403, stream=httpx2.ByteStream(b""))

        client = httpx2.Client(transport=httpx2.MockTransport(refuse))
        exchange = Exchange("http://kernels.example", timeout_s=9.0, client=client)
        if request.param == "http":
            registry = HttpRegistry("http://kernels.example", timeout_s=9.0)
            registry._exchange = exchange
        else:
            registry = OciRegistry("oci://kernels.example/mlp", timeout_s=9.0)
            registry._session.exchange = exchange
        with pytest.raises(KernelSourceRefused):
            ask(registry)
        return given[0]

    return asked


def test_what_is_published_has_time_to_travel(given_s):
    """A second for every 64 KiB, as a server gives it, beside the time that every call has."""
    data = artifact(1, size=600_000)
    travel_s = len(data) / Limits().body_bytes_per_s
    assert travel_s > 30
    assert travel_s + 8 < given_s(lambda registry: registry.put(data)) <= travel_s + 9


def test_control_what_only_asks_has_the_time_that_every_call_has(given_s):
    """So the test above would notice."""
    assert given_s(lambda registry: registry.names()) <= 9


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_cannot_be_read_is_none(answering, answer):
    """Whatever a server says in place of an answer, the registry did not answer."""
    for ask in QUESTIONS:
        with pytest.raises(KernelSourceUnavailable, match="not to be read"):
            ask(answering(ANSWERS[answer]))


@pytest.mark.parametrize(
    "headers", [{"Content_Type": "text/html"}, {"Content_Encoding": "gzip"}], ids=["page", "gzip"]
)
def test_what_is_no_registry_is_asked_once(answering, headers):
    """A proxy's page will not change by asking again, and says nothing of the server's health."""
    registry = answering(b"{}", **headers)
    waited = []
    registry.endpoint._retry._sleep = waited.append
    for _ in range(30):
        with pytest.raises(KernelSourceUnreadable, match="another form than JSON"):
            registry.names()
    assert waited == []
    assert registry.endpoint.breaker.state == "closed"


def test_control_an_answer_that_may_pass_is_asked_for_again_and_opens_the_breaker(answering):
    """So the test above would notice."""
    registry = answering(b"", status=503)
    waited = []
    registry.endpoint._retry._sleep = waited.append
    for _ in range(30):
        with pytest.raises((KernelSourceUnavailable, CircuitOpenError)):
            registry.names()
    assert waited
    assert registry.endpoint.breaker.state == "open"


def test_an_answer_without_end_is_not_read(answering):
    """A document has a length at which nobody listens any more."""
    with pytest.raises(KernelSourceRefused, match="more than"):
        answering(b" " * ((1 << 23) + 1)).names()


def test_a_document_takes_no_more_memory_than_was_allowed(answering):
    """Eight MiB of empty objects would be two hundred, and are not made."""
    far = answering(b'{"names":[' + b"{}," * (2_700_000) + b"0]}")
    tracemalloc.start()
    with pytest.raises(KernelSourceUnavailable, match="not to be read"):
        far.names()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 64 * 2**20


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": 7},
        {"id": "../../etc"},
        {"size_bytes": "1"},
        {"size_bytes": True},
        {"record": []},
        {"tags": "mlp:prod"},
        {"tags": ["../x:y"]},
        {"number": None},
        {"published_at_s": float("nan")},
        {"deprecation": {"reason": 7, "successor": None, "actor": None, "deprecated_at_s": 1}},
        {"standing": {"effect": "x", "standard_error": 1, "lower": 0, "num_runs": 1}},
    ],
)
def test_an_entry_is_of_its_form_or_none(answering, wrong):
    """What a server says of a kernel has the types that whoever reads it counts on."""

    def page(entry):
        return answering(json.dumps({"kernels": [entry], "after": None}).encode())

    assert page(ENTRY).search()[0].tags == ("mlp:prod",)
    with pytest.raises(KernelSourceUnavailable, match="not to be read"):
        page({**ENTRY, **wrong}).search()


def test_lists_are_of_their_form_or_none(answering):
    """So has what it says of tags, moves, and itself."""
    said = {
        "tags": {"prod": "x"},
        "moves": [{"digest": "x", "moved_at_s": 1.0, "actor": None}],
        "intact": 1,
        **{name: ["x"] for name in ("quarantined", "missing", "unreferenced")},
        "names": ["mlp"],
        "after": ["mlp"],
    }
    for ask in (
        lambda registry: registry.tags("mlp"),
        lambda registry: registry.history("mlp", "prod"),
        lambda registry: registry.verify(),
        lambda registry: registry.names(),
    ):
        with pytest.raises(KernelSourceUnavailable, match="not to be read"):
            ask(answering(json.dumps(said).encode()))


def test_a_list_has_an_end(answering):
    """A page that comes again, or is longer than was asked for, is not read for ever."""
    endless = answering(json.dumps({"kernels": [ENTRY], "after": 1}).encode())
    with pytest.raises(KernelSourceRefused, match="for ever"):
        endless.search()
    long = answering(json.dumps({"kernels": [ENTRY] * 3, "after": 1}).encode())
    with pytest.raises(KernelSourceRefused, match="more than was asked for"):
        long.search(limit=1)
    check = {"intact": 0, "quarantined": [], "missing": [], "unreferenced": [], "after": DIGEST}
    with pytest.raises(KernelSourceRefused, match="for ever"):
        answering(json.dumps(check).encode()).verify()


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_the_one_that_was_asked_for(answering, part):
    """Neither longer, nor from elsewhere."""
    body, said = PARTS[part]
    with pytest.raises(KernelSourceRefused, match="another part"):
        answering(body, 206, Content_Range=said).read(DIGEST, 0, 10)
    assert answering(b"xy", 206, Content_Range="bytes 8-9/10").read(DIGEST, 8, 10) == b"xy"


def test_a_length_that_is_not_said_is_no_answer(answering):
    """Nobody is told of a missing header by a ``KeyError``."""
    with pytest.raises(KernelSourceRefused, match="says no length"):
        answering(b"").stat(DIGEST)


def test_words_of_a_server_give_no_orders_to_a_terminal(answering):
    """Whatever a refusal says, it is letters."""
    problem = {"type": "urn:esper:problem:not-found", "detail": "\x1b[2Jgone\x07"}
    far = answering(json.dumps(problem).encode(), 404, Content_Type="application/problem+json")
    with pytest.raises(KernelNotFoundError, match="gone") as raised:
        far.resolve("mlp:prod")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("token", ["of two\nlines", "t\u00f6ken", " padded ", ""])
def test_a_token_that_no_header_carries_is_refused_unsaid(token):
    """It is refused where it is given, and no message has it."""
    with pytest.raises(ValueError, match="a token is made of") as raised:
        HttpRegistry("http://kernels.example", token=token)
    assert not token or token not in str(raised.value)
    with pytest.raises(ValueError, match="a token"):
        MemoryRegistry().book.tokens.create("ann", ["read"], now_s=0.0, text=token * 16)


@pytest.mark.slow
def test_who_may_not_is_refused_and_who_overloads_rests():
    """A token without its scope is an answer that stays; an overloaded server is left alone."""
    registry = MemoryRegistry()
    with served(registry) as address:
        reader = HttpRegistry(address, token=token_for(registry, "read"))
        assert reader.names() == []
        with pytest.raises(KernelSourceRefused, match="has not the scope admin"):
            reader.collect()
        with pytest.raises(KernelSourceRefused, match="a token is needed"):
            HttpRegistry(address).names()
        reader.close()
    with served(registry, limits=Limits(requests=0)) as address:
        reader = HttpRegistry(address, token=token_for(registry, "read"), timeout_s=0.9)
        with pytest.raises(KernelSourceUnavailable, match="come again"):
            reader.names()
        with pytest.raises(KernelSourceSuspended, match="left alone"):
            reader.names()
        reader.close()
