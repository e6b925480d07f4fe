"""What a search can ask for: one table, from what is asked to a condition on the columns."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from esper.contracts.layer_kind import LAYER_KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping

_CONDITIONS: Final[dict[str, tuple[type, str]]] = {
    "blueprint_id": (str, "blueprint_id = :blueprint_id"),
    "blueprint_digest": (str, "blueprint_digest = :blueprint_digest"),
    "mode": (str, "mode = :mode"),
    "position": (str, "position = :position"),
    "adds_capacity": (bool, "adds_capacity = :adds_capacity"),
    "draws_random": (bool, "draws_random = :draws_random"),
    "min_parameter_count": (int, "parameter_count >= :min_parameter_count"),
    "max_parameter_count": (int, "parameter_count <= :max_parameter_count"),
    "kind": (str, "num_axes = :kind"),
    "in_features": (int, "(in_features = :in_features OR position = 'serial')"),
    "out_features": (
        int,
        "out_features = :out_features AND (in_features = :out_features OR position = 'parallel')",
    ),
    "num_axes": (int, "num_axes = :num_axes"),
    "dtype": (str, "dtype = :dtype"),
    "min_size_bytes": (int, "size_bytes >= :min_size_bytes"),
    "max_size_bytes": (int, "size_bytes <= :max_size_bytes"),
    "deprecated": (
        bool,
        "(deprecations.digest IS NOT NULL) = (:deprecated = 1)",
    ),
}
"""Criterion -> type of its value, and what it asks of a row of ``artifacts``."""

CRITERIA: Final[Mapping[str, type]] = {name: kind for name, (kind, _) in _CONDITIONS.items()}
"""Criterion -> type of its value."""

_AXES: Final[dict[str, int | None]] = {
    "conv1d": 1,
    "conv2d": 2,
    "conv3d": 3,
    "conv_transpose2d": 2,
    "channel_norm": None,
    "block": None,
}
"""Kinds of sites whose tensors have channels in front; None where only an example says the axes."""

KINDS: Final = tuple(dict.fromkeys(kind.site for kind in LAYER_KINDS))
"""Kinds of sites that can be searched for."""


def as_sql(criteria: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """Return a condition on the columns of ``artifacts``, and the values of its names.

    Raises:
        TypeError: A criterion is not in the table.
        ValueError: A criterion has a value of another type, or a kind that there is not.
    """
    unknown = sorted(set(criteria) - set(_CONDITIONS))
    if unknown:
        msg = f"cannot search by {', '.join(unknown)}; known criteria: {', '.join(_CONDITIONS)}"
        raise TypeError(msg)
    values = {name: _checked(name, value) for name, value in criteria.items()}
    if "kind" in values and values["kind"] is None:
        del values["kind"]
    terms = [f"({_CONDITIONS[name][1]})" for name in values]
    return " AND ".join(terms) or "1 = 1", values


def from_text(name: str, text: str) -> object:
    """Return what a criterion's text stands for; what it cannot stand for is refused later."""
    kind = CRITERIA.get(name)
    if kind is bool:
        return {"true": True, "false": False}.get(text, text)
    if kind is int and re.fullmatch(r"[0-9]{1,18}", text):
        return int(text)
    return text


def _checked(name: str, value: object) -> object:
    """Return the value that the database compares with; flags are 0 and 1."""
    expected = _CONDITIONS[name][0]
    is_right = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
    if name == "kind" and value not in KINDS:
        is_right = False
    if isinstance(value, int) and abs(value) >= 1 << 63:
        is_right = False
    if not is_right:
        what = f"one of {', '.join(KINDS)}" if name == "kind" else f"a {expected.__name__}"
        msg = f"the criterion {name} is {what}, found {value!r:.100}"
        raise ValueError(msg)
    if name == "kind":
        return _AXES.get(str(value), 0)
    return int(value) if isinstance(value, bool) else value
