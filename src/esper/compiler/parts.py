"""The few modules that kernels need and torch.nn does not have.

Each is traceable by torch.fx down to plain functions, so that a kernel can be written out as
plain PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


@final
class Add(nn.Module):
    """The sum of two or more tensors, broadcast."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return ``inputs[0] + inputs[1] + ...``, added in this order."""
        total = inputs[0]
        for term in inputs[1:]:
            total = total + term
        return total


@final
class Sub(nn.Module):
    """The difference of two tensors, broadcast."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``left - right``."""
        return left - right


@final
class Mul(nn.Module):
    """The product of two or more tensors element by element, broadcast."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return ``inputs[0] * inputs[1] * ...``, multiplied in this order."""
        product = inputs[0]
        for factor in inputs[1:]:
            product = product * factor
        return product


@final
class Concat(nn.Module):
    """Tensors one after the other along an axis.

    Args:
        dim: The axis; never the batch.
    """

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the inputs joined along ``dim``."""
        return torch.cat(inputs, dim=self.dim)


@final
class MatMul(nn.Module):
    """The matrix product of the last two axes."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``left @ right``."""
        return left @ right


@final
class MeanMatMul(nn.Module):
    """The sum of two tensors' means over the axis that a matrix product of them sums over."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the means of left's rows plus those of right's columns, shaped as the product."""
        return left.mean(-1, keepdim=True) + right.mean(-2, keepdim=True)


@final
class Scale(nn.Module):
    """A constant factor.

    Args:
        factor: Finite; 0 makes a kernel that contributes exactly nothing.
    """

    def __init__(self, *, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return ``factor * x``."""
        return x * self.factor


@final
class Diagonal(nn.Module):
    """A factor and a term for each feature.

    Args:
        num_features: Size of the axis of the features; several sizes for so many last axes.
        dim: That axis: -1, or 1 for channels.
        bias: Whether there is a term.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Several sizes, and ``dim`` is 1.
    """

    def __init__(
        self,
        *,
        num_features: int | tuple[int, ...],
        dim: int,
        bias: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        if dim == 1 and isinstance(num_features, tuple):
            msg = f"several axes are the last ones, dim -1, found num_features {num_features}"
            raise ValueError(msg)
        self.dim = dim
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if bias else None
        )

    def reset_parameters(self) -> None:
        """Make it the identity, as the affine part of a normalisation begins."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``weight * x + bias``, features along ``dim``."""
        y = x.movedim(self.dim, -1) * self.weight
        return (y if self.bias is None else y + self.bias).movedim(-1, self.dim)


@final
class Noise(nn.Module):
    """Gaussian noise, drawn anew in every forward, in training and in evaluation.

    Args:
        std: Standard deviation, above 0.
    """

    def __init__(self, *, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + std * n`` with n from the standard normal distribution."""
        return x + torch.randn_like(x) * self.std


@final
class Reshape(nn.Module):
    """Another shape for the same elements of each sample.

    Args:
        shape: Sizes behind the batch axis; one may be -1 and is what is left.
    """

    def __init__(self, *, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Return x with the shape (batch, *shape)."""
        return x.reshape(x.shape[0], *self.shape)


@final
class Permute(nn.Module):
    """Another order of the axes behind the batch.

    Args:
        dims: For each axis behind the batch, the axis (from 1) that comes there.
    """

    def __init__(self, *, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """Return x with its axes reordered."""
        return x.permute(0, *self.dims)


@final
class MaxPool1d(nn.Module):
    """Max pooling along one axis that stays one graph for every length.

    torch.nn.MaxPool1d without indices narrows a symbolic length to a number; with them it does
    not.

    Args:
        kernel_size: Length of a window.
        stride: From one window to the next; ``kernel_size`` if None.
        padding: Elements before and after, at most half of ``kernel_size``.
        dilation: From one element of a window to the next.
        ceil_mode: Whether a last window that is not whole counts.
    """

    def __init__(
        self, *, kernel_size: int, stride: int | None, padding: int, dilation: int, ceil_mode: bool
    ) -> None:
        super().__init__()
        self.pool = nn.MaxPool1d(
            kernel_size, stride, padding, dilation, return_indices=True, ceil_mode=ceil_mode
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the maximum of each window of x, shape (batch, channels, length)."""
        largest: Tensor = self.pool(x)[0]
        return largest


@final
class Attention(nn.Module):
    """Multi-head attention of (batch, length, features) tensors, weights not returned.

    Args:
        embed_dim: Features of query, key, value and output.
        num_heads: Heads; divides ``embed_dim``.
        dropout: Probability that an attention weight is dropped in training.
        bias: Whether the projections have biases.
        causal: Whether a query attends to keys up to its own place only.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        bias: bool,
        device: torch.device,
        dtype: torch.dtype,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.attention = nn.MultiheadAttention(
            embed_dim, num_heads, dropout, bias, batch_first=True, device=device, dtype=dtype
        )

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None
    ) -> Tensor:
        """Attend from query to key and value; to the query itself where there is only one input.

        Args:
            query: Shape (batch, length, embed_dim).
            key: Shape (batch, other length, embed_dim).
            value: Shape of the key.
        """
        key = query if key is None else key
        value = query if value is None else value
        mask = None
        if self.causal:  # made from the query, so that tracing keeps its length open
            shape = (query.size(1), key.size(1))
            mask = query.new_ones(shape, dtype=torch.bool).triu(1)
        attended: Tensor = self.attention(query, key, value, need_weights=False, attn_mask=mask)[0]
        return attended


@final
class MeanAttention(nn.Module):
    """Attention that looks at all allowed positions alike, of (batch, length, features) tensors.

    Args:
        embed_dim: Features of value and output.
        bias: Whether the projections have biases.
        causal: Whether a position looks at those up to its own place only.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        bias: bool,
        causal: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.value = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.out = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(self, value: Tensor, query: Tensor | None = None) -> Tensor:
        """Return the projected mean of the projected values, for each position of the query.

        Args:
            value: Shape (batch, length, embed_dim).
            query: Shape (batch, other length, any); only its length counts. The value if None.
        """
        num_places = (value if query is None else query).size(1)
        values = self.value(value)
        if not self.causal:
            mean: Tensor = self.out(values.mean(1, keepdim=True))
            return mean.repeat(1, num_places, 1)
        seen = value.new_ones((num_places, value.size(1))).tril()
        mixed: Tensor = self.out((seen / seen.sum(-1, keepdim=True)) @ values)
        return mixed
