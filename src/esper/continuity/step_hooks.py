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
_IS_MADE = "out"
"""What torch calls the result of a step: from then on it goes through the hooks behind it."""


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
        for member in members_of(optimizer):
            handles = self._handles[member] = _Handles()
            if before is not None:
                handles.before = member.register_step_pre_hook(before)
            if after is not None:
                handles.after = member.register_step_post_hook(after)

    def close(self) -> None:
        """Call nothing any more.

        Where a step is under way, the hooks go with the next one, but for one before it that others
        follow: in its place stands one that does nothing.
        """
        for member, handles in list(self._handles.items()):
            step = _step_under_way(member)
            if step is None or _IS_MADE not in step or self._ends(step, handles, member):
                _remove(handles.after)  # nobody goes through those behind a step
                handles.after = None
            if step is None or _IS_MADE in step:
                _remove(handles.before)
                handles.before = None
            if handles.before is not None:  # in its place: what is gone through stays as long
                member._optimizer_step_pre_hooks[handles.before.id] = self._go_before  # noqa: SLF001 - torch has no door for it
            elif handles.after is not None:
                member._optimizer_step_post_hooks[handles.after.id] = _do_nothing  # noqa: SLF001 - as above
                handles.before = member.register_step_pre_hook(self._go_before)
            else:
                del self._handles[member]

    def _ends(self, step: dict[str, Any], handles: _Handles, member: Optimizer) -> bool:
        """Say whether ours is the hook that runs, and the last: nobody asks for one behind it."""
        last = next(reversed(member._optimizer_step_post_hooks), None)  # noqa: SLF001 - as below
        is_last = handles.after is not None and handles.after.id == last
        return is_last and step.get("post_hook") == self._after

    def _go_before(self, optimizer: Optimizer, *_: object) -> None:
        """Take off hooks that were closed in a step: those behind it, and, if it can, this one."""
        handles = self._handles.get(optimizer)
        if handles is None or handles.before is None:
            return
        _remove(handles.after)
        last = next(reversed(optimizer._optimizer_step_pre_hooks), None)  # noqa: SLF001 - as above
        if handles.before.id == last:
            _remove(handles.before)
            del self._handles[optimizer]


def is_update(optimizer: Optimizer) -> bool:
    """Say, behind a step, whether it was an update: a parameter had a gradient, none overflowed."""
    overflow = optimizer.__dict__.get("found_inf")  # GradScaler's, for fused optimizers
    if overflow is not None and bool(overflow):
        return False
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:  # as a rule the first one's
                return True
    return False


def _remove(handle: RemovableHandle | None) -> None:
    if handle is not None:
        handle.remove()


def _do_nothing(*_: object) -> None:
    """Stand where a hook was, until it can go."""


def _step_under_way(optimizer: Optimizer) -> dict[str, Any] | None:
    """Return the names of torch in a step of the optimizer on this thread; None outside of one."""
    for frame in frames():
        if frame.f_code.co_filename == _STEP_FILE and frame.f_locals.get("self") is optimizer:
            return frame.f_locals
    return None
