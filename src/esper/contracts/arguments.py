"""What a caller gives, checked where it comes in, with the argument's name in the error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What a number may be.

    Attributes:
        what: What it is, for messages: ``"a number of updates"``.
        least: Smallest value; None where there is none.
        most: Largest value; None where there is none.
        above: Value that it stays above; None where there is none.
        below: Value that it stays below; None where there is none.
        may_be_infinite: Whether infinity is a value.
    """

    what: str
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    may_be_infinite: bool = False

    def __contains__(self, value: float) -> bool:
        if not isinstance(value, int) and not math.isfinite(value):
            return self.may_be_infinite and value == math.inf
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low = None if self.least is None else f"[{self.least:.10g}"
        low = low if self.above is None else f"({self.above:.10g}"
        high = None if self.most is None else f"{self.most:.10g}]"
        high = high if self.below is None else f"{self.below:.10g})"
        if low is None:
            return self.what
        if high is not None:
            return f"{self.what} in {low}, {high}"
        return f"{self.what}{' above' if low[0] == '(' else ', at least'} {low[1:]}"


def checked_number(
    name: str, value: object, bounds: Bounds, *, kind: type = float, optional: bool = False
) -> float:
    """Return a number as a plain one of its kind, or refuse it.

    Args:
        name: Whose it is, for messages.
        value: What was given.
        bounds: What it may be.
        kind: ``int`` or ``float``.
        optional: Whether None would have been taken as well, for messages.

    Raises:
        TypeError: It is no number of that kind; True and False are none.
        ValueError: It is out of bounds.
    """
    expected = f"{name} is {bounds}{', or None' if optional else ''}; got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        msg = f"{expected} (a {type(value).__name__})"
        raise TypeError(msg)
    try:
        number: float = kind(value)
    except OverflowError as error:  # an integer beyond every float
        raise ValueError(expected) from error
    if number not in bounds:
        raise ValueError(expected)
    return number


def generator_seed(random_seed: int) -> int:
    """Fold any whole number into [0, 2^32), where every generator takes it."""
    return random_seed % (1 << 32)


def whole_number(name: str, value: object, *, least: int | None = None) -> int:
    """Return a whole number that a caller gave.

    Raises:
        TypeError: It is none; True and False are none either.
        ValueError: It is less than ``least``.
    """
    return int(checked_number(name, value, Bounds(what="a whole number", least=least), kind=int))


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
