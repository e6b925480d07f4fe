"""From ``package.module:job`` to the job that it names."""

from __future__ import annotations

import importlib
from pathlib import PurePath
from typing import TYPE_CHECKING, Final

from esper.contracts.errors import GrowthError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from esper.growth.job import GrowthJob


_WRITTEN: Final = "a target is package.module:function"


def find_function(target: str) -> Callable[[], object]:
    """Import the module that ``target`` names and return its function.

    Raises:
        GrowthError: The target is malformed, or names nothing that can be called.
    """
    module_name, _, name = target.partition(":")
    if _is_file(module_name):
        msg = f"{_WRITTEN}, got the file of one: {target!r}; write {_of_file(module_name, name)}"
        raise GrowthError(msg)
    if not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        example = f"{module_name}:job" if module_name.isidentifier() and not name else "train:job"
        msg = f"{_WRITTEN}, got {target!r}; for a function `job` in {_file_of(example)} it is "
        raise GrowthError(msg + example)
    function = _attribute(_module(module_name), name)
    if not callable(function):
        msg = (
            f"{target} is expected to be a function that returns a GrowthJob; found "
            f"{type(function).__name__}, which cannot be called"
        )
        raise GrowthError(msg)
    return function


def make_job(target: str, function: Callable[[], object]) -> GrowthJob:
    """Call a function and return the job that it makes.

    Args:
        target: What the function is called in messages.
        function: As :func:`find_function` returned it.

    Raises:
        GrowthError: It refuses, or returns something other than a ``GrowthJob``.
    """
    from esper.growth.job import GrowthJob

    try:
        job = function()
    except (TypeError, ValueError) as error:
        msg = f"{target}() could not make a job: {type(error).__name__}: {error}"
        raise GrowthError(msg) from error
    if not isinstance(job, GrowthJob):
        msg = (
            f"{target}() is expected to return an esper.GrowthJob; it returned {type(job).__name__}"
        )
        raise GrowthError(msg)
    return job


def _is_file(module_name: str) -> bool:
    return module_name.endswith(".py") or "/" in module_name or "\\" in module_name


def _of_file(path: str, name: str) -> str:
    """Return the target that a path and a function stand for."""
    parts = PurePath(path.replace("\\", "/")).with_suffix("").parts
    module = ".".join(part for part in parts if part not in (".", "/"))
    function = name if name.isidentifier() else "job"
    if PurePath(path).is_absolute() or ".." in parts:
        return f"{parts[-1]}:{function} in the folder of the file"
    return f"{module}:{function}"


def _file_of(target: str) -> str:
    return f"{target.partition(':')[0]}.py"


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            msg = (
                f"there is no module named {missing!r}; run the command in the folder that holds "
                "it, or install its package"
            )
        else:
            msg = f"module {name!r} needs {missing!r}, which is not installed"
        raise GrowthError(msg) from error
    except (ImportError, SyntaxError) as error:
        msg = f"module {name!r} could not be imported: {type(error).__name__}: {error}"
        raise GrowthError(msg) from error


def _attribute(module: ModuleType, name: str) -> object:
    try:
        return getattr(module, name)
    except AttributeError as error:
        own = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        msg = (
            f"module {module.__name__!r} has no {name!r}; its functions are: "
            f"{', '.join(sorted(own)) or 'none'}"
        )
        raise GrowthError(msg) from error
