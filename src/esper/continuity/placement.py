"""Whose parameter, whose optimizer: the group that each parameter of a kernel belongs to.

A kernel is trained by what trains its host, kind by kind: its weights where the host's weights
are, its biases and norms where the host's are. What the host does not have of a kind is decided by
its nearest neighbour in the model that does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from esper.continuity.ensemble import members_of, own_groups, takes
from esper.state.host_parts import SEEDS_PREFIX, is_in_a_seed
from esper.state.layer_record import record_of

if TYPE_CHECKING:
    from esper.continuity.ensemble import AnyOptimizer, ParamGroup

GroupFor = Callable[[str, nn.Parameter], "ParamGroup | int | None"]
"""``(name, parameter)`` to the param group that takes a kernel's parameter, or its number."""

Kind = Literal["weight", "bias or norm"]

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


class Place(NamedTuple):
    """Where one parameter of a kernel goes.

    Attributes:
        group: Number of the param group, over the groups of all optimizers in order.
        name: The parameter's name in the model.
        parameter: The parameter.
    """

    group: int
    name: str
    parameter: nn.Parameter


class _Known(NamedTuple):
    """A host parameter, the number of its group (None: nobody's here), and its module's place."""

    name: str
    kind: Kind
    parameter: nn.Parameter
    group: int | None
    position: int


class Placement:
    """The parameters of a model and its optimizer, as they are now.

    Args:
        model: The model, outside of DDP and ``torch.compile``.
        optimizer: What trains it.
        group_for: The owner's choice, which comes first; None where there is none.

    Attributes:
        model: As given, like the next.
        optimizer: What trains it.
        prefix: What names in its groups have before the model's: DDP's, or their owner's.
    """

    def __init__(
        self, model: nn.Module, optimizer: AnyOptimizer, group_for: GroupFor | None = None
    ) -> None:
        named = list(model.named_modules())
        self._names = {id(module): name for name, module in named}
        self._positions = {id(module): i for i, (_, module) in enumerate(named)}
        self.model, self.optimizer, self._group_for = model, optimizer, group_for
        self._owners = [owner for owner, _ in own_groups(optimizer)]
        groups = optimizer.param_groups
        self._held = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        self._hosts = [
            _Known(name, kind, p, self._held.get(id(p)), self._positions[id(owner)])
            for name, kind, p, owner in _host_parts(model)
        ]
        self._by_id = {id(known.parameter): known for known in self._hosts}
        self.prefix = _prefix_of_names(groups, self._by_id)

    def is_hosts(self, p: Tensor) -> bool:
        """Say whether a parameter is the host's, be it tied into a kernel or not."""
        return id(p) in self._by_id

    def holds(self, p: Tensor) -> bool:
        """Say whether a parameter is in a group."""
        return id(p) in self._held

    def hold(self, places: Iterable[Place]) -> None:
        """Take over that parameters were appended."""
        self._held.update({id(place.parameter): place.group for place in places})

    def untrained(self, layer: nn.Module) -> list[str]:
        """Return the names of a layer's own parameters that are trainable, and in no group."""
        own = self._own(layer)
        return [k.name for k in own if k.parameter.requires_grad and k.group is None]

    def _own(self, layer: nn.Module) -> list[_Known]:
        """Return a layer's own parameters; those of a layer in a kernel are no model's host."""
        return [
            self._by_id.get(id(p))
            or _Known(name, kind, p, self._held.get(id(p)), self._positions[id(layer)])
            for name, kind, p, _ in _host_parts(layer)
        ]

    def name_in_model(self, layer: nn.Module, name: str) -> str:
        """Return the name in the model of what has a name below a layer."""
        return ".".join(filter(None, (self._names[id(layer)], name)))

    def try_choice(self, layer: nn.Module) -> None:
        """Ask the owner for the groups of a kernel made like the layer.

        Raises:
            ValueError: ``group_for`` returned what is no group of the optimizer, nor its number.
        """
        for below, _, p, _ in _parts(layer):
            if not is_in_a_seed(below):
                self._chosen(self.name_in_model(layer, f"{SEEDS_PREFIX}0.kernel.{below}"), p)

    def places(
        self, layer: nn.Module, seed_idx: int, kernel: nn.Module
    ) -> tuple[list[Place], list[str]]:
        """Decide where the trainable parameters of a kernel go.

        Args:
            layer: The layer in whose seed it stands, or is to stand.
            seed_idx: Index of the seed.
            kernel: The kernel.

        Returns:
            Their places, and the names of those that are trained by nobody here: their host is
            trained by another optimizer, or by none though it is trainable. A parameter that is
            the host's or in a group already is in neither.

        Raises:
            ValueError: ``group_for`` returned what is no group of the optimizer, nor its number.
        """
        places, left = [], []
        for below, kind, p, _ in _parts(kernel):
            if not p.requires_grad or self.is_hosts(p) or self.holds(p):
                continue
            name = self.name_in_model(layer, f"{SEEDS_PREFIX}{seed_idx}.kernel.{below}")
            group = self._chosen(name, p)
            group = self._group_of(layer, kind, p) if group is None else group
            if group is None:
                left.append(name)
            else:
                places.append(Place(group, self.prefix + name, p))
        return places, left

    def _chosen(self, name: str, p: nn.Parameter) -> int | None:
        """Return the owner's choice as a number; None where the owner leaves it to the rule."""
        choice = None if self._group_for is None else self._group_for(name, p)
        if choice is None:
            return None
        groups = self.optimizer.param_groups
        numbers = [i for i, group in enumerate(groups) if group is choice or i == choice]
        if not numbers:
            found = "a group of another optimizer" if isinstance(choice, dict) else repr(choice)
            msg = (
                f"group_for({name!r}, ...) returned {found}; expected one of the optimizer's "
                f"param_groups, or its number from 0 to {len(groups) - 1}, or None"
            )
            raise ValueError(msg)
        return numbers[0]

    def _group_of(self, layer: nn.Module, kind: Kind, p: nn.Parameter) -> int | None:
        """Return the group that follows from the host; None where the host is trained elsewhere."""
        own = [k for k in self._own(layer) if k.parameter.requires_grad or k.group is not None]
        same = [k for k in own if k.kind == kind]
        decisive = same or own or self._nearest(layer, self._trainable())
        held = [k.group for k in decisive if k.group is not None]
        if decisive and not held:
            return None
        if not held:
            return self._any_that_takes(p)
        return (
            held[0] if same and self._takes(held[0], p) else self._beside(layer, held[0], kind, p)
        )

    def _beside(self, layer: nn.Module, base: int, kind: Kind, p: nn.Parameter) -> int | None:
        """Return the group for a kind that the host does not have, given one that trains it."""
        there = [k for k in self._hosts if k.group is not None and self._takes(k.group, p)]
        kin = [k for k in there if k.kind == kind]
        of_owner = [k for k in kin if self._is_at(k, base)]
        near = self._nearest(layer, kin)
        if of_owner and not any(self._is_at(k, base) for k in near):
            return near[0].group  # a block's weights are Muon's where AdamW has the embedding's
        if any(k.group == base for k in of_owner):
            return base
        near = self._nearest(layer, of_owner or [k for k in kin if self._complements(k, base)])
        if near:
            return near[0].group
        if self._takes(base, p):
            return base
        near = self._nearest(layer, kin) or self._nearest(layer, there)
        return near[0].group if near else self._any_that_takes(p)

    def _complements(self, known: _Known, base: int) -> bool:
        """Say whether a parameter's optimizer trains nothing of the kinds that the base's trains.

        So it is where parameters are split by kind (Muon beside AdamW), and not where two
        optimizers train a part of the model each.
        """
        own = {k.kind for k in self._hosts if k.group is not None and self._is_at(k, base)}
        its = {k.kind for k in self._hosts if k.group is not None and self._is_at(k, known.group)}
        return not own & its

    def _is_at(self, known: _Known, group: int | None) -> bool:
        return group is not None and self._owner(known) is self._owners[group]

    def _owner(self, known: _Known) -> object:
        return None if known.group is None else self._owners[known.group]

    def _trainable(self) -> list[_Known]:
        return [k for k in self._hosts if k.parameter.requires_grad]

    def _nearest(self, layer: nn.Module, among: Sequence[_Known]) -> list[_Known]:
        """Return those that share the longest part of their names with a layer, nearest first."""
        path, here = self._names[id(layer)].split("."), self._positions[id(layer)]
        shared = [_num_shared(path, k.name.split(".")) for k in among]
        longest = max(shared, default=0)
        near = [k for k, num in zip(among, shared, strict=True) if num == longest]
        return sorted(near, key=lambda k: abs(k.position - here))

    def _takes(self, group: int | None, p: nn.Parameter) -> bool:
        return group is not None and takes(self._owners[group], p)

    def _any_that_takes(self, p: nn.Parameter) -> int | None:
        return next((i for i, owner in enumerate(self._owners) if takes(owner, p)), None)


def numbered(group_for: GroupFor | None, optimizer: AnyOptimizer) -> GroupFor | None:
    """Return an owner's choice that names groups by number, so that it holds for copies, too."""
    if group_for is None:
        return None

    def number(name: str, p: nn.Parameter) -> ParamGroup | int | None:
        choice = group_for(name, p)
        found = [i for i, group in enumerate(optimizer.param_groups) if group is choice]
        return found[0] if found else choice

    return number


def check_trains(placement: Placement, kernels: Iterable[int]) -> None:
    """Refuse an optimizer that trains another model.

    Args:
        placement: The model's parameters in it.
        kernels: Ids of kernels' parameters, which are the model's as well.

    Raises:
        ValueError: One of the optimizers holds parameters, and none of them is the model's.
    """
    ours = set(kernels)
    for member in members_of(placement.optimizer):
        held = [p for group in member.param_groups for p in group["params"]]
        if held and not any(placement.is_hosts(p) or id(p) in ours for p in held):
            msg = (
                f"the optimizer ({type(member).__name__}) holds {len(held)} parameters, and none "
                "of them is the model's; give the optimizer that trains this model, built from "
                "its parameters as they are now"
            )
            raise ValueError(msg)


def seeded_kernels(layer: nn.Module) -> list[tuple[int, nn.Module]]:
    """Return index and kernel of the seeds of a layer that hold one, isolated ones among them."""
    return [(i, seed.slot.kernel) for i, seed in sorted(record_of(layer).seeds.items())]


_Part = tuple[str, Kind, nn.Parameter, nn.Module]
"""A parameter's name, its kind, itself, and the module that holds it."""


def _host_parts(model: nn.Module) -> list[_Part]:
    """Return what a model holds outside of seeds; what is tied into a seed is its host's."""
    return [part for part in _parts(model) if not is_in_a_seed(part[0])]


def _parts(module: nn.Module) -> list[_Part]:
    """Return all parameters that a module holds, each once, under its name outside of seeds."""
    found: dict[int, _Part] = {}
    for path, owner in module.named_modules():
        for name, p in owner.named_parameters(recurse=False):
            part = (f"{path}.{name}" if path else name, _kind(owner, name, p), p, owner)
            if id(p) not in found or is_in_a_seed(found[id(p)][0]):
                found[id(p)] = part
    return list(found.values())


def _kind(owner: nn.Module, name: str, p: nn.Parameter) -> Kind:
    """Return what weight decay and Muon tell apart."""
    is_vector = p.ndim <= 1 or name == "bias" or isinstance(owner, _NORMS)
    return "bias or norm" if is_vector else "weight"


def _num_shared(path: Sequence[str], other: Sequence[str]) -> int:
    pairs = zip(path, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(path), len(other)))


def _prefix_of_names(groups: Iterable[ParamGroup], known: dict[int, _Known]) -> str:
    """Return what an optimizer that was given DDP's names has before the model's: ``module.``."""
    for group in groups:
        for p, name in zip(group["params"], group.get("param_names", ()), strict=False):
            host = known.get(id(p))
            if host is not None and str(name).endswith(host.name):
                return str(name).removesuffix(host.name)
    return ""
