"""What stands in a layer's place answers as the layer: plain PyTorch, which travels as text.

An unwrapped model must not need Esper, so nothing here is used as it is imported: ``plain``
executes the text of this file, pickles carry it as those of a ``torch.fx.GraphModule`` carry their
forward, and ``export`` writes the part that it needs into ``grafts.py``.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.fx.graph_module import _method_from_src, reduce_graph_module

SOURCE: str = globals().get("SOURCE", "")
"""The text of this file, given by whoever executes it."""


class StandIn(nn.Module):
    """Stands in a layer's place: what it does not have itself, its ``host`` answers and keeps."""

    OWN_NAMES = frozenset(dir(nn.Module()))

    def __getattr__(self, name: str) -> object:  # type: ignore[override] # whatever the host has
        try:
            return super().__getattr__(name)
        except AttributeError:
            host = self.__dict__.get("_modules", {}).get("host")
            if host is None or name.startswith("__"):
                raise
        return getattr(host, name)

    def __setattr__(self, name: str, value: object) -> None:
        host = self.__dict__.get("_modules", {}).get("host")
        if host is None or self._has(name) or not hasattr(host, name):
            super().__setattr__(name, value)  # type: ignore[arg-type] # torch takes anything
        else:
            setattr(host, name, value)

    def _has(self, name: str) -> bool:
        tables = (self.OWN_NAMES, vars(self), self._modules, self._parameters, self._buffers)
        return name.startswith("seed_") or any(name in table for table in tables)

    def __reduce__(self) -> tuple[object, ...]:
        return revive, (type(self).__bases__[1], self.host), vars(self)


def revive(base: type[nn.Module], host: nn.Module) -> nn.Module:
    """Return an empty stand-in for a host, for copies and pickles."""
    cls = standing_for(base, host)
    return cls.__new__(cls)


def standing_for(
    base: type[nn.Module], host: nn.Module, answers: type[StandIn] = StandIn
) -> type[nn.Module]:
    """Return a class whose forward is that of ``base``, and which is else that of a host."""
    while hasattr(type(host), "OWN_NAMES"):  # something was grown there before
        host = host.host  # type: ignore[assignment] # of a stand-in it is a module
    bases = (answers, base)
    if isinstance(host, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - it has no other name
        return type(base.__name__, bases, {})  # convert_sync_batchnorm replaces any other
    try:
        return type(base.__name__, (*bases, like(type(host))), {})
    except TypeError:  # the host's class and ``base`` have no order in common
        return type(base.__name__, bases, {})


def like(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a class that derives from a host's, for a module that holds the host.

    What every module can do, it does as a module. What else torch's classes can do is done by the
    host, whose tables they read; anybody else's methods are the stand-in's own, so that they reach
    what was grown.
    """
    of_modules = {name: value for base in (object, nn.Module) for name, value in vars(base).items()}
    body: dict[str, object] = {}
    for base in [c for c in cls.__mro__ if c not in nn.Module.__mro__][::-1]:
        is_torch = base.__module__.startswith("torch.")
        for name, value in vars(base).items():
            if name in of_modules and hasattr(value, "__get__"):
                body[name] = of_modules[name]
            elif name in ("__copy__", "__deepcopy__"):
                body[name] = None  # a copy of the host would be none of the stand-in
            elif is_torch and isinstance(value, type(on_host)):
                body[name] = on_host(name)
            else:
                body.pop(name, None)
    return type(cls.__name__, (cls,), body)


def on_host(name: str) -> object:
    """Return a method that a stand-in's host has."""

    def method(self: StandIn, *args: object, **kwargs: object) -> object:
        result = getattr(self.host, name)(*args, **kwargs)
        return self if result is self.host else result

    return method


class Answering(StandIn):
    """What makes a graph answer."""

    OWN_NAMES = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))

    def __copy__(self) -> fx.GraphModule:
        return grafted(self, self.host)  # type: ignore[arg-type] # it is a graph of its host

    def __reduce__(self) -> tuple[object, ...]:
        _, given = fx.GraphModule.__reduce__(self)  # type: ignore[arg-type] # it is one
        return Revival(), given


def grafted(graph: fx.GraphModule, host: nn.Module) -> fx.GraphModule:
    """Return a graph over a host and what was grown beside it, which answers as the host."""
    made: Any = standing_for(fx.GraphModule, host, Answering)(graph, graph.graph, "Grafted")
    if "host" not in made._modules:  # noqa: SLF001 - the stand-in answers as it
        made.add_module("host", host)
    made.training, made.meta = graph.training, graph.meta
    return made  # type: ignore[no-any-return] # the class is made here


class Revival:
    """Makes a stand-in again from what a pickle holds; a pickle holds this as text."""

    def __call__(self, body: dict[str, Any], imports: str) -> fx.GraphModule:
        """Return the stand-in that was pickled."""
        graph: Any = reduce_graph_module(body, imports)
        return grafted(graph, graph.host)

    def __reduce__(self) -> tuple[object, ...]:
        given = {"__name__": __name__, "SOURCE": SOURCE}
        return _method_from_src, ("REVIVAL", SOURCE, given)


GRAFTED, REVIVAL = grafted, Revival()
"""What is asked for by name, which torch takes out of the namespace that it has made."""
