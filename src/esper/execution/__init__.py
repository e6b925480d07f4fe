"""The execution engine: layers with seeds, their state, and the kernels in them."""

from __future__ import annotations

from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.exceptions import KernelCompilationError, KernelExecutionError
from esper.execution.kasmina_conv2d_layer import KasminaConv2dLayer
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernel_cache import KernelCache
from esper.execution.state_layout import KasminaStateLayout

__all__ = [
    "KasminaConv2dLayer",
    "KasminaLayer",
    "KasminaStateLayout",
    "KernelCache",
    "KernelCompilationError",
    "KernelExecutionError",
    "SeedLifecycleState",
]
