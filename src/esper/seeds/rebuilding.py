"""Making a layer's seeds those of a structure: after loading, copying, unpickling."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from esper.contracts import canonical_json
from esper.contracts.blueprint import BlueprintIR
from esper.contracts.choices import GUARDS
from esper.contracts.errors import KernelLoadError
from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.class_change import choose_forward
from esper.forward.written_alphas import ALPHA_ROUNDING
from esper.seeds.slots import apply_guard, forget_waiting, insert, make_seed, withdraw
from esper.seeds.structure import (
    STRUCTURE_FORMAT_VERSION,
    describe,
    read_structure,
    structure,
)
from esper.seeds.watching import take_off
from esper.state.host_parts import SEEDS
from esper.state.kernel import PreparedKernel, prepare_kernel
from esper.state.layer_record import RECORD, record_of
from esper.state.seed_slot import Seed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from esper.contracts.choices import Guard
    from esper.seeds.structure import SeedStructure


class ExplainedKey(str):
    """A key that ``load_state_dict`` lists as unexpected; its error has the reason beside it.

    Attributes:
        reason: Why it was not taken.
    """

    reason: str

    def __new__(cls, key: str, reason: str) -> ExplainedKey:
        """Return a key with a reason."""
        made = super().__new__(cls, key)
        made.reason = reason
        return made

    def __format__(self, spec: str) -> str:
        """Return what torch writes into its error."""
        return f"{self!s} ({self.reason})"


def build(layer: nn.Module, described: Sequence[SeedStructure]) -> None:
    """Make the layer's seeds those of a structure; kernels that match stay the same objects.

    The kernels' weights are those of their blueprints at birth: load the tensors afterwards.

    Args:
        layer: A wrapped layer.
        described: What ``structure.structure`` returned.

    Raises:
        KernelLoadError: A kernel was written by hand and is not there, so that nothing can build
            it, the structure is damaged or of a newer format, or its replacing alphas sum to more
            than 1. The layer is unchanged.
        ValueError: The structure names a seed that the layer does not have.
    """
    carry_out(layer, planned(layer, described))


Plan = dict[int, "tuple[SeedStructure, Seed | None]"]
"""Each seed that is not to be dormant: its structure, and its record where it holds a kernel."""


def planned(
    layer: nn.Module,
    described: Sequence[SeedStructure],
    by_hand: Mapping[int, PreparedKernel] | None = None,
) -> Plan:
    """Return what :func:`carry_out` takes; nothing is changed.

    Args:
        layer: A wrapped layer.
        described: What ``structure.structure`` returned.
        by_hand: Kernels that no blueprint can build, by their seeds; those that stand in the layer
            already are not asked for.

    Raises:
        KernelLoadError: As for :func:`build`.
        ValueError: As for :func:`build`.
    """
    kernels = by_hand or {}
    plan: Plan = {
        (i := int(entry["seed"])): (entry, _seed_for(layer, entry, kernels.get(i)))
        for entry in described
    }
    _check_shares(layer, described)
    return plan


def carry_out(layer: nn.Module, plan: Plan, *, is_to_be_loaded: bool = False) -> None:
    """Make the layer's seeds those of a plan; all others are dormant then.

    Args:
        layer: The layer.
        plan: Of :func:`planned`.
        is_to_be_loaded: Whether a state is loaded in place next. Seeds then say the guard that they
            were saved under, even where no optimizer reads the flags of ``"step"`` yet.
    """
    record = record_of(layer)
    for i in range(record.layout.num_seeds):
        forget_waiting(layer, i)
        record.loads[i].give_up()
        if i not in plan and (i in record.seeds or record.layout.state(i)):
            withdraw(layer, i)
            record.layout.restore_seed(i, SeedLifecycleState.DORMANT, alpha=0.0, kernel_id=None)
    for i, (entry, seed) in plan.items():
        guard = entry["guard"] if is_to_be_loaded else None
        _restore(layer, i, entry, seed, guard)


def _seed_for(
    layer: nn.Module, entry: SeedStructure, by_hand: PreparedKernel | None = None
) -> Seed | None:
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
    if entry["blueprint"] is None and by_hand is not None:
        return make_seed(layer, seed_idx, by_hand, guard=_guard(layer, entry))
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


def _check_shares(layer: nn.Module, entries: Iterable[SeedStructure]) -> None:
    """Check that the replacing seeds of one structure leave the host no negative weight."""
    shares = {int(entry["seed"]): _share(entry) for entry in entries}
    if not _fit(shares.values()):
        raise KernelLoadError(f"{_too_much(layer, shares)}; the layer is left as it is")


def _withhold(
    layer: nn.Module, given: Sequence[SeedStructure], kept: Sequence[SeedStructure]
) -> dict[int, str]:
    """Set alphas to 0 that do not fit beside seeds of which a load does not speak.

    Returns:
        Why, by the index of each such seed.
    """
    taken = {int(entry["seed"]): _share(entry) for entry in kept}
    reasons: dict[int, str] = {}
    for entry in given:
        seed_idx = int(entry["seed"])
        shares = taken | {seed_idx: _share(entry)}
        if not shares[seed_idx] or _fit(shares.values()):
            taken = shares
            continue
        why = _too_much(layer, shares)
        if entry["state"] == SeedLifecycleState.FOSSILIZED:  # its alpha could not be set any more
            raise KernelLoadError(f"{why}; the layer is left as it is")
        entry["alpha"] = 0.0
        reasons[seed_idx] = (
            f"{why}; the kernel of seed {seed_idx} is loaded and its alpha left at 0: unload what "
            "the layer has beside it, then load again"
        )
    return reasons


def _fit(shares: Iterable[float]) -> bool:
    several = [share for share in shares if share]
    return sum(several) <= 1.0 + len(several) * ALPHA_ROUNDING


def _too_much(layer: nn.Module, shares: Mapping[int, float]) -> str:
    listed = ", ".join(f"{share:g} of seed {i}" for i, share in sorted(shares.items()) if share)
    return (
        f"layer {record_of(layer).name!r}: the replacing alphas would sum to "
        f"{sum(shares.values()):g} ({listed}), at most 1 is possible"
    )


def _share(entry: SeedStructure) -> float:
    """Return how much of its host a seed of a structure replaces."""
    contributes = entry["state"] in (SeedLifecycleState.ACTIVE, SeedLifecycleState.FOSSILIZED)
    replaces = entry.get("mode") == "replace"  # only a seed with a kernel has one
    return float(entry["alpha"]) if contributes and replaces else 0.0


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


def _restore(
    layer: nn.Module,
    seed_idx: int,
    entry: SeedStructure,
    seed: Seed | None,
    guard: Guard | None = None,
) -> None:
    layout = record_of(layer).layout
    alpha = float(entry["alpha"])
    state = SeedLifecycleState(entry["state"])
    forget_waiting(layer, seed_idx)
    if seed is not None:
        seed.guard = guard or _guard(layer, entry)
        seed.kernel = replace(seed.kernel, artifact_id=entry["artifact_id"])
    kernel_id = None if seed is None else seed.kernel.kernel_id
    layout.restore_seed(seed_idx, state, alpha=alpha, kernel_id=kernel_id)
    if seed is None:
        withdraw(layer, seed_idx)
        return
    insert(layer, seed, alpha)
    if state == SeedLifecycleState.ERROR_RECOVERY:
        withdraw(layer, seed_idx, keep_record=True)


def build_from_state_dict(
    layer: nn.Module, state_dict: dict[str, Tensor], prefix: str
) -> list[ExplainedKey]:
    """Build the seeds that a ``state_dict`` has under ``prefix``, before its tensors are loaded.

    A seed that the dict does not have stays. Where it leaves no room for the alpha of a replacing
    one that the dict has, that alpha is 0, in the dict too.

    Returns:
        The keys of such alphas, which were not taken.

    Raises:
        KernelLoadError: A structure is damaged, of a newer format, or of a kernel by hand that is
            not there; or the dict's own replacing alphas sum to more than 1. The layer is
            unchanged.
        ValueError: It names a seed that the layer does not have.
    """
    ready: dict[int, tuple[SeedStructure, Seed | None]] = {}
    for name in sorted(key for key in state_dict if key.startswith(prefix)):
        seed_idx, _, rest = name.removeprefix(prefix).partition(".")
        if rest == "structure":
            described = read_structure(state_dict[name].cpu().numpy().tobytes())
            alpha = state_dict.get(f"{prefix}{seed_idx}.alpha")
            entry: SeedStructure = {**described}
            if alpha is not None:
                entry["alpha"] = float(alpha)
            ready[int(seed_idx)] = entry, _seed_for(layer, entry)
    given = [entry for entry, _ in ready.values()]
    _check_shares(layer, given)
    kept = [entry for entry in structure(layer) if int(entry["seed"]) not in ready]
    reasons = _withhold(layer, given, kept)
    for idx, (entry, seed) in ready.items():
        _restore(layer, idx, entry, seed)
    for idx in reasons:
        key = f"{prefix}{idx}.alpha"
        state_dict[key] = state_dict[key].new_zeros(())
    return [ExplainedKey(f"{prefix}{idx}.alpha", why) for idx, why in reasons.items()]


def share_kernels(layer: nn.Module, copied: nn.Module) -> None:
    """Give a shallow copy of a layer seeds of its own, over the same kernels.

    Args:
        layer: The layer.
        copied: Its copy, with the layer's attributes.
    """
    record, own = record_of(layer), copy.copy(record_of(layer))
    copied.__dict__[RECORD] = own
    copied.__dict__["_modules"] = {k: m for k, m in layer._modules.items() if k != SEEDS}  # noqa: SLF001 - of a shallow copy it is one with the layer's
    for seed_idx, seed in record.seeds.items():
        made = make_seed(copied, seed_idx, seed.kernel, guard=seed.guard, example=seed.example)
        if own.layout.contributes(seed_idx):
            insert(copied, made, own.layout.alpha(seed_idx))
        else:
            own.seeds[seed_idx] = made
            made.readings_to_wait, made.num_retries = seed.readings_to_wait, seed.num_retries
    choose_forward(copied)


def attach_hooks(layer: nn.Module) -> None:
    """Put the hooks of a copied or unpickled layer where its original has them."""
    if RECORD in layer.__dict__:
        take_off(layer)
        for seed_idx, seed in record_of(layer).seeds.items():
            if record_of(layer).layout.contributes(seed_idx):
                apply_guard(layer, seed)
        choose_forward(layer)
