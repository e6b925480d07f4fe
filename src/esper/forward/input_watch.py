"""Hosts that write to their input: kernels read it as it was given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.forward.finiteness import in_transform

if TYPE_CHECKING:
    from esper.state.layer_call import LayerCall


class InputWatch:
    """Counters of writes to the tensors of a call, from before a host runs.

    Args:
        call: What the host is given; no inference tensors, which count no writes.
    """

    def __init__(self, call: LayerCall) -> None:
        self._tensors = call.tensors()
        self._versions = self._counters()

    @property
    def has_changed(self) -> bool:
        """Whether one of the tensors was written to since."""
        return self._counters() != self._versions

    def changed(self) -> list[Tensor]:
        """Return those that were written to since."""
        pairs = zip(self._tensors, self._versions, self._counters(), strict=True)
        return [tensor for tensor, before, after in pairs if before != after]

    def _counters(self) -> list[int]:
        return [t._version for t in self._tensors]  # noqa: SLF001 - torch's counter


def watched(call: LayerCall, *, is_known: bool) -> tuple[InputWatch | None, LayerCall]:
    """Return a watch over a call, and what kernels read of it: copies of its tensors.

    Args:
        call: What the host is given.
        is_known: Whether it is known that the host writes to it; there is no watch then, nor where
            one can see nothing.
    """
    read = call.with_tensors(torch.clone)
    if is_known or torch.compiler.is_compiling() or in_transform():
        return None, read
    if any(t.is_inference() for t in call.tensors()):
        return None, read
    return InputWatch(call), read
