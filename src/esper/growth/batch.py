"""A batch of the owner's, of which Esper knows no more than how many samples it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.continuity.ensemble import AnyOptimizer

Batch = Any
"""Whatever the owner's loader yields and the owner's ``compute_loss`` takes."""

LossFunction = Callable[[nn.Module, Batch], Tensor]
"""``(model, batch)`` to a loss: a scalar to train on, or one loss per sample to judge by."""

OwnUpdate = Callable[[nn.Module, Any, Batch], None]
"""The owner's own update, ``(model, optimizer, batch)``; a tuple where several train the model."""

TwinUpdate = Callable[[nn.Module, AnyOptimizer, list[Batch], Any], None]
"""One update of a twin, ``(model, optimizer, batches, step)``: the batches of one live update, and
how the live run made it (``growth.twins.LiveStep``)."""


def num_samples(batch: Batch) -> int:
    """Return the number of samples in a batch: the first axis of its first tensor, else 1."""
    if isinstance(batch, torch.Tensor):
        return int(batch.shape[0]) if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, (tuple, list)):
        for item in batch:
            if isinstance(item, (torch.Tensor, Mapping, tuple, list)):
                return num_samples(item)
    return 1


def num_samples_in(batches: list[Batch]) -> int:
    """Return the number of samples in several batches together."""
    return sum(num_samples(batch) for batch in batches)
