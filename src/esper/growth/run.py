"""What the stages of a graft share: the model in training and everything that looks after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from esper.continuity.placement import Placement
from esper.contracts.errors import GrowthError
from esper.growth.losses import TrainingLosses
from esper.state.roster import Moves, where_kernels_stand

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from esper.compiler.catalog import Catalog
    from esper.continuity.ensemble import AnyOptimizer
    from esper.continuity.placement import GroupFor
    from esper.continuity.warmup import UpdateFactor
    from esper.contracts.ports import Clock, Registry
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.fetching.kernel_cache import KernelCache
    from esper.growth.batch import LossFunction, TwinUpdate
    from esper.growth.budget import Budget, Cost
    from esper.growth.embargoes import Embargoes
    from esper.growth.evaluation import Evaluator
    from esper.growth.graft import Grafts
    from esper.growth.journal import Journal
    from esper.growth.ledger import Category, WorkLedger
    from esper.growth.measurement import Measurement
    from esper.growth.policies import Policy
    from esper.growth.ranking import Ranking
    from esper.growth.settings import GrowthSettings
    from esper.growth.updates import UpdateWatcher
    from esper.observability.event_log import EventLog


@dataclass(slots=True, kw_only=True, eq=False)
class GrowthRun:
    """One model in training, and what its controller knows of it.

    Attributes:
        model: The wrapped model, outside DDP and ``torch.compile``.
        given: The model as it was handed over, maybe inside of them.
        layers: Its layers with seeds, by name, as far as the optimizer trains them.
        optimizer: What trains it.
        group_for: Where the owner wants parameters of kernels, by group number; None: by the rule.
        settings: The numbers of the run.
        budget: What growth may cost.
        policy: Says when to grow.
        ranking: Says where and what.
        catalog: The kernels on offer.
        registry: Where compiled kernels are stored.
        cache: Through which they are fetched.
        clock: Measures latencies, and dates the events.
        compute_loss: ``(model, batch)`` to a scalar loss; None where the owner gave none.
        evaluator: Reads the gate split; None where the owner gave no measure.
        twin_update: One update of a twin.
        watcher: Knows the updates, and their rates.
        factor: Warm-up of parameters that appear.
        journal: Publishes what happens, and keeps it for the report.
        log: The file that it goes to; None where the owner wants none.
        ledger: Counts the work.
        embargoes: What sits out, counted in decisions to grow.
        grafts: All grafts so far.
        host_cost: What the model cost before any graft; its FLOPs are known after the first batch.
        activation_bytes: What one update keeps for its backward; 0 before the first batch.
        losses: Recent training losses.
        num_moves: Moves of kernels to other modules that the layers have followed.
        num_auditions: Auditions so far, several contenders side by side being one; the k-th is
            tested at the k-th level, which its contenders share.
        last_change_update: When the last graft ended, by a verdict or a removal, or none was to
            be had; None before.
        last_measurement: What the last evaluation of the model as it is gave.
    """

    model: nn.Module
    given: nn.Module
    layers: dict[str, KasminaLayer]
    optimizer: AnyOptimizer
    group_for: GroupFor | None
    settings: GrowthSettings
    budget: Budget
    policy: Policy
    ranking: Ranking
    catalog: Catalog
    registry: Registry
    cache: KernelCache
    clock: Clock
    compute_loss: LossFunction | None
    evaluator: Evaluator | None
    twin_update: TwinUpdate
    watcher: UpdateWatcher
    factor: UpdateFactor
    journal: Journal
    log: EventLog | None
    ledger: WorkLedger
    embargoes: Embargoes
    grafts: Grafts
    host_cost: Cost
    activation_bytes: int = 0
    losses: TrainingLosses = field(default_factory=TrainingLosses)
    num_auditions: int = 0
    num_moves: int = field(default_factory=lambda: Moves.count)
    last_change_update: int | None = None
    last_measurement: Measurement | None = None

    @property
    def updates(self) -> int:
        """Optimizer updates done."""
        return self.watcher.updates

    @property
    def num_affordable(self) -> int:
        """How many auditions side by side the overhead still allows; 0 where it is spent."""
        return self.ledger.num_affordable()

    def follow_exchanges(self) -> None:
        """Go on with what others have put in the place of a layer with kernels."""
        if self.num_moves == Moves.count:
            return
        self.num_moves = Moves.count
        for name, layer in self.layers.items():
            self.layers[name] = cast("KasminaLayer", where_kernels_stand(layer))

    def placement(self) -> Placement:
        """Look at whose the parameters are now."""
        return Placement(self.model, self.optimizer, self.group_for)

    def measure(self) -> Measurement:
        """Read the gate split for the model as it is, and count what that takes.

        Raises:
            GrowthError: The owner gave no ``evaluate``.
        """
        evaluator, reading = self._evaluator(), self.ledger.reading
        if reading.is_known:
            with reading.counted():
                return evaluator(self.model)
        before = evaluator.num_readings
        with self.ledger.measured("evaluation") as work:
            found = evaluator(self.model)
        reading.learn(work.flops, evaluator.num_readings - before)
        return found

    def measured(
        self, read: Callable[[Evaluator], Measurement], category: Category = "evaluation"
    ) -> Measurement:
        """Read the gate split of another model in the way that ``read`` says, under the counter.

        Raises:
            GrowthError: The owner gave no ``evaluate``.
        """
        evaluator = self._evaluator()
        with self.ledger.measured(category):
            return read(evaluator)

    def _evaluator(self) -> Evaluator:
        if self.evaluator is None:
            msg = "there is no evaluate=, so nothing can be measured; give one to the Grower"
            raise GrowthError(msg)
        return self.evaluator

    def over_budget(self, cost: Cost) -> str | None:
        """Say why a kernel of such a cost does not fit beside what was admitted, or None."""
        return self.budget.check(
            host=self.host_cost,
            candidate=cost,
            admitted=self.grafts.added_cost,
            grafts=self.grafts.num_admitted,
        )
