"""A module made of a few of torch's own as JSON values, and built from them again.

Data and not code: what is built is one of the classes that are named here, or nothing.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Mapping

_CLASSES: Final[dict[str, type[nn.Module]]] = {
    cls.__name__: cls
    for cls in (
        *(nn.Linear, nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU),
        *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout),
        *(nn.Conv1d, nn.Conv2d),
    )
}
_NOT_SAID: Final = ("self", "device", "dtype")


def described_module(module: nn.Module) -> dict[str, Any] | None:
    """Return a module as JSON values; None where it is made of anything else.

    Args:
        module: One of the classes above, or a Sequential of such, to any depth.
    """
    if type(module) is nn.Sequential:
        parts = {name: described_module(part) for name, part in module.named_children()}
        return None if None in parts.values() else {"class": "Sequential", "parts": parts}
    cls = _CLASSES.get(type(module).__name__)
    if type(module) is not cls:
        return None
    names = [name for name in inspect.signature(cls).parameters if name not in _NOT_SAID]
    if not all(hasattr(module, name) for name in names):
        return None
    form = {"class": cls.__name__, "arguments": {n: _value(getattr(module, n)) for n in names}}
    return form if _is_alike(module, form) else None


def built_module(form: Mapping[str, Any]) -> nn.Module:
    """Return the module that a form describes, with weights of its own.

    Raises:
        ValueError: The form names a class that is none of those above.
    """
    if form["class"] == "Sequential":
        made = nn.Sequential()
        for name, part in form["parts"].items():
            made.add_module(name, built_module(part))
        return made
    if form["class"] not in _CLASSES:
        msg = f"a kernel of torch's {', '.join(_CLASSES)} was expected, found {form['class']!r}"
        raise ValueError(msg)
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in form["arguments"].items()}
    return _CLASSES[form["class"]](**given)


def _value(value: Any) -> Any:
    """Return an attribute as the constructor takes it: a bias is there, or not."""
    if value is None or isinstance(value, torch.Tensor):
        return value is not None
    return list(value) if isinstance(value, tuple) else value


def _is_alike(module: nn.Module, form: Mapping[str, Any]) -> bool:
    """Say whether a form builds a module with the same tensors."""
    try:
        with torch.device("meta"):
            made = built_module(form)
    except (TypeError, ValueError, RuntimeError):
        return False
    ours, theirs = module.state_dict(), made.state_dict()
    return {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}
