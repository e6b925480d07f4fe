"""Small real artifacts, made without torch."""

from __future__ import annotations

from esper.contracts import artifact_format
from esper.contracts.artifact import KernelMetadata
from esper.contracts.blueprint import TensorSpec


def artifact(number: int = 0, *, size: int = 4, **fields: object) -> bytes:
    """Return an artifact that differs from every other ``number``'s."""
    spec = TensorSpec((4,))
    metadata = KernelMetadata(
        **{
            "blueprint_id": f"kernel-{number}",
            "blueprint_digest": f"{number:064x}",
            "input_spec": spec,
            "output_spec": spec,
            "mode": "add",
            "position": "parallel",
            "parameter_count": size,
            "draws_random": False,
            "adds_capacity": True,
            "zeroed": None,
            **fields,
        }
    )
    weights = artifact_format.TensorBytes(dtype="F32", shape=(size,), data=bytes(4 * size))
    return artifact_format.encode({"metadata": metadata.to_document()}, {"weight": weights})
