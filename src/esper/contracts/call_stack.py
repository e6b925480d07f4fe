"""Who is calling: the frames of this thread, for what nobody hands over."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


def frames() -> Iterator[FrameType]:
    """Yield the frames of this thread, that of the caller first and then outwards."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - inspect.stack reads source files
    while frame is not None:
        yield frame
        frame = frame.f_back
