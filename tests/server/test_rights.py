"""Who may do what: every operation that the API documents, with every scope."""

import re

import httpx2
import pytest
from registries import served, token_for

pytest.importorskip("fastapi", reason="needs the extra server")

from esper.registry.book_access import SCOPES
from esper.registry.memory import MemoryRegistry
from esper.server.app import build_api

pytestmark = [pytest.mark.network, pytest.mark.slow]

OPEN = {f"{prefix}/{name}" for prefix in ("", "/api/v1") for name in ("health", "ready")}
DIGEST = "0" * 64


def operations(api):
    """Yield method, path and the scopes that the document says for every operation."""
    for path, methods in api.openapi()["paths"].items():
        for method, operation in methods.items():
            needed = [scope for each in operation.get("security", []) for scope in each.values()]
            yield method.upper(), path, {scope for scopes in needed for scope in scopes}


def filled(path):
    """Return a path with something of the right form in each place."""
    return re.sub(r"\{(\w+)\}", lambda found: DIGEST if found[1] == "id" else "some", path)


def unguarded(api):
    """Return the operations that need no scope and are not known to be open."""
    return [path for _, path, needed in operations(api) if not needed and path not in OPEN]


def test_every_operation_asks_for_its_scope_and_for_nothing_else():
    """Without a token 401, with every scope but its own 403, with its own whatever it answers."""
    registry = MemoryRegistry()
    api = build_api(registry)
    tokens = {scope: token_for(registry, scope) for scope in SCOPES}
    wrong = []
    with served(registry) as address, httpx2.Client(base_url=address, trust_env=False) as client:
        for method, path, needed in operations(api):
            for scope, token in [(None, None), *tokens.items()]:
                headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                status = client.request(method, filled(path), headers=headers).status_code
                expected = {None: status == 401}.get(
                    scope, (status == 403) == (scope not in needed)
                )
                if path in OPEN:
                    expected = status == 200
                if not expected or status == 500:
                    wrong.append((method, path, scope, status))
    assert wrong == []
    assert unguarded(api) == []
    assert len(list(operations(api))) > 20


def test_control_a_route_without_its_scope_is_found():
    """The walk finds an operation that somebody forgot to guard."""
    api = build_api(MemoryRegistry())

    @api.get("/api/v1/forgotten")
    def forgotten():
        return {}

    assert unguarded(api) == ["/api/v1/forgotten"]


def test_a_token_that_was_revoked_counts_no_more():
    """Whoever is shut out is shut out with the next request."""
    registry = MemoryRegistry()
    text, token = registry.book.tokens.create("ben", ["read"], now_s=1.0)
    headers = {"Authorization": f"Bearer {text}"}
    with served(registry) as address, httpx2.Client(base_url=address, trust_env=False) as client:
        assert client.get("/api/v1/kernels", headers=headers).status_code == 200
        assert registry.book.tokens.revoke(token.id, now_s=2.0)
        answer = client.get("/api/v1/kernels", headers=headers)

    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["status"] == 401


def test_texts_of_tokens_are_nowhere():
    """What is kept of a token cannot be used as one."""
    registry = MemoryRegistry()
    text, _ = registry.book.tokens.create("ben", ["read"], now_s=1.0)
    rows = registry.book.database.rows("SELECT * FROM tokens")

    assert text not in str(rows)
    assert registry.book.tokens.find(rows[0][2]) is None
