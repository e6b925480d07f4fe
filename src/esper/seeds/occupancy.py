"""What stands in a layer's seeds: putting kernels in, taking them out, and describing them."""

# ruff: noqa: SLF001 - slots are named by digits, which only a module's tables take

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from torch import nn

from esper.contracts import canonical_json
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.choices import GUARDS
from esper.contracts.errors import KernelLoadError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.generated_class import replan
from esper.forward.guard import gate_parameters, ungate_parameters
from esper.state.host_parts import SEEDS
from esper.state.kernel import PreparedKernel, prepare_kernel, reference_tensor
from esper.state.layer_record import RECORD, record_of
from esper.state.seed_slot import Seed, SeedContainer, SeedSlot

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from esper.state.layer_call import LayerCall

STRUCTURE_FORMAT_VERSION: Final = 1


def make_seed(
    layer: nn.Module,
    seed_idx: int,
    kernel: PreparedKernel,
    *,
    guard: str,
    is_shadow: bool = False,
    example: LayerCall | None = None,
) -> Seed:
    """Return the record of a seed with its slot; nothing is inserted."""
    slot = SeedSlot(kernel.module, reference_tensor(layer).device)
    return Seed(seed_idx, kernel, slot, guard=guard, is_shadow=is_shadow, example=example)


def insert(layer: nn.Module, seed: Seed, alpha: float) -> None:
    """Put a seed's slot into the layer in place of what stood there, at ``alpha``, and replan."""
    record = record_of(layer)
    before = record.seeds.get(seed.seed_idx)
    if before is not None and before is not seed:
        ungate_parameters(before)
    record.seeds[seed.seed_idx] = seed
    _container(layer)._modules[str(seed.seed_idx)] = seed.slot
    seed.slot.train(layer.training)
    seed.slot.set_alpha(record.layout.set_alpha(seed.seed_idx, alpha))
    seed.slot.set_structure(encoded_structure(layer, seed.seed_idx))
    apply_guard(layer, seed)
    replan(layer)


def apply_guard(layer: nn.Module, seed: Seed) -> None:
    """Put gradient gates on the kernel's parameters, or take them away, as the guard says."""
    keep_buffers = record_of(layer).keep_buffers
    if seed.guard == "step" and keep_buffers is not None:
        keep_buffers()
    if seed.guard == "always":
        gate_parameters(seed)
    else:
        ungate_parameters(seed)


def withdraw(layer: nn.Module, seed_idx: int, *, keep_record: bool = False) -> Seed | None:
    """Take a seed's slot out of the layer and replan.

    Args:
        layer: The layer.
        seed_idx: Index of the seed.
        keep_record: Whether the record stays (isolated, with a probe to come).

    Returns:
        The record that stood there, if any.
    """
    record = record_of(layer)
    seed = record.seeds.get(seed_idx) if keep_record else record.seeds.pop(seed_idx, None)
    container = layer._modules.get(SEEDS)
    if container is not None:
        container._modules.pop(str(seed_idx), None)
        if not container._modules:
            del layer._modules[SEEDS]
    if seed is not None:
        ungate_parameters(seed)
    replan(layer)
    return seed


def forget_waiting(layer: nn.Module, seed_idx: int) -> Any:
    """Take away the hook of a graft that waits for an input; return the graft, or None."""
    waiting = record_of(layer).waiting.pop(seed_idx, None)
    if waiting is not None:
        waiting.handle.remove()
    return waiting


def _container(layer: nn.Module) -> SeedContainer:
    container = layer._modules.get(SEEDS)
    if not isinstance(container, SeedContainer):
        container = SeedContainer().train(layer.training)
        layer._modules[SEEDS] = container
    return container


def describe(layer: nn.Module, seed_idx: int) -> dict[str, Any]:
    """Return what is needed to build a seed again, without its alpha and its tensors."""
    return _document(*_described(layer, seed_idx))


def encoded_structure(layer: nn.Module, seed_idx: int) -> bytes:
    """Return :func:`describe` as canonical JSON."""
    return _encoded(*_described(layer, seed_idx))


def _described(
    layer: nn.Module, seed_idx: int
) -> tuple[BlueprintIR | None, tuple[tuple[str, Any], ...]]:
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
    blueprint: BlueprintIR | None, described: tuple[tuple[str, Any], ...]
) -> dict[str, Any]:
    document = dict(described)
    if "kernel" in document:
        document["blueprint"] = None if blueprint is None else blueprint.to_document()
    return document


@lru_cache(maxsize=1024)
def _encoded(blueprint: BlueprintIR | None, described: tuple[tuple[str, Any], ...]) -> bytes:
    return canonical_json.encode(_document(blueprint, described))


def structure(layer: nn.Module) -> list[dict[str, Any]]:
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


def build(layer: nn.Module, described: Sequence[dict[str, Any]]) -> None:
    """Make the layer's seeds those of a structure; kernels that match stay the same objects.

    The kernels' weights are those of their blueprints at birth: load the tensors afterwards.

    Args:
        layer: A wrapped layer.
        described: What :func:`structure` returned.

    Raises:
        KernelLoadError: A kernel was written by hand and is not there, so that nothing can build
            it, or the structure is damaged or of a newer format. The layer is unchanged.
        ValueError: The structure names a seed that the layer does not have.
    """
    record = record_of(layer)
    entries = {int(entry["seed"]): entry for entry in described}
    seeds = {i: _seed_for(layer, entry) for i, entry in entries.items()}
    for i in range(record.layout.num_seeds):
        forget_waiting(layer, i)
        record.num_unloads[i] += 1
        if i not in entries and (i in record.seeds or record.layout.state(i)):
            withdraw(layer, i)
            record.layout.restore_seed(i, SeedLifecycleState.DORMANT, alpha=0.0, kernel_id=None)
    for i, entry in entries.items():
        _restore(layer, i, entry, seeds[i])


def _seed_for(layer: nn.Module, entry: dict[str, Any]) -> Seed | None:
    """Return the record that an entry asks for: the one that is there, if it is of that kind."""
    record = record_of(layer)
    seed_idx = int(entry["seed"])
    record.layout.check_index(seed_idx)
    if entry.get("format_version", 0) > STRUCTURE_FORMAT_VERSION:
        msg = (
            f"layer {record.name!r}: structure of format {entry['format_version']} is not known "
            f"here (up to {STRUCTURE_FORMAT_VERSION}); load it with a newer Esper"
        )
        raise KernelLoadError(msg)
    _check_entry(layer, entry)
    if "kernel" not in entry:
        return None
    current = record.seeds.get(seed_idx)
    if current is not None and _same_kernel(describe(layer, seed_idx), entry):
        return current
    if entry["blueprint"] is None:
        msg = (
            f"layer {record.name!r}: the kernel of seed {seed_idx} is a {entry['kernel']} written "
            "by hand, which its name cannot build; graft such a kernel there, then load"
        )
        raise KernelLoadError(msg)
    return make_seed(layer, seed_idx, _prepared(layer, entry), guard=_guard(layer, entry))


def _check_entry(layer: nn.Module, entry: dict[str, Any]) -> None:
    alpha, state, guard = entry.get("alpha"), entry.get("state"), entry.get("guard", "off")
    is_alpha = isinstance(alpha, int | float) and 0.0 <= alpha <= 1.0
    if not is_alpha or state not in list(SeedLifecycleState) or guard not in GUARDS:
        msg = (
            f"layer {record_of(layer).name!r}: the structure of seed {entry['seed']} is damaged: "
            f"alpha {alpha!r} (in [0, 1]), state {state!r}, guard {guard!r}"
        )
        raise KernelLoadError(msg)


def _guard(layer: nn.Module, entry: dict[str, Any]) -> str:
    step_missing = entry["guard"] == "step" and not record_of(layer).has_step_guard
    return "always" if step_missing else str(entry["guard"])


def _same_kernel(mine: dict[str, Any], other: dict[str, Any]) -> bool:
    names = ("kernel", "blueprint", "mode", "position")
    return all(
        canonical_json.encode(mine.get(name)) == canonical_json.encode(other.get(name))
        for name in names
    )


def _prepared(layer: nn.Module, entry: dict[str, Any]) -> PreparedKernel:
    made = prepare_kernel(layer, BlueprintIR.from_document(entry["blueprint"]))
    return PreparedKernel(
        module=made.module,
        mode=made.mode,
        position=made.position,
        blueprint=made.blueprint,
        artifact_id=entry["artifact_id"],
        draws_random=made.draws_random,
        adds_capacity=made.adds_capacity,
    )


def _restore(layer: nn.Module, seed_idx: int, entry: dict[str, Any], seed: Seed | None) -> None:
    layout = record_of(layer).layout
    alpha = float(entry["alpha"])
    state = SeedLifecycleState(entry["state"])
    forget_waiting(layer, seed_idx)
    if seed is not None:
        seed.guard = _guard(layer, entry)
        seed.kernel = replace(seed.kernel, artifact_id=entry["artifact_id"])
    kernel_id = None if seed is None else seed.kernel.kernel_id
    layout.restore_seed(seed_idx, state, alpha=alpha, kernel_id=kernel_id)
    if seed is None:
        withdraw(layer, seed_idx)
        return
    insert(layer, seed, alpha)
    if state == SeedLifecycleState.ERROR_RECOVERY:
        withdraw(layer, seed_idx, keep_record=True)


def build_from_state_dict(layer: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Build the seeds that a ``state_dict`` has under ``prefix``, before its tensors are loaded.

    Raises:
        KernelLoadError: A structure is damaged, of a newer format, or of a kernel by hand that is
            not there.
        ValueError: It names a seed that the layer does not have.
    """
    ready = []
    for name in sorted(key for key in state_dict if key.startswith(prefix)):
        seed_idx, _, rest = name.removeprefix(prefix).partition(".")
        if rest == "structure":
            described = read_structure(state_dict[name].cpu().numpy().tobytes())
            alpha = state_dict.get(f"{prefix}{seed_idx}.alpha")
            entry = {**described, "alpha": None if alpha is None else float(alpha)}
            ready.append((int(seed_idx), entry, _seed_for(layer, entry)))
    for idx, entry, seed in ready:
        _restore(layer, idx, entry, seed)


def settle(layer: nn.Module) -> None:
    """Put the hooks of a copied or unpickled layer where its original has them."""
    if RECORD in layer.__dict__:
        _settle_waiting(layer)
        for seed_idx, seed in record_of(layer).seeds.items():
            if record_of(layer).layout.contributes(seed_idx):
                apply_guard(layer, seed)
        replan(layer)


def _settle_waiting(layer: nn.Module) -> None:
    """End the grafts for which the original waits: the copy's record has the ids of its hooks."""
    record = record_of(layer)
    for seed_idx, hook_id in record.waiting.items():
        layer._forward_pre_hooks.pop(hook_id, None)
        layer._forward_pre_hooks_with_kwargs.pop(hook_id, None)
        if record.layout.state(seed_idx) == SeedLifecycleState.LOADING:
            record.layout.transition_seed_state(seed_idx, SeedLifecycleState.DORMANT)
    record.waiting = {}


def read_structure(data: bytes) -> dict[str, Any]:
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
    return described
