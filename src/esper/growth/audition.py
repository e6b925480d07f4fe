"""The audition: a candidate learns beside the live model, which does not notice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from esper.continuity.optimizer import audition_optimizer
from esper.continuity.snapshot import seed_random_state
from esper.seeds.fitting import Pass, Rule, device_of, fits_in_use
from esper.seeds.micro_batches import gradients_of_parts, measure_loss
from esper.seeds.shadow import shadow_pass
from esper.state.host_parts import trainable_parameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from esper.continuity.ensemble import AnyOptimizer
    from esper.continuity.placement import Placement
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.growth.batch import Batch, LossFunction
    from esper.growth.evaluation import Evaluator
    from esper.growth.measurement import Measurement
    from esper.seeds.fitting import Cuts
    from esper.state.kernel import PreparedKernel
    from esper.state.layer_call import Example


@dataclass(slots=True, kw_only=True, eq=False)
class Audition:
    """One kernel at one site, trained by shadow passes with an optimizer of its own.

    Attributes:
        layer: Where the kernel would be grafted.
        seed_idx: The slot there.
        kernel: The kernel; no part of the model.
        optimizer: Of the same class and settings as what trains the host layer; None where the
            kernel has nothing to train.
        random_seed: Starts the random state of every shadow pass, with the pass's number.
        example: A call of the layer as it was recorded; None: the shadow passes have one.
        num_passes: Shadow passes done.
        rules: What is known of passes that are made in parts.
    """

    layer: KasminaLayer
    seed_idx: int
    kernel: PreparedKernel
    optimizer: AnyOptimizer | None
    random_seed: int
    example: Example | None = None
    num_passes: int = 0
    rules: dict[str, Rule] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        layer: KasminaLayer,
        seed_idx: int,
        kernel: PreparedKernel,
        *,
        placement: Placement,
        rates: Sequence[float],
        random_seed: int,
        example: Example | None = None,
    ) -> Audition:
        """Set up the audition of ``kernel``; the run's optimizer is only read.

        Args:
            layer: Where the kernel would be grafted.
            seed_idx: The slot there.
            kernel: The kernel.
            placement: Says where what the kernel has to train would go in the run's optimizer,
                whose class and settings the audition's takes.
            rates: Learning rate of the audition for each group of the run's optimizer.
            random_seed: Starts the random state of every shadow pass.
            example: A call of the layer as it was recorded.
        """
        places, _ = placement.places(layer, seed_idx, kernel.module)
        run = placement.optimizer
        own = audition_optimizer(run, places, rates=rates) if places else None
        return cls(
            layer=layer,
            seed_idx=seed_idx,
            kernel=kernel,
            optimizer=own,
            random_seed=random_seed,
            example=example,
        )

    @property
    def rates(self) -> list[float]:
        """Learning rate of each group of the audition's optimizer."""
        return [] if self.optimizer is None else [g["lr"] for g in self.optimizer.param_groups]

    def set_rates(self, rates: Sequence[float]) -> None:
        """Set the learning rate of each group."""
        assert self.optimizer is not None, "there is something to train"
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def shadow_update(self, model: nn.Module, batch: Batch, compute_loss: LossFunction) -> None:
        """Train the kernel on one batch; gradients reach its parameters and nothing else."""
        if self.optimizer is None:
            return
        parameters = trainable_parameters(self.kernel.module)

        def taken(cuts: Cuts | None = None, rule: Rule | None = None) -> list[Tensor | None]:
            apart = shadow_pass(model, functions=(compute_loss,), values=(batch,))
            with apart, self.layer.shadow(self.seed_idx, self.kernel):
                seed_random_state(model, self.random_seed + self.num_passes)
                if cuts is None or rule is None:
                    loss = compute_loss(model, batch)
                    return list(torch.autograd.grad(loss, parameters, allow_unused=True))
                return gradients_of_parts(model, compute_loss, batch, parameters, cuts, rule)

        def measure(num: int, rule: Rule) -> None:
            with self.layer.shadow(self.seed_idx, self.kernel):
                measure_loss(model, compute_loss, batch, num, rule, inputs=parameters)

        gradients = fits_in_use().run(
            taken,
            lambda: Pass(
                work="trial",
                batch=batch,
                device=device_of(model),
                parted=taken,
                measure=measure,
                rules=self.rules,
            ),
        )
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_passes += 1

    def evaluate(self, model: nn.Module, evaluator: Evaluator) -> Measurement:
        """Measure the host as it is with the kernel on, at alpha 1."""
        with shadow_pass(model), self.layer.shadow(self.seed_idx, self.kernel):
            return evaluator(model)
