"""The bodies of requests and answers, as the API documents them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


def _whole(value: Any) -> Any:
    """Return what is written ``5.0`` as 5: JSON does not tell them apart."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Digest = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 of an artifact's bytes.")


class Problem(BaseModel):
    """A refusal, as of RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    found: str | None = None


class Published(BaseModel):
    """What was published."""

    id: str = Digest


class DeprecationOut(BaseModel):
    """Why an artifact should not be used any more."""

    reason: str
    successor: str | None
    actor: str | None
    deprecated_at_s: float


class StandingOut(BaseModel):
    """What field reports of a blueprint say together; see ``Standing``."""

    effect: float
    standard_error: float = Field(gt=0)
    lower: float
    num_runs: int = Field(ge=1)


class KernelOut(BaseModel):
    """What is known of one artifact."""

    id: str = Digest
    size_bytes: int
    metadata: dict[str, Any]
    record: dict[str, Any]
    tags: list[str]
    number: int
    published_at_s: float | None
    deprecation: DeprecationOut | None
    standing: StandingOut | None
    kernel_binary_ref: str


class KernelPage(BaseModel):
    """A page of a search; ``after`` asks for the next one, and is null where there is none."""

    kernels: list[KernelOut]
    after: int | None


class DeprecationIn(_Body):
    """Why an artifact should not be used any more."""

    reason: str = Field(min_length=1, max_length=1_000)
    successor: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")


class OutcomeIn(_Body):
    """What one graft brought; see ``FieldReport``."""

    artifact_id: str = Digest
    blueprint_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    run_id: str
    graft_id: str
    site_kind: str
    in_features: Whole
    out_features: Whole
    metric: str
    unit: str
    contribution: float
    standard_error: float = Field(ge=0)
    num_looks: Whole = Field(ge=1)
    verdict: str


class ValidationIn(_Body):
    """What a validation found; see ``ValidationReport``."""

    artifact_id: str = Digest
    toolchain: str
    passed: bool
    reason: str
    findings: dict[str, Any]


class SignatureIn(_Body):
    """Who vouches for an artifact; see ``KernelSignature``."""

    artifact_id: str = Digest
    key_id: str = Field(pattern=r"^[0-9a-f]{64}$", description="sha256 of the public key.")
    signed_at_s: Whole = Field(ge=0, le=1 << 53)
    signature: str = Field(pattern=r"^[0-9a-f]{128}$", description="Ed25519, in hexadecimal.")


class Signatures(BaseModel):
    """Signatures of an artifact, oldest first; the server has not checked them."""

    signatures: list[SignatureIn]


class Outcomes(BaseModel):
    """What grafts of an artifact brought, oldest report first."""

    outcomes: list[OutcomeIn]


class Validations(BaseModel):
    """What validations of an artifact found, oldest first."""

    validations: list[ValidationIn]


class Names(BaseModel):
    """A page of names; ``after`` asks for the next one, and is null where there is none."""

    names: list[str]
    after: str | None


class Tags(BaseModel):
    """Where each tag of a name points."""

    tags: dict[str, str]


class TagIn(_Body):
    """Where a tag is to point."""

    digest: str = Digest


class TagOut(BaseModel):
    """Where a tag points."""

    digest: str = Digest


class Move(BaseModel):
    """One line of a tag's history."""

    digest: str | None
    moved_at_s: float
    actor: str | None


class History(BaseModel):
    """Every move of a tag, oldest first."""

    moves: list[Move]


class Check(BaseModel):
    """What a look at stored artifacts found."""

    intact: int
    quarantined: list[str]
    missing: list[str]
    unreferenced: list[str]
    after: str | None


class Collected(BaseModel):
    """Digests of the bytes that were removed."""

    removed: list[str]


class AuditLine(BaseModel):
    """One thing that was done."""

    number: int
    at_s: float
    actor: str
    action: str
    subject: str
    detail: str


class AuditPage(BaseModel):
    """A page of the audit; ``after`` asks for the next one, and is null where there is none."""

    lines: list[AuditLine]
    after: int | None


class State(BaseModel):
    """Whether the server can do its work."""

    status: Literal["ok"]
