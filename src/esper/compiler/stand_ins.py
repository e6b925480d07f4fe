"""What stands for each operation in a kernel's linear form, for the table of operations.

A stand-in is an affine operation of the same output shape. It has the tensors of what it stands for
that an affine operation can use, with their shapes and initial values. Rules raise ValueError where
nothing affine can stand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from esper.compiler.shape_rules import Shape, StepSettings

if TYPE_CHECKING:
    from esper.contracts.blueprint import AttributeValue


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """The kernel's input, or what one of its steps gives.

    Attributes:
        index: 0 for the kernel's input, i + 1 for the output of step i.
        shapes: Its shape for inputs of several sizes.
        num_curved: Steps that it depends on and that are not affine.
        has_zeroed: Whether it depends on the layer that begins as zeros.
    """

    index: int
    shapes: tuple[Shape, ...]
    num_curved: int = 0
    has_zeroed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an operation stands in its kernel.

    Attributes:
        kernel_input: What the kernel reads.
        inputs: What the operation reads, in the order of its positions; at least one.
        shapes: Of what it gives, for the same sizes as those of the values.
    """

    kernel_input: Value
    inputs: tuple[Value, ...]
    shapes: tuple[Shape, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StandIn:
    """What stands for an operation.

    Attributes:
        op_type: An affine operation of the table.
        inputs: Indices of the values that it reads, in the order of its positions.
        attributes: Its settings.
    """

    op_type: str
    inputs: tuple[int, ...]
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)


StandInRule = Callable[[StepSettings, Place], StandIn]


def nothing(_settings: StepSettings, place: Place) -> StandIn:
    """Take the operation out: of an activation, a dropout and a noise no affine part is left."""
    return StandIn(op_type="identity", inputs=(place.inputs[0].index,))


def affine_part_of_last_axes(settings: StepSettings, place: Place) -> StandIn:
    """Keep what a norm over the last axes multiplies with and adds behind its statistics."""
    if not settings["elementwise_affine"]:
        return nothing(settings, place)
    shape = settings["normalized_shape"]
    features = {"num_features": shape[0] if len(shape) == 1 else shape}
    return _affine_part(place, settings, {**features, "bias": settings.get("bias", False)})


def affine_part_of_channels(settings: StepSettings, place: Place) -> StandIn:
    """Keep the same of a norm with channels in axis 1."""
    if not settings["affine"]:
        return nothing(settings, place)
    channels = settings.get("num_channels", settings.get("num_features"))
    return _affine_part(place, settings, {"num_features": channels, "dim": 1})


def _affine_part(
    place: Place, settings: StepSettings, attributes: dict[str, AttributeValue]
) -> StandIn:
    attributes["trainable"] = settings["trainable"]
    return StandIn(op_type="diagonal", inputs=(place.inputs[0].index,), attributes=attributes)


def average_of_window(settings: StepSettings, place: Place) -> StandIn:
    """Take the mean of the elements that a maximum is taken of.

    Windows with gaps are filled: torch's average has none, and the output's size is that of the
    whole span.
    """
    size, dilation = settings["kernel_size"], settings["dilation"]
    kept = {name: settings[name] for name in ("padding", "ceil_mode", "dims")}
    attributes = {
        **kept,
        "kernel_size": dilation * (size - 1) + 1,
        "stride": settings["stride"] or size,
        "count_include_pad": False,  # padding is no element of a maximum either
    }
    return StandIn(op_type="avg_pool", inputs=(place.inputs[0].index,), attributes=attributes)


def adaptive_average(settings: StepSettings, place: Place) -> StandIn:
    """Take the mean of the same windows."""
    inputs = (place.inputs[0].index,)
    return StandIn(op_type="adaptive_avg_pool", inputs=inputs, attributes=dict(settings))


def value_path(_settings: StepSettings, place: Place) -> StandIn:
    """Keep one factor of a product: the value, which its gates only weigh.

    That is the factor of the product's shape with the fewest operations before it that are not
    affine, the first of several; one that is zero at birth comes before those that are not,
    because it makes the product zero. Where none has the shape, the sum has.

    Raises:
        ValueError: A factor that is zero at birth would have to be dropped or joined by others.
    """
    zeroed = [value for value in place.inputs if value.has_zeroed]
    whole = [value for value in zeroed or place.inputs if value.shapes == place.shapes]
    if whole:
        value = min(whole, key=lambda value: value.num_curved)
        return StandIn(op_type="identity", inputs=(value.index,))
    _check_none_zeroed(place)
    return StandIn(op_type="add", inputs=tuple(value.index for value in place.inputs))


def sum_of_means(_settings: StepSettings, place: Place) -> StandIn:
    """Take the means of both factors of a matrix product over the axis that they share.

    It gives every element what the product would vary with if the other factor were constant,
    and keeps all weights before both.

    Raises:
        ValueError: One factor is zero at birth, and so is the product, but no sum.
    """
    _check_none_zeroed(place)
    return StandIn(op_type="mean_matmul", inputs=tuple(value.index for value in place.inputs))


def _check_none_zeroed(place: Place) -> None:
    zeroed = [value.has_zeroed for value in place.inputs]
    if any(zeroed) and not all(zeroed):
        msg = (
            "one of its factors is zero at birth, and no affine operation of all of them is; "
            "let the zeroed layer come behind the product"
        )
        raise ValueError(msg)


def mean_over_positions(settings: StepSettings, place: Place) -> StandIn:
    """Look at all allowed positions alike: the projections of values and outputs are left.

    Queries and keys are dropped. Where values are of another length than queries, something else
    that has the length of the queries says it: the kernel's input where it can, so that no weight
    is kept for its length alone.
    """
    query, value = place.inputs[0], place.inputs[-1]
    inputs = [value.index]
    if not _same_length(query, value):
        says = place.kernel_input if _same_length(query, place.kernel_input) else query
        inputs.append(says.index)
    names = ("embed_dim", "bias", "causal", "trainable")
    attributes = {name: settings[name] for name in names}
    return StandIn(op_type="mean_attention", inputs=tuple(inputs), attributes=attributes)


def _same_length(query: Value, other: Value) -> bool:
    """Say whether a value of three axes is as long as another is."""
    pairs = zip(query.shapes, other.shapes, strict=True)
    return all(len(theirs) == 3 and own[1] == theirs[1] for own, theirs in pairs)
