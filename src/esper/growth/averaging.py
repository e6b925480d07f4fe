"""Weights averaged over a part of a run: a model's level, without the wobble of its last update."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeGuard

import torch
from torch.nn.modules.batchnorm import _NormBase

from esper.continuity.snapshot import random_state, seed_random_state, set_random_state
from esper.forward.recompilation import uncompiled
from esper.state.plain_values import as_plain, from_plain
from esper.state.seed_slot import SeedSlot
from esper.state.set_aside import set_aside
from esper.state.shards import whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from esper.growth.batch import Batch, LossFunction
    from esper.growth.measurement import Measurement
    from esper.growth.run import GrowthRun

STATISTICS_BATCHES: Final = 16
"""Training batches, the last before a reading, on which running statistics are computed anew."""


class WeightAverage:
    """The mean of a model's parameters and floating buffers over several updates.

    Means of half precision are kept in float32. Integer buffers and what modules keep elsewhere
    are those of the last update. What does not change is its own mean, also where it is infinite,
    as a mask of attention is.

    Attributes:
        num_updates: Updates that are in the mean.
    """

    def __init__(self) -> None:
        self.num_updates = 0
        self._means: list[Tensor] = []

    def fits(self, model: nn.Module) -> bool:
        """Say whether a model has the parameters and buffers of those in the mean, if any are."""
        shapes = [value.shape for value in _averaged_tensors(model)]
        return not self._means or shapes == [mean.shape for mean in self._means]

    @torch.no_grad()
    def add(self, model: nn.Module) -> None:
        """Take the model as it is into the mean.

        Raises:
            ValueError: The model has other parameters than at the first time.
        """
        if not self.fits(model):
            msg = "the model has other parameters than when its average began"
            raise ValueError(msg)
        values = _averaged_tensors(model)
        self.num_updates += 1
        if not self._means:
            self._means = [value.detach().to(_wide(value), copy=True) for value in values]
            return
        weight = 1.0 / self.num_updates
        for mean, value in zip(self._means, values, strict=True):
            wide = value.to(mean.dtype)
            if value.requires_grad:
                mean.lerp_(wide, weight)
            else:  # the difference of equal infinities is no number
                mean.copy_(torch.where(mean == wide, mean, mean.lerp(wide, weight)))

    def state_dict(self) -> list[Any]:
        """Return the mean as plain values and tensors on the CPU, whatever its model."""
        return [self.num_updates, as_plain(self._means)]

    @classmethod
    def from_state_dict(cls, state: Sequence[Any], device: torch.device) -> WeightAverage:
        """Return the mean that :meth:`state_dict` was taken of.

        Args:
            state: What it returned.
            device: Where the model is.
        """
        made = cls()
        made.num_updates, made._means = int(state[0]), from_plain(state[1], device)
        return made

    @torch.no_grad()
    def write_to(self, model: nn.Module) -> None:
        """Let a copy of the model have the averaged values."""
        for value, mean in zip(_averaged_tensors(model), self._means, strict=True):
            value.copy_(whole(mean))


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _averaged_tensors(model: nn.Module) -> list[Tensor]:
    """Return parameters and floating buffers; of a seed its kernel's, not its alpha."""
    found: dict[int, Tensor] = {id(p): p for p in model.parameters()}
    for module in model.modules():
        if not isinstance(module, SeedSlot):
            held = module._buffers.values()  # noqa: SLF001 - past properties
            found.update({id(b): b for b in held if b is not None and b.is_floating_point()})
    return list(found.values())


def read_average(
    run: GrowthRun, average: WeightAverage, model: nn.Module, batches: Sequence[Batch]
) -> Measurement:
    """Read the verdict's part of the gate split at averaged weights.

    Args:
        run: The run.
        average: The weights.
        model: A copy of what was averaged, which is given them.
        batches: Recorded training batches, the same for models to be compared.
    """
    assert run.compute_loss is not None, "nothing is averaged without compute_loss"
    average.write_to(model)
    with run.ledger.measured("evaluation"):
        renew_statistics(model, batches, run.compute_loss, random_seed=run.settings.generator_seed)
    return run.measure_copy(model).verdicts_part


def renew_statistics(
    model: nn.Module,
    batches: Sequence[Batch],
    compute_loss: LossFunction,
    *,
    random_seed: int,
) -> None:
    """Let running statistics be those of the model's weights as they are, computed on batches.

    Averages of running statistics belong to no weights. Those of modules that are in evaluation
    mode are their owner's, and stay. The random state comes back.

    Args:
        model: A copy of a model.
        batches: Recorded training batches; without one the statistics stay as they are.
        compute_loss: ``(model, batch)`` to the training loss, for its forward.
        random_seed: Starts the random numbers of the passes; the same for models to be compared.
    """
    norms = [module for module in model.modules() if has_statistics(module)]
    if not norms or not batches:
        return
    state, momenta = random_state(model), [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    try:
        seed_random_state(model, random_seed)
        apart = set_aside(model, functions=(compute_loss,), values=batches)
        with apart, uncompiled(model), torch.no_grad():
            for batch in batches:
                compute_loss(model, batch)
    finally:
        set_random_state(state)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def has_statistics(module: nn.Module) -> TypeGuard[_NormBase]:
    """Say whether a module keeps running statistics that training changes."""
    return isinstance(module, _NormBase) and module.training and module.running_mean is not None
