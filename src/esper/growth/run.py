"""What the stages of a graft share: the model in training and everything that looks after it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from esper.continuity.optimizer import host_group
from esper.continuity.warmup import peak_rate
from esper.contracts.errors import GrowthError
from esper.growth.batch import num_samples
from esper.growth.budget import FORWARD, FORWARD_BACKWARD, Cost, WorkMeter, overhead_allowance
from esper.state.host_parts import host_parameters

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from esper.compiler.catalog import Catalog
    from esper.continuity.warmup import UpdateFactor
    from esper.contracts.ports import Clock, Registry
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.fetching.kernel_cache import KernelCache
    from esper.growth.budget import Budget, Category
    from esper.growth.evaluation import Evaluator
    from esper.growth.journal import Journal
    from esper.growth.measurement import Measurement
    from esper.growth.policies import Policy
    from esper.growth.ranking import Ranking
    from esper.growth.settings import GrowthSettings

LOSS_WINDOW = 50


@dataclass(slots=True, kw_only=True, eq=False)
class GrowthRun:
    """One model in training, and what its controller knows of it.

    Attributes:
        model: The wrapped model, outside DDP and ``torch.compile``.
        layers: Its layers with seeds, by name.
        optimizer: Its optimizer.
        factor: Warm-up of parameters that appear.
        compute_loss: ``(model, batch)`` to a scalar loss; None where the owner gave none.
        evaluator: Reads the gate split; None where the owner gave no measure.
        twin_update: One update of a twin, ``(model, optimizer, batches)``.
        updates: Optimizer updates done.
        rates: Learning rate of each group at the last update.
        peaks: Highest learning rate of each group so far.
        rounds: Germinations so far, several contenders side by side being one; the k-th is
            tested at the k-th level, which its contenders share.
        num_grafts: Grafts so far, every contender being one.
        turns: Decisions to grow so far, also where nothing could germinate; embargoes are
            counted in them, so that they end.
        num_over: Auditions that were given although the overhead was spent.
        admitted: What each admitted graft costs; nothing once it was removed.
        embargoes: (site, slot) and (site, blueprint) to the last turn that they sit out.
        last_change: Update of the last verdict on an admitted graft.
        last_gate: The last evaluation of the model as it is.
        losses: Recent training losses, on their device.
    """

    model: nn.Module
    layers: dict[str, KasminaLayer]
    optimizer: Optimizer
    factor: UpdateFactor
    settings: GrowthSettings
    budget: Budget
    policy: Policy
    ranking: Ranking
    catalog: Catalog
    registry: Registry
    cache: KernelCache
    clock: Clock
    journal: Journal
    compute_loss: Callable[[nn.Module, Any], Tensor] | None
    evaluator: Evaluator | None
    twin_update: Callable[[nn.Module, Optimizer, list[Any]], None]
    host_cost: Cost
    meter: WorkMeter = field(default_factory=WorkMeter)
    updates: int = 0
    rates: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    rounds: int = 0
    num_grafts: int = 0
    turns: int = 0
    num_over: int = 0
    admitted: dict[int, Cost] = field(default_factory=dict)
    embargoes: dict[tuple[str, int | str], int] = field(default_factory=dict)
    last_change: int | None = None
    last_gate: Measurement | None = None
    evaluated_at: int = -1
    samples_per_update: int = 0
    losses: deque[Tensor] = field(default_factory=lambda: deque(maxlen=LOSS_WINDOW))

    @property
    def admitted_cost(self) -> Cost:
        """What the admitted grafts add together."""
        flops = [c.flops for c in self.admitted.values() if c.flops is not None]
        latency = [c.latency_s for c in self.admitted.values() if c.latency_s is not None]
        return Cost(
            parameters=sum(c.parameters for c in self.admitted.values()),
            flops=sum(flops),
            latency_s=sum(latency),
        )

    def is_embargoed(self, site: str, what: int | str) -> bool:
        """Say whether a slot (a number) or a blueprint (its id) of a site sits out for now."""
        return self.embargoes.get((site, what), -1) >= self.turns

    def embargo(self, site: str, seed_idx: int, blueprint: str) -> None:
        """Let a slot and a blueprint sit out the next decisions to grow."""
        until = self.turns + self.settings.embargo
        self.embargoes[site, seed_idx] = self.embargoes[site, blueprint] = until

    def note_rates(self) -> None:
        """Keep the learning rates of the update that is about to happen."""
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        groups = self.optimizer.param_groups
        before = [*self.peaks, *(peak_rate(group) for group in groups[len(self.peaks) :])]
        self.peaks[:] = [max(pair) for pair in zip(self.rates, before, strict=False)]

    def peak_of(self, layer: KasminaLayer) -> float:
        """Return the highest rate that the layer's group has had."""
        group = host_group(self.optimizer, host_parameters(layer))
        index = next(i for i, g in enumerate(self.optimizer.param_groups) if g is group)
        return self.peaks[index] if self.peaks else peak_rate(group)

    def measure(self) -> Measurement:
        """Read the gate split for the model as it is."""
        return self.measured(lambda evaluator: evaluator(self.model))

    def measured(
        self, read: Callable[[Evaluator], Measurement], category: Category = "evaluation"
    ) -> Measurement:
        """Read the gate split in the way that ``read`` says, and count the work.

        Raises:
            GrowthError: The owner gave no ``evaluate``.
        """
        if self.evaluator is None:
            msg = "there is no evaluate=, so nothing can be measured; give one to the Grower"
            raise GrowthError(msg)
        before = self.evaluator.samples_seen
        result = read(self.evaluator)
        self.meter.add(category, self.evaluator.samples_seen - before, FORWARD)
        return result

    def count_pass(self, category: Category, batches: list[Any]) -> None:
        """Count one forward and backward over the batches."""
        self.meter.add(category, sum(num_samples(b) for b in batches), FORWARD_BACKWARD)

    def allowance_left(self) -> float:
        """Return how much work growing may still take.

        It follows from the horizon where there is one, and from the updates done where not; no
        clock is read, so that a run can be replayed.
        """
        horizon = self.settings.horizon or max(self.updates, 1)
        allowed = overhead_allowance(
            horizon=horizon,
            samples_per_update=self.samples_per_update,
            overhead=self.settings.overhead,
        )
        return allowed - self.meter.overhead

    def train_loss(self) -> float | None:
        """Mean of the recent training losses; None before the first."""
        return float(torch.stack(tuple(self.losses)).mean()) if self.losses else None
