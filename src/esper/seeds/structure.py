"""What is needed to build a layer's seeds again, as canonical JSON."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypedDict, cast

from torch import nn

if TYPE_CHECKING:
    from esper.contracts.choices import Guard, Mode, Position

from esper.contracts import canonical_json
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.canonical_json import JsonObject, JsonValue
from esper.contracts.errors import KernelLoadError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.state.layer_record import record_of

STRUCTURE_FORMAT_VERSION: Final = 1


class SeedStructure(TypedDict, total=False):
    """What is needed to build one seed again, as JSON values; a kernel's keys go together.

    Attributes:
        format_version: Of this form.
        seed: Index of the seed.
        state: Value of its :class:`SeedLifecycleState`.
        alpha: In [0, 1]; in a ``state_dict`` it is a buffer of its own.
        kernel: Name of the kernel's class; absent where the seed holds none.
        blueprint: Document of what the kernel was lowered from; None for one by hand.
        artifact_id: sha256 of the artifact that its weights came from, or None.
        mode: How it joins.
        position: What it reads.
        guard: Where its faults are stopped.
        draws_random: Whether its forward may draw random numbers.
        adds_capacity: Whether it computes what the host layer alone cannot.
    """

    format_version: int
    seed: int
    state: int
    alpha: float
    kernel: str
    blueprint: JsonObject | None
    artifact_id: str | None
    mode: Mode
    position: Position
    guard: Guard
    draws_random: bool
    adds_capacity: bool


def describe(layer: nn.Module, seed_idx: int) -> SeedStructure:
    """Return what is needed to build a seed again, without its alpha and its tensors."""
    return cast("SeedStructure", _document(*_described(layer, seed_idx)))


def encoded_structure(layer: nn.Module, seed_idx: int) -> bytes:
    """Return :func:`describe` as canonical JSON."""
    return _encoded(*_described(layer, seed_idx))


def _described(
    layer: nn.Module, seed_idx: int
) -> tuple[BlueprintIR | None, tuple[tuple[str, JsonValue], ...]]:
    """Return a seed's blueprint, and what else there is to say, as pairs that can be hashed."""
    record = record_of(layer)
    head = (
        ("format_version", STRUCTURE_FORMAT_VERSION),
        ("seed", seed_idx),
        ("state", int(record.layout.state(seed_idx))),
    )
    seed = record.seeds.get(seed_idx)
    if seed is None:
        return None, head
    kernel = seed.kernel
    return kernel.blueprint, (
        *head,
        ("kernel", type(kernel.module).__qualname__),
        ("artifact_id", kernel.artifact_id),
        ("mode", kernel.mode),
        ("position", kernel.position),
        ("guard", seed.guard),
        ("draws_random", kernel.draws_random),
        ("adds_capacity", kernel.adds_capacity),
    )


def _document(
    blueprint: BlueprintIR | None, described: tuple[tuple[str, JsonValue], ...]
) -> JsonObject:
    document = dict(described)
    if "kernel" in document:
        document["blueprint"] = None if blueprint is None else blueprint.to_document()
    return document


@lru_cache(maxsize=1024)
def _encoded(blueprint: BlueprintIR | None, described: tuple[tuple[str, JsonValue], ...]) -> bytes:
    return canonical_json.encode(_document(blueprint, described))


def structure(layer: nn.Module) -> list[SeedStructure]:
    """Return the seeds that are not dormant, as JSON values, alpha included.

    A seed that is loading holds nothing yet and is not listed.
    """
    layout = record_of(layer).layout
    idle = (SeedLifecycleState.DORMANT, SeedLifecycleState.LOADING)
    return [
        {**describe(layer, i), "alpha": layout.alpha(i)}
        for i in range(layout.num_seeds)
        if layout.state(i) not in idle
    ]


def read_structure(data: bytes) -> SeedStructure:
    """Read the structure buffer of a slot.

    Raises:
        KernelLoadError: The bytes are not a structure.
    """
    try:
        described = canonical_json.parse(data)
    except ValueError as error:
        msg = "the structure of a seed is not canonical JSON; the state_dict is damaged"
        raise KernelLoadError(msg) from error
    if not isinstance(described, dict) or "seed" not in described:
        msg = f"the structure of a seed is an object with a seed, found {described!r:.80}"
        raise KernelLoadError(msg)
    return cast("SeedStructure", described)  # rebuilding checks what it reads
