"""How a command ends: its exit status, and one line where it is an error."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import typer

from esper.cli.console import printable
from esper.contracts.errors import (
    BlueprintError,
    EsperError,
    KernelCorruptError,
    KernelNotFoundError,
    KernelRefusedError,
    KernelSourceRefused,
    TagMovedError,
)
from esper.services.settings import Environment, read_environment

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_PROBLEM: Final = 1
EXIT_ERROR: Final = 2
EXIT_STOPPED: Final = 130

_ANSWERS: Final = (
    BlueprintError,
    FileNotFoundError,
    KernelCorruptError,
    KernelNotFoundError,
    KernelRefusedError,
    KernelSourceRefused,
    TagMovedError,
)
"""Errors by which a command says no: it was understood, and another try changes nothing."""


@contextmanager
def one_line_errors() -> Iterator[Environment]:
    """Yield the environment; turn errors that a user can mend into one line and an exit status.

    Warnings to the user become one line each, and end nothing.
    """
    from esper.cli.errors import error_text, one_line_warnings

    environment = Environment()
    try:
        environment = read_environment()
        with one_line_warnings():
            yield environment
    except (EsperError, ValueError, OSError) as error:
        if environment.traceback:
            raise
        typer.echo(error_text(error), err=True)
        raise typer.Exit(EXIT_ERROR) from error
    except KeyboardInterrupt as error:
        typer.echo("esper: stopped", err=True)
        raise typer.Exit(EXIT_STOPPED) from error


@contextmanager
def answers() -> Iterator[Environment]:
    """Yield the environment; what is refused or not found is one line and the status of a problem.

    Other errors are those of :func:`one_line_errors`.
    """
    with one_line_errors() as environment:
        try:
            yield environment
        except _ANSWERS as error:
            typer.echo(f"esper: {printable(str(error))}", err=True)
            raise typer.Exit(EXIT_PROBLEM) from error
