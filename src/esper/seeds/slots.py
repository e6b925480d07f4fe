"""Putting a kernel into a layer's seed, and taking it out."""

# ruff: noqa: SLF001 - slots are named by digits, which only a module's tables take

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from esper.forward.class_change import choose_forward
from esper.forward.gradient_gates import gate_parameters, ungate_parameters
from esper.seeds.beside_shards import stand_alone, stand_beside
from esper.seeds.structure import encoded_structure
from esper.seeds.watching import end_watch
from esper.state.host_parts import SEEDS
from esper.state.kernel import PreparedKernel, reference_tensor
from esper.state.layer_record import record_of
from esper.state.seed_slot import Seed, SeedContainer, SeedSlot

if TYPE_CHECKING:
    from esper.contracts.choices import Guard
    from esper.state.layer_call import LayerCall
    from esper.state.waiting import WaitingGraft


def make_seed(
    layer: nn.Module,
    seed_idx: int,
    kernel: PreparedKernel,
    *,
    guard: Guard,
    is_shadow: bool = False,
    example: LayerCall | None = None,
) -> Seed:
    """Return the record of a seed with its slot; nothing is inserted."""
    slot = SeedSlot(kernel.module, reference_tensor(layer).device)
    return Seed(seed_idx, kernel, slot, guard=guard, is_shadow=is_shadow, example=example)


def insert(layer: nn.Module, seed: Seed, alpha: float) -> None:
    """Put a seed's slot into the layer in place of what stood there, at ``alpha``.

    Slots stand in the order of their seeds, whichever came first: so do the parameters of a model
    that is built from a state, and what goes by their order, an optimizer's state or a copy of the
    model, is alike.
    """
    record = record_of(layer)
    before = record.seeds.get(seed.seed_idx)
    if before is not None and before is not seed:
        _let_go(before)
    stand_beside(layer, seed.slot.kernel)
    record.seeds[seed.seed_idx] = seed
    slots = _container(layer)._modules
    slots[str(seed.seed_idx)] = seed.slot
    for name in sorted(slots, key=int):
        slots[name] = slots.pop(name)
    seed.slot.train(layer.training)
    seed.slot.set_alpha(record.layout.set_alpha(seed.seed_idx, alpha))
    seed.slot.set_structure(encoded_structure(layer, seed.seed_idx))
    apply_guard(layer, seed)
    choose_forward(layer)


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
    """Take a seed's slot out of the layer, which then follows.

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
    if seed is not None and keep_record:
        ungate_parameters(seed)
    elif seed is not None:
        _let_go(seed)
    choose_forward(layer)
    return seed


def _let_go(seed: Seed) -> None:
    """Give a kernel back as it would be without a layer."""
    ungate_parameters(seed)
    stand_alone(seed.slot.kernel)


def forget_waiting(layer: nn.Module, seed_idx: int) -> WaitingGraft | None:
    """Forget a graft that waits for a call of its layer; return it, or None."""
    record = record_of(layer)
    waiting = record.waiting.pop(seed_idx, None)
    if waiting is not None and not record.waiting and record.note is not None:
        end_watch(record.note)
        record.note = None
        choose_forward(layer)
    return waiting


def _container(layer: nn.Module) -> SeedContainer:
    container = layer._modules.get(SEEDS)
    if not isinstance(container, SeedContainer):
        container = SeedContainer().train(layer.training)
        layer._modules[SEEDS] = container
    return container
