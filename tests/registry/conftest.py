"""Both registries, and artifacts to put into them."""

import pytest

from esper.registry.directory import DirectoryRegistry
from esper.registry.memory import MemoryRegistry


class WallClock:
    """Seconds since 1970 that a test sets."""

    def __init__(self):
        self.now_s = 1_000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def wall():
    return WallClock()


@pytest.fixture(params=["memory", "directory"])
def registry(request, tmp_path, wall):
    """Return each implementation of the port in turn, empty."""
    if request.param == "memory":
        made = MemoryRegistry(wall_s=wall, max_artifact_bytes=100_000)
    else:
        made = DirectoryRegistry(tmp_path / "store", wall_s=wall, max_artifact_bytes=100_000)
    yield made
    made.close()
