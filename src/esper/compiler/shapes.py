"""Shape inference on the meta device: no memory, whatever the blueprint says.

Free sizes are replaced by probe sizes, twice and differently, so that a blueprint that works for
one size only is found out. The limits on activations and work are Python integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from esper.compiler.graph import Plan, Step
from esper.contracts.blueprint import MAX_DIMENSION, MAX_RANK, OUTPUT, BlueprintIR, TensorSpec
from esper.contracts.errors import BlueprintError

MAX_ACTIVATION_ELEMENTS: Final = 1 << 28
MAX_WORK: Final = 1 << 40
_MAX_PROBE_SIZE: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Sizes for everything that a spec leaves open.

    Attributes:
        leading: Sizes of the leading axes (only the first, the batch, for a spec without "*").
        first: Size of the first free name; the following names get ``step`` more each.
        step: At least 1.
    """

    leading: tuple[int, ...]
    first: int
    step: int

    def shape_of(self, spec: TensorSpec) -> tuple[int, ...]:
        """Return the full shape of a tensor of this spec under these sizes."""
        return spec.resolve(self.leading, self.sizes_of(spec))

    def sizes_of(self, spec: TensorSpec) -> dict[str, int]:
        """Return a size of its own for each free name of a spec."""
        return {name: self.first + i * self.step for i, name in enumerate(spec.free_sizes)}


def probes(plan: Plan) -> tuple[Probe, Probe]:
    """Return two choices of sizes, large enough for every window in the plan, and unlike."""
    base = min(_MAX_PROBE_SIZE, _receptive_field(plan))
    return (
        Probe(leading=(3,), first=base + 5, step=2),
        Probe(leading=(2, 4), first=base + 10, step=3),
    )


def check_shapes(plan: Plan, modules: Sequence[nn.Module]) -> None:
    """Run a plan on the meta device and compare what comes out with the output spec.

    Args:
        plan: The plan.
        modules: Its modules, on the meta device.

    Raises:
        BlueprintError: A step does not take its input, a limit is exceeded, or the output is not
            what the output spec says. The message names the node and says what to change.
    """
    for probe in probes(plan):
        out = _run(plan, modules, probe.shape_of(plan.blueprint.input_spec))
        _check_output(plan.blueprint, probe, out)


def _receptive_field(plan: Plan) -> int:
    """Return an upper bound of the elements along an axis that one output element reads."""
    extent, stride = 1, 1
    for step in plan.steps:
        window = _largest(step, "kernel_size") - 1
        extent += _largest(step, "dilation") * window * stride
        stride *= _largest(step, "stride") or _largest(step, "kernel_size")
        stride = min(stride, _MAX_PROBE_SIZE)
    return extent + stride


def _largest(step: Step, setting: str) -> int:
    value = step.settings.get(setting, 1)
    return int(max(value)) if isinstance(value, tuple) else int(value)


def _run(plan: Plan, modules: Sequence[nn.Module], shape: tuple[int, ...]) -> Tensor:
    dtype = getattr(torch, plan.blueprint.input_spec.dtype)
    _check_limits("the input", shape)
    values = [torch.empty(shape, dtype=dtype, device="meta")]
    work = 0
    for step, module in zip(plan.steps, modules, strict=True):
        inputs = [values[i] for i in step.inputs]
        out = _apply(step, module, inputs)
        _check_limits(str(step), tuple(out.shape))
        work += step.operation.work(
            step.settings, tuple(tuple(x.shape) for x in inputs), tuple(out.shape)
        )
        values.append(out)
    if work > MAX_WORK:
        msg = (
            f"blueprint {plan.blueprint.id!r} takes {work} multiply-adds for an input of shape "
            f"{shape}; at most {MAX_WORK}: make it narrower"
        )
        raise BlueprintError(msg)
    return values[-1]


def _apply(step: Step, module: nn.Module, inputs: list[Tensor]) -> Tensor:
    shapes = [tuple(x.shape) for x in inputs]
    rank = step.operation.rank
    wanted = rank(step.settings) if rank else None
    if wanted is not None and any(len(shape) != wanted for shape in shapes):
        msg = (
            f"{step} takes tensors with {wanted} axes, the batch among them; found the shapes "
            f"{shapes}: reshape what comes in, or change input_spec"
        )
        raise BlueprintError(msg)
    try:
        out: Tensor = module(*inputs)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        msg = (
            f"{step} does not take inputs of shape {shapes}: {reason}; change its attributes, "
            f"the nodes before it, or input_spec"
        )
        raise BlueprintError(msg) from error
    return out


def _check_limits(where: str, shape: tuple[int, ...]) -> None:
    if len(shape) > MAX_RANK or not all(1 <= size <= MAX_DIMENSION for size in shape):
        msg = (
            f"{where} has the shape {shape}; at most {MAX_RANK} axes of 1 to {MAX_DIMENSION} are "
            f"allowed: make it smaller"
        )
        raise BlueprintError(msg)
    if math.prod(shape) > MAX_ACTIVATION_ELEMENTS:
        msg = (
            f"{where} has {math.prod(shape)} elements (shape {shape}); at most "
            f"{MAX_ACTIVATION_ELEMENTS} are allowed: make it smaller"
        )
        raise BlueprintError(msg)


def _check_output(blueprint: BlueprintIR, probe: Probe, out: Tensor) -> None:
    """Compare with the output spec, in which names that the input has not may be any size."""
    sizes = probe.sizes_of(blueprint.input_spec)
    spec = blueprint.output_spec
    expected = spec.resolve(probe.leading, {name: sizes.get(name, 0) for name in spec.free_sizes})
    found = tuple(out.shape)
    if len(found) != len(expected) or any(
        e not in (0, f) for e, f in zip(expected, found, strict=True)
    ):
        last = next(edge.source for edge in blueprint.edges if edge.target == OUTPUT)
        msg = (
            f"node {last!r}: its output is the blueprint's and has shape {found} for an input of "
            f"shape {probe.shape_of(blueprint.input_spec)}; output_spec {spec.shape} does not "
            f"allow that: change the node or output_spec"
        )
        raise BlueprintError(msg)
