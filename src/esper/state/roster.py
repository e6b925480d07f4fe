"""Which layers hold kernels, so that a training step need not look at those that do not."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Final

from esper.state.layer_record import RECORD, record_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import nn

    Plain = Mapping[str, tuple[list[Any], Mapping[int, nn.Module]]]
    """Of each layer that became a graph: the structures of its seeds, and their kernels."""

_busy: Final[weakref.WeakSet[nn.Module]] = weakref.WeakSet()
_moved: Final[weakref.WeakKeyDictionary[nn.Module, nn.Module]] = weakref.WeakKeyDictionary()
"""Layers whose place another module took, and the module that their kernels stand in."""

_at_first: Final[list[Callable[[], None]]] = []

_at_building: Final[list[Callable[[nn.Module, object], None]]] = []

_at_change: Final[list[Callable[[nn.Module], None]]] = []

_at_unwrapping: Final[list[Callable[[nn.Module, Plain], None]]] = []

_lock = threading.Lock()


def at_change(do: Callable[[nn.Module], None]) -> None:
    """Do something whenever the plan of a layer is made anew; it has to be quick.

    Args:
        do: Takes the layer.
    """
    _at_change.append(do)


def at_unwrapping(do: Callable[[nn.Module, Plain], None]) -> None:
    """Do something whenever a model has been unwrapped.

    Args:
        do: Takes the model, and what has become of those of its layers that did not fold.
    """
    _at_unwrapping.append(do)


def tell_of_unwrapping(model: nn.Module, plain: Plain) -> None:
    """Say that a model has been unwrapped."""
    for do in _at_unwrapping:
        do(model, plain)


def at_building(do: Callable[[nn.Module, object], None]) -> None:
    """Do something whenever a ``state_dict`` that is loaded has built kernels in a layer.

    Args:
        do: Takes the layer, and an object that is the same for all layers of one load.
    """
    _at_building.append(do)


def tell_of_building(layer: nn.Module, load: object) -> None:
    """Say that a load has built kernels in a layer."""
    for do in _at_building:
        do(layer, load)


def at_first_kernel(do: Callable[[], None]) -> None:
    """Do something once, when the first layer of this process holds or awaits a kernel."""
    _at_first.append(do)


def update_roster(layer: nn.Module) -> None:
    """Remember whether any seed of a layer holds or awaits a kernel; call it when that changes."""
    record = record_of(layer)
    is_busy = bool(record.seeds or record.waiting)
    with _lock:
        (_busy.add if is_busy else _busy.discard)(layer)
        Changes.count += 1
    for do in _at_change:
        do(layer)
    while is_busy and _at_first:
        _at_first.pop()()


def layers_with_kernels() -> list[nn.Module]:
    """Return the layers of this process that hold kernels, in no order."""
    with _lock:
        return [layer for layer in _busy if RECORD in layer.__dict__]


class Changes:
    """How often something changed in this process that a step of training looks for.

    Those are kernels that come, go or move to another module, and ranks that train together.

    Attributes:
        count: So often; who found nothing to do, and has seen as many, need not look.
    """

    count: ClassVar[int] = 0


def remember_change() -> None:
    """Let everybody who found nothing to do look again."""
    with _lock:
        Changes.count += 1


class Moves:
    """How often kernels were moved to another module in this process.

    Attributes:
        count: So often; who has seen as many need not look.
    """

    count: ClassVar[int] = 0


def remember_move(layer: nn.Module, module: nn.Module) -> None:
    """Remember that the kernels of a layer stand in another module from now on."""
    with _lock:
        _moved.pop(module, None)
        _moved[layer] = module
        Moves.count += 1
        Changes.count += 1


def where_kernels_stand(layer: nn.Module) -> nn.Module:
    """Return the layer, or the module that its kernels have been moved to."""
    with _lock:
        while layer in _moved:
            layer = _moved[layer]
    return layer


class Roster:
    """The layers of one model, and those of them that hold kernels.

    To ask costs in proportion to the layers of this process that hold kernels, however many
    there are that do not.

    Args:
        layers: Wrapped layers, which are held weakly; those made by copying have told nobody of
            their kernels, so each is looked at once.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._num_moves = -1  # of moves before it too, once
        self._positions: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        for position, layer in enumerate(layers):
            self._positions[layer] = position
            update_roster(layer)

    def busy(self) -> list[nn.Module]:
        """Return the layers that hold or await kernels, in the order in which they were given."""
        if self._num_moves != Moves.count:
            self._follow_moves()
        if not _busy:  # the usual case, in each step of a run that has not grown
            return []
        with _lock:
            found = [layer for layer in _busy if layer in self._positions]
        wrapped = (layer for layer in found if RECORD in layer.__dict__)
        return sorted(wrapped, key=self._positions.__getitem__)

    def _follow_moves(self) -> None:
        self._num_moves = Moves.count
        for layer, position in list(self._positions.items()):
            self._positions.setdefault(where_kernels_stand(layer), position)
