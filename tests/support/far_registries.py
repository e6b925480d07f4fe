"""A registry elsewhere, without a network: it counts what it is asked, and can be down."""

import collections

from esper.contracts.errors import KernelSourceUnavailable
from esper.registry.cached_registry import CachedRegistry
from esper.registry.disk_cache import DiskCache
from esper.registry.endpoint import Endpoint
from esper.registry.memory import MemoryRegistry


class FarRegistry:
    """Another registry, asked over a network that a test can cut."""

    address = "far://kernels"

    def __init__(self, registry):
        self.endpoint = Endpoint("far", timeout_s=1.0)
        self.is_down = False
        self.waited_s = 0.0
        self.asked = collections.Counter()
        self._registry = registry

    def __getattr__(self, name):
        self.asked[name] += 1
        if self.is_down:
            raise KernelSourceUnavailable("the network is cut")
        return getattr(self._registry, name)

    def fetch(self, digest, *, shelf=None, waited_s=0.0):
        self.waited_s = waited_s
        data = self.__getattr__("fetch")(digest)
        if shelf is not None:
            shelf.append(data)
        return data


def cached_in_memory(request, settings):
    """Return a registry in memory that is asked through a cache on disk."""
    cache = DiskCache(request.getfixturevalue("tmp_path") / "cache")
    return CachedRegistry(FarRegistry(MemoryRegistry(**settings)), cache)
