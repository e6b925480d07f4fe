"""The classes that a host object may have as a layer: what each does in a forward.

For a host class and a family (KasminaLayer or a subclass of it) there are seven classes, made
once: *dormant*, whose forward is the host class's own function; *counting*, the same with a
counter, for telemetry; *watching*, the same where kernels stand at alpha 0, which others may
write; *active*, whose forward follows the plan; *fused*, the same where kernels of one form are run
as one; *profiled*, the same where the kernels run under their names; *noting*, which keeps its
input for a graft that waits for one. A transition changes ``__class__`` of the host object.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Final, Literal, NamedTuple, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from esper.forward.blending import blend
from esper.forward.container_items import hiding_seeds
from esper.forward.fence import run_kernel
from esper.forward.fused_blending import blend_fused
from esper.forward.host_output import graftable, pass_on, with_first
from esper.forward.input_watch import watched
from esper.forward.named_run import opening_named
from esper.forward.nested import blend_nested
from esper.forward.noting import take_note
from esper.state.layer_call import as_declared, declared_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.forward.blending import RunKernel
    from esper.state.layer_call import LayerCall
    from esper.state.layer_record import LayerRecord

    Arguments = tuple[tuple[object, ...], dict[str, object]]
    CompleteCall = Callable[[tuple[object, ...], dict[str, object]], Arguments]
    OpenRun = Callable[[LayerRecord, LayerCall], RunKernel]
    Join = Callable[[LayerRecord, LayerCall, Tensor, RunKernel], Tensor]


Kind = Literal["dormant", "counting", "watching", "active", "fused", "profiled", "noting"]
"""Whether a class runs the host's function, the same counted or watched, the plan, the same with
kernels run as one or under names, or either of the two with its input noted."""

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


Forward = Callable[..., object]
"""A forward as a class has it: the object comes first, then what the host takes."""

LayerClass = type["Family"]


class Family(Protocol):
    """What a class of layers says about their forwards: ``KasminaLayer``, and what derives from it.

    Attributes:
        complete_call: ``(args, kwargs) -> (args, kwargs)``: fills in what a caller may leave out;
            None: nothing.
        open_run: ``(record, call) -> run``: begins a call, and returns what runs kernels; None:
            ``run_kernel``.
    """

    complete_call: ClassVar[CompleteCall | None]
    open_run: ClassVar[OpenRun | None]

    def take_written_alphas(self) -> None:
        """Let state and plan follow the alphas that others have written to the buffers."""


class ClassKey(NamedTuple):
    """What a generated class was made from.

    Attributes:
        family: ``KasminaLayer`` or a subclass of it.
        host_class: Class that the host object had.
        kind: Which of the seven it is.
    """

    family: LayerClass
    host_class: type[nn.Module]
    kind: Kind


_classes: dict[ClassKey, type] = {}
_lock = threading.RLock()


def generated_class(family: LayerClass, host_class: type[nn.Module], kind: Kind) -> type:
    """Return the class of a family's layers over ``host_class``; one object for equal arguments.

    Args:
        family: ``KasminaLayer`` or a subclass of it.
        host_class: Class of the host object, which the result derives from.
        kind: One of ``KINDS``.
    """
    key = ClassKey(family, host_class, kind)
    with _lock:
        if key not in _classes:
            _classes[key] = _make(key)
        return _classes[key]


def _make(key: ClassKey) -> type:
    family, host_class, kind = key
    body: dict[str, object] = {
        "__module__": host_class.__module__,  # by it, tools tell which layers they know
        "__doc__": f"{host_class.__qualname__} with seeds; {kind}.",
        "_esper_key": key,
        "forward": _FORWARDS[kind](family, host_class),
    }
    body.update(hiding_seeds(host_class))
    return type(f"Kasmina{host_class.__name__}", (cast("type", family), host_class), body)


def native_forward(family: LayerClass, host_class: type[nn.Module]) -> Forward:
    """Return the host's forward; where the family lets arguments be left out, after filling in."""
    host_forward: Forward = host_class.forward
    complete = family.complete_call
    if complete is None:
        return host_forward

    @functools.wraps(host_forward)
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        args, kwargs = complete(args, kwargs)
        return host_forward(self, *args, **kwargs)

    return forward


def _counting(family: LayerClass, host_class: type[nn.Module]) -> Forward:
    native = native_forward(family, host_class)

    @functools.wraps(native)
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        if not torch.compiler.is_compiling():
            record: LayerRecord = self.__dict__["_kasmina"]
            record.native_count += 1
        return native(self, *args, **kwargs)

    return forward


def _watching(family: LayerClass, host_class: type[nn.Module]) -> Forward:
    native = native_forward(family, host_class)

    @functools.wraps(native)
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        if not torch.compiler.is_compiling():
            record: LayerRecord = self.__dict__["_kasmina"]
            if _is_written(record):
                return _look_again(self)(*args, **kwargs)
            if record.telemetry_enabled:
                record.native_count += 1
        return native(self, *args, **kwargs)

    return forward


def _is_written(record: LayerRecord) -> bool:
    """Say whether somebody wrote an alpha that was 0; compiled graphs do not look."""
    if not torch.compiler.is_compiling():
        for slot in record.watched:
            if slot.differs:
                return True
    return False


def _look_again(layer: nn.Module) -> Callable[..., object]:
    """Let a layer follow its alphas, and return its forward from then on."""
    cast("Family", layer).take_written_alphas()
    forward: Callable[..., object] = layer.forward
    return forward


def _active(family: LayerClass, host_class: type[nn.Module]) -> Forward:
    return _following_plan(family, host_class, family.open_run)


def _fused(family: LayerClass, host_class: type[nn.Module]) -> Forward:
    return _following_plan(family, host_class, None, blend_fused)


def _profiled(family: LayerClass, host_class: type[nn.Module]) -> Forward:
    return _following_plan(family, host_class, opening_named(family.open_run))


def _following_plan(
    family: LayerClass,
    host_class: type[nn.Module],
    open_run: OpenRun | None,
    join: Join = blend,
) -> Forward:
    host_forward: Forward = host_class.forward
    complete = family.complete_call
    names = declared_names(host_forward)

    @functools.wraps(host_forward)
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        if complete is not None:
            args, kwargs = complete(args, kwargs)
        record: LayerRecord = self._kasmina  # type: ignore[assignment] # a Module's attributes
        if record.watched and _is_written(record):
            return _look_again(self)(*args, **kwargs)
        given = call = as_declared(names, args, kwargs)
        writes = record.writes_input[self.training]
        watch = None
        if writes is not False:  # kernels run after the host, and read what it was given
            watch, call = watched(given, is_known=writes is not None)
        run = run_kernel if open_run is None else open_run(record, call)
        output = host_forward(self, *args, **kwargs)
        if watch is not None:
            record.writes_input[self.training] = watch.has_changed
            call = call if watch.has_changed else given  # copies add gradients in another order
        h = graftable(output)
        if h is None:
            pass_on(record, output)
            return output
        y = blend_nested(record, call, h, run) if h.is_nested else join(record, call, h, run)
        return y if isinstance(output, Tensor) else with_first(output, y)

    return forward


def _noting(family: LayerClass, host_class: type[nn.Module]) -> Forward:
    """Return what notes the call for a graft that waits, and then does what is done without one."""
    active, watching = _active(family, host_class), _watching(family, host_class)

    @functools.wraps(host_class.forward)
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        record: LayerRecord = self._kasmina  # type: ignore[assignment] # a Module's attributes
        take_note(record, args, kwargs)
        follow = active if record.plan else watching
        return follow(self, *args, **kwargs)

    return forward


_FORWARDS: Final[dict[Kind, Callable[[LayerClass, type[nn.Module]], Forward]]] = {
    "dormant": native_forward,
    "counting": _counting,
    "watching": _watching,
    "active": _active,
    "fused": _fused,
    "profiled": _profiled,
    "noting": _noting,
}


def generated_base(cls: type) -> type | None:
    """Return the generated class that ``cls`` is or derives from, or None."""
    return next((base for base in cls.__mro__ if "_esper_key" in base.__dict__), None)


def host_class_of(layer: nn.Module) -> type[nn.Module]:
    """Return the class that a layer had before it was wrapped."""
    return key_of(layer).host_class


def key_of(layer: nn.Module) -> ClassKey:
    """Return family, host class and kind of a layer's class."""
    return cast("ClassKey", type(layer)._esper_key)  # type: ignore[attr-defined] # noqa: SLF001 - made by us


def rebuild(family: LayerClass, host_class: type[nn.Module], kind: Kind) -> nn.Module:
    """Return an empty object of a generated class, for copy and pickle."""
    layer: nn.Module = object.__new__(generated_class(family, host_class, kind))
    return layer


def reduce_layer(reduced: tuple[object, ...], cls: type) -> tuple[object, ...]:
    """Return the reduction of a layer from that of its host, which names a class made here.

    Args:
        reduced: What ``object.__reduce_ex__`` or the host's own gave.
        cls: Class of the layer.
    """
    key = cls.__dict__.get("_esper_key")
    if key is None or getattr(reduced[0], "__name__", "") != "__newobj__":
        return reduced
    if key.kind == "profiled":  # who profiles the original does not profile its copies
        key = key._replace(kind="active")
    return (rebuild, tuple(key), *reduced[2:])
