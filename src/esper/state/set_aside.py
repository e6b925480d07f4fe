"""Whatever a model and the owner's functions keep, set aside for a pass and put back after it.

A forward may count its calls, fill a memory bank, draw from a generator of its own or feed a
metric; a loss may change its batch. All of it is found by walking attributes, containers, closures
and the globals that a function names, and is kept apart where that can be done. What cannot be kept
apart and was changed is named.

Tensors are the costly part. Small ones are cloned in every pass. A large one, or a parameter, is
cloned the first time that it is met, and where the pass left it as it was it is only watched from
then on: its version and its storage are compared, which is free. One that a pass changed is cloned
every time.
"""

from __future__ import annotations

import copy
import functools
import itertools
import operator
import random
import sys
import sysconfig
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from esper.contracts.errors import GrowthError
from esper.contracts.owner_warning import warn_owner
from esper.state.layer_record import RECORD
from esper.state.plain_values import as_plain, from_plain
from esper.state.seed_slot import SeedSlot
from esper.state.shards import reshard

SMALL_BYTES: Final = 1 << 16
"""A tensor or array up to this size is cloned in every pass."""
COPIED_BYTES: Final = 1 << 28
"""Larger ones are cloned up to this size in all; the rest is watched."""
MAX_WALKED: Final = 1000
"""What is in a longer container is not looked into."""
MAX_KEPT: Final = 100_000
"""Of a longer container only the length is watched."""

_PLAIN: Final = frozenset(
    {int, float, complex, bool, str, bytes, type(None), type, range, slice, torch.dtype}
    | {torch.device, torch.Size, torch.layout, types.ModuleType, types.BuiltinFunctionType}
)
_COMPARED: Final = frozenset({int, float, complex, bool, str, bytes})
"""Of these two values count as one where they are equal."""
_CALLED: Final = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)
_BY_TORCH: Final = frozenset(vars(nn.Module())) | {RECORD}
_ITERATORS: Final[tuple[type, ...]] = (
    itertools.count,
    type(iter([])),
    type(iter(())),
    type(iter(range(0))),
)
_RANDOM_PARTS: Final = ("generator", "rng", "sampler", "batch_sampler", "dataset")
"""Attributes through which a loader, or another object of a library, draws random numbers."""

_settled: dict[int, tuple[weakref.ref[object], bool]] = {}
"""Large tensors and arrays, by id: whether a pass was seen to leave them alone."""


@contextmanager
def set_aside(
    *modules: nn.Module,
    functions: Iterable[object] = (),
    values: Iterable[object] = (),
    draws: Iterable[object] = (),
    with_buffers: bool = False,
) -> Iterator[None]:
    """Put back what is kept in some places when the block ends, also where it raises.

    Args:
        modules: Models: their attributes, flags, hooks and gradients, and their parameters where
            a pass writes to them; what their classes keep, and the globals that those name.
        functions: The owner's functions: closures, the globals they name, the objects that they
            are methods of, and the buffers of modules among all these.
        values: Whatever a pass is given: a batch.
        draws: Functions of which only random generators are put back; the rest is their owner's
            to keep.
        with_buffers: Whether the models' buffers are put back as well.

    Warns:
        UserWarning: Something was changed that could not be kept apart; it is named.
    """
    kept = _Kept(with_buffers=with_buffers)
    for index, module in enumerate(modules):
        reshard(module)
        kept.walk(module, f"model {index}" if index else "model")
    kept.walk_batch(values)
    kept.with_buffers = True
    kept.walk_functions(functions)
    kept.only_random = True
    kept.walk_functions(draws)
    try:
        yield
    finally:
        for module in modules:
            reshard(module)  # FSDP2 would find shards where it has left what it gathered
        lost = kept.put_back()
    _tell_of(lost)


class Apart:
    """What the owner's functions and classes keep for one copy of a model, from pass to pass.

    A closure that counts its calls, or draws from a generator of its own, goes on for the copy
    where its own last pass has left it, and for the run where the run has. Large tensors, and what
    modules keep that the functions name, are the run's in both.

    Args:
        model: The copy; what its modules keep in themselves is its own anyway.
        functions: The owner's functions, as in :func:`set_aside`.
    """

    def __init__(self, model: nn.Module, functions: Iterable[object]) -> None:
        self._model = model
        self._functions = tuple(functions)
        self._own = self._small()

    @contextmanager
    def inside(self, values: Iterable[object] = ()) -> Iterator[Callable[[], None]]:
        """Let the copy have what it keeps, and the run again what was the run's.

        Yields what takes a pass back that failed: all is as it was when the block began.

        Args:
            values: What the pass is given, put back as well: a batch.

        Warns:
            UserWarning: Something was changed that could not be kept apart; it is named.
        """
        theirs = self._walked(_Kept(with_buffers=True), values)
        self._own.put_back(within=theirs)

        def back() -> None:
            theirs.put_back()
            self._own.put_back(within=theirs)

        try:
            yield back
        finally:
            self._own = self._small()
            lost = theirs.put_back()
        _tell_of(lost)

    def state_dict(self) -> dict[str, Any]:
        """Return in what the copy's differs from the run's, by place, as plain values.

        Where the two do not differ nothing is returned: a run that goes on has that from its owner.

        Raises:
            TypeError: They differ in something that is not plain.
        """
        runs = self._read()
        theirs = self._walked(_Kept(with_buffers=True))
        self._own.put_back(within=theirs)
        try:
            return {
                path: change
                for path, items in self._read().items()
                if (change := _change(runs.get(path, {}), items)) is not None
            }
        finally:
            theirs.put_back()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the copy have what :meth:`state_dict` returned, beside what the run has now.

        Raises:
            GrowthError: The owner's functions keep nothing where they kept something then.
        """
        theirs = self._walked(_Kept(with_buffers=True))
        try:
            places = self._places()
            for path, (kept, removed) in state.items():
                place = places.get(path)
                if place is None:
                    msg = (
                        f"nothing is kept at {path!r} now; give the functions that were given then"
                    )
                    raise GrowthError(msg)
                items = from_plain(kept, torch.device("cpu"))
                gone = from_plain(removed, torch.device("cpu"))
                held = {key: item for key, item in place.read().items() if key not in gone}
                place.write({**held, **items})
            self._own = self._small()
        finally:
            theirs.put_back()

    def _places(self) -> dict[str, _Place]:
        kept = _Kept(with_buffers=False, is_small=True)
        kept.places = {}
        return self._walked(kept).places or {}

    def _read(self) -> dict[str, dict[Any, Any]]:
        return {path: place.read() for path, place in self._places().items()}

    def _small(self) -> _Kept:
        return self._walked(_Kept(with_buffers=False, is_small=True))

    def _walked(self, kept: _Kept, values: Iterable[object] = ()) -> _Kept:
        for cls in {type(module): None for module in self._model.modules()}:
            kept.walk_class(cls)
        kept.walk_batch(values)
        kept.walk_functions(self._functions)
        return kept


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Place:
    """Somewhere that something is kept, to be read and written by key.

    Attributes:
        read: Returns what is there; tensors as copies, since they are written to in place.
        write: Puts there what has the form of what was read.
    """

    read: Callable[[], dict[Any, Any]]
    write: Callable[[dict[Any, Any]], None]


def _change(old: dict[Any, Any], new: dict[Any, Any]) -> list[Any] | None:
    """Return what is other in a place, and which keys are gone, as plain values; None if nothing.

    Raises:
        TypeError: What is other is not plain.
    """
    kept = {key: v for key, v in new.items() if key not in old or not _is_alike(old[key], v)}
    removed = [key for key in old if key not in new]
    return [as_plain(kept), as_plain(removed)] if kept or removed else None


def _is_alike(one: object, other: object) -> bool:
    """Say whether two values are one object, or equal and of a kind that is compared by value."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, _ITERATORS):
        return repr(one) == repr(other) if isinstance(one, itertools.count) else False
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_is_alike, one, other))
    return type(one) in _COMPARED and one == other


def _tell_of(lost: list[str]) -> None:
    if lost:
        warn_owner(
            f"{', '.join(lost)}: changed by a pass that Esper makes beside the training, and "
            "cannot be kept apart from it; keep such state in a buffer or a plain attribute, or "
            "change it in the training loop alone"
        )


class _Kept:
    """What was found, and how to put it back.

    Attributes:
        only_random: Whether what is found from now on is put back only where it is a generator.
        is_data: Whether what is found from now on is data, whatever its class: a library's batch.
        with_buffers: Whether buffers of modules that are found from now on are put back.
        is_small: Whether only what is small is kept, and nothing that modules have.
    """

    def __init__(self, *, with_buffers: bool, is_small: bool = False) -> None:
        self.only_random = self.is_data = False
        self.with_buffers = with_buffers
        self.is_small = is_small
        self._seen: dict[int, object] = {}  # holds what was found: an id is used again otherwise
        self._left: list[tuple[object, str]] = []
        self._holder: object = None  # of what is found now
        self._undo: list[tuple[object, Callable[[], str | None]]] = []
        self._bytes_left = COPIED_BYTES
        self.places: dict[str, _Place] | None = None  # None: nobody asks for them

    def walk_functions(self, functions: Iterable[object]) -> None:
        """Look into functions of the owner's, each by its name."""
        for function in functions:
            self.walk(function, getattr(function, "__name__", type(function).__name__))

    def walk_batch(self, values: Iterable[object]) -> None:
        """Look into what a pass is given."""
        self.is_data = True
        for value in values:
            self.walk(value, "batch")
        self.is_data = False

    def walk_class(self, cls: type) -> None:
        """Look into what a class of modules keeps for all of them, as far as it is the owner's."""
        self._classes(cls)
        self._walk_on()

    def walk(self, root: object, path: str) -> None:
        """Look into a value, and into all that it holds."""
        self._left.append((root, path))
        self._walk_on()

    def _walk_on(self) -> None:
        while self._left:
            value, path = self._left.pop()
            if type(value) in _PLAIN or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            self._holder = value
            self._keep(value, path)

    def put_back(self, *, within: _Kept | None = None) -> list[str]:
        """Put everything back, the last first; return the names of what could not be.

        Args:
            within: Leave alone what this one would not put back after it.
        """
        undo = reversed(self._undo)
        if within is not None:
            undo = (entry for entry in undo if id(entry[0]) in within._seen)  # noqa: SLF001 - of this file
        return [lost for _, put in undo if (lost := put()) is not None]

    def _keep(self, value: object, path: str) -> None:
        for kind, keep in _KINDS:
            if isinstance(value, kind):
                keep(self, value, path)
                return
        restore = _random_state_of(value)
        if restore is not None:
            self._add(restore)
            if self.places is not None:
                self._generator_place(value, path)
            return
        if self.is_data or _is_owners(type(value)) or _is_metric(value):
            self._attributes(value, path)
        elif not type(value).__module__.startswith("esper."):
            self._foreign(value, path)

    def _add(self, undo: Callable[[], str | None]) -> None:
        self._undo.append((self._holder, undo))

    def _later(self, undo: Callable[[], str | None]) -> None:
        if not self.only_random:
            self._add(undo)

    def _place(
        self, path: str, read: Callable[[], dict[Any, Any]], write: Callable[[dict[Any, Any]], None]
    ) -> None:
        if self.places is None or self.only_random:
            return
        while path in self.places:
            path += "'"
        self.places[path] = _Place(read=read, write=write)

    def _one_place(
        self, path: str, read: Callable[[], object], write: Callable[[Any], object]
    ) -> None:
        def put(items: dict[Any, Any]) -> None:
            write(items[""])

        self._place(path, lambda: {"": read()}, put)

    def _generator_place(self, value: object, path: str) -> None:
        read, write = _state_of_random(value)
        self._one_place(path, read, write)

    def _items(self, items: Iterable[tuple[object, object]], path: str) -> None:
        for name, value in items:
            if type(value) not in _PLAIN:
                self._left.append((value, f"{path}.{name}"))

    def _tensor(self, value: Tensor, path: str) -> None:
        if self.only_random or value.is_inference() or value.device.type == "meta":
            return
        state = _fingerprint(value)
        if self._is_cloned(value, value.numel() * value.element_size()):
            self._add(functools.partial(_restore_tensor, value, state, _clone(value)))
            if self.places is not None:
                self._one_place(path, lambda: _clone(value), functools.partial(_put_tensor, value))
        elif state is not None and not self.is_small:
            self._add(functools.partial(_watch_tensor, value, state, path))

    def _is_cloned(self, value: Tensor | np.ndarray[Any, Any], size_bytes: int) -> bool:
        """Say whether a copy is worth its memory; see the head of the file."""
        if isinstance(value, Tensor) and (value.grad_fn is not None or not _is_plain(value)):
            return False
        if size_bytes > SMALL_BYTES or isinstance(value, nn.Parameter):
            if self.is_small or _is_settled(value) or size_bytes > self._bytes_left:
                return False
            self._bytes_left -= size_bytes
        return True

    def _array(self, value: np.ndarray[Any, Any], path: str) -> None:
        if not self.only_random and value.flags.writeable and self._is_cloned(value, value.nbytes):
            self._add(functools.partial(_restore_array, value, value.copy()))
            if self.places is not None:
                self._one_place(path, value.copy, lambda kept: np.copyto(value, kept))

    def _list(self, value: list[object], path: str) -> None:
        self._container(value, path, list.__iter__, lambda saved: _set_list(value, saved))

    def _deque(self, value: deque[object], path: str) -> None:
        def restore(saved: list[object]) -> None:
            deque.clear(value)
            deque.extend(value, saved)

        self._container(value, path, deque.__iter__, restore)

    def _set(self, value: set[object], path: str) -> None:
        def restore(saved: list[object]) -> None:
            set.clear(value)
            set.update(value, saved)

        self._container(value, path, set.__iter__, restore)

    def _dict(self, value: dict[object, object], path: str) -> None:
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        self._mapping(value, path, kind)
        if type(value) is not dict:
            self._attributes(value, path)

    def _container(
        self,
        value: Any,
        path: str,
        iterate: Callable[[Any], Iterator[object]],
        restore: Callable[[list[object]], None],
    ) -> None:
        """Keep what a container holds; a class of the owner's may iterate as it likes."""
        size = len(value)
        if size > MAX_KEPT:
            self._later(lambda: path if len(value) != size else None)
            return
        saved = list(iterate(value))

        def undo() -> None:
            now = list(iterate(value))
            if len(now) != len(saved) or any(a is not b for a, b in zip(now, saved, strict=True)):
                restore(saved)

        self._later(undo)
        if self.places is not None:
            self._place(
                path,
                lambda: dict(enumerate(iterate(value))),
                lambda items: restore(list(items.values())),
            )
        if size <= MAX_WALKED:
            self._items(enumerate(saved), path)

    def _mapping(self, value: dict[Any, Any], path: str, kind: type[dict[Any, Any]] = dict) -> None:
        """Keep what a mapping holds; iterators in it are exchanged for copies meanwhile."""
        if len(value) > MAX_KEPT:
            size = len(value)
            self._later(lambda: path if len(value) != size else None)
            return
        saved = dict(dict.items(value))
        for name, item in list(saved.items()):
            if isinstance(item, _ITERATORS):
                saved[name] = self._iterator(item, functools.partial(kind.__setitem__, value, name))
        hand = self._hand

        def undo() -> None:
            if not _same(value, saved):
                kind.clear(value)
                kind.update(value, {name: hand(item) for name, item in saved.items()})

        self._later(undo)
        if self.places is not None:
            write = functools.partial(_set_mapping, value, kind)
            self._place(path, lambda: dict(dict.items(value)), write)
        if len(saved) <= MAX_WALKED:
            self._items(saved.items(), path)

    def _iterator(self, held: object, put: Callable[[object], None]) -> object:
        """Let a pass use up a copy; return what is to be put back, for a later pass another one."""
        if self.is_small:
            return _copied(held)
        if not self.only_random:
            put(_copied(held))
        return held

    @property
    def _hand(self) -> Callable[[object], object]:
        """What gives the value to put back; not of this object, or it would keep itself alive."""
        return _handed if self.is_small else _as_it_is

    def _attributes(self, value: object, path: str) -> None:
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._mapping(own, path)
        for name in _slots(type(value)):
            if hasattr(value, name):
                self._slot(value, name, path)

    def _slot(self, value: object, name: str, path: str) -> None:
        held = getattr(value, name)
        self._later(lambda: object.__setattr__(value, name, held))
        if self.places is not None:
            self._one_place(
                f"{path}.{name} =",
                lambda: getattr(value, name),
                functools.partial(object.__setattr__, value, name),
            )
        self._items([(name, held)], path)

    def _module(self, module: nn.Module, path: str) -> None:
        if self.is_small:
            return
        own = vars(module)
        tables = (own, module._parameters, module._buffers, module._modules)  # noqa: SLF001 - past properties
        self._later(functools.partial(_refill, [(held, dict(held)) for held in tables]))
        self._looked_into(own, path)
        self._items(module._modules.items(), path)  # noqa: SLF001 - as above
        for name, p in module._parameters.items():  # noqa: SLF001 - as above
            if p is not None and id(p) not in self._seen:
                self._parameter(p, f"{path}.{name}")
        if self.with_buffers and not isinstance(module, SeedSlot):
            self._items(module._buffers.items(), path)  # noqa: SLF001 - as above
        for kind in _CALLED:
            hooks = own.get(kind)
            if hooks:
                self._items(hooks.items(), f"{path}.{kind}")
        self._classes(type(module))

    def _classes(self, cls: type) -> None:
        for base in filter(_is_owners, cls.__mro__):
            self._class(base)

    def _looked_into(self, own: dict[str, Any], path: str) -> None:
        """Look into a module's attributes, torch's own left out."""
        for name, item in list(own.items()):
            if type(item) in _PLAIN or name in _BY_TORCH:
                continue
            self._left.append((item, f"{path}.{name}"))
            if isinstance(item, _ITERATORS) and not self.only_random:
                own[name] = _copied(item)

    def _class(self, cls: type) -> None:
        """Keep what a class counts for all of its objects."""
        if id(cls) in self._seen or self.only_random:
            return
        self._seen[id(cls)] = self._holder = cls
        for name, item in list(vars(cls).items()):
            if isinstance(item, types.FunctionType):
                self._items([(name, item)], cls.__qualname__)
                continue
            if name.startswith("__") or callable(item) or hasattr(item, "__get__"):
                continue
            self._later(functools.partial(_set_class_attribute, cls, name, item))
            if self.places is not None:
                self._one_place(
                    f"{cls.__qualname__}.{name} =",
                    functools.partial(getattr, cls, name),
                    functools.partial(setattr, cls, name),
                )
            self._items([(name, item)], cls.__qualname__)

    def _parameter(self, p: nn.Parameter, path: str) -> None:
        self._seen[id(p)] = p
        requires_grad, grad = p.requires_grad, p.grad

        def undo() -> None:
            if p.requires_grad != requires_grad:
                p.requires_grad_(requires_grad)
            if p.grad is not grad:
                p.grad = grad

        self._later(undo)
        self._tensor(p, path)
        state = None if grad is None or self.only_random else _fingerprint(grad)
        if grad is not None and state is not None:
            self._add(functools.partial(_watch_tensor, grad, state, f"{path}.grad"))

    def _function(self, value: types.FunctionType, path: str) -> None:
        if _is_installed(value.__module__ or ""):
            return
        cells = value.__closure__ or ()
        for name, cell in zip(value.__code__.co_freevars, cells, strict=True):
            self._cell(cell, f"{path}.{name}")
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        self._items(enumerate(defaults), path)
        self._items(vars(value).items(), path)
        self._mapping(vars(value), path)
        self._globals(value.__globals__, _names(value.__code__))

    def _cell(self, cell: types.CellType, path: str) -> None:
        try:
            held = cell.cell_contents
        except ValueError:  # it is empty
            return
        self._left.append((held, path))
        if isinstance(held, _ITERATORS):
            held = self._iterator(held, functools.partial(setattr, cell, "cell_contents"))
        hand = self._hand

        def undo() -> None:
            cell.cell_contents = hand(held)

        self._later(undo)
        if self.places is not None:
            self._one_place(
                f"{path} =",
                lambda: cell.cell_contents,
                functools.partial(setattr, cell, "cell_contents"),
            )

    def _globals(self, held: dict[str, Any], names: Iterable[str]) -> None:
        for name in names:
            if name not in held:
                continue
            value = held[name]
            self._left.append((value, name))
            if isinstance(value, _ITERATORS):
                value = self._iterator(value, functools.partial(held.__setitem__, name))
            self._later(functools.partial(_set_item, self._hand, held, name, value))
            if self.places is not None:
                self._one_place(
                    f"{held.get('__name__')}.{name} =",
                    functools.partial(held.get, name),
                    functools.partial(held.__setitem__, name),
                )

    def _method(self, value: types.MethodType, path: str) -> None:
        owner = value.__self__
        if type(owner).__module__.startswith("esper."):  # a job, whose parts are the owner's
            self._items([(n, getattr(owner, n)) for n in _slots(type(owner))], path)
        else:
            self._items([("__self__", owner), ("__func__", value.__func__)], path)

    def _partial(self, value: functools.partial[object], path: str) -> None:
        self._items([("func", value.func), *enumerate(value.args)], path)
        self._mapping(value.keywords, path)

    def _tuple(self, value: tuple[object, ...], path: str) -> None:
        if len(value) <= MAX_WALKED:
            self._items(enumerate(value), path)

    def _generator(self, value: types.GeneratorType[Any, Any, Any], path: str) -> None:
        if value.gi_frame is not None:  # one that draws from a generator of random numbers
            self._items(list(value.gi_frame.f_locals.items()), path)
        if self.is_small:
            return
        before = _position(value)
        self._later(lambda: path if _position(value) != before else None)

    def _foreign(self, value: object, path: str) -> None:
        """Watch an object of a library: what it holds is not known well enough to be put back."""
        own = getattr(value, "__dict__", None)
        if not isinstance(own, dict):
            return
        self._items([(name, own[name]) for name in _RANDOM_PARTS if name in own], path)
        if self.is_small or type(value).__module__.partition(".")[0] in ("torch", "logging"):
            return  # compiled graphs and loggers count what is no matter of the run
        saved = dict(own)
        self._later(lambda: None if _same(own, saved) else f"{path} (a {type(value).__name__})")


_KINDS: Final[tuple[tuple[type | tuple[type, ...], Callable[..., None]], ...]] = (
    (nn.Module, _Kept._module),  # noqa: SLF001 - of this file
    (Tensor, _Kept._tensor),  # noqa: SLF001 - of this file
    (np.ndarray, _Kept._array),  # noqa: SLF001 - of this file
    (dict, _Kept._dict),  # noqa: SLF001 - of this file
    (list, _Kept._list),  # noqa: SLF001 - of this file
    (deque, _Kept._deque),  # noqa: SLF001 - of this file
    (set, _Kept._set),  # noqa: SLF001 - of this file
    ((tuple, frozenset), _Kept._tuple),  # noqa: SLF001 - of this file
    (types.FunctionType, _Kept._function),  # noqa: SLF001 - of this file
    (types.MethodType, _Kept._method),  # noqa: SLF001 - of this file
    (functools.partial, _Kept._partial),  # noqa: SLF001 - of this file
    (types.GeneratorType, _Kept._generator),  # noqa: SLF001 - of this file
)


def _random_state_of(value: object) -> Callable[[], None] | None:
    """Return what puts a random generator back to where it is now; None for anything else."""
    if isinstance(value, torch.Generator):
        return functools.partial(_set_state_of_torch, value, value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return _random_state_of(value.bit_generator)
    if isinstance(value, np.random.BitGenerator):
        return functools.partial(setattr, value, "state", copy.deepcopy(value.state))
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    return None


def _state_of_random(value: Any) -> tuple[Callable[[], object], Callable[[Any], object]]:
    """Return what reads the state of a random generator, and what sets it."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return (lambda: as_plain(value.get_state())), (
            lambda state: value.set_state(from_plain(state, torch.device("cpu")))
        )
    bits = value.bit_generator if isinstance(value, np.random.Generator) else value
    return (lambda: as_plain(bits.state)), lambda state: setattr(
        bits, "state", from_plain(state, torch.device("cpu"))
    )


def _put_tensor(value: Tensor, kept: Tensor) -> None:
    if value.shape == kept.shape and value.dtype == kept.dtype:
        _write(value, kept)
    else:
        value.data = kept.to(value.device)


def _write(value: Tensor, kept: Tensor) -> None:
    """Write to a tensor, once where it stands expanded: elsewhere torch refuses."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())
    value.data[once].copy_(kept[once])


def _set_state_of_torch(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


def _is_settled(value: object) -> bool | None:
    """Return whether a pass left a value alone when it was first met; None before that."""
    entry = _settled.get(id(value))
    return entry[1] if entry is not None and entry[0]() is value else None


def _settle(value: object, *, stays: bool) -> bool:
    key = id(value)
    _settled[key] = weakref.ref(value, lambda ref: _forget(key, ref)), stays
    return stays


def _forget(key: int, ref: weakref.ref[object]) -> None:
    entry = _settled.get(key)
    if entry is not None and entry[0] is ref:  # the id may be another's by now
        del _settled[key]


def _fingerprint(value: Tensor) -> tuple[int, int] | None:
    """Return what changes where a tensor is written to; None where that cannot be told."""
    try:
        return value._version, value.data_ptr()  # noqa: SLF001 - torch has no other name for it
    except RuntimeError:  # a tensor without storage, or a subclass that hides it
        return None


def _is_plain(value: Tensor) -> bool:
    return type(value) in (Tensor, nn.Parameter, nn.Buffer) and value.layout is torch.strided


def _clone(value: Tensor) -> Tensor:
    return value.detach().clone()


def _restore_tensor(value: Tensor, state: tuple[int, int] | None, kept: Tensor) -> None:
    size_bytes = kept.numel() * kept.element_size()
    is_watched = size_bytes > SMALL_BYTES or isinstance(value, nn.Parameter)
    is_first = is_watched and _is_settled(value) is None
    if is_first and _settle(value, stays=_fingerprint(value) == state and _equal(value, kept)):
        return
    with torch.no_grad():  # by .data: what the owner's graph has saved is as it was, version too
        if value.shape == kept.shape and value.dtype == kept.dtype:
            _write(value, kept)
        else:
            value.data = kept


def _watch_tensor(value: Tensor, state: tuple[int, int], path: str) -> str | None:
    if _fingerprint(value) == state:
        return None
    _settle(value, stays=False)
    return path


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one = one.detach()
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _restore_array(value: np.ndarray[Any, Any], kept: np.ndarray[Any, Any]) -> None:
    if kept.nbytes > SMALL_BYTES and _is_settled(value) is None:
        is_equal = np.array_equal(value, kept, equal_nan=kept.dtype.kind in "fc")
        if _settle(value, stays=bool(is_equal)):
            return
    np.copyto(value, kept)


def _set_list(value: list[object], saved: list[object]) -> None:
    list.__setitem__(value, slice(None), saved)


def _set_mapping(value: dict[Any, Any], kind: type[dict[Any, Any]], items: dict[Any, Any]) -> None:
    kind.clear(value)
    kind.update(value, items)


def _set_class_attribute(cls: type, name: str, value: object) -> None:
    if vars(cls).get(name) is not value:
        setattr(cls, name, value)


def _same(now: dict[Any, Any], saved: dict[Any, Any]) -> bool:
    """Whether two mappings hold the same objects in the same order."""
    return (
        len(now) == len(saved)
        and all(map(operator.is_, now, saved))
        and all(map(operator.is_, now.values(), saved.values()))
    )


def _refill(tables: list[tuple[dict[Any, Any], dict[Any, Any]]]) -> None:
    """Give mappings their former items; one that holds them still is not touched."""
    for held, saved in tables:
        if _same(held, saved):
            continue
        for name in held.keys() - saved.keys():
            del held[name]
        for name, item in saved.items():
            if name not in held or held[name] is not item:
                held[name] = item
        if list(held) != list(saved):
            held.clear()
            held.update(saved)


def _as_it_is(held: object) -> object:
    return held


def _handed(held: object) -> object:
    """Return what is put back: a copy of an iterator that may be put back once more."""
    return _copied(held) if isinstance(held, _ITERATORS) else held


def _set_item(
    hand: Callable[[object], object], held: dict[str, Any], name: str, value: object
) -> None:
    if held.get(name) is not value:
        held[name] = hand(value)


def _copied(iterator: Any) -> Any:
    if isinstance(iterator, itertools.count):  # its repr is its state; to copy it is deprecated
        rest = repr(iterator).removeprefix("count(").removesuffix(")").split(", ")
        return itertools.count(*map(_number, rest))
    return copy.copy(iterator)


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _position(generator: types.GeneratorType[Any, Any, Any]) -> object:
    """Return where a generator stands, to be compared."""
    frame = generator.gi_frame
    if frame is None:
        return None
    return frame.f_lasti, {name: id(value) for name, value in frame.f_locals.items()}


def _names(code: types.CodeType) -> set[str]:
    """Return what a function may name of its globals, by functions inside it as well."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*inner)


def _slots(cls: type) -> tuple[str, ...]:
    found: list[str] = []
    for base in cls.__mro__:
        names = base.__dict__.get("__slots__", ())
        found += [names] if isinstance(names, str) else names
    return tuple(n for n in found if n not in ("__dict__", "__weakref__"))


def _is_owners(cls: type) -> bool:
    """Whether a class was written by the owner of the run: not by Python, torch or a library."""
    return not _is_installed(cls.__module__)


def _is_metric(value: object) -> bool:
    """Whether an object of a library is of those that gather: updated, and reset."""
    return all(hasattr(type(value), name) for name in ("update", "reset"))


@functools.cache
def _is_installed(module: str) -> bool:
    if module.partition(".")[0] == "esper":
        return True
    if module == "__main__":
        return False
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None:
        return module in sys.builtin_module_names or module in sys.stdlib_module_names
    places = sysconfig.get_paths()
    return str(path).startswith(tuple(places[n] for n in ("stdlib", "purelib", "platlib")))
