"""The specification's name for the executor of kernels by themselves."""

from __future__ import annotations

from esper.contracts.errors import KernelExecutionError
from esper.running.kernel_executor import RealKernelExecutor

__all__ = ["KernelExecutionError", "RealKernelExecutor"]
