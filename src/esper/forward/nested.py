"""Nested tensors: kernels are made for padded ones, and what they give loses the padding again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.forward.blending import blend

if TYPE_CHECKING:
    from esper.forward.blending import RunKernel
    from esper.state.layer_call import LayerCall
    from esper.state.layer_record import LayerRecord


def blend_nested(record: LayerRecord, call: LayerCall, h: Tensor, run: RunKernel) -> Tensor:
    """Blend padded tensors, and return the layout and the rows of ``h``; gradients pass through.

    Args:
        record: As for ``blend``, like ``call`` and ``run``.
        call: What the layer was given.
        h: The host's output, nested.
        run: Runs the kernel of one seed.
    """
    padded = call.with_tensors(lambda t: t.to_padded_tensor(0.0) if t.is_nested else t)
    y = blend(record, padded, h.to_padded_tensor(0.0), run)
    return _ragged(y, h) if h.layout == torch.jagged else _rows(y, h)


def _rows(y: Tensor, h: Tensor) -> Tensor:
    sizes = (tuple(slice(n) for n in part.shape) for part in h.unbind())
    return torch.nested.as_nested_tensor([row[size] for row, size in zip(y, sizes, strict=True)])


def _ragged(y: Tensor, h: Tensor) -> Tensor:
    """Return the rows of ``y`` with the offsets of ``h``, so that the two can be added."""
    offsets: Tensor = h.offsets()  # type: ignore[attr-defined] # of a nested one
    num_steps = len(h.values())
    rows = torch.arange(len(y), device=y.device).repeat_interleave(
        offsets.diff(), output_size=num_steps
    )
    steps = torch.arange(num_steps, device=y.device) - offsets[rows]
    return torch.nested.nested_tensor_from_jagged(y[rows, steps], offsets)
