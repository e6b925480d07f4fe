"""The terminal that the commands print to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import typer

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


def print_json(document: object) -> None:
    """Print a document as one line of JSON."""
    typer.echo(json.dumps(document))


def print_json_or(document: object, text: str, *, as_json: bool) -> None:
    """Print a document as one line of JSON, or the text for people, if there is any."""
    if as_json:
        print_json(document)
    elif text:
        typer.echo(text)
