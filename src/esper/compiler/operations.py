"""The table of operations: all that a blueprint may ask for, and nothing else.

Attribute names and defaults are torch.nn's. Every operation with weights also takes ``trainable``
(default true); the affine ones with weights take ``init``: ``"default"`` is torch.nn's own
distribution, ``"zeros"`` makes every tensor of the layer zero. Those that begin with random numbers
take ``init_after``: how many numbers of the kernel's random stream come before theirs; -1, the
default, is those of the layers before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from torch import nn

from esper.compiler import parts, shape_rules, stand_ins
from esper.compiler.shape_rules import Shape, ShapeRule, StepSettings
from esper.compiler.stand_ins import StandInRule
from esper.contracts.blueprint import MAX_DIMENSION, MAX_RANK

MAX_PARAMETERS: Final = 1 << 26
"""Most parameters of a blueprint."""

REQUIRED: Final = object()
"""Default of an attribute that has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """One attribute of an operation.

    Attributes:
        words: What is expected, for error messages, for example "an integer from 1 to 64".
        accepts: Whether a value is of that kind.
        default: Value where the blueprint gives none; ``REQUIRED`` where it must.
        spread: Number of axes that a single integer is repeated for; 0 for no repeating.
    """

    words: str
    accepts: Callable[[object], bool]
    default: object = REQUIRED
    spread: int = 0


def _one_input(_settings: StepSettings, _inputs: tuple[Shape, ...], output: Shape) -> int:
    return math.prod(output)


def _none(_settings: StepSettings) -> int:
    return 0


def _never(_settings: StepSettings) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation that a blueprint may use.

    Attributes:
        build: Makes the module from the settings as keywords, plus ``device`` and ``dtype`` where
            the operation has tensors. May raise ValueError for settings that contradict each other.
        attributes: By name.
        num_inputs: Fewest and most inputs.
        exchangeable: Whether inputs may be exchanged, so that positions do not matter.
        affine: Whether the output is an affine function of the inputs (jointly).
        linear: Says what stands for it in a kernel's linear form (``linear_form``); None where it
            is affine and stands for itself.
        weights: Number of parameters, from the settings alone.
        drawn: Number of random numbers that its parameters begin with, from the settings, unless
            it has ``init`` and that is ``"zeros"``.
        has_tensors: Whether the module has parameters or buffers.
        draws_random: Whether a forward draws random numbers in some mode, from the settings.
        work: Multiply-adds of a forward, from settings, input shapes and output shape.
        rank: Exact rank of the inputs, batch included, where torch would read another rank
            differently; None for any.
        shape: Output shape in Python integers; None where the meta device is asked.
    """

    build: Callable[..., nn.Module]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    num_inputs: tuple[int, int] = (1, 1)
    exchangeable: bool = False
    affine: bool = False
    linear: StandInRule | None = None
    weights: Callable[[StepSettings], int] = _none
    drawn: Callable[[StepSettings], int] = _none
    has_tensors: bool = False
    draws_random: Callable[[StepSettings], bool] = _never
    work: Callable[[StepSettings, tuple[Shape, ...], Shape], int] = _one_input
    rank: Callable[[StepSettings], int] | None = None
    shape: ShapeRule | None = None


def _integer(low: int, high: int, default: object = REQUIRED) -> Attribute:
    def accepts(value: object) -> bool:
        return type(value) is int and low <= value <= high

    return Attribute(words=f"an integer from {low} to {high}", accepts=accepts, default=default)


def _number(low: float, high: float, default: object = REQUIRED) -> Attribute:
    """A number above or at ``low``, below or at ``high``; an integer is taken as a float."""

    def accepts(value: object) -> bool:
        return isinstance(value, int | float) and type(value) is not bool and low <= value <= high

    return Attribute(words=f"a number from {low:g} to {high:g}", accepts=accepts, default=default)


def _flag(default: bool) -> Attribute:  # noqa: FBT001 - the default is the one thing it takes
    return Attribute(words="true or false", accepts=lambda v: type(v) is bool, default=default)


def _choice(*options: str, default: object = REQUIRED) -> Attribute:
    return Attribute(
        words=f"one of {', '.join(options)}",
        accepts=lambda v: type(v) is str and v in options,
        default=default,
    )


def _integers(
    low: int, high: int, default: object = REQUIRED, *, count: int = 0, words: tuple[str, ...] = ()
) -> Attribute:
    """A list of integers: ``count`` of them (a single one is repeated), or 1 to 8 if 0."""

    def accepts(value: object) -> bool:
        if isinstance(value, str):
            return value in words
        if not isinstance(value, tuple):
            return False
        right = len(value) == count if count else 1 <= len(value) <= MAX_RANK
        return right and all(type(v) is int and low <= v <= high for v in value)

    many = f"{count} integers (or one for all axes)" if count else "a list of integers"
    described = " or ".join([f"{many} from {low} to {high}", *map(repr, words)])
    return Attribute(
        words=described,
        accepts=accepts,
        default=default,
        spread=count or 1,
    )


_SIZE: Final = _integer(1, MAX_DIMENSION)
_SIZES: Final = _integers(1, MAX_DIMENSION)
_TRAINABLE: Final = {"trainable": _flag(default=True)}
_INIT: Final = {"init": _choice("default", "zeros", default="default"), **_TRAINABLE}
_DRAWN: Final = {"init_after": _integer(-1, MAX_PARAMETERS, -1)}
_EPS: Final = _number(1e-12, 1.0, 1e-5)
_PROBABILITY: Final = (0.0, 0.99)
_EXTENT: Final = (1, 64)
_LONGEST_SPAN: Final = 64 * 63 + 1


def _linear() -> Operation:
    def weights(s: StepSettings) -> int:
        return int(s["out_features"] * (s["in_features"] + s["bias"]))

    return Operation(
        shape=shape_rules.linear,
        build=nn.Linear,
        attributes={
            "in_features": _SIZE,
            "out_features": _SIZE,
            "bias": _flag(default=True),
            **_INIT,
            **_DRAWN,
        },
        affine=True,
        has_tensors=True,
        weights=weights,
        drawn=weights,
        work=lambda s, _, output: math.prod(output) * s["in_features"],
    )


def _conv(build: type[nn.Module], axes: int) -> Operation:
    def fan_in(s: StepSettings) -> int:
        return int(s["in_channels"] // s["groups"] * math.prod(s["kernel_size"]))

    def weights(s: StepSettings) -> int:
        return int(s["out_channels"] * (fan_in(s) + s["bias"]))

    return Operation(
        shape=shape_rules.convolution,
        build=build,
        attributes={
            "in_channels": _SIZE,
            "out_channels": _SIZE,
            "kernel_size": _integers(*_EXTENT, count=axes),
            "stride": _integers(*_EXTENT, 1, count=axes),
            "padding": _integers(0, 4096, 0, count=axes, words=("same", "valid")),
            "dilation": _integers(*_EXTENT, 1, count=axes),
            "groups": _integer(1, MAX_DIMENSION, 1),
            "bias": _flag(default=True),
            "padding_mode": _choice("zeros", "reflect", "replicate", "circular", default="zeros"),
            **_INIT,
            **_DRAWN,
        },
        affine=True,
        has_tensors=True,
        weights=weights,
        drawn=weights,
        work=lambda s, _, output: math.prod(output) * fan_in(s),
        rank=lambda _: axes + 2,
    )


def _conv_transpose() -> Operation:
    def weights(s: StepSettings) -> int:
        each = s["out_channels"] // s["groups"] * math.prod(s["kernel_size"])
        return int(s["in_channels"] * each + s["out_channels"] * s["bias"])

    def work(s: StepSettings, inputs: tuple[Shape, ...], _output: Shape) -> int:
        each = s["out_channels"] // s["groups"] * math.prod(s["kernel_size"])
        return int(math.prod(inputs[0]) * each)

    return Operation(
        shape=shape_rules.transposed_convolution,
        build=nn.ConvTranspose2d,
        attributes={
            "in_channels": _SIZE,
            "out_channels": _SIZE,
            "kernel_size": _integers(*_EXTENT, count=2),
            "stride": _integers(*_EXTENT, 1, count=2),
            "padding": _integers(0, 4096, 0, count=2),
            "output_padding": _integers(0, 63, 0, count=2),
            "groups": _integer(1, MAX_DIMENSION, 1),
            "bias": _flag(default=True),
            "dilation": _integers(*_EXTENT, 1, count=2),
            **_INIT,
            **_DRAWN,
        },
        affine=True,
        has_tensors=True,
        weights=weights,
        drawn=weights,
        work=work,
        rank=lambda _: 4,
    )


ACTIVATIONS: Final[Mapping[str, Callable[[], nn.Module]]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "softplus": nn.Softplus,
}


def _activation() -> Operation:
    return Operation(
        shape=shape_rules.unchanged,
        build=lambda *, type: ACTIVATIONS[type](),  # noqa: A006 - the attribute's name
        attributes={"type": _choice(*ACTIVATIONS)},
        linear=stand_ins.nothing,
    )


def _layer_norm() -> Operation:
    return Operation(
        shape=shape_rules.trailing_norm,
        build=nn.LayerNorm,
        linear=stand_ins.affine_part_of_last_axes,
        attributes={
            "normalized_shape": _integers(1, MAX_DIMENSION),
            "eps": _EPS,
            "elementwise_affine": _flag(default=True),
            "bias": _flag(default=True),
            **_TRAINABLE,
        },
        has_tensors=True,
        weights=lambda s: (
            math.prod(s["normalized_shape"]) * s["elementwise_affine"] * (1 + s["bias"])
        ),
    )


def _rms_norm() -> Operation:
    return Operation(
        shape=shape_rules.trailing_norm,
        build=nn.RMSNorm,
        linear=stand_ins.affine_part_of_last_axes,
        attributes={
            "normalized_shape": _integers(1, MAX_DIMENSION),
            "eps": _number(1e-12, 1.0, 1e-6),
            "elementwise_affine": _flag(default=True),
            **_TRAINABLE,
        },
        has_tensors=True,
        weights=lambda s: math.prod(s["normalized_shape"]) * s["elementwise_affine"],
    )


def _group_norm() -> Operation:
    return Operation(
        shape=shape_rules.group_norm,
        build=nn.GroupNorm,
        linear=stand_ins.affine_part_of_channels,
        attributes={
            "num_groups": _SIZE,
            "num_channels": _SIZE,
            "eps": _EPS,
            "affine": _flag(default=True),
            **_TRAINABLE,
        },
        has_tensors=True,
        weights=lambda s: 2 * s["num_channels"] * s["affine"],
    )


def _accepts_features(value: object) -> bool:
    return _SIZE.accepts(value) or (isinstance(value, tuple) and _SIZES.accepts(value))


def _diagonal() -> Operation:
    def weights(s: StepSettings) -> int:
        sizes = s["num_features"]
        size = math.prod(sizes) if isinstance(sizes, tuple) else int(sizes)
        return size * (1 + int(s["bias"]))

    features = Attribute(words=f"{_SIZE.words}, or {_SIZES.words}", accepts=_accepts_features)
    axis = Attribute(words="-1 or 1", accepts=lambda v: type(v) is int and v in (-1, 1), default=-1)
    return Operation(
        shape=shape_rules.diagonal,
        build=parts.Diagonal,
        attributes={"num_features": features, "dim": axis, "bias": _flag(default=True), **_INIT},
        affine=True,
        has_tensors=True,
        weights=weights,
    )


_AXES: Final = _integer(1, 3, 2)
"""Attribute ``dims``: spatial axes, where torch has one class for each number of them."""


def _batch_norm() -> Operation:
    classes = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    return Operation(
        shape=shape_rules.batch_norm,
        linear=stand_ins.affine_part_of_channels,
        build=lambda *, dims, **settings: classes[dims](**settings),
        attributes={
            "num_features": _SIZE,
            "eps": _EPS,
            "momentum": _number(0.0, 1.0, 0.1),
            "affine": _flag(default=True),
            "dims": _AXES,
            **_TRAINABLE,
        },
        has_tensors=True,
        weights=lambda s: 2 * s["num_features"] * s["affine"],
    )


def _multihead_attention() -> Operation:
    def weights(s: StepSettings) -> int:
        return int(4 * s["embed_dim"] * (s["embed_dim"] + s["bias"]))

    def work(s: StepSettings, inputs: tuple[Shape, ...], output: Shape) -> int:
        return math.prod(output) * (4 * int(s["embed_dim"]) + 2 * inputs[-1][1])

    def drawn(s: StepSettings) -> int:
        return int(4 * s["embed_dim"] ** 2)  # its biases begin as zeros

    return Operation(
        shape=shape_rules.attention,
        build=parts.Attention,
        attributes={
            "embed_dim": _SIZE,
            "num_heads": _integer(1, 1024),
            "dropout": _number(*_PROBABILITY, 0.0),
            "bias": _flag(default=True),
            "causal": _flag(default=False),
            **_TRAINABLE,
        },
        num_inputs=(1, 3),
        has_tensors=True,
        linear=stand_ins.mean_over_positions,
        weights=weights,
        drawn=drawn,
        draws_random=lambda s: s["dropout"] > 0,
        work=work,
        rank=lambda _: 3,
    )


def _mean_attention() -> Operation:
    """What stands for ``multihead_attention``: it begins with the weights that it shares."""

    def work(s: StepSettings, inputs: tuple[Shape, ...], output: Shape) -> int:
        return math.prod(output) * (2 * int(s["embed_dim"]) + inputs[0][1])

    return Operation(
        shape=shape_rules.mean_attention,
        build=parts.MeanAttention,
        attributes={
            "embed_dim": _SIZE,
            "bias": _flag(default=True),
            "causal": _flag(default=False),
            **_TRAINABLE,
            **_DRAWN,
        },
        num_inputs=(1, 2),
        affine=True,
        has_tensors=True,
        weights=lambda s: 2 * s["embed_dim"] * (s["embed_dim"] + s["bias"]),
        drawn=lambda s: 4 * s["embed_dim"] ** 2,
        work=work,
        rank=lambda _: 3,
    )


def _pool(kind: str) -> Operation:
    """Pooling over ``dims`` axes; a stride of 0 means the kernel's size, as torch's None.

    An average may span what a maximum with gaps does, which it stands for.
    """
    classes = {dims: getattr(nn, f"{kind}Pool{dims}d") for dims in (1, 2, 3)}
    if kind == "Max":
        classes[1] = parts.MaxPool1d

    def build(*, dims: int, stride: int, **settings: object) -> nn.Module:
        module: nn.Module = classes[dims](**settings, stride=stride or None)
        return module

    attributes = {
        "kernel_size": _integer(*_EXTENT) if kind == "Max" else _integer(1, _LONGEST_SPAN),
        "stride": _integer(0, 64, 0),
        "padding": _integer(0, 32, 0),
        "ceil_mode": _flag(default=False),
        "dims": _AXES,
    }
    if kind == "Max":
        attributes["dilation"] = _integer(*_EXTENT, 1)
    else:
        attributes["count_include_pad"] = _flag(default=True)
    return Operation(
        build=build,
        attributes=attributes,
        affine=kind == "Avg",
        linear=stand_ins.average_of_window if kind == "Max" else None,
        work=lambda s, _, output: math.prod(output) * s["kernel_size"] ** s["dims"],
        rank=lambda s: s["dims"] + 2,
    )


def _adaptive_pool(kind: str) -> Operation:
    classes = {dims: getattr(nn, f"Adaptive{kind}Pool{dims}d") for dims in (1, 2, 3)}
    return Operation(
        build=lambda *, dims, output_size: classes[dims](output_size),
        attributes={"output_size": _integer(1, 4096), "dims": _AXES},
        affine=kind == "Avg",
        linear=stand_ins.adaptive_average if kind == "Max" else None,
        work=lambda _, inputs, output: math.prod(inputs[0]) + math.prod(output),
        rank=lambda s: s["dims"] + 2,
    )


def _matmul() -> Operation:
    return Operation(
        build=parts.MatMul,
        num_inputs=(2, 2),
        linear=stand_ins.sum_of_means,
        work=lambda _, inputs, output: math.prod(output) * inputs[0][-1],
    )


_INNER_AXIS: Final = Attribute(
    words="an axis other than the batch: from 1 to 7, or from -7 to -1 counted from the end",
    accepts=lambda v: type(v) is int and 1 <= abs(v) < MAX_RANK,
    default=1,
)


def _dropout() -> Operation:
    return Operation(
        shape=shape_rules.unchanged,
        build=nn.Dropout,
        attributes={"p": _number(*_PROBABILITY, 0.5)},
        linear=stand_ins.nothing,
        draws_random=lambda s: s["p"] > 0,
    )


def _flatten() -> Operation:
    end = Attribute(words=_INNER_AXIS.words, accepts=_INNER_AXIS.accepts, default=-1)
    attributes = {"start_dim": _INNER_AXIS, "end_dim": end}
    return Operation(build=nn.Flatten, attributes=attributes, affine=True)


def _noise() -> Operation:
    return Operation(
        shape=shape_rules.unchanged,
        build=parts.Noise,
        attributes={"std": _number(1e-12, 1e6)},
        linear=stand_ins.nothing,
        draws_random=lambda _: True,
    )


_MANY: Final = (2, 16)

OPERATIONS: Final[Mapping[str, Operation]] = {
    "linear": _linear(),
    "conv1d": _conv(nn.Conv1d, 1),
    "conv2d": _conv(nn.Conv2d, 2),
    "conv3d": _conv(nn.Conv3d, 3),
    "conv_transpose2d": _conv_transpose(),
    "diagonal": _diagonal(),
    "activation": _activation(),
    "layer_norm": _layer_norm(),
    "group_norm": _group_norm(),
    "rms_norm": _rms_norm(),
    "batch_norm": _batch_norm(),
    "dropout": _dropout(),
    "max_pool": _pool("Max"),
    "avg_pool": _pool("Avg"),
    "adaptive_max_pool": _adaptive_pool("Max"),
    "adaptive_avg_pool": _adaptive_pool("Avg"),
    "flatten": _flatten(),
    "reshape": Operation(
        build=parts.Reshape, attributes={"shape": _integers(-1, MAX_DIMENSION)}, affine=True
    ),
    "permute": Operation(
        build=parts.Permute, attributes={"dims": _integers(1, MAX_RANK - 1)}, affine=True
    ),
    "identity": Operation(build=nn.Identity, affine=True, shape=shape_rules.unchanged),
    "scale": Operation(
        build=parts.Scale,
        attributes={"factor": _number(-1e6, 1e6, 1.0)},
        affine=True,
        shape=shape_rules.unchanged,
    ),
    "add": Operation(
        build=parts.Add,
        num_inputs=_MANY,
        exchangeable=True,
        affine=True,
        shape=shape_rules.broadcast,
    ),
    "sub": Operation(build=parts.Sub, num_inputs=(2, 2), affine=True, shape=shape_rules.broadcast),
    "mul": Operation(
        build=parts.Mul,
        num_inputs=_MANY,
        exchangeable=True,
        shape=shape_rules.broadcast,
        linear=stand_ins.value_path,
    ),
    "concat": Operation(
        build=parts.Concat, attributes={"dim": _INNER_AXIS}, num_inputs=_MANY, affine=True
    ),
    "matmul": _matmul(),
    "mean_matmul": Operation(
        build=parts.MeanMatMul,
        num_inputs=(2, 2),
        affine=True,
        work=lambda _, inputs, output: sum(map(math.prod, (*inputs, output))),
    ),
    "multihead_attention": _multihead_attention(),
    "mean_attention": _mean_attention(),
    "noise": _noise(),
}
"""Every operation by its ``op_type``."""


def read_attributes(operation: Operation, attributes: Mapping[str, object]) -> StepSettings:
    """Return all settings of an operation, defaults filled in, in the table's order.

    Raises:
        ValueError: An attribute is missing, not known, or of another kind; the message says
            which and what is expected.
    """
    odd = sorted(attributes.keys() - operation.attributes.keys())
    if odd:
        msg = f"attribute {odd[0]!r} is not known; known: {', '.join(operation.attributes)}"
        raise ValueError(msg)
    return {
        name: _read(name, attribute, attributes.get(name, attribute.default))
        for name, attribute in operation.attributes.items()
    }


def _read(name: str, attribute: Attribute, value: object) -> object:
    if value is REQUIRED:
        msg = f"attribute {name!r} is missing; give {attribute.words}"
        raise ValueError(msg)
    if attribute.spread and type(value) is int:
        value = (value,) * attribute.spread
    if not attribute.accepts(value):
        msg = f"attribute {name!r} is {value!r}; expected {attribute.words}"
        raise ValueError(msg)
    return value


_NOT_TORCHS: Final = ("trainable", "init", "init_after")


def build_module(operation: Operation, settings: StepSettings, **factory: object) -> nn.Module:
    """Build the module of one step.

    Args:
        operation: From the table.
        settings: As :func:`read_attributes` returns them.
        **factory: ``device`` and ``dtype``, for modules that have tensors.

    Raises:
        ValueError: Settings contradict each other, for example groups that do not divide.
    """
    own = {key: value for key, value in settings.items() if key not in _NOT_TORCHS}
    build = partial(operation.build, **factory) if operation.has_tensors else operation.build
    module = build(**own)
    if not settings.get("trainable", True):
        module.requires_grad_(requires_grad=False)
    return module
