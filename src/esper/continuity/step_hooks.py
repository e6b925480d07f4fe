"""Hooks of an optimizer's steps, put on and taken off only where torch does not iterate over them.

A hook that takes itself off, or puts another on, changes the dictionary that ``step`` goes through:
every hook behind it would raise in the owner's training loop.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from esper.continuity.ensemble import members_of
from esper.contracts.call_stack import frames

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from esper.continuity.ensemble import AnyOptimizer

StepHook = Callable[..., Any]
"""``(optimizer, args, kwargs)`` of a step, to what torch's own hooks return."""

_STEP_FILE = Optimizer.profile_hook_step.__code__.co_filename


class StepHooks:
    """A hook before and one behind every step, from now until :meth:`close`.

    Args:
        optimizer: What trains the model.
        before: Called before each step with the optimizer that makes it; None: nothing is.
        after: Called behind each step with the optimizer that made it; None: nothing is.
    """

    def __init__(
        self,
        optimizer: AnyOptimizer,
        *,
        before: StepHook | None = None,
        after: StepHook | None = None,
    ) -> None:
        self._before, self._after = before, after
        self._handles: weakref.WeakKeyDictionary[Optimizer, list[RemovableHandle]]
        self._handles = weakref.WeakKeyDictionary()
        for member in members_of(optimizer):
            handles = self._handles[member] = []
            if before is not None:
                handles.append(member.register_step_pre_hook(self._call_before))
            if after is not None:
                handles.append(member.register_step_post_hook(self._call_after))

    def close(self) -> None:
        """Call nothing any more; the hooks go, or stay idle where a step is under way."""
        self._before = self._after = None
        for member, handles in list(self._handles.items()):
            if not _is_stepping(member):
                for handle in handles:
                    handle.remove()
                del self._handles[member]

    def _call_before(self, optimizer: Optimizer, *given: object) -> Any:
        return None if self._before is None else self._before(optimizer, *given)

    def _call_after(self, optimizer: Optimizer, *given: object) -> None:
        if self._after is not None:
            self._after(optimizer, *given)


def _is_stepping(optimizer: Optimizer) -> bool:
    """Return whether a step of the optimizer is under way on this thread."""
    return any(
        frame.f_code.co_filename == _STEP_FILE and frame.f_locals.get("self") is optimizer
        for frame in frames()
    )
