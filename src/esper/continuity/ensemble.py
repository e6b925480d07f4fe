"""Optimizers as they are handed over, one or several, wrapped or not, and as Esper takes them."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, Final, TypeGuard

from torch import Tensor
from torch.optim import LBFGS, Muon, Optimizer, SparseAdam

_Inner = Callable[[Any], Optimizer]

_REGISTERED: Final[dict[type, _Inner]] = {}
"""How to get at the optimizer in an object of a class that does not keep to torch's interface."""

ParamGroup = dict[str, Any]
"""A parameter group, as torch optimizers keep it: settings of many types by name."""

State = MutableMapping[Tensor, dict[str, Any]]
"""What an optimizer knows of its parameters."""

_OF_ONE_OBJECT: Final = ("step", "param_groups", "state", "defaults")
"""Entries of an optimizer's ``__dict__`` that are its own; schedulers put a ``step`` there."""


class Ensemble:
    """Several optimizers that together train one model, seen as one.

    Args:
        members: The optimizers, no two of which hold the same parameter.

    Raises:
        ValueError: Two of them hold the same parameter, or one was given twice.
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self.members = tuple(members)
        held = [id(p) for group in self.param_groups for p in group["params"]]
        twice = len(held) - len(set(held))
        if twice or len(set(map(id, members))) < len(members):
            msg = (
                f"{len(members)} optimizers were given, and {twice} parameters are in two of them; "
                "each trains what no other does: give each optimizer once, and split the "
                "parameters between them"
            )
            raise ValueError(msg)

    @property
    def param_groups(self) -> list[ParamGroup]:
        """The groups of all members, in their order; they are the members' own."""
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> State:
        """The state of all members, which writes go through to."""
        return _JointState(self.members)

    def step(self) -> None:
        """Let every member step."""
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        """Let every member drop the gradients of its parameters."""
        for member in self.members:
            member.zero_grad()


AnyOptimizer = Optimizer | Ensemble
"""What trains a model: one optimizer, or several seen as one."""


class _JointState(State):
    """The states of several optimizers; an entry belongs to the one that holds its parameter."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self._members = members

    def __getitem__(self, p: Tensor) -> dict[str, Any]:
        for member in self._members:
            if p in member.state:
                found: dict[str, Any] = member.state[p]
                return found
        raise KeyError(p)

    def __setitem__(self, p: Tensor, value: dict[str, Any]) -> None:
        for member in self._members:
            if any(q is p for group in member.param_groups for q in group["params"]):
                member.state[p] = value
                return
        raise KeyError(p)

    def __delitem__(self, p: Tensor) -> None:
        for member in self._members:
            if p in member.state:
                del member.state[p]
                return
        raise KeyError(p)

    def __iter__(self) -> Iterator[Tensor]:
        return (p for member in self._members for p in member.state)

    def __len__(self) -> int:
        return sum(len(member.state) for member in self._members)


def joined(optimizer: Optimizer | Sequence[Optimizer] | Ensemble) -> AnyOptimizer:
    """Return what was handed over as one optimizer, out of its wrappers.

    Args:
        optimizer: An optimizer, a sequence of them, or what this has returned before; each may be
            in a wrapper whose ``optimizer`` it is, such as accelerate's.

    Raises:
        TypeError: One is not supported, or is no optimizer.
        ValueError: None was given, or two of them hold the same parameter.
    """
    if isinstance(optimizer, Ensemble):
        return optimizer
    if not isinstance(optimizer, Sequence):
        return _bare(optimizer)
    if not optimizer:
        msg = "an empty sequence of optimizers; give those that train the model"
        raise ValueError(msg)
    members = [_bare(member) for member in optimizer]
    return members[0] if len(members) == 1 else Ensemble(members)


def register_optimizer(cls: type, inner: Callable[[Any], Optimizer]) -> None:
    """Say how to get at the optimizer that does the work in objects of a class.

    Wrappers that have it as their attribute ``optimizer`` (accelerate's) need no registration.

    Args:
        cls: A class of which optimizers will be handed over; classes that derive from it, too.
        inner: From such an object to the ``torch.optim.Optimizer`` that holds groups and state.
    """
    _REGISTERED[cls] = inner


def _bare(optimizer: object) -> Optimizer:
    """Return the optimizer inside wrappers.

    Raises:
        TypeError: There is none that is supported.
    """
    found, passed = optimizer, [optimizer]
    while (inner := _inside(found)) is not None and all(inner is not one for one in passed):
        found = inner
        passed.append(inner)
    if is_supported(found):
        return found
    raise TypeError(_unsupported(found))


def _inside(wrapper: object) -> object:
    """Return what a wrapper wraps; None where it is none."""
    for cls in type(wrapper).__mro__:
        if cls in _REGISTERED:
            return _REGISTERED[cls](wrapper)
    return getattr(wrapper, "optimizer", None)


def is_supported(found: object) -> TypeGuard[Optimizer]:
    """Say whether a model can grow under something: torch's interface, parameter by parameter."""
    return (
        isinstance(found, Optimizer)
        and not isinstance(found, LBFGS)
        and isinstance(getattr(found, "state", None), dict)
        and "_optimizer_state_dict_pre_hooks" in found.__dict__  # else it is one by name alone
        and all("lr" in group for group in found.param_groups)
    )


def _unsupported(optimizer: object) -> str:
    cls = type(optimizer)
    begin = f"cannot grow under {cls.__module__}.{cls.__qualname__}: "
    if isinstance(optimizer, LBFGS):
        return begin + (
            "it keeps one state for all parameters together, which none can join or leave; train "
            "with any other optimizer of torch.optim"
        )
    return begin + (
        "expected a torch.optim.Optimizer with a state for each parameter and a learning rate "
        "('lr') in each group, or a wrapper that has one as its optimizer; where it is elsewhere, "
        "esper.register_optimizer says where"
    )


def members_of(optimizer: AnyOptimizer) -> tuple[Optimizer, ...]:
    """Return the optimizers that one stands for."""
    return optimizer.members if isinstance(optimizer, Ensemble) else (optimizer,)


def own_groups(optimizer: AnyOptimizer) -> list[tuple[Optimizer, int]]:
    """Return whose each param group is, and its number there, in the order of the groups."""
    return [
        (member, number)
        for member in members_of(optimizer)
        for number in range(len(member.param_groups))
    ]


def takes(optimizer: Optimizer, p: Tensor) -> bool:
    """Say whether an optimizer can train a kernel's parameter, whose gradients are dense.

    Muon takes matrices alone, and SparseAdam sparse gradients alone.
    """
    return not isinstance(optimizer, SparseAdam) and (
        p.ndim == 2 or not isinstance(optimizer, Muon)
    )


def rebuilt(optimizer: AnyOptimizer, params: Sequence[Sequence[Tensor]]) -> AnyOptimizer:
    """Return an optimizer of the same class and settings for other parameters, without state.

    No constructor is called, since that of a class derived from torch's may take anything. Hooks
    and what a scheduler has put on the optimizer stay behind.

    Args:
        optimizer: The model for it; it is only read.
        params: For each of its groups, in order, the parameters that take their place.
    """
    if not isinstance(optimizer, Ensemble):
        return _rebuilt(optimizer, params)
    rest = iter(params)
    return Ensemble([_rebuilt(m, [next(rest) for _ in m.param_groups]) for m in optimizer.members])


def _rebuilt(optimizer: Optimizer, params: Sequence[Sequence[Tensor]]) -> Optimizer:
    made = type(optimizer).__new__(type(optimizer))
    for name, value in optimizer.__dict__.items():
        if name not in _OF_ONE_OBJECT and not name.startswith("_optimizer_"):  # those are hooks
            kept = copy.copy(value) if isinstance(value, (dict, list, set)) else value
            made.__dict__[name] = kept
    groups = [
        {**settings_of(group), "params": list(own)}
        for group, own in zip(optimizer.param_groups, params, strict=True)
    ]
    made.__setstate__(
        {"defaults": dict(optimizer.defaults), "state": defaultdict(dict), "param_groups": groups}
    )
    return made


def settings_of(group: ParamGroup) -> ParamGroup:
    """Return a group's settings; a rate in a tensor is copied, since schedulers write into it."""
    own = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()}
