"""The engine's errors under the specification's module name; they live in ``contracts.errors``."""

from __future__ import annotations

from esper.contracts.errors import (
    AsyncExecutionError,
    CacheError,
    GradientSyncError,
    KasminaException,
    KernelCompilationError,
    KernelCorruptError,
    KernelExecutionError,
    KernelLoadError,
    KernelNotFoundError,
    KernelRefusedError,
    KernelSourceRefused,
    KernelSourceSuspended,
    KernelSourceUnavailable,
    KernelSourceUnreadable,
    SeedLifecycleError,
)

__all__ = [
    "AsyncExecutionError",
    "CacheError",
    "GradientSyncError",
    "KasminaException",
    "KernelCompilationError",
    "KernelCorruptError",
    "KernelExecutionError",
    "KernelLoadError",
    "KernelNotFoundError",
    "KernelRefusedError",
    "KernelSourceRefused",
    "KernelSourceSuspended",
    "KernelSourceUnavailable",
    "KernelSourceUnreadable",
    "SeedLifecycleError",
]
