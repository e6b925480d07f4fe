"""What is said of a kernel after it was published: how it did, and whether to go on using it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from esper.contracts.reference import check_digest

if TYPE_CHECKING:
    from esper.contracts.canonical_json import JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Deprecation:
    """A word that an artifact should not be used any more.

    Attributes:
        reason: Why, for people; 1 to 1,000 characters.
        successor: Digest of what to use in its place, where there is one.
        actor: Who said so, as far as the registry was told.
        deprecated_at_s: When, in seconds since 1970 by the registry's clock.
    """

    reason: str
    successor: str | None
    actor: str | None
    deprecated_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldReport:
    """What one graft of a kernel brought to one run. Equal run and graft is the same report.

    Attributes:
        artifact_id: Digest of the artifact that was grafted.
        blueprint_digest: sha256 of its blueprint, which artifacts with other weights share.
        run_id: The run.
        graft_id: The graft in that run.
        site_kind: Kind of the layer, as ``SiteSpec.kind``.
        in_features: Input features or channels of the layer.
        out_features: Output features or channels of the layer.
        metric: What was measured, for example ``"loss"``.
        unit: In what, for example ``"relative"``: a part of the value before.
        contribution: How much better the run is with the graft; below 0 where it is worse.
        standard_error: Of the contribution, at least 0.
        num_looks: Held-out losses that it was computed from, at least 1.
        verdict: What was decided, for example ``"fossilized"`` or ``"culled"``.
    """

    artifact_id: str
    blueprint_digest: str
    run_id: str
    graft_id: str
    site_kind: str
    in_features: int
    out_features: int
    metric: str
    unit: str
    contribution: float
    standard_error: float
    num_looks: int
    verdict: str

    def __post_init__(self) -> None:
        _check_types(self)
        check_digest(self.artifact_id)
        check_digest(self.blueprint_digest)
        if not (self.standard_error >= 0 and self.num_looks >= 1):
            msg = (
                "a field report has a standard error of at least 0 from at least one look, found "
                f"{self.standard_error} from {self.num_looks}"
            )
            raise ValueError(msg)

    def to_document(self) -> JsonObject:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: JsonObject) -> Self:
        """Read the JSON form; the inverse of :meth:`to_document`.

        Raises:
            ValueError: It has other fields, or a value that it cannot have.
        """
        return cls(**_known(cls, document))


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    """What building and trying out a kernel on its own found.

    Attributes:
        artifact_id: Digest of the artifact.
        toolchain: Name and version of what it was tried with, for example ``"torch 2.13.0"``.
        passed: Whether every check was passed.
        reason: The first check that was not and why; empty where all were.
        findings: What was measured, by name, as JSON values: latency, memory, parameters.
    """

    artifact_id: str
    toolchain: str
    passed: bool
    reason: str
    findings: JsonObject

    def __post_init__(self) -> None:
        _check_types(self)
        check_digest(self.artifact_id)

    def to_document(self) -> JsonObject:
        """Return the JSON form."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: JsonObject) -> Self:
        """Read the JSON form; the inverse of :meth:`to_document`.

        Raises:
            ValueError: It has other fields, or a value that it cannot have.
        """
        return cls(**_known(cls, document))


_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "str": str,
    "bool": bool,
    "JsonObject": dict,
}
_LONGEST_TEXT = 1_000


def _known(cls: type[FieldReport | ValidationReport], document: object) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    if not isinstance(document, dict) or document.keys() != names:
        msg = f"a {cls.__name__} has the fields {sorted(names)}, found {document!r:.300}"
        raise ValueError(msg)
    return document


def _check_types(report: FieldReport | ValidationReport) -> None:
    """Refuse values of other types, numbers that are not finite, and texts without end."""
    for field in fields(report):
        value = getattr(report, field.name)
        is_right = isinstance(value, _TYPES[str(field.type)])
        if isinstance(value, bool) and field.type != "bool":
            is_right = False
        if isinstance(value, float):
            is_right = is_right and abs(value) < float("inf")
        if isinstance(value, str):
            is_right = is_right and len(value) <= _LONGEST_TEXT
        if not is_right:
            msg = (
                f"{type(report).__name__}.{field.name} is a {field.type}, finite, and text of at "
                f"most {_LONGEST_TEXT} characters, found {value!r:.100}"
            )
            raise ValueError(msg)
