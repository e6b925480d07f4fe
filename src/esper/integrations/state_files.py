"""A state of plain values and tensors as two files: JSON, and the tensors beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Mapping

_VALUES, _TENSORS = "esper.json", "esper.safetensors"
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"
_PLAIN: Final = (str, int, float, bool, type(None))


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a state into a folder that is there.

    Raises:
        TypeError: It holds something else than mappings, sequences, tensors and plain values.
    """
    tensors: dict[str, torch.Tensor] = {}
    document = _encoded(state, tensors)
    save_file(tensors, folder / _TENSORS)
    (folder / _VALUES).write_text(json.dumps(document), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """Return what :func:`write_state` wrote; empty where it wrote nothing."""
    if not (folder / _VALUES).exists():
        return {}
    document = json.loads((folder / _VALUES).read_text(encoding="utf-8"))
    state: dict[str, Any] = _decoded(document, load_file(folder / _TENSORS))
    return state


def _encoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON has it; tensors go to ``tensors``, under their number."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: key}
    if isinstance(value, dict):
        return {_ITEMS: [[_encoded(part, tensors) for part in item] for item in value.items()]}
    if isinstance(value, (list, tuple)):
        parts = [_encoded(part, tensors) for part in value]
        return parts if isinstance(value, list) else {_TUPLE: parts}
    if not isinstance(value, _PLAIN):
        msg = (
            f"a state of growth holds mappings, lists, tuples, tensors and plain values, found "
            f"{value!r:.80} (a {type(value).__name__})"
        )
        raise TypeError(msg)
    return value


def _decoded(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_decoded(part, tensors) for part in value[_TUPLE])
    return {_decoded(k, tensors): _decoded(v, tensors) for k, v in value[_ITEMS]}
