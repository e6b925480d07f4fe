"""Affine kernels as one weight and one bias, in float64, with the geometry of a convolution.

Only what can be composed exactly is composed; everything else is refused with the reason. A
*pointwise* map has no geometry: a matrix on the features (linear) or channels (1x1, stride 1).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from esper.compiler.lowering import LoweredKernel
from esper.compiler.parts import Add, Diagonal, Scale, Sub
from esper.contracts.errors import SiteDescriptionError
from esper.state.site import convolution_padding

if TYPE_CHECKING:
    from collections.abc import Callable


class NotFoldable(Exception):  # noqa: N818 - an answer, not an error; never leaves folding
    """Why a map cannot be made part of a weight exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Where taps lie: tap j of output i reads input ``i * stride - padding + j * dilation``.

    In a transposed convolution input and output change places.

    Attributes:
        stride: Per axis.
        padding: Per axis, before and after.
        dilation: Per axis; of no meaning where the kernel has one tap.
        padding_mode: As torch's.
        output_padding: Per axis, of a transposed convolution; None for any other.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    output_padding: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Affine:
    """``x -> weight x + bias``.

    Attributes:
        weight: ``[out, in]`` if pointwise, else ``[out, in, *taps]``, dense over groups; float64.
        bias: ``[out]``, float64.
        geometry: Of the taps; None if pointwise.
    """

    weight: Tensor
    bias: Tensor
    geometry: Geometry | None = None


def affine_of(kernel: nn.Module, num_features: int, like: Tensor) -> Affine:
    """Return a kernel as one affine map.

    Args:
        kernel: A lowered kernel, or a linear layer or convolution.
        num_features: Features or channels of its input.
        like: Gives the device.

    Raises:
        NotFoldable: It is not one, or not exactly.
    """
    eye = torch.eye(num_features, dtype=torch.float64, device=like.device)
    identity = Affine(weight=eye, bias=eye.new_zeros(num_features))
    if not isinstance(kernel, LoweredKernel):
        return _apply(kernel, (identity,))
    values = [identity]
    for step, inputs in zip(kernel.steps, kernel.wiring, strict=True):
        values.append(_apply(step, tuple(values[i] for i in inputs)))
    return values[-1]


def _apply(step: nn.Module, inputs: tuple[Affine, ...]) -> Affine:
    rule = _RULES.get(type(step))
    if rule is None:
        msg = f"{type(step).__name__} is no affine operation that can be folded"
        raise NotFoldable(msg)
    if getattr(step, "parametrizations", None) is not None:
        msg = f"a {type(step).__name__} of the kernel is parametrized"
        raise NotFoldable(msg)
    return rule(step, inputs)


def _linear(step: nn.Module, inputs: tuple[Affine, ...]) -> Affine:
    assert isinstance(step, nn.Linear)
    return after(inputs[0], step.weight.detach().double(), _term(step.bias, step.weight))


def _term(bias: Tensor | None, rows: Tensor) -> Tensor:
    """Return a bias in float64: zeros, one for each row, where there is none."""
    if bias is None:
        return rows.new_zeros(len(rows), dtype=torch.float64)
    return bias.detach().double()


def after(inner: Affine, matrix: Tensor, bias: Tensor) -> Affine:
    """Return ``x -> matrix inner(x) + bias``.

    Args:
        inner: The map that comes first.
        matrix: ``[out, inner's out]``, float64.
        bias: ``[out]``, float64.

    Raises:
        NotFoldable: The matrix reads another number of features, and so another axis.
    """
    _check_axis(matrix.shape[1], inner)
    weight = torch.einsum("om,m...->o...", matrix, inner.weight)
    return replace(inner, weight=weight, bias=matrix @ inner.bias + bias)


def _check_axis(num_read: int, inner: Affine) -> None:
    if num_read != len(inner.weight):
        msg = (
            f"a step of the kernel reads {num_read} features where there are {len(inner.weight)}, "
            "and so along another axis"
        )
        raise NotFoldable(msg)


def _convolution(step: nn.Module, inputs: tuple[Affine, ...]) -> Affine:
    assert isinstance(step, _ConvNd)
    inner, bias = inputs[0], _term(step.bias, step.weight)
    weight = dense(step.weight.detach().double(), step.groups)
    geometry = geometry_of(step)
    padded = any(geometry.padding)
    pads_zeros = padded and geometry.padding_mode == "zeros"
    if all(size == 1 for size in step.kernel_size) and set(geometry.stride) == {1} and not padded:
        return after(inner, weight.flatten(1), bias)
    if inner.geometry is not None:
        msg = "a convolution after a convolution with a geometry of its own"
        raise NotFoldable(msg)
    if pads_zeros and bool(inner.bias.any()):  # the other modes pad what has the bias
        msg = "a bias before a convolution that pads by zeros would act at the borders too"
        raise NotFoldable(msg)
    _check_axis(weight.shape[1], inner)
    composed = torch.einsum("om...,mi->oi...", weight, inner.weight)
    bias = weight.flatten(2).sum(2) @ inner.bias + bias
    return Affine(weight=composed, bias=bias, geometry=geometry)


def _transposed_convolution(step: nn.Module, inputs: tuple[Affine, ...]) -> Affine:
    assert isinstance(step, nn.ConvTranspose2d)
    inner = inputs[0]
    if inner.geometry is not None or bool(inner.bias.any()):
        msg = "a transposed convolution after a bias or a geometry, which overlap unequally"
        raise NotFoldable(msg)
    rows = dense(exchanged(step.weight.detach().double(), step.groups), step.groups)
    _check_axis(rows.shape[1], inner)
    composed = torch.einsum("om...,mi->oi...", rows, inner.weight)
    return Affine(weight=composed, bias=_term(step.bias, rows), geometry=geometry_of(step))


def exchanged(weight: Tensor, groups: int) -> Tensor:
    """Return a grouped weight with inputs and outputs exchanged; its own inverse.

    A transposed convolution's ``[in, out / groups, ...]`` becomes ``[out, in / groups, ...]``, as
    any other has it.
    """
    first_each, second_each = weight.shape[0] // groups, weight.shape[1]
    parts = weight.reshape(groups, first_each, second_each, *weight.shape[2:]).transpose(1, 2)
    return parts.reshape(groups * second_each, first_each, *weight.shape[2:])


def _diagonal(step: nn.Module, inputs: tuple[Affine, ...]) -> Affine:
    assert isinstance(step, Diagonal)
    if step.weight.ndim > 1:
        msg = "a factor for each element of several axes is no matrix on the features"
        raise NotFoldable(msg)
    factors = step.weight.detach().double()
    return after(inputs[0], torch.diag(factors), _term(step.bias, factors))


def geometry_of(conv: _ConvNd) -> Geometry:
    """Return the geometry of a convolution.

    Raises:
        NotFoldable: It pads unequally before and after.
    """
    try:
        padding = convolution_padding(conv)
    except SiteDescriptionError as error:
        raise NotFoldable(str(error)) from error
    return Geometry(
        stride=tuple(conv.stride),
        padding=padding,
        dilation=tuple(conv.dilation),
        padding_mode=conv.padding_mode,
        output_padding=tuple(conv.output_padding) if conv.transposed else None,
    )


def dense(weight: Tensor, groups: int) -> Tensor:
    """Return a grouped weight ``[out, in / groups, *taps]`` as ``[out, in, *taps]``."""
    if groups == 1:
        return weight
    out_each, in_each = weight.shape[0] // groups, weight.shape[1]
    full = weight.new_zeros(weight.shape[0], in_each * groups, *weight.shape[2:])
    for g in range(groups):
        rows = slice(g * out_each, (g + 1) * out_each)
        full[rows, g * in_each : (g + 1) * in_each] = weight[rows]
    return full


def grouped(weight: Tensor, groups: int) -> Tensor:
    """Return a dense weight as a grouped one; the inverse of :func:`dense`.

    Raises:
        NotFoldable: It has entries between groups.
    """
    out_each, in_each = weight.shape[0] // groups, weight.shape[1] // groups
    parts = [
        weight[g * out_each : (g + 1) * out_each, g * in_each : (g + 1) * in_each]
        for g in range(groups)
    ]
    narrow = torch.cat(parts)
    if not torch.equal(dense(narrow, groups), weight):
        msg = f"the kernel mixes channels that the host's {groups} groups keep apart"
        raise NotFoldable(msg)
    return narrow


def _scale(step: nn.Module, inputs: tuple[Affine, ...]) -> Affine:
    assert isinstance(step, Scale)
    inner = inputs[0]
    return replace(inner, weight=inner.weight * step.factor, bias=inner.bias * step.factor)


def _identity(_step: nn.Module, inputs: tuple[Affine, ...]) -> Affine:
    return inputs[0]


def _add(_step: nn.Module, inputs: tuple[Affine, ...]) -> Affine:
    return _sum(inputs, (1.0,) * len(inputs))


def _sub(_step: nn.Module, inputs: tuple[Affine, ...]) -> Affine:
    return _sum(inputs, (1.0, -1.0))


def _sum(inputs: tuple[Affine, ...], signs: tuple[float, ...]) -> Affine:
    first = inputs[0]
    if any(i.geometry != first.geometry or i.weight.shape != first.weight.shape for i in inputs):
        msg = "a sum of maps with different geometries"
        raise NotFoldable(msg)
    terms = list(zip(signs, inputs, strict=True))
    weight = sum((s * i.weight for s, i in terms), torch.zeros_like(first.weight))
    bias = sum((s * i.bias for s, i in terms), torch.zeros_like(first.bias))
    return replace(first, weight=weight, bias=bias)


_RULES: Final[dict[type[nn.Module], Callable[[nn.Module, tuple[Affine, ...]], Affine]]] = {
    nn.Linear: _linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    nn.ConvTranspose2d: _transposed_convolution,
    Diagonal: _diagonal,
    nn.Identity: _identity,
    Scale: _scale,
    Add: _add,
    Sub: _sub,
}


def on_taps_of(kernel: Affine, host: _ConvNd) -> Tensor:
    """Return a kernel's weight on the taps of a host convolution: ``[out, in, *host's taps]``.

    Args:
        kernel: The kernel; it reads what the host reads.
        host: The convolution.

    Raises:
        NotFoldable: Stride, dilation or padding mode differ, or a tap lies on none of the host's.
    """
    target = geometry_of(host)
    if target.output_padding is not None:
        return _on_transposed_taps(kernel, host, target)
    axes = len(target.stride)
    source = kernel.geometry or Geometry(
        stride=(1,) * axes,
        padding=(0,) * axes,
        dilation=target.dilation,
        padding_mode=target.padding_mode,
    )
    weight = kernel.weight
    if kernel.geometry is None:
        weight = weight.reshape(*weight.shape, *(1,) * axes)
    if source.output_padding is not None or source.stride != target.stride:
        msg = f"stride {source.stride} is not the host's {target.stride}"
        raise NotFoldable(msg)
    if any(source.padding) and source.padding_mode != target.padding_mode:
        msg = f"padding mode {source.padding_mode!r} is not the host's {target.padding_mode!r}"
        raise NotFoldable(msg)
    places = [
        _places(weight.shape[2 + a], source, target, host.kernel_size[a], a) for a in range(axes)
    ]
    out = weight.new_zeros(*weight.shape[:2], *host.kernel_size)
    for taps in itertools.product(*(range(len(p)) for p in places)):
        there: list[int | EllipsisType] = [..., *(places[a][tap] for a, tap in enumerate(taps))]
        here: list[int | EllipsisType] = [..., *taps]
        out[tuple(there)] = weight[tuple(here)]
    return out


def _on_transposed_taps(kernel: Affine, host: _ConvNd, target: Geometry) -> Tensor:
    """Return a kernel's weight as it is, where its taps are the host's one by one."""
    if kernel.geometry != target or kernel.weight.shape[2:] != host.kernel_size:
        msg = "beside a transposed convolution only one of the same settings folds"
        raise NotFoldable(msg)
    return kernel.weight


def _places(
    num_taps: int, source: Geometry, target: Geometry, host_taps: int, axis: int
) -> list[int]:
    """Return for each tap of one axis the host's tap that reads the same input."""
    step = target.dilation[axis]
    if num_taps > 1 and source.dilation[axis] != step:
        msg = f"dilation {source.dilation} is not the host's {target.dilation}"
        raise NotFoldable(msg)
    offset, remainder = divmod(target.padding[axis] - source.padding[axis], step)
    places = [tap + offset for tap in range(num_taps)]
    if remainder or places[0] < 0 or places[-1] >= host_taps:
        msg = "the kernel's centre is not aligned with the host's"
        raise NotFoldable(msg)
    return places
