"""``esper.shallow``: few blocks of a model train, and the others sleep until their time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from esper.contracts.arguments import check_type, whole_number
from esper.contracts.owner_warning import warn_owner
from esper.seeds.replica_names import heed_in_replicas, ignore_in_replicas
from esper.seeds.sleep import (
    FORMS,
    allow_graphs,
    cannot_sleep,
    kind_of_sleep,
    put_to_sleep,
    set_share,
    share_of,
)
from esper.seeds.sleep_form import Forms, assumed_form, refused
from esper.seeds.stack import Stack, differences, spread, stack_at
from esper.state.host_parts import check_module

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from esper.seeds.stack import Differences

Model = TypeVar("Model", bound=nn.Module)


def shallow(
    model: Model,
    path: str,
    *,
    depth: int,
    keep: Sequence[int | str] | None = None,
    root: nn.Module | None = None,
) -> Model:
    """Put the blocks of a stack to sleep, all but some. Succeeds or changes nothing.

    A sleeping block hands its first input on, in the form in which the block would return it: no
    FLOPs, no gradients, no state in the optimizer. The model computes what its class built with
    ``depth`` blocks would, bit for bit, as long as blocks do not go by their number; names, keys,
    parameters, param groups and configs are those of the whole model. An awake block is as it was.

    Where that form cannot be told beforehand, the first call of each kind runs one block aside.
    Where blocks differ (in their ``layer_types``, an index, a drop rate), a warning says in what;
    where the differences repeat, whole periods stay awake.

    Call it before DistributedDataParallel, which then leaves sleeping parameters alone, and after
    ``fully_shard``, which then does not gather them.

    Args:
        model: The model, as its owner wants it in the end.
        path: Dotted name of the stack: a ModuleList, Sequential or ModuleDict of blocks.
        depth: Blocks that stay awake, from 0 to all of them: numbers ``floor(i n / depth)``.
        keep: Numbers or names of the blocks that stay awake in their place, ``depth`` of them.
        root: The module that DistributedDataParallel will be given, where the model is a part of
            it; the model where None.

    Returns:
        The model.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: There is no such stack, ``depth`` is more than it has, ``keep`` names what it
            has not, a block cannot sleep or would have to wake, or the model is replicated already.

    Warns:
        UserWarning: The blocks differ, so that what is awake is not what a smaller model would be.
    """
    check_module("shallow", model)
    inner = _outside_of_compile(model)
    stack = stack_at(inner, path)
    whole_number("depth", depth, least=0)
    if depth > len(stack):
        msg = f"{path!r} has {len(stack)} blocks; depth is at most that, got {depth}"
        raise ValueError(msg)
    found = differences(stack)
    awake = _kept(stack, depth, keep) if keep is not None else _spread(len(stack), depth, found)
    sleepers = [i for i in range(len(stack)) if i not in awake]
    _check_none_wakes(stack, sleepers)
    fresh = [i for i in sleepers if kind_of_sleep(stack.blocks[i]) is None]
    _check_can_sleep(stack, fresh)
    forms = forms_of(stack, fresh)
    if sleepers or len(awake) > depth:
        _say_differences(stack, found, awake, depth)
    ignore_in_replicas(
        inner if root is None else _outside_of_compile(root),
        inner,
        [stack.blocks[i] for i in fresh],
    )
    for i in fresh:
        put_to_sleep(stack.blocks[i], forms[type(stack.blocks[i])])
    allow_graphs(stack.blocks)
    return model


def asleep(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the blocks that sleep, in their order; none where all are awake.

    Args:
        model: A model; it may be inside DistributedDataParallel or ``torch.compile``.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_module("asleep", model)
    return tuple(name for name, m in model.named_modules() if kind_of_sleep(m) == "asleep")


def depth_state(model: nn.Module) -> dict[str, float]:
    """Return the share of every block that is not awake, by its name: 0 asleep, alpha waking.

    A ``state_dict`` does not have it: its keys are the whole model's at any moment.
    """
    blocks = [(name, m) for name, m in model.named_modules() if kind_of_sleep(m) is not None]
    return {name: share_of(block) for name, block in blocks}


def _outside_of_compile(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``; refuse one that is replicated already."""
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        msg = (
            "the model is in DistributedDataParallel already, which waits for a gradient of every "
            "parameter: call esper.shallow before it"
        )
        raise ValueError(msg)  # noqa: TRY004 - the right type, at the wrong time
    assert isinstance(inner, nn.Module)
    return inner


def _kept(stack: Stack, depth: int, keep: Sequence[int | str]) -> list[int]:
    """Return the numbers of the blocks that the owner keeps awake."""
    check_type("keep", keep, Sequence, "a list of block numbers or names")
    known: dict[int | str, int] = {i: i for i in range(len(stack))}
    known |= {name: i for i, name in enumerate(stack.names)}
    odd = [each for each in keep if isinstance(each, bool) or each not in known]
    numbers = sorted({known[each] for each in keep if each not in odd})
    if odd or isinstance(keep, str) or len(numbers) != depth:
        msg = (
            f"keep= names depth={depth} blocks of {stack.path!r} by their numbers, 0 to "
            f"{len(stack) - 1}, or names; got {list(keep)!r}"
        )
        raise ValueError(msg)
    return numbers


def _spread(num: int, depth: int, found: Differences) -> list[int]:
    """Return the numbers of the blocks that stay awake: whole periods where blocks alternate."""
    period = found.period or 1
    if period == 1 or depth in (0, num):
        return spread(num, depth)
    units = spread(num // period, math.ceil(depth / period))
    return [unit * period + i for unit in units for i in range(period)]


def _check_none_wakes(stack: Stack, sleepers: list[int]) -> None:
    waking = [i for i in range(len(stack)) if kind_of_sleep(stack.blocks[i]) == "waking"]
    wakes = [i for i in stack.numbers("asleep") if i not in sleepers]
    if waking or wakes:
        names = ", ".join(stack.full_name(i) for i in (*waking, *wakes))
        msg = (
            f"shallow puts blocks to sleep and wakes none; {names} would have to wake, or is on "
            "its way: call esper.deepen(model, optimizer, depth=...)"
        )
        raise ValueError(msg)


def _check_can_sleep(stack: Stack, fresh: Iterable[int]) -> None:
    for i in fresh:
        reason = cannot_sleep(stack.blocks[i])
        if reason is not None:
            raise refused(stack.path, f"{stack.full_name(i)!r}: {reason}")


def forms_of(stack: Stack, fresh: Iterable[int]) -> dict[type, Forms]:
    """Return what can be told of the form of each class of blocks that is to sleep.

    Args:
        stack: The stack.
        fresh: Numbers of blocks that are awake.

    Raises:
        ValueError: It cannot be told of one of them.
    """
    known = {
        type(b).__dict__["_esper_sleep"][0]: b.__dict__[FORMS]
        for b in stack.blocks
        if kind_of_sleep(b) is not None
    }
    for i in fresh:
        block = stack.blocks[i]
        if type(block) not in known:
            assumed = assumed_form(block, stack.container)
            if isinstance(assumed, str):
                raise refused(stack.path, f"{stack.full_name(i)!r}: {assumed}")
            known[type(block)] = Forms(stack.path, assumed)
    return known


def _say_differences(stack: Stack, found: Differences, awake: list[int], depth: int) -> None:
    """Warn where what is awake may not be what a model built with so many blocks would be."""
    shown = ", ".join(map(str, awake[:8])) + (", ..." if len(awake) > 8 else "")
    if found.has_cache_address and awake[:1] != [0]:
        warn_owner(
            f"block 0 of {stack.path!r} sleeps, and a cache of keys tells by it how long it is: do "
            "not generate with a cache until it is awake, or keep block 0"
        )
    if found.period not in (None, 1):
        warn_owner(
            f"the blocks of {stack.path!r} repeat every {found.period}: they differ in "
            f"{found.named()}. Whole periods stay awake where keep= does not say otherwise: "
            f"blocks {shown}, {len(awake)} where depth={depth}"
        )
    elif found.period is None and not found.are_as_first(awake):
        warn_owner(
            f"the blocks of {stack.path!r} differ in {found.named()}: with {shown} awake the model "
            f"is not the one that is built with {len(awake)} blocks; keep= names others"
        )


def load_depth_state(model: nn.Module, state: Mapping[str, float]) -> None:
    """Let the blocks of a model sleep and wake as those of another of its class did.

    Args:
        model: The model, outside of DistributedDataParallel.
        state: What :func:`depth_state` returned.

    Raises:
        ValueError: It names blocks that the model does not have, or that cannot sleep.
    """
    check_module("load_depth_state", model)
    inner = _outside_of_compile(model)
    paths = {name.rpartition(".")[0] for name in (*state, *depth_state(inner))}
    stacks = [stack_at(inner, path) for path in sorted(paths)]
    known = {stack.full_name(i) for stack in stacks for i in range(len(stack))}
    if not known >= state.keys():
        msg = f"no blocks of this model: {', '.join(sorted(state.keys() - known))}"
        raise ValueError(msg)
    for stack in stacks:
        shares = {i: state.get(stack.full_name(i), 1.0) for i in range(len(stack))}
        _load_shares(inner, stack, shares)


def _load_shares(model: nn.Module, stack: Stack, shares: Mapping[int, float]) -> None:
    fresh = [i for i in stack.numbers(None) if shares[i] < 1.0]
    _check_can_sleep(stack, fresh)
    forms = forms_of(stack, fresh)
    ignore_in_replicas(model, model, [stack.blocks[i] for i in fresh])
    for i in fresh:
        put_to_sleep(stack.blocks[i], forms[type(stack.blocks[i])])
    for i, share in shares.items():
        if kind_of_sleep(stack.blocks[i]) is not None:
            set_share(stack.blocks[i], share)
    heed_in_replicas(model, [stack.blocks[i] for i in stack.numbers(None)])
    allow_graphs(stack.blocks)
