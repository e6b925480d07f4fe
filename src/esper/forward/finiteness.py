"""Whether numbers are finite, asked without a transfer, and where that cannot be asked at all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_finite(total: Tensor) -> Tensor:
    """Return a bool tensor: where a sum is finite. Two small operations, no transfer."""
    return total.sub(total).logical_not()


def in_transform() -> bool:
    """Return whether ``torch.func`` or forward-mode differentiation transforms the code that runs.

    Their tensors must not be kept, and refuse to become numbers.
    """
    functorch: bool = torch._C._are_functorch_transforms_active()  # noqa: SLF001 - there is no public one
    return functorch or forward_ad._current_level >= 0  # noqa: SLF001 - neither is there here


def summed(values: Tensor) -> Tensor:
    """Return the sum, accumulated in float32 or wider."""
    if values.dtype in (torch.float32, torch.float64):
        return values.sum()
    return values.sum(dtype=torch.float32)
