"""Twins: copies of the run at a graft's admission, trained in lockstep on the same batches."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch

from esper.continuity.ensemble import Ensemble, rebuilt
from esper.continuity.following import stands_apart
from esper.continuity.snapshot import random_state, set_random_state
from esper.continuity.warmup import UpdateFactor
from esper.contracts.errors import GrowthError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from esper.continuity.ensemble import AnyOptimizer
    from esper.growth.batch import Batch, LossFunction, OwnUpdate, TwinUpdate

PERTURBATION = 1e-3
"""Relative size of the perturbation whose effect on the gate loss is tau."""


class Twin:
    """A copy of a model and its optimizer that takes the live run's batches and rates.

    It has a random state of its own, which starts as the run's, and no hook of the run's
    optimizer.

    Args:
        model: The live model, without a DDP or compile wrapper; copied.
        optimizer: Its optimizer; copied, with its moments.
        factor: Its warm-up of parameters that appeared; copied as far as it is.
        update: Does one update, ``(model, optimizer, batches)``.

    Raises:
        GrowthError: The optimizer holds a parameter that is not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AnyOptimizer,
        factor: UpdateFactor,
        update: TwinUpdate,
    ) -> None:
        memo: dict[int, object] = {}
        self.model = copy.deepcopy(model, memo)
        stands_apart(model, self.model)
        self.optimizer = _copied_optimizer(optimizer, memo)
        self.factor = _copied_factor(factor, self.optimizer, model, memo)
        self._update = update
        self._random_state = random_state(model)

    def update(self, batches: list[Batch], rates: list[float]) -> None:
        """Do the update that the live run has just done: same batches, same rates."""
        # a group that the owner added to the live run later is not the twin's
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate
        outer = random_state(self.model)
        set_random_state(self._random_state)
        try:
            self._update(self.model, self.optimizer, batches)
        finally:
            self._random_state = random_state(self.model)
            set_random_state(outer)

    def perturb(self, random_seed: int) -> None:
        """Multiply every trainable weight by ``1 + 1e-3 * N(0, 1)``."""
        generator = torch.Generator().manual_seed(random_seed)
        with torch.no_grad():
            for p in self.model.parameters():
                if p.requires_grad:
                    noise = torch.randn(p.shape, generator=generator, dtype=torch.float32)
                    p.mul_((1 + PERTURBATION * noise).to(p))


def twin_update(own: OwnUpdate | None, compute_loss: LossFunction | None) -> TwinUpdate:
    """Return how a twin is updated.

    Args:
        own: The owner's update; None where the owner gave none.
        compute_loss: The owner's loss; None where the owner gave none.
    """
    if own is not None:
        return owner_update(own)
    if compute_loss is not None:
        return lockstep_update(compute_loss)
    return lambda *_: None  # nothing is ever admitted, so there is never a twin


def lockstep_update(compute_loss: LossFunction) -> TwinUpdate:
    """Return the update a twin does where the owner gave none: loss, backward, step.

    Several micro-batches of one update are averaged.
    """

    def update(model: nn.Module, optimizer: AnyOptimizer, batches: list[Batch]) -> None:
        optimizer.zero_grad()
        for batch in batches:
            (compute_loss(model, batch) / len(batches)).backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        optimizer.step()

    return update


def owner_update(update: OwnUpdate) -> TwinUpdate:
    """Adapt the owner's ``update(model, optimizer, batch)``.

    The returned function raises GrowthError where an update took several micro-batches: only the
    owner knows how to weigh them.
    """

    def call(model: nn.Module, optimizer: AnyOptimizer, batches: list[Batch]) -> None:
        if len(batches) != 1:
            msg = (
                f"update= takes one batch, but {len(batches)} micro-batches were given to "
                "grower.step for one optimizer update; pass them to step as one batch (a list), "
                "or leave update= out"
            )
            raise GrowthError(msg)
        given = optimizer.members if isinstance(optimizer, Ensemble) else optimizer
        update(model, given, batches[0])

    return call


def tau_of(one: float | None, other: float | None) -> float:
    """Return tau from the gate losses of two twins that differ by the perturbation only.

    Returns:
        The absolute difference; infinite where either was not measured, so that no gate passes.
    """
    if one is None or other is None:
        return math.inf
    return abs(one - other)


def _copied_optimizer(optimizer: AnyOptimizer, memo: dict[int, object]) -> AnyOptimizer:
    shares = []
    for group in optimizer.param_groups:
        missing = [p for p in group["params"] if id(p) not in memo]
        if missing:
            msg = (
                f"the optimizer holds {len(missing)} parameters that the model does not have (the "
                f"first has the shape {tuple(missing[0].shape)}); a twin cannot be made of them. "
                'Use verify="snapshot", or give the Grower the module that owns them all'
            )
            raise GrowthError(msg)
        shares.append([_copy_of(p, memo) for p in group["params"]])
    twin = rebuilt(optimizer, shares)
    for p, state in optimizer.state.items():
        twin.state[_copy_of(p, memo)] = {
            k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()
        }
    return twin


def _copy_of(p: Tensor, memo: dict[int, object]) -> Tensor:
    """Return the copy of a parameter that ``deepcopy`` left in its memo."""
    copied = memo[id(p)]
    assert isinstance(copied, torch.Tensor)
    return copied


def _copied_factor(
    factor: UpdateFactor,
    optimizer: AnyOptimizer,
    model: nn.Module,
    memo: dict[int, object],
) -> UpdateFactor:
    parameters = list(model.parameters())
    twin = UpdateFactor(optimizer, warmup_updates=factor.warmup_updates, lr_new=factor.lr_new)
    twin.load_state_dict(factor.state_dict(parameters), [_copy_of(p, memo) for p in parameters])
    return twin
