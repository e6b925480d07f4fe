"""The rows of a batch: how many samples it has, some of them, and parts joined again.

A batch is a tensor, or tuples, lists and mappings of them, nested. The samples are the first axis
of every tensor that has one; what has none (a number, None, a tensor without axes) belongs to all
samples alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_SHARED: Final = (bool, int, float, complex, type(None))


class NoRowsError(ValueError):
    """A value cannot be cut into samples; the message says which part of it stands against that."""


def num_rows(value: object) -> int:
    """Return how many samples a batch has.

    Raises:
        NoRowsError: Its tensors have different numbers of them, none has any, or a part is neither
            a tensor nor belongs to all samples alike.
    """
    sizes = {len(tensor) for tensor in _tensors(value, "the batch")}
    if not sizes:
        msg = "no tensor in the batch has an axis of samples"
        raise NoRowsError(msg)
    if len(sizes) > 1:
        found = " and ".join(map(str, sorted(sizes)))
        msg = f"the batch is ragged: its tensors have {found} rows"
        raise NoRowsError(msg)
    return sizes.pop()


def rows_of(value: Any, start: int, stop: int) -> Any:
    """Return some samples of a batch, as views; the batch has rows, as :func:`num_rows` found.

    Args:
        value: The batch.
        start: The first of them.
        stop: The first that is not among them.
    """
    return _mapped(value, lambda tensor: tensor[start:stop])


def spread_rows(value: Any, num: int, *, random_seed: int) -> Any:
    """Return samples from all over a batch, in its order, as copies: one of each of equal ranges.

    Those that stand at equal distances may be alike where others are not.

    Args:
        value: The batch.
        num: How many, at least 1 and at most what it has.
        random_seed: Says which of each range.
    """
    total = num_rows(value)
    shares = torch.rand(num, generator=torch.Generator().manual_seed(random_seed)).tolist()
    edges = pairwise(i * total // num for i in range(num + 1))
    index = [a + int(share * (b - a)) for (a, b), share in zip(edges, shares, strict=True)]
    return _mapped(value, lambda tensor: tensor[index])


def cuts(num: int, most: int) -> list[tuple[int, int]]:
    """Return where parts of at most ``most`` of ``num`` samples begin and end.

    They are as few as can be, and of sizes that differ by one at most.
    """
    count = -(-num // most)
    edges = [i * num // count for i in range(count + 1)]
    return list(pairwise(edges))


def shapes_of(value: object) -> str:
    """Return dtypes and shapes of a batch's tensors without the axis of samples, as one text."""
    return " ".join(
        f"{str(t.dtype).removeprefix('torch.')}{list(t.shape[1:])}"
        for t in _tensors(value, "the batch")
    )


def joined_rows(parts: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Return what was given part by part as if it had been given at once.

    Args:
        parts: What each part gave, at least one.
        sizes: How many samples each part had.

    Raises:
        NoRowsError: They are not alike, or what they hold has not one row a sample.
    """
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        msg = "the parts gave values of different types"
        raise NoRowsError(msg)
    if isinstance(first, Tensor):
        shapes = [tuple(part.shape[:1]) for part in parts]
        if shapes != [(size,) for size in sizes]:
            msg = f"what it gives has not one row a sample: {shapes} of {list(sizes)} samples"
            raise NoRowsError(msg)
        return torch.cat(tuple(parts))
    if isinstance(first, Mapping):
        if any(list(part) != list(first) for part in parts):
            msg = "the parts gave different names"
            raise NoRowsError(msg)
        items = {name: joined_rows([part[name] for part in parts], sizes) for name in first}
        return _with_items(first, items)
    if isinstance(first, (tuple, list)):
        if any(len(part) != len(first) for part in parts):
            msg = "the parts gave different numbers of values"
            raise NoRowsError(msg)
        found = [joined_rows(values, sizes) for values in zip(*parts, strict=True)]
        return _like_sequence(first, found)
    if isinstance(first, _SHARED) and all(part == first for part in parts):
        return first
    msg = f"what it gives holds a {type(first).__name__}"
    raise NoRowsError(msg)


def _tensors(value: object, where: str) -> list[Tensor]:
    """Return the tensors of a batch that have an axis of samples.

    Raises:
        NoRowsError: A part is something else than a tensor or what belongs to all samples alike.
    """
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            msg = f"{where} is a tensor of the layout {value.layout}"
            raise NoRowsError(msg)
        return [value] if value.ndim else []
    if isinstance(value, PackedSequence):
        msg = f"{where} is a PackedSequence, whose samples are not the rows of its tensors"
        raise NoRowsError(msg)
    if isinstance(value, MutableMapping):
        return [t for name, part in value.items() for t in _tensors(part, f"{where}[{name!r}]")]
    if isinstance(value, (tuple, list)):
        return [t for i, part in enumerate(value) for t in _tensors(part, f"{where}[{i}]")]
    if isinstance(value, _SHARED):
        return []
    msg = f"{where} is a {type(value).__name__}, of which nobody knows its samples"
    raise NoRowsError(msg)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.ndim else value
    if isinstance(value, MutableMapping):
        return _with_items(value, {name: _mapped(part, change) for name, part in value.items()})
    if isinstance(value, (tuple, list)):
        return _like_sequence(value, [_mapped(part, change) for part in value])
    return value


def _with_items(mapping: Any, items: Mapping[Any, Any]) -> Any:
    """Return a mapping of the same class with other items under its names."""
    if type(mapping) is dict:
        return dict(items)
    made = copy.copy(mapping)
    for name, item in items.items():
        made[name] = item
    return made


def _like_sequence(value: Any, items: list[Any]) -> Any:
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
