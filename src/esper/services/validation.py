"""Validation: a compiled kernel is built and tried on its own, at a layer that stands in.

What it has to show is what any layer asks of it later (``seeds/probe.py``): shape, dtype, gradients
that are finite and reach every layer, no writing to its input. Beside that it is measured.
"""

from __future__ import annotations

import statistics
import weakref
from typing import TYPE_CHECKING, Any, Final, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper.compiler.graph import plan
from esper.compiler.lowering import instantiate
from esper.compiler.shapes import Probe, infer, probes
from esper.contracts.compile_options import CompileOptions
from esper.contracts.errors import BlueprintError, KernelRefusedError
from esper.contracts.kernel_reports import ValidationReport
from esper.execution.host_class import adopt
from esper.resilience.clock import MonotonicClock
from esper.seeds.probe import probe
from esper.state.kernel import prepare_kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.contracts.artifact import CompiledKernelArtifact
    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.ports import Clock

_NUM_CALLS: Final = 20
_MEASURED_S: Final = 0.5


def validate(
    artifact: CompiledKernelArtifact,
    options: CompileOptions | None = None,
    *,
    clock: Clock | None = None,
) -> ValidationReport:
    """Try a kernel on the CPU, at a layer of its own. No random state changes.

    Args:
        artifact: The kernel.
        options: What it is tried on; the defaults if None.
        clock: Measures how long a forward takes.

    Returns:
        Whether it passed, or the first check that it did not. A kernel that passed was measured:
        ``input_shape`` and ``output_shape``; ``parameters``, ``size_bytes`` of the artifact;
        ``identity_at_birth``, whether the layer's output is the host's, bit for bit (else the
        kernel begins at alpha 0); ``latency_us``, the median of up to 20 forwards without
        gradients; ``peak_memory_bytes`` of all tensors that a forward and a backward hold at once,
        gradients among them, parameters and input not; ``threads`` of torch's.

    Raises:
        BlueprintError: The artifact's blueprint breaks a rule.
        KernelCorruptError: Its bytes do not fit its blueprint.
    """
    options, clock = options or CompileOptions(), clock or MonotonicClock()
    kernel = instantiate(artifact)
    reason, findings = "", {}
    try:
        x, output_shape = _example(artifact, options)
        findings = _tried(artifact, kernel, x, output_shape, clock)
    except KernelRefusedError as refused:
        reason = str(refused)
    except BlueprintError as refused:
        reason = f"an input of batch {options.batch} and size {options.size}: {refused}"
    return ValidationReport(
        artifact_id=artifact.artifact_id,
        toolchain=f"torch {torch.__version__}",
        passed=not reason,
        reason=reason[:1_000],
        findings=findings,
    )


def _tried(
    artifact: CompiledKernelArtifact,
    kernel: nn.Module,
    x: Tensor,
    output_shape: tuple[int, ...],
    clock: Clock,
) -> JsonObject:
    """Return what was measured of a kernel.

    Raises:
        KernelRefusedError: It did not pass a check.
    """
    is_serial = artifact.blueprint.position == "serial"
    layer = adopt(_StandIn(None if is_serial else output_shape, x), name="stand-in", num_seeds=1)
    layer.train()
    found = probe(layer, prepare_kernel(layer, artifact), x, clock=clock)
    return {
        "input_shape": list(x.shape),
        "output_shape": list(output_shape),
        "parameters": artifact.metadata.parameter_count,
        "size_bytes": len(artifact.kernel_binary),
        "identity_at_birth": found.is_identity,
        "latency_us": _latency_us(kernel, x, clock),
        "peak_memory_bytes": _peak_memory_bytes(kernel, x),
        "threads": torch.get_num_threads(),
    }


@final
class _StandIn(nn.Module):
    """A host that gives what a kernel has to match: its input, or numbers of its output's shape."""

    def __init__(self, output_shape: tuple[int, ...] | None, x: Tensor) -> None:
        super().__init__()
        self.h = None if output_shape is None else _numbers(output_shape, x.dtype, seed=1)
        self.scale = nn.Parameter(torch.ones((), dtype=x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output that the kernel joins."""
        return (x if self.h is None else self.h) * self.scale


def _example(
    artifact: CompiledKernelArtifact, options: CompileOptions
) -> tuple[Tensor, tuple[int, ...]]:
    """Return an input of a kernel, and the shape of its output for it.

    Raises:
        BlueprintError: An input of these sizes is more than a kernel may take.
        KernelRefusedError: A kernel behind its host changes the shape.
    """
    made, spec = plan(artifact.blueprint), artifact.blueprint.input_spec
    least = probes(made)[0].first
    sizes = Probe(leading=(options.batch,), first=max(options.size, least), step=1)
    shape = sizes.shape_of(spec)
    output_shape = infer(made, shape)
    if artifact.blueprint.position == "serial" and output_shape != shape:
        msg = f"a serial kernel gives the shape that it reads, {shape}, found {output_shape}"
        raise KernelRefusedError(msg, check="shape")
    return _numbers(shape, getattr(torch, spec.dtype), seed=0), output_shape


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _latency_us(kernel: nn.Module, x: Tensor, clock: Clock) -> float:
    """Return the median time of a forward, in microseconds; of fewer where they take long."""
    took_us: list[float] = []
    until_s = clock.now() + _MEASURED_S
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        kernel(x)
        while len(took_us) < _NUM_CALLS and not (took_us and clock.now() >= until_s):
            start_s = clock.now()
            kernel(x)
            took_us.append((clock.now() - start_s) * 1e6)
    return round(statistics.median(took_us), 3)


def _peak_memory_bytes(kernel: nn.Module, x: Tensor) -> int:
    """Return the bytes of all tensors that a forward and its backward hold at once."""
    with torch.random.fork_rng(devices=[]), _HeldBytes() as held:
        k = kernel(x.clone().requires_grad_())
        k.sum().backward()
    return int(held.peak)


@final
class _HeldBytes(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Counts the bytes of storages that operations make, for as long as they live.

    Attributes:
        peak: Most bytes that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.peak: int = 0
        self._now = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and count what it made."""
        made = func(*args, **(kwargs or {}))
        given = {id(s) for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        for storage in map(_storage, tree_leaves(made)):
            if storage is not None and id(storage) not in given | self._seen:
                self._add(storage)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size_bytes = id(storage), storage.nbytes()
        self._seen.add(key)
        self._now += size_bytes
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, key, size_bytes).atexit = False

    def _drop(self, key: int, size_bytes: int) -> None:
        self._seen.discard(key)
        self._now -= size_bytes


def _storage(value: object) -> torch.UntypedStorage | None:
    return value.untyped_storage() if isinstance(value, Tensor) else None
