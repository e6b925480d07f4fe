"""The specification's name for the side streams, by seed."""

from __future__ import annotations

from esper.streams.stream_manager import StreamManager

__all__ = ["StreamManager"]
