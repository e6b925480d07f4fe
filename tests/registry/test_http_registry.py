"""A registry over HTTP, from a server that answers what no registry would say."""

import httpx2
import pytest
from registries import served, token_for

pytest.importorskip("fastapi", reason="needs the extra server")

from esper.contracts.errors import (
    KernelSourceRefused,
    KernelSourceSuspended,
    KernelSourceUnavailable,
)
from esper.registry.exchange import Exchange
from esper.registry.http_registry import HttpRegistry
from esper.registry.memory import MemoryRegistry
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


@pytest.fixture
def answering():
    """Return a function that makes a registry whose server gives one answer to everything."""

    def made(body, status=200):
        transport = httpx2.MockTransport(
            lambda request: httpx2.Response(status, stream=httpx2.ByteStream(body))
        )
        client = httpx2.Client(transport=transport)
        registry = HttpRegistry("http://kernels.example", sleep=lambda _: None)
        registry._exchange = Exchange("http://kernels.example", timeout_s=9.0, client=client)
        return registry

    return made


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_that_cannot_be_read_is_none(answering, answer):
    """Whatever a server says in place of an answer, the registry did not answer."""
    for ask in QUESTIONS:
        with pytest.raises(KernelSourceUnavailable, match="not to be read"):
            ask(answering(ANSWERS[answer]))


def test_an_answer_without_end_is_not_read(answering):
    """A document has a length at which nobody listens any more."""
    with pytest.raises(KernelSourceRefused, match="more than"):
        answering(b" " * ((1 << 25) + 1)).names()


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
