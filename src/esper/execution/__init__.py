"""The specification's face: layers with seeds under the names that it gave them.

What the layers stand on lives in the rooms below (``seeds``, ``forward``, ``state``), and so do the
caches, the executor and the streams whose names are kept here. The door is ``kasmina_layer``;
``host_class`` makes a layer of a module.
"""

from __future__ import annotations

from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.async_kasmina_conv2d_layer import AsyncKasminaConv2dLayer
from esper.execution.exceptions import (
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
from esper.execution.exchange import watch_exchanges
from esper.execution.kasmina_attention_layer import KasminaAttentionLayer
from esper.execution.kasmina_batchnorm_layer import KasminaBatchNormLayer
from esper.execution.kasmina_conv2d_layer import KasminaConv2dLayer
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kasmina_layernorm_layer import KasminaLayerNormLayer
from esper.fetching.enhanced_kernel_cache import EnhancedKernelCache
from esper.fetching.error_recovery import ErrorRecoveryManager, ErrorType
from esper.fetching.kernel_cache import KernelCache
from esper.resilience.health_monitor import HealthMonitor
from esper.running.kernel_executor import RealKernelExecutor
from esper.state.roster import at_first_kernel
from esper.state.state_layout import KasminaStateLayout
from esper.streams.async_conv2d_kernel import AsyncConv2dKernel
from esper.streams.gradient_sync import GradientSynchronizer
from esper.streams.stream_manager import StreamManager

__all__ = [
    "AsyncConv2dKernel",
    "AsyncExecutionError",
    "AsyncKasminaConv2dLayer",
    "CacheError",
    "EnhancedKernelCache",
    "ErrorRecoveryManager",
    "ErrorType",
    "GradientSyncError",
    "GradientSynchronizer",
    "HealthMonitor",
    "KasminaAttentionLayer",
    "KasminaBatchNormLayer",
    "KasminaConv2dLayer",
    "KasminaException",
    "KasminaLayer",
    "KasminaLayerNormLayer",
    "KasminaStateLayout",
    "KernelCache",
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
    "RealKernelExecutor",
    "SeedLifecycleError",
    "SeedLifecycleState",
    "StreamManager",
]

at_first_kernel(watch_exchanges)  # a layer may come out of a pickle, and nobody wraps anything
