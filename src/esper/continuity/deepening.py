"""``esper.deepen``: blocks that slept come in, a little more behind each update."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper.continuity.ensemble import joined, members_of
from esper.continuity.replicas import Woken, bare, forget_woken, replicas, share_woken
from esper.continuity.step_hooks import StepHooks, is_update
from esper.contracts.arguments import whole_number
from esper.contracts.choices import INITS, DepthInit
from esper.seeds.replica_names import heed_in_replicas, ignore_in_replicas, root_of
from esper.seeds.shallow import forms_of
from esper.seeds.sleep import (
    FORMS,
    allow_graphs,
    check_can_wake,
    copies_of,
    put_to_sleep,
    set_share,
    share_of,
)
from esper.seeds.stack import Stack, differences, stack_at, stacks_of
from esper.state.host_parts import check_module, is_in_a_seed

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from esper.continuity.ensemble import AnyOptimizer
    from esper.seeds.sleep_form import Forms

RAMP_UPDATES: Final = 200
"""Updates over which blocks come in where nobody says otherwise."""

_logger = logging.getLogger(__name__)

_under_way: Final[weakref.WeakKeyDictionary[nn.Module, weakref.ref[Deepening]]] = (
    weakref.WeakKeyDictionary()
)
"""Blocks whose alpha moves, and what moves it; an optimizer that is gone moves nothing."""


def deepen(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    depth: int,
    path: str | None = None,
    init: DepthInit = "fresh",
    ramp_updates: int = RAMP_UPDATES,
) -> tuple[str, ...]:
    """Wake blocks that sleep, until ``depth`` of their stack are awake.

    Nothing changes at that moment: a waking block is ``(1 - alpha) x + alpha B(x)``, and alpha
    rises from 0, where it still sleeps, behind each update of the optimizer. In the step in which
    alpha reaches 1 the block has its own class back. Blocks that are awake stay so; of the others
    those wake that lie evenly between them, whole periods where blocks alternate.

    Under DistributedDataParallel every rank makes the same call, with the replicated model.

    Args:
        model: A model after :func:`esper.shallow`; it may be inside DistributedDataParallel or
            ``torch.compile``.
        optimizer: What trains it, or all that train it together, the sleeping blocks included.
        depth: Blocks of the stack that are awake then, more than there are.
        path: Dotted name of the stack; None for the only one with blocks that sleep.
        init: ``"fresh"``: a block keeps its own weights. ``"copy"``: it gets the weights, buffers
            and moments of the nearest block before it that is awake now.
        ramp_updates: Updates until alpha is 1, at least 1.

    Returns:
        The names of the blocks that wake.

    Raises:
        TypeError: An argument is of the wrong type, or an optimizer is not supported.
        ValueError: There is no such stack, ``depth`` is none that it can come to, blocks of it are
            on their way already, the optimizer does not train them, or ``"copy"`` has no block to
            copy or one of another shape.
    """
    return begin_deepening(
        model, optimizer, depth=depth, path=path, init=init, ramp_updates=ramp_updates
    ).names


def begin_deepening(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | AnyOptimizer,
    *,
    depth: int,
    path: str | None,
    init: DepthInit,
    ramp_updates: int,
) -> Deepening:
    """Do what :func:`deepen` does, and return what moves alpha."""
    check_module("deepen", model)
    whole_number("ramp_updates", ramp_updates, least=1)
    if init not in INITS:
        msg = f"init is one of {', '.join(map(repr, INITS))}; got {init!r}"
        raise ValueError(msg)
    every, inner = joined(optimizer), bare(model)
    stack = sleeping_stack(inner, path)
    _take_over(stack, every)
    numbers = to_wake(stack, depth)
    check_is_trained(stack, numbers, every)
    for number in numbers:
        check_can_wake(stack.blocks[number])
    sources = sources_of(stack, numbers) if init == "copy" else {}
    for number, source in sources.items():
        _copy(stack.blocks[source], stack.blocks[number], every)
    blocks = [stack.blocks[i] for i in numbers]
    names = tuple(stack.full_name(i) for i in numbers)
    _share(model, dict(zip(names, blocks, strict=True)), every)
    return Deepening(model, every, names, blocks, ramp_updates)


class Deepening:
    """Blocks on their way from sleep; alpha moves behind each update, until all are awake.

    Args:
        model: The model as its owner has it.
        optimizer: What trains it; it has a hook until the blocks are awake, or :meth:`close`.
        names: Names of the blocks in the model.
        blocks: The blocks; one that is on its way goes on from where it is.
        ramp_updates: Updates until alpha is 1.
        forms: What is known of the form of each block's output; None: what the blocks know, none
            of which is awake.

    Attributes:
        names: As given.
        alpha: The least share of a block now, in [0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AnyOptimizer,
        names: tuple[str, ...],
        blocks: Sequence[nn.Module],
        ramp_updates: int,
        *,
        forms: Sequence[Forms] | None = None,
    ) -> None:
        self.names = names
        self._model, self._blocks = model, list(blocks)
        known = [block.__dict__[FORMS] for block in blocks] if forms is None else forms
        self._forms: list[Forms] = list(known)
        self._starts = [share_of(block) for block in blocks]
        self._ramp_updates = ramp_updates
        self._counts: dict[int, int] = {}
        self.alpha = min(self._starts)
        self._members = weakref.WeakSet(members_of(optimizer))
        self._hooks = StepHooks(optimizer, after=self._after_step)
        _under_way.update(dict.fromkeys(blocks, weakref.ref(self)))

    def state_dict(self, optimizer: AnyOptimizer) -> dict[str, Any]:
        """Return which blocks move and how far they are, as JSON can hold it.

        Args:
            optimizer: What trains the model.
        """
        return {
            "names": list(self.names),
            "starts": list(self._starts),
            "alpha": self.alpha,
            "ramp_updates": self._ramp_updates,
            "counts": [self._counts.get(id(member), 0) for member in members_of(optimizer)],
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], model: nn.Module, optimizer: AnyOptimizer
    ) -> Deepening:
        """Go on moving blocks that are as far as those of which :meth:`state_dict` was taken.

        Args:
            state: What it returned.
            model: The model as its owner has it; its blocks sleep and wake as they did then.
            optimizer: What trains it.

        Raises:
            ValueError: The model has no such stack.
        """
        names, inner = tuple(state["names"]), bare(model)
        stack = stack_at(inner, names[0].rpartition(".")[0])
        numbers = {stack.full_name(i): i for i in range(len(stack))}
        blocks = [stack.blocks[numbers[name]] for name in names]
        before = [mover for mover in map(_mover, blocks) if mover is not None]
        for mover in before:  # of a checkpoint that was loaded, if the Grower's state follows
            mover.close()
        awake = [numbers[name] for name in names if share_of(stack.blocks[numbers[name]]) >= 1.0]
        known = forms_of(stack, awake)
        forms = [b.__dict__[FORMS] if FORMS in b.__dict__ else known[type(b)] for b in blocks]
        if not awake and not before:
            _share(model, dict(zip(names, blocks, strict=True)), optimizer)
        made = cls(model, optimizer, names, blocks, int(state["ramp_updates"]), forms=forms)
        made._go_on(state, optimizer)
        return made

    def _go_on(self, state: Mapping[str, Any], optimizer: AnyOptimizer) -> None:
        self._starts, self.alpha = list(state["starts"]), float(state["alpha"])
        self._counts = dict(zip(map(id, members_of(optimizer)), state["counts"], strict=True))
        if self.is_done:
            self.close()

    @property
    def is_done(self) -> bool:
        """Whether every block is awake."""
        return self.alpha >= 1.0

    def moves_with(self, optimizer: AnyOptimizer) -> bool:
        """Say whether alpha moves with the steps of an optimizer, or of one of several."""
        return any(member in self._members for member in members_of(optimizer))

    def close(self) -> None:
        """Move nothing any more: blocks stay where they are, for another :func:`deepen`."""
        self._hooks.close()
        for block in self._blocks:
            _under_way.pop(block, None)

    def put_to_sleep(self) -> None:
        """Let the blocks sleep again, also those that are awake; between two steps."""
        self.close()
        for block, forms in zip(self._blocks, self._forms, strict=True):
            put_to_sleep(block, forms)
        allow_graphs(self._blocks)
        inner = bare(self._model)
        ignore_in_replicas(root_of(self._blocks[0]) or inner, inner, self._blocks)
        replicated = replicas(self._model)
        if replicated is not None:
            forget_woken(replicated, self._blocks)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        key = id(optimizer)
        self._counts[key] = self._counts.get(key, 0) + is_update(optimizer)
        self._set(min(1.0, max(self._counts.values()) / self._ramp_updates))

    def _set(self, way: float) -> None:
        """Set each block's alpha by how much of the way is done, in [0, 1]."""
        shares = [start + (1.0 - start) * way for start in self._starts]
        if min(shares) <= self.alpha:
            return
        changes_class = self.alpha <= 0.0 or way >= 1.0
        for block, share in zip(self._blocks, shares, strict=True):
            set_share(block, 1.0 if way >= 1.0 else share)
        if changes_class:
            allow_graphs(self._blocks)
        self.alpha = 1.0 if way >= 1.0 else min(shares)
        if self.is_done:
            self.close()
            heed_in_replicas(bare(self._model), self._blocks)


def ramps_of(model: nn.Module, optimizer: AnyOptimizer) -> list[dict[str, Any]]:
    """Return how far the blocks of a model are that an optimizer's updates wake."""
    movers = _movers_in(bare(model))
    return [mover.state_dict(optimizer) for mover in movers if mover.moves_with(optimizer)]


def resume_ramps(
    model: nn.Module, optimizer: AnyOptimizer, states: Sequence[Mapping[str, Any]]
) -> None:
    """Let blocks go on from where :func:`ramps_of` was taken; no others are on their way then.

    Args:
        model: The model; its blocks sleep and wake as they did then.
        optimizer: What trains it.
        states: What :func:`ramps_of` returned.
    """
    for mover in _movers_in(bare(model)):
        mover.close()
    for state in states:
        Deepening.from_state_dict(state, model, optimizer)


def _movers_in(model: nn.Module) -> list[Deepening]:
    found = (_mover(block) for block in model.modules())
    return list(dict.fromkeys(mover for mover in found if mover is not None))


def sleeping_stack(model: nn.Module, path: str | None) -> Stack:
    """Return the stack of a path, or the only one with blocks that are not awake.

    Raises:
        ValueError: There is no such stack, none of its blocks sleeps, or several stacks have some.
    """
    if path is not None:
        stack = stack_at(model, path)
        if len(stack.numbers(None)) == len(stack):
            msg = f"no block of {path!r} sleeps; esper.shallow puts blocks to sleep"
            raise ValueError(msg)
        return stack
    found = [stack for stack in stacks_of(model) if len(stack.numbers(None)) < len(stack)]
    if len(found) != 1:
        paths = ", ".join(repr(stack.path) for stack in found)
        what = (
            f"blocks of several stacks sleep ({paths}): name one by path="
            if found
            else ("no block of the model sleeps: call esper.shallow(model, path, depth=...) first")
        )
        raise ValueError(what)
    return found[0]


def to_wake(stack: Stack, depth: int) -> list[int]:
    """Return the numbers of the blocks that wake so that ``depth`` are awake.

    Raises:
        TypeError: ``depth`` is no whole number.
        ValueError: As many are awake, the stack has not so many, or blocks are on their way.
    """
    movers = [(stack.full_name(i), _mover(block)) for i, block in enumerate(stack.blocks)]
    busy = [(name, mover.alpha) for name, mover in movers if mover is not None]
    if busy:
        msg = (
            f"{', '.join(name for name, _ in busy)} wake already, and are at alpha "
            f"{busy[0][1]:.3g}; deepen again once they are awake"
        )
        raise ValueError(msg)
    num_awake = len(stack.numbers(None))
    if not num_awake < whole_number("depth", depth) <= len(stack):
        msg = (
            f"{num_awake} of the {len(stack)} blocks of {stack.path!r} are awake; depth is more "
            f"than that, and at most all of them; got {depth}"
        )
        raise ValueError(msg)
    begun = stack.numbers("waking")
    rest = [i for i in range(len(stack)) if i in stack.numbers("asleep")]
    missing = max(0, depth - num_awake - len(begun))
    return sorted([*begun, *_between(rest, missing, differences(stack).period or 1)])


def _take_over(stack: Stack, optimizer: AnyOptimizer) -> None:
    """Stop what moves blocks with other optimizers than those that train them now."""
    for block in stack.blocks:
        mover = _mover(block)
        if mover is not None and not mover.moves_with(optimizer):
            mover.close()


def is_moving(stack: Stack) -> bool:
    """Say whether the alpha of any block of a stack moves."""
    return any(_mover(block) is not None for block in stack.blocks)


def _mover(block: nn.Module) -> Deepening | None:
    """Return what moves a block's alpha, or None."""
    return _under_way.get(block, lambda: None)()


def _between(sleepers: Sequence[int], num: int, period: int) -> list[int]:
    """Choose so many of the sleepers, evenly spread, by whole periods."""
    if num >= len(sleepers):
        return list(sleepers)
    units: dict[int, list[int]] = {}
    for i in sleepers:
        units.setdefault(i // period, []).append(i)
    whole = list(units.values())
    num_units = -(-num // period)
    return [i for j in range(num_units) for i in whole[j * len(whole) // num_units]]


def check_is_trained(stack: Stack, numbers: Sequence[int], optimizer: AnyOptimizer) -> None:
    """Refuse an optimizer that does not have what is to wake.

    Raises:
        ValueError: A trainable parameter of a block is in no group.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for i in numbers:
        for name, p in stack.blocks[i].named_parameters():
            if p.requires_grad and id(p) not in held and not is_in_a_seed(name):
                msg = (
                    f"{stack.full_name(i)}.{name} is to wake and is in no param group of the "
                    "optimizer: give the optimizer all of the model's parameters from the first "
                    "step on, or a sequence of all optimizers, or freeze the block"
                )
                raise ValueError(msg)


def sources_of(stack: Stack, numbers: Sequence[int]) -> dict[int, int]:
    """Return for each block the nearest awake one before it; blocks on their way are not asked.

    Raises:
        ValueError: There is none, or it has other shapes.
    """
    awake = stack.numbers(None)
    found = {}
    for i in (n for n in numbers if n in stack.numbers("asleep")):
        before = [j for j in awake if j < i]
        if not before:
            msg = f"no block before {stack.full_name(i)!r} is awake to be copied; use init='fresh'"
            raise ValueError(msg)
        ours, theirs = (_shapes(stack.blocks[j]) for j in (i, before[-1]))
        if ours != theirs:
            odd = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
            msg = (
                f"{stack.full_name(i)!r} cannot be a copy of {stack.full_name(before[-1])!r}: they "
                f"differ in {', '.join(odd)}; use init='fresh'"
            )
            raise ValueError(msg)
        found[i] = before[-1]
    return found


def _shapes(block: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in _tensors(block)}


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a block's own parameters and buffers, without those of seeds."""
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if not is_in_a_seed(name):
            yield name, tensor


@torch.no_grad()
def _copy(source: nn.Module, block: nn.Module, optimizer: AnyOptimizer) -> None:
    """Give a block another's weights, buffers and moments; nothing is shared afterwards."""
    theirs = dict(_tensors(source))
    for each in (block, *copies_of(block)):
        for name, tensor in _tensors(each):
            if tensor is not theirs[name]:
                tensor.copy_(theirs[name])
    state = optimizer.state
    for name, tensor in _tensors(block):
        known = state.get(theirs[name]) if tensor is not theirs[name] else None
        if known:
            state[tensor] = {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in known.items()
            }


def _share(model: nn.Module, blocks: dict[str, nn.Module], optimizer: AnyOptimizer) -> None:
    """Make blocks equal on every rank of a replicated model, and let them be averaged."""
    replicated = replicas(model)
    if replicated is None:
        _say_if_apart(model)
        return
    own = [
        (f"{name}.{path}", part)
        for name, block in blocks.items()
        for path, part in block.named_modules()
        if not is_in_a_seed(path)
    ]
    params = {
        f"{name}.{below}": (part, p)
        for name, part in own
        for below, p in part.named_parameters(recurse=False)
    }
    buffers = {
        f"{name}.{below}": (part, below)
        for name, part in own
        for below, _ in part.named_buffers(recurse=False)
    }
    held = [p for _, p in params.values()]
    state = [v for p in held for v in (optimizer.state.get(p) or {}).values()]
    share_woken(
        replicated,
        Woken(
            params={name: entry for name, entry in params.items() if entry[1].requires_grad},
            buffers=buffers,
            state=[value for value in state if isinstance(value, Tensor)],
            frozen=[p for p in held if not p.requires_grad],
        ),
    )


def _say_if_apart(model: nn.Module) -> None:
    """Say where several processes train, and nothing is seen that keeps their blocks equal."""
    is_group = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if is_group and not any(hasattr(p, "full_tensor") for p in model.parameters()):
        _logger.warning(
            "blocks wake on one of several processes, and the model that was given is neither in "
            "DistributedDataParallel nor sharded by FSDP2: pass the replicated model, or each "
            "process trains blocks of its own"
        )
