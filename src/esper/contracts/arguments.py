"""What a caller gives, checked where it comes in, with the argument's name in the error."""

from __future__ import annotations

import math
from numbers import Integral, Real


def check_type(name: str, value: object, kind: type | tuple[type, ...], words: str) -> None:
    """Refuse a value of another type.

    Args:
        name: Name of the argument.
        value: What was given.
        kind: What it may be.
        words: What that is, in words.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, kind):
        msg = f"{name} is {words}; got {value!r} (a {type(value).__name__})"
        raise TypeError(msg)


def whole_number(name: str, value: object, *, least: int | None = None) -> int:
    """Return a whole number that a caller gave.

    Raises:
        TypeError: It is none; True and False are none either.
        ValueError: It is less than ``least``.
    """
    expected = f"{name} is a whole number" + ("" if least is None else f", at least {least}")
    if isinstance(value, bool) or not isinstance(value, Integral):
        msg = f"{expected}; got {value!r} (a {type(value).__name__})"
        raise TypeError(msg)
    number = int(value)
    if least is not None and number < least:
        msg = f"{expected}; got {value!r}"
        raise ValueError(msg)
    return number


def positive_number(name: str, value: object) -> float:
    """Return a finite number above 0 that a caller gave.

    Raises:
        TypeError: It is no number; True and False are none.
        ValueError: It is 0 or less, or not finite.
    """
    expected = f"{name} is a finite number above 0"
    if isinstance(value, bool) or not isinstance(value, Real):
        msg = f"{expected}; got {value!r} (a {type(value).__name__})"
        raise TypeError(msg)
    number = float(value)
    if not 0.0 < number < math.inf:
        msg = f"{expected}; got {value!r}"
        raise ValueError(msg)
    return number
