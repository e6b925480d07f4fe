"""Compilation: from a blueprint to an artifact that a registry can keep."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.compiler.codec import decode_artifact, encode_kernel
from esper.compiler.lowering import load_tensors_, lower
from esper.compiler.tracing import trace_symbolically
from esper.contracts.arguments import check_type
from esper.contracts.artifact import CompiledKernelArtifact, CompileRecord
from esper.contracts.blueprint import BlueprintIR

if TYPE_CHECKING:
    from esper.contracts.ports import Clock


def compile_blueprint(
    blueprint: BlueprintIR,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    lineage: tuple[str, ...] = (),
    clock: Clock | None = None,
) -> CompiledKernelArtifact:
    """Compile a blueprint. The same blueprint and tensors give the same bytes and the same id.

    A graph that this process has not compiled before is traced over symbolic sizes first.

    Args:
        blueprint: What to compile.
        tensors: Weights by their names in an artifact (``lowering.kernel_tensors``), all of
            them; the blueprint's initial ones if None.
        lineage: Artifact ids that this one descends from, nearest first.
        clock: What measures the compilation time; the monotonic clock if None.

    Raises:
        TypeError: ``blueprint`` is no BlueprintIR.
        BlueprintError: The blueprint breaks a rule, or ``tensors`` are not its.
        KernelCompilationError: The kernel does not trace over symbolic sizes.
        KernelCorruptError: A tensor is not finite or of another dtype than the blueprint's.
    """
    check_type("blueprint", blueprint, BlueprintIR, "an esper.BlueprintIR")
    now = clock.now if clock is not None else time.perf_counter
    start_s = now()
    kernel = lower(blueprint)
    trace_symbolically(kernel, blueprint.input_spec)
    if tensors is not None:
        load_tensors_(kernel, tensors)
    data = encode_kernel(kernel, lineage=lineage)
    decoded = decode_artifact(data)
    record = CompileRecord(
        size_bytes=len(data),
        compilation_time_ms=(now() - start_s) * 1000,
        toolchain=f"torch {torch.__version__}",
    )
    return replace(decoded, blueprint=blueprint, record=record)
