"""The terminal that the commands print to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH: Final = 140
"""Columns of a table where there is no terminal to ask."""


def console(*, stderr: bool = False) -> Console:
    """Return a console that prints names as they are, wide where there is no terminal."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, highlight=False)
    if not made.is_terminal:
        made.width = PIPE_WIDTH
    return made
