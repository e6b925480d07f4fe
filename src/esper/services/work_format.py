"""What a worker hands to its sandbox, and what comes back: one line of JSON, then an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from esper.contracts import canonical_json

if TYPE_CHECKING:
    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.compile_job import CompileJob

_TYPES: Final = {"toolchain": str, "passed": bool, "reason": str, "findings": dict}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What came of a job in a sandbox.

    Attributes:
        report: ``toolchain``, ``passed``, ``reason`` and ``findings``.
        binary: The artifact's bytes; empty where nothing passed.
    """

    report: JsonObject
    binary: bytes


def encode_work(job: CompileJob) -> bytes:
    """Return a job as a sandbox's payload."""
    return canonical_json.encode({"blueprint": job.blueprint, "options": job.options})


def encode_finished(finished: Finished) -> bytes:
    """Return what came of a job as a sandbox's answer."""
    return canonical_json.encode(finished.report) + b"\n" + finished.binary


def decode_finished(data: bytes) -> Finished:
    """Read a sandbox's answer, which is trusted no further than its bytes.

    Raises:
        ValueError: It is none.
    """
    line, _, binary = data.partition(b"\n")
    report = canonical_json.parse(line)
    if not isinstance(report, dict) or report.keys() != _TYPES.keys():
        msg = f"an answer of the sandbox has the fields {sorted(_TYPES)}, found {line[:200]!r}"
        raise ValueError(msg)
    if not all(isinstance(report[name], kind) for name, kind in _TYPES.items()):
        msg = f"an answer of the sandbox has fields of other types: {line[:200]!r}"
        raise ValueError(msg)
    if report["passed"] is not bool(binary):
        msg = f"an answer of the sandbox has an artifact where it passed, found {len(binary)} bytes"
        raise ValueError(msg)
    return Finished(report=report, binary=binary)
