"""The specification's name for the cache of fetched kernels."""

from __future__ import annotations

from esper.fetching.kernel_cache import KernelCache

__all__ = ["KernelCache"]
