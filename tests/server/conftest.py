"""A registry that is served on loopback, and who asks it."""

import httpx2
import pytest
from registries import served, token_for

pytest.importorskip("fastapi", reason="needs the extra server")

from esper.registry.book_access import SCOPES
from esper.registry.directory import DirectoryRegistry


@pytest.fixture
def kept(tmp_path):
    """Return the registry that is served."""
    made = DirectoryRegistry(tmp_path / "store", max_artifact_bytes=1 << 26)
    yield made
    made.close()


@pytest.fixture
def ask(kept):
    """Return a client whose token may do everything."""
    with served(kept) as address, client_of(address, token_for(kept, *SCOPES)) as client:
        yield client


def client_of(address, token):
    """Return a plain client with a token."""
    return httpx2.Client(
        base_url=f"{address}/api/v1",
        headers={"Authorization": f"Bearer {token}"},
        trust_env=False,
        timeout=30.0,
    )
