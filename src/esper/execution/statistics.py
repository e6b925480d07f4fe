"""A layer's statistics, in the specification's shape."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from esper.contracts.lifecycle import SeedLifecycleState
from esper.fetching.error_recovery import ErrorRecoveryManager
from esper.fetching.kernel_cache import KernelCache
from esper.resilience.health_monitor import HealthMonitor
from esper.running.kernel_executor import shared_executor
from esper.running.module_cache import size_bytes
from esper.state.layer_record import record_of
from esper.state.observation import OBSERVED_CALLS

if TYPE_CHECKING:
    from torch import nn

    from esper.state.layer_record import LayerRecord


def layer_statistics(layer: nn.Module) -> dict[str, Any]:
    """Return what a layer has counted.

    ``performance`` has the specification's keys. ``execution`` and ``cache`` are of the kernels in
    this layer's seeds: calls are counted where telemetry is on, and now and then one is timed on
    its thread; the latest 128 times are kept for each seed. ``mean_us`` and ``p95_us`` are over
    those, ``last_us`` is the last of them all, and ``latency_us`` has the last of each seed.
    Compiled calls are never timed; those of a guarded kernel are counted by its graph.
    ``compilation`` is of the process's executor, since layers compile nothing. What was not
    observed is None, or a count of 0; ``not_counted`` names the calls that no count can know of. A
    fault that a guard stops is counted in compiled calls too.

    Args:
        layer: A wrapped layer whose counters have been read (``maintain``).
    """
    record = record_of(layer)
    states = record.layout.lifecycle_states.tolist()
    calls = record.forward_count
    cache = record.shared.find(KernelCache)
    recovery = record.shared.find(ErrorRecoveryManager)
    health = record.own.find(HealthMonitor)
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
            "skipped_count": record.num_skipped,
            "not_counted": _not_counted(record),
        },
        "seed_stats": {
            **{f"{state.name.lower()}_seeds": states.count(state) for state in SeedLifecycleState},
            "waiting": sorted(record.waiting),
            "refused": dict(record.refusals),
            "average_health": _average_health(layer),
        },
        "cache_stats": {} if cache is None else cache.get_stats(),
        "recovery_stats": {} if recovery is None else recovery.get_stats(),
        "health": {} if health is None else health.get_stats(),
        "performance": _performance(record),
    }


def _not_counted(record: LayerRecord) -> list[str]:
    """Return which calls the counts leave out: a counter in a graph would make torch recompile.

    What a guard remembers of its calls is a tensor of the graph, which tells how many there were.
    """
    always = [
        "calls inside torch.compile that run no kernel with a guard",
        f"calls inside torch.compile beyond the latest {OBSERVED_CALLS} before a reading",
    ]
    return always if record.telemetry_enabled else [*always, "calls while telemetry is off"]


def _performance(record: LayerRecord) -> dict[str, Any]:
    latency_us = {i: int(record.layout.exec_latency_us[i]) for i in record.seeds}
    timed_us = sorted(us for seed in record.seeds.values() for us in seed.timed_us)
    sizes_bytes = [size_bytes(seed.slot.kernel) for seed in record.seeds.values()]
    return {
        "compilation": shared_executor().get_performance_stats()["compilation"],
        "execution": {
            "count": record.kernel_execution_count,
            "mean_us": sum(timed_us) / len(timed_us) if timed_us else None,
            "p95_us": timed_us[math.ceil(0.95 * len(timed_us)) - 1] if timed_us else None,
            "last_us": record.last_timed_us if timed_us else None,
        },
        "cache": {"modules_cached": len(sizes_bytes), "memory_mb": sum(sizes_bytes) / 2**20},
        "device": str(record.layout.device),
        "latency_us": latency_us,
    }


def _average_health(layer: nn.Module) -> float | None:
    """Return the mean health of the seeds that have a sample, or None where none has."""
    layout = record_of(layer).layout
    samples = [h for i in range(layout.num_seeds) if (h := layout.health(i)) is not None]
    return sum(samples) / len(samples) if samples else None
