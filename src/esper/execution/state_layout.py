"""The specification's name for the state of the seeds of a layer."""

from __future__ import annotations

from esper.contracts.lifecycle import SeedLifecycleState
from esper.state.state_layout import KasminaStateLayout

__all__ = ["KasminaStateLayout", "SeedLifecycleState"]
