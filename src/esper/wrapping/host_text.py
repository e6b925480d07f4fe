"""Words for the host that an export is built on: its class, its arguments, its input, its parts."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Final

from torch import Tensor, nn

from esper.wrapping.plain import is_grafted

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.state.layer_call import LayerCall

_SIMPLE: Final = (bool, int, float, str)


def construction_text(host: nn.Module | None) -> str:
    """Return the call that makes a fresh host: arguments with the values of like attributes."""
    if host is None:
        return "Host(...)"
    name = type(host).__name__
    try:
        parameters = list(inspect.signature(type(host)).parameters.values())
    except (TypeError, ValueError):
        return f"{name}(...)"
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return f"{name}(...)"
    told = [_argument(host, p) for p in parameters if p.kind is not p.VAR_KEYWORD]
    return f"{name}({', '.join(filter(None, told))})"


def _argument(host: nn.Module, parameter: inspect.Parameter) -> str:
    """Return an argument as it is read off the host, or its name where that does not tell it."""
    value = getattr(host, parameter.name, None)
    if isinstance(value, _SIMPLE):
        return "" if value == parameter.default else f"{parameter.name}={value!r}"
    return "" if parameter.default is not parameter.empty else parameter.name


def source_text(host: nn.Module | None) -> str:
    """Say where the host's class comes from."""
    module = "" if host is None else type(host).__module__
    if module.startswith("torch.nn."):
        return " of `torch.nn`"
    return "" if module in ("", "__main__") else f" of `{module}`"


def input_text(example: LayerCall | None) -> str:
    """Say what the model is called with: the shape and dtype of each tensor, samples first."""
    if example is None:
        return ""
    given = [_shape(value) for value in example.args if isinstance(value, Tensor)]
    given += [f"{k}={_shape(v)}" for k, v in example.kwargs.items() if isinstance(v, Tensor)]
    return ", ".join(given)


def _shape(tensor: Tensor) -> str:
    sizes = ", ".join(["N", *map(str, tensor.shape[1:])]) if tensor.ndim else ""
    return f"[{sizes}] {str(tensor.dtype).removeprefix('torch.')}"


def host_parts(model: nn.Module, name_of: Callable[[str], str]) -> dict[str, str]:
    """Describe every module that a fresh host has, by the name that it has there.

    Args:
        model: The grown model, plain.
        name_of: From a module's name in it to the name in a fresh host.
    """
    parts: dict[str, str] = {}
    grown: list[str] = []
    for name, module in model.named_modules():
        if is_grafted(module):
            children = (child for child, _ in module.named_children() if child != "host")
            grown += [f"{name}.{child}".lstrip(".") for child in children]
        elif not any(name == seed or name.startswith(f"{seed}.") for seed in grown):
            parts[name_of(name)] = _described(module)
    return parts


def _described(module: nn.Module) -> str:
    shapes = [f"{name} {list(p.shape)}" for name, p in module.named_parameters(recurse=False)]
    return ", ".join([type(module).__name__, *shapes])
