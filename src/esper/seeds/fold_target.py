"""Where a kernel is folded into: the weight and bias of a host, seen as one map.

A target knows how its host's tensors are laid out, what they are with a kernel in them, and how to
run the host with other ones. Tensors are float64; what is returned is laid out as it is stored.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, NoReturn, final

import torch
from torch import Tensor, nn

from esper.compiler.lowering import LoweredKernel
from esper.compiler.operations import ACTIVATIONS
from esper.compiler.parts import Add, Diagonal, Mul, Scale, Sub
from esper.contracts.choices import POSITIONS
from esper.contracts.layer_kind import kind_of_class
from esper.forward.generated_class import host_class_of
from esper.seeds.affine import (
    Affine,
    NotFoldable,
    affine_of,
    dense,
    exchanged,
    grouped,
    on_taps_of,
)

if TYPE_CHECKING:
    from esper.contracts.choices import Position
    from esper.state.layer_call import LayerCall
    from esper.state.seed_slot import Seed

_SAMPLES: Final = 8
_ROWS: Final = 64
_TABLE_ROWS: Final = 4096

Folded = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Joining:
    """A kernel that is to become part of a host, and how it joins it.

    Attributes:
        kernel: The kernel.
        alpha: Its share, from 0 to 1.
        is_serial: Whether it reads the host's output.
        replaces: Whether its share is taken from the host's.
        example: A call of the layer that was seen; None where none was.
    """

    kernel: nn.Module
    alpha: float
    is_serial: bool
    replaces: bool
    example: LayerCall | None

    @classmethod
    def of(cls, seed: Seed) -> Joining:
        """Return what stands in a seed, with the alpha that it has now."""
        return cls(
            kernel=seed.slot.kernel,
            alpha=float(seed.slot.alpha),
            is_serial=seed.is_serial,
            replaces=seed.replaces,
            example=seed.example,
        )

    @property
    def shares(self) -> tuple[float, float]:
        """The host's weight in the sum and the kernel's."""
        return (1.0 - self.alpha if self.replaces else 1.0), self.alpha

    def in_float64(self) -> nn.Module:
        """Return a copy of the kernel in float64."""
        return copy.deepcopy(self.kernel).double()


class FoldTarget(ABC):
    """A host that a kernel may become part of.

    Args:
        layer: The wrapped layer.

    Attributes:
        owner: The module that has the tensors: the host, or a part of it. Its weight is a
            parameter, as whoever folds has checked.
        positions: What kernels it can take in.
    """

    positions: ClassVar[tuple[Position, ...]] = POSITIONS

    def __init__(self, layer: nn.Module) -> None:
        self.owner = layer
        self._host_name = host_class_of(layer).__name__

    @property
    def weight(self) -> nn.Parameter:
        """The owner's weight, as it is stored."""
        return self.owner.get_parameter("weight")

    @property
    def bias(self) -> nn.Parameter | None:
        """The owner's bias; None where it has none."""
        bias: nn.Parameter | None = getattr(self.owner, "bias", None)
        return bias

    def folded(self, joining: Joining) -> Folded:
        """Return weight and bias with the kernel in them; the bias None where there is none.

        Raises:
            NotFoldable: That is not exact.
        """
        position = "serial" if joining.is_serial else "parallel"
        if position not in self.positions:
            msg = f"into a {self._host_name} only {self.positions[0]} kernels fold"
            raise NotFoldable(msg)
        bias = None if self.bias is None else self.bias.detach().double()
        return self._with(joining, self.weight.detach().double(), bias)

    @abstractmethod
    def _with(self, joining: Joining, weight: Tensor, bias: Tensor | None) -> Folded: ...

    @abstractmethod
    def random_input(self, joining: Joining) -> Tensor:
        """Return an input to measure with, float64 unless the host takes integers.

        Raises:
            NotFoldable: Nothing says what the host takes.
        """

    @abstractmethod
    def run(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """Run the host in float64 with another weight and bias."""


def target_of(layer: nn.Module) -> FoldTarget:
    """Return the target that a layer's host is.

    Raises:
        NotFoldable: It is none; a class derived from a host class may compute something else.
    """
    host_class = host_class_of(layer)
    kind = kind_of_class(host_class)
    make = FOLD_TARGETS[kind.name] if kind.is_host(host_class) else _unknown
    return make(layer)


class _AffineTarget(FoldTarget):
    """A host that is affine in its input; the subclasses say how its weight lies.

    Rows of a matrix are outputs: ``[out, in / groups, *taps]``.
    """

    groups: int = 1

    def _with(self, joining: Joining, weight: Tensor, bias: Tensor | None) -> Folded:
        kept, alpha = joining.shares
        rows = self._rows(weight)
        known = rows.new_zeros(len(rows)) if bias is None else bias
        kernel_reads = len(rows) if joining.is_serial else rows.shape[1] * self.groups
        kernel = affine_of(joining.kernel, kernel_reads, weight)
        if joining.is_serial:
            if kernel.geometry is not None:
                msg = "a serial kernel folds only where it is 1x1"
                raise NotFoldable(msg)
            eye = torch.eye(len(rows), dtype=torch.float64, device=rows.device)
            matrix = kept * eye + alpha * kernel.weight
            full = torch.einsum("om,m...->o...", matrix, dense(rows, self.groups))
            rows, changed = grouped(full, self.groups), matrix @ known + alpha * kernel.bias
        else:
            rows = kept * rows + alpha * self._on_taps(kernel)
            changed = kept * known + alpha * kernel.bias
        if bias is None and bool(changed.any()):
            msg = "the kernel has a bias and the host has none"
            raise NotFoldable(msg)
        return self._stored(rows), None if bias is None else changed

    def _rows(self, weight: Tensor) -> Tensor:
        return weight

    def _stored(self, rows: Tensor) -> Tensor:
        return rows

    def _on_taps(self, kernel: Affine) -> Tensor:
        if kernel.geometry is not None:
            msg = "a convolution beside a layer that is none"
            raise NotFoldable(msg)
        return kernel.weight

    def random_input(self, joining: Joining) -> Tensor:  # noqa: ARG002 - any input will do
        return _random((_ROWS, self._rows(self.weight).shape[1]), self.weight)

    def run(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._rows(weight), bias)


@final
class _Linear(_AffineTarget):
    """``nn.Linear``."""


@final
class _TransposedLinear(_AffineTarget):
    """``transformers``' ``Conv1D``: ``[in, out]``."""

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.T

    def _stored(self, rows: Tensor) -> Tensor:
        return rows.T.contiguous()


@final
class _OutputProjection(_AffineTarget):
    """The last matrix of a ``MultiheadAttention``: what follows it is affine in its weight."""

    positions = ("serial",)

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.owner = layer.get_submodule("out_proj")


@final
class _Convolution(_AffineTarget):
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``: grouped rows with taps."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        self._conv = layer
        self.groups = layer.groups

    def _on_taps(self, kernel: Affine) -> Tensor:
        return grouped(on_taps_of(kernel, self._conv), self.groups)

    def random_input(self, joining: Joining) -> Tensor:  # noqa: ARG002 - any input will do
        return _random_image(self._conv, self.weight)

    def run(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        y: Tensor = self._conv._conv_forward(x, weight, bias)  # noqa: SLF001 - does the padding modes
        return y


@final
class _TransposedConvolution(_AffineTarget):
    """``nn.ConvTranspose2d``: ``[in, out / groups, *taps]``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        assert isinstance(layer, nn.ConvTranspose2d)
        self._conv = layer
        self.groups = layer.groups

    def _rows(self, weight: Tensor) -> Tensor:
        return exchanged(weight, self.groups)

    def _stored(self, rows: Tensor) -> Tensor:
        return exchanged(rows, self.groups)

    def _on_taps(self, kernel: Affine) -> Tensor:
        return grouped(on_taps_of(kernel, self._conv), self.groups)

    def random_input(self, joining: Joining) -> Tensor:  # noqa: ARG002 - any input will do
        return _random_image(self._conv, self.weight)

    def run(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        conv = self._conv
        assert not isinstance(conv.padding, str), "transposed convolutions pad by numbers"
        return nn.functional.conv_transpose2d(
            x,
            weight,
            bias,
            conv.stride,
            conv.padding,
            conv.output_padding,
            conv.groups,
            conv.dilation,
        )


@final
class _Norm(FoldTarget):
    """A normalisation with a factor a feature: what follows may have a factor and a term each."""

    positions = ("serial",)

    def _with(self, joining: Joining, weight: Tensor, bias: Tensor | None) -> Folded:
        kept, alpha = joining.shares
        kernel = affine_of(joining.kernel, weight.shape[-1], weight)
        factors = kernel.weight.diagonal() if kernel.geometry is None else weight.new_zeros(0)
        if kernel.geometry is not None or not torch.equal(kernel.weight, torch.diag(factors)):
            msg = "behind a norm only a factor and a term for each feature fold"
            raise NotFoldable(msg)
        term = alpha * kernel.bias
        if bias is None and bool(term.any()):
            msg = "the kernel has a bias and the host has none"
            raise NotFoldable(msg)
        factor = kept + alpha * factors
        return weight * factor, None if bias is None else bias * factor + term

    def random_input(self, joining: Joining) -> Tensor:
        """Return one of the shape that was seen: only that says which axis a kernel reads."""
        seen = None if joining.example is None else joining.example.x
        if not isinstance(seen, Tensor):
            msg = "no input of the norm was seen, so that the axis of its features is not known"
            raise NotFoldable(msg)
        return _random(tuple(seen.shape), self.weight)

    def run(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        host = self.owner
        if isinstance(host, nn.LayerNorm):
            return nn.functional.layer_norm(x, host.normalized_shape, weight, bias, host.eps)
        if isinstance(host, nn.RMSNorm):
            return nn.functional.rms_norm(x, host.normalized_shape, weight, host.eps)
        if isinstance(host, nn.GroupNorm):
            return nn.functional.group_norm(x, host.num_groups, weight, bias, host.eps)
        assert isinstance(host, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001 - the base has no other name
        mean, var = x.new_zeros(len(weight)), x.new_ones(len(weight))
        return nn.functional.batch_norm(x, mean, var, weight, bias, eps=host.eps)


@final
class _Table(FoldTarget):
    """An embedding: every row may become what a kernel makes of it."""

    positions = ("serial",)

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        assert isinstance(layer, nn.Embedding)
        self._table = layer

    def _with(self, joining: Joining, weight: Tensor, bias: Tensor | None) -> Folded:
        if self._table.max_norm is not None:
            msg = "an embedding with max_norm changes its rows when it is called"
            raise NotFoldable(msg)
        kernel = joining.kernel
        steps = list(kernel.steps) if isinstance(kernel, LoweredKernel) else [kernel]
        mixing = next((step for step in steps if not _is_row_by_row(step)), None)
        if mixing is not None:
            msg = f"{type(mixing).__name__} is no operation that works row by row"
            raise NotFoldable(msg)
        kept, alpha = joining.shares
        with torch.no_grad():
            return kept * weight + alpha * joining.in_float64()(weight), bias

    def random_input(self, joining: Joining) -> Tensor:  # noqa: ARG002 - any input will do
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randperm(self._table.num_embeddings, generator=generator)[:_TABLE_ROWS]
        return drawn.to(self.weight.device)

    def run(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:  # noqa: ARG002 - none
        return weight[x]


_ROW_BY_ROW: Final = frozenset(
    {nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity, Add, Sub, Mul, Scale, *ACTIVATIONS.values()}
)


def _is_row_by_row(step: nn.Module) -> bool:
    """Say whether a step makes of each row, by the last axis, what no other row has a part in."""
    if isinstance(step, nn.LayerNorm | nn.RMSNorm):
        return len(step.normalized_shape) == 1
    if isinstance(step, Diagonal):
        return step.dim == -1 and step.weight.ndim == 1
    return type(step) in _ROW_BY_ROW


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.to(like.device)


def _random_image(
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d, like: Tensor
) -> Tensor:
    span = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return _random((2, conv.in_channels, *(s + _SAMPLES for s in span)), like)


def _unknown(layer: nn.Module) -> NoReturn:
    msg = f"a {host_class_of(layer).__name__} is not known to be affine in one weight"
    raise NotFoldable(msg)


def _recurrent(layer: nn.Module) -> NoReturn:
    msg = (
        f"a {host_class_of(layer).__name__} reads at each step what it gave at the one before, "
        "where a kernel that became part of its weights would act too"
    )
    raise NotFoldable(msg)


FOLD_TARGETS: Final[Mapping[str, Callable[[nn.Module], FoldTarget]]] = {
    "linear": _Linear,
    "transposed_linear": _TransposedLinear,
    "conv1d": _Convolution,
    "conv2d": _Convolution,
    "conv3d": _Convolution,
    "conv_transpose2d": _TransposedConvolution,
    "attention": _OutputProjection,
    "recurrent": _recurrent,
    "embedding": _Table,
    "embedding_bag": _unknown,
    "layer_norm": _Norm,
    "rms_norm": _Norm,
    "group_norm": _Norm,
    "batch_norm": _Norm,
    "batch_norm2d": _Norm,
    "batch_norm3d": _Norm,
    "block": _unknown,
}
"""What makes the target of a layer, by the name of its row in ``LAYER_KINDS``.

A kind that takes in no kernel has a function that raises ``NotFoldable`` with the reason.
"""
