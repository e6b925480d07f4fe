"""A device with little memory: passes beside the training lack it above so many samples."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

_memories = ContextVar("memories", default={})  # noqa: B039 - where no pass sets it aside


class Memory:
    """What a device has: above ``most`` samples a forward raises, as an allocator would.

    Args:
        most: Samples that fit; None: any number.

    Attributes:
        sizes: Samples of each forward that fitted.
        num_short: Forwards that did not.
    """

    def __init__(self, most=None):
        self.most = most
        self.sizes = []
        self.num_short = 0
        self._is_live = False
        self.number = len(_memories.get())
        _memories.get()[self.number] = self

    @contextmanager
    def live(self):
        """Let the training itself have what it needs."""
        self._is_live = True
        try:
            yield
        finally:
            self._is_live = False

    def take(self, num):
        if self._is_live:
            return
        if self.most is not None and num > self.most:
            self.num_short += 1
            raise torch.OutOfMemoryError(f"{num} samples do not fit")
        self.sizes.append(num)


class Limited(nn.Module):
    """Hands its input on, if there is memory for it."""

    def __init__(self, memory):
        super().__init__()
        self.number = memory.number  # a copy of the model is on the same device

    def forward(self, x):
        _memories.get()[self.number].take(len(x))
        return x
