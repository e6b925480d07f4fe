"""Describe a wrappable layer for the catalog."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from esper.contracts.errors import SiteDescriptionError
from esper.contracts.layer_kind import kind_of
from esper.contracts.site import SiteSpec
from esper.state.host_parts import host_modules
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
        dtype=str(reference_tensor(module).dtype).removeprefix("torch."),
        host_is_trainable=_is_trainable(module),
    )
    return reader.describe(bare, module, Seen(x, h))


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
    axis = kind_of(module).feature_axis
    if axis is None:
        axis = 1 if _gives_channels(module, h) else -1
    return axis % h.ndim


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


def _describe_channel_norm(spec: SiteSpec, norm: nn.Module, seen: Seen) -> SiteSpec:
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


def _gives_channels(block: nn.Module, h: Tensor) -> bool:
    """Guess by the last layer with a place for channels whether they are in axis 1."""
    kinds = [kind for part in host_modules(block) if _has_a_place(kind := kind_of(part))]
    return h.ndim > 2 and bool(kinds) and kinds[-1].feature_axis == 1


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
_LAST_AXIS_NORM: Final = SiteReader(widths=_normalised_widths, describe=_as_it_is)
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
