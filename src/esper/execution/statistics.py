"""A layer's statistics, in the specification's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper.contracts.lifecycle import SeedLifecycleState
from esper.execution.layer_record import record_of

if TYPE_CHECKING:
    from torch import nn


def layer_statistics(layer: nn.Module) -> dict[str, Any]:
    """Return what a layer has counted.

    Args:
        layer: A wrapped layer whose counters have been read (``maintain``).
    """
    record = record_of(layer)
    states = record.layout.lifecycle_states.tolist()
    calls = record.forward_count
    return {
        "layer_info": {
            "input_size": getattr(layer, "input_size", 0),
            "output_size": getattr(layer, "output_size", 0),
            "num_seeds": record.layout.num_seeds,
        },
        "execution_stats": {
            "forward_count": calls,
            "kernel_execution_count": record.kernel_execution_count,
            "kernel_execution_rate": 1.0 - record.native_count / calls if calls else 0.0,
            "fault_count": record.num_faults,
        },
        "seed_stats": {
            **{f"{state.name.lower()}_seeds": states.count(state) for state in SeedLifecycleState},
            "waiting": sorted(record.waiting),
            "refused": dict(record.refusals),
            "average_health": _average_health(layer),
        },
        "cache_stats": {} if record.cache is None else record.cache.get_stats(),
        "performance": {
            "latency_us": {i: int(record.layout.exec_latency_us[i]) for i in record.seeds},
        },
    }


def _average_health(layer: nn.Module) -> float | None:
    """Return the mean health of the seeds that have a sample, or None where none has."""
    layout = record_of(layer).layout
    samples = [h for i in range(layout.num_seeds) if (h := layout.health(i)) is not None]
    return sum(samples) / len(samples) if samples else None
