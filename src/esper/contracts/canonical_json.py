"""One JSON text per value: a strict reader and an encoder with a single spelling.

Canonical text is UTF-8 without white space, with keys sorted by code point, integers within 64
bits, and floats as their shortest form that reads back the same. ``encode(parse(text)) == text``
exactly when ``text`` is canonical. Reading refuses duplicate keys, NaN and infinities, nesting
deeper than 16, more than 32,768 values, anything after the value, and text over a size limit,
where who reads sets no other limits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

JsonValue = bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"] | None
"""What JSON text can say, as Python's own values."""

JsonObject = dict[str, JsonValue]
"""A JSON object."""

MAX_DEPTH: Final = 16
MAX_BYTES: Final = 1 << 20
MAX_VALUES: Final = 1 << 15
_MAX_INT: Final = (1 << 63) - 1


def encode(value: object) -> bytes:
    """Return the one canonical text of a value.

    Args:
        value: None, bool, int, finite float, str, or a list, tuple or str-keyed mapping of these.

    Raises:
        ValueError: A part of the value has no canonical text; the message says which.
    """
    return encode_plain(_Limits(MAX_DEPTH, MAX_VALUES).plain(value))


def encode_plain(value: JsonValue) -> bytes:
    """Return the one canonical text of a value that :func:`parse` has given, or might have.

    It is not looked at again: for long texts, which that takes most of the time of.
    """
    text = json.dumps(
        value, sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":")
    )
    return text.encode()


def parse(
    data: bytes | memoryview,
    *,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
) -> JsonValue:
    """Read a JSON text, canonical or not, and refuse whatever two readers could see differently.

    Args:
        data: UTF-8 text.
        max_bytes: Longest text that is read, in bytes.
        max_depth: How deep lists and mappings may nest.
        max_values: How many values there may be in it.

    Raises:
        ValueError: The text is not strict JSON; the message says what is wrong.
    """
    if len(data) > max_bytes:
        msg = f"a JSON text may have {max_bytes} bytes, found {len(data)}"
        raise ValueError(msg)
    try:
        value = json.loads(
            str(data, "utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except RecursionError:
        msg = f"a JSON text may nest {max_depth} deep, found far more"
        raise ValueError(msg) from None
    return _Limits(max_depth, max_values).plain(value)


def _unique(pairs: list[tuple[str, JsonValue]]) -> JsonObject:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        msg = f"each key may stand once in an object, found twice: {', '.join(map(repr, twice))}"
        raise ValueError(msg)
    return found


def _no_constant(word: str) -> None:
    msg = f"expected a finite number, found {word}"
    raise ValueError(msg)


class _Limits:
    """Checks a value, and turns its tuples and mappings into lists and dicts.

    Args:
        max_depth: How deep lists and mappings may nest.
        max_values: How many values there may be.
    """

    def __init__(self, max_depth: int, max_values: int) -> None:
        self._max_depth, self._max_values = max_depth, max_values
        self._num_values = 0

    def plain(self, value: object, depth: int = 0) -> JsonValue:
        """Return a value that stands in so many lists and mappings, as JSON has it."""
        self._num_values += 1
        if self._num_values > self._max_values:
            msg = f"a JSON text may have {self._max_values} values, found more"
            raise ValueError(msg)
        if depth > self._max_depth:
            msg = f"a JSON value may nest {self._max_depth} deep, found more"
            raise ValueError(msg)
        if isinstance(value, Mapping):
            if not all(type(key) is str for key in value):
                odd = [key for key in value if type(key) is not str]
                msg = f"keys are strings, found {odd}"
                raise ValueError(msg)
            return {_text(key): self.plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.plain(item, depth + 1) for item in value]
        return _scalar(value)


def _scalar(value: object) -> JsonValue:
    if value is None or type(value) is bool:
        return value
    if type(value) is str:
        return _text(value)
    if type(value) is int and -_MAX_INT - 1 <= value <= _MAX_INT:
        return value
    if type(value) is float and abs(value) < float("inf"):
        return value
    msg = f"expected null, a boolean, a string, a 64-bit integer or a finite float, found {value!r}"
    raise ValueError(msg)


def _text(value: str) -> str:
    value.encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
    return value
