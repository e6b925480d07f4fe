"""The optimizer through growth: parameters that appear, parameters that go, and their state.

Parameters of kernels join groups that are there, with their settings (``placement`` says which). A
group of their own would break the schedulers that keep one function per group (LambdaLR,
SequentialLR).
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeGuard

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from esper.continuity.ensemble import (
    AnyOptimizer,
    joined,
    members_of,
    rebuilt,
)
from esper.continuity.following import tell_of_copies
from esper.continuity.named_state import NamedState, order_by_model, without_wrappers
from esper.continuity.placement import (
    GroupFor,
    Place,
    Placement,
    check_trains,
    seeded_kernels,
)
from esper.continuity.replicas import bare, share_kernels, spread, worst_of_ranks
from esper.continuity.step_hooks import StepHooks
from esper.execution.kasmina_layer import KasminaLayer
from esper.seeds.grafting import finish_waiting
from esper.seeds.out_of_use import losses
from esper.seeds.step_guard import KeptBuffers, has_step_seeds, read_step_flags
from esper.state.host_parts import SEEDS, check_replicas
from esper.state.layer_record import record_of
from esper.state.roster import Changes, Roster, at_building
from esper.state.shards import reshard

if TYPE_CHECKING:
    from esper.continuity.replicas import SeedKey

_logger = logging.getLogger(__name__)


def sync_optimizer(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    group_for: GroupFor | None = None,
) -> None:
    """Bring an optimizer in line with the grafts of a model. Doing it twice changes nothing.

    Trainable parameters of kernels that appeared join the group that trains their host layer, kind
    by kind: weights where its weights are, biases and norms where its biases and norms are. Those
    of a layer that this optimizer does not train, though it is trainable, are left to the optimizer
    that does, and a warning names them where Esper knows of none. Parameters of kernels that went
    are dropped with their state. Parameters of the host are never touched, also where they are tied
    into a kernel; but where a kernel was folded behind its host, or took a share from it, their
    gradient is another one, and their state begins anew (``FoldCertificate.stale_moments``). From
    then on the optimizer reads the flags of ``guard="step"`` before each step,
    and skips one that was not finite; its ``state_dict`` is in the order of the model's parameters
    and has their names, and it loads by these. Kernels that appeared in a model replicated by
    DistributedDataParallel get rank 0's weights and averaged gradients; there every rank has to
    make the same grafts and the same call.

    Args:
        model: A wrapped model; it may be inside DDP or ``torch.compile``.
        optimizer: The optimizer that trains it, or all that train it together; any of
            ``torch.optim`` but LBFGS, what keeps to its interface, and wrappers of one.
        group_for: ``(name, parameter)`` to the param group of a kernel's parameter, or to its
            number over all groups in order; None from it, or instead of it: as told above. The name
            is the parameter's in the model.

    Raises:
        TypeError: ``model`` is no module or in ``torch.nn.DataParallel``, or an optimizer is not
            supported.
        ValueError: An optimizer holds parameters and none of them is the model's, ``group_for``
            named a group that there is not, or the optimizer trains kernels of another module too,
            with which it was synced before.
    """
    check_replicas("sync_optimizer", model)
    every = joined(optimizer)
    reshard(model)
    _finish_waiting(model)
    for loss in losses(model):
        _logger.warning("seed %d of layer %r: %s", loss.seed_idx, loss.layer, loss.reason)
    link, inner = _link(every), bare(model)
    live = {id(p): p for layer in _layers(inner) for p in _kernel_parameters(layer)}
    placement = Placement(inner, every, group_for)
    check_trains(placement, [*live, *link.kernels])
    _check_none_is_elsewhere(link, inner, live)
    remove_parameters(
        every,
        [p for k, p in link.kernels.items() if k not in live and not placement.is_hosts(p)],
    )
    for layer in _layers(inner):
        for seed_idx, kernel in seeded_kernels(layer):
            link.adopt(p for p in kernel.parameters() if _is_in_it_for_us(p, placement))
            _join(layer, seed_idx, kernel, placement)
        drop_stale_moments(layer, every)
    order_kernels(inner, every)
    link.group_for = group_for
    link.synced_with = weakref.ref(inner)
    _NAMED.watch(inner, every)
    together = spread(model)
    if together is not None:
        _share(together, inner, placement)
    link.watch_steps(model, every)
    if worst_of_ranks(model) is not None:
        _warn_of_lone_isolation(link.roster.busy())


def _check_none_is_elsewhere(
    link: _Link, inner: nn.Module, live: Mapping[int, nn.Parameter]
) -> None:
    """Refuse to drop kernels that stand in another module than the one that is synced.

    Raises:
        ValueError: There are some; one call for all modules that an optimizer trains is needed.
    """
    before = link.synced_with()
    if before is None or before is inner:
        return
    theirs = {id(p) for layer in _layers(before) for p in _kernel_parameters(layer)}
    if lost := (theirs & link.kernels.keys()) - live.keys():
        msg = (
            f"the optimizer trains {len(lost)} parameters of kernels in another module "
            f"({type(before).__name__}), with which it was synced before, and would lose them; "
            "call esper.sync_optimizer with one module that holds all that the optimizer trains, "
            "for example torch.nn.ModuleList([generator, critic])"
        )
        raise ValueError(msg)


def kernels_in(optimizer: AnyOptimizer) -> set[int]:
    """Return the ids of kernels' parameters in an optimizer, those that have gone included."""
    return {*_link(optimizer).kernels}


def sync_again(model: nn.Module, optimizer: AnyOptimizer) -> None:
    """Do what :func:`sync_optimizer` does, by the choice of groups that it was given last."""
    sync_optimizer(model, members_of(optimizer), group_for=_link(optimizer).group_for)


def sync_to_groups(model: nn.Module, optimizer: AnyOptimizer, group_of: Mapping[str, int]) -> None:
    """Do what :func:`sync_optimizer` does, into the groups that kernels' parameters had before.

    Args:
        model: The model.
        optimizer: What trains it.
        group_of: Number of a param group, over all optimizers, by the parameter's name. What it
            does not name goes where it would; the owner's choice of groups stays what it was.
    """
    own, prefix = _link(optimizer).group_for, Placement(bare(model), optimizer).prefix

    def had(name: str, _parameter: nn.Parameter) -> int | None:
        names = (name, *without_wrappers([f"{prefix}{name}"]), f"{prefix}{name}")
        return next((group_of[each] for each in names if each in group_of), None)

    sync_optimizer(model, members_of(optimizer), group_for=had)
    _link(optimizer).group_for = own


def _finish_waiting(model: nn.Module) -> None:
    """Make live what waits and has seen a call; say of what has not that it is left out."""
    for layer in _layers(model):
        finish_waiting(layer)
        for seed_idx in record_of(layer).waiting:
            _logger.warning(
                "seed %d of layer %r waits for a call of its layer, so that the optimizer does not "
                "have its kernel yet: call sync_optimizer again behind the next forward, or pass "
                "example= to graft",
                seed_idx,
                record_of(layer).name,
            )


def _share(together: nn.Module, inner: nn.Module, placement: Placement) -> None:
    """Let ranks agree on the kernels of the model that they train together."""
    params: dict[str, nn.Parameter] = {}
    seeds: dict[str, SeedKey] = {}
    for layer in _layers(inner):
        for seed_idx, kernel in seeded_kernels(layer):
            name = placement.name_in_model(layer, f"{SEEDS}.{seed_idx}")
            seeds[name] = (layer, seed_idx)
            params |= {
                f"{name}.kernel.{below}": p
                for below, p in kernel.named_parameters()
                if p.requires_grad and not placement.is_hosts(p)
            }
    share_kernels(together, params, seeds)


def _kernel_parameters(layer: nn.Module) -> list[nn.Parameter]:
    return [p for _, kernel in seeded_kernels(layer) for p in kernel.parameters()]


def _is_in_it_for_us(p: nn.Parameter, placement: Placement) -> bool:
    """Say whether a kernel's parameter was in the optimizer before, and is not the host's."""
    return placement.holds(p) and not placement.is_hosts(p)


def _join(layer: nn.Module, seed_idx: int, kernel: nn.Module, placement: Placement) -> None:
    """Append what a kernel has to train; say what is trained by nobody that is known."""
    places, left = placement.places(layer, seed_idx, kernel)
    append_parameters(placement.optimizer, places)
    placement.hold(places)
    if places:
        tell_of_copies([layer])
    if left and not _is_known_elsewhere(layer, kernel, placement.optimizer):
        _logger.warning(
            "%s: in no param group, since the parameters of their host layer that are trainable "
            "are not in this optimizer; call esper.sync_optimizer with the optimizer that trains "
            "the layer, or with a sequence of all of them, or say group_for=",
            ", ".join(left),
        )


def _is_known_elsewhere(layer: nn.Module, kernel: nn.Module, every: AnyOptimizer) -> bool:
    """Say whether another optimizer that Esper has seen trains a layer or its kernel."""
    wanted = {id(p) for module in (layer, kernel) for p in module.parameters()}
    return any(
        id(p) in wanted
        for other in list(_LINKS)
        if other not in members_of(every)
        for group in other.param_groups
        for p in group["params"]
    )


def _warn_of_lone_isolation(layers: Iterable[nn.Module]) -> None:
    """Say which kernels one rank could isolate alone; the others would wait for its gradients."""
    for layer in layers:
        for seed_idx, seed in record_of(layer).seeds.items():
            if seed.guard != "step":
                _logger.warning(
                    "seed %d of layer %r stands under guard=%r in a replicated model: a fault on "
                    "one rank would isolate it there alone; call layer.set_guard(%d, 'step') on "
                    "every rank, whose flags the ranks share",
                    seed_idx,
                    record_of(layer).name,
                    seed.guard,
                    seed_idx,
                )


def busy_layers(optimizer: AnyOptimizer) -> list[nn.Module]:
    """Return the layers that hold kernels, of the model that was last synced with an optimizer."""
    return _link(optimizer).roster.busy()


def append_parameters(
    optimizer: AnyOptimizer,
    places: Iterable[Place],
    state: Mapping[torch.Tensor, object] | None = None,
) -> None:
    """Append parameters to groups. One that is in a group already stays where it is.

    Args:
        optimizer: What trains the model.
        places: Where they go.
        state: State of the parameters, as in ``audition.state``: taken by reference, moments and
            step, so that they are the same tensors afterwards. None starts without.
    """
    groups, link = optimizer.param_groups, _link(optimizer)
    present = {id(p) for group in groups for p in group["params"]}
    for number, name, p in places:
        if id(p) in present:
            continue
        group = groups[number]
        group["params"].append(p)
        if "param_names" in group:
            group["param_names"].append(name)
        if state is not None and p in state:
            optimizer.state[p] = state[p]  # type: ignore[assignment] # of the same class
        link.adopt([p])


def order_kernels(model: nn.Module, optimizer: AnyOptimizer) -> None:
    """Put kernels' parameters where an optimizer that is made now would have them."""
    order_by_model(model, optimizer, {*_link(optimizer).kernels})


def remove_parameters(optimizer: AnyOptimizer, params: Iterable[torch.Tensor]) -> None:
    """Remove parameters from an optimizer with their state; no trace of them is left in it.

    The groups stay, even where one is empty afterwards: schedulers count them.

    Args:
        optimizer: Any torch optimizer.
        params: Parameters to remove; one that is not there is passed over.
    """
    going = {id(p): p for p in params}
    for group in optimizer.param_groups:
        keep = [id(p) not in going for p in group["params"]]
        for values in (group["params"], group.get("param_names", [])):
            values[:] = [v for v, stays in zip(values, keep, strict=False) if stays]
    link = _link(optimizer)
    for key, p in going.items():
        optimizer.state.pop(p, None)
        link.kernels.pop(key, None)


def drop_stale_moments(layer: nn.Module, optimizer: AnyOptimizer) -> list[nn.Parameter]:
    """Let the state begin anew of what a fold has given another gradient; return the parameters.

    What another optimizer trains is left to it.

    Args:
        layer: A layer with seeds.
        optimizer: What trains it.
    """
    held = {id(p) for p in _all_parameters(optimizer)}
    stale = {name: layer.get_parameter(name) for name in record_of(layer).stale_moments}
    own = {name: p for name, p in stale.items() if id(p) in held}
    for p in own.values():
        optimizer.state.pop(p, None)
    record_of(layer).stale_moments -= own.keys()
    return list(own.values())


def audition_optimizer(
    optimizer: AnyOptimizer, places: Iterable[Place], *, rates: Sequence[float] | None = None
) -> AnyOptimizer:
    """Build an optimizer of the same class and settings as the groups that parameters will join.

    Args:
        optimizer: The run's optimizer; it is only read.
        places: Trainable parameters of the kernel, and where they would go.
        rates: Learning rate above 0 of each group; the present ones where None.
    """
    shares: list[list[torch.Tensor]] = [[] for _ in optimizer.param_groups]
    for place in places:
        shares[place.group].append(place.parameter)
    built = rebuilt(optimizer, shares)
    if rates is not None:
        for group, rate in zip(built.param_groups, rates, strict=True):
            group["lr"] = rate
    return built


def _layers(model: nn.Module) -> Iterator[KasminaLayer]:
    """Yield the layers with seeds, a layer before those inside it."""
    return (module for module in model.modules() if isinstance(module, KasminaLayer))


class _Link:
    """What Esper remembers of optimizers that were handed over together: kernels in them, hooks.

    Attributes:
        kernels: Parameters that appeared in the run, by id.
        roster: Layers of the model that was synced last.
        group_for: The owner's choice of groups at that time.
        synced_with: That model, outside of DDP and ``torch.compile``, while there is one.
    """

    def __init__(self) -> None:
        self.group_for: GroupFor | None = None
        self.kernels: dict[int, torch.Tensor] = {}
        self.roster = Roster([])
        self.synced_with: Callable[[], nn.Module | None] = lambda: None
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._hooks: weakref.WeakKeyDictionary[Optimizer, StepHooks] = weakref.WeakKeyDictionary()
        self._kept: KeptBuffers | None = None
        self._idle_at = _NEVER

    @property
    def members(self) -> list[Optimizer]:
        """Optimizers that were handed over together, those that are still there."""
        return list(self._hooks)

    def adopt(self, params: Iterable[torch.Tensor]) -> None:
        """Remember parameters as kernels'."""
        self.kernels.update({id(p): p for p in params})

    def watch_steps(self, model: nn.Module, optimizer: AnyOptimizer) -> None:
        """Read the step flags of the model's layers before each step."""
        for layer in _layers(model):
            layer.enable_step_guard(self._keep_now)
        self._model = weakref.ref(model)
        self.roster = Roster(_layers(model))
        self._kept, self._idle_at = None, _NEVER
        self._keep(model, self.roster.busy())
        for member in members_of(optimizer):
            if member not in self._hooks:
                self._hooks[member] = StepHooks(member, before=self._before_step)

    def as_synced(self, model: nn.Module) -> nn.Module:
        """Return a model inside what it was handed over in: DDP has to know of kernels as well."""
        given = self._model()
        if given is None:  # never handed over, and maybe in a DDP that a load has found
            given = _LastLoad.replicated()
        return model if given is None or bare(given) is not model else given

    def take_over(self, other: _Link) -> None:
        """Take the place of what was remembered of optimizers that came apart from these."""
        self.kernels.update(other.kernels)
        for hooks in other._hooks.values():
            hooks.close()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]] | None:
        """Read the flags now, or, with a closure, once the closure has made the gradients."""
        if self._idle_at == Changes.count:
            return None  # the usual case, in each step of a run that has not grown
        if not (args or kwargs) or not any(map(_is_closure, (*args, *kwargs.values()))):
            self._read(optimizer)
            return None
        replaced = tuple(self._closed(value, optimizer) for value in args)
        return replaced, {name: self._closed(value, optimizer) for name, value in kwargs.items()}

    def _closed(self, value: object, optimizer: Optimizer) -> object:
        if not _is_closure(value):
            return value
        closure = value

        def run_then_read() -> object:
            result = closure()
            self._read(optimizer)
            return result

        return run_then_read

    def _read(self, optimizer: Optimizer) -> None:
        """Keep the buffers of a good step; drop the gradients of a bad one, buffers put back."""
        model, changes = self._model(), Changes.count
        if model is None:
            return
        busy, over_ranks = self.roster.busy(), worst_of_ranks(model)
        if not busy and over_ranks is None and self._kept is None:
            self._idle_at = changes
            return
        faults = read_step_flags(busy, over_ranks)
        if not faults:
            self._keep(model, busy)
            return
        if self._kept is not None:
            self._kept.put_back()
        for p in (*model.parameters(), *_all_parameters(optimizer)):
            p.grad = None  # another optimizer of the model must not make the step either

    def _keep_now(self) -> None:
        """Copy the buffers where nobody has: a seed has just come under ``guard="step"``."""
        model = self._model()
        if model is not None and self._kept is None:
            self._kept = KeptBuffers(model)

    def _keep(self, model: nn.Module, busy: Iterable[nn.Module]) -> None:
        """Copy the buffers while a seed stands under ``guard="step"``."""
        if self._kept is not None:
            self._kept.keep()
        elif has_step_seeds(busy):
            self._kept = KeptBuffers(model)


def _is_closure(value: object) -> TypeGuard[Callable[[], object]]:
    return callable(value) and not isinstance(value, Optimizer)


def _all_parameters(optimizer: AnyOptimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


_NEVER: Final = -1
"""Changes that nobody has seen."""

_LINKS: weakref.WeakKeyDictionary[Optimizer, _Link] = weakref.WeakKeyDictionary()


def _link(optimizer: AnyOptimizer) -> _Link:
    """Return what is remembered of an optimizer; optimizers that come together share one."""
    members = members_of(optimizer)
    known = [_LINKS[member] for member in members if member in _LINKS]
    link = known[0] if known else _Link()
    for other in known[1:]:
        if other is not link:
            link.take_over(other)
    for member in members:
        _LINKS[member] = link
    return link


def _take_in(model: nn.Module, optimizer: Optimizer) -> None:
    """Let an optimizer that is about to load have what a load has built in its model."""
    link = _link(optimizer)
    members = link.members or [optimizer]
    placement = Placement(model, joined(members))
    for layer in _layers(model):
        for seed_idx, kernel in seeded_kernels(layer):
            if placement.places(layer, seed_idx, kernel)[0]:
                sync_optimizer(link.as_synced(model), members, group_for=link.group_for)
                return


_NAMED: Final = NamedState(_take_in, lambda optimizer: {*_link(optimizer).kernels})


with_kernels_out_of_use: Final = _NAMED.whole
"""Lets a ``state_dict`` meanwhile have the kernels that are out of use, too."""


class _LastLoad:
    """The load and the model whose optimizers were looked for last, and the DDP that has it."""

    load: object = None
    model: weakref.ref[nn.Module] | None = None
    replicated: Callable[[], nn.Module | None] = staticmethod(lambda: None)


def _find_optimizers(layer: nn.Module, load: object) -> None:
    """Find who trains a model that gets kernels by loading, and its DDP: their turn may come next.

    Nobody tells Esper of an optimizer that a framework made before it loads, and torch has no hook
    for it. Looking through all objects takes a tenth of a second, once for each load that builds.
    """
    model = record_of(layer).find_model()
    if model is None or (load is _LastLoad.load and _LastLoad.model == weakref.ref(model)):
        return
    _LastLoad.load, _LastLoad.model = load, weakref.ref(model)
    _LastLoad.replicated = lambda: None
    own = {id(p) for p in model.parameters()}
    for found in gc.get_objects():
        if issubclass(type(found), DistributedDataParallel) and bare(found) is model:
            _LastLoad.replicated = weakref.ref(found)
        if not issubclass(
            type(found), Optimizer
        ):  # isinstance asks objects, and some answer loudly
            continue
        is_wrapper = "_optimizer_state_dict_pre_hooks" not in found.__dict__
        if not is_wrapper and any(id(p) in own for p in _all_parameters(found)):
            _tell_of_earlier_state(found)
            _NAMED.watch(model, found)


def _tell_of_earlier_state(optimizer: Optimizer) -> None:
    """Say that kernels come too late for an optimizer's state, which may have been loaded."""
    if optimizer.state and not _NAMED.knows(optimizer):
        _logger.warning(
            "loading has built kernels in a model whose optimizer (%s) has state already, and "
            "nothing of them. If that was loaded before the model, as set_state_dict of "
            "torch.distributed.checkpoint does, their moments were left out: call "
            "esper.build_as_saved(folder, model, optimizer) before it. Else call "
            "esper.sync_optimizer(model, optimizer), or load the optimizer's state now",
            type(optimizer).__name__,
        )


at_building(_find_optimizers)
