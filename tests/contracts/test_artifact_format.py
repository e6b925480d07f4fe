"""An artifact's bytes have exactly one spelling, and the safetensors library reads them."""

from __future__ import annotations

import json
import random
import struct

import pytest
import safetensors.torch
import torch

from esper.contracts.artifact_format import (
    MAX_HEADER_BYTES,
    TensorBytes,
    digest_of,
    encode,
    header_size,
    parse,
    read_header,
    stored_tensors,
    verify,
)
from esper.contracts.errors import KernelCorruptError

TENSORS = {
    "b.weight": TensorBytes(dtype="F32", shape=(2, 3), data=struct.pack("<6f", *range(6))),
    "a.count": TensorBytes(dtype="I64", shape=(), data=struct.pack("<q", 7)),
    "c.deep": TensorBytes(dtype="F16", shape=(1,) * 8, data=struct.pack("<e", 0.5)),
}
DATA = encode({"kind": "test"}, TENSORS)


def _with_header(change, body=None):
    size = int.from_bytes(DATA[:8], "little")
    text = change(DATA[8 : 8 + size])
    return len(text).to_bytes(8, "little") + text + (DATA[8 + size :] if body is None else body)


def _edit(**changes):
    def change(text):
        document = {**json.loads(text), **changes}
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()

    return _with_header(change)


def test_bytes_read_back_exactly():
    """Parse is the inverse of encode, both ways."""
    parsed = parse(DATA)
    assert parsed.header == {"kind": "test", "format_version": 1}
    assert parsed.tensors == TENSORS
    assert list(parsed.tensors) == sorted(TENSORS)
    assert encode(parsed.header, parsed.tensors) == DATA
    assert stored_tensors(DATA) == parsed.tensors


def test_the_safetensors_library_reads_the_bytes():
    """Any tool that reads safetensors reads an artifact."""
    loaded = safetensors.torch.load(DATA)
    assert torch.equal(loaded["b.weight"], torch.arange(6.0).reshape(2, 3))
    assert loaded["a.count"].item() == 7
    assert loaded["c.deep"].shape == (1,) * 8


OTHER_SPELLINGS = [
    ("begins with the length", b""),
    ("begins with the length", b"\0" * 7),
    ("begins with the length", DATA[: header_size(DATA) - 1]),
    ("the header of the artifact is not strict JSON", b"\0" * 8),
    (r"header may have|begins with the length", (1 << 60).to_bytes(8, "little") + b"{}"),
    ("tensors take 34 bytes, found 33", DATA[:-1]),
    ("tensors take 34 bytes, found 35", DATA + b"\0"),
    ("not canonical", _with_header(lambda text: text + b" ")),
    ("not canonical", _with_header(lambda text: text.replace(b',"b.w', b', "b.w'))),
    ("not canonical", _with_header(lambda text: text.replace(b'"F32"', b'"F3\\u0032"'))),
    (
        r"the header of the artifact is not strict JSON.*twice",
        _with_header(lambda text: text.replace(b',"b.w', b',"a.count":{},"b.w')),
    ),
    ("tensors take 58 bytes", _with_header(lambda text: text.replace(b'"F32"', b'"F64"'))),
    ("not canonical", _with_header(lambda text: text.replace(b"[0,8]", b"[8,16]"))),
    ("the header of the artifact is a JSON object, found list", _with_header(lambda text: b"[]")),
    ("the header of the artifact is not strict JSON", _with_header(lambda text: b"{", body=b"")),
    (
        "one string under 'esper'",
        _edit(__metadata__={"esper": '{"format_version":1}', "more": "x"}),
    ),
    ("not canonical", _edit(__metadata__={"esper": '{"format_version":1} '})),
    ("format_version is 1, found True", _edit(__metadata__={"esper": '{"format_version":true}'})),
    ("format_version is 1, found 0", _edit(__metadata__={"esper": '{"format_version":0}'})),
    ("the metadata of the artifact is not strict JSON", _edit(__metadata__={"esper": "{"})),
    (
        "the metadata of the artifact is a JSON object, found list",
        _edit(__metadata__={"esper": "[]"}),
    ),
    ("one string under 'esper'", _edit(__metadata__={})),
    (
        r"'a.count'.* positive sizes",
        _edit(**{"a.count": {"data_offsets": [0, 8], "dtype": "I64", "shape": [True]}}),
    ),
    (
        r"'a.count'.* positive sizes",
        _edit(**{"a.count": {"data_offsets": [0, 8], "dtype": "I64", "shape": [-1]}}),
    ),
    (
        r"'a.count'.* at most 8",
        _edit(**{"a.count": {"data_offsets": [0, 8], "dtype": "I64", "shape": [1] * 9}}),
    ),
    (
        r"'a.count'.* has a dtype of",
        _edit(**{"a.count": {"data_offsets": [0, 8], "dtype": "X", "shape": []}}),
    ),
    (r"'a.count'.* has a dtype of", _edit(**{"a.count": []})),
]


@pytest.mark.parametrize(("words", "data"), OTHER_SPELLINGS)
def test_any_other_spelling_is_refused(words, data):
    """Padding, holes, trailing bytes, reordered or ambiguous headers are corrupt, each as such.

    So says who reads all of the bytes, and who reads no more than what is before the tensors.
    """
    with pytest.raises(KernelCorruptError, match=words):
        parse(data)
    with pytest.raises(KernelCorruptError, match=words):
        read_header(data[: header_size(data)], len(data))


def test_a_header_can_be_read_by_itself():
    """Its length is in the first eight bytes; it says what all of the bytes say."""
    size = header_size(DATA[:8])
    assert read_header(DATA[:size], len(DATA)) == parse(DATA).header
    with pytest.raises(KernelCorruptError, match="more than an artifact's header"):
        read_header(DATA, len(DATA))


def test_a_header_may_have_a_mebibyte_and_no_more():
    """That it may have one byte more is refused by who writes and by who reads."""
    empty = header_size(encode({"pad": ""}, {})) - 8
    pad = "x" * (MAX_HEADER_BYTES - empty)
    longest = encode({"pad": pad}, {})
    assert header_size(longest) == len(longest) == 8 + MAX_HEADER_BYTES
    assert parse(longest).header["pad"] == pad
    with pytest.raises(KernelCorruptError, match="header may have 1048576 bytes, found 1048577"):
        encode({"pad": pad + "x"}, {})
    with pytest.raises(KernelCorruptError, match=r"header may have .* says 1048577"):
        header_size((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    with pytest.raises(KernelCorruptError, match="begins with the length"):
        parse((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b" " * (MAX_HEADER_BYTES + 1))


def test_stored_tensors_of_bytes_that_have_none_are_refused():
    """Without the checks of parse what is wrong is still told, and never returned."""
    with pytest.raises(KernelCorruptError, match="header of the artifact is not JSON"):
        stored_tensors(_with_header(lambda text: b"{"))
    with pytest.raises(KernelCorruptError, match="tensors take 34 bytes, found 33"):
        stored_tensors(DATA[:-1])
    with pytest.raises(KernelCorruptError, match=r"'a\.count'"):
        stored_tensors(_edit(**{"a.count": []}))


def test_the_edits_of_the_test_above_are_what_is_refused():
    """The control: the same editing without a change gives the artifact, which is read."""
    assert _with_header(lambda text: text) == DATA
    assert parse(_edit()).tensors == TENSORS


def test_a_newer_format_is_refused_with_a_clear_word():
    """The message says that it is newer and what to do."""
    newer = _edit(__metadata__={"esper": '{"format_version":2,"kind":"test"}'})
    with pytest.raises(KernelCorruptError, match=r"format 2 is newer.*newer Esper"):
        parse(newer)


@pytest.mark.parametrize(
    ("words", "header", "name", "tensor"),
    [
        ("'x'.* 7 bytes", {}, "x", TensorBytes(dtype="F32", shape=(2,), data=b"\0" * 7)),
        ("'x'.* 0 bytes", {}, "x", TensorBytes(dtype="F32", shape=(0,), data=b"")),
        ("'x'.* 2 bytes", {}, "x", TensorBytes(dtype="F8", shape=(2,), data=b"\0" * 2)),
        ("'x'.* 0 bytes", {}, "x", TensorBytes(dtype="F8", shape=(), data=b"")),
        ("__metadata__", {}, "__metadata__", TENSORS["a.count"]),
        ("plain JSON", {"of": object()}, "x", TENSORS["a.count"]),
    ],
)
def test_what_could_not_be_read_is_not_written(words, header, name, tensor):
    """Bytes that do not fit a shape, empty tensors, unknown dtypes, what is no JSON: refused."""
    with pytest.raises(KernelCorruptError, match=words):
        encode(header, {name: tensor})


def test_the_digest_is_compared_before_anything_is_parsed():
    """Verify accepts the right bytes and refuses all others, malformed digests too."""
    verify(DATA, digest_of(DATA))
    with pytest.raises(KernelCorruptError, match="other bytes"):
        verify(DATA + b"\0", digest_of(DATA))
    with pytest.raises(ValueError, match="64"):
        verify(DATA, digest_of(DATA).upper())


def test_single_bit_flips_are_refused():
    """4,096 flips, spread over the whole file: none passes with the id of the original."""
    digest, rng = digest_of(DATA), random.Random(0)
    for bit in rng.choices(range(8 * len(DATA)), k=4096):
        flipped = bytearray(DATA)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(KernelCorruptError):
            verify(bytes(flipped), digest)


def test_a_flipped_header_is_refused_or_says_something_else_exactly():
    """A flip that is still readable (a letter of a name) is the one spelling of other content."""
    size = 8 + int.from_bytes(DATA[:8], "little")
    for bit in range(8 * size):
        flipped = bytearray(DATA)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            parsed = parse(bytes(flipped))
        except KernelCorruptError:
            continue
        assert encode(parsed.header, parsed.tensors) == flipped
        assert parsed != parse(DATA)
