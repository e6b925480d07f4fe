"""One checkpoint of all ranks: what the first one has, and what the others have in another way.

Parameters and moments are the same on every rank; draws, running statistics and what a Grower
counted are not. A tensor that a rank has as the first one does is in the file once.
"""

from __future__ import annotations

import errno
import hashlib
import json
from typing import TYPE_CHECKING, Final

from esper.contracts.checkpoint_format import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from esper.continuity.agreement import Ranks
    from esper.contracts.canonical_json import JsonValue
    from esper.contracts.checkpoint_format import ParsedCheckpoint

    Tensors = Mapping[str, StoredTensor]

RANKS: Final = "ranks"
"""Key of the content under which the other ranks' contents are, in their order."""


def of_all_ranks(
    ranks: Ranks, made: list[JsonValue], tensors: Tensors
) -> tuple[list[JsonValue], Tensors]:
    """Return what is to be written on the first rank; the others get back what they gave.

    Args:
        ranks: Who call this, all of them.
        made: This rank's content as JSON, a written dict.
        tensors: Its tensors by name.
    """
    mine = {name: _digest(tensor) for name, tensor in tensors.items()}
    firsts = json.loads(ranks.of_one(0, lambda: json.dumps(mine).encode()))
    own = {
        name: (tensor.dtype, tensor.shape, bytes(tensor.data))
        for name, tensor in tensors.items()
        if firsts.get(name) != mine[name]
    }
    found = ranks.to_first((made, own))
    if found is None:
        return made, tensors
    whole, others = dict(tensors), [theirs for theirs, _ in found[1:]]
    for rank, (_, held) in enumerate(found):
        for name, (dtype, shape, data) in held.items():
            stored = StoredTensor(dtype=dtype, shape=shape, data=data)
            whole[f"{_prefix(rank)}{name}"] = stored
    return [*made, RANKS, ["list", *others]], whole


def of_rank(parsed: ParsedCheckpoint, rank: int) -> tuple[JsonValue, dict[str, StoredTensor], int]:
    """Return a rank's content, its tensors, and how many ranks the checkpoint is of.

    A rank that the checkpoint does not have gets what the first one had.
    """
    content, others = parsed.content, []
    if isinstance(content, list) and len(content) > 2 and content[-2] == RANKS:
        last = content[-1]
        others = last[1:] if isinstance(last, list) else []
        content = content[:-2]
    if not 0 < rank <= len(others):
        return content, parsed.tensors, len(others) + 1
    prefix = _prefix(rank)
    own = {n.removeprefix(prefix): t for n, t in parsed.tensors.items() if n.startswith(prefix)}
    return others[rank - 1], {**parsed.tensors, **own}, len(others) + 1


def shared_bytes(ranks: Ranks, path: Path) -> bytes:
    """Return a file's bytes on every rank; the rank reads it that has the one written last.

    Args:
        ranks: Who call this, all of them.
        path: The file; on some ranks there may be none, or an older one.

    Raises:
        FileNotFoundError: No rank has it.
        OSError: It cannot be read.
    """
    written = ranks.each(lambda: path.stat().st_mtime_ns if path.is_file() else -1)
    last = max(written)
    if last < 0:
        raise FileNotFoundError(errno.ENOENT, "no rank has the file", str(path))
    return ranks.of_one(written.index(last), path.read_bytes)


def _prefix(rank: int) -> str:
    return f"rank {rank}: "


def _digest(tensor: StoredTensor) -> str:
    made = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    made.update(tensor.data)
    return made.hexdigest()
