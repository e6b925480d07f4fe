"""Hooks of an optimizer's steps, put on and taken off only where torch does not iterate over them.

A hook that takes itself off, or puts another on, changes the dictionary that ``step`` goes through:
every hook behind it would raise in the owner's training loop.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(slots=True, kw_only=True)
class _Handles:
    """Our hooks of one optimizer, as far as they are on."""

    before: RemovableHandle | None = None
    after: RemovableHandle | None = None


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
        self._after = after
        self._handles: weakref.WeakKeyDictionary[Optimizer, _Handles] = weakref.WeakKeyDictionary()
        self._called_behind: Optimizer | None = None
        for member in members_of(optimizer):
            handles = self._handles[member] = _Handles()
            if before is not None:
                handles.before = member.register_step_pre_hook(before)
            if after is not None:
                handles.after = member.register_step_post_hook(self._call_after)

    def close(self) -> None:
        """Call nothing any more; where a step is under way, the hooks go with the next one."""
        self._after = None
        for member, handles in list(self._handles.items()):
            if not _is_stepping(member) or self._ends_step_of(member):
                _remove(handles.before, handles.after)
                del self._handles[member]
            elif handles.before is not None:  # in its place: what is gone through stays as long
                member._optimizer_step_pre_hooks[handles.before.id] = self._go_before  # noqa: SLF001 - torch has no door for it
            elif self._called_behind is member:
                handles.before = member.register_step_pre_hook(self._go_before)

    def _ends_step_of(self, member: Optimizer) -> bool:
        """Say whether ours is the hook that runs, and the last: nobody iterates behind it."""
        after, all_after = self._handles[member].after, member._optimizer_step_post_hooks  # noqa: SLF001 - to see who is last
        return (
            self._called_behind is member
            and after is not None
            and next(reversed(all_after), None) == after.id
        )

    def _go_before(self, optimizer: Optimizer, *_: object) -> None:
        """Take off hooks that were closed in a step: those behind it, and, if it can, this one."""
        handles = self._handles.get(optimizer)
        if handles is None or self._after is not None:
            return
        _remove(handles.after)
        last = next(reversed(optimizer._optimizer_step_pre_hooks), None)  # noqa: SLF001 - as above
        if handles.before is not None and handles.before.id == last:
            _remove(handles.before)
            del self._handles[optimizer]

    def _call_after(self, optimizer: Optimizer, *given: object) -> None:
        if self._after is None:
            return
        self._called_behind = optimizer
        try:
            self._after(optimizer, *given)
        finally:
            self._called_behind = None


def is_update(optimizer: Optimizer) -> bool:
    """Say, behind a step, whether it was an update: a parameter had a gradient, none overflowed."""
    overflow = getattr(optimizer, "found_inf", None)  # GradScaler's, for fused optimizers
    if overflow is not None and bool(overflow):
        return False
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:  # as a rule the first one's
                return True
    return False


def _remove(*handles: RemovableHandle | None) -> None:
    for handle in handles:
        if handle is not None:
            handle.remove()


def _is_stepping(optimizer: Optimizer) -> bool:
    """Return whether a step of the optimizer is under way on this thread."""
    return any(
        frame.f_code.co_filename == _STEP_FILE and frame.f_locals.get("self") is optimizer
        for frame in frames()
    )
