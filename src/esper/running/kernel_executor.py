"""The executor: compiles blueprints to artifacts, and runs artifacts on tensors by themselves.

A layer does not need it in a forward: a seed has a kernel of its own. It is for whoever has an
artifact and a tensor: to try a kernel, to compare it, to serve it.
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import deque
from typing import TYPE_CHECKING, Final, TypedDict, final

import numpy as np
import torch
from torch import Tensor

from esper.compiler.compile import compile_blueprint
from esper.contracts.artifact import CompiledKernelArtifact
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.errors import BlueprintError, KernelCompilationError, KernelExecutionError
from esper.resilience.clock import MonotonicClock
from esper.running.backends import EagerBackend
from esper.running.module_cache import ModuleCache

if TYPE_CHECKING:
    from torch import nn

    from esper.contracts.ports import Clock
    from esper.running.backends import KernelBackend

_KERNEL_FAILURES: Final = (RuntimeError, ValueError, IndexError, AssertionError)
"""What operations of torch raise for an input that they do not take."""


class PerformanceStats(TypedDict):
    """What :meth:`RealKernelExecutor.get_performance_stats` returns.

    The first two hold ``count``, the successes since the start, ``failed``, and over the last
    ``window`` successes ``mean``, ``p50``, ``p95``, ``p99`` and ``last`` with their unit behind
    them, each None before the first.

    Attributes:
        compilation: In milliseconds (``mean_ms`` and so on), making the module ready included.
        execution: In microseconds (``mean_us`` and so on).
        cache: That of the modules; see :meth:`ModuleCache.get_stats`.
        device: The device that executed last; None before the first execution.
        backend: The back end's name.
    """

    compilation: dict[str, float | None]
    execution: dict[str, float | None]
    cache: dict[str, float]
    device: str | None
    backend: str


@final
class RealKernelExecutor:
    """Compiles blueprints and executes kernels, for as many threads as there are.

    It keeps one module for each artifact and device, in evaluation mode, and all its callers
    share it: the result depends on the artifact and the input alone, but for kernels that draw
    random numbers. A copy of an executor is the executor itself; one that is pickled arrives
    with its settings and nothing else.

    Args:
        backend: What makes modules of artifacts; the eager one, which trains, if None.
        max_cache_size_mb: Budget in MiB for the parameters and buffers of modules, at least 0.
        clock: Measures durations; the monotonic clock if None.
        window: Number of durations that the statistics are taken over, at least 1.
        device_timing: Whether executions off the CPU are timed by events on the device. That
            waits for the device in every call; without it what is timed there is the launch.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        *,
        backend: KernelBackend | None = None,
        max_cache_size_mb: float = 512,
        clock: Clock | None = None,
        window: int = 1024,
        device_timing: bool = False,
    ) -> None:
        if window < 1:
            msg = f"statistics need a window of at least 1 duration, found {window}"
            raise ValueError(msg)
        self._build_equal = functools.partial(
            type(self),
            backend=backend,
            max_cache_size_mb=max_cache_size_mb,
            clock=clock,
            window=window,
            device_timing=device_timing,
        )
        self.backend: KernelBackend = EagerBackend() if backend is None else backend
        self._clock = MonotonicClock() if clock is None else clock
        self._device_timing = device_timing
        self._modules = ModuleCache(max_cache_size_mb)
        self._lock = threading.Lock()
        self._compilations = _Durations(window)
        self._executions = _Durations(window)
        self._device: torch.device | None = None

    async def compile_kernel(
        self, blueprint: BlueprintIR, target_device: str = "auto"
    ) -> CompiledKernelArtifact:
        """Compile on a thread, without blocking the event loop; as :meth:`compile_kernel_sync`."""
        return await asyncio.to_thread(self.compile_kernel_sync, blueprint, target_device)

    def compile_kernel_sync(
        self, blueprint: BlueprintIR, target_device: str = "auto"
    ) -> CompiledKernelArtifact:
        """Compile a blueprint with its initial weights.

        The same blueprint gives the same artifact, bytes and id, whatever the device, the back
        end and the process.

        Args:
            blueprint: What to compile.
            target_device: Where the module is made ready: ``"cpu"``, a device of this machine
                such as ``"cuda:0"``, or ``"auto"``, the accelerator if there is one. Inputs on
                another device are executed there all the same.

        Raises:
            KernelCompilationError: The blueprint breaks a rule (the cause says which), does not
                trace over symbolic sizes, or the back end cannot represent its kernel.
            TypeError: ``blueprint`` is no BlueprintIR.
            ValueError: ``target_device`` is none of the above.
        """
        _expect("compile_kernel", blueprint, BlueprintIR)
        device = _device_of(target_device)
        start_s = self._clock.now()
        try:
            artifact = compile_blueprint(blueprint, clock=self._clock)
            self.module_of(artifact, device)
        except BlueprintError as error:
            self._count(self._compilations, failed=True)
            msg = f"blueprint {blueprint.id!r} cannot be compiled: {error}"
            raise KernelCompilationError(msg) from error
        except KernelCompilationError:
            self._count(self._compilations, failed=True)
            raise
        self._count(self._compilations, self._clock.now() - start_s)
        return artifact

    async def execute_kernel(
        self, kernel_artifact: CompiledKernelArtifact, inputs: Tensor
    ) -> Tensor:
        """Execute at once, on the caller's thread; as :meth:`execute_kernel_sync`.

        Grad mode, autocast and the current stream belong to a thread, so the work stays on it.
        """
        return self.execute_kernel_sync(kernel_artifact, inputs)

    def execute_kernel_sync(
        self, kernel_artifact: CompiledKernelArtifact, inputs: Tensor
    ) -> Tensor:
        """Apply a kernel to a tensor, on the tensor's device, in the ambient grad mode.

        Args:
            kernel_artifact: As compiled, or as decoded from a registry's bytes.
            inputs: Tensor of the artifact's ``input_spec``.

        Returns:
            Tensor of its ``output_spec``, on the device of ``inputs``. With gradients enabled it
            leads back to ``inputs`` and to the parameters of :meth:`module_of`.

        Raises:
            KernelExecutionError: The kernel failed on this input; the cause says how.
            KernelCompilationError: The back end cannot represent the kernel.
            KernelCorruptError: The artifact's bytes do not fit its blueprint.
            torch.OutOfMemoryError: The device has no memory left.
            TypeError: An argument is of another kind.
        """
        _expect("execute_kernel", inputs, Tensor)
        module = self.module_of(kernel_artifact, inputs.device)
        try:
            output, seconds = self._timed(module, inputs)
        except (KernelExecutionError, torch.OutOfMemoryError):
            self._count(self._executions, failed=True)
            raise
        except _KERNEL_FAILURES as error:
            self._count(self._executions, failed=True)
            raise _failure(kernel_artifact, inputs, error) from error
        self._device = inputs.device
        self._count(self._executions, seconds)
        return output

    def module_of(
        self, kernel_artifact: CompiledKernelArtifact, device: torch.device | str
    ) -> nn.Module:
        """Return the module that executes an artifact on a device.

        Whoever changes its weights changes what this executor computes for all its callers,
        until the module is evicted and built from the artifact again. To train a kernel for a
        layer, graft it: a seed has parameters of its own.

        Args:
            kernel_artifact: As compiled or decoded.
            device: A device of this machine.

        Raises:
            KernelCompilationError: The back end cannot represent the kernel.
            KernelCorruptError: The artifact's bytes do not fit its blueprint.
            TypeError: ``kernel_artifact`` is no CompiledKernelArtifact.
        """
        _expect("the executor", kernel_artifact, CompiledKernelArtifact)
        target = torch.empty(0, device=device).device if isinstance(device, str) else device
        build = functools.partial(self.backend.build, kernel_artifact, device=target)
        return self._modules.get((kernel_artifact.artifact_id, target), build)

    def get_performance_stats(self) -> PerformanceStats:
        """Return what was measured, in the specification's keys."""
        with self._lock:
            compilation = self._compilations.summary("ms", per_second=1e3)
            execution = self._executions.summary("us", per_second=1e6)
        return {
            "compilation": compilation,
            "execution": execution,
            "cache": self._modules.get_stats(),
            "device": None if self._device is None else str(self._device),
            "backend": self.backend.name,
        }

    def __copy__(self) -> RealKernelExecutor:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> RealKernelExecutor:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        if self is _SHARED:
            return shared_executor, ()
        return self._build_equal, ()

    def _timed(self, module: nn.Module, inputs: Tensor) -> tuple[Tensor, float]:
        """Return the output, and the seconds that it took."""
        if self._device_timing and inputs.device.type != "cpu":
            return _timed_by_events(module, inputs)
        start_s = self._clock.now()
        output: Tensor = module(inputs)
        return output, self._clock.now() - start_s

    def _count(
        self, durations: _Durations, seconds: float | None = None, *, failed: bool = False
    ) -> None:
        with self._lock:
            durations.num_failed += failed
            if seconds is not None:
                durations.add(seconds)


def shared_executor() -> RealKernelExecutor:
    """Return the executor that all layers of this process share."""
    return _SHARED


class _Durations:
    """The last durations of one kind of work, and how many there have been."""

    def __init__(self, window: int) -> None:
        self.num_failed = 0
        self._count = 0
        self._last_s: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        self._count += 1
        self._last_s.append(seconds)

    def summary(self, unit: str, *, per_second: float) -> dict[str, float | None]:
        names = [f"{name}_{unit}" for name in ("mean", "p50", "p95", "p99", "last")]
        counts = {"count": self._count, "failed": self.num_failed}
        if not self._last_s:
            return {**counts, **dict.fromkeys(names)}
        durations = np.array(self._last_s) * per_second
        p50, p95, p99 = np.quantile(durations, (0.5, 0.95, 0.99))
        values = map(float, (durations.mean(), p50, p95, p99, durations[-1]))
        return {**counts, **dict(zip(names, values, strict=True))}


def _expect(who: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        msg = f"{who} takes a {kind.__name__}, got {type(value).__name__}"
        raise TypeError(msg)


def _device_of(target: str) -> str:
    """Return the name of a device of this machine.

    Raises:
        ValueError: This machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if target == "auto":
        return "cpu" if accelerator is None else str(accelerator)
    try:
        device = torch.device(target)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    is_here = accelerator is not None and device.type == accelerator.type
    if device.type == "cpu" or (is_here and (device.index or 0) < torch.accelerator.device_count()):
        return target
    msg = f"target_device {target!r} is no device of this machine; expected 'auto', 'cpu'" + (
        "" if accelerator is None else f" or '{accelerator.type}:<index>'"
    )
    raise ValueError(msg)


def _timed_by_events(module: nn.Module, inputs: Tensor) -> tuple[Tensor, float]:
    stream = torch.accelerator.current_stream(inputs.device)
    begin, end = (torch.Event(inputs.device, enable_timing=True) for _ in range(2))
    begin.record(stream)
    output: Tensor = module(inputs)
    end.record(stream)
    end.synchronize()
    return output, begin.elapsed_time(end) / 1e3


def _failure(
    artifact: CompiledKernelArtifact, inputs: Tensor, error: Exception
) -> KernelExecutionError:
    spec = artifact.metadata.input_spec
    msg = (
        f"kernel {artifact.artifact_id} of blueprint {artifact.blueprint_id!r} reads {spec.dtype} "
        f"of shape {spec.shape} and failed on {inputs.dtype} of shape {tuple(inputs.shape)}: "
        f"{error!s:.500}"
    )
    return KernelExecutionError(msg)


_SHARED: Final = RealKernelExecutor()
