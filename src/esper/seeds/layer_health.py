"""What the calls of a layer's kernels say about its health, and about the kernels themselves."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from esper.contracts.events import HealthChanged
from esper.fetching.enhanced_kernel_cache import EnhancedKernelCache
from esper.fetching.kernel_cache import KernelCache
from esper.resilience.health_monitor import HealthMonitor
from esper.state.device_memory import device_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.state.layer_record import LayerRecord
    from esper.state.seed_slot import Seed

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnhealthyLayer:
    """A layer whose monitor says that somebody has to step in.

    Attributes:
        layer: Name of the layer.
        health_score: In [0, 1].
        reason: Which limit was passed, with both numbers.
    """

    layer: str
    health_score: float
    reason: str


def monitor_of(record: LayerRecord) -> HealthMonitor:
    """Return a layer's monitor, made when first asked for."""
    monitor = record.own.find(HealthMonitor)
    return record.own.keep(HealthMonitor, HealthMonitor()) if monitor is None else monitor


def update_health(
    record: LayerRecord, outcomes: Sequence[bool]
) -> tuple[UnhealthyLayer | None, HealthChanged | None]:
    """Take the outcomes of a layer's kernel calls, True at fault.

    Latency is that of the slowest seed that was timed, memory that of the layer's device where it
    can be told; what was not measured is left out.

    Returns:
        The layer if it is unhealthy, and whether that is news.
    """
    if not outcomes:
        return None, None
    monitor = monitor_of(record)
    was_unhealthy, _ = monitor.should_intervene()
    monitor.update_metrics(
        sum(outcomes), len(outcomes), _latency_ms(record), _memory_percent(record.layout.device)
    )
    is_unhealthy, reason = monitor.should_intervene()
    if is_unhealthy and not was_unhealthy:
        _logger.warning("layer %r: %s", record.name, reason)
    score = monitor.compute_health_score()
    news = None
    if is_unhealthy != was_unhealthy:
        news = HealthChanged(
            update=0,
            time_s=0.0,
            site=record.name,
            healthy=not is_unhealthy,
            score=score,
            reason=reason if is_unhealthy else "it is within its limits again",
        )
    if not is_unhealthy:
        return None, news
    return UnhealthyLayer(layer=record.name, health_score=score, reason=reason), news


def illness_of(record: LayerRecord) -> str | None:
    """Say why nothing is to grow at a layer that holds kernels; None where it is healthy."""
    monitor = record.own.find(HealthMonitor)
    if monitor is None or not record.seeds:
        return None
    is_unhealthy, reason = monitor.should_intervene()
    return reason if is_unhealthy else None


def report_success(record: LayerRecord, seed: Seed) -> None:
    """Tell the layer's cache that a kernel that came through it does its work."""
    artifact_id, cache = seed.kernel.artifact_id, record.shared.find(KernelCache)
    if artifact_id is not None and isinstance(cache, EnhancedKernelCache):
        cache.record_success(artifact_id)


def report_failure(record: LayerRecord, seed: Seed) -> None:
    """Tell the layer's cache that a kernel that came through it had to be isolated."""
    artifact_id, cache = seed.kernel.artifact_id, record.shared.find(KernelCache)
    if artifact_id is not None and isinstance(cache, EnhancedKernelCache):
        cache.record_failure(artifact_id, f"at layer {record.name!r}: {seed.last_error}")


def _latency_ms(record: LayerRecord) -> float | None:
    timed_us = [us for i in record.seeds if (us := int(record.layout.exec_latency_us[i]))]
    return max(timed_us) / 1e3 if timed_us else None


def _memory_percent(device: torch.device) -> float | None:
    found = device_memory(device)
    return None if found is None else 100.0 * (1.0 - found[0] / found[1])
