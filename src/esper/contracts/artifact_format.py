"""The bytes of a kernel artifact: one safetensors file with exactly one spelling.

    8 bytes    length of the header, unsigned, little endian
    header     canonical JSON: {"__metadata__": {"esper": TEXT}, NAME: {"data_offsets": [a, b],
               "dtype": DTYPE, "shape": [...]}, ...}
    data       the tensors' bytes, little endian, row-major, in the order of their names

TEXT is canonical JSON once more (safetensors allows strings only), an object whose
``format_version`` is 1. The metadata has one key because the safetensors library writes several
in random order. Tensors MUST follow each other without holes from offset 0 to the end of the
file; the header MUST be the canonical text, without padding. So every file that is accepted is
the only file with its content: ``encode(parse(data)) == data``. Bytes only; no tensors here.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from esper.contracts import canonical_json
from esper.contracts.blueprint import MAX_RANK
from esper.contracts.errors import KernelCorruptError

if TYPE_CHECKING:
    from esper.contracts.canonical_json import JsonObject, JsonValue

ARTIFACT_FORMAT_VERSION: Final = 1
MAX_HEADER_BYTES: Final = 1 << 20
DTYPE_SIZES: Final = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8}
"""Size in bytes of one element of each dtype that may occur."""

_METADATA: Final = "__metadata__"
_KEY: Final = "esper"
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBytes:
    """One tensor as bytes.

    Attributes:
        dtype: A key of ``DTYPE_SIZES``.
        shape: Sizes of the axes, at most 8 of them, each at least 1; empty for a scalar.
        data: Elements, little endian, row-major.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedArtifact:
    """What an artifact's bytes say.

    Attributes:
        header: The JSON object under the metadata key, ``format_version`` included.
        tensors: By name, sorted; views of the bytes that were parsed.
    """

    header: JsonObject
    tensors: dict[str, TensorBytes]


def digest_of(data: bytes) -> str:
    """Return the id of an artifact: the sha256 of its bytes, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def verify(data: bytes, digest: str) -> None:
    """Compare bytes with the id that they should have, before anything is parsed.

    Raises:
        ValueError: ``digest`` is not 64 lower-case hexadecimal digits.
        KernelCorruptError: The bytes are not those.
    """
    if not _DIGEST.fullmatch(digest):
        msg = f"an artifact id is 64 lower-case hexadecimal digits, found {digest!r}"
        raise ValueError(msg)
    found = digest_of(data)
    if found != digest:
        msg = (
            f"artifact {digest} has other bytes than its id says (sha256 {found}, "
            f"{len(data)} bytes); fetch it again, and do not trust the source until it is explained"
        )
        raise KernelCorruptError(msg)


def encode(header: Mapping[str, object], tensors: Mapping[str, TensorBytes]) -> bytes:
    """Write an artifact.

    Args:
        header: JSON object; its ``format_version`` is set here.
        tensors: By name.

    Raises:
        KernelCorruptError: A tensor's bytes do not fit its shape and dtype, or the header is
            not JSON: what would be written could not be read.
    """
    layout = _checked_layout(tensors)
    text = _header_text({**header, "format_version": ARTIFACT_FORMAT_VERSION}, layout)
    if len(text) > MAX_HEADER_BYTES:
        msg = f"an artifact's header may have {MAX_HEADER_BYTES} bytes, found {len(text)}"
        raise KernelCorruptError(msg)
    parts = [len(text).to_bytes(8, "little"), text]
    return b"".join(parts + [bytes(tensors[name].data) for name in sorted(tensors)])


def parse(data: bytes) -> ParsedArtifact:
    """Read an artifact; the exact inverse of :func:`encode`.

    Raises:
        KernelCorruptError: These are not the bytes that ``encode`` would write, or they are of a
            newer format version.
    """
    text, body = _split(data)
    header, entries = _read_text(text, len(body))
    return ParsedArtifact(header=header, tensors=_read_tensors(entries, body))


def header_size(data: bytes | bytearray | memoryview) -> int:
    """Return how many bytes an artifact has in front of its tensors, by its first eight.

    Raises:
        KernelCorruptError: It would be more than a header may have.
    """
    size = int.from_bytes(data[:8], "little")
    if size > MAX_HEADER_BYTES:
        msg = f"an artifact's header may have {MAX_HEADER_BYTES} bytes, and this one says {size}"
        raise KernelCorruptError(msg)
    return 8 + size


def read_header(front: bytes | memoryview, size_bytes: int) -> JsonObject:
    """Check an artifact by what it has in front of its tensors, as :func:`parse` does by all.

    What tensors hold is no part of the format: any bytes are numbers. So this accepts exactly what
    ``parse`` accepts.

    Args:
        front: The first ``header_size`` bytes.
        size_bytes: Length of the whole artifact.

    Raises:
        KernelCorruptError: These are not the bytes that ``encode`` would write, or they are of a
            newer format version.
    """
    text, rest = _split(front)
    if len(rest):
        msg = "these bytes are more than an artifact's header"
        raise KernelCorruptError(msg)
    header, _ = _read_text(text, size_bytes - len(front))
    return header


def stored_tensors(data: bytes) -> dict[str, TensorBytes]:
    """Return the tensors of bytes that :func:`parse` has accepted before, without its checks.

    Raises:
        KernelCorruptError: The bytes are so malformed that there are no tensors to return.
    """
    text, body = _split(data)
    try:
        raw = json.loads(bytes(text))
    except ValueError as error:
        msg = f"the header of the artifact is not JSON: {error}"
        raise KernelCorruptError(msg) from error
    return _read_tensors({key: raw[key] for key in raw if key != _METADATA}, body)


def _split(data: bytes | memoryview) -> tuple[memoryview, memoryview]:
    view = memoryview(data)
    size = int.from_bytes(view[:8], "little")
    if len(view) < 8 or size > MAX_HEADER_BYTES or size > len(view) - 8:
        msg = (
            f"an artifact begins with the length of its header, at most {MAX_HEADER_BYTES} bytes; "
            f"these {len(view)} bytes do not"
        )
        raise KernelCorruptError(msg)
    return view[8 : 8 + size], view[8 + size :]


def _parse_json(text: bytes | memoryview, what: str) -> JsonObject:
    try:
        value = canonical_json.parse(text, max_bytes=MAX_HEADER_BYTES)
    except ValueError as error:
        msg = f"{what} of the artifact is not strict JSON: {error}"
        raise KernelCorruptError(msg) from error
    if type(value) is not dict:
        msg = f"{what} of the artifact is a JSON object, found {type(value).__name__}"
        raise KernelCorruptError(msg)
    return value


def _read_header(raw: JsonObject) -> JsonObject:
    metadata = raw.get(_METADATA)
    if type(metadata) is not dict or list(metadata) != [_KEY] or type(metadata[_KEY]) is not str:
        msg = f"an artifact's {_METADATA} is one string under {_KEY!r}, found {metadata!r:.200}"
        raise KernelCorruptError(msg)
    header = _parse_json(metadata[_KEY].encode(), "the metadata")
    version = header.get("format_version")
    if type(version) is int and version > ARTIFACT_FORMAT_VERSION:
        msg = (
            f"artifact format {version} is newer than this Esper, which reads up to "
            f"{ARTIFACT_FORMAT_VERSION}; read it with a newer Esper"
        )
        raise KernelCorruptError(msg)
    if type(version) is not int or version < 1:
        msg = f"an artifact's format_version is {ARTIFACT_FORMAT_VERSION}, found {version!r}"
        raise KernelCorruptError(msg)
    return header


def _read_text(text: memoryview, body_bytes: int) -> tuple[JsonObject, JsonObject]:
    """Check a header against the length of what follows; return its object and the tensors'."""
    raw = _parse_json(text, "the header")
    header = _read_header(raw)
    entries = {key: raw[key] for key in raw if key != _METADATA}
    layout = {name: _read_entry(name, entry) for name, entry in entries.items()}
    expected = sum(map(_num_bytes, layout.values()))
    if expected != body_bytes:
        msg = f"the artifact's tensors take {expected} bytes, found {body_bytes}"
        raise KernelCorruptError(msg)
    if _header_text(header, layout) != text:
        msg = "the artifact's header is not canonical; only bytes written by Esper are accepted"
        raise KernelCorruptError(msg)
    return header, entries


def _read_tensors(entries: JsonObject, body: memoryview) -> dict[str, TensorBytes]:
    tensors: dict[str, TensorBytes] = {}
    offset = 0
    for name in sorted(entries):
        dtype, shape = _read_entry(name, entries[name])
        end = offset + _num_bytes((dtype, shape))
        tensors[name] = TensorBytes(dtype=dtype, shape=shape, data=body[offset:end])
        offset = end
    if offset != len(body):
        msg = f"the artifact's tensors take {offset} bytes, found {len(body)}"
        raise KernelCorruptError(msg)
    return tensors


def _read_entry(name: str, entry: JsonValue) -> tuple[str, tuple[int, ...]]:
    """Read dtype and shape; the offsets follow from them and are compared with the header."""
    fields: JsonObject = entry if type(entry) is dict else {}
    dtype, shape = fields.get("dtype"), fields.get("shape")
    if isinstance(dtype, str) and dtype in DTYPE_SIZES and isinstance(shape, list):
        sizes = tuple(size for size in shape if type(size) is int and size >= 1)
        if len(sizes) == len(shape) <= MAX_RANK:
            return dtype, sizes
    msg = (
        f"tensor {name!r} of the artifact has a dtype of {sorted(DTYPE_SIZES)} and a shape of "
        f"at most {MAX_RANK} positive sizes, found {entry!r:.200}"
    )
    raise KernelCorruptError(msg)


def _num_bytes(entry: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = entry
    return DTYPE_SIZES[dtype] * math.prod(shape)


def _checked_layout(
    tensors: Mapping[str, TensorBytes],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of tensors whose bytes are as many as these say."""
    for name, tensor in tensors.items():
        size = DTYPE_SIZES.get(tensor.dtype, 0) * math.prod(tensor.shape)
        if len(tensor.data) != size or size == 0 or name == _METADATA:
            msg = (
                f"tensor {name!r} of dtype {tensor.dtype} and shape {tensor.shape} cannot be "
                f"{len(tensor.data)} bytes"
            )
            raise KernelCorruptError(msg)
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _header_text(
    header: Mapping[str, object], layout: Mapping[str, tuple[str, tuple[int, ...]]]
) -> bytes:
    """Return the canonical header of tensors of these dtypes and shapes, one after the other."""
    document: JsonObject = {}
    offset = 0
    for name in sorted(layout):
        dtype, shape = layout[name]
        size = _num_bytes(layout[name])
        document[name] = {
            "data_offsets": [offset, offset + size],
            "dtype": dtype,
            "shape": list(shape),
        }
        offset += size
    try:
        document[_METADATA] = {_KEY: canonical_json.encode(header).decode()}
        return canonical_json.encode(document)
    except ValueError as error:
        msg = f"an artifact's header is plain JSON: {error}"
        raise KernelCorruptError(msg) from error
