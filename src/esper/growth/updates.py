"""Watching a run's updates: which calls of ``step`` are one, with which batches and rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.continuity.loss_scale import loss_scale_of_step
from esper.continuity.optimizer import host_group
from esper.continuity.warmup import UpdateCounter, peak_rate
from esper.state.host_parts import host_parameters

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from esper.growth.batch import Batch


class UpdateWatcher:
    """Tells optimizer updates from micro-batches, and from steps that were thrown away.

    Args:
        optimizer: The run's; it gets two hooks, until the watcher is closed.

    Attributes:
        updates: Optimizer updates that were seen in :meth:`step`.
        rates: Learning rate of each param group at the last update; empty before the first.
        reads_scale: Whether the scale of the loss is read at every step, for which the device is
            waited for.
        loss_scale: By what the loss of the last update was multiplied; 1 where nothing did, or
            it was not read.
        share_kept: Share of the calls of :meth:`step` since the update before that the last
            update was made of; the others' gradients were thrown away.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._counter = UpdateCounter(optimizer)
        self._handle = optimizer.register_step_pre_hook(self._before_step)
        self._micro_batches: list[Batch] = []
        self._per_update: int | None = None
        self._stepped = False
        self._peaks: list[float] = []
        self.updates = 0
        self.rates: list[float] = []
        self.reads_scale = False
        self.loss_scale = self.share_kept = 1.0

    def step(self, batch: Batch | None) -> list[Batch] | None:
        """Take note of a training step.

        Args:
            batch: Its batch; None where the owner gave none.

        Returns:
            The batches of the update that is complete with this step; None where none is: the
            step was of a micro-batch, or its gradients were thrown away.
        """
        if batch is not None:
            self._micro_batches.append(batch)
        stepped, self._stepped = self._stepped, False
        if self._counter.count == self.updates:
            if stepped:  # without an update: the gradients were thrown away
                self._micro_batches.clear()
            return None
        self.updates = self._counter.count
        return self._batches_of_update()

    @property
    def num_steps_of_optimizer(self) -> int:
        """Updates that the optimizer made, whether :meth:`step` was called after them or not."""
        return self._counter.count

    def peak_of(self, layer: nn.Module) -> float:
        """Return the highest rate that the param group of a layer has had."""
        group = host_group(self._optimizer, host_parameters(layer))
        index = next(i for i, g in enumerate(self._optimizer.param_groups) if g is group)
        return self._peaks[index] if self._peaks else peak_rate(group)

    def close(self) -> None:
        """Remove the hooks."""
        self._counter.close()
        self._handle.remove()

    def _before_step(self, *_: object) -> None:
        """Keep the rates of the update that is about to happen, and the highest so far."""
        self._stepped = True
        self.loss_scale = loss_scale_of_step() if self.reads_scale else 1.0
        groups = self._optimizer.param_groups
        self.rates = [float(group["lr"]) for group in groups]
        before = [*self._peaks, *(peak_rate(group) for group in groups[len(self._peaks) :])]
        self._peaks = [max(pair) for pair in zip(self.rates, before, strict=False)]

    def _batches_of_update(self) -> list[Batch]:
        """Return the batches of the update that was just counted.

        A step that GradScaler skipped calls no hook; its batches are left out by their number.
        """
        batches, self._micro_batches = self._micro_batches, []
        usual = len(batches) if self._per_update is None else self._per_update
        self._per_update = min(usual, len(batches)) or None
        kept = batches[-usual:] if usual else batches
        self.share_kept = len(kept) / len(batches) if batches else 1.0
        return kept
