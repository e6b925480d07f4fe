"""From what a caller hands over to a kernel that is ready to be probed at a layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from esper.compiler.lowering import LoweredKernel, instantiate, lower
from esper.contracts.artifact import CompiledKernelArtifact
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.choices import MODES, POSITIONS
from esper.contracts.errors import KernelRefusedError
from esper.contracts.layer_kind import kind_of
from esper.state.host_parts import is_in_a_seed

if TYPE_CHECKING:
    from torch import Tensor

    from esper.contracts.choices import Mode, Position


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedKernel:
    """A kernel with its own parameters, on its layer's device, and how it joins the layer.

    Attributes:
        module: The kernel; grafting takes this object, not a copy.
        mode: ``"add"`` (delta = k) or ``"replace"`` (delta = k - h).
        position: ``"parallel"`` (reads the layer's input) or ``"serial"`` (the host's output).
        blueprint: What it was lowered from; None for a module written by hand.
        artifact_id: sha256 of the artifact that its weights come from; None without one.
        draws_random: Whether its forward may draw random numbers.
        adds_capacity: Whether it computes what the host layer alone cannot.
    """

    module: nn.Module
    mode: Mode = "add"
    position: Position = "parallel"
    blueprint: BlueprintIR | None = None
    artifact_id: str | None = None
    draws_random: bool = False
    adds_capacity: bool = True

    @property
    def kernel_id(self) -> str:
        """Id for the layout and for people: the artifact's, the blueprint's or the class's."""
        if self.artifact_id is not None:
            return self.artifact_id
        return type(self.module).__qualname__ if self.blueprint is None else self.blueprint.id


Kernel = nn.Module | BlueprintIR | CompiledKernelArtifact | PreparedKernel


def prepare_kernel(
    layer: nn.Module,
    kernel: Kernel,
    *,
    mode: Mode | None = None,
    position: Position | None = None,
    example: Tensor | None = None,
) -> PreparedKernel:
    """Build a kernel for a layer. Nothing is inserted and nothing is probed yet.

    Args:
        layer: Where it will be grafted; a kernel from a blueprint takes its device and dtype.
        kernel: A module (moved to the layer's device, its dtype kept), a blueprint, an artifact,
            or what this function returned before.
        mode: ``"add"``, ``"replace"``, or None for what the kernel carries; a module adds.
        position: ``"parallel"``, ``"serial"``, or None for what the kernel carries; a module is
            parallel, or serial where the layer's kind takes no other.
        example: A floating tensor that the layer was seen to read or give; says device and dtype
            where the host has no tensor that does.

    Raises:
        TypeError: ``kernel`` is something else.
        ValueError: ``mode`` or ``position`` is unknown, contradicts what the kernel carries, or
            is none that the layer's kind takes.
        BlueprintError: The blueprint breaks a rule.
        KernelCorruptError: The artifact's tensors are not those of its blueprint.
        KernelRefusedError: A lazy layer of the kernel has no parameters yet; ``check`` is
            ``"lazy"``.
    """
    check_choices(mode, position)
    if isinstance(kernel, PreparedKernel):
        _check_agrees(kernel.mode, mode, kernel.position, position)
        return kernel
    if isinstance(kernel, nn.Module) and not isinstance(kernel, LoweredKernel):
        _check_has_shapes(kernel)
        module = kernel.to(reference_tensor(layer, example).device)
        position = position or kind_of(layer).positions[0]
        _check_position(layer, position)
        return PreparedKernel(
            module=module, mode=mode or "add", position=position, draws_random=True
        )
    return _from_blueprint(layer, kernel, mode, position, reference_tensor(layer, example))


def _check_has_shapes(kernel: nn.Module) -> None:
    """Refuse lazy layers: what has no shape cannot be copied, guarded, saved or trained."""
    named = chain(kernel.named_parameters(), kernel.named_buffers())
    lazy = [name for name, tensor in named if is_lazy(tensor)]
    if lazy:
        msg = (
            f"kernel {type(kernel).__qualname__} has lazy layers without parameters: "
            f"{', '.join(lazy)}; expected tensors with shapes: call it once on an input of its "
            "kind, then graft it"
        )
        raise KernelRefusedError(msg, check="lazy")


def _from_blueprint(
    layer: nn.Module,
    kernel: LoweredKernel | BlueprintIR | CompiledKernelArtifact,
    mode: Mode | None,
    position: Position | None,
    like: Tensor,
) -> PreparedKernel:
    blueprint = kernel if isinstance(kernel, BlueprintIR) else getattr(kernel, "blueprint", None)
    if not isinstance(blueprint, BlueprintIR):
        msg = (
            "a kernel is a torch.nn.Module, a BlueprintIR or a CompiledKernelArtifact, "
            f"got {type(kernel).__name__}"
        )
        raise TypeError(msg)
    _check_agrees(blueprint.mode, mode, blueprint.position, position)
    _check_position(layer, blueprint.position)
    return PreparedKernel(
        module=_build(kernel, like),
        mode=blueprint.mode,
        position=blueprint.position,
        blueprint=blueprint,
        artifact_id=getattr(kernel, "artifact_id", None),
        draws_random=blueprint.draws_random,
        adds_capacity=blueprint.adds_capacity,
    )


def _build(
    kernel: LoweredKernel | BlueprintIR | CompiledKernelArtifact, like: Tensor
) -> LoweredKernel:
    if isinstance(kernel, CompiledKernelArtifact):
        return instantiate(kernel, device=like.device, dtype=like.dtype)
    module = lower(kernel) if isinstance(kernel, BlueprintIR) else kernel
    return module.to(device=like.device, dtype=like.dtype)


def reference_tensor(layer: nn.Module, seen: Tensor | None = None) -> Tensor:
    """Return a tensor whose device and dtype are the layer's.

    That is the host's first floating parameter, else its first floating buffer. A norm without
    parameters may have neither: it is as the model around it was when it was wrapped and has been
    moved since, and as what it was seen to read or give, in the wider of the two dtypes (autocast
    narrows what a layer reads). Where nothing says more it is on the CPU in float32.

    Args:
        layer: A layer, wrapped or not.
        seen: A tensor that it was seen to read or give, or None.
    """
    for named in (layer.named_parameters(), layer.named_buffers()):
        for name, tensor in named:
            if tensor.is_floating_point() and not is_in_a_seed(name):
                return tensor
    around = getattr(layer.__dict__.get("_kasmina"), "surroundings", None)
    if seen is None or not seen.is_floating_point():
        return torch.empty(0) if around is None else around
    dtype = seen.dtype if around is None else torch.promote_types(seen.dtype, around.dtype)
    return torch.empty(0, dtype=dtype, device=seen.device)


def check_choices(mode: object, position: object) -> None:
    """Refuse a mode or a position that is no word of its set; None leaves it to the kernel.

    Raises:
        ValueError: As said.
    """
    _check_choice("mode", mode, MODES)
    _check_choice("position", position, POSITIONS)


def _check_position(layer: nn.Module, position: Position) -> None:
    positions = kind_of(layer).positions
    if position not in positions:
        msg = (
            f"a {type(layer).__name__} takes {' and '.join(positions)} kernels only, "
            f"this one is {position}"
        )
        raise ValueError(msg)


def _check_choice(what: str, value: object, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        msg = f"{what} must be None or one of {', '.join(map(repr, known))}, got {value!r}"
        raise ValueError(msg)


def _check_agrees(
    has_mode: Mode, mode: Mode | None, has_position: Position, position: Position | None
) -> None:
    if mode not in (None, has_mode) or position not in (None, has_position):
        msg = (
            f"the kernel carries mode={has_mode!r} and position={has_position!r}; it cannot be "
            f"grafted with mode={mode!r} and position={position!r}"
        )
        raise ValueError(msg)
