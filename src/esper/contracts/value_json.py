"""Frozen values as JSON and back, in which what a reader does not know is kept as it was written.

A format has a version of two numbers. A higher minor one only adds: a reader takes the defaults of
fields that are absent and keeps the text of those that it does not know, so that writing the value
again gives them back byte for byte. A higher major one is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import partial
from sys import float_info
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

T = TypeVar("T", bound="Extensible")

Reader = Callable[[str], object]
"""Makes the value of a field from its JSON text."""

Parts = Mapping[type, Mapping[str, Reader]]
"""The readers of fields that are more than plain JSON, by class and by field."""

WHERE_KNOWN: Final[Mapping[str, str]] = {"written": "where known"}
"""Metadata of a field that is not always known: None is not written."""

_SPACE: Final = re.compile(r"[ \t\n\r]*")
_VERSION: Final = re.compile(r"(\d{1,6})(?:\.(\d{1,6}))?", re.ASCII)
_DECODER: Final = json.JSONDecoder()


class JsonText(str):
    """JSON that is written as it is."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Extensible:
    """Base of values that keep what a newer Esper has written into them.

    Attributes:
        more: Name and JSON text of each field that is not known here, in their order.
    """

    more: tuple[tuple[str, str], ...] = field(default=(), repr=False)


def version_to_write(what: str, found: object, newest: str) -> str:
    """Check the version of what was read, and return the one in which it is written again.

    Args:
        what: What has the version, for the message.
        found: As it was read: a string of two numbers, or a whole number in files of version 1.
        newest: The newest that is known here.

    Returns:
        ``newest``, or ``found`` where its minor number is higher.

    Raises:
        ValueError: ``found`` is no version, or of another major one.
    """
    known, read = _numbers(newest), _numbers(found)
    if known is not None and read is not None and read[0] == known[0]:
        return str(found) if read[1] > known[1] else newest
    cure = "read it with a newer Esper"
    if read is None or (known is not None and read[0] < known[0]):
        cure = "a version is written as two numbers with a dot; is this a file of Esper's?"
    msg = f"{what} format {found!r} is not known here (this Esper reads up to {newest}); {cure}"
    raise ValueError(msg)


def is_newer(found: object, newest: str) -> bool:
    """Whether a version is higher than the newest that is known."""
    known, read = _numbers(newest), _numbers(found)
    return known is not None and read is not None and read > known


def _numbers(version: object) -> tuple[int, int] | None:
    shown = str(version) if type(version) in (int, str) else ""
    parts = _VERSION.fullmatch(shown)
    return None if parts is None else (int(parts[1]), int(parts[2] or 0))


def members(text: str) -> dict[str, str]:
    """Return the members of a JSON object: the text of each value by its name, in order.

    Raises:
        ValueError: The text is no JSON, or no object.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        msg = f"a JSON object was expected, found {type(value).__name__}"
        raise ValueError(msg)  # noqa: TRY004 - a malformed file is a value, not a caller's type
    found = {}
    at = _past(text, text.index("{") + 1)
    while text[at] != "}":
        name, at = _DECODER.raw_decode(text, at)
        start = _past(text, _past(text, at) + 1)  # past the colon
        _, at = _DECODER.raw_decode(text, start)
        found[name] = text[start:at]
        at = _next(text, at)
    return found


def items(text: str) -> list[str]:
    """Return the text of each item of a JSON array.

    Raises:
        ValueError: The text is no JSON, or no array.
    """
    value = json.loads(text)
    if not isinstance(value, list):
        msg = f"a JSON array was expected, found {type(value).__name__}"
        raise ValueError(msg)  # noqa: TRY004 - a malformed file is a value, not a caller's type
    found = []
    at = _past(text, text.index("[") + 1)
    while text[at] != "]":
        start = at
        _, at = _DECODER.raw_decode(text, start)
        found.append(text[start:at])
        at = _next(text, at)
    return found


def _past(text: str, at: int) -> int:
    """Return the first place from ``at`` on that is no white space."""
    found = _SPACE.match(text, at)
    assert found is not None, "no white space at all is a match"
    return found.end()


def _next(text: str, at: int) -> int:
    """Return where the next item begins, or the end of them all."""
    at = _past(text, at)
    return _past(text, at + 1) if text[at] == "," else at


def value_from(
    cls: type[T], found: Mapping[str, str], parts: Parts, *, derived: Iterable[str] = ()
) -> T:
    """Make a value of the text of its fields.

    Fields that are absent take their defaults; what is computed from others is computed anew;
    what is not known goes to ``more``.

    Args:
        cls: A frozen dataclass that is :class:`Extensible`.
        found: JSON text by name, as :func:`members` gives it.
        parts: How fields are read that are more than plain JSON.
        derived: Names in the JSON that follow from fields.

    Raises:
        ValueError: A field without a default is absent, holds another type of value than its
            annotation says, or is refused by its class.
    """
    own = {f.name: f for f in fields(cls) if f.name != "more"}
    missing = [name for name, f in own.items() if name not in found and _is_required(f)]
    if missing:
        msg = f"a {cls.__name__} needs the field {', '.join(missing)}; found {', '.join(found)}"
        raise ValueError(msg)
    readers = parts.get(cls, {})
    given = {
        name: readers.get(name, _plain_reader(own[name]))(text)
        for name, text in found.items()
        if name in own and own[name].init
    }
    known = {*own, *derived}
    more = tuple((name, text) for name, text in found.items() if name not in known)
    return cls(**given, more=more)


def _is_required(of: Field[Any]) -> bool:
    return of.init and of.default is MISSING and of.default_factory is MISSING


def _plain_reader(of: Field[Any]) -> Reader:
    """Return what reads a field of plain JSON; an array is a tuple where the field is one."""
    declared = str(of.type)
    said, is_right = _PLAIN.get(declared.removesuffix(" | None"), ("", None))

    def read(text: str) -> object:
        value = json.loads(text)
        is_unknown = value is None and declared.endswith(" | None")
        if is_right is not None and not is_unknown and not is_right(value):
            msg = f"the field {of.name!r} is {said}, found {text[:_MOST_SHOWN]}"
            raise ValueError(msg)
        if declared.startswith("tuple["):
            return tuple(map(json.loads, items(text)))
        return value

    return read


def _is_whole(value: object) -> bool:
    return type(value) is int


def _is_number(value: object) -> bool:
    """Say whether a value is a number, and finite: JSON has no other, though readers take them."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -float_info.max <= value <= float_info.max


def _is_text(value: object) -> bool:
    """Say whether a value is text that can be written: half a pair of surrogates cannot."""
    return isinstance(value, str) and not _HALF_A_PAIR.search(value)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)


def _all_are(is_right: Callable[[object], bool], value: object) -> bool:
    return isinstance(value, list) and all(map(is_right, value))


_HALF_A_PAIR: Final = re.compile("[\ud800-\udfff]")
_MOST_SHOWN: Final = 80
"""Letters of a value that a message quotes."""

_PLAIN: Final[Mapping[str, tuple[str, Callable[[object], bool]]]] = {
    "int": ("a whole number", _is_whole),
    "float": ("a number", _is_number),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("text", _is_text),
    "tuple[int, ...]": ("an array of whole numbers", partial(_all_are, _is_whole)),
    "tuple[str, ...]": ("an array of texts", partial(_all_are, _is_text)),
    "list[JsonObject]": ("an array of objects", partial(_all_are, _is_object)),
    "JsonObject": ("an object", _is_object),
    "dict[str, float]": (
        "an object of numbers",
        lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    ),
}
"""What a field of plain JSON holds, by its annotation: in words, and as a test of a value."""


def text_of(
    value: object, *, indent: int | None = None, also: Mapping[str, object] | None = None
) -> str:
    """Return a value as JSON with sorted names; the inverse of :func:`value_from`.

    Args:
        value: A dataclass, or what JSON can say.
        indent: Spaces a level, each member on its own line and other letters than ASCII written as
            numbers; None for one line with all letters as they are.
        also: Members of the outermost object beside its fields; what is in ``more`` goes before.

    Raises:
        ValueError: A number is not finite; what was not measured is None.
        TypeError: A part of the value is none that JSON can say.
    """
    return _text(value, indent, 0, also or {})


def _text(value: object, indent: int | None, depth: int, also: Mapping[str, object]) -> str:
    if isinstance(value, JsonText):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        value = {**also, **_fields_to_write(value)}
    if isinstance(value, Mapping):
        members = (
            f"{_leaf(name, indent)}: {_text(value[name], indent, depth + 1, {})}"
            for name in sorted(value)
        )
        return _enclosed("{}", list(members), indent, depth)
    if isinstance(value, (list, tuple)):
        shown = [_text(item, indent, depth + 1, {}) for item in value]
        return _enclosed("[]", shown, indent, depth)
    return _leaf(value, indent)


def _fields_to_write(value: Any) -> dict[str, object]:
    known = {
        f.name: getattr(value, f.name)
        for f in fields(value)
        if f.name != "more" and not (f.metadata == WHERE_KNOWN and getattr(value, f.name) is None)
    }
    return known | {name: JsonText(text) for name, text in getattr(value, "more", ())}


def _leaf(value: object, indent: int | None) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=indent is not None)


def _enclosed(ends: str, parts: list[str], indent: int | None, depth: int) -> str:
    if not parts:
        return ends
    if indent is None:
        return f"{ends[0]}{', '.join(parts)}{ends[1]}"
    inner, outer = "\n" + " " * indent * (depth + 1), "\n" + " " * indent * depth
    return f"{ends[0]}{inner}{(',' + inner).join(parts)}{outer}{ends[1]}"
