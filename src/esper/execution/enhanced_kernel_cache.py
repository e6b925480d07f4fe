"""The specification's name for the cache that lives with failing sources and kernels."""

from __future__ import annotations

from esper.fetching.enhanced_kernel_cache import EnhancedKernelCache

__all__ = ["EnhancedKernelCache"]
