"""A rank that shares a cache with others of its node, light enough to be started by the dozen."""

from esper.registry import disk_cache
from esper.registry.cached_registry import CachedRegistry
from esper.registry.http_registry import HttpRegistry


def fetch_and_tell(folder, address, digest, told):
    """Fetch once; put into a queue that it waits for another, and how many bytes came."""
    says_once = iter(["waits"])
    disk_cache.time.sleep = lambda _: [told.put(each) for each in says_once]
    near = CachedRegistry(HttpRegistry(address, timeout_s=60.0), disk_cache.DiskCache(folder))
    told.put(len(near.fetch(digest)))
