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
from esper.forward.guard import run_kernel
from esper.forward.recompilation import allow_graph_of
from esper.state.host_parts import SEEDS
from esper.state.layer_call import LayerCall
from esper.state.layer_record import RECORD, record_of
from esper.state.roster import note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from esper.forward.blending import RunKernel
    from esper.state.layer_record import LayerRecord

KINDS: Final = ("dormant", "counting", "active")

_classes: dict[tuple[type, type, str], type] = {}
_derived: dict[tuple[type, type], type] = {}
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


def _native(family: Any, host_class: Any) -> Callable[..., Any]:
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
    native = _native(family, host_class)

    @functools.wraps(native)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self._kasmina.native_count += 1  # type: ignore[operator, union-attr]
        return native(self, *args, **kwargs)

    return forward


def _active(family: Any, host_class: Any) -> Callable[..., Any]:
    host_forward, complete = host_class.forward, family.complete_call
    open_run, passes_on = family.open_run, family.passes_on

    @functools.wraps(host_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if complete is not None:
            args, kwargs = complete(args, kwargs)
        record: Any = self._kasmina
        call = LayerCall(args, kwargs)
        run = run_kernel if open_run is None else open_run(record, call)
        output = host_forward(self, *args, **kwargs)
        if passes_on is not None and passes_on(output):
            if record.telemetry_enabled and not torch.compiler.is_compiling():
                record.native_count += 1
            return output
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


_FORWARDS: Final = {"dormant": _native, "counting": _counting, "active": _active}


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
    return _key_of(layer)[1]


def _key_of(layer: nn.Module) -> tuple[type, type, str]:
    return cast("tuple[type, type, str]", type(layer)._esper_key)  # type: ignore[attr-defined] # noqa: SLF001


def refusal(module: object, family: type) -> str | None:
    """Return why a module cannot become a layer of ``family``, or None if it can."""
    if not isinstance(module, nn.Module):
        return f"it is a {type(module).__name__}, not a torch.nn.Module"
    if generated_base(type(module)) is not None or RECORD in module.__dict__:
        return "it is wrapped already"
    if isinstance(module, torch.jit.ScriptModule):  # noqa: TID251 - only to refuse it
        return "it is a ScriptModule, whose class cannot change"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "it is lazy and has no parameters yet; run a forward first"
    if has_foreign_forward(module):
        return "it has a forward of its own in its __dict__, which a class cannot replace"
    clash = _names_of(family) & _names_held(module)
    if clash:
        return f"it defines names that a layer needs: {', '.join(sorted(clash))}"
    return None


def has_foreign_forward(module: nn.Module) -> bool:
    """Return whether an object has a forward of its own, which its class's would not replace.

    The bound method of its class, which accelerate leaves behind, is none: it is what a call would
    find anyway, until the class changes.
    """
    own = module.__dict__.get("forward")
    if own is None:
        return False
    bound_to = getattr(own, "__self__", None)
    of_class = getattr(own, "__func__", None) in [
        vars(c).get("forward") for c in type(module).__mro__
    ]
    return not (bound_to is module and of_class)


def _names_of(family: type) -> set[str]:
    ours = family.__mro__[: family.__mro__.index(nn.Module)]
    names = {name for cls in ours for name in vars(cls) if not name.startswith("__")}
    kept: frozenset[str] = getattr(family, "LEFT_TO_HOST", frozenset())
    return (names | {RECORD, SEEDS}) - vars(nn.Module).keys() - kept


def _names_held(module: nn.Module) -> set[str]:
    mro = type(module).__mro__
    defined = {name for cls in mro[: mro.index(nn.Module)] for name in vars(cls)}
    tables = ("_parameters", "_buffers", "_modules")
    held = {name for table in tables for name in vars(module)[table]}
    return defined | held | vars(module).keys()


def become(layer: nn.Module, kind: str) -> None:
    """Change a layer's class to another of its three; a class derived from ours follows."""
    family, host_class, current = _key_of(layer)
    if kind != current:
        _change_class(layer, generated_class(family, host_class, kind))


def take(module: nn.Module, family: type) -> None:
    """Change a host object's class to the dormant class of ``family``.

    A class that parametrizations have put on top stays there: they take it off again by its base.
    """
    module.__dict__.pop("forward", None)  # where it is there, it is the class's own
    cls = type(module)
    if not nn.utils.parametrize.is_parametrized(module):
        _set_class(module, generated_class(family, cls, "dormant"))
        return
    host_class = cls.__bases__[0]
    target = generated_class(family, host_class, "dormant")
    made = _made_like(cls, (target, *cls.__bases__[1:]))
    with _lock:
        _derived[cls, target] = made
        _derived[made, host_class] = cls
    _set_class(module, made)


def give_back(layer: nn.Module) -> None:
    """Change a layer's class to what it was, if it has changed, and drop its record."""
    if generated_base(type(layer)) is not None:
        _change_class(layer, host_class_of(layer))
    layer.__dict__.pop(RECORD, None)


def _change_class(layer: nn.Module, target: type) -> None:
    _set_class(layer, _rebased(type(layer), target))


def _set_class(module: nn.Module, cls: type) -> None:
    object.__setattr__(module, "__class__", cls)


def _rebased(cls: type, target: type) -> type:
    """Return ``cls`` with our generated class in its bases exchanged for ``target``.

    Parametrizations and FSDP2 derive a class from the one they find; theirs must survive.
    """
    if "_esper_key" in cls.__dict__:
        return target
    if generated_base(cls) is None:
        return cls
    with _lock:
        if (cls, target) not in _derived:
            bases = tuple(_rebased(base, target) for base in cls.__bases__)
            _derived[cls, target] = made = _made_like(cls, bases)
            _derived[made, cast("type", generated_base(cls))] = cls
        return _derived[cls, target]


def _made_like(cls: type, bases: tuple[type, ...]) -> type:
    body = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, body)


def replan(layer: nn.Module) -> None:
    """Make the plan from the seeds' states and alphas, and choose the layer's class by it."""
    record = record_of(layer)
    seeds = {
        i: seed
        for i, seed in record.seeds.items()
        if record.layout.contributes(i) and record.layout.alpha(i) > 0.0
    } | record.shadows
    record.plan = tuple(seeds[i] for i in sorted(seeds))
    idle = "counting" if record.telemetry_enabled else "dormant"
    become(layer, "active" if record.plan else idle)
    allow_graph_of(layer, record.plan)
    note(layer)


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


def host_view(layer: nn.Module) -> nn.Module:
    """Return an object of the host's class over the layer's own ``__dict__``."""
    view: nn.Module = object.__new__(host_class_of(layer))
    object.__setattr__(view, "__dict__", layer.__dict__)
    return view


def host_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the host's own forward, without the layer's hooks and seeds."""
    return _native(*_key_of(layer)[:2])(layer, *args, **kwargs)


def completed(layer: nn.Module, call: LayerCall) -> LayerCall:
    """Return a call with the arguments that the layer's family lets a caller leave out."""
    complete = cast("Any", _key_of(layer)[0]).complete_call
    return call if complete is None else LayerCall(*complete(call.args, call.kwargs))


def blendable(output: Any) -> Tensor:
    """Return the part of a host's output that a graft can be added to.

    Raises:
        TypeError: It is neither a floating tensor nor a tuple that begins with one.
    """
    first = output[0] if isinstance(output, tuple) and output else output
    if isinstance(first, Tensor) and first.is_floating_point():
        return first
    found = first.dtype if isinstance(first, Tensor) else type(first).__name__
    msg = f"a site gives a floating tensor, or a tuple that begins with one; this one gives {found}"
    raise TypeError(msg)


def with_first(output: tuple[Any, ...], y: Tensor) -> tuple[Any, ...]:
    """Return a tuple, or a named one, with another first element."""
    rest = (y, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else rest
