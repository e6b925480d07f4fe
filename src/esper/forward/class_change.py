"""How a host object becomes a layer, follows its seeds, and gets its class back."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from esper.forward.generated_class import generated_base, generated_class, host_class_of, key_of
from esper.forward.host_view import has_foreign_forward
from esper.forward.recompilation import allow_graph_of
from esper.forward.seed_groups import grouping_of
from esper.state.host_parts import SEEDS
from esper.state.layer_record import RECORD, record_of
from esper.state.roster import update_roster
from esper.state.seed_group import Grouping

if TYPE_CHECKING:
    from esper.forward.generated_class import Kind, LayerClass
    from esper.state.layer_record import LayerRecord


_derived: dict[tuple[type, type], type] = {}
_lock = threading.RLock()


def refusal(module: object, family: type) -> str | None:
    """Return why a module cannot become a layer of ``family``, or None if it can."""
    if not isinstance(module, nn.Module):
        return f"it is a {type(module).__name__}, not a torch.nn.Module"
    if generated_base(type(module)) is not None or RECORD in module.__dict__:
        return "it is wrapped already"
    if hasattr(type(module), "_esper_sleep"):
        return "it sleeps; the layers inside it can be wrapped, and it can once it is awake"
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


def become(layer: nn.Module, kind: Kind) -> None:
    """Change a layer's class to another of its four; a class derived from ours follows."""
    key = key_of(layer)
    if kind != key.kind:
        _change_class(layer, generated_class(key.family, key.host_class, kind))


def adopt_class(module: nn.Module, family: LayerClass) -> None:
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


def return_class(layer: nn.Module) -> None:
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


def choose_forward(layer: nn.Module) -> None:
    """Make the plan from the seeds' states and alphas, and choose the layer's class by it."""
    record = record_of(layer)
    seeds = {
        i: seed
        for i, seed in record.seeds.items()
        if record.layout.contributes(i) and record.layout.alpha(i) > 0.0
    } | record.shadows
    record.plan = tuple(seeds[i] for i in sorted(seeds))
    record.grouping = _grouping(layer, record)
    record.watched = tuple(
        seed.slot
        for i, seed in record.seeds.items()
        if i not in seeds and record.layout.contributes(i)
    )
    become(layer, _kind_for(record))
    allow_graph_of(
        layer,
        record.plan,
        is_noting=record.note is not None,
        is_watched=bool(record.watched),
    )
    update_roster(layer)
    record.changed()


def _grouping(layer: nn.Module, record: LayerRecord) -> Grouping:
    """Return how a plan is run: one by one where kernels run elsewhere, are named or are timed."""
    runs_elsewhere = key_of(layer).family.open_run is not None
    if runs_elsewhere or record.num_naming or record.telemetry_enabled:
        return Grouping(others=record.plan)
    return grouping_of(record.plan)


def _kind_for(record: LayerRecord) -> Kind:
    if record.note is not None:
        return "noting"
    if record.plan:
        if record.num_naming:
            return "profiled"
        return "fused" if record.grouping is not None and record.grouping.groups else "active"
    if record.watched:
        return "watching"
    return "counting" if record.telemetry_enabled else "dormant"
