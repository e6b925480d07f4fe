"""Lowering: from a blueprint, or an artifact, to an ordinary trainable module.

There is one class for all kernels. Its forward walks a wiring that was planned once, so that two
kernels of the same graph are the same program with other weights, for torch.compile too.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, TypeVar, final

import torch
from torch import Tensor, nn

from esper.compiler.graph import Plan, plan
from esper.compiler.initial_values import initialise_
from esper.compiler.operations import build_module
from esper.compiler.shapes import check_shapes
from esper.contracts import artifact_format
from esper.contracts.artifact import CompiledKernelArtifact
from esper.contracts.artifact_format import TensorBytes
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.errors import BlueprintError, KernelCorruptError

T = TypeVar("T")
ModuleT = TypeVar("ModuleT", bound=nn.Module)

META: Final = torch.device("meta")
CPU: Final = torch.device("cpu")

TORCH_DTYPES: Final = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""torch's dtype for each dtype of the artifact format."""


@final
class LoweredKernel(nn.Module):
    """A kernel as a module: the only class of kernels that come from blueprints.

    Args:
        blueprint: What it computes.
        wiring: For each step the inputs: 0 is the kernel's input, i + 1 the output of step i.
        steps: One module a step. They are named by their index, so that no node's id can collide
            with an attribute.
    """

    def __init__(
        self,
        blueprint: BlueprintIR,
        wiring: tuple[tuple[int, ...], ...],
        steps: Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.blueprint = blueprint
        self.wiring = wiring
        self.steps = nn.ModuleList(steps)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the kernel.

        Args:
            x: Tensor of the blueprint's ``input_spec``, on the device of the parameters.

        Returns:
            Tensor of its ``output_spec``, on the same device.
        """
        values = [x]
        for step, inputs in zip(self.steps, self.wiring, strict=True):
            values.append(step(*[values[i] for i in inputs]))
        return values[-1]

    def extra_repr(self) -> str:
        """Return the blueprint's name, for ``print(kernel)``."""
        return f"blueprint={self.blueprint.id!r}"


@lru_cache(maxsize=256)
def checked_plan(blueprint: BlueprintIR) -> Plan:
    """Check every rule of a blueprint and return its plan; remembered per blueprint.

    Raises:
        BlueprintError: A rule is broken. The message names the node and says what to change.
    """
    made = plan(blueprint)
    check_shapes(made)
    return made


def lower(blueprint: BlueprintIR) -> LoweredKernel:
    """Build a kernel with its initial weights, on the CPU, in the dtype of the input spec.

    The weights depend on the blueprint only; no global random state is read or moved.

    Raises:
        BlueprintError: The blueprint breaks a rule.
    """
    kernel = _meta_kernel(checked_plan(blueprint))
    with torch.inference_mode(mode=False), torch.no_grad():
        kernel.to_empty(device=CPU)
        initialise_(plan(blueprint), list(kernel.steps))
    return kernel


def instantiate(
    artifact: CompiledKernelArtifact,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LoweredKernel:
    """Build a kernel with an artifact's weights; every call gives parameters of its own.

    Args:
        artifact: As compiled or decoded.
        device: Where the kernel goes; the CPU if None.
        dtype: Floating dtype of the kernel; the artifact's own if None.

    Raises:
        BlueprintError: The artifact's blueprint breaks a rule.
        KernelCorruptError: Its bytes are malformed or do not fit its blueprint.
    """
    made = checked_plan(artifact.blueprint)
    stored = artifact_format.stored_tensors(artifact.kernel_binary)
    check_tensors(made, stored)
    with torch.inference_mode(mode=False):
        kernel = _meta_kernel(made)
        _assign_(kernel, {name: tensor_of(tensor) for name, tensor in stored.items()})
        return kernel.to(device=device, dtype=dtype)


def duplicate(kernel: LoweredKernel) -> LoweredKernel:
    """Return a copy with tensors of its own, at a third of what ``copy.deepcopy`` takes."""
    made = _structure_of(kernel)
    for module in made.modules():
        _copy_values_(module._parameters)  # noqa: SLF001 - past properties
        _copy_values_(module._buffers)  # noqa: SLF001 - past properties
    return made


def _copy_values_(table: dict[str, T]) -> None:
    for name, value in table.items():
        table[name] = copy.deepcopy(value)


def tensor_of(stored: TensorBytes) -> Tensor:
    """Return a tensor, on the CPU, with a copy of stored bytes."""
    flat = torch.frombuffer(bytearray(stored.data), dtype=TORCH_DTYPES[stored.dtype])
    return flat.reshape(stored.shape)


def kernel_tensors(kernel: LoweredKernel) -> dict[str, Tensor]:
    """Return a kernel's parameters and buffers by their names in an artifact.

    A name is the node's id, a dot, and the tensor's name in the node's module with dots turned
    into underscores, for example ``"out.weight"``.
    """
    own = kernel.state_dict(keep_vars=True)
    return {name: own[key] for name, key in _state_keys(kernel.blueprint).items()}


def load_tensors_(kernel: LoweredKernel, tensors: Mapping[str, Tensor]) -> None:
    """Make tensors, by their names in an artifact, the kernel's own. They are not copied.

    Raises:
        BlueprintError: Names or shapes are not the kernel's.
    """
    expected = {name: tuple(t.shape) for name, t in kernel_tensors(kernel).items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        msg = (
            f"blueprint {kernel.blueprint.id!r} has the tensors {expected}, found {found}; "
            f"give exactly these"
        )
        raise BlueprintError(msg)
    _assign_(kernel, tensors)


def check_tensors(made: Plan, stored: Mapping[str, TensorBytes]) -> None:
    """Check that an artifact's tensors are exactly those of its plan.

    Raises:
        KernelCorruptError: A name, shape or dtype differs.
    """
    expected = _expected_tensors(made.blueprint)
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    if found != expected:
        names = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        msg = (
            f"artifact of blueprint {made.blueprint.id!r}: tensor {names[0]!r} should be "
            f"{expected.get(names[0], 'absent')}, found {found.get(names[0], 'none')}"
        )
        raise KernelCorruptError(msg)


@lru_cache(maxsize=256)
def _expected_tensors(blueprint: BlueprintIR) -> dict[str, tuple[str, tuple[int, ...]]]:
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    tensors = kernel_tensors(_meta_kernel(checked_plan(blueprint)))
    return {name: (names[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


@lru_cache(maxsize=256)
def _state_keys(blueprint: BlueprintIR) -> dict[str, str]:
    """Return the key in the kernel's state_dict for each name in an artifact."""
    made = plan(blueprint)
    return {
        f"{step.id}.{name.replace('.', '_')}": f"steps.{i}.{name}"
        for i, (step, module) in enumerate(zip(made.steps, _meta_modules(made), strict=True))
        for name in module.state_dict()
    }


def _assign_(kernel: LoweredKernel, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into the places of the kernel's own; what is a parameter stays one."""
    keys = _state_keys(kernel.blueprint)
    for name, tensor in tensors.items():
        path, _, leaf = keys[name].rpartition(".")
        owner = kernel.get_submodule(path)
        before = getattr(owner, leaf)
        made = tensor.detach()
        if isinstance(before, nn.Parameter):
            made = nn.Parameter(made, requires_grad=before.requires_grad)
        setattr(owner, leaf, made)


def _meta_kernel(made: Plan) -> LoweredKernel:
    """Return a kernel without memory: a copy of one that was built, which costs a tenth of that."""
    return _structure_of(_prototype(made.blueprint))


@lru_cache(maxsize=256)
def _prototype(blueprint: BlueprintIR) -> LoweredKernel:
    made = plan(blueprint)
    wiring = tuple(step.inputs for step in made.steps)
    return LoweredKernel(blueprint, wiring, _meta_modules(made))


def _structure_of(module: ModuleT) -> ModuleT:
    """Return a copy of a module that shares its tensors, which are to be replaced, and no table."""
    made = object.__new__(type(module))
    tables = {k: v.copy() if isinstance(v, dict | set) else v for k, v in vars(module).items()}
    children = {
        name: child if child is None else _structure_of(child)
        for name, child in module._modules.items()  # noqa: SLF001 - past properties
    }
    made.__dict__.update(tables, _modules=children)
    return made


def _meta_modules(made: Plan) -> list[nn.Module]:
    dtype = getattr(torch, made.blueprint.input_spec.dtype)
    modules = []
    for step in made.steps:
        try:
            module = build_module(step.operation, step.settings, device=META, dtype=dtype)
        except (ValueError, AssertionError, RuntimeError) as error:
            msg = f"{step}: its attributes contradict each other: {error}"
            raise BlueprintError(msg) from error
        modules.append(module)
    return modules
