"""Calls made from what a layer says it takes, so that a kernel can be probed before any forward.

A kernel may need more axes than the layer does (a sequence, an image), so there is a call for each
form that such a layer is usually called in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from math import ceil
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from esper.contracts.layer_kind import kind_of
from esper.state.kernel import reference_tensor
from esper.state.layer_call import LayerCall
from esper.state.site import widths

if TYPE_CHECKING:
    from collections.abc import Sequence

Forms = list[tuple[int, ...]]
"""Shapes of a layer's first input, the likeliest first."""

_FEW: Final = 16
_SIDE: Final = 8
_WIDE_SIDE: Final = 32


def made_calls(layer: nn.Module) -> list[LayerCall]:
    """Return calls of a layer with numbers of our own; none where it does not say what it takes.

    They are the same whenever they are made, and no random state is touched. A layer without a
    tensor of its own says neither a device nor a dtype.

    Args:
        layer: A layer, wrapped or not.
    """
    tensor = next(chain(layer.parameters(), layer.buffers()), None)
    if tensor is None or tensor.device.type == "meta":
        return []
    with torch.inference_mode(mode=False):  # a probe may differentiate
        made = MADE_CALLS[kind_of(layer).name](layer)
        return [LayerCall(tuple(values), {}).to(tensor.device) for values in made]


def _of_forms(forms: Callable[[nn.Module], Forms]) -> Callable[[nn.Module], Iterator[list[Tensor]]]:
    """Return what makes calls of one floating input, in the layer's dtype."""

    def make(layer: nn.Module) -> Iterator[list[Tensor]]:
        for shape in forms(layer):
            yield [_normal(shape, reference_tensor(layer).dtype)]

    return make


def _normal(shape: tuple[int, ...], dtype: torch.dtype, random_seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(random_seed)
    return torch.randn(shape, generator=generator, device="cpu").to(dtype)


def _before_features(num_features: int) -> Forms:
    if num_features < 1:
        return []
    return [(_FEW, num_features), (2, _SIDE, num_features), (2, 4, 4, num_features)]


def _features(layer: nn.Module) -> Forms:
    return _before_features(widths(layer)[0])


def _normalised(norm: nn.Module) -> Forms:
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    shape = tuple(norm.normalized_shape)
    return _before_features(shape[0]) if len(shape) == 1 else [(_FEW, *shape), (2, 4, *shape)]


def _channels_of_any_rank(norm: nn.Module) -> Forms:
    return [form for num_axes in (2, 1, 0, 3) for form in _channels(norm, num_axes)]


def _channels_with(num_axes: int) -> Callable[[nn.Module], Forms]:
    return lambda norm: _channels(norm, num_axes)


def _channels(norm: nn.Module, num_axes: int) -> Forms:
    num_channels = widths(norm)[1]
    sides = (_SIDE,) * num_axes
    return [(2 if num_axes else _FEW, num_channels, *sides)] if num_channels else []


def _images(conv: nn.Module) -> Forms:
    assert isinstance(conv, _ConvNd)
    sides = (_SIDE, _WIDE_SIDE) if len(conv.kernel_size) < 3 else (_SIDE,)
    return [(2, conv.in_channels, *_spatial(conv, side)) for side in sides]


def _spatial(conv: _ConvNd, side: int) -> tuple[int, ...]:
    """Return sizes that a convolution divides evenly and that its kernel and padding fit into."""
    if isinstance(conv, _ConvTransposeNd):
        return (side,) * len(conv.kernel_size)
    axes = zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)
    spans = [(stride, dilation * (size - 1) + 1) for size, stride, dilation in axes]
    return tuple(stride * 2 * ceil(max(side, span) / (2 * stride)) for stride, span in spans)


def _sequences(layer: nn.Module) -> Forms:
    assert isinstance(layer, nn.RNNBase)
    return [(2, _SIDE, layer.input_size)]


def _queries(attention: nn.Module) -> Iterator[list[Tensor]]:
    assert isinstance(attention, nn.MultiheadAttention)
    dtype = reference_tensor(attention).dtype
    sizes = (attention.embed_dim, attention.kdim, attention.vdim)
    yield [_normal((4, 4, size), dtype, seed) for seed, size in enumerate(sizes)]


def _rows(table: nn.Module) -> Iterator[list[Tensor]]:
    """Make rows to look up; a table that scales the rows it is asked for is left alone."""
    assert isinstance(table, nn.Embedding | nn.EmbeddingBag)
    if table.max_norm is None:
        generator = torch.Generator().manual_seed(0)
        shape = (4, _SIDE)
        yield [torch.randint(table.num_embeddings, shape, generator=generator, device="cpu")]


def _block_of_torch(block: nn.Module) -> Forms:
    """Read layers of torch's own that have no row: they say what they take all the same."""
    if isinstance(block, _ConvNd):
        return _images(block)
    return _instance_normed(block) if isinstance(block, _NormBase) else []


def _instance_normed(norm: _NormBase) -> Forms:
    """Return the one rank that a class of instance norms takes, found by its name."""
    ranks = {"InstanceNorm1d": 1, "InstanceNorm2d": 2, "InstanceNorm3d": 3}
    found = [ranks[cls.__name__] for cls in type(norm).__mro__ if cls.__name__ in ranks]
    return [(2, norm.num_features, *(_SIDE,) * num_axes) for num_axes in found[:1]]


_CONVOLUTION: Final = _of_forms(_images)
_NORM: Final = _of_forms(_normalised)

MADE_CALLS: Final[Mapping[str, Callable[[nn.Module], Iterator[Sequence[Tensor]]]]] = {
    "linear": _of_forms(_features),
    "transposed_linear": _of_forms(_features),
    "conv1d": _CONVOLUTION,
    "conv2d": _CONVOLUTION,
    "conv3d": _CONVOLUTION,
    "conv_transpose2d": _CONVOLUTION,
    "attention": _queries,
    "recurrent": _of_forms(_sequences),
    "embedding": _rows,
    "embedding_bag": _rows,
    "layer_norm": _NORM,
    "rms_norm": _NORM,
    "group_norm": _of_forms(_channels_of_any_rank),
    "batch_norm": _of_forms(_channels_of_any_rank),
    "batch_norm2d": _of_forms(_channels_with(2)),
    "batch_norm3d": _of_forms(_channels_with(3)),
    "block": _of_forms(_block_of_torch),
}
"""What makes the positional arguments of calls of one kind, by the name of its row; none where a
layer does not say what it takes."""
