"""Room for one more graph wherever grafts make one: what torch.compile must not take for a leak.

``torch.compile`` gives a function up, silently and for good, once it has compiled it eight times.
A model that grows needs a graph for every arrangement of kernels that it has had, and no more: the
limit rises by one with each that this process has not seen before.
"""

from __future__ import annotations

import sys
import threading
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import nn

    from esper.state.seed_slot import Seed

_LIMITS: Final = ("recompile_limit", "accumulated_recompile_limit")

_plans: Final[weakref.WeakKeyDictionary[nn.Module, int]] = weakref.WeakKeyDictionary()
_seen: Final[set[int]] = set()
_granted: Final[ContextVar[int]] = ContextVar("granted", default=0)
"""What a context's own setting has got: a task or a thread that loads a kernel sets another's."""

_lock: Final = threading.Lock()


def allow_graph_of(layer: nn.Module, plan: tuple[Seed, ...], *, is_watched: bool = False) -> None:
    """Raise the limits by one where a layer's plan makes an arrangement that is not known yet.

    Args:
        layer: The layer.
        plan: Its seeds that contribute.
        is_watched: Whether it has others, at alpha 0, which make a class of its own.
    """
    with _lock:
        before = _plans.pop(layer, None)
        if plan or is_watched:
            _plans[layer] = hash((id(layer), is_watched, *map(_kind, plan)))
        if _plans.get(layer) != before:
            _seen.add(hash(frozenset(_plans.values())))
    grant()


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
