"""A call of a layer: what its host was given, and which of it a kernel takes."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

_logger = logging.getLogger(__name__)
_shared_classes: Final[set[str]] = set()

_POSITIONAL: Final = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)


class LayerCall(NamedTuple):
    """The arguments of one forward.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[object, ...]
    kwargs: Mapping[str, object]

    @classmethod
    def of(cls, example: object) -> LayerCall:
        """Return the call that an example stands for.

        Args:
            example: A tensor (the only argument), a tuple (the positional ones) or a call.

        Raises:
            TypeError: It is something else.
        """
        if isinstance(example, LayerCall):
            return example
        if isinstance(example, Tensor | PackedSequence):
            return cls((example,), {})
        if isinstance(example, tuple):
            return cls(example, {})
        msg = (
            "an example is a tensor, a tuple of positional arguments or a LayerCall, found "
            f"{type(example).__name__}"
        )
        raise TypeError(msg)

    @property
    def x(self) -> Any:
        """The first argument that is not None, which kernels of one input read; None without one.

        Of keywords it is the first in their order here: see :func:`as_declared`.
        """
        if self.args and self.args[0] is not None:
            return self.args[0]
        values = (*self.args, *self.kwargs.values())
        return next((value for value in values if value is not None), None)

    @property
    def floating(self) -> Tensor | None:
        """The first floating tensor among the arguments, or None."""
        return next((t for t in self.tensors() if t.is_floating_point()), None)

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments."""
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]

    def detached(self) -> LayerCall:
        """Return a copy that shares nothing with this call, as far as its parts can be copied."""
        with torch.inference_mode(mode=False):  # what a probe makes of it may be differentiated
            args = tuple(map(_detached, self.args))
            return LayerCall(args, {name: _detached(value) for name, value in self.kwargs.items()})

    def to(self, device: torch.device) -> LayerCall:
        """Return the call with its tensors on ``device``."""
        return tree_map(  # type: ignore[no-any-return] # torch says Any
            lambda value: value.to(device) if isinstance(value, Tensor) else value, self
        )

    def with_dtype(self, dtype: torch.dtype) -> LayerCall:
        """Return the call with its floating tensors in ``dtype``, also those in its containers."""

        def cast(value: object) -> object:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.to(dtype)
            return value

        return tree_map(cast, self)  # type: ignore[no-any-return] # torch says Any

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> LayerCall:
        """Return the call with each tensor among its arguments changed."""
        return LayerCall(
            tuple(change(v) if isinstance(v, Tensor) else v for v in self.args),
            {k: change(v) if isinstance(v, Tensor) else v for k, v in self.kwargs.items()},
        )


@functools.lru_cache(maxsize=1024)
def declared_names(forward: Callable[..., object]) -> tuple[str, ...]:
    """Return the names of a forward's parameters in their order, without the first, the object."""
    try:
        return tuple(inspect.signature(forward).parameters)[1:]
    except (TypeError, ValueError):  # a builtin's
        return ()


def as_declared(
    names: tuple[str, ...], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> LayerCall:
    """Return a call with its keywords in the order in which the host declares them."""
    if len(kwargs) > 1:
        known = {name: kwargs[name] for name in names if name in kwargs}
        kwargs = {**known, **kwargs}
    return LayerCall(args, kwargs)


def _detached(value: object) -> object:
    if isinstance(value, Tensor):
        return value.clone().detach()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list | dict):
        return tree_map(_detached, value, is_leaf=lambda part: part is not value)
    try:
        return copy.deepcopy(value)
    except Exception as error:  # noqa: BLE001 - whatever an object of the user's raises
        _say_shared(f"{type(value).__module__}.{type(value).__qualname__}", error)
        return value


def _say_shared(name: str, error: Exception) -> None:
    """Say that an argument could not be copied, once for each class."""
    if name not in _shared_classes:
        _shared_classes.add(name)
        _logger.warning(
            "an argument of class %s cannot be copied, so it is shared with the call that is kept, "
            "which sees what becomes of it later",
            name,
            exc_info=error,
        )


Example = Tensor | tuple[object, ...] | LayerCall
"""What stands for a call: its only argument, its positional ones, or all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Takes:
    """What a kernel takes of a layer's call, beyond its first tensor.

    Keywords go by their names; the host's input goes first where the kernel has not that name.

    Attributes:
        num_positional: How many positional arguments, or None for all.
        names: Which keywords, or None for all.
    """

    num_positional: int | None
    names: frozenset[str] | None

    @classmethod
    def by(cls, kernel: nn.Module) -> Takes | None:
        """Return what a kernel's forward takes, or None if that is a single argument."""
        if "forward" in kernel.__dict__:
            return _takes(kernel.forward, num_bound=0)
        return _takes(type(kernel).forward, num_bound=1)

    def of(self, call: LayerCall) -> LayerCall:
        """Return the part of a call that the kernel takes."""
        names = self.names
        args, kwargs = call.args[: self.num_positional], call.kwargs
        if names is None:
            return LayerCall(args, kwargs)
        first = next(iter(kwargs), None)
        if not call.args and first is not None and first not in names and self.num_positional != 0:
            args = (kwargs[first],)  # the host's input, which the kernel calls by another name
        return LayerCall(args, {name: value for name, value in kwargs.items() if name in names})


@functools.lru_cache(maxsize=256)
def _takes(forward: Callable[..., object], num_bound: int) -> Takes | None:
    parameters = list(inspect.signature(forward).parameters.values())[num_bound:]
    kinds = [p.kind for p in parameters]
    takes_all = inspect.Parameter.VAR_POSITIONAL in kinds
    takes_any = inspect.Parameter.VAR_KEYWORD in kinds
    if len(kinds) == 1 and not (takes_all or takes_any):
        return None
    names = frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY)
    return Takes(
        num_positional=None if takes_all else sum(kind in _POSITIONAL for kind in kinds),
        names=None if takes_any else names,
    )
