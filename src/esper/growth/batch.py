"""A batch of the owner's, of which Esper knows no more than how many samples it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from esper.continuity.ensemble import AnyOptimizer

Batch = Any
"""Whatever the owner's loader yields and the owner's ``compute_loss`` takes."""

KEPT_BATCHES: Final = 8
"""Recent batches that are held: a ranking may be asked for, and updates are counted together."""

LossFunction = Callable[[nn.Module, Batch], Tensor]
"""``(model, batch)`` to a loss: a scalar to train on, or one loss per sample to judge by."""

OwnUpdate = Callable[[nn.Module, Any, Batch], None]
"""The owner's own update, ``(model, optimizer, batch)``; a tuple where several train the model."""

TwinUpdate = Callable[[nn.Module, AnyOptimizer, list[Batch], Any], None]
"""One update of a twin, ``(model, optimizer, batches, step)``: the batches of one live update, and
how the live run made it (``growth.live_step.LiveStep``)."""

TwinBuilder = Callable[[nn.Module, dict[int, object]], nn.Module]
"""``(live model, memo)`` to a model like it; the memo learns whose copy each parameter is."""


def num_samples(batch: Batch) -> int:
    """Return the number of samples in a batch: the first axis of its first tensor, else 1."""
    first = _first_tensor(batch)
    return int(first.shape[0]) if first is not None and first.ndim else 1


def num_elements(batch: Batch) -> int:
    """Return the number of elements of a batch's first tensor, else 1: what its cost grows with."""
    first = _first_tensor(batch)
    return 1 if first is None else first.numel()


def num_samples_in(batches: list[Batch]) -> int:
    """Return the number of samples in several batches together."""
    return sum(num_samples(batch) for batch in batches)


def _first_tensor(batch: Batch) -> Tensor | None:
    """Return what stands first in a batch where that is, or holds, a tensor."""
    if isinstance(batch, torch.Tensor):
        return batch
    if not isinstance(batch, (tuple, list)):  # first: to ask for a Mapping takes longer
        batch = batch.values() if isinstance(batch, Mapping) else ()
    for item in batch:
        if isinstance(item, torch.Tensor):
            return item
        if isinstance(item, (tuple, list, Mapping)):
            return _first_tensor(item)
    return None
