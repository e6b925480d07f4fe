"""An optimizer's ``state_dict`` by names: in the model's order, and loaded name by name.

torch saves and loads the state of parameters by their position. Kernels that appear in a run are
behind everything else in their group, and in the model's order in an optimizer that is made after
them: by position, one would get the moments of another.
"""

from __future__ import annotations

import logging
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from torch.optim import Optimizer

from esper.continuity.ensemble import members_of
from esper.continuity.replicas import bare
from esper.state.host_parts import SEEDS, SEEDS_PREFIX
from esper.state.layer_record import RECORD, record_of
from esper.state.shards import is_spread, spread_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import nn

    from esper.continuity.ensemble import AnyOptimizer, ParamGroup

    TakeIn = Callable[[nn.Module, Optimizer], None]
    """Lets an optimizer have the parameters of the kernels that a model has."""

NAMES: Final = "param_names"
"""Where torch keeps the names of a group's parameters."""
NAMED_BY_US: Final = "named_for_loading"
"""Marks groups of a ``state_dict`` whose optimizer has no names of its own."""
ASIDE: Final = "names_aside"
"""Names in a group of kernels that are in no state of the model: out of use, or gone since."""
_GONE: Final = "gone from the model"
_OTHERS: Final = "no part of the model"
"""Names, with a number, of what a group holds beside the model's parameters; no module's is so."""

_WRAPPERS: Final = ("module", "_orig_mod")
"""Parts of names that DistributedDataParallel and ``torch.compile`` put there."""

_LIKE_ITS_PARAMETER: Final = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum")
"""What torch's optimizers keep in a parameter's shape."""

_logger = logging.getLogger(__name__)


def order_by_model(model: nn.Module, optimizer: AnyOptimizer, kernels: set[int]) -> None:
    """Put kernels' parameters where an optimizer made now would have them; the others stay.

    Args:
        model: The model.
        optimizer: What trains it; the lists of its groups are changed in place.
        kernels: Ids of the parameters that appeared in the run.
    """
    position = {key: i for i, key in enumerate(names_of(model))}
    for group in optimizer.param_groups:
        params = group["params"]
        moving = [i for i, p in enumerate(params) if id(p) in kernels and id(p) in position]
        if not moving:
            continue
        order = [i for i in range(len(params)) if i not in set(moving)]
        for i in sorted(moving, key=lambda i: position[id(params[i])]):
            own = position[id(params[i])]
            before = [(position.get(id(params[j]), -1), at) for at, j in enumerate(order)]
            order.insert(max(((p, at) for p, at in before if p < own), default=(0, -1))[1] + 1, i)
        for values in (params, group.get(NAMES, [])):
            values[:] = [values[i] for i in order if i < len(values)]


class NamedState:
    """Three hooks on each optimizer of a model, put on once: order and names, and their use.

    An optimizer that has them gives its ``state_dict`` in the model's order with
    ``param_names``, and loads one that has names by these. Kernels that are out of use are no more
    in it than in the model's. Copies and pickles have none.

    Args:
        take_in: Lets an optimizer have what a model has grown, before it loads.
        kernels: Ids of the parameters in an optimizer that appeared in the run.
    """

    def __init__(self, take_in: TakeIn, kernels: Callable[[Optimizer], set[int]]) -> None:
        self._take_in, self._kernels, self._is_whole = take_in, kernels, False
        self._models: weakref.WeakKeyDictionary[Optimizer, weakref.ref[nn.Module]]
        self._models = weakref.WeakKeyDictionary()

    def watch(self, model: nn.Module, optimizer: AnyOptimizer) -> None:
        """Do so from now on, for the model given last."""
        for member in members_of(optimizer):
            is_new = member not in self._models
            self._models[member] = weakref.ref(model)
            _dropnames_of_a_load(member)
            if is_new:
                member.register_state_dict_pre_hook(self._before_saving)
                member.register_state_dict_post_hook(self._after_saving)
                member.register_load_state_dict_pre_hook(self._before_loading)

    def knows(self, optimizer: Optimizer) -> bool:
        """Say whether an optimizer has the hooks."""
        return optimizer in self._models

    def _model(self, optimizer: Optimizer) -> nn.Module | None:
        found = self._models.get(optimizer)
        return None if found is None else found()

    def _before_saving(self, optimizer: Optimizer) -> None:
        model = self._model(optimizer)
        if model is not None:
            order_by_model(model, optimizer, self._kernels(optimizer))

    def _after_saving(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        model = self._model(optimizer)
        if model is None:
            return
        kernels, owners = self._kernels(optimizer), _has_names(optimizer)
        aside = _ids_out_of_use(model)
        names = names_in(model, optimizer, kernels, by_model=not owners)
        for group, live in zip(state["param_groups"], optimizer.param_groups, strict=True):
            own = [names[id(p)] for p in live["params"]]
            is_away = [
                id(p) in aside or name.startswith(_GONE)
                for name, p in zip(own, live["params"], strict=True)
            ]
            if not owners:
                group[NAMES], group[NAMED_BY_US] = own, True
            if self._is_whole and any(is_away):
                group[ASIDE] = sorted(name for name, away in zip(own, is_away, strict=True) if away)
            elif any(is_away):
                _leave_out(state, group, is_away)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Let a state meanwhile have kernels that are out of use, which the model's has not."""
        before, self._is_whole = self._is_whole, True
        try:
            yield
        finally:
            self._is_whole = before

    def _before_loading(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        model = self._model(optimizer)
        if model is None:
            return state
        self._take_in(model, optimizer)
        order_by_model(model, optimizer, self._kernels(optimizer))
        groups: list[ParamGroup] = [_with_own_names(group) for group in state["param_groups"]]
        live, kernels, kept = optimizer.param_groups, self._kernels(optimizer), {}
        if len(groups) == len(live) and all(NAMES in group for group in groups):
            by_model = is_named_by_model(groups)
            names = names_in(model, optimizer, kernels, by_model=by_model)
            wanted = [[names[id(p)] for p in group["params"]] for group in live]
            may_start = {name for key, name in names.items() if key in kernels}
            aside = {names[key]: key for key in _ids_out_of_use(model) if key in names}
            groups = _by_name(groups, wanted, may_start, set(aside))
            absent = {key for group in groups for key in group["params"]}  # by their names
            kept = _of_ids(optimizer, {key: n for n, key in aside.items() if n in absent})
            for group, own in zip(groups, live, strict=True):
                group[NAMES] = own.get(NAMES, group[NAMES])
        if kernels and _is_of_torch(optimizer):
            _check_shapes(state["state"], groups, live)
        spread = _spread({**kept, **_of_groups(state, groups)}, groups, live)
        if not _has_names(optimizer):
            groups = [_without(group, NAMES) for group in groups]
        return {
            **state,
            "state": spread,
            "param_groups": [_without(_without(group, NAMED_BY_US), ASIDE) for group in groups],
        }


def _is_of_torch(optimizer: Optimizer) -> bool:
    """Say whether an optimizer's class is torch's, or made from one: others may shape moments."""
    made_from = type(optimizer).__mro__
    return any(c.__module__.startswith("torch.optim.") and c is not Optimizer for c in made_from)


def _check_shapes(
    state: dict[Any, Any], groups: Sequence[ParamGroup], live: Sequence[ParamGroup]
) -> None:
    """Refuse a state whose moments have not the shapes of the parameters that would get them.

    Raises:
        ValueError: One has not.
    """
    for group, own in zip(groups, live, strict=False):
        names = group.get(NAMES, ["a parameter"] * len(group["params"]))
        for key, p, name in zip(group["params"], own["params"], names, strict=False):
            for what, value in state.get(key, {}).items():
                if what in _LIKE_ITS_PARAMETER and value is not None and value.shape != p.shape:
                    by = "" if NAMES in group else ", by its place since the state has no names,"
                    msg = (
                        f"{what!r} of shape {tuple(value.shape)} would go{by} to {name} of shape "
                        f"{tuple(p.shape)}: the state is of a model with other kernels. Load that "
                        "model's state first, which builds them, and the optimizer's behind it"
                    )
                    raise ValueError(msg)


def _leave_out(state: dict[str, Any], group: ParamGroup, is_away: Sequence[bool]) -> None:
    """Take parameters out of a group of a state, with what is saved of them; others keep ids."""
    for key, away in zip(group["params"], is_away, strict=True):
        if away:
            state["state"].pop(key, None)
    for what in ("params", NAMES):
        each = zip(group[what], is_away, strict=True)
        group[what] = [value for value, away in each if not away]


def _of_ids(optimizer: Optimizer, names: dict[int, str]) -> dict[Any, Any]:
    """Return what an optimizer knows of parameters, by the names that go with their ids."""
    return {names[id(p)]: own for p, own in optimizer.state.items() if id(p) in names}


def _of_groups(state: dict[str, Any], groups: Sequence[ParamGroup]) -> dict[Any, Any]:
    """Return what is saved of parameters, without those that no group wants."""
    wanted = {key for group in groups for key in group["params"]}
    left = {key for group in state["param_groups"] for key in group["params"]} - wanted
    return {key: own for key, own in state["state"].items() if key not in left}


def _spread(
    state: dict[Any, Any], groups: Sequence[ParamGroup], live: Sequence[ParamGroup]
) -> dict[Any, Any]:
    """Return the state with tensors that are whole as their parameters are: in shards, if so."""
    if len(groups) != len(live):
        return state  # which torch refuses
    params = {
        key: p
        for group, own in zip(groups, live, strict=True)
        for key, p in zip(group["params"], own["params"], strict=False)
        if is_spread(p)
    }

    return {key: spread_state(own, params.get(key)) for key, own in state.items()}


def _with_own_names(group: ParamGroup) -> ParamGroup:
    """Return a group by the names that ``torch.distributed.checkpoint`` has in the place of ids.

    It leaves out what the optimizer did not hold when it asked for the state.

    Raises:
        ValueError: It has left something out.
    """
    ids = group["params"]
    if not all(isinstance(each, str) for each in ids):
        return group
    left = sorted(set(without_wrappers(group.get(NAMES, ()))) - set(without_wrappers(ids)))
    if left:
        msg = (
            f"the state was saved with {_some(left)}, and torch.distributed.checkpoint has left "
            "them out, since the optimizer did not have them: call esper.build_as_saved(folder, "
            "model, optimizer) before dcp.load, or esper.sync_optimizer between the model's state "
            "and the optimizer's; esper.load_checkpoint does all of it with a file of its own"
        )
        raise ValueError(msg)
    return {**group, NAMES: without_wrappers(ids), NAMED_BY_US: True} if ids else group


def _by_name(
    saved: Sequence[ParamGroup],
    wanted: Sequence[Sequence[str]],
    new: set[str],
    aside: set[str],
) -> list[ParamGroup]:
    """Return saved groups in the order of the live ones, a name to its own state.

    Args:
        saved: Groups of a ``state_dict``, with names.
        wanted: Names of the parameters of each live group, in order.
        new: Names that may be absent.
        aside: Names of kernels that are out of use: what is absent of them stays as it is.

    Raises:
        ValueError: The two do not hold the same parameters.
    """
    having = [
        {
            name: key
            for name, key in zip(names, group["params"], strict=True)
            if not name.startswith(_GONE)
        }
        for group, names in zip(saved, saved_names(saved), strict=True)
    ]
    lacking = sorted(
        {n for own in having for n in own}
        - {n for names in wanted for n in names}
        - {n for group in saved for n in group.get(ASIDE, ())}
    )
    if lacking:
        msg = (
            f"the state is of {len(lacking)} parameters that are not in this optimizer: "
            f"{_some(lacking)}; load the model's state first, which builds its kernels, and the "
            "optimizer's behind it"
        )
        raise ValueError(msg)
    absent = sorted({n for names in wanted for n in names} - {n for own in having for n in own})
    if set(absent) - new:
        msg = (
            f"the state has nothing of {_some(sorted(set(absent) - new))}, which this optimizer "
            "trains; it is of another model, or of an optimizer that trained less"
        )
        raise ValueError(msg)
    if begin := sorted(set(absent) - aside):
        _logger.warning("%s: the state has nothing of them; they begin without", _some(begin))
    groups = []
    for number, (group, own, names) in enumerate(zip(saved, having, wanted, strict=True)):
        elsewhere = [n for n in names if n not in own and n not in absent]
        if elsewhere:
            msg = (
                f"{_some(elsewhere)} are in another param group than when the state was saved "
                f"(group {number} here); build the optimizer with the groups that it had"
            )
            raise ValueError(msg)
        ids = [own.get(n, n) for n in names]
        groups.append({**group, "params": ids, NAMES: list(names)})
    return groups


def names_in(
    model: nn.Module, optimizer: Optimizer, kernels: set[int], *, by_model: bool
) -> dict[int, str]:
    """Return a name for each parameter in an optimizer by its id, none of them twice.

    What is no part of the model, an owner's scale or another module, has a number in its place.

    Args:
        model: The model.
        optimizer: What trains it.
        kernels: Ids of the parameters in it that appeared in the run.
        by_model: Whether names are the model's; else the owner's, where groups have them.
    """
    found, others, gone = names_of(model), 0, 0
    names: dict[int, str] = {}
    named = [() if by_model else group.get(NAMES, ()) for group in optimizer.param_groups]
    wrappers = _wrappers_before([name for owners in named for name in owners])
    for group, owners in zip(optimizer.param_groups, named, strict=True):
        for i, p in enumerate(group["params"]):
            if id(p) in kernels and id(p) not in found:
                names[id(p)], gone = f"{_GONE} {gone}", gone + 1
            elif i < len(owners):
                names[id(p)] = owners[i].removeprefix(wrappers)
            elif id(p) in found:
                names[id(p)] = found[id(p)]
            else:
                names[id(p)], others = f"{_OTHERS} {others}", others + 1
    return names


def is_named_by_model(groups: Sequence[ParamGroup]) -> bool:
    """Say whether the names in groups of a ``state_dict`` are the model's, not the owner's."""
    return any(NAMED_BY_US in group for group in groups)


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the names of a model's parameters by their ids: those of :func:`parameters_of`."""
    return {id(p): name for name, p in parameters_of(model).items()}


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by their names, in its order, without wrappers' parts of names.

    Those of kernels that are out of use stand where they will stand again.
    """
    order = list(bare(model).named_parameters())
    in_use = {id(p) for _, p in order}  # what is tied into a kernel out of use is its host's
    for layer, seed_idx, aside in _out_of_use(model):
        own = [i for i, (name, _) in enumerate(order) if _is_before(name, layer, seed_idx)]
        at = own[-1] + 1 if own else len(order)
        order[at:at] = [(name, p) for name, p in aside if id(p) not in in_use]
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, p in order:
        found.setdefault(id(p), (name, p))
    names = without_wrappers(name for name, _ in found.values())
    return dict(zip(names, (p for _, p in found.values()), strict=True))


def _ids_out_of_use(model: nn.Module) -> set[int]:
    """Return the ids of what isolated seeds alone hold: what is tied into one is its host's."""
    aside = {id(p) for *_, named in _out_of_use(model) for _, p in named}
    return aside - set(map(id, bare(model).parameters())) if aside else aside


def _is_before(name: str, layer: str, seed_idx: int) -> bool:
    """Say whether a name is of a layer, and of none of its seeds behind one."""
    below = name.removeprefix(f"{layer}{SEEDS_PREFIX}")
    is_behind = below != name and int(below.partition(".")[0]) > seed_idx
    return name.startswith(layer) and not is_behind


def _out_of_use(model: nn.Module) -> Iterator[tuple[str, int, list[tuple[str, nn.Parameter]]]]:
    """Yield of each isolated seed what its layer's names begin with, its index, and parameters."""
    for path, layer in bare(model).named_modules():
        if RECORD not in layer.__dict__:
            continue
        prefix = f"{path}." if path else ""
        slots = layer._modules.get(SEEDS)  # noqa: SLF001 - slots are named by digits
        for i, seed in sorted(record_of(layer).seeds.items()):
            if slots is None or str(i) not in slots._modules:  # noqa: SLF001 - as above
                named = seed.slot.named_parameters()
                yield prefix, i, [(f"{prefix}{SEEDS_PREFIX}{i}.{name}", p) for name, p in named]


def saved_names(groups: Sequence[ParamGroup]) -> list[list[str]]:
    """Return the names in each group of a ``state_dict``, without what wrappers put before them."""
    named = [list(group.get(NAMES, ())) for group in groups]
    if is_named_by_model(groups):
        return named
    wrappers = _wrappers_before([name for names in named for name in names])
    return [[name.removeprefix(wrappers) for name in names] for names in named]


def without_wrappers(names: Iterable[str]) -> list[str]:
    """Return names without what wrappers of the whole model put before each of them."""
    listed = list(names)
    wrappers = _wrappers_before(listed)
    return [name.removeprefix(wrappers) for name in listed]


def _wrappers_before(names: Sequence[str]) -> str:
    """Return what all names have from wrappers; a model's own child may be called ``module``."""
    left = [name for name in names if not name.startswith((_GONE, _OTHERS))]
    found = ""
    while left:
        first = left[0].partition(".")[0]
        if first not in _WRAPPERS or not all(name.startswith(f"{first}.") for name in left):
            break
        found += f"{first}."
        left = [name.removeprefix(f"{first}.") for name in left]
    return found


def _has_names(optimizer: Optimizer) -> bool:
    return any(NAMES in group for group in optimizer.param_groups)


def _dropnames_of_a_load(optimizer: Optimizer) -> None:
    """Take out names that came with a state: torch would want them of each group from then on."""
    for group in optimizer.param_groups:
        if group.pop(NAMED_BY_US, False):
            group.pop(NAMES, None)


def _without(group: ParamGroup, key: str) -> ParamGroup:
    return {k: v for k, v in group.items() if k != key}


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
