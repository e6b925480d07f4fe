"""The specification's name for the waiting for gradients behind a backward."""

from __future__ import annotations

from esper.streams.gradient_sync import GradientSynchronizer

__all__ = ["GradientSynchronizer"]
