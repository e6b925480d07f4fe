"""Which parameters DistributedDataParallel leaves alone, told to whatever module it is given."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from torch import nn

IGNORED: Final = "_ddp_params_and_buffers_to_ignore"
"""Where DistributedDataParallel looks, on the module that it is given and on no other."""
_OURS: Final = "_esper_ignored"
"""Which of the names there are ours, to be taken out again."""

_roots: Final[weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]]] = (
    weakref.WeakKeyDictionary()
)
"""The outermost module that was told of a block."""


def ignore_in_replicas(root: nn.Module, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Let DistributedDataParallel ignore blocks, whichever module around them it is given.

    Args:
        root: The outermost module that it may be given.
        model: The model that the blocks are in.
        blocks: Those that are to sleep; what they share with others is not ignored.

    Raises:
        ValueError: The model is not in ``root``.
    """
    own = _own_tensors(root, blocks)
    for holder, names in _holders(root, model, blocks):
        below = {
            f"{name}.{part}"
            for name, block in names
            for part, tensor in (*block.named_parameters(), *block.named_buffers())
            if id(tensor) in own
        }
        ours = below | {f"_orig_mod.{name}" for name in below}
        kept = set(getattr(holder, IGNORED, ()))
        holder.__dict__[_OURS] = holder.__dict__.get(_OURS, set()) | (ours - kept)
        holder.__dict__[IGNORED] = kept | ours
    _roots.update(dict.fromkeys(blocks, weakref.ref(root)))


def heed_in_replicas(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Let replications that are made from now on have the parameters of blocks that are awake.

    Args:
        model: The model that they are in.
        blocks: The blocks.
    """
    wanted: set[int] = set()
    holders = dict.fromkeys(model.modules())
    for block in blocks:
        wanted.update(map(id, (*block.parameters(), *block.buffers())))
        root = root_of(block)
        holders.update(dict.fromkeys(() if root is None else root.modules()))
    for holder in holders:
        ours = holder.__dict__.get(_OURS)
        if ours is None:
            continue
        tensors = (*holder.named_parameters(), *holder.named_buffers())
        names = {name for name, tensor in tensors if id(tensor) in wanted}
        gone = ours & (names | {f"_orig_mod.{name}" for name in names})
        holder.__dict__[_OURS] = ours - gone
        holder.__dict__[IGNORED] = holder.__dict__[IGNORED] - gone
        for entry in (_OURS, IGNORED):
            if not holder.__dict__[entry]:
                del holder.__dict__[entry]


def root_of(block: nn.Module) -> nn.Module | None:
    """Return the outermost module that was told of a block, if it is there still."""
    return _roots.get(block, lambda: None)()


def check_ignored(block: nn.Module) -> None:
    """Refuse a forward under DistributedDataParallel that waits for a sleeping block's gradients.

    Raises:
        ValueError: It was made before the block was put to sleep, or not told of it.
    """
    active = nn.parallel.DistributedDataParallel
    replicated = active._active_ddp_module  # noqa: SLF001 - nobody else knows it
    if replicated is None:
        return
    awaited = set(map(id, replicated._module_parameters))  # noqa: SLF001 - as above
    trained = [p for p in block.parameters() if p.requires_grad]
    if trained and all(id(p) in awaited for p in trained):
        msg = (
            "DistributedDataParallel waits for the gradients of a block that sleeps: call "
            "esper.shallow before it, with root= the module that it is given"
        )
        raise ValueError(msg)


def _own_tensors(root: nn.Module, blocks: Sequence[nn.Module]) -> set[int]:
    """Return the ids of what the blocks hold, and nothing else in the model does."""
    inside = {id(part) for block in blocks for part in block.modules()}
    others = {
        id(tensor)
        for part in root.modules()
        if id(part) not in inside
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
    }
    own = {id(t) for block in blocks for t in (*block.parameters(), *block.buffers())}
    return own - others


def _holders(
    root: nn.Module, model: nn.Module, blocks: Sequence[nn.Module]
) -> Iterator[tuple[nn.Module, list[tuple[str, nn.Module]]]]:
    """Yield each module from the root down to the blocks, with the blocks by their names in it."""
    modules = {id(module): name for name, module in root.named_modules()}
    if id(model) not in modules:
        msg = (
            "root= is the module that DistributedDataParallel will be given, and holds the model; "
            f"this {type(root).__name__} does not"
        )
        raise ValueError(msg)
    wanted = {id(block): block for block in blocks}
    for holder in root.modules():
        inside = [(name, m) for name, m in holder.named_modules() if id(m) in wanted]
        if inside and id(holder) not in wanted:
            yield holder, inside
