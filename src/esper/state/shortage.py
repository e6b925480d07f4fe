"""What a lack of memory looks like, and whether it is to be raised where a fence would take it."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_WORDS: Final = ("out of memory", "can't allocate memory")
"""What allocators without a class of error of their own say; the second is the CPU's."""

_is_told: ContextVar[bool] = ContextVar("shortages_told", default=False)


def is_shortage(error: BaseException) -> bool:
    """Say whether an error means that a device, or the process, had too little memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


@contextmanager
def shortages_told() -> Iterator[None]:
    """Let a lack of memory in a kernel reach the caller, who can do with less at a time.

    Elsewhere the fence takes it as a fault of the kernel, and the call goes on without.
    """
    token = _is_told.set(True)
    try:
        yield
    finally:
        _is_told.reset(token)


def are_shortages_told() -> bool:
    """Return whether a lack of memory is to reach the caller here."""
    return _is_told.get()
