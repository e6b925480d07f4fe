"""An artifact's bytes have exactly one spelling, and the safetensors library reads them."""

from __future__ import annotations

import json
import random
import struct

import pytest
import safetensors.torch
import torch

from esper.contracts.artifact_format import (
    TensorBytes,
    digest_of,
    encode,
    parse,
    stored_tensors,
    verify,
)
from esper.contracts.errors import KernelCorruptError

TENSORS = {
    "b.weight": TensorBytes(dtype="F32", shape=(2, 3), data=struct.pack("<6f", *range(6))),
    "a.count": TensorBytes(dtype="I64", shape=(), data=struct.pack("<q", 7)),
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


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (1 << 60).to_bytes(8, "little") + b"{}",
        DATA[:-1],
        DATA + b"\0",
        _with_header(lambda text: text + b" "),
        _with_header(lambda text: text.replace(b",", b", ", 1)),
        _with_header(lambda text: text.replace(b'"F32"', b'"F3\\u0032"')),
        _with_header(lambda text: text.replace(b"}", b',"a.count":{}}', 1)),
        _with_header(lambda text: text.replace(b'"F32"', b'"F64"')),
        _with_header(lambda text: text.replace(b"[0,8]", b"[8,16]")),
        _with_header(lambda text: b"[]"),
        _with_header(lambda text: b"{", body=b""),
        _edit(__metadata__={"esper": '{"format_version":1}', "more": "x"}),
        _edit(__metadata__={"esper": '{"format_version":1} '}),
        _edit(__metadata__={"esper": '{"format_version":true}'}),
        _edit(__metadata__={"esper": "[]"}),
        _edit(__metadata__={}),
        _edit(**{"a.count": {"data_offsets": [0, 8], "dtype": "I64", "shape": [True]}}),
        _edit(**{"a.count": {"data_offsets": [0, 8], "dtype": "I64", "shape": [-1]}}),
        _edit(**{"a.count": {"data_offsets": [0, 8], "dtype": "X", "shape": []}}),
        _edit(**{"a.count": []}),
    ],
)
def test_any_other_spelling_is_refused(data):
    """Padding, holes, trailing bytes, reordered or ambiguous headers are corrupt."""
    with pytest.raises(KernelCorruptError):
        parse(data)


def test_the_edits_of_the_test_above_are_what_is_refused():
    """The control: the same editing without a change gives the artifact, which is read."""
    assert _with_header(lambda text: text) == DATA
    assert parse(_edit()).tensors == TENSORS


def test_a_newer_format_is_refused_with_a_clear_word():
    """The message says that it is newer and what to do."""
    newer = _edit(__metadata__={"esper": '{"format_version":2,"kind":"test"}'})
    with pytest.raises(KernelCorruptError, match=r"format 2 is newer.*newer Esper"):
        parse(newer)


def test_tensors_that_could_not_be_read_are_not_written():
    """Bytes that do not fit a shape, empty tensors and unknown dtypes are refused by encode."""
    for tensor in (
        TensorBytes(dtype="F32", shape=(2,), data=b"\0" * 7),
        TensorBytes(dtype="F32", shape=(0,), data=b""),
        TensorBytes(dtype="F8", shape=(2,), data=b"\0" * 2),
    ):
        with pytest.raises(KernelCorruptError):
            encode({}, {"x": tensor})


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
