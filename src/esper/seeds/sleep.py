"""Blocks that sleep: the classes that a block of a stack may have, and how it wakes.

For a block's class there are two more, made once: *asleep*, whose forward hands the first input on
in the form of the block's output, and *waking*, whose forward is ``(1 - alpha) x + alpha B(x)``. An
awake block has its own class and nothing of ours.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from esper.contracts.owner_warning import warn_owner
from esper.forward.host_view import has_foreign_forward
from esper.forward.recompilation import allow_graph_for
from esper.seeds.sleep_form import exchanged, form_of_call, in_form, leading_tensor
from esper.state.kernel import reference_tensor
from esper.state.layer_call import declared_names
from esper.state.layer_record import RECORD

if TYPE_CHECKING:
    from collections.abc import Iterable

    from esper.seeds.sleep_form import Forms, HostForward

Kind = Literal["asleep", "waking"]
"""Which of the two classes a block has."""

FORMS: Final = "_esper_forms"
"""Entry of a block's ``__dict__`` while it sleeps or wakes: what is known of its output's form."""
ALPHA: Final = "_esper_alpha"
"""Entry of a waking block: its share, a float32 scalar on the block's device."""
UNMOVED: Final = "_esper_unmoved"
"""Entry of a waking block that was copied or unpickled: calls in training until that is told."""
PATIENCE: Final = 100
"""Such calls in which whoever goes on with a run has time to say how its blocks wake."""
_HELD: Final = "_esper_held_hooks"
"""Entry of a sleeping block under FSDP2: the hooks that would gather its parameters."""
_FOLLOWERS: Final = "_esper_followers"
"""Entry of a block: the same block of averages that follow the model."""
_KEY: Final = "_esper_sleep"

_classes: Final[dict[tuple[type, Kind], type]] = {}
_lock: Final = threading.RLock()


def sleeping_class(host_class: type[nn.Module], kind: Kind) -> type[nn.Module]:
    """Return the class of a block of ``host_class`` that sleeps or wakes; one for equal arguments.

    Args:
        host_class: The class that the block had, FSDP2's where it is sharded.
        kind: Which of the two.
    """
    with _lock:
        if (host_class, kind) not in _classes:
            _classes[host_class, kind] = _make(host_class, kind)
        return _classes[host_class, kind]


def _make(host_class: type[nn.Module], kind: Kind) -> type[nn.Module]:
    forward = (_asleep if kind == "asleep" else _waking)(host_class)
    body: dict[str, object] = {
        "__module__": host_class.__module__,
        "__doc__": f"{host_class.__qualname__}, {kind}.",
        _KEY: (host_class, kind),
        "forward": forward,
        "_apply": _apply,
        "__reduce_ex__": _reduce_ex,
        "__init_subclass__": classmethod(_refuse_sharding),
    }
    name = "Sleeping" if kind == "asleep" else "Waking"
    made: Any = type(f"{name}{host_class.__name__}", (host_class,), body)
    if kind == "asleep":
        made.forward = forward  # a base may have put checkpointing around it: there is nothing to
    return cast("type[nn.Module]", made)


def _first_of(host_class: type[nn.Module]) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Return what finds the first input among the arguments of a call."""
    name = next(iter(declared_names(host_class.forward)), "")

    def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return args[0]
        return kwargs[name] if name in kwargs else next(iter(kwargs.values()))

    return first_of


def _asleep(host_class: type[nn.Module]) -> HostForward:
    host_forward: HostForward = host_class.forward
    first_of = _first_of(host_class)

    @functools.wraps(host_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        first = first_of(args, kwargs)
        form = form_of_call(self, self._esper_forms, host_forward, first, args, kwargs)  # type: ignore[arg-type] # a Module's attribute
        return in_form(form, first, args, kwargs)

    return forward


def _waking(host_class: type[nn.Module]) -> HostForward:
    host_forward: HostForward = host_class.forward
    first_of = _first_of(host_class)

    @functools.wraps(host_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        if not torch.compiler.is_compiling() and UNMOVED in self.__dict__:
            _miss_what_moves(self)
        alpha: Tensor = self._esper_alpha  # type: ignore[assignment] # a Module's attribute
        x = leading_tensor(first_of(args, kwargs))
        kept = (1.0 - alpha) * x  # before the block, which may write to it
        output = host_forward(self, *args, **kwargs)
        return exchanged(output, lambda h: (kept + alpha * h).to(h.dtype))

    return forward


def _miss_what_moves(block: nn.Module) -> None:
    """Warn the owner of a copy that is trained, and whose alpha nothing moves."""
    if not (block.training and torch.is_grad_enabled()):
        return
    block.__dict__[UNMOVED] -= 1
    if not block.__dict__[UNMOVED]:
        del block.__dict__[UNMOVED]
        warn_owner(
            f"blocks of {block.__dict__[FORMS].name!r} stay at alpha {share_of(block):.3g}: the "
            "model was copied or unpickled while they woke, and nothing moves them in the copy; "
            "call esper.deepen(copy, optimizer, depth=...), which goes on from there, or "
            "esper.follow(model, copy) for an average"
        )


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:  # noqa: FBT001, FBT002 - torch's signature
    """Follow to another device; alpha stays float32, whatever ``fn`` does."""
    super(_class_of(self), self)._apply(fn, recurse)
    device = reference_tensor(self).device
    if ALPHA in self.__dict__ and device.type != "meta":
        self.__dict__[ALPHA] = self.__dict__[ALPHA].to(device)
    return self


def _class_of(block: nn.Module) -> Any:
    return next(cls for cls in type(block).__mro__ if _KEY in cls.__dict__)


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    """Name the class by what it was made from: nobody can import it."""
    reduced = super(_class_of(self), self).__reduce_ex__(protocol)
    key = type(self).__dict__.get(_KEY)
    if key is None or getattr(reduced[0], "__name__", "") != "__newobj__":
        return reduced
    state = reduced[2]
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if name != _FOLLOWERS}
    return (_rebuild, key, state, *reduced[3:])


def _rebuild(host_class: type[nn.Module], kind: Kind) -> nn.Module:
    """Return an empty block, for copy and pickle."""
    block: nn.Module = object.__new__(sleeping_class(host_class, kind))
    if kind == "waking":
        block.__dict__[UNMOVED] = PATIENCE
    return block


def _refuse_sharding(cls: Any, /, **kwargs: Any) -> None:
    """Refuse ``fully_shard`` of a block that sleeps: its class would stand in the way of waking."""
    sleeping: Any = next(base for base in cls.__mro__ if _KEY in base.__dict__)
    super(sleeping, cls).__init_subclass__(**kwargs)
    if any(base.__name__ == "FSDPModule" for base in cls.__bases__):
        msg = (
            f"{cls.__bases__[-1].__name__} was put to sleep before fully_shard: call "
            "esper.shallow after it"
        )
        raise ValueError(msg)


def kind_of_sleep(block: nn.Module) -> Kind | None:
    """Return whether a block sleeps or wakes; None where it is awake."""
    key = getattr(type(block), _KEY, None)
    return None if key is None else key[1]


def share_of(block: nn.Module) -> float:
    """Return a block's alpha: 0 asleep, 1 awake."""
    kind = kind_of_sleep(block)
    if kind is None:
        return 1.0
    return 0.0 if kind == "asleep" else float(block.__dict__[ALPHA])


def cannot_sleep(block: nn.Module) -> str | None:
    """Return why a block cannot be put to sleep, or None."""
    if isinstance(block, torch.jit.ScriptModule):  # noqa: TID251 - only to refuse it
        return "it is a ScriptModule, whose class cannot change"
    if RECORD in block.__dict__:
        return "it is a layer with seeds itself; wrap the layers inside it (select=)"
    if has_foreign_forward(block):
        return "it has a forward of its own in its __dict__, which a class cannot replace"
    if parametrize.is_parametrized(block):
        return "it is parametrized itself; remove that first"
    lazy = nn.modules.lazy.LazyModuleMixin
    if any(isinstance(m, lazy) and m.has_uninitialized_params() for m in block.modules()):
        return "it is lazy and has no parameters yet; run a forward first"
    return None


def put_to_sleep(block: nn.Module, forms: Forms) -> None:
    """Let a block sleep: its class changes, and its parameters have no gradient any more.

    Args:
        block: The block, awake or waking.
        forms: What the blocks of its stack and class know of their output.
    """
    block.__dict__[FORMS] = forms
    for entry in (ALPHA, UNMOVED):
        block.__dict__.pop(entry, None)
    _change_class(block, "asleep")
    _hold_hooks_off(block)
    for p in block.parameters():
        p.grad = None
    for follower in _followers(block):
        put_to_sleep(follower, forms)


def set_share(block: nn.Module, alpha: float) -> None:
    """Set how far a block has come: at 0 it sleeps, at 1 it is awake and has its class back.

    Args:
        block: A block that sleeps or wakes.
        alpha: Its share, in [0, 1].

    Raises:
        ValueError: Others have derived a class from the sleeping one, or replaced its forward.
    """
    followers = _followers(block)
    if alpha <= 0.0:
        put_to_sleep(block, block.__dict__[FORMS])
        return
    check_can_wake(block)
    _put_hooks_back(block)
    block.__dict__.pop(UNMOVED, None)
    if alpha < 1.0:
        with torch.inference_mode(mode=False):  # autograd may save it
            device = reference_tensor(block).device
            block.__dict__[ALPHA] = torch.tensor(alpha, dtype=torch.float32, device=device)
        _change_class(block, "waking")
    else:
        host_class = getattr(type(block), _KEY)[0]
        for entry in (FORMS, ALPHA, _FOLLOWERS, "forward"):
            block.__dict__.pop(entry, None)
        object.__setattr__(block, "__class__", host_class)
    for follower in followers:
        set_share(follower, alpha)


def follow_sleep(block: nn.Module, follower: nn.Module) -> None:
    """Let the same block of an average sleep and wake as a block does; it is held weakly."""
    kept = [ref for ref in block.__dict__.get(_FOLLOWERS, ()) if ref() is not follower]
    block.__dict__[_FOLLOWERS] = [*kept, weakref.ref(follower)]


def copies_of(block: nn.Module) -> list[nn.Module]:
    """Return a block's counterparts in the averages that follow its model."""
    return _followers(block)


def _followers(block: nn.Module) -> list[nn.Module]:
    found = (ref() for ref in block.__dict__.get(_FOLLOWERS, ()))
    return [f for f in found if f is not None and kind_of_sleep(f) is not None]


def _change_class(block: nn.Module, kind: Kind) -> None:
    key = getattr(type(block), _KEY, None)
    host_class = cast("type[nn.Module]", type(block) if key is None else key[0])
    block.__dict__.pop("forward", None)  # where it is there, it is the class's own
    object.__setattr__(block, "__class__", sleeping_class(host_class, kind))


_arrangement: Final[weakref.WeakKeyDictionary[nn.Module, Kind]] = weakref.WeakKeyDictionary()
"""What sleeps or wakes in this process; each arrangement is a graph of its own."""


def allow_graphs(blocks: Iterable[nn.Module]) -> None:
    """Make room for a compiled graph where what sleeps and wakes is arranged as never before.

    Args:
        blocks: Those that have changed their class.
    """
    with _lock:
        for block in blocks:
            _arrangement.pop(block, None)
            kind = kind_of_sleep(block)
            if kind is not None:
                _arrangement[block] = kind
        allow_graph_for(frozenset((id(block), kind) for block, kind in _arrangement.items()))


def check_can_wake(block: nn.Module) -> None:
    """Refuse to wake a block whose class or forward is not ours to change any more.

    Raises:
        ValueError: Others have derived a class from the sleeping one, or replaced its forward.
    """
    name = type(block).__name__
    if _KEY not in type(block).__dict__:
        msg = (
            f"a sleeping block has got the class {name}, derived from the one that it sleeps in "
            "(by a parametrization, say): take that off, wake the block, and put it on again"
        )
        raise ValueError(msg)
    if has_foreign_forward(block):
        msg = (
            f"a sleeping block ({name}) has got a forward of its own in its __dict__ (accelerate's "
            "hooks do so), so that it would sleep on: remove it before the block wakes"
        )
        raise ValueError(msg)


def _hold_hooks_off(block: nn.Module) -> None:
    """Take off what FSDP2 does around a forward: its parameters would be gathered for nothing."""
    get_state = getattr(block, "_get_fsdp_state", None)
    if get_state is None or _HELD in block.__dict__:
        return
    state = get_state()
    if len(state._modules) > 1:  # noqa: SLF001 - sharded in one group with others, which count on it
        return
    pre, post = state._pre_forward_hook_handle.id, state._post_forward_hook_handle.id  # noqa: SLF001 - nobody tells otherwise
    ids = list(block._forward_hooks)  # noqa: SLF001 - in the order in which they are called
    behind = ids[ids.index(post) + 1 :]
    held = (
        (pre, block._forward_pre_hooks.pop(pre)),  # noqa: SLF001 - as above
        (post, block._forward_hooks.pop(post)),  # noqa: SLF001 - as above
        behind,
    )
    block.__dict__[_HELD] = held


def _put_hooks_back(block: nn.Module) -> None:
    held = block.__dict__.pop(_HELD, None)
    if held is None:
        return
    (pre, before), (post, after), behind = held
    hooks_before: Any = block._forward_pre_hooks  # noqa: SLF001 - as above
    hooks_behind: Any = block._forward_hooks  # noqa: SLF001 - as above
    hooks_before[pre] = before
    hooks_before.move_to_end(pre, last=False)
    hooks_behind[post] = after
    for other in behind:
        if other in hooks_behind:
            hooks_behind.move_to_end(other)
