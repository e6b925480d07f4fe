"""From ``package.module:job`` to the job that it names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from esper.contracts.errors import GrowthError

if TYPE_CHECKING:
    from types import ModuleType

    from esper.growth.job import GrowthJob


def load_job(target: str) -> GrowthJob:
    """Import the module that ``target`` names, call its function and return the job.

    Args:
        target: ``"package.module:function"``; the function takes no arguments.

    Raises:
        GrowthError: The target is malformed, names nothing that can be called, or the function
            refuses or returns something other than a ``GrowthJob``.
    """
    module_name, _, name = target.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        msg = (
            f"a target is package.module:function, got {target!r}; for a function `job` in "
            "train.py it is train:job"
        )
        raise GrowthError(msg)
    function = _attribute(_module(module_name), name)
    if not callable(function):
        msg = (
            f"{target} is expected to be a function that returns a GrowthJob; found "
            f"{type(function).__name__}, which cannot be called"
        )
        raise GrowthError(msg)
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
