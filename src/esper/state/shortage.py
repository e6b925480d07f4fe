"""What a lack of memory looks like, and whether it is to be raised where a fence would take it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

import torch

_WORDS: Final = (
    "out of memory",
    "can't allocate memory",
    "STATUS_ALLOC_FAILED",
    "bad_alloc",
)
"""What allocators without a class of error of their own say.

The second is what the CPU's says, the third cuBLAS and cuDNN, the last C++ itself.
"""

_is_told: ContextVar[bool] = ContextVar("shortages_told", default=False)


def is_shortage(error: BaseException) -> bool:
    """Say whether an error means that a device, or the process, had too little memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


class ShortagesTold:
    """Let a lack of memory in a kernel reach the caller, who can do with less at a time.

    Elsewhere the fence takes it as a fault of the kernel, and the call goes on without.
    """

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = _is_told.set(True)

    def __exit__(self, *_: object) -> None:
        _is_told.reset(self._token)


def are_shortages_told() -> bool:
    """Return whether a lack of memory is to reach the caller here."""
    return _is_told.get()
