"""Describe a wrappable layer for the catalog."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from esper.contracts.errors import SiteDescriptionError
from esper.contracts.layer_kind import dotted_name, host_class_name, kind_of
from esper.contracts.site import SiteSpec
from esper.state.host_parts import host_modules, is_in_a_seed
from esper.state.kernel import reference_tensor

if TYPE_CHECKING:
    from esper.contracts.layer_kind import LayerKind


@dataclass(frozen=True, slots=True)
class Seen:
    """What a layer was seen to read and give; None where it was not seen.

    Attributes:
        x: Its first input, with any number of samples.
        h: Its output for it, the first one where there are several.
    """

    x: Tensor | None
    h: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReader:
    """How one kind of layer is read.

    Attributes:
        widths: Returns input and output features or channels; 0 where the layer does not say.
        describe: Fills in what a description of the layer says beyond its widths.
    """

    widths: Callable[[nn.Module], tuple[int, int]]
    describe: Callable[[SiteSpec, nn.Module, Seen], SiteSpec]


def describe_site(module: nn.Module, x: Tensor | None = None, h: Tensor | None = None) -> SiteSpec:
    """Return what the catalog needs to know about a layer.

    Its class says what it is, unless what it was seen to give says otherwise: a norm may be over
    channels although its class is over the last axis, and a layer whose output has other features
    than its class would give is described as a block.

    Args:
        module: The layer, wrapped or not.
        x: Its first input as it was seen, with any number of samples, or None. What a GroupNorm,
            a BatchNorm1d or a block gives is known from an example only.
        h: The output for it, the first one where there are several; given if ``x`` is.

    Raises:
        SiteDescriptionError: The convolution pads unequally before and after.
    """
    reader = SITE_READERS[kind_of(module).name]
    num_in, num_out = reader.widths(module)
    bare = SiteSpec(
        kind=kind_of(module).site,
        in_features=num_in,
        out_features=num_out,
        bias=_has_bias(module),
        dtype=str(reference_tensor(module, h).dtype).removeprefix("torch."),
        host_is_trainable=_is_trainable(module),
    )
    seen = Seen(x, h)
    spec = reader.describe(bare, module, seen)
    if _gives_something_else(spec, h):  # a subclass makes something of its own of it
        return _describe_block(replace(bare, kind="block"), module, seen)
    return spec


def widths(module: nn.Module) -> tuple[int, int]:
    """Return input and output features of a layer, or channels; 0 where it does not say.

    The input of an embedding is counted in rows of its table.
    """
    return SITE_READERS[kind_of(module).name].widths(module)


def feature_axis(module: nn.Module, h: Tensor) -> int:
    """Return which axis of a layer's output is that of its features or channels.

    Args:
        module: The layer.
        h: What it gives, at least two axes.
    """
    return 1 if _gives_channels(module, h) else h.ndim - 1


def convolution_padding(conv: _ConvNd) -> tuple[int, ...]:
    """Return a convolution's padding in elements per side; ``"same"`` and ``"valid"`` resolved.

    Raises:
        SiteDescriptionError: ``padding="same"`` that cannot be the same before and after.
    """
    if not isinstance(conv.padding, str):
        return tuple(conv.padding)
    if conv.padding == "valid":
        return (0,) * len(conv.kernel_size)
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(span % 2 for span in spans):
        msg = (
            f"padding='same' with kernel_size={tuple(conv.kernel_size)} and "
            f"dilation={tuple(conv.dilation)} pads unequally, which no kernel of the catalog does; "
            "pad before the convolution, or use an odd kernel_size"
        )
        raise SiteDescriptionError(msg)
    return tuple(span // 2 for span in spans)


def _named(*names: str) -> Callable[[nn.Module], tuple[int, int]]:
    """Return what reads the widths off attributes: the first names the input, the last the output.

    A subclass may have made something else of them.
    """

    def read(module: nn.Module) -> tuple[int, int]:
        values = [getattr(module, name, None) for name in names]
        numbers = [value for value in values if isinstance(value, int)]
        return (numbers[0], numbers[-1]) if len(numbers) == len(names) else (0, 0)

    return read


_FEATURES: Final = _named("in_features", "out_features")
_CHANNELS: Final = _named("in_channels", "out_channels")
_TABLE: Final = _named("num_embeddings", "embedding_dim")
_EMBED_DIM: Final = _named("embed_dim")
_NUM_FEATURES: Final = _named("num_features")
_NUM_CHANNELS: Final = _named("num_channels")


def _block_widths(block: nn.Module) -> tuple[int, int]:
    """Read widths off a module of anybody's that calls them as torch's own layers do."""
    readers = (_FEATURES, _CHANNELS, _TABLE, _EMBED_DIM, _NUM_FEATURES, _NUM_CHANNELS)
    return next((found for read in readers if any(found := read(block))), (0, 0))


def _transposed_widths(linear: nn.Module) -> tuple[int, int]:
    weight = linear.weight
    assert isinstance(weight, Tensor), "its class has one"
    return weight.shape[0], weight.shape[1]


def _normalised_widths(norm: nn.Module) -> tuple[int, int]:
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    return norm.normalized_shape[-1], norm.normalized_shape[-1]


def _recurrent_widths(layer: nn.Module) -> tuple[int, int]:
    assert isinstance(layer, nn.RNNBase)
    num_directions = 2 if layer.bidirectional else 1
    return layer.input_size, num_directions * (layer.proj_size or layer.hidden_size)


def _as_it_is(spec: SiteSpec, _module: nn.Module, _seen: Seen) -> SiteSpec:
    return spec


def _describe_convolution(spec: SiteSpec, conv: nn.Module, _seen: Seen) -> SiteSpec:
    assert isinstance(conv, _ConvNd)
    return replace(
        spec,
        kernel_size=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        padding=convolution_padding(conv),
        output_padding=tuple(conv.output_padding) if conv.transposed else (),
        dilation=tuple(conv.dilation),
        groups=conv.groups,
        padding_mode=conv.padding_mode,
    )


def _describe_last_axis_norm(spec: SiteSpec, norm: nn.Module, seen: Seen) -> SiteSpec:
    """Describe a norm over the last axis; a subclass may be over the channels of maps."""
    if seen.h is not None:
        is_first = _gives_channels(norm, seen.h)
    else:
        is_first = _has_own_forward(norm) and _takes_channels(norm, 4, default=False)
    if not is_first:
        return spec
    return _describe_channel_norm(replace(spec, kind="channel_norm"), norm, seen)


def _describe_channel_norm(spec: SiteSpec, norm: nn.Module, seen: Seen) -> SiteSpec:
    if seen.h is not None and not _gives_channels(norm, seen.h):
        return replace(spec, kind="norm")
    axes = kind_of(norm).num_axes if seen.h is None else seen.h.ndim - 2
    return replace(spec, axes=axes, out_features=0 if axes is None else spec.out_features)


def _describe_table(spec: SiteSpec, _table: nn.Module, _seen: Seen) -> SiteSpec:
    return replace(spec, in_features=spec.out_features)


def _describe_recurrent(spec: SiteSpec, layer: nn.Module, seen: Seen) -> SiteSpec:
    """A later step has a part in an earlier output where the layer also reads backwards."""
    assert isinstance(layer, nn.RNNBase)
    is_sequence = layer.batch_first and seen.h is not None and seen.h.ndim == 3
    return replace(spec, is_sequence=is_sequence, is_causal=not layer.bidirectional)


def _describe_block(spec: SiteSpec, block: nn.Module, seen: Seen) -> SiteSpec:
    """Describe a module by what it was seen to read and give."""
    x, h = seen.x, seen.h
    if x is None or h is None or min(x.ndim, h.ndim) < 2:
        return replace(spec, in_features=0, out_features=0)
    if _gives_channels(block, h):
        return replace(spec, in_features=x.shape[1], out_features=h.shape[1], axes=h.ndim - 2)
    is_sequence = h.ndim == 3 and _is_batch_first(block)
    return replace(spec, in_features=x.shape[-1], out_features=h.shape[-1], is_sequence=is_sequence)


def _gives_something_else(spec: SiteSpec, h: Tensor | None) -> bool:
    """Say whether what a layer gave has other features than its class says."""
    if h is None or h.ndim < 2 or spec.kind == "block" or spec.out_features == 0:
        return False
    axis = -1 if spec.axes is None and not spec.kernel_size else 1
    return h.shape[axis] != spec.out_features


def _gives_channels(block: nn.Module, h: Tensor) -> bool:
    """Say whether features are in axis 1 of what a module gave, not in the last.

    The last layer in it with a place for features says how many there are, and so where, unless
    both axes are of that size. Then its class says where, or, where a subclass has a forward of
    its own, whether that takes maps whose other axes are of other sizes.
    """
    parts = [part for part in host_modules(block) if _has_a_place(kind_of(part))]
    if not parts:
        return h.ndim > 2 and _has_channel_parameters(block, h)
    last = parts[-1]
    by_class = kind_of(last).feature_axis == 1
    if h.ndim < 3:
        return by_class and h.ndim == 2
    width = widths(last)[1]
    if (h.shape[1] == width) != (h.shape[-1] == width):
        return h.shape[1] == width
    if not _has_own_forward(last):
        return by_class
    return _takes_channels(last, h.ndim, default=by_class)


def _has_channel_parameters(block: nn.Module, h: Tensor) -> bool:
    """Say whether a module without layers in it has a parameter for each channel, as norms have."""
    for name, parameter in block.named_parameters():
        wide = [i for i, size in enumerate(parameter.shape) if size > 1]
        if len(wide) != 1 or is_in_a_seed(name):
            continue
        if parameter.ndim > 1:  # shaped to be broadcast from the right
            return wide[0] - parameter.ndim + h.ndim == 1
        size = len(parameter)
        if h.shape[1] == h.shape[-1] == size:
            return _takes_channels(block, h.ndim, size=size, default=False)
        return h.shape[1] == size
    return False


def _has_own_forward(module: nn.Module) -> bool:
    """Say whether a subclass of a kind's host class has a forward of its own."""
    name = host_class_name(type(module))
    stock = next(cls for cls in type(module).__mro__ if dotted_name(cls) == name)
    return _host_forward(module) is not cast("type[nn.Module]", stock).forward


def _takes_channels(
    module: nn.Module, num_axes: int, *, size: int | None = None, default: bool
) -> bool:
    """Try whether a module takes small maps with features in axis 1, or such with them last.

    Args:
        module: The module.
        num_axes: Axes of what it takes.
        size: How many features it takes; None for what it says.
        default: The answer where it takes both, or none.
    """
    size = widths(module)[0] if size is None else size
    others = (size + 1,) * (num_axes - 2)  # a size that no axis of features has
    like = reference_tensor(module)
    takes_first = _works_on(module, like.new_zeros(1, size, *others))
    takes_last = _works_on(module, like.new_zeros(1, *others, size))
    return default if takes_first == takes_last else takes_first


def _works_on(module: nn.Module, x: Tensor) -> bool:
    """Say whether a copy of a module takes an input; the module itself is not called."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copied = copy.deepcopy(module)
            _host_forward(copied)(copied, x)
    except Exception:  # noqa: BLE001 - anybody's own, on what it may not be made for
        return False
    return True


def _host_forward(module: nn.Module) -> Callable[..., object]:
    """Return the forward of a module's own class, without seeds."""
    own = (c for c in type(module).__mro__ if not hasattr(c, "_esper_key") and "forward" in vars(c))
    forward: Callable[..., object] = vars(next(own))["forward"]
    return forward


def _has_a_place(kind: LayerKind) -> bool:
    return kind.feature_axis is not None and not kind.takes_integers


def _is_batch_first(block: nn.Module) -> bool:
    return all(getattr(part, "batch_first", True) for part in host_modules(block))


def _has_bias(module: nn.Module) -> bool:
    """Say whether a layer has a bias: a tensor, or a recurrent layer's word for several."""
    bias = getattr(module, "bias", None)
    return bias is not None and bias is not False


def _is_trainable(module: nn.Module) -> bool:
    parameters = (p for part in host_modules(module) for p in part.parameters(recurse=False))
    return any(p.requires_grad for p in parameters)


_CONVOLUTION: Final = SiteReader(widths=_CHANNELS, describe=_describe_convolution)
_LAST_AXIS_NORM: Final = SiteReader(widths=_normalised_widths, describe=_describe_last_axis_norm)
_BATCH_NORM: Final = SiteReader(widths=_NUM_FEATURES, describe=_describe_channel_norm)

SITE_READERS: Final[Mapping[str, SiteReader]] = {
    "linear": SiteReader(widths=_FEATURES, describe=_as_it_is),
    "transposed_linear": SiteReader(widths=_transposed_widths, describe=_as_it_is),
    "conv1d": _CONVOLUTION,
    "conv2d": _CONVOLUTION,
    "conv3d": _CONVOLUTION,
    "conv_transpose2d": _CONVOLUTION,
    "attention": SiteReader(widths=_EMBED_DIM, describe=_as_it_is),
    "recurrent": SiteReader(widths=_recurrent_widths, describe=_describe_recurrent),
    "embedding": SiteReader(widths=_TABLE, describe=_describe_table),
    "embedding_bag": SiteReader(widths=_TABLE, describe=_describe_block),
    "layer_norm": _LAST_AXIS_NORM,
    "rms_norm": _LAST_AXIS_NORM,
    "group_norm": SiteReader(widths=_NUM_CHANNELS, describe=_describe_channel_norm),
    "batch_norm": _BATCH_NORM,
    "batch_norm2d": _BATCH_NORM,
    "batch_norm3d": _BATCH_NORM,
    "block": SiteReader(widths=_block_widths, describe=_describe_block),
}
"""How each kind of layer is read, by the name of its row in ``LAYER_KINDS``."""
