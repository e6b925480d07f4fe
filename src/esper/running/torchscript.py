"""The TorchScript back end: inference only, and nothing is loaded that was not made here.

A TorchScript file is code: loading one can run anything. This file is therefore the only one that
loads any, and it loads a program only if this process wrote it (docs/adr/0009).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, final

import torch
from torch import Tensor, nn

from esper.compiler.lowering import checked_plan, instantiate
from esper.compiler.shapes import probes
from esper.contracts.errors import KernelCompilationError, KernelCorruptError, KernelExecutionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.compiler.lowering import LoweredKernel
    from esper.contracts.artifact import CompiledKernelArtifact

_MAX_REMEMBERED: Final = 4096
_CPU: Final = torch.device("cpu")


@final
class TorchScriptBackend:
    """The kernel as a TorchScript program, traced in evaluation mode and compared with the kernel.

    Refused are kernels that draw random numbers, whose two modes are two programs, kernels whose
    program differs from them at other sizes than it was traced at, and, when called, gradients.
    """

    name = "torchscript"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._written: OrderedDict[str, None] = OrderedDict()

    def build(self, artifact: CompiledKernelArtifact, *, device: torch.device) -> nn.Module:
        """Return the kernel's program; as :meth:`esper.running.backends.KernelBackend.build`.

        Its forward raises KernelExecutionError where gradients are enabled.
        """
        return self.load(self.save(artifact), device=device)

    def save(self, artifact: CompiledKernelArtifact) -> bytes:
        """Return a kernel as the bytes of a TorchScript file, for a runtime outside of Esper.

        Raises:
            KernelCompilationError: TorchScript cannot represent the kernel.
            KernelCorruptError: The artifact's bytes do not fit its blueprint.
        """
        if artifact.metadata.draws_random:
            msg = (
                f"blueprint {artifact.blueprint_id!r} draws random numbers; TorchScript records "
                "one mode of a kernel for good: use the eager back end"
            )
            raise KernelCompilationError(msg)
        kernel = instantiate(artifact).eval()
        first, second = _examples(kernel)
        try:
            with self._lock, _undeprecated(), torch.no_grad():
                data = _traced(kernel, first)
                self._remember(data)
                _check_same(kernel, _loaded(data, _CPU), first, second)
        except (RuntimeError, AssertionError) as error:
            msg = (
                f"TorchScript cannot represent the kernel of blueprint {artifact.blueprint_id!r}; "
                f"use the eager back end: {error!s:.500}"
            )
            raise KernelCompilationError(msg) from error
        return data

    def load(self, data: bytes, *, device: torch.device) -> nn.Module:
        """Return a program that this back end saved, in this process.

        Args:
            data: What :meth:`save` returned, one of the last 4,096 times.
            device: Where it goes.

        Raises:
            KernelCorruptError: This back end did not write these bytes. They were not parsed.
        """
        digest = hashlib.sha256(data).hexdigest()
        with self._lock, _undeprecated():
            if digest not in self._written:
                msg = (
                    f"TorchScript program {digest} was not written by this back end in this "
                    "process; a program is code: compile the kernel's artifact here instead"
                )
                raise KernelCorruptError(msg)
            return _InferenceProgram(_loaded(data, device))

    def __reduce__(self) -> tuple[type[TorchScriptBackend], tuple[()]]:
        return type(self), ()

    def _remember(self, data: bytes) -> None:
        self._written[hashlib.sha256(data).hexdigest()] = None
        if len(self._written) > _MAX_REMEMBERED:
            self._written.popitem(last=False)


@final
class _InferenceProgram(nn.Module):
    """A program, and the refusal to be called where its caller could expect a gradient."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            msg = (
                "a TorchScript kernel is for inference and gradients are enabled; call it under "
                "torch.no_grad(), or use the eager back end"
            )
            raise KernelExecutionError(msg)
        output: Tensor = self.program(x)
        return output


def _examples(kernel: LoweredKernel) -> tuple[Tensor, Tensor]:
    """Return two inputs that differ in every size that the blueprint leaves open."""
    spec = kernel.blueprint.input_spec
    generator = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(probe.shape_of(spec), generator=generator).to(getattr(torch, spec.dtype))
        for probe in probes(checked_plan(kernel.blueprint))
    )
    return first, second


def _traced(kernel: LoweredKernel, example: Tensor) -> bytes:
    # Never optimize_for_inference: it freezes, and then a saved convolution has no weights.
    program = torch.jit.trace(kernel, example, check_trace=False)  # type: ignore[no-untyped-call] # noqa: TID251 - this file's job
    buffer = io.BytesIO()
    torch.jit.save(program, buffer)  # noqa: TID251 - this file's job
    return buffer.getvalue()


def _loaded(data: bytes, device: torch.device) -> nn.Module:
    program: nn.Module = torch.jit.load(io.BytesIO(data), map_location=device)  # type: ignore[no-untyped-call] # noqa: TID251 - bytes that this process wrote
    return program


def _check_same(kernel: LoweredKernel, program: nn.Module, *examples: Tensor) -> None:
    """Compare program and kernel, by torch's own tolerances for the dtype.

    Raises:
        AssertionError: They differ.
    """
    for example in examples:
        torch.testing.assert_close(program(example), kernel(example), equal_nan=True)


@contextlib.contextmanager
def _undeprecated() -> Iterator[None]:
    """Silence TorchScript's deprecation, known and decided on, and the tracer's guesses.

    What the tracer suspects is checked instead, on an input of other sizes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined] # noqa: TID251 - public, by its documentation
        yield
