"""Python's values as JSON and tensors' bytes, and back: what a checkpoint can hold.

A scalar is itself; everything else is a list that begins with a word of what it is. Types come back
as they were, those of keys too: tuples, integers, dtypes, infinities. Nothing is executed to read.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from esper.contracts.checkpoint_format import MAX_NESTING, StoredTensor

if TYPE_CHECKING:
    from esper.contracts.canonical_json import JsonValue

_STORED_AS: Final = {
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.uint8: "U8",
}
_READ_AS: Final = {word: dtype for dtype, word in _STORED_AS.items()}
_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}
_ARRAYS: Final = "biufcSUMm"
"""Kinds of numpy's dtypes that are numbers, text or times."""
_SEQUENCES: Final[dict[type, str]] = {list: "list", tuple: "tuple", torch.Size: "size"}
_MAPPINGS: Final[dict[type, str]] = {dict: "dict", OrderedDict: "ordered", Counter: "counter"}
_INT_BITS: Final = 63
_CURES: Final = (
    (Callable, "a function is code: leave it out, and make it anew before loading"),
    ((set, frozenset), "write sorted(value) in its place"),
    (torch.nn.Parameter, "write value.detach() in its place"),
    (torch.nn.Module, "write its state_dict() in its place"),
    (dict, "write dict(value) in its place"),
)


class Writer:
    """Turns values into JSON, and collects what goes into tensors.

    Attributes:
        tensors: Collected so far, by name.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, StoredTensor] = {}

    def json(self, value: object, name: str, depth: int = 0) -> JsonValue:
        """Return a value as JSON.

        Args:
            value: Any nesting of dicts, lists, tuples, text, bytes, numbers, None, tensors and
                arrays.
            name: Where it stands, for messages and the names of tensors.
            depth: In how many others it stands.

        Raises:
            ValueError: It, or what stands in it, cannot be written; the message says where.
        """
        if depth > MAX_NESTING:
            msg = f"{name}: values nest {MAX_NESTING} deep at most; is a value in itself?"
            raise ValueError(msg)
        kind = type(value)
        if value is None or kind is bool:
            return value  # type: ignore[return-value] # as just looked at
        if kind in _SEQUENCES:
            items: Iterable[object] = value  # type: ignore[assignment] # as the table says
            return [
                _SEQUENCES[kind],
                *(self.json(item, f"{name}.{i}", depth + 1) for i, item in enumerate(items)),
            ]
        if kind in _MAPPINGS:
            return [_MAPPINGS[kind], *self._pairs(value, name, depth)]  # type: ignore[arg-type] # as above
        if isinstance(value, np.generic):
            return ["scalar", *self._array(np.array(value), name)[:2]]
        if isinstance(value, np.ndarray) and kind is np.ndarray:
            return ["array", *self._array(value, name)]
        if kind not in _WRITERS:
            raise ValueError(_unwritable(value, name))
        return _WRITERS[kind](self, value, name)

    def keep(self, name: str, tensor: StoredTensor) -> str:
        """Keep a tensor under its name, or one like it where that is taken; return which."""
        free, number = name, 1
        while free in self.tensors:
            number += 1
            free = f"{name}#{number}"
        self.tensors[free] = tensor
        return free

    def _array(self, value: np.ndarray[Any, Any], name: str) -> list[JsonValue]:
        """Keep an array; return its name, dtype and shape."""
        if value.dtype.kind not in _ARRAYS:
            msg = (
                f"{name} is an array of dtype {value.dtype}, which a checkpoint cannot hold; it "
                "holds arrays of numbers, text and times: write value.tolist() in its place"
            )
            raise ValueError(msg)
        return [_kept(self, name, value.tobytes()), value.dtype.str, list(value.shape)]

    def _pairs(self, mapping: dict[Any, object], name: str, depth: int) -> list[JsonValue]:
        made: list[JsonValue] = []
        for key, item in mapping.items():
            made.append(self.json(key, f"{name}: the key {key!r:.80}", depth + 1))
            made.append(self.json(item, f"{name}.{key!s:.200}", depth + 1))
        return made


def _unwritable(value: object, name: str) -> str:
    kind = type(value)
    cure = next((text for types, text in _CURES if isinstance(value, types)), None)  # type: ignore[arg-type] # a type, or several
    return (
        f"{name} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; it "
        "holds numbers, text, bytes, None, tensors, arrays, and dicts, lists and tuples of them: "
        f"{cure or 'take out of it what is of these'}"
    )


def _str(_: Writer, value: str, name: str) -> JsonValue:
    try:
        value.encode()
    except UnicodeEncodeError:
        msg = f"{name} is no text that UTF-8 can write: {value!r:.80}; write it as bytes"
        raise ValueError(msg) from None
    return value


def _int(_: Writer, value: int, _name: str) -> JsonValue:
    return value if value.bit_length() <= _INT_BITS else ["int", hex(value)]


def _float(_: Writer, value: float, _name: str) -> JsonValue:
    return value if abs(value) < float("inf") else ["float", struct.pack("<d", value).hex()]


def _complex(_: Writer, value: complex, _name: str) -> JsonValue:
    return ["complex", struct.pack("<dd", value.real, value.imag).hex()]


def _bytes(writer: Writer, value: bytes, name: str) -> JsonValue:
    return ["bytes", _kept(writer, name, value)]


def _kept(writer: Writer, name: str, data: bytes | memoryview) -> str:
    return writer.keep(name, StoredTensor(dtype="U8", shape=(len(data),), data=data))


def _tensor(writer: Writer, value: Tensor, name: str) -> JsonValue:
    odd = _odd(value)
    if odd:
        msg = f"{name} is a tensor {odd}"
        raise ValueError(msg)
    flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type] # arrays are buffers
    stored_as = _STORED_AS.get(value.dtype)
    if stored_as is None:
        dtype = str(value.dtype).removeprefix("torch.")
        return ["tensor", _kept(writer, name, data), dtype, list(value.shape)]
    stored = StoredTensor(dtype=stored_as, shape=tuple(value.shape), data=data)
    return ["tensor", writer.keep(name, stored)]


def _odd(value: Tensor) -> str:
    """Return why a tensor cannot be written; nothing where it can."""
    if value.is_meta:
        return "without data (on the device meta); write it once it has some"
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        return f"of layout {value.layout}; write value.to_dense() or its parts in its place"
    if value.requires_grad:
        return "that requires a gradient; write value.detach() in its place"
    return ""


_WRITERS: Final[dict[type, Callable[[Writer, Any, str], JsonValue]]] = {
    str: _str,
    int: _int,
    float: _float,
    complex: _complex,
    bytes: _bytes,
    Tensor: _tensor,
    torch.dtype: lambda _writer, value, _name: ["dtype", str(value).removeprefix("torch.")],
    torch.device: lambda _writer, value, _name: ["device", str(value)],
}


class Reader:
    """Turns JSON and tensors' bytes back into values. Tensors are on the CPU, with own memory.

    Args:
        tensors: By name.
    """

    def __init__(self, tensors: dict[str, StoredTensor]) -> None:
        self.tensors = tensors

    def value(self, made: JsonValue) -> Any:
        """Return what was written.

        Raises:
            ValueError: It was not written by a :class:`Writer`.
        """
        try:
            return self._value(made)
        except (
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
            RuntimeError,
            struct.error,
        ) as error:
            msg = f"its content is not what Esper writes ({type(error).__name__}: {error})"
            raise ValueError(msg) from error

    def _value(self, made: JsonValue) -> Any:
        if not isinstance(made, list):
            return made
        word, *rest = made
        if not isinstance(word, str):
            raise TypeError(word)
        if word in _READERS:
            return _READERS[word](self, *rest)
        items = [self._value(item) for item in rest]
        if word in _MADE_OF_ITEMS:
            return _MADE_OF_ITEMS[word](items)
        pairs = zip(items[::2], items[1::2], strict=True)
        return _MADE_OF_PAIRS[word](pairs)

    def data(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return a copy of a tensor's bytes."""
        return np.frombuffer(self.tensors[name].data, dtype=np.uint8).copy()


def _read_tensor(reader: Reader, name: str, dtype: str | None = None, shape: Any = None) -> Tensor:
    stored = reader.tensors[name]
    kind = _READ_AS[stored.dtype] if dtype is None else _DTYPES[dtype]
    sizes = stored.shape if shape is None else tuple(shape)
    if not len(stored.data):
        return torch.empty(sizes, dtype=kind)
    return torch.from_numpy(reader.data(name)).view(kind).reshape(sizes)


def _read_array(reader: Reader, name: str, dtype: str, shape: Any) -> np.ndarray[Any, Any]:
    kind = np.dtype(dtype)
    if kind.kind not in _ARRAYS:
        msg = f"its content has an array of dtype {dtype}, which Esper does not write"
        raise ValueError(msg)
    return np.frombuffer(reader.data(name).tobytes(), dtype=kind).reshape(shape).copy()


_READERS: Final[dict[object, Callable[..., Any]]] = {
    "int": lambda _reader, text: int(text, 16),
    "float": lambda _reader, text: struct.unpack("<d", bytes.fromhex(text))[0],
    "complex": lambda _reader, text: complex(*struct.unpack("<dd", bytes.fromhex(text))),
    "bytes": lambda reader, name: reader.data(name).tobytes(),
    "array": _read_array,
    "scalar": lambda reader, name, dtype: _read_array(reader, name, dtype, ())[()],
    "tensor": _read_tensor,
    "dtype": lambda _reader, name: _DTYPES[name],
    "device": lambda _reader, name: torch.device(name),
}
_MADE_OF_ITEMS: Final[dict[object, Callable[[list[Any]], Any]]] = {
    "list": list,
    "tuple": tuple,
    "size": torch.Size,
}
_MADE_OF_PAIRS: Final[dict[object, Callable[..., Any]]] = {
    "dict": dict,
    "ordered": OrderedDict,
    "counter": lambda pairs: Counter(dict(pairs)),
}
