"""The specification's name for the retries by error class, and health."""

from __future__ import annotations

from esper.fetching.error_recovery import ErrorRecoveryManager, ErrorType
from esper.resilience.health_monitor import HealthMonitor

__all__ = ["ErrorRecoveryManager", "ErrorType", "HealthMonitor"]
