"""Room for one more graph wherever grafts make one: what torch.compile must not take for a leak.

``torch.compile`` gives a function up, silently and for good, once it has compiled it eight times.
A model that grows needs a graph for every arrangement of kernels that it has had, and no more: the
limit rises by one with each that this process has not seen before.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

    from esper.state.seed_slot import Seed

CompiledInPlace = tuple[nn.Module, Callable[..., Any]]
"""A module, and the forward that ``module.compile()`` has given it."""

_LIMITS: Final = ("recompile_limit", "accumulated_recompile_limit")

_plans: Final[weakref.WeakKeyDictionary[nn.Module, int]] = weakref.WeakKeyDictionary()
_seen: Final[set[int]] = set()
_granted: Final[ContextVar[int]] = ContextVar("granted", default=0)
"""What a context's own setting has got: a task or a thread that loads a kernel sets another's."""

_lock: Final = threading.Lock()


def allow_graph_of(
    layer: nn.Module,
    plan: tuple[Seed, ...],
    *,
    is_noting: bool = False,
    is_watched: bool = False,
) -> None:
    """Raise the limits by one where a layer's plan makes an arrangement that is not known yet.

    Args:
        layer: The layer.
        plan: Its seeds that contribute.
        is_noting: Whether its forward notes its input too: one graph before, and one after it has.
        is_watched: Whether it has others, at alpha 0, which make a class of its own.
    """
    with _lock:
        before = _plans.pop(layer, None)
        if plan or is_noting or is_watched:
            _plans[layer] = hash((id(layer), is_noting, is_watched, *map(_kind, plan)))
        if _plans.get(layer) != before:
            _seen.add(hash(frozenset(_plans.values())))
            if is_noting:
                _seen.add(hash((is_noting, *_plans.values())))
    grant()


def allow_graph_for(arrangement: Hashable) -> None:
    """Raise the limits by one where an arrangement of something else is not known yet.

    Args:
        arrangement: What tells it from others: which blocks of a stack sleep.
    """
    with _lock:
        _seen.add(hash(("other", arrangement)))
    grant()


def set_aside_compiled(modules: Iterable[nn.Module]) -> list[CompiledInPlace]:
    """Let modules that ``module.compile()`` has compiled run eagerly; return what to put back."""
    found = []
    for module in modules:
        compiled = module.__dict__.get("_compiled_call_impl")
        if compiled is not None:
            module._compiled_call_impl = None  # noqa: SLF001 - torch has no public way
            found.append((module, compiled))
    return found


def put_back_compiled(found: Iterable[CompiledInPlace]) -> None:
    """Let modules run compiled again; one that was compiled anew meanwhile stays as it is."""
    for module, compiled in found:
        if module.__dict__.get("_compiled_call_impl") is None:
            module._compiled_call_impl = compiled  # noqa: SLF001 - as above


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run a model eagerly, as what is inside ``torch.compile(model)`` is, for a pass of our own.

    A graph would be made for every arrangement that is tried, and dynamo would look into it.
    """
    found = set_aside_compiled(model.modules())
    try:
        yield
    finally:
        put_back_compiled(found)


def _kind(seed: Seed) -> tuple[object, ...]:
    """Return what tells two kernels apart for a graph: class, shapes and how they join."""
    blueprint = seed.kernel.blueprint
    shapes = tuple(tuple(p.shape) for p in seed.slot.kernel.parameters())
    what = seed.kernel.kernel_id if blueprint is None else blueprint.id
    return what, shapes, seed.guard, seed.replaces, seed.is_serial


def grant() -> None:
    """Set this context's limits to the owner's, as they were or have been set, and the rise.

    torch keeps its settings by context, so that training has to ask for what a task has earned.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return  # nothing is compiled yet; what is granted comes with the next arrangement
    config = dynamo.config
    num_more = len(_seen) - _granted.get()
    if num_more:
        _granted.set(len(_seen))
        for name in _LIMITS:
            setattr(config, name, getattr(config, name) + num_more)
