"""The bytes of a checkpoint: one safetensors file with exactly one spelling.

    8 bytes    length of the header, unsigned, little endian
    header     canonical JSON: {"__metadata__": {"esper": TEXT}, NAME: {"data_offsets": [a, b],
               "dtype": DTYPE, "shape": [...]}, ...}
    data       the tensors' bytes, little endian, row-major, in the order of their names

TEXT is canonical JSON once more, an object of four entries: ``content`` (any JSON value),
``digest``, ``format_version`` (1) and ``kind`` (``"checkpoint"``). The digest is the sha256 of the
canonical JSON of ``content``, a line feed, that of the tensors' entries, a line feed, and the data.
Tensors MUST follow each other without holes to the end of the file. A file that is torn, or changed
in any bit, is refused; the safetensors library reads the tensors of one that is not. Bytes only; no
tensors here.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from esper.contracts import canonical_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from esper.contracts.canonical_json import JsonObject, JsonValue

CHECKPOINT_FORMAT_VERSION: Final = 1
DTYPE_SIZES: Final = {
    "BF16": 2,
    "BOOL": 1,
    "C64": 8,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "I16": 2,
    "I32": 4,
    "I64": 8,
    "I8": 1,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "U8": 1,
}
"""Size in bytes of one element of each dtype that may occur."""
MAX_NESTING: Final = 64
"""How deep the content may nest."""

_MAX_HEADER_BYTES: Final = 100_000_000  # the safetensors library reads no longer one
_MAX_VALUES: Final = 1 << 24
_METADATA: Final = "__metadata__"
_KEY: Final = "esper"
_KIND: Final = "checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor as bytes.

    Attributes:
        dtype: A key of ``DTYPE_SIZES``.
        shape: Sizes of the axes; empty for a scalar.
        data: Elements, little endian, row-major.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedCheckpoint:
    """What a checkpoint's bytes say.

    Attributes:
        content: The JSON value.
        tensors: By name; views of the bytes that were parsed.
    """

    content: JsonValue
    tensors: dict[str, StoredTensor]


def encode(content: JsonValue, tensors: Mapping[str, StoredTensor]) -> list[bytes | memoryview]:
    """Return the parts of a checkpoint's bytes, in order; the tensors' data are not copied.

    Args:
        content: JSON value, as ``canonical_json.parse`` would give it.
        tensors: By name.

    Raises:
        ValueError: The header would be longer than 100 MB.
    """
    entries = _entries(tensors)
    data = [tensors[name].data for name in sorted(tensors)]
    text = _header(content, entries, _digest(content, entries, data))
    if len(text) > _MAX_HEADER_BYTES:
        msg = (
            f"what is not in tensors takes {len(text)} bytes of a checkpoint, at most "
            f"{_MAX_HEADER_BYTES} are possible; put long lists of numbers into arrays or tensors"
        )
        raise ValueError(msg)
    return [len(text).to_bytes(8, "little"), text, *data]


def parse(data: bytes | bytearray | memoryview) -> ParsedCheckpoint:
    """Read a checkpoint; the exact inverse of :func:`encode`.

    Raises:
        ValueError: These are not the bytes that ``encode`` would write, or they are of a newer
            format version; the message says what is wrong.
    """
    view = memoryview(data)
    size = int.from_bytes(view[:8], "little")
    if len(view) < 8 or size > _MAX_HEADER_BYTES:
        msg = f"it is no checkpoint: {len(view)} bytes that do not begin with a header's length"
        raise ValueError(msg)
    if size > len(view) - 8:
        msg = f"it is torn, or no checkpoint: its header has {size} bytes, the file {len(view)}"
        raise ValueError(msg)
    header = _object(_json(view[8 : 8 + size]), "its header")
    described = _described(header.pop(_METADATA, None))
    tensors, entries = _tensors(header, view[8 + size :])
    found = _digest(described["content"], entries, [view[8 + size :]])
    if found != described["digest"]:
        msg = f"it was changed: its digest is {described['digest']}, that of its bytes {found}"
        raise ValueError(msg)
    if _header(described["content"], entries, found) != view[8 : 8 + size]:
        msg = "it was changed: its header is not canonical"
        raise ValueError(msg)
    return ParsedCheckpoint(content=described["content"], tensors=tensors)


def _described(metadata: JsonValue) -> JsonObject:
    """Return the object in the metadata, of a version that is known here."""
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    described = _object(_json(text.encode()), "its metadata") if isinstance(text, str) else {}
    if described.get("kind") != _KIND:
        msg = "it is no checkpoint of Esper's: esper.save_checkpoint writes them"
        raise ValueError(msg)
    version = described.get("format_version")
    if type(version) is int and version > CHECKPOINT_FORMAT_VERSION:
        msg = (
            f"its format {version} is newer than this Esper, which reads up to "
            f"{CHECKPOINT_FORMAT_VERSION}; load it with a newer Esper"
        )
        raise ValueError(msg)
    if version != CHECKPOINT_FORMAT_VERSION or not {"content", "digest"} <= described.keys():
        msg = f"its format_version is {CHECKPOINT_FORMAT_VERSION}, found {version!r}"
        raise ValueError(msg)
    return described


def _tensors(header: JsonObject, body: memoryview) -> tuple[dict[str, StoredTensor], JsonObject]:
    tensors: dict[str, StoredTensor] = {}
    offset = 0
    for name in sorted(header):
        dtype, shape = _dtype_and_shape(name, header[name])
        end = offset + DTYPE_SIZES[dtype] * math.prod(shape)
        tensors[name] = StoredTensor(dtype=dtype, shape=shape, data=body[offset:end])
        offset = end
    if offset != len(body):
        msg = f"it is torn or was changed: its tensors take {offset} bytes, found {len(body)}"
        raise ValueError(msg)
    return tensors, _entries(tensors)


def _dtype_and_shape(name: str, entry: JsonValue) -> tuple[str, tuple[int, ...]]:
    fields: JsonObject = entry if isinstance(entry, dict) else {}
    dtype, shape = fields.get("dtype"), fields.get("shape")
    if isinstance(dtype, str) and dtype in DTYPE_SIZES and isinstance(shape, list):
        sizes = tuple(size for size in shape if type(size) is int and size >= 0)
        if len(sizes) == len(shape):
            return dtype, sizes
    msg = f"it was changed: its tensor {name!r} has no dtype and shape, found {entry!r:.200}"
    raise ValueError(msg)


def _entries(tensors: Mapping[str, StoredTensor]) -> JsonObject:
    """Return the header's entries of these tensors laid one after the other."""
    entries: JsonObject = {}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        size = DTYPE_SIZES[tensor.dtype] * math.prod(tensor.shape)
        entries[name] = {
            "data_offsets": [offset, offset + size],
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
        }
        offset += size
    return entries


def _digest(content: JsonValue, entries: JsonObject, data: Sequence[bytes | memoryview]) -> str:
    made = hashlib.sha256(
        canonical_json.encode_plain(content) + b"\n" + canonical_json.encode_plain(entries) + b"\n"
    )
    for part in data:
        made.update(part)
    return made.hexdigest()


def _header(content: JsonValue, entries: JsonObject, digest: str) -> bytes:
    described: JsonObject = {
        "content": content,
        "digest": digest,
        "format_version": CHECKPOINT_FORMAT_VERSION,
        "kind": _KIND,
    }
    return canonical_json.encode_plain(
        {**entries, _METADATA: {_KEY: canonical_json.encode_plain(described).decode()}}
    )


def _json(data: bytes | memoryview) -> JsonValue:
    try:
        return canonical_json.parse(
            data,
            max_bytes=_MAX_HEADER_BYTES,
            max_depth=MAX_NESTING + 4,  # two of the content's own, two of ranks around
            max_values=_MAX_VALUES,
        )
    except ValueError as error:
        msg = f"it is no checkpoint, or was changed: {error}"
        raise ValueError(msg) from error


def _object(value: JsonValue, what: str) -> JsonObject:
    if type(value) is not dict:
        msg = f"it is no checkpoint: {what} is a JSON object, found {type(value).__name__}"
        raise ValueError(msg)
    return value
