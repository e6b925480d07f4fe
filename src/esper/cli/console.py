"""The terminal that the commands print to."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final

import typer

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH: Final = 140
"""Columns of a table where there is no terminal to ask."""

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal obeys, but for the ends of lines and tabs."""


def printable(text: str) -> str:
    """Return a text that others may have written as one that no terminal obeys."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def console(*, stderr: bool = False) -> Console:
    """Return a console that prints names as they are, wide where there is no terminal."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, highlight=False)
    if not made.is_terminal:
        made.width = PIPE_WIDTH
    return made


def print_json(document: object) -> None:
    """Print a document as one line of JSON."""
    typer.echo(json.dumps(document))


def print_json_or(document: object, text: str, *, as_json: bool) -> None:
    """Print a document as one line of JSON, or the text for people, if there is any."""
    if as_json:
        print_json(document)
    elif text:
        typer.echo(text)
