"""Making a layer's seeds those of a structure: after loading, copying, unpickling."""

# ruff: noqa: SLF001 - slots are named by digits, which only a module's tables take

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from esper.contracts import canonical_json
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.choices import GUARDS
from esper.contracts.errors import KernelLoadError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.class_change import choose_forward
from esper.seeds.slots import apply_guard, forget_waiting, insert, make_seed, withdraw
from esper.seeds.structure import STRUCTURE_FORMAT_VERSION, describe, read_structure
from esper.state.kernel import PreparedKernel, prepare_kernel
from esper.state.layer_record import RECORD, record_of
from esper.state.seed_slot import Seed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from esper.contracts.choices import Guard
    from esper.seeds.structure import SeedStructure


def build(layer: nn.Module, described: Sequence[SeedStructure]) -> None:
    """Make the layer's seeds those of a structure; kernels that match stay the same objects.

    The kernels' weights are those of their blueprints at birth: load the tensors afterwards.

    Args:
        layer: A wrapped layer.
        described: What ``structure.structure`` returned.

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
        record.loads[i].give_up()
        if i not in entries and (i in record.seeds or record.layout.state(i)):
            withdraw(layer, i)
            record.layout.restore_seed(i, SeedLifecycleState.DORMANT, alpha=0.0, kernel_id=None)
    for i, entry in entries.items():
        _restore(layer, i, entry, seeds[i])


def _seed_for(layer: nn.Module, entry: SeedStructure) -> Seed | None:
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


def _check_entry(layer: nn.Module, entry: SeedStructure) -> None:
    alpha, state, guard = entry.get("alpha"), entry.get("state"), entry.get("guard", "off")
    is_alpha = isinstance(alpha, int | float) and 0.0 <= alpha <= 1.0
    if not is_alpha or state not in list(SeedLifecycleState) or guard not in GUARDS:
        msg = (
            f"layer {record_of(layer).name!r}: the structure of seed {entry['seed']} is damaged: "
            f"alpha {alpha!r} (in [0, 1]), state {state!r}, guard {guard!r}"
        )
        raise KernelLoadError(msg)


def _guard(layer: nn.Module, entry: SeedStructure) -> Guard:
    step_missing = entry["guard"] == "step" and not record_of(layer).has_step_guard
    return "always" if step_missing else entry["guard"]


def _same_kernel(mine: SeedStructure, other: SeedStructure) -> bool:
    names = ("kernel", "blueprint", "mode", "position")
    return all(
        canonical_json.encode(mine.get(name)) == canonical_json.encode(other.get(name))
        for name in names
    )


def _prepared(layer: nn.Module, entry: SeedStructure) -> PreparedKernel:
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


def _restore(layer: nn.Module, seed_idx: int, entry: SeedStructure, seed: Seed | None) -> None:
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


def build_from_state_dict(layer: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
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
            entry: SeedStructure = {**described}
            if alpha is not None:
                entry["alpha"] = float(alpha)
            ready.append((int(seed_idx), entry, _seed_for(layer, entry)))
    for idx, entry, seed in ready:
        _restore(layer, idx, entry, seed)


def attach_hooks(layer: nn.Module) -> None:
    """Put the hooks of a copied or unpickled layer where its original has them."""
    if RECORD in layer.__dict__:
        _end_waiting(layer)
        for seed_idx, seed in record_of(layer).seeds.items():
            if record_of(layer).layout.contributes(seed_idx):
                apply_guard(layer, seed)
        choose_forward(layer)


def _end_waiting(layer: nn.Module) -> None:
    """End the grafts for which the original waits; the copy has their hooks."""
    record = record_of(layer)
    for seed_idx, hook_id in record.hooks_of_original.items():
        layer._forward_pre_hooks.pop(hook_id, None)
        layer._forward_pre_hooks_with_kwargs.pop(hook_id, None)
        if record.layout.state(seed_idx) == SeedLifecycleState.LOADING:
            record.layout.transition_seed_state(seed_idx, SeedLifecycleState.DORMANT)
    record.hooks_of_original = {}
