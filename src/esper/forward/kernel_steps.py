"""Kernels as steps: what two of them must have in common to be run as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from torch import Tensor, nn

from esper.compiler.lowering import LoweredKernel

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    Wiring = tuple[tuple[int, ...], ...]

_HOOKS: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN_CALLS: Final = frozenset({"forward", "_compiled_call_impl"})
"""What an object has in its ``__dict__`` where it is called otherwise than its class says."""

_PLAIN: Final = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelSteps:
    """A kernel as a straight line of modules.

    Attributes:
        kernel: The kernel.
        steps: Its modules, in the order in which they run.
        wiring: For each the inputs: 0 is the kernel's input, i + 1 the output of step i.
    """

    kernel: nn.Module
    steps: tuple[nn.Module, ...]
    wiring: Wiring

    @property
    def form(self) -> Hashable:
        """What kernels of one form have alike: classes, settings, wiring, shapes and dtypes."""
        return self.wiring, tuple((type(s), settings_of(s), _tensors(s)) for s in self.steps)

    def hooks(self) -> Iterator[dict[object, object]]:
        """Yield the tables of hooks of all its modules."""
        for module in self.kernel.modules():
            for name in _HOOKS:
                yield module.__dict__[name]

    def tables(self) -> Iterator[dict[str, object]]:
        """Yield the tables that grow where something is added to its modules."""
        for module in self.kernel.modules():
            yield module.__dict__
            yield module.__dict__["_modules"]
            yield module.__dict__["_parameters"]
            yield module.__dict__["_buffers"]

    def parameters(self) -> Iterator[tuple[dict[str, Tensor], str]]:
        """Yield where its parameters stand, as ``(table, key)``."""
        for module in self.kernel.modules():
            table = module.__dict__["_parameters"]
            yield from ((table, name) for name, p in table.items() if p is not None)

    def facts(self) -> Iterator[tuple[dict[str, object], str, object]]:
        """Yield what stands in these tables and decides what is computed, but for tensors."""
        for module in self.kernel.modules():
            for name, child in module.__dict__["_modules"].items():
                yield module.__dict__["_modules"], name, child
            for name, parameter in module.__dict__["_parameters"].items():
                if parameter is None:
                    yield module.__dict__["_parameters"], name, None
        for step in self.steps:
            for name, value in settings_of(step):
                if name not in _SIZES:
                    yield step.__dict__, name, value


_SIZES: Final = ("in_features", "out_features", "in_channels", "out_channels")
"""Settings that are those of the weight's shape, which is looked at itself."""


def steps_of(kernel: nn.Module) -> KernelSteps | None:
    """Return a kernel as steps, or None where it cannot be known what its forward does.

    Args:
        kernel: A lowered kernel, a sequence, sequences in it, or a single module of torch's.
    """
    if any(not _OWN_CALLS.isdisjoint(module.__dict__) for module in kernel.modules()):
        return None
    if type(kernel) is LoweredKernel:
        return KernelSteps(kernel=kernel, steps=tuple(kernel.steps), wiring=kernel.wiring)
    steps = tuple(_in_sequence(kernel))
    wiring = tuple((i,) for i in range(len(steps)))
    return KernelSteps(kernel=kernel, steps=steps, wiring=wiring) if steps else None


def _in_sequence(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is not nn.Sequential:
        yield module
        return
    for part in module:
        yield from _in_sequence(part)


def settings_of(step: nn.Module) -> tuple[tuple[str, object], ...]:
    """Return the plain values that a step was made with, by name."""
    held = step.__dict__.items()
    return tuple((k, v) for k, v in held if k[0] != "_" and k != "training" and _is_plain(v))


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def _tensors(step: nn.Module) -> Hashable:
    named = (*step._parameters.items(), *step._buffers.items())  # noqa: SLF001 - past properties
    return tuple((name, None if t is None else _like(t)) for name, t in named)


def _like(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype, tensor.device, type(tensor)
