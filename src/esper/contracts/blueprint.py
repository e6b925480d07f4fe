"""A blueprint: a small graph of named operations, as data.

A blueprint says what a kernel computes and what it expects; the compiler says whether it can be
built. Nodes and edges are kept in one order whatever order they were listed in, so that equal
graphs are equal values with one JSON text and one digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeVar

from esper.contracts import canonical_json
from esper.contracts.choices import MODES, POSITIONS, Mode, Position
from esper.contracts.errors import BlueprintError

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.contracts.canonical_json import JsonObject, JsonValue

T = TypeVar("T")

AttributeValue = bool | int | float | str | Sequence["AttributeValue"] | None
"""What an attribute of a node may be: what JSON says, objects left out."""

BLUEPRINT_FORMAT_VERSION: Final = 1
INPUT: Final = "input"
OUTPUT: Final = "output"
DTYPES: Final = ("float32", "float64", "float16", "bfloat16")

MAX_NODES: Final = 256
MAX_EDGES: Final = 1024
MAX_RANK: Final = 8
MAX_DIMENSION: Final = 1 << 16

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_NODE_ID: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_FREE_SIZE: Final = re.compile(r"[A-Z][A-Z0-9]{0,7}")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a kernel's input or output.

    Attributes:
        shape: Sizes from 1 to 65,536, or names of free sizes (upper case: ``"H"``, ``"W"``,
            ``"OH"``). The batch is left out, or spelled ``"N"`` in front; ``"*"`` in front
            stands for any leading axes, the batch among them. An output's name that the input
            also has means the same size; one that it has not may be any size.
        dtype: ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"``.

    Raises:
        BlueprintError: A size, a name or the dtype is none of these.
    """

    shape: tuple[int | str, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        sizes = _listed(self.shape)
        if sizes is None or not 1 <= len(sizes) <= MAX_RANK:
            msg = f"a spec's shape is a list of 1 to {MAX_RANK} sizes, found {self.shape!r}"
            raise BlueprintError(msg)
        object.__setattr__(self, "shape", sizes)
        for axis, size in enumerate(sizes):
            _check_size(size, axis=axis)
        _expect_one_of("a spec's dtype", self.dtype, DTYPES)

    @property
    def free_sizes(self) -> tuple[str, ...]:
        """Names of the free sizes, the batch and ``"*"`` left out, each once, in order."""
        names = (size for size in self.shape if isinstance(size, str) and size not in ("*", "N"))
        return tuple(dict.fromkeys(names))

    def resolve(self, leading: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the full shape of a tensor of this spec.

        Args:
            leading: Sizes of the leading axes; for a spec without ``"*"`` only the first counts,
                as the batch.
            sizes: A size for each name in ``free_sizes``.
        """
        front = leading if self.shape[0] == "*" else leading[:1]
        rest = self.shape[1:] if self.shape[0] in ("*", "N") else self.shape
        return front + tuple(sizes[size] if isinstance(size, str) else size for size in rest)

    def to_document(self) -> JsonObject:
        """Return the JSON form."""
        return {"shape": list(self.shape), "dtype": self.dtype}


@dataclass(frozen=True, slots=True)
class BlueprintNode:
    """One operation of a blueprint.

    Attributes:
        id: Name of the node: a letter, digit or underscore, then up to 63 more of these, dots
            and dashes; not ``"input"`` or ``"output"``.
        op_type: Name of an operation in ``esper.compiler.operations.OPERATIONS``.
        attributes: Its settings: booleans, numbers, strings and lists of integers. Read only.

    Raises:
        BlueprintError: The id is malformed or reserved, or an attribute cannot be JSON.
    """

    id: str
    op_type: str
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _expect_match("a node's id", self.id, _NODE_ID)
        if self.id in (INPUT, OUTPUT):
            msg = f"node {self.id!r}: this id is reserved for the graph's end; choose another"
            raise BlueprintError(msg)
        _expect_type(f"node {self.id!r}: op_type", self.op_type, str)
        frozen = _frozen_items(f"node {self.id!r}", self.attributes)
        try:
            canonical_json.encode(frozen)
        except ValueError as error:
            msg = f"node {self.id!r}: attributes must be plain JSON: {error}"
            raise BlueprintError(msg) from error
        object.__setattr__(self, "attributes", MappingProxyType(frozen))

    def __reduce__(self) -> tuple[object, ...]:
        return BlueprintNode, (self.id, self.op_type, dict(self.attributes))

    def __hash__(self) -> int:
        return hash((self.id, self.op_type))

    def to_document(self) -> JsonObject:
        """Return the JSON form."""
        attributes = {key: _thawed(value) for key, value in self.attributes.items()}
        return {"id": self.id, "op_type": self.op_type, "attributes": attributes}


@dataclass(frozen=True, slots=True)
class BlueprintEdge:
    """A value that flows from one node to an input of another.

    Attributes:
        source: Id of a node, or ``"input"``.
        target: Id of a node, or ``"output"``.
        position: Which input of the target, counted from 0; operations whose inputs may be
            exchanged (add, mul) ignore it.

    Raises:
        BlueprintError: An end is no string or the position is no integer from 0 to 1,023.
    """

    source: str
    target: str
    position: int = 0

    def __post_init__(self) -> None:
        _expect_type("an edge's source", self.source, str)
        _expect_type("an edge's target", self.target, str)
        _expect_type(f"edge {self.source!r} -> {self.target!r}: position", self.position, int)
        if not 0 <= self.position < MAX_EDGES:
            msg = (
                f"edge {self.source!r} -> {self.target!r}: position counts inputs from 0, "
                f"found {self.position}"
            )
            raise BlueprintError(msg)

    def to_document(self) -> JsonObject:
        """Return the JSON form."""
        return {"source": self.source, "target": self.target, "position": self.position}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlueprintIR:
    """The graph of a kernel, with what it reads, gives, and how it joins its host.

    Attributes:
        id: Name for people: lower-case letters, digits, dots, dashes, underscores; at most 64.
        nodes: At most 256, kept sorted by id.
        edges: At most 1,024, kept sorted by target, position, source.
        input_spec: What the kernel reads: the host's input, or its output if serial.
        output_spec: What it gives; the same dtype as the input.
        mode: ``"add"``: the delta is the kernel's output; ``"replace"``: output minus host.
        position: ``"parallel"`` reads the host's input, ``"serial"`` its output.
        init_seed: Starts the generator of the initial weights; 0 to 2^63 - 1.
        draws_random: Whether a forward draws random numbers.
        adds_capacity: Whether it can compute what a trainable host layer alone cannot.
        digest: sha256 of the canonical JSON, 64 hexadecimal digits. Computed.

    Raises:
        BlueprintError: A field has another type or value than this.
    """

    id: str
    nodes: tuple[BlueprintNode, ...]
    edges: tuple[BlueprintEdge, ...]
    input_spec: TensorSpec
    output_spec: TensorSpec
    mode: Mode = "add"
    position: Position = "parallel"
    init_seed: int = 0
    draws_random: bool = False
    adds_capacity: bool = True
    digest: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _expect_match("a blueprint's id", self.id, _NAME)
        where = f"blueprint {self.id!r}"
        _expect_items(f"{where}: nodes", self.nodes, BlueprintNode, at_most=MAX_NODES)
        _expect_items(f"{where}: edges", self.edges, BlueprintEdge, at_most=MAX_EDGES)
        _expect_type(f"{where}: input_spec", self.input_spec, TensorSpec)
        _expect_type(f"{where}: output_spec", self.output_spec, TensorSpec)
        _expect_one_of(f"{where}: mode", self.mode, MODES)
        _expect_one_of(f"{where}: position", self.position, POSITIONS)
        _expect_type(f"{where}: init_seed", self.init_seed, int)
        _expect_type(f"{where}: draws_random", self.draws_random, bool)
        _expect_type(f"{where}: adds_capacity", self.adds_capacity, bool)
        if not 0 <= self.init_seed < 1 << 63:
            msg = f"{where}: init_seed is from 0 to 2^63 - 1, found {self.init_seed}"
            raise BlueprintError(msg)
        nodes = sorted(self.nodes, key=lambda node: node.id)
        edges = sorted(self.edges, key=lambda edge: (edge.target, edge.position, edge.source))
        object.__setattr__(self, "nodes", tuple(nodes))
        object.__setattr__(self, "edges", tuple(edges))
        object.__setattr__(self, "digest", hashlib.sha256(self.to_json()).hexdigest())

    def __hash__(self) -> int:
        return hash(self.digest)

    def __deepcopy__(self, memo: dict[int, object]) -> BlueprintIR:
        return self  # nothing in it can change

    def to_document(self) -> JsonObject:
        """Return the JSON form as plain dicts and lists."""
        return {
            "format_version": BLUEPRINT_FORMAT_VERSION,
            "id": self.id,
            "nodes": [node.to_document() for node in self.nodes],
            "edges": [edge.to_document() for edge in self.edges],
            "input_spec": self.input_spec.to_document(),
            "output_spec": self.output_spec.to_document(),
            "mode": self.mode,
            "position": self.position,
            "init_seed": self.init_seed,
            "draws_random": self.draws_random,
            "adds_capacity": self.adds_capacity,
        }

    def to_json(self) -> bytes:
        """Return the canonical JSON text."""
        return canonical_json.encode(self.to_document())

    @classmethod
    def from_json(cls, data: bytes) -> BlueprintIR:
        """Read a blueprint from a JSON text, canonical or not.

        Raises:
            BlueprintError: The text is not strict JSON, has other fields than a blueprint, or is
                of a newer format.
        """
        try:
            document = canonical_json.parse(data)
        except ValueError as error:
            msg = f"a blueprint is strict JSON: {error}"
            raise BlueprintError(msg) from error
        return cls.from_document(document)

    @classmethod
    def from_document(cls, document: object) -> BlueprintIR:
        """Read a blueprint from its JSON form; the inverse of :meth:`to_document`.

        Raises:
            BlueprintError: It has other fields than a blueprint, or is of a newer format.
        """
        body = _expect_type("a blueprint", document, dict)
        _check_version(body.get("format_version"))
        fields = _expect_keys("a blueprint", body, _BLUEPRINT_KEYS)
        nodes = _expect_type("a blueprint's nodes", fields.pop("nodes"), list)
        edges = _expect_type("a blueprint's edges", fields.pop("edges"), list)
        del fields["format_version"]
        parts = {
            "nodes": tuple(_built(BlueprintNode, "a node", node, _NODE_KEYS) for node in nodes),
            "edges": tuple(_built(BlueprintEdge, "an edge", edge, _EDGE_KEYS) for edge in edges),
            "input_spec": spec_from_document(fields["input_spec"]),
            "output_spec": spec_from_document(fields["output_spec"]),
        }
        build: Callable[..., BlueprintIR] = cls  # it looks at every field itself
        return build(**{**fields, **parts})


def spec_from_document(document: object) -> TensorSpec:
    """Read a spec from its JSON form; the inverse of :meth:`TensorSpec.to_document`.

    Raises:
        BlueprintError: It is no spec.
    """
    return _built(TensorSpec, "a spec", document, _SPEC_KEYS)


def _built(build: Callable[..., T], what: str, document: object, keys: frozenset[str]) -> T:
    """Build a value that looks at every field itself from its JSON form."""
    return build(**_expect_keys(what, document, keys))


_BLUEPRINT_KEYS: Final = frozenset(
    {
        *("format_version", "id", "nodes", "edges", "input_spec", "output_spec"),
        *("mode", "position", "init_seed", "draws_random", "adds_capacity"),
    }
)
_NODE_KEYS: Final = frozenset({"id", "op_type", "attributes"})
_EDGE_KEYS: Final = frozenset({"source", "target", "position"})
_SPEC_KEYS: Final = frozenset({"shape", "dtype"})


def _listed(values: object) -> tuple[object, ...] | None:
    """Return the items of a list or tuple; None for anything else."""
    return tuple(values) if isinstance(values, list | tuple) else None


def _frozen_items(where: str, attributes: object) -> dict[str, object]:
    if not isinstance(attributes, Mapping):
        msg = f"{where}: attributes are a mapping, found {attributes!r}"
        raise BlueprintError(msg)
    return {key: _frozen(value) for key, value in attributes.items()}


def _frozen(value: object) -> object:
    items = _listed(value)
    return value if items is None else tuple(map(_frozen, items))


def _thawed(value: AttributeValue) -> JsonValue:
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return [_thawed(item) for item in value]


def _check_version(version: object) -> None:
    if type(version) is int and version > BLUEPRINT_FORMAT_VERSION:
        msg = (
            f"blueprint format {version} is newer than this Esper, which reads up to "
            f"{BLUEPRINT_FORMAT_VERSION}; read it with a newer Esper"
        )
        raise BlueprintError(msg)
    if type(version) is not int or version < 1:
        msg = f"a blueprint's format_version is {BLUEPRINT_FORMAT_VERSION}, found {version!r}"
        raise BlueprintError(msg)


def _check_size(size: object, *, axis: int) -> None:
    if type(size) is int and 1 <= size <= MAX_DIMENSION:
        return
    if size in ("*", "N") and type(size) is str and axis == 0:
        return
    if type(size) is str and size != "N" and _FREE_SIZE.fullmatch(size):
        return
    msg = (
        f"axis {axis} of a spec is {size!r}; expected 1 to {MAX_DIMENSION}, an upper-case name "
        f"such as 'H', or in front 'N' (the batch) or '*' (any leading axes)"
    )
    raise BlueprintError(msg)


def _expect_keys(what: str, document: object, keys: frozenset[str]) -> dict[str, object]:
    found = _expect_type(what, document, dict)
    if found.keys() != keys:
        missing, odd = sorted(keys - found.keys()), sorted(found.keys() - keys)
        msg = f"{what} has the fields {sorted(keys)}; missing: {missing}, not known: {odd}"
        raise BlueprintError(msg)
    return dict(found)


def _expect_type(what: str, value: object, expected: type[T]) -> T:
    if not isinstance(value, expected) or type(value) is not expected:  # exact: True is no int
        msg = f"{what} is of type {expected.__name__}, found {value!r}"
        raise BlueprintError(msg)
    return value


def _expect_items(what: str, values: object, expected: type, *, at_most: int) -> None:
    items = _listed(values)
    if items is None or len(items) > at_most:
        found = repr(values) if items is None else len(items)
        msg = f"{what} are a list of at most {at_most}, found {found}"
        raise BlueprintError(msg)
    for value in items:
        _expect_type(f"each of {what}", value, expected)


def _expect_match(what: str, value: object, pattern: re.Pattern[str]) -> None:
    if type(value) is not str or not pattern.fullmatch(value):
        msg = f"{what} matches {pattern.pattern}, found {value!r}"
        raise BlueprintError(msg)


def _expect_one_of(what: str, value: object, options: tuple[str, ...]) -> None:
    if type(value) is not str or value not in options:
        msg = f"{what} is one of {', '.join(options)}, found {value!r}"
        raise BlueprintError(msg)
