"""The audition: a candidate learns beside the live model, which does not notice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from esper.continuity.optimizer import (
    append_parameters,
    audition_optimizer,
    remove_parameters,
)
from esper.continuity.snapshot import seed_random_state
from esper.seeds.shadow import shadow_pass
from esper.state.host_parts import host_parameters

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from esper.continuity.warmup import UpdateFactor
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.growth.evaluation import Evaluator
    from esper.growth.gates import Evaluation
    from esper.state.kernel import PreparedKernel


@dataclass(slots=True, kw_only=True, eq=False)
class Audition:
    """One kernel at one site, trained by shadow passes with an optimizer of its own.

    Attributes:
        layer: Where the kernel would be grafted.
        seed_idx: The slot there.
        kernel: The kernel; no part of the model.
        optimizer: Of the same class and settings as the host layer's group; None where the
            kernel has nothing to train.
        random_seed: Starts the random state of every shadow pass, with the pass's number.
        num_passes: Shadow passes done.
    """

    layer: KasminaLayer
    seed_idx: int
    kernel: PreparedKernel
    optimizer: Optimizer | None
    random_seed: int
    num_passes: int = 0

    @classmethod
    def begin(
        cls,
        layer: KasminaLayer,
        seed_idx: int,
        kernel: PreparedKernel,
        optimizer: Optimizer,
        *,
        rate: float,
        random_seed: int,
    ) -> Audition:
        """Set up the audition of ``kernel``; the run's ``optimizer`` is only read.

        Args:
            layer: Where the kernel would be grafted.
            seed_idx: The slot there.
            kernel: The kernel.
            optimizer: The run's optimizer, whose class and settings the audition's takes.
            rate: Learning rate of the audition.
            random_seed: Starts the random state of every shadow pass.
        """
        parameters = trainable(kernel.module)
        own = None
        if parameters:
            own = audition_optimizer(optimizer, host_parameters(layer), parameters, lr=rate)
        return cls(
            layer=layer, seed_idx=seed_idx, kernel=kernel, optimizer=own, random_seed=random_seed
        )

    def shadow_update(
        self, model: nn.Module, batch: Any, compute_loss: Callable[[nn.Module, Any], Tensor]
    ) -> None:
        """Train the kernel on one batch; gradients reach its parameters and nothing else."""
        if self.optimizer is None:
            return
        parameters = trainable(self.kernel.module)
        with shadow_pass(model), self.layer.shadow(self.seed_idx, self.kernel):
            seed_random_state(model, self.random_seed + self.num_passes)
            loss = compute_loss(model, batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_passes += 1

    def evaluate(self, model: nn.Module, evaluator: Evaluator) -> Evaluation:
        """Measure the host as it is with the kernel on, at alpha 1."""
        with shadow_pass(model), self.layer.shadow(self.seed_idx, self.kernel):
            return evaluator(model)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Joined:
    """A kernel that is part of a model: the live one or a twin.

    Attributes:
        layer: The layer of this model.
        seed_idx: The slot.
        parameters: What was appended to the optimizer; empty where nothing is trainable.
    """

    layer: KasminaLayer
    seed_idx: int
    parameters: tuple[nn.Parameter, ...]

    def set_alpha(self, updates: int, ramp_updates: int) -> float:
        """Set alpha for the next update from the number of joint updates done; return it."""
        alpha = 1.0 if updates >= ramp_updates else updates / ramp_updates
        if alpha != self.layer.alpha(self.seed_idx):
            self.layer.set_alpha(self.seed_idx, alpha)
        return alpha


def join(
    audition: Audition,
    layer: KasminaLayer,
    optimizer: Optimizer,
    factor: UpdateFactor,
    *,
    peak: float,
) -> Joined:
    """Graft an auditioned kernel at alpha 0 and hand its parameters to ``optimizer``.

    Parameters and moments go by reference, step included, to the group of their host layer.

    Args:
        audition: The audition that ends here.
        layer: The layer to graft into: the live one, or its counterpart in a twin.
        optimizer: The optimizer of the model that ``layer`` belongs to.
        factor: Its warm-up of parameters that appear.
        peak: Highest rate that the host layer's group has had.
    """
    layer.graft(audition.seed_idx, audition.kernel, alpha=0.0)
    parameters = trainable(audition.kernel.module)
    if parameters:
        state = None if audition.optimizer is None else audition.optimizer.state
        append_parameters(optimizer, host_parameters(layer), parameters, state=state)
        factor.add(parameters, peak=peak)
    return Joined(layer=layer, seed_idx=audition.seed_idx, parameters=tuple(parameters))


def part(joined: Joined, optimizer: Optimizer, factor: UpdateFactor) -> None:
    """Undo :func:`join`: the kernel goes, and its parameters and their state with it."""
    factor.remove(joined.parameters)
    joined.layer.unload_kernel(joined.seed_idx)
    remove_parameters(optimizer, joined.parameters)


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [p for p in module.parameters() if p.requires_grad]
