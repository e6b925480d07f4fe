"""First steps of parameters that appear in a run: a factor on the update they receive.

They share a group with their host layer, so their learning rate cannot differ. Instead the
update itself is scaled: with ``p_old`` a clone from before the step, ``p = p_old + f (p - p_old)``
after it. Where the update is proportional to the rate, as in nearly every optimizer, this is a rate
of ``f`` times the host's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch.optim import Optimizer

from esper.continuity.ensemble import own_groups
from esper.continuity.step_hooks import StepHooks, is_update

if TYPE_CHECKING:
    from esper.continuity.ensemble import AnyOptimizer, ParamGroup


SPENT_FRACTION: Final = 0.10
"""A rate below this share of its peak is spent: what appears then starts at ``lr_new``."""


@dataclass(slots=True, kw_only=True)
class _Entry:
    """One parameter on its first steps.

    ``owner`` trains it, in its group number ``group``. ``ceiling`` is the rate it may reach where
    the host's rate was spent, 0 where it was not; ``start_rate`` is the host's rate when it
    appeared.
    """

    param: torch.Tensor
    owner: Optimizer
    group: int
    num_updates: int = 0
    ceiling: float = 0.0
    start_rate: float = 0.0
    before: torch.Tensor | None = None


class UpdateFactor:
    """Scales the updates of parameters that appeared in a run.

    The factor rises from 0 at a parameter's first update to 1 after ``warmup_updates``. Where
    the host's rate is below a tenth of its peak when the parameter appears, it is multiplied by
    ``lr_new * peak / rate``, so that the parameter starts at ``lr_new`` of the peak and decays
    with the schedule; should the schedule rise again, it falls back to 1.

    Each step has to be told to it, before and behind: by two hooks until :meth:`close`, or by
    whoever watches the steps of the optimizer anyway.

    Args:
        optimizer: What trains the model.
        params: Parameters that are in it and begin their first steps now.
        warmup_updates: Length of the warm-up, at least 0.
        lr_new: Share of the peak rate in [0, 1]; 0 leaves the host's rate.
        hooks: Whether the optimizer gets hooks, which do nothing while no parameter needs them;
            else :meth:`before_step` and :meth:`after_step` are to be called where :attr:`active`.

    Attributes:
        active: Whether any parameter is on its first steps.

    Raises:
        ValueError: A setting is outside its range, or a parameter is in no group.
    """

    def __init__(
        self,
        optimizer: AnyOptimizer,
        params: Iterable[torch.Tensor] = (),
        *,
        warmup_updates: int = 100,
        lr_new: float = 0.3,
        hooks: bool = True,
    ) -> None:
        if warmup_updates < 0:
            msg = f"warmup_updates is at least 0, got {warmup_updates}"
            raise ValueError(msg)
        if not 0.0 <= lr_new <= 1.0:
            msg = f"lr_new is a share of the peak rate in [0, 1], got {lr_new}"
            raise ValueError(msg)
        self.warmup_updates = warmup_updates
        self.lr_new = lr_new
        self._optimizer = optimizer
        self._entries: dict[int, _Entry] = {}
        self.active = False
        self._hooks = (
            StepHooks(optimizer, before=self._before_step, after=self._after_step)
            if hooks
            else None
        )
        self.add(params)

    def add(self, params: Iterable[torch.Tensor], *, peaks: Sequence[float] | None = None) -> None:
        """Begin the first steps of parameters that are in the optimizer.

        Args:
            params: The parameters; one that is on its first steps begins anew.
            peaks: Highest rate so far of each group of the optimizer; read off the groups where
                None (:func:`peak_rate`).

        Raises:
            ValueError: A parameter is in no group of the optimizer.
        """
        groups = self._optimizer.param_groups
        for p, number in self._numbered(params):
            highest = peak_rate(groups[number]) if peaks is None else peaks[number]
            self._entries[id(p)] = self._begin(p, number, highest)
        self._drop_finished()

    def remove(self, params: Iterable[torch.Tensor]) -> None:
        """Forget parameters; one that is not on its first steps is passed over."""
        for p in params:
            self._entries.pop(id(p), None)
        self._drop_finished()

    def close(self) -> None:
        """Forget all parameters and remove the hooks."""
        self._entries.clear()
        self.active = False
        if self._hooks is not None:
            self._hooks.close()

    def factor(self, param: torch.Tensor) -> float:
        """Return the factor on the parameter's next update; 1 where it needs none."""
        entry = self._entries.get(id(param))
        return 1.0 if entry is None else self._factor(entry)

    def state_dict(self, params: Sequence[torch.Tensor]) -> list[dict[str, float] | None]:
        """Return how far each of the parameters is, in their order; None where it is done."""
        return [_saved(self._entries.get(id(p))) for p in params]

    def load_state_dict(
        self, state: Sequence[dict[str, float] | None], params: Sequence[torch.Tensor]
    ) -> None:
        """Go on where :meth:`state_dict` was taken, with parameters in the same order.

        Raises:
            ValueError: The two are of different lengths, or a parameter is in no group.
        """
        if len(state) != len(params):
            msg = f"state of {len(state)} parameters for {len(params)}"
            raise ValueError(msg)
        self._entries.clear()
        going = [(p, saved) for p, saved in zip(params, state, strict=True) if saved is not None]
        numbered = self._numbered([p for p, _ in going])
        for (p, saved), (_, number) in zip(going, numbered, strict=True):
            entry = self._entries[id(p)] = self._begin(p, number, 0.0)
            entry.num_updates = int(saved["num_updates"])
            entry.ceiling, entry.start_rate = saved["ceiling"], saved["start_rate"]
        self._drop_finished()

    def _numbered(self, params: Iterable[torch.Tensor]) -> list[tuple[torch.Tensor, int]]:
        """Return parameters with the numbers of their groups over all optimizers.

        Raises:
            ValueError: A parameter is in no group of the optimizer.
        """
        groups = self._optimizer.param_groups
        where = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        listed = list(params)
        if any(id(p) not in where for p in listed):
            msg = "a parameter is in no group of the optimizer; append it first"
            raise ValueError(msg)
        return [(p, where[id(p)]) for p in listed]

    def _begin(self, param: torch.Tensor, number: int, highest: float) -> _Entry:
        owner, group = own_groups(self._optimizer)[number]
        rate = float(owner.param_groups[group]["lr"])
        spent = 0.0 < rate < SPENT_FRACTION * highest
        ceiling = self.lr_new * highest if spent else 0.0
        return _Entry(param=param, owner=owner, group=group, ceiling=ceiling, start_rate=rate)

    def _factor(self, entry: _Entry) -> float:
        rate = float(entry.owner.param_groups[entry.group]["lr"])
        boost = max(1.0, entry.ceiling / max(rate, entry.start_rate)) if entry.ceiling else 1.0
        return boost * self._warmth(entry)

    def _warmth(self, entry: _Entry) -> float:
        if entry.num_updates >= self.warmup_updates:
            return 1.0
        return entry.num_updates / self.warmup_updates

    def _before_step(self, optimizer: Optimizer, *_: object) -> None:
        if self.active:
            self.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if self.active:
            self.after_step(optimizer)

    def before_step(self, optimizer: Optimizer) -> None:
        """Keep the parameters on their first steps as they are before one of the optimizer."""
        for entry in self._of(optimizer):
            entry.before = entry.param.detach().clone()

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Scale what a step of the optimizer has done to parameters on their first ones."""
        entries = self._of(optimizer)
        is_counted = bool(entries) and is_update(optimizer)
        for entry in entries:
            before, entry.before = entry.before, None
            if before is None or entry.param.grad is None or not is_counted:
                continue  # not updated, so not counted
            factor = self._factor(entry)
            if factor != 1.0:
                entry.param.copy_(before + factor * (entry.param - before))
            entry.num_updates += 1
        self._drop_finished()

    def _of(self, optimizer: Optimizer) -> list[_Entry]:
        return [entry for entry in self._entries.values() if entry.owner is optimizer]

    def _drop_finished(self) -> None:
        """Let go of what needs no factor any more."""
        self._entries = {
            key: entry
            for key, entry in self._entries.items()
            if entry.num_updates < self.warmup_updates or entry.ceiling
        }
        self.active = bool(self._entries)


def _saved(entry: _Entry | None) -> dict[str, float] | None:
    if entry is None:
        return None
    return {
        "num_updates": entry.num_updates,
        "ceiling": entry.ceiling,
        "start_rate": entry.start_rate,
    }


def peak_rate(group: ParamGroup) -> float:
    """Return the highest learning rate of a group that can be read off it.

    Schedulers leave it there: ``initial_lr`` (all of them) or ``max_lr`` (OneCycleLR).

    Args:
        group: A param group of an optimizer.
    """
    rates = (group[key] for key in ("lr", "initial_lr", "max_lr") if group.get(key) is not None)
    return max(float(rate) for rate in rates)


def rate_for_new(group: ParamGroup, *, lr_new: float = 0.3, peak: float | None = None) -> float:
    """Return the rate at which parameters that appear now start, their warm-up aside.

    Args:
        group: The host layer's param group.
        lr_new: Share of the peak rate in [0, 1], used where the group's rate is spent.
        peak: Highest rate of the run so far; read off the group where None.
    """
    highest = peak_rate(group) if peak is None else peak
    rate = float(group["lr"])
    return max(rate, lr_new * highest) if rate < SPENT_FRACTION * highest else rate
