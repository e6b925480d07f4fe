"""``guard="step"``: faults that are read before an optimizer's step, which is then not made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from esper.contracts.lifecycle import SeedLifecycleState
from esper.forward.finiteness import gradient_total
from esper.seeds.isolation import SeedFault, isolate_if_moved, tell_later
from esper.state.host_parts import host_parameters, is_in_a_seed
from esper.state.layer_record import LayerRecord, record_of
from esper.state.shards import here

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from esper.state.seed_slot import Seed

    OverRanks = Callable[[Sequence[tuple[nn.Module, int]], Tensor], Tensor]

_S: Final = SeedLifecycleState


def read_step_flags(
    layers: Iterable[nn.Module], over_ranks: OverRanks | None = None
) -> list[SeedFault]:
    """Read the flags of all seeds under ``guard="step"``, and isolate the faulty at once.

    To be called where gradients are complete and the optimizer has not stepped. A seed is at
    fault where its output was not finite and its host's was, or where its parameters' gradients
    are not finite and those of its host are. One transfer from the device for all seeds together.

    Args:
        layers: Wrapped layers.
        over_ranks: ``(seeds, flags)`` to the maximum of bool flags over the ranks that train a
            model together, so that all of them drop a step or none does; called also where this
            rank has no seed under the guard.

    Returns:
        The faulty seeds; the caller drops the step's gradients if there is one.
    """
    watched = [
        (layer, seed_idx, seed)
        for layer in layers
        for seed_idx, seed in record_of(layer).seeds.items()
        if seed.guard == "step"  # an isolated one, too: ranks may not have isolated it alike
    ]
    if not watched and over_ranks is None:
        return []
    found = _step_flags(watched)
    if over_ranks is not None:
        found = over_ranks([(layer, seed_idx) for layer, seed_idx, _ in watched], found)
    output, gradient, host = found.unbind(1)
    flags = torch.stack((output, gradient & ~host), 1).tolist()
    faults = []
    for (layer, seed_idx, seed), (output_bad, gradient_bad) in zip(watched, flags, strict=True):
        raised = any(call.raised for call in seed.seen.calls)
        if output_bad or gradient_bad:
            what = "output was" if output_bad else "gradients were"
            seed.last_error = f"its {what} not finite where its host's were"
            faults.append(_isolate_now(layer, seed_idx, seed))
        elif not raised:
            seed.works_on_batches |= any(call.shape[:1] != (1,) for call in seed.seen.calls)
            skipped = seed.seen.skipped  # which is told at the next reading
            seed.forget_calls()
            seed.seen.skipped = skipped
            _end_run_of_faults(record_of(layer), seed_idx)
    return faults


def _end_run_of_faults(record: LayerRecord, seed_idx: int) -> None:
    """A clean step ends a run of faults; that of an isolated seed is over."""
    if record.layout.contributes(seed_idx) and int(record.layout.error_count[seed_idx]):
        record.layout.record_calls(seed_idx, [False])


def has_step_seeds(layers: Iterable[nn.Module]) -> bool:
    """Say whether any seed of the layers is under ``guard="step"``."""
    return any(seed.guard == "step" for layer in layers for seed in record_of(layer).seeds.values())


def _step_flags(watched: Sequence[tuple[nn.Module, int, Seed]]) -> Tensor:
    """Return a ``[seeds, 3]`` bool tensor: what :func:`_step_flag` says of each seed."""
    if not watched:
        return torch.zeros(0, 3, dtype=torch.bool)
    return torch.stack([_step_flag(layer, seed) for layer, _, seed in watched])


def _step_flag(layer: nn.Module, seed: Seed) -> Tensor:
    """Return a ``[3]`` bool tensor: output at fault, gradients not finite, nor what excuses them.

    What excuses a kernel's gradients is the host's output, or its gradients where both read the
    same input; of a sharded host each rank sees its own part of these.
    """
    seed.follow_device()
    output_bad, host_bad = seed.seen.step_flags()
    gradient_bad = _any_not_finite(seed.slot.kernel.parameters(), like=output_bad)
    if not seed.is_serial:
        host_bad = host_bad | _any_not_finite(host_parameters(layer), like=output_bad)
    return torch.stack((output_bad, gradient_bad, host_bad))


def _any_not_finite(parameters: Iterable[Tensor], *, like: Tensor) -> Tensor:
    totals = [gradient_total(here(p.grad)) for p in parameters if p.grad is not None]
    if not totals:
        return torch.zeros_like(like)
    numbers = [total for total in totals if isinstance(total, float)]
    if len(numbers) == len(totals):
        return torch.full_like(like, not all(map(math.isfinite, numbers)))
    finite = [torch.as_tensor(total, device=like.device).isfinite() for total in totals]
    return ~torch.stack(finite).all()


def _isolate_now(layer: nn.Module, seed_idx: int, seed: Seed) -> SeedFault:
    record = record_of(layer)
    layout, before = record.layout, record.layout.state(seed_idx)
    seed.forget_calls()
    if before == _S.ACTIVE:
        layout.isolate(seed_idx)
    elif before == _S.FOSSILIZED:
        layout.record_calls(seed_idx, [True])
    fault = isolate_if_moved(layer, seed_idx, seed, 1)
    tell_later(record, before, fault)
    return fault


class KeptBuffers:
    """The last good copy of a model's buffers, for steps that ``guard="step"`` throws away.

    A forward that a faulty kernel has spoiled leaves NaN in running statistics behind it.

    Args:
        model: The model; the slots of its seeds are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, Tensor] = {}
        self.keep()

    def keep(self) -> None:
        """Copy the buffers as they are now: call it after a step without faults."""
        self._kept = {name: buffer.detach().clone() for name, buffer in self._buffers()}

    def put_back(self) -> None:
        """Write the kept values into the buffers; one that is new or of a new shape stays."""
        with torch.no_grad():
            for name, buffer in self._buffers():
                if name in self._kept and self._kept[name].shape == buffer.shape:
                    buffer.copy_(self._kept[name])

    def _buffers(self) -> list[tuple[str, Tensor]]:
        named = self._model.named_buffers()
        return [(name, buffer) for name, buffer in named if not is_in_a_seed(name)]
