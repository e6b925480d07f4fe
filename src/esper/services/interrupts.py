"""Ctrl-C: the first one stops a run, and none of the later ones loses what it has trained."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType


class Interrupts:
    """While it is entered, only the first SIGINT raises ``KeyboardInterrupt``; the rest wait.

    The handler itself lets no second one through, so that there is no moment in between at which
    an impatient reader could lose a model that is about to be written. It does nothing outside of
    the main thread, or where the process has a handler of its own.

    Args:
        on_held: Called for each SIGINT that is held back.

    Attributes:
        num_held: SIGINTs that were held back so far.
    """

    def __init__(self, on_held: Callable[[], None] | None = None) -> None:
        self._on_held = on_held
        self._holds = False
        self._is_ours = False
        self.num_held = 0

    def hold(self) -> None:
        """Let not even the first one through from now on."""
        self._holds = True

    def __enter__(self) -> Self:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._take)
            self._is_ours = True
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._is_ours = False

    def _take(self, _signal: int, _frame: FrameType | None) -> None:
        if not self._holds:
            self._holds = True
            raise KeyboardInterrupt
        self.num_held += 1
        if self._on_held is not None:
            self._on_held()
