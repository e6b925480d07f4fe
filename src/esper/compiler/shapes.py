"""Shape inference without memory, whatever the blueprint says.

Shapes come from the rules of the table, or from the meta device where there is none. Free sizes
are replaced by probe sizes, twice and differently, so that a blueprint that works for one size
only is found out. The limits on activations and work are Python integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from esper.compiler.graph import Plan, Step
from esper.compiler.operations import Operation, build_module
from esper.compiler.shape_rules import Shape, StepSettings
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

    def shape_of(self, spec: TensorSpec) -> Shape:
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


def check_shapes(plan: Plan) -> None:
    """Follow the shapes through a plan and compare what comes out with the output spec.

    Raises:
        BlueprintError: A step does not take its input, a limit is exceeded, or the output is not
            what the output spec says. The message names the node and says what to change.
    """
    for probe in probes(plan):
        out = infer(plan, probe.shape_of(plan.blueprint.input_spec))
        _check_output(plan.blueprint, probe, out)


def infer(plan: Plan, shape: Shape) -> Shape:
    """Return the shape that a plan gives for an input of a shape.

    Raises:
        BlueprintError: A step does not take its input, or a limit is exceeded.
    """
    return infer_all(plan, shape)[-1]


def infer_all(plan: Plan, shape: Shape) -> tuple[Shape, ...]:
    """Return the shape of the input, and of what each step gives for it.

    Raises:
        BlueprintError: As :func:`infer`.
    """
    _check_limits("the input", shape)
    shapes = [shape]
    work = 0
    for step in plan.steps:
        inputs = tuple(shapes[i] for i in step.inputs)
        shapes.append(_shape_after(step, inputs))
        _check_limits(str(step), shapes[-1])
        work += step.operation.work(step.settings, inputs, shapes[-1])
    if work > MAX_WORK:
        msg = (
            f"blueprint {plan.blueprint.id!r} takes {work} multiply-adds for an input of shape "
            f"{shape}; at most {MAX_WORK}: make it narrower"
        )
        raise BlueprintError(msg)
    return tuple(shapes)


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


def _shape_after(step: Step, inputs: tuple[Shape, ...]) -> Shape:
    operation = step.operation
    wanted = operation.rank(step.settings) if operation.rank else None
    if wanted is not None and any(len(shape) != wanted for shape in inputs):
        msg = (
            f"{step} takes tensors with {wanted} axes, the batch among them; found the shapes "
            f"{list(inputs)}: reshape what comes in, or change input_spec"
        )
        raise BlueprintError(msg)
    rule = operation.shape or partial(_ask_meta, operation)
    try:
        return rule(step.settings, inputs)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        msg = (
            f"{step} does not take inputs of shape {list(inputs)}: {reason}; change its "
            f"attributes, the nodes before it, or input_spec"
        )
        raise BlueprintError(msg) from error


def _ask_meta(operation: Operation, settings: StepSettings, inputs: tuple[Shape, ...]) -> Shape:
    module = build_module(operation, settings)
    with torch.no_grad():
        return tuple(module(*(torch.empty(shape, device="meta") for shape in inputs)).shape)


def _check_limits(where: str, shape: Shape) -> None:
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


def _check_output(blueprint: BlueprintIR, probe: Probe, found: Shape) -> None:
    """Compare with the output spec, in which names that the input has not may be any size."""
    sizes = probe.sizes_of(blueprint.input_spec)
    spec = blueprint.output_spec
    expected = spec.resolve(probe.leading, {name: sizes.get(name, 0) for name in spec.free_sizes})
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
