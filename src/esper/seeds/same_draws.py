"""Parts of a pass that draw the random numbers which the pass on the whole batch would have drawn.

A dropout draws one number for each element of what it is given. In a part each draw is made as
large as for the whole batch, from the random state that the whole pass began with, and the part
takes its rows of it. So the masks of all parts together are those of the whole, and the random
state behind each part is that behind the whole. One draw at a time stands in memory as large as the
whole batch needs it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from esper.contracts.errors import GrowthError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ATEN: Final = torch.ops.aten
_FILLS: Final = frozenset(
    {
        _ATEN.bernoulli_.float,
        _ATEN.uniform_.default,
        _ATEN.normal_.default,
        _ATEN.exponential_.default,
    }
)
"""Fill the tensor that they are given."""
_LIKE: Final = frozenset({_ATEN.rand_like.default, _ATEN.randn_like.default})
"""Return a tensor like the one that they are given."""
_SIZED: Final = frozenset({_ATEN.rand.default, _ATEN.randn.default})
"""Return a tensor of the size that they are given."""


class UnknownDrawError(GrowthError):
    """A pass draws random numbers in a way of which no part can be taken."""


class SameDraws:
    """Lets parts of a pass draw what the whole would have.

    Args:
        model: What is run; of its devices the random states are followed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._devices = devices_of(model)
        self._state = torch_states(self._devices)

    @contextmanager
    def of(self, part: tuple[int, int], num: int) -> Iterator[None]:
        """Run a part.

        Args:
            part: The first sample of the part, and the first behind it.
            num: Samples of the whole batch.

        Raises:
            UnknownDrawError: Something is drawn of which no part can be taken.
        """
        set_torch_states(self._devices, self._state)
        with _Drawing(self._devices, *part, num):
            yield


def devices_of(model: nn.Module) -> list[torch.device]:
    """Return the accelerators that a model is on."""
    found = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    return sorted(found, key=str)


def torch_states(devices: list[torch.device]) -> list[Tensor]:
    """Return the random states of torch on the CPU and on some devices."""
    of_devices = [torch.get_device_module(each).get_rng_state(each) for each in devices]
    return [torch.get_rng_state(), *of_devices]


def set_torch_states(devices: list[torch.device], states: list[Tensor]) -> None:
    """Put the random states back that :func:`torch_states` returned."""
    torch.set_rng_state(states[0])
    for device, state in zip(devices, states[1:], strict=True):
        torch.get_device_module(device).set_rng_state(state, device)


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch has none
    """Draws for the whole batch what is drawn, and gives the rows of one part."""

    def __init__(self, devices: list[torch.device], start: int, stop: int, num: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # as above
        self._devices = devices
        self._start, self._stop, self._num = start, stop, num

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation as it is, unless it draws."""
        given = kwargs or {}
        is_own = given.get("generator") is not None  # somebody's, who says where it stands
        if is_own or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **given)
        if func in _FILLS:
            return args[0].copy_(self._rows(func(self._whole(args[0]), *args[1:], **given)))
        if func in _LIKE:
            return self._rows(func(self._whole(args[0]), *args[1:], **given)).clone()
        if func in _SIZED:
            return self._rows(func(self._size(args[0]), *args[1:], **given)).clone()
        if func is _ATEN.native_dropout.default:
            return self._dropout(func, *args, **given)
        return self._undrawn(func, *args, **given)

    def _undrawn(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an operation that may draw, as an attention with or without dropout."""
        before = torch_states(self._devices)
        found = func(*args, **kwargs)
        if all(map(torch.equal, before, torch_states(self._devices))):
            return found
        msg = f"{func} draws random numbers, of which no part can be taken"
        raise UnknownDrawError(msg)

    def _dropout(self, func: Callable[..., Any], x: Tensor, p: float, train: Any) -> Any:
        _, mask = func(torch.ones_like(self._whole(x)), p, train)
        rows = self._rows(mask).clone()
        scale = 0.0 if p == 1 else 1.0 / (1.0 - p)
        return (x * rows * scale if train or train is None else x.clone()), rows

    def _size(self, size: Any) -> list[int]:
        """Return the size of a draw for the whole batch."""
        first, num_part = (size[0] if size else 0), self._stop - self._start
        if not size or first % num_part:
            msg = f"random numbers of the size {list(size)} are not so many for each sample"
            raise UnknownDrawError(msg)
        return [first // num_part * self._num, *size[1:]]

    def _whole(self, like: Tensor) -> Tensor:
        """Return a tensor as large as for the whole batch, its axes in memory in the same order.

        A draw fills a tensor in that order.
        """
        size, strides, step = self._size(like.shape), [0] * like.ndim, 1
        axes = sorted(
            range(like.ndim), key=lambda axis: (like.stride(axis), like.size(axis), -axis)
        )
        for axis in axes:
            strides[axis] = step
            step *= size[axis]
        return like.new_empty_strided(size, strides)

    def _rows(self, drawn: Tensor) -> Tensor:
        each = len(drawn) // self._num
        return drawn[self._start * each : self._stop * each]
