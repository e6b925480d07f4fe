"""A container that is a site: what acts on its items acts on the user's, never on its slots."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from torch import nn

from esper.state.host_parts import SEEDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    Method = Callable[..., object]

CONTAINERS: Final[tuple[type[nn.Module], ...]] = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules whose items are their children. Items of a ParameterList are its parameters."""

_READING: Final = (
    *("__getitem__", "__contains__", "__reversed__", "__add__", "__mul__", "__rmul__"),
    *("keys", "values", "items", "get"),
)
_WRITING: Final = (
    *("__setitem__", "__delitem__", "__iadd__", "__imul__", "append", "extend", "insert", "pop"),
    *("popitem", "setdefault", "update", "clear"),
)


def hiding_seeds(host_class: type[nn.Module]) -> dict[str, Method]:
    """Return methods for layers of a container's class that leave its slots alone.

    Args:
        host_class: Class of the host; there are none for one that is no container.
    """
    if not issubclass(host_class, CONTAINERS):
        return {}
    methods: dict[str, Method] = {"__iter__": _iterating(host_class), "__len__": _len(host_class)}
    for names, made_of in ((_READING, _reading), (_WRITING, _writing)):
        theirs = {name: getattr(host_class, name) for name in names if hasattr(host_class, name)}
        methods |= {name: made_of(host_class, method) for name, method in theirs.items()}
    return methods


def _iterating(host_class: type[nn.Module]) -> Method:
    native: Callable[[nn.Module], Iterator[object]] = host_class.__iter__  # type: ignore[attr-defined] # a container's

    @functools.wraps(native)
    def __iter__(self: nn.Module) -> Iterator[object]:  # noqa: N807 - becomes a method
        slots = self._modules.get(SEEDS)
        if slots is None:
            return native(self)
        return iter([item for item in native(self) if item is not slots and item != SEEDS])

    return __iter__


def _len(host_class: type[nn.Module]) -> Method:
    native: Callable[[nn.Module], int] = host_class.__len__  # type: ignore[attr-defined] # a container's

    @functools.wraps(native)
    def __len__(self: nn.Module) -> int:  # noqa: N807 - becomes a method
        return native(self if SEEDS not in self._modules else _items_of(self, host_class))

    return __len__


def _reading(host_class: type[nn.Module], native: Method) -> Method:
    """Return a method that reads a view, of the host's class, on the items alone."""

    @functools.wraps(native)
    def method(self: nn.Module, *args: object, **kwargs: object) -> object:
        return native(_items_of(self, host_class), *args, **kwargs)

    return method


def _writing(host_class: type[nn.Module], native: Method) -> Method:
    """Return a method that changes a container whose slots are set aside meanwhile."""
    del host_class

    @functools.wraps(native)
    def method(self: nn.Module, *args: object, **kwargs: object) -> object:
        slots = self._modules.pop(SEEDS, None)
        try:
            return native(self, *args, **kwargs)
        finally:
            if slots is not None:
                self._modules[SEEDS] = slots  # the last one, whatever was inserted

    return method


def _items_of(layer: nn.Module, host_class: type[nn.Module]) -> nn.Module:
    """Return an object of the host's class that has all of a layer but its slots."""
    view: nn.Module = object.__new__(host_class)
    state, items = layer.__dict__, layer.__dict__["_modules"]
    if SEEDS in items:
        own = {name: item for name, item in items.items() if name != SEEDS}
        state = {**state, "_modules": own}
    object.__setattr__(view, "__dict__", state)
    return view
