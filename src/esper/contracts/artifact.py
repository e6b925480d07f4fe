"""A compiled kernel: its blueprint, its weights as bytes, and what anyone may ask about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING

from esper.contracts.blueprint import BlueprintIR, TensorSpec, spec_from_document
from esper.contracts.choices import MODES, POSITIONS, Mode, Position
from esper.contracts.errors import BlueprintError, KernelCorruptError

if TYPE_CHECKING:
    from collections.abc import Callable

    from esper.contracts.canonical_json import JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelMetadata:
    """What an artifact says about its kernel; inside the hash.

    Attributes:
        blueprint_id: Name of the blueprint.
        blueprint_digest: sha256 of the blueprint's canonical JSON.
        input_spec: What the kernel reads.
        output_spec: What it gives.
        mode: ``"add"`` or ``"replace"``.
        position: ``"parallel"`` or ``"serial"``.
        parameter_count: Elements of all parameters, frozen ones included, buffers not.
        draws_random: Whether a forward draws random numbers.
        adds_capacity: Whether it can compute what a trainable host layer alone cannot.
        zeroed: Name of the tensor that makes the kernel's output exactly zero (for example
            ``"out.weight"``), or None where no layer is zeroed.
        lineage: Artifact ids that this one descends from, nearest first.
    """

    blueprint_id: str
    blueprint_digest: str
    input_spec: TensorSpec
    output_spec: TensorSpec
    mode: Mode
    position: Position
    parameter_count: int
    draws_random: bool
    adds_capacity: bool
    zeroed: str | None
    lineage: tuple[str, ...] = ()

    @property
    def in_features(self) -> int | None:
        """Features or channels that it reads; None where they are free."""
        return _features(self.input_spec)

    @property
    def out_features(self) -> int | None:
        """Features or channels that it gives; None where they are free."""
        return _features(self.output_spec)

    @property
    def num_axes(self) -> int:
        """Axes behind the channels of what it gives; 0 where its features are the last axis."""
        return _num_axes(self.output_spec)

    @property
    def dtype(self) -> str:
        """Of what it reads and gives, by its torch name."""
        return self.input_spec.dtype

    def to_document(self) -> JsonObject:
        """Return the JSON form."""
        document: JsonObject = {name: getattr(self, name) for name in _NAMES}
        document["input_spec"] = self.input_spec.to_document()
        document["output_spec"] = self.output_spec.to_document()
        document["lineage"] = list(self.lineage)
        return document

    @classmethod
    def from_document(cls, document: object) -> KernelMetadata:
        """Read the JSON form; the inverse of :meth:`to_document`.

        Raises:
            KernelCorruptError: It has other fields, or a field of another type.
        """
        if not isinstance(document, dict) or document.keys() != set(_NAMES):
            msg = f"an artifact's metadata has the fields {sorted(_NAMES)}, found {document!r:.300}"
            raise KernelCorruptError(msg)
        for name, expected in _FIELD_TYPES.items():
            if type(document[name]) not in expected:
                msg = f"metadata field {name!r} cannot be {document[name]!r:.200}"
                raise KernelCorruptError(msg)
        for name, choices in _CHOICES.items():
            if document[name] not in choices:
                msg = f"metadata field {name!r} is one of {choices}, found {document[name]!r:.200}"
                raise KernelCorruptError(msg)
        build: Callable[..., KernelMetadata] = cls  # every field was looked at
        return build(**{**document, **_read_specs(document), "lineage": _read_lineage(document)})


_NAMES = tuple(f.name for f in fields(KernelMetadata))


def _num_axes(spec: TensorSpec) -> int:
    """Return how many free sizes follow the channels; a leading batch is no channel."""
    sizes = spec.shape[1:] if spec.shape[0] == "N" else spec.shape
    return len(sizes) - 1 if sizes and isinstance(sizes[0], int) else 0


def _features(spec: TensorSpec) -> int | None:
    size = spec.shape[-1 - _num_axes(spec)]
    return size if isinstance(size, int) else None


def _read_specs(document: JsonObject) -> dict[str, TensorSpec]:
    try:
        return {name: spec_from_document(document[name]) for name in _SPECS}
    except BlueprintError as error:
        msg = f"an artifact's metadata holds a malformed spec: {error}"
        raise KernelCorruptError(msg) from error


def _read_lineage(document: JsonObject) -> tuple[str, ...]:
    lineage = document["lineage"]
    assert isinstance(lineage, list)
    parents = tuple(parent for parent in lineage if isinstance(parent, str))
    if len(parents) != len(lineage):
        msg = f"an artifact's lineage is a list of ids, found {lineage!r:.200}"
        raise KernelCorruptError(msg)
    return parents


_SPECS = ("input_spec", "output_spec")
_CHOICES: dict[str, tuple[str, ...]] = {"mode": MODES, "position": POSITIONS}
_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "blueprint_id": (str,),
    "blueprint_digest": (str,),
    "mode": (str,),
    "position": (str,),
    "parameter_count": (int,),
    "draws_random": (bool,),
    "adds_capacity": (bool,),
    "zeroed": (str, type(None)),
    "lineage": (list,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileRecord:
    """How an artifact was made: what cannot be inside its own hash, kept beside it.

    Attributes:
        size_bytes: Length of the artifact.
        compilation_time_ms: From blueprint to bytes, in milliseconds.
        target_device: ``"any"``: artifacts are data and run where their seed is.
        optimization_level: ``"none"``: kernels stay trainable; nothing is frozen or fused.
        toolchain: Name and version of what compiled it, for example ``"torch 2.13.0"``.
    """

    size_bytes: int
    compilation_time_ms: float
    target_device: str = "any"
    optimization_level: str = "none"
    toolchain: str = ""

    def to_document(self) -> JsonObject:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernelArtifact:
    """A kernel as immutable data. Two are equal if their bytes are.

    Attributes:
        artifact_id: sha256 of ``kernel_binary``, 64 hexadecimal digits.
        blueprint_id: Name of the blueprint.
        blueprint: The graph.
        kernel_binary: The artifact's bytes (``esper.contracts.artifact_format``).
        metadata: What the bytes say about the kernel.
        record: How it was made, where that is known; None after decoding.
    """

    artifact_id: str
    blueprint_id: str = field(compare=False)
    blueprint: BlueprintIR = field(compare=False)
    kernel_binary: bytes = field(repr=False)
    metadata: KernelMetadata = field(compare=False)
    record: CompileRecord | None = field(default=None, compare=False)
