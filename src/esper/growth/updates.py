"""Watching a run's updates: which calls of ``step`` are one, with which batches and rates."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from esper.continuity.clipping import GradientWatch
from esper.continuity.ensemble import members_of, settings_of
from esper.continuity.loss_scale import loss_scale_of_step
from esper.continuity.step_hooks import StepHooks, is_update
from esper.continuity.warmup import peak_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.optim import Optimizer

    from esper.continuity.clipping import Clipping
    from esper.continuity.ensemble import AnyOptimizer, ParamGroup
    from esper.continuity.warmup import UpdateFactor
    from esper.growth.batch import Batch


_RATE: Final = itemgetter("lr")


class UpdateWatcher:
    """Tells optimizer updates from micro-batches, and from steps that were thrown away.

    An update is a step in which a parameter had a gradient. A step that GradScaler skipped calls no
    hook, and one whose gradients were dropped changes nothing; neither counts.

    Args:
        optimizer: The run's; it gets two hooks, until the watcher is closed.
        factor: What is told of each step as well: the warm-up of parameters that appear.

    Attributes:
        updates: Optimizer updates that were seen in :meth:`step`; of several optimizers, those of
            the one that makes most.
        num_steps_of_optimizer: Updates that it made, whether :meth:`step` was called after them or
            not.
        reads_scale: Whether the scale of the loss is read at every step, for which the device is
            waited for, the size of the gradients followed, and the settings of the groups kept.
        loss_scale: By what the loss of the last update was multiplied; 1 where nothing did, or
            it was not read.
        share_kept: Share of the calls of :meth:`step` since the update before that the last
            update was made of; the others' gradients were thrown away.
    """

    def __init__(self, optimizer: AnyOptimizer, factor: UpdateFactor) -> None:
        self._optimizer = optimizer
        self._factor = factor
        self._counts = dict.fromkeys(map(id, members_of(optimizer)), 0)
        self._hooks = StepHooks(optimizer, before=self._before_step, after=self._after_step)
        self._micro_batches: list[Batch] = []
        self._per_update: int | None = None
        self._stepped = False
        self._peaks: dict[int, list[float]] = {}
        self._rates: dict[int, list[float]] = {}
        self._settings: dict[int, list[ParamGroup]] = {}
        self.updates = self.num_steps_of_optimizer = 0
        self.reads_scale = False
        self.loss_scale = self.share_kept = 1.0
        self._gradients = GradientWatch()

    @property
    def clipping(self) -> Clipping:
        """How the gradients were clipped, as far as those tell that were followed."""
        return self._gradients.clipping

    def step(self, batch: Batch | None) -> list[Batch] | None:
        """Count a training step.

        Args:
            batch: Its batch; None where the owner gave none.

        Returns:
            The batches of the update that is complete with this step; None where none is: the
            step was of a micro-batch, or its gradients were thrown away.
        """
        if batch is not None:
            self._micro_batches.append(batch)
        stepped, self._stepped = self._stepped, False
        if self.num_steps_of_optimizer == self.updates:
            if stepped:  # without an update: the gradients were thrown away
                self._micro_batches.clear()
            return None
        self.updates = self.num_steps_of_optimizer
        kept, self._micro_batches = self._micro_batches, []
        num_batches = len(kept)
        if num_batches != self._per_update:  # the first, or GradScaler skipped one without a hook
            usual = num_batches if self._per_update is None else self._per_update
            self._per_update = min(usual, num_batches) or None
            kept = kept[-usual:] if usual else kept
        self.share_kept = len(kept) / num_batches if num_batches else 1.0
        return kept

    @property
    def rates(self) -> list[float]:
        """Learning rate of each param group at its last update; empty before the first of any."""
        return self._of_groups(self._rates, lambda group: float(group["lr"])) if self._rates else []

    @property
    def settings(self) -> list[ParamGroup]:
        """Every setting of each param group at its last update, parameters aside."""
        found: list[ParamGroup] = []
        for member in members_of(self._optimizer):
            own = self._settings.get(id(member), []) if self.reads_scale else []
            found += [*own, *map(settings_of, member.param_groups[len(own) :])]
        return found

    @property
    def peaks(self) -> list[float]:
        """The highest rate that each param group has had."""
        return self._of_groups(self._peaks, peak_rate)

    def _of_groups(
        self, known: dict[int, list[float]], else_read: Callable[[ParamGroup], float]
    ) -> list[float]:
        """Return what is known of each group, or is read off it where it has not been stepped."""
        found: list[float] = []
        for member in members_of(self._optimizer):
            own = known.get(id(member), [])
            found += [*own, *map(else_read, member.param_groups[len(own) :])]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen, with rates and peaks by the number of the optimizer."""
        members = [id(member) for member in members_of(self._optimizer)]
        return {
            "updates": self.updates,
            "counts": list(self._counts.values()),
            "per_update": self._per_update,
            "rates": [list(self._rates.get(member, ())) for member in members],
            "peaks": [list(self._peaks.get(member, ())) for member in members],
            "gradients": self._gradients.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another watcher was; batches that were no update yet are not known."""
        members = [id(member) for member in members_of(self._optimizer)]
        self._counts = dict(zip(members, map(int, state["counts"]), strict=True))
        self.num_steps_of_optimizer = max(self._counts.values())
        for own, name in ((self._rates, "rates"), (self._peaks, "peaks")):
            own.clear()
            found = zip(members, state[name], strict=True)
            own.update((member, list(rates)) for member, rates in found if rates)
        self._gradients.load_state_dict(state["gradients"])
        self._per_update, self.updates = state["per_update"], int(state["updates"])
        self._micro_batches, self._stepped = [], False

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        """Keep the rates of the update that is about to happen, and the highest so far."""
        self._stepped, self.loss_scale = True, 1.0
        if self._factor.active:
            self._factor.before_step(optimizer)
        groups = optimizer.param_groups
        if self.reads_scale:
            self.loss_scale = loss_scale_of_step()
            self._settings[id(optimizer)] = list(map(settings_of, groups))
            if optimizer is self._optimizer:  # of several, none is clipped alone
                self._gradients.see(optimizer)
        if list(map(_RATE, groups)) == self._rates.get(id(optimizer)):  # and so no other peak
            return
        peaks = self._peaks.get(id(optimizer), [])
        rates = self._rates[id(optimizer)] = [float(group["lr"]) for group in groups]
        before = [*peaks, *(peak_rate(group) for group in groups[len(peaks) :])]
        self._peaks[id(optimizer)] = [max(pair) for pair in zip(rates, before, strict=False)]

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        """Count an update."""
        if is_update(optimizer):
            count = self._counts[id(optimizer)] = self._counts[id(optimizer)] + 1
            if count > self.num_steps_of_optimizer:
                self.num_steps_of_optimizer = count
        if self._factor.active:
            self._factor.after_step(optimizer)
