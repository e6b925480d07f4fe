"""An owner's values as plain ones and tensors on the CPU, and back: a batch, moments, counters."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

_LEAVES: Final = (bool, int, float, str, type(None))


def as_plain(value: object) -> Any:
    """Return a value as lists of plain values and of tensors' copies on the CPU.

    Raises:
        TypeError: It is, or holds, anything but numbers, text, bytes, None, tensors, arrays of
            numbers, and dicts, lists and tuples of such; a class derived from these counts as
            something else.
    """
    kind: type = type(value)
    if kind in _LEAVES:
        return value
    if isinstance(value, torch.Tensor) and kind in (torch.Tensor, torch.nn.Parameter):
        return _plain_tensor(value)
    if isinstance(value, (list, tuple)) and kind in (list, tuple):
        return [kind.__name__, [as_plain(item) for item in value]]
    if isinstance(value, dict) and kind is dict:
        return ["dict", [[as_plain(key), as_plain(item)] for key, item in value.items()]]
    if isinstance(value, bytes) and kind is bytes:
        return ["bytes", value.hex()]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    if isinstance(value, np.ndarray) and kind is np.ndarray and value.dtype.kind in "biuf":
        return ["array", value.dtype.str, list(value.shape), value.tobytes().hex()]
    msg = f"a {kind.__qualname__} is no plain value"
    raise TypeError(msg)


def from_plain(value: Any, device: torch.device) -> Any:
    """Return the value that :func:`as_plain` was given.

    Args:
        value: What it returned.
        device: Where tensors are now that were not on the CPU.

    Raises:
        KeyError: It is nothing of the kind.
    """
    if not isinstance(value, list):
        return value
    return _MADE[value[0]](device, *value[1:])


def _plain_tensor(value: torch.Tensor) -> list[Any]:
    if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
        msg = f"a tensor of layout {value.layout} on {value.device} is no plain value"
        raise TypeError(msg)
    is_aside = value.device.type == "cpu"
    return ["tensor", is_aside, value.requires_grad, value.detach().to("cpu", copy=True)]


def _tensor(device: torch.device, is_aside: bool, needs_grad: bool, value: Any) -> Any:  # noqa: FBT001 - as it is stored
    made = value.to("cpu" if is_aside else device, copy=True)
    return made.requires_grad_() if needs_grad else made


def _array(_device: torch.device, dtype: str, shape: list[int], data: str) -> Any:
    return np.frombuffer(bytes.fromhex(data), dtype=np.dtype(dtype)).reshape(shape).copy()


_MADE: Final[dict[str, Any]] = {
    "list": lambda device, items: [from_plain(item, device) for item in items],
    "tuple": lambda device, items: tuple(from_plain(item, device) for item in items),
    "dict": lambda device, items: {
        from_plain(key, device): from_plain(item, device) for key, item in items
    },
    "bytes": lambda _device, data: bytes.fromhex(data),
    "device": lambda _device, name: torch.device(name),
    "tensor": _tensor,
    "array": _array,
}
