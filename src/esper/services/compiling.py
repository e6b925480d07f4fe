"""Compiling as a service: from a blueprint to an artifact that has been tried, or to why not.

``compile_and_validate`` is what ``esper compile`` and a worker do. A worker does it in a sandbox,
which knows it as ``work``: bytes in, bytes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.contracts import canonical_json
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.compile_job import failure
from esper.contracts.compile_options import CompileOptions
from esper.contracts.errors import BlueprintError, KernelCompilationError
from esper.contracts.site import SiteSpec
from esper.services.work_format import Finished, encode_finished

if TYPE_CHECKING:
    from esper.contracts.artifact import CompiledKernelArtifact
    from esper.contracts.canonical_json import JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What came of a blueprint.

    Attributes:
        artifact: The kernel; None where it did not pass.
        report: ``toolchain``, ``passed``, ``reason`` and ``findings``; ``compile_ms`` is among
            these.
    """

    artifact: CompiledKernelArtifact | None
    report: JsonObject


def compile_and_validate(blueprint: BlueprintIR, options: CompileOptions | None = None) -> Compiled:
    """Compile a blueprint, and try what came of it. A refusal is an answer, and not raised.

    Args:
        blueprint: What to compile.
        options: What it is tried on; the defaults if None.
    """
    import torch

    from esper.compiler.compile import compile_blueprint
    from esper.services.validation import validate

    try:
        artifact = compile_blueprint(blueprint)
    except (BlueprintError, KernelCompilationError) as refused:
        report = failure(str(refused), toolchain=f"torch {torch.__version__}")
        return Compiled(artifact=None, report=report)
    report = validate(artifact, options).to_document()
    del report["artifact_id"]
    if not report["passed"]:
        return Compiled(artifact=None, report=report)
    assert isinstance(report["findings"], dict), "of a report"
    assert artifact.record is not None, "it was compiled now"
    report["findings"]["compile_ms"] = round(artifact.record.compilation_time_ms, 3)
    return Compiled(artifact=artifact, report=report)


def warm_up() -> None:
    """Import and do once whatever the first kernel of a process pays for.

    Torch keeps to one thread from here on: a child that was forked from others would wait for them.
    """
    import torch

    from esper.compiler.catalog import default_catalog

    torch.set_num_threads(1)
    smallest = SiteSpec(kind="linear", in_features=2, out_features=2)
    found = compile_and_validate(default_catalog().blueprints_for(smallest)[0])
    assert found.artifact is not None, found.report


def work(payload: bytes) -> bytes:
    """Do one job of a worker; see :mod:`esper.services.work_format`."""
    asked = canonical_json.parse(payload)
    assert isinstance(asked, dict), "a worker wrote it"
    blueprint, options = asked["blueprint"], asked["options"]
    assert isinstance(options, dict), "a worker wrote it"
    found = compile_and_validate(
        BlueprintIR.from_document(blueprint), CompileOptions.from_document(options)
    )
    binary = b"" if found.artifact is None else found.artifact.kernel_binary
    return encode_finished(Finished(report=found.report, binary=binary))
