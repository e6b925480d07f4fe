"""Alphas that others have written to the buffers: averaged models, loads in place, broadcasts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from esper.forward.class_change import choose_forward
from esper.state.layer_record import record_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from esper.state.layer_record import LayerRecord

ALPHA_ROUNDING: Final = 2.0**-23
"""Alphas are float32: 0.6 and 0.4, which sum to 1, are stored as a little more."""

_logger = logging.getLogger(__name__)


def take_written_alphas(layer: nn.Module) -> None:
    """Let a layer's state and plan follow the alphas in its buffers.

    Alphas that no seeds can have are put back to what they were, and that is logged.

    Args:
        layer: A wrapped layer.
    """
    record = record_of(layer)
    layout = record.layout
    read = {i: seed.slot.read_alpha() for i, seed in record.seeds.items()}
    written = {i: alpha for i, alpha in read.items() if alpha != layout.alpha(i)}
    if not written:
        return
    fault = _fault_in(record, read)
    if fault is None:
        for seed_idx, alpha in written.items():
            layout.set_alpha(seed_idx, alpha)
    else:
        for seed_idx in written:
            record.seeds[seed_idx].slot.set_alpha(layout.alpha(seed_idx))
        _logger.warning(
            "layer %r: alphas were written to its buffers that it cannot have, and were put back: "
            "%s; set_alpha(seed_idx, alpha) is the way to set one",
            record.name,
            fault,
        )
    choose_forward(layer)


def _fault_in(record: LayerRecord, alphas: Mapping[int, float]) -> str | None:
    for seed_idx, alpha in alphas.items():
        if not 0.0 <= alpha <= 1.0:
            return f"seed {seed_idx} got {alpha}, expected a number in [0, 1]"
    total = sum(alpha for i, alpha in alphas.items() if record.seeds[i].replaces)
    return f"replacing seeds sum to {total}, at most 1" if total > 1.0 + ALPHA_ROUNDING else None
