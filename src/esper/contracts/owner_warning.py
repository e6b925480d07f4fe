"""Warnings that point at the owner's line, and not at the line of Esper that gave them."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Final

_PACKAGE: Final = f"{Path(__file__).parent.parent}{os.sep}"


def warn_owner(text: str) -> None:
    """Warn the owner of a run, with the file and line of the owner's own call.

    Args:
        text: What is wrong, and the cure.
    """
    level, frame = 1, sys._getframe(0)  # noqa: SLF001 - what warnings itself counts with
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)
