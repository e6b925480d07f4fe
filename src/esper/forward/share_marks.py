"""What each share of seeds that run as one is to its guard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from esper.forward.finiteness import share_mark

if TYPE_CHECKING:
    from collections.abc import Sequence

_SMALL: Final = 2.0**-60
"""So small that the sum of any number of finite numbers times it is finite."""

_MULTIPLIED: Final = (torch.float32, torch.float64)


def check_like(shape: Sequence[int], dtype: torch.dtype, h: Tensor) -> None:
    """Check that kernels give what can be added to their host's output.

    Raises:
        ValueError: They do not.
    """
    if tuple(shape) != tuple(h.shape) or dtype != h.dtype:
        msg = f"kernel output: expected {tuple(h.shape)}, {h.dtype}; found {tuple(shape)}, {dtype}"
        raise ValueError(msg)


def share_marks(h: Tensor, shares: Tensor) -> Sequence[Tensor]:
    """Return for each share what ``share_mark`` says of ``h`` and it, in four calls for them all.

    Where the host is infinite it says of the share whether that is finite: one that is infinite
    too, in the same direction, is excused by ``share_mark`` and not here.

    Args:
        h: The host's output, detached.
        shares: ``[seeds, *h]``, which are overwritten: nothing may have kept them.
    """
    if h.dtype not in _MULTIPLIED:
        return [share_mark(h + share, h) for share in shares]
    grafted = shares.add_(h.nan_to_num(torch.nan, 0.0, 0.0)).reshape(len(shares), -1)
    small = torch.full(grafted.shape[1:], _SMALL, dtype=h.dtype, device=h.device)
    sums = torch.mv(grafted, small)
    return (sums - sums).unbind(0)  # of an infinity NaN
