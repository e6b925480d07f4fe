"""Taking a faulty kernel out of its layer until a probe has passed."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from torch import nn

from esper.contracts.lifecycle import SeedLifecycleState
from esper.seeds.layer_health import (
    report_failure,
)
from esper.seeds.slots import withdraw
from esper.state.layer_record import record_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from esper.state.layer_record import LayerRecord
    from esper.state.seed_slot import Seed

_logger = logging.getLogger(__name__)


FIRST_RETRY_READINGS: Final = 10
"""An isolated seed is probed after so many readings; each further time after twice as many."""


_S: Final = SeedLifecycleState


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedFault:
    """Faults of one seed since the last reading.

    Attributes:
        layer: Name of the layer.
        seed_idx: Index of the seed.
        faults: How many calls were faulty.
        state: Where the seed is now.
        reason: What the last fault was.
    """

    layer: str
    seed_idx: int
    faults: int
    state: SeedLifecycleState
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedCalls:
    """Calls of a layer that went on without a kernel, which was not at fault.

    Attributes:
        layer: Name of the layer.
        seed_idx: Index of the seed.
        calls: How many there were since the last reading.
        reason: Why.
    """

    layer: str
    seed_idx: int
    calls: int
    reason: str


def count_skipped(
    record: LayerRecord, seed: Seed, skipped: Mapping[str, int]
) -> list[SkippedCalls]:
    """Count calls that went on without a kernel; log each reason once for a seed."""
    record.num_skipped += sum(skipped.values())
    found = [
        SkippedCalls(layer=record.name, seed_idx=seed.seed_idx, calls=calls, reason=reason)
        for reason, calls in skipped.items()
    ]
    for each in found:
        if each.reason not in seed.told:
            seed.told |= {each.reason}
            _logger.warning(
                "seed %d of layer %r: %d calls went on without its kernel: %s",
                each.seed_idx,
                each.layer,
                each.calls,
                each.reason,
            )
    return found


def isolate_if_moved(layer: nn.Module, seed_idx: int, seed: Seed, faults: int) -> SeedFault:
    """Take the slot out where the layout has isolated the seed; return the fault."""
    record = record_of(layer)
    record.num_faults += faults
    state = record.layout.state(seed_idx)
    if state == _S.ERROR_RECOVERY:
        seed.readings_to_wait = FIRST_RETRY_READINGS << seed.num_retries
        withdraw(layer, seed_idx, keep_record=True)
        drop_gradients(seed)
        report_failure(record, seed)
    return SeedFault(
        layer=record.name, seed_idx=seed_idx, faults=faults, state=state, reason=seed.last_error
    )


_untold: Final[
    weakref.WeakKeyDictionary[LayerRecord, dict[int, tuple[SeedLifecycleState, SeedFault]]]
] = weakref.WeakKeyDictionary()
"""Faults that the optimizer's step has found since the last reading, and where the seed was."""


def tell_later(record: LayerRecord, before: SeedLifecycleState, fault: SeedFault) -> None:
    """Keep a fault that was found between two readings, with those of the seed before it."""
    untold = _untold.setdefault(record, {})
    first, known = untold.get(fault.seed_idx, (before, None))
    num_faults = fault.faults + (0 if known is None else known.faults)
    untold[fault.seed_idx] = first, replace(fault, faults=num_faults)


def take_untold(record: LayerRecord) -> list[tuple[SeedLifecycleState, SeedFault]]:
    """Return where each seed was and what was kept of it, and forget it."""
    untold = _untold.pop(record, {}) if _untold else {}
    return [untold[seed_idx] for seed_idx in sorted(untold)]


def drop_gradients(seed: Seed) -> None:
    """Let the optimizer pass an isolated kernel by: no ``model.zero_grad()`` reaches it now."""
    for parameter in seed.slot.parameters():
        parameter.grad = None
