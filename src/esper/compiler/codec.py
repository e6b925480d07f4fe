"""Between kernels and bytes, exactly in both directions.

``decode(encode(kernel))`` has the same blueprint, metadata and weights; ``encode`` of what was
decoded gives the same bytes. Whatever breaks a rule is refused before it becomes a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from esper.compiler.graph import Plan
from esper.compiler.lowering import (
    TORCH_DTYPES,
    LoweredKernel,
    check_tensors,
    checked_plan,
    kernel_tensors,
    tensor_of,
)
from esper.contracts import artifact_format, canonical_json
from esper.contracts.artifact import CompiledKernelArtifact, KernelMetadata
from esper.contracts.artifact_format import TensorBytes
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.canonical_json import JsonObject
from esper.contracts.errors import BlueprintError, KernelCorruptError

_HEADER_KEYS: Final = {"format_version", "kind", "blueprint", "metadata"}
_KIND: Final = "esper.kernel"
_FORMAT_DTYPES: Final = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def encode_kernel(kernel: LoweredKernel, *, lineage: tuple[str, ...] = ()) -> bytes:
    """Write a kernel, with the weights that it has now, as an artifact's bytes.

    Args:
        kernel: On any device; of its blueprint's dtype.
        lineage: Artifact ids that it descends from, nearest first.

    Raises:
        KernelCorruptError: A weight is not finite, or of another dtype than the blueprint's:
            what would be written could not be read.
    """
    stored = {name: _stored(name, tensor) for name, tensor in kernel_tensors(kernel).items()}
    made = checked_plan(kernel.blueprint)
    check_tensors(made, stored)
    _check_finite(stored)
    header = {
        "kind": _KIND,
        "blueprint": kernel.blueprint.to_document(),
        "metadata": _metadata(made, stored, lineage).to_document(),
    }
    return artifact_format.encode(header, stored)


def decode_artifact(data: bytes, *, artifact_id: str | None = None) -> CompiledKernelArtifact:
    """Read and verify an artifact. Nothing in it is executed.

    Args:
        data: The artifact's bytes.
        artifact_id: The sha256 that they should have; compared before anything is parsed.

    Returns:
        The artifact; its ``record`` is None.

    Raises:
        KernelCorruptError: The bytes have another sha256, are not exactly what Esper writes, or
            hold a blueprint that breaks a rule or weights that do not fit it or are not finite.
    """
    if artifact_id is not None:
        artifact_format.verify(data, artifact_id)
    parsed = artifact_format.parse(data)
    blueprint, found = _read_header(parsed.header)
    try:
        made = checked_plan(blueprint)
    except BlueprintError as error:
        msg = f"the artifact's blueprint breaks a rule: {error}"
        raise KernelCorruptError(msg) from error
    check_tensors(made, parsed.tensors)
    _check_finite(parsed.tensors)
    if _metadata(made, parsed.tensors, found.lineage) != found:
        msg = f"the artifact of blueprint {blueprint.id!r} has metadata that contradict its content"
        raise KernelCorruptError(msg)
    return CompiledKernelArtifact(
        artifact_id=artifact_id or artifact_format.digest_of(data),
        blueprint_id=blueprint.id,
        blueprint=blueprint,
        kernel_binary=data,
        metadata=found,
    )


def _read_header(header: JsonObject) -> tuple[BlueprintIR, KernelMetadata]:
    if header.keys() != _HEADER_KEYS or header["kind"] != _KIND:
        msg = f"an artifact's header has the fields {sorted(_HEADER_KEYS)}, found {sorted(header)}"
        raise KernelCorruptError(msg)
    try:
        blueprint = BlueprintIR.from_document(header["blueprint"])
    except BlueprintError as error:
        msg = f"the artifact holds no blueprint: {error}"
        raise KernelCorruptError(msg) from error
    if canonical_json.encode(header["blueprint"]) != blueprint.to_json():
        msg = f"the artifact's blueprint {blueprint.id!r} is not in canonical order"
        raise KernelCorruptError(msg)
    return blueprint, KernelMetadata.from_document(header["metadata"])


def _metadata(
    made: Plan, stored: Mapping[str, TensorBytes], lineage: tuple[str, ...]
) -> KernelMetadata:
    """Everything but the lineage follows from the blueprint and the weights."""
    blueprint = made.blueprint
    return KernelMetadata(
        blueprint_id=blueprint.id,
        blueprint_digest=blueprint.digest,
        input_spec=blueprint.input_spec,
        output_spec=blueprint.output_spec,
        mode=blueprint.mode,
        position=blueprint.position,
        parameter_count=made.parameter_count,
        draws_random=blueprint.draws_random,
        adds_capacity=blueprint.adds_capacity,
        zeroed=_zeroed(made, stored),
        lineage=lineage,
    )


def _zeroed(made: Plan, stored: Mapping[str, TensorBytes]) -> str | None:
    """Return the weight of the zeroed layer while every tensor of that layer is still zero."""
    step = made.zeroed_step
    if step is None:
        return None
    own = [tensor for name, tensor in stored.items() if name.rpartition(".")[0] == step.id]
    still_zero = all(tensor_of(tensor).count_nonzero() == 0 for tensor in own)
    return f"{step.id}.weight" if still_zero else None


def _stored(name: str, tensor: Tensor) -> TensorBytes:
    dtype = _FORMAT_DTYPES.get(tensor.dtype)
    if dtype is None:
        msg = f"tensor {name!r} is of dtype {tensor.dtype}; artifacts hold {list(_FORMAT_DTYPES)}"
        raise KernelCorruptError(msg)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes()
    return TensorBytes(dtype=dtype, shape=tuple(tensor.shape), data=data)


def _check_finite(stored: Mapping[str, TensorBytes]) -> None:
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor_of(tensor)).all()):
            msg = f"tensor {name!r} of the kernel holds NaN or infinity; train it again"
            raise KernelCorruptError(msg)
