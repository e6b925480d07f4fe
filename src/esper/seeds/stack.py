"""Stacks of blocks: which blocks there are, what tells them apart, and which of them stay awake."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from esper.seeds.sleep import kind_of_sleep
from esper.state.host_parts import is_in_a_seed

CONTAINERS: Final = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
"""What a stack may be."""

CACHE_ADDRESS: Final = "layer_idx"
"""An index of this name says where a cache keeps a block's keys: nothing is computed from it."""

_PLAIN: Final = (bool, int, float, str, type(None))
_OF_TORCH: Final = frozenset(vars(nn.Module())) | {"training"}

Signature = dict[str, object]
"""What a block is, by name: classes, attributes and shapes, a sleeping one's as if awake."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stack:
    """Blocks that a model calls one behind the other.

    Attributes:
        path: Dotted name of the container in the model.
        container: The container.
        names: Names of the blocks in it, in their order.
        blocks: The blocks.
    """

    path: str
    container: nn.Module
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    def full_name(self, number: int) -> str:
        """Return the dotted name of a block in the model."""
        return ".".join(filter(None, (self.path, self.names[number])))

    def numbers(self, kind: str | None) -> list[int]:
        """Return the numbers of the blocks that are ``"asleep"``, ``"waking"`` or awake (None)."""
        return [i for i, block in enumerate(self.blocks) if kind_of_sleep(block) == kind]


def stack_at(model: nn.Module, path: str) -> Stack:
    """Return the stack at a path.

    Raises:
        ValueError: There is none, or it holds a block twice.
    """
    try:
        container = model.get_submodule(path)
    except AttributeError:
        container = None
    if not isinstance(container, CONTAINERS) or not len(container):
        found = ", ".join(repr(each.path) for each in stacks_of(model)) or "none"
        what = "there is nothing" if container is None else f"it is a {type(container).__name__}"
        msg = (
            f"{path!r} is no stack of blocks: {what}; a stack is a ModuleList, Sequential or "
            f"ModuleDict with blocks in it. In this model: {found}"
        )
        raise ValueError(msg)
    stack = _stack(path, container)
    if len(set(map(id, stack.blocks))) < len(stack):
        msg = f"{path!r} has a block more than once: what is shared cannot sleep in one place alone"
        raise ValueError(msg)
    return stack


def stacks_of(model: nn.Module) -> list[Stack]:
    """Return the containers of a model that hold two modules of one class or more, or sleepers."""
    found = []
    for path, container in model.named_modules():
        if isinstance(container, CONTAINERS) and len(container) > 1 and not is_in_a_seed(path):
            stack = _stack(path, container)
            classes = {_own_class(block) for block in stack.blocks}
            if len(classes) < len(stack) or any(map(kind_of_sleep, stack.blocks)):
                found.append(stack)
    return found


def _stack(path: str, container: nn.Module) -> Stack:
    named = {
        name: block
        for name, block in container._modules.items()  # noqa: SLF001 - named_children drops doubles
        if block is not None and not is_in_a_seed(name)
    }
    return Stack(path=path, container=container, names=tuple(named), blocks=tuple(named.values()))


def spread(num_blocks: int, depth: int) -> list[int]:
    """Return the numbers of ``depth`` blocks out of so many: ``floor(i n / depth)``."""
    return [i * num_blocks // depth for i in range(depth)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """What tells the blocks of a stack apart.

    Attributes:
        signatures: Of each block, what differs between any two of them, by name.
        period: After how many blocks they repeat; 1 where they are alike, None where they do not.
        has_cache_address: Whether they have an index that a cache goes by.
    """

    signatures: tuple[Signature, ...]
    period: int | None
    has_cache_address: bool

    def named(self) -> str:
        """Say what differs, with the values of the first blocks."""
        names = sorted({name for signature in self.signatures for name in signature})
        told = []
        for name in names[:3]:
            values = [signature.get(name, "none") for signature in self.signatures]
            shown = ", ".join(map(str, values[:4]))
            told.append(f"{name} ({shown}{', ...' if len(values) > 4 else ''})")
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(told) + rest

    def are_as_first(self, awake: Sequence[int]) -> bool:
        """Say whether blocks are what a model built with so many would have.

        Args:
            awake: Numbers of the blocks, rising.
        """
        last = self.signatures[-1]
        if len(self.signatures) > 2 and last not in self.signatures[:-1]:
            return False  # the last of a smaller model would be as special
        return [self.signatures[i] for i in awake] == list(self.signatures[: len(awake)])


def differences(stack: Stack) -> Differences:
    """Compare the blocks of a stack."""
    whole = [dict(_signature(block)) for block in stack.blocks]
    addresses = [name for name in whole[0] if name.rpartition(".")[2] == CACHE_ADDRESS]
    addresses = [n for n in addresses if [w.get(n) for w in whole] == list(range(len(whole)))]
    for signature in whole:
        for name in addresses:
            del signature[name]
    names = {name for signature in whole for name in signature}
    missing = object()
    odd = {n for n in names if any(w.get(n, missing) != whole[0].get(n, missing) for w in whole)}
    found = tuple({n: w[n] for n in w if n in odd} for w in whole)
    return Differences(signatures=found, period=_period(found), has_cache_address=bool(addresses))


def _period(signatures: Sequence[Signature]) -> int | None:
    num = len(signatures)
    for period in range(1, num // 2 + 1):
        if all(signatures[i] == signatures[i - period] for i in range(period, num)):
            return period
    return 1 if num == 1 else None


def _signature(block: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield what a block is, by names: classes, plain attributes, shapes and dtypes."""
    for path, part in block.named_modules():
        if is_in_a_seed(path):
            continue
        prefix = f"{path}." if path else ""
        yield f"{prefix}class", _own_class(part)
        for name, value in vars(part).items():
            if name not in _OF_TORCH and not name.startswith("_") and _is_plain(value):
                yield prefix + name, value
    for name, tensor in (*block.named_parameters(), *block.named_buffers()):
        if not is_in_a_seed(name):
            yield f"{name}.shape", (tuple(tensor.shape), tensor.dtype)


def _own_class(block: nn.Module) -> str:
    """Return the name of a block's class, that of a sleeping one's own."""
    key: Any = getattr(type(block), "_esper_sleep", None)
    return (type(block) if key is None else key[0]).__name__


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)
