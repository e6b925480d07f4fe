"""What a user reads of an error or a warning: one line, and the place in the user's own code."""

from __future__ import annotations

import os
import sysconfig
import traceback
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import typer

import esper
from esper.cli.console import printable
from esper.contracts.errors import EsperError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO

    _ShowWarning = Callable[..., None]

_NOT_A_USERS: Final = (
    str(Path(esper.__file__).parent),
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


def error_text(error: BaseException) -> str:
    """Return an error as lines for the terminal.

    The first has the message. An error that a user's code raised, or that came up while it ran,
    has its class before that and in a second line the innermost file and line of the user's own.
    """
    place = users_place(error)
    if place is None:
        return f"esper: {printable(str(error))}"
    what = error if isinstance(error, EsperError) else f"{type(error).__name__}: {error}"
    cure = "ESPER_TRACEBACK=1 shows the whole traceback"
    return f"esper: {printable(str(what))}\n  at {place}; {cure}"


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print each ``UserWarning`` as one line; none ends a run, though warnings be errors.

    Warnings of other classes are for who writes the code, and are left to Python.
    """
    with warnings.catch_warnings():
        if any(action == "error" for action, *_ in warnings.filters):
            warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _one_line_or(warnings.showwarning)
        yield


def _one_line_or(others: _ShowWarning) -> _ShowWarning:
    """Return what prints a ``UserWarning`` as one line and leaves the rest to ``others``."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, UserWarning):
            with suppress(OSError):  # a reader that has gone away, as for Python's own
                typer.echo(warning_text(str(message), filename, lineno), err=True)
        else:
            others(message, category, filename, lineno, file, line)

    return show


def warning_text(message: str, filename: str, lineno: int) -> str:
    """Return a warning as one line, with its place where that is in a user's own code."""
    text = f"esper: warning: {' '.join(message.split())}"
    return f"{text} (at {_shown(filename)}:{lineno})" if _is_a_users(filename) else text


def users_place(error: BaseException) -> str | None:
    """Return the innermost place in a user's own code that an error went through, or None.

    An error that was raised from another one is asked for the other's place first.
    """
    return next((place for link in _chain(error) if (place := _place(link)) is not None), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error's causes, the first one first, and the error itself."""
    if error.__cause__ is not None:
        yield from _chain(error.__cause__)
    yield error


def _place(error: BaseException) -> str | None:
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{_shown(error.filename)}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_a_users(frame.filename)]
    return f"{_shown(own[-1].filename)}:{own[-1].lineno}, in {own[-1].name}" if own else None


def _is_a_users(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    return not any(Path(filename).is_relative_to(folder) for folder in _NOT_A_USERS)


def _shown(filename: str) -> str:
    """Return a path as a user would type it: relative where it is below the working folder."""
    path = Path(filename)
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else filename
