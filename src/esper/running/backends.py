"""Back ends of the executor: how an artifact becomes something that runs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Final, Protocol, cast, final

import torch
from torch import nn

from esper.compiler.lowering import instantiate

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.contracts.artifact import CompiledKernelArtifact

_ISOLATION: Final[dict[str, bool]] = {
    name: True
    for name in ("isolate_recompiles",)
    if name in inspect.signature(torch.compile).parameters
}
"""Kernels share one forward, and torch.compile gives each function 8 recompiles in all: without
this the ninth kernel would run eagerly. Where torch has no such option, it warns of that."""


class KernelBackend(Protocol):
    """Turns artifacts into modules. One method, because the rest is the same for all of them.

    There is no ``compile``: an artifact is data, the same for every back end, so that it can be
    stored, signed and moved whichever of them will run it. There is no ``execute``: a module is
    called. There is no ``unload``: the executor forgets the module.
    """

    name: str
    """What statistics and messages call it."""

    def build(self, artifact: CompiledKernelArtifact, *, device: torch.device) -> nn.Module:
        """Return a module on a device that computes the artifact's kernel in evaluation mode.

        Every call makes a module with parameters and buffers of its own. It may leave work for
        the module's first call.

        Raises:
            KernelCompilationError: This back end cannot represent the kernel.
            KernelCorruptError: The artifact's bytes do not fit its blueprint.
        """
        ...


@final
class EagerBackend:
    """The kernel as an ordinary module. It trains, and it is exact."""

    name = "eager"

    def build(self, artifact: CompiledKernelArtifact, *, device: torch.device) -> nn.Module:
        """Return the kernel with the artifact's weights; as :meth:`KernelBackend.build`."""
        return instantiate(artifact, device=device).eval()


@final
class TorchCompileBackend:
    """The kernel under ``torch.compile``, which compiles when the module is first called.

    It trains like the eager module, whose parameters it has. Results agree with it to rounding.

    Args:
        compiler: What ``torch.compile`` calls its ``backend``.
    """

    name = "torch.compile"

    def __init__(self, *, compiler: str = "inductor") -> None:
        self._compiler = compiler

    def build(self, artifact: CompiledKernelArtifact, *, device: torch.device) -> nn.Module:
        """Return the compiled kernel; as :meth:`KernelBackend.build`."""
        module = EagerBackend().build(artifact, device=device)
        compile_: Callable[..., object] = torch.compile  # whose options depend on its version
        return cast("nn.Module", compile_(module, backend=self._compiler, **_ISOLATION))
