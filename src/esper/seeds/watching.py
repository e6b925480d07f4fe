"""Between calls: when a graft that waits for an input of its layer may be probed and made live.

A probe inside somebody's forward would be traced, recomputed, saved or differentiated with it. So
the forward only notes its input (``forward.noting``), and what follows happens where nobody else is
at work: behind the outermost forward, or where the owner calls something between two steps.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from esper.contracts.call_stack import frames
from esper.forward.finiteness import in_transform
from esper.forward.noting import CHECKPOINT_FILE
from esper.forward.recompilation import put_back_compiled, set_aside_compiled
from esper.state.layer_record import record_of
from esper.state.waiting import Note

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    Finish = Callable[[nn.Module], None]

_CALL = nn.Module._call_impl.__code__  # noqa: SLF001 - the frame of a module that is being called


def begin_watch(layer: nn.Module, finish: Finish) -> Note:
    """Let ``finish`` be called behind the next outermost forward in which a layer was called.

    Where a backward will run a part of that forward again, it is called before the one that
    follows the backward. Modules that hold the layer get hooks until then. Of those that were
    compiled in place the compiled forward is set aside: its graph calls no hook.

    Args:
        layer: The layer; its record has the note from now on.
        finish: Called with the layer, when its input is noted and nobody is at work.
    """
    note = Note()
    holders = _holders(layer)
    for module in holders:
        _put_hooks(module, _AroundCall(layer, finish), note)
    note.set_aside += set_aside_compiled(holders)
    return note


def end_watch(note: Note) -> None:
    """Take the hooks away, and let what was compiled in place be so again."""
    for handle in note.handles:
        handle.remove()
    put_back_compiled(note.set_aside)
    note.handles.clear()
    note.set_aside.clear()


def is_between_calls() -> bool:
    """Return whether nothing is traced, transformed or differentiated here now."""
    return not (
        torch.compiler.is_compiling()
        or in_transform()
        or torch._C._current_graph_task_id() != -1  # noqa: SLF001 - a backward is running; no public one
        or _get_current_dispatch_mode() is not None
    )


def _holders(layer: nn.Module) -> list[nn.Module]:
    """Return a layer and every module that it is part of, whoever made it."""
    parents: dict[int, list[nn.Module]] = {}
    for found in gc.get_objects():
        if issubclass(type(found), nn.Module):  # isinstance would ask objects of anybody's
            for child in (found.__dict__.get("_modules") or {}).values():
                parents.setdefault(id(child), []).append(found)
    holders, seen = [layer], {id(layer)}
    for module in holders:  # it grows as parents of parents are found
        for parent in parents.get(id(module), ()):
            if id(parent) not in seen:
                seen.add(id(parent))
                holders.append(parent)
    return holders


def _put_hooks(module: nn.Module, hook: _AroundCall, note: Note) -> None:
    note.handles.append(module.register_forward_pre_hook(hook))
    note.handles.append(module.register_forward_hook(_AfterCall(hook)))


class _AroundCall:
    """The hook before a module that holds a waiting layer. In a copy it takes itself away."""

    def __init__(self, layer: nn.Module, finish: Finish) -> None:
        self._layer = weakref.ref(layer)
        self._finish = finish

    def __call__(self, module: nn.Module, _args: object) -> None:
        """Finish the graft if the layer was called before, and this is the outermost forward.

        Inside a checkpoint, too: what runs now and what the backward runs again are alike.
        """
        if not torch.compiler.is_compiling():
            self.look(module)

    def look(self, module: nn.Module) -> None:
        """Finish the graft if nobody is at work who could notice."""
        layer = self._layer()
        note = None if layer is None else record_of(layer).note
        if layer is None or note is None or note.call is None or not is_between_calls():
            return
        outermost = _outermost()
        if outermost is not None and outermost is not module:
            self._follow(outermost, layer, note)
        elif not note.num_to_recompute:
            with _unnoticed_saving():
                self._finish(layer)

    def _follow(self, outermost: nn.Module, layer: nn.Module, note: Note) -> None:
        """Wait at the outermost module too, if that has come to hold the layer since."""
        hooks = outermost._forward_pre_hooks.values()  # noqa: SLF001 - there is no public look
        if not any(isinstance(h, _AroundCall) and h._layer() is layer for h in hooks):  # noqa: SLF001 - its own class
            _put_hooks(outermost, self, note)

    def __reduce__(self) -> tuple[type[LeftBehind], tuple[()]]:
        return LeftBehind, ()


class _AfterCall:
    """The hook behind a module that holds a waiting layer. In a copy it takes itself away."""

    def __init__(self, around: _AroundCall) -> None:
        self.around = around

    def __call__(self, module: nn.Module, _args: object, _output: object) -> None:
        """Finish the graft where no backward will run this forward again."""
        if not torch.compiler.is_compiling() and not _is_checkpointed():
            self.around.look(module)

    def __reduce__(self) -> tuple[type[LeftBehind], tuple[()]]:
        return LeftBehind, ()


class LeftBehind:
    """What a copy has of a hook: it goes when it is first called."""

    def __call__(self, module: nn.Module, *_: object) -> None:
        """Take this hook off the module."""
        if not torch.compiler.is_compiling():
            take_off(module)


def take_off(module: nn.Module) -> None:
    """Take off a copy the hooks that its original has while a graft waits there."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):  # noqa: SLF001 - a copied hook has no handle
        for hook_id in [key for key, hook in hooks.items() if isinstance(hook, LeftBehind)]:
            del hooks[hook_id]


def _outermost() -> nn.Module | None:
    """Return the outermost module that is being called; None where none is."""
    calls = (frame.f_locals["self"] for frame in frames() if frame.f_code is _CALL)
    return next(reversed([m for m in calls if isinstance(m, nn.Module)]), None)


def _is_checkpointed() -> bool:
    return any(frame.f_code.co_filename == CHECKPOINT_FILE for frame in frames())


def _unnoticed_saving() -> AbstractContextManager[object]:
    """Save what a probe saves as usual, whatever hooks somebody has on saved tensors here."""
    hooks: object = torch._C._autograd._top_saved_tensors_default_hooks(True)  # noqa: SLF001, FBT003 - no public one
    if hooks is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
