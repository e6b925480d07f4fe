"""What is of one process begins anew in a forked one, where other threads are not."""

from __future__ import annotations

import abc
import os
import weakref
from typing import Final


class Forked(abc.ABC):
    """Begins anew in a forked process, where a lock may be held by a thread that is not there.

    Whoever derives from it sets up there what ``_begin`` needs, and then calls ``__init__``.
    """

    def __init__(self) -> None:
        self._begin()
        _FORKED.add(self)

    @abc.abstractmethod
    def _begin(self) -> None:
        """Set up what is of one process: locks, threads, and counts of what it was handed."""


_FORKED: Final[weakref.WeakSet[Forked]] = weakref.WeakSet()


def _begin_in_child() -> None:
    for each in _FORKED:
        each._begin()  # noqa: SLF001 - its own module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_in_child)
