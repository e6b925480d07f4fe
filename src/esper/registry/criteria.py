"""What a search can ask for: one table, read in two languages."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from esper.contracts.artifact import KernelMetadata

_FIELDS: Final[dict[str, tuple[str, str]]] = {
    "blueprint_id": ("blueprint_id", "="),
    "blueprint_digest": ("blueprint_digest", "="),
    "mode": ("mode", "="),
    "position": ("position", "="),
    "adds_capacity": ("adds_capacity", "="),
    "draws_random": ("draws_random", "="),
    "min_parameter_count": ("parameter_count", ">="),
    "max_parameter_count": ("parameter_count", "<="),
}
"""Criterion -> field of the metadata, and how the field compares with what was asked."""

_OPERATORS: Final[dict[str, Callable[..., bool]]] = {
    "=": operator.eq,
    ">=": operator.ge,
    "<=": operator.le,
}


def check(criteria: Mapping[str, object]) -> None:
    """Refuse what nobody can search for.

    Raises:
        TypeError: A criterion is not in the table.
    """
    unknown = sorted(set(criteria) - set(_FIELDS))
    if unknown:
        msg = f"cannot search by {', '.join(unknown)}; known criteria: {', '.join(_FIELDS)}"
        raise TypeError(msg)


def matches(metadata: KernelMetadata, criteria: Mapping[str, object]) -> bool:
    """Say whether a kernel meets every criterion. They have been checked."""
    return all(
        _OPERATORS[sign](getattr(metadata, field), criteria[name])
        for name, (field, sign) in _FIELDS.items()
        if name in criteria
    )


def as_sql(criteria: Mapping[str, object]) -> tuple[str, tuple[object, ...]]:
    """Return a condition on a column ``metadata`` of JSON text, and the values of its ``?``.

    The criteria have been checked.
    """
    asked = [(field, sign, name) for name, (field, sign) in _FIELDS.items() if name in criteria]
    terms = [f"json_extract(metadata, '$.{field}') {sign} ?" for field, sign, _ in asked]
    return " AND ".join(terms) or "TRUE", tuple(criteria[name] for *_, name in asked)
