"""Averages of a model that grows: they get the kernels that it gets, and lose those that it loses.

An average that was made before a kernel appeared (``AveragedModel``, a copy of one's own) has other
parameters than the model: to average them pair by pair fails, or mixes tensors that do not belong
together.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

import torch
from torch import nn

from esper.continuity.replicas import bare
from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.class_change import choose_forward
from esper.seeds.folding import fold
from esper.seeds.sleep import follow_sleep, kind_of_sleep
from esper.seeds.slots import insert, withdraw
from esper.state.host_parts import SEEDS, check_module, host_parameters, is_in_a_seed
from esper.state.kernel import reference_tensor
from esper.state.layer_record import RECORD, record_of
from esper.state.seed_slot import Seed

Average = TypeVar("Average", bound=nn.Module)

_logger = logging.getLogger(__name__)


def follow(model: nn.Module, averaged: Average) -> Average:
    """Keep an average of a model in step with what grows in the model, from now on.

    What is grafted into the model, unloaded, isolated or folded, and each alpha, is so in the
    average at the same moment: the two have the same parameters in the same order, under the same
    names. A kernel's average begins with the weights that the kernel has when it appears; where it
    is folded, the averaged kernel is folded into the averaged host. How the average is updated is
    its owner's business, as before. An equal average over all updates (SWA) weighs a kernel's first
    weights like those of all updates before; an exponential one forgets them.

    Blocks that sleep (:func:`esper.shallow`) wake in the average at the same moment.

    Args:
        model: A wrapped model, or one with blocks that sleep; it may be inside DDP or
            ``torch.compile``.
        averaged: ``torch.optim.swa_utils.AveragedModel``, or any copy of the model, made after
            :func:`esper.wrap` and :func:`esper.shallow`; held weakly.

    Returns:
        ``averaged``.

    Raises:
        TypeError: ``model`` or ``averaged`` is no module.
        ValueError: ``averaged`` has not the same layers as the model, or not the same of its
            blocks sleep.
    """
    check_module("follow", model)
    inner = bare(model)
    for source, target in _sleeping_pairs(inner, averaged):
        follow_sleep(source, target)
    for source, target in _pairs(inner, averaged):
        mirror = _Mirror(source, target)
        mirror()
        record_of(source).on_change.append(mirror)
    stands_apart(inner, averaged)
    _AVERAGES.setdefault(inner, weakref.WeakSet()).add(averaged)
    return averaged


def averages_of(model: nn.Module) -> list[nn.Module]:
    """Return the averages that follow a model, outside of DDP and ``torch.compile``."""
    return list(_AVERAGES.get(model, ()))


def stands_apart(model: nn.Module, copied: nn.Module) -> None:
    """Remember that a copy of a model is in somebody's care, or none of an average's kind."""
    theirs = [record_of(module) for module in copied.modules() if RECORD in module.__dict__]
    for layer in _layers(model).values():
        record = record_of(layer)
        record.copies = [ref for ref in record.copies if not any(ref() is r for r in theirs)]


def tell_of_copies(layers: Iterable[nn.Module]) -> None:
    """Say once which copies of a model have not the kernels that have just appeared in it."""
    names = []
    for layer in layers:
        record = record_of(layer)
        if any(ref() is not None for ref in record.copies):
            names.append(record.name)
        record.copies = []
    if names:
        _logger.warning(
            "kernels appeared at %s, and a copy of the model does not have them. If it is an "
            "average (AveragedModel, an EMA of your own), it can not be updated pair by pair any "
            "more: make it with esper.follow(model, averaged), which gives it each kernel when it "
            "appears. A copy that is to stay as it is needs nothing",
            ", ".join(map(repr, names)),
        )


class _Mirror:
    """Makes the seeds of one layer like those of another, whenever these change."""

    def __init__(self, source: nn.Module, target: nn.Module) -> None:
        self._source, self._target = weakref.ref(source), weakref.ref(target)
        self._kernels = {i: seed.slot.kernel for i, seed in record_of(source).seeds.items()}
        missing = self._kernels.keys() - record_of(target).seeds.keys()
        for seed_idx in missing:
            del self._kernels[seed_idx]

    def __call__(self) -> None:
        """Bring the target in step; nothing is done where it is."""
        source, target = self._source(), self._target()
        if source is None or target is None or RECORD not in target.__dict__:
            return
        if RECORD not in source.__dict__ or self._is_in_step(source, target):
            return
        self._take_away(source, target)
        record_of(target).layout = copy.deepcopy(record_of(source).layout)
        self._put_in(source, target)
        choose_forward(target)

    def _is_in_step(self, source: nn.Module, target: nn.Module) -> bool:
        live = record_of(source).seeds
        has_copies = all(self._kernels.get(i) is seed.slot.kernel for i, seed in live.items())
        return has_copies and _picture(source) == _picture(target)

    def _take_away(self, source: nn.Module, target: nn.Module) -> None:
        mine = record_of(source)
        for seed_idx, seed in list(record_of(target).seeds.items()):
            live = mine.seeds.get(seed_idx)
            if live is None and mine.layout.state(seed_idx) == SeedLifecycleState.FOSSILIZED:
                _fold(source, target, seed)
            if live is None or self._kernels.get(seed_idx) is not live.slot.kernel:
                withdraw(target, seed_idx)
                self._kernels.pop(seed_idx, None)
            elif not _is_inserted(source, seed_idx):
                withdraw(target, seed_idx, keep_record=True)

    def _put_in(self, source: nn.Module, target: nn.Module) -> None:
        mine, theirs = record_of(source), record_of(target)
        for seed_idx, live in mine.seeds.items():
            if seed_idx not in theirs.seeds:
                theirs.seeds[seed_idx] = _copied(live, source, target)
                self._kernels[seed_idx] = live.slot.kernel
            seed = theirs.seeds[seed_idx]
            seed.guard = live.guard
            if _is_inserted(source, seed_idx):
                if not _is_inserted(target, seed_idx):
                    insert(target, seed, mine.layout.alpha(seed_idx))
                seed.slot.set_alpha(mine.layout.alpha(seed_idx))
                seed.slot.set_structure(bytes(live.slot._structure))  # noqa: SLF001 - a slot's copy


def _picture(layer: nn.Module) -> tuple[object, ...]:
    """Return what has to be the same in a layer and its average."""
    record, container = record_of(layer), layer._modules.get(SEEDS)  # noqa: SLF001 - as the slots do
    layout = record.layout
    inserted = () if container is None else tuple(container._modules)  # noqa: SLF001 - as above
    seeds = tuple(
        (i, layout.alpha(i), bytes(seed.slot._structure))  # noqa: SLF001 - a slot's own
        for i, seed in sorted(record.seeds.items())
    )
    return inserted, seeds, tuple(map(layout.state, range(layout.num_seeds)))


def _is_inserted(layer: nn.Module, seed_idx: int) -> bool:
    container = layer._modules.get(SEEDS)  # noqa: SLF001 - slots are named by digits
    return container is not None and str(seed_idx) in container._modules  # noqa: SLF001 - as above


def _copied(live: Seed, source: nn.Module, target: nn.Module) -> Seed:
    """Return a copy of a seed on the device of another layer, in its dtype, trained as it is."""
    seed = copy.deepcopy(live)
    mine, theirs = reference_tensor(source), reference_tensor(target)
    dtype = theirs.dtype if theirs.dtype != mine.dtype and theirs.is_floating_point() else None
    seed.slot.to(device=theirs.device, dtype=dtype)
    if not any(p.requires_grad for p in host_parameters(target)):
        seed.slot.requires_grad_(requires_grad=False)
    return seed


def _fold(source: nn.Module, target: nn.Module, seed: Seed) -> None:
    """Fold the averaged kernel; where that is not exact enough, begin anew with live weights."""
    if fold(target, seed).folded:
        return
    with torch.no_grad():
        for average, live in zip(host_parameters(target), host_parameters(source), strict=True):
            average.copy_(live)


def _sleeping_pairs(model: nn.Module, averaged: object) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each block of a model that is not awake with its counterpart.

    Raises:
        ValueError: Others sleep in the average.
    """
    mine, theirs = _asleep(model), _asleep(averaged)
    while mine.keys() != theirs.keys() and isinstance(averaged, nn.Module):
        averaged = getattr(averaged, "module", None)  # AveragedModel and most EMAs have it there
        theirs = _asleep(averaged)
    if mine.keys() != theirs.keys():
        msg = (
            f"in an average the same blocks sleep as in its model; in this model they are "
            f"{', '.join(mine) or 'none'}. Make the average after esper.shallow"
        )
        raise ValueError(msg)
    yield from ((mine[name], theirs[name]) for name in mine)


def _asleep(module: object) -> dict[str, nn.Module]:
    """Return the blocks that sleep or wake, by their names."""
    if not isinstance(module, nn.Module):
        return {}
    named = bare(module).named_modules()
    return {name: block for name, block in named if kind_of_sleep(block) is not None}


def _pairs(model: nn.Module, averaged: object) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each layer of a model with its counterpart.

    Raises:
        TypeError: ``averaged`` is no module.
        ValueError: The two do not have the same layers.
    """
    if not isinstance(averaged, nn.Module):
        msg = (
            f"averaged is a module, a copy of the model or an AveragedModel, got "
            f"{type(averaged).__name__}; keep the average in a copy of the model"
        )
        raise TypeError(msg)
    mine, theirs = _layers(model), _layers(averaged)
    while mine.keys() != theirs.keys() and isinstance(averaged, nn.Module):
        averaged = getattr(averaged, "module", None)  # AveragedModel and most EMAs have it there
        theirs = _layers(bare(averaged)) if isinstance(averaged, nn.Module) else theirs
    if mine.keys() != theirs.keys() or not (mine or _asleep(model)):
        odd = sorted(mine.keys() ^ theirs.keys())
        found = f"only one of them has {', '.join(odd)}" if odd else "the model has none"
        msg = (
            f"an average has the wrapped layers of its model; {found}. Make the average after "
            "esper.wrap(model), from the model as it is"
        )
        raise ValueError(msg)
    yield from ((mine[name], theirs[name]) for name in mine)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return wrapped layers outside of seeds by their names."""
    named = model.named_modules()
    return {n: m for n, m in named if RECORD in m.__dict__ and not is_in_a_seed(n)}


_AVERAGES: Final[weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]]] = (
    weakref.WeakKeyDictionary()
)
