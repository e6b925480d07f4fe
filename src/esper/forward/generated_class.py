"""Classes made for a host class: how a host object becomes a layer, and gets its class back.

For a host class and a family (KasminaLayer or a subclass of it) there are three classes, made
once: *dormant*, whose forward is the host class's own function; *counting*, the same with a
counter, for telemetry; *active*, whose forward follows the plan. A transition changes
``__class__`` of the host object.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

from esper.forward.blending import blend
from esper.forward.fence import run_kernel
from esper.forward.host_output import blendable, with_first
from esper.state.host_parts import SEEDS
from esper.state.layer_call import LayerCall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from esper.forward.blending import RunKernel
    from esper.state.layer_record import LayerRecord


KINDS: Final = ("dormant", "counting", "active")


_classes: dict[tuple[type, type, str], type] = {}


_lock = threading.RLock()


def generated_class(family: type, host_class: type, kind: str) -> type:
    """Return the class of a family's layers over ``host_class``; one object for equal arguments.

    Args:
        family: ``KasminaLayer`` or a subclass of it.
        host_class: Class of the host object, which the result derives from.
        kind: ``"dormant"``, ``"counting"`` or ``"active"``.
    """
    key = (family, host_class, kind)
    with _lock:
        if key not in _classes:
            _classes[key] = _make(family, host_class, kind)
        return _classes[key]


def _make(family: type, host_class: type, kind: str) -> type:
    body: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"{host_class.__qualname__} with seeds; {kind}.",
        "_esper_key": (family, host_class, kind),
        "forward": _FORWARDS[kind](family, host_class),
    }
    if issubclass(host_class, nn.Sequential):
        body.update(_hiding_seeds(host_class))
    return type(f"Kasmina{host_class.__name__}", (family, host_class), body)


def native_forward(family: Any, host_class: Any) -> Callable[..., Any]:
    """Return the host's forward; where the family lets arguments be left out, after filling in."""
    host_forward = cast("Callable[..., Any]", host_class.forward)
    complete = family.complete_call
    if complete is None:
        return host_forward

    @functools.wraps(host_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = complete(args, kwargs)
        return host_forward(self, *args, **kwargs)

    return forward


def _counting(family: Any, host_class: Any) -> Callable[..., Any]:
    native = native_forward(family, host_class)

    @functools.wraps(native)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self._kasmina.native_count += 1  # type: ignore[operator, union-attr]
        return native(self, *args, **kwargs)

    return forward


def _active(family: Any, host_class: Any) -> Callable[..., Any]:
    host_forward, complete = host_class.forward, family.complete_call
    open_run = family.open_run

    @functools.wraps(host_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if complete is not None:
            args, kwargs = complete(args, kwargs)
        record: Any = self._kasmina
        call = LayerCall(args, kwargs)
        run = run_kernel if open_run is None else open_run(record, call)
        output = host_forward(self, *args, **kwargs)
        h = blendable(output)
        y = _blend_nested(record, call, h, run) if h.is_nested else blend(record, call, h, run)
        return y if isinstance(output, Tensor) else with_first(output, y)

    return forward


def _blend_nested(record: LayerRecord, call: LayerCall, h: Tensor, run: RunKernel) -> Tensor:
    """Blend padded tensors, which kernels are made for, and give the padding up again.

    ``nn.TransformerEncoder`` makes nested ones in evaluation, where no gradient is wanted.
    """
    padded = call.with_tensors(lambda t: t.to_padded_tensor(0.0) if t.is_nested else t)
    y = blend(record, padded, h.to_padded_tensor(0.0), run)
    sizes = (tuple(slice(n) for n in part.shape) for part in h.unbind())
    return torch.nested.nested_tensor([row[size] for row, size in zip(y, sizes, strict=True)])


_FORWARDS: Final = {"dormant": native_forward, "counting": _counting, "active": _active}


def _hiding_seeds(host_class: type[nn.Sequential]) -> dict[str, Any]:
    """Return methods that keep a container's slots out of its items."""

    def items(self: nn.Sequential) -> OrderedDict[str, nn.Module]:
        own = ((k, m) for k, m in self._modules.items() if k != SEEDS and m is not None)
        return OrderedDict(own)

    def __iter__(self: nn.Sequential) -> Iterator[nn.Module]:  # noqa: N807
        return iter(items(self).values())

    def __len__(self: nn.Sequential) -> int:  # noqa: N807
        return len(items(self))

    def __getitem__(self: nn.Sequential, index: Any) -> Any:  # noqa: N807
        return host_class(items(self))[index]

    return {f.__name__: f for f in (__iter__, __len__, __getitem__)}


def generated_base(cls: type) -> type | None:
    """Return the generated class that ``cls`` is or derives from, or None."""
    return next((base for base in cls.__mro__ if "_esper_key" in base.__dict__), None)


def host_class_of(layer: nn.Module) -> type:
    """Return the class that a layer had before it was wrapped."""
    return key_of(layer)[1]


def key_of(layer: nn.Module) -> tuple[type, type, str]:
    """Return family, host class and kind of a layer's class."""
    return cast("tuple[type, type, str]", type(layer)._esper_key)  # type: ignore[attr-defined] # noqa: SLF001


def rebuild(family: type, host_class: type, kind: str) -> nn.Module:
    """Return an empty object of a generated class, for copy and pickle."""
    layer: nn.Module = object.__new__(generated_class(family, host_class, kind))
    return layer


def reduce_layer(reduced: tuple[Any, ...], cls: type) -> tuple[Any, ...]:
    """Return the reduction of a layer from that of its host, which names a class made here.

    Args:
        reduced: What ``object.__reduce_ex__`` or the host's own gave.
        cls: Class of the layer.
    """
    key = cls.__dict__.get("_esper_key")
    if key is None or getattr(reduced[0], "__name__", "") != "__newobj__":
        return reduced
    return (rebuild, key, *reduced[2:])
