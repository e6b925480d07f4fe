"""Canonical JSON has one text per value and reads nothing ambiguous."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts import canonical_json

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc"), inner, max_size=4),
    max_leaves=12,
)


@given(JSON_VALUES)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_value_reads_back_and_has_one_text(value):
    """Parsing what was encoded gives the value, and encoding it again the same bytes."""
    text = canonical_json.encode(value)
    assert canonical_json.parse(text) == value
    assert canonical_json.encode(canonical_json.parse(text)) == text


def test_the_text_does_not_depend_on_the_order_of_keys():
    """Two dicts that are equal have the same text."""
    assert canonical_json.encode({"b": 1, "a": (2, 3)}) == b'{"a":[2,3],"b":1}'
    assert canonical_json.encode({"a": [2, 3], "b": 1}) == b'{"a":[2,3],"b":1}'


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1,"a":2}',
        b"[NaN]",
        b"[Infinity]",
        b"[1e999]",
        b"[1] [2]",
        b"[1]x",
        b"",
        b'"\xff"',
        b'"\\ud800"',
        b"9223372036854775808",
        b"[" * 18 + b"]" * 18,
        b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_what_two_readers_could_see_differently_is_refused(text):
    """Duplicate keys, NaN, depth, trailing data and broken text raise ValueError."""
    with pytest.raises(ValueError, match=r"."):
        canonical_json.parse(text)


def test_sixteen_levels_are_read():
    """The control of the depth limit: one level less than too deep is fine."""
    assert canonical_json.parse(b"[" * 16 + b"1" + b"]" * 16)


def test_text_over_the_size_limit_is_refused():
    """A text longer than allowed is refused before it is parsed."""
    text = json.dumps("x" * 100).encode()
    assert canonical_json.parse(text, max_bytes=102) == "x" * 100
    with pytest.raises(ValueError, match="101 bytes"):
        canonical_json.parse(text, max_bytes=101)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**63, {1: 2}, {"a": {3}}, b"x"])
def test_what_has_no_canonical_text_is_refused(value):
    """Encoding something that JSON cannot hold exactly raises ValueError."""
    with pytest.raises(ValueError, match=r"."):
        canonical_json.encode(value)


def test_more_values_than_the_limit_are_refused():
    """A list of 32,767 numbers is 32,768 values and is read; one more is refused."""
    text = b"[" + b",".join([b"0"] * 32_767) + b"]"
    assert len(canonical_json.parse(text)) == 32_767
    with pytest.raises(ValueError, match="32768 values"):
        canonical_json.parse(b"[0," + text[1:])
