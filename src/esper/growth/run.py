"""What the stages of a graft share: the model in training and everything that looks after it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from esper.continuity.placement import Placement
from esper.continuity.replicas import any_rank, averaging, each_rank, over_ranks
from esper.contracts.errors import GrowthError
from esper.growth.extrapolation import GoingOn, going_on
from esper.growth.live_step import LiveStep
from esper.growth.losses import TrainingLosses
from esper.growth.memory import MemoryEstimate, available_bytes, estimate
from esper.growth.shards import joined
from esper.seeds.fitting import Fits, Rule
from esper.state.roster import Moves, where_kernels_stand

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from esper.bus.in_process import EventBus
    from esper.compiler.catalog import Catalog
    from esper.continuity.ensemble import AnyOptimizer
    from esper.continuity.placement import GroupFor
    from esper.continuity.warmup import UpdateFactor
    from esper.contracts.ports import Clock, Registry
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.fetching.incidents import Incidents
    from esper.fetching.kernel_cache import KernelCache
    from esper.fetching.outbox import Outbox
    from esper.growth.batch import Batch, LossFunction, TwinBuilder, TwinUpdate
    from esper.growth.budget import Budget, Cost
    from esper.growth.evaluation import Evaluator
    from esper.growth.field_reports import FieldReports
    from esper.growth.gates import GateVerdict
    from esper.growth.graft import Grafts
    from esper.growth.journal import Journal
    from esper.growth.ledger import WorkLedger
    from esper.growth.measurement import Measurement
    from esper.growth.offers import Offers
    from esper.growth.policies import Policy
    from esper.growth.ranking import Ranking
    from esper.growth.reading import Choice
    from esper.growth.settings import GrowthSettings
    from esper.growth.updates import UpdateWatcher
    from esper.observability.event_log import EventLog


class Beside(Protocol):
    """A twin that trains beside the run to its end.

    Attributes:
        package: Number of the package that it has.
    """

    package: int

    def advance(self, batches: list[Batch]) -> str | None:
        """Do the update that the live run has just done; why it can do no more, or None."""
        ...

    def read(self) -> GateVerdict | None:
        """Hold the run against the twin; None where there is nothing to hold."""
        ...

    def state_dict(self) -> int | dict[str, Any]:
        """Return it for another process to go on with; its package's number where none can."""
        ...

    def close(self) -> None:
        """Drop the twin."""
        ...


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
        cache: The kernels that were compiled here or fetched.
        outbox: Publishes what was compiled here; None where the owner gave no registry.
        offers: What the registry has for the run.
        field_reports: What the registry is told of grafts.
        owned_registry: The registry where the run has opened it, and closes it.
        origin_id: The run that this one goes on from, or itself; field reports are of it.
        clock: Measures latencies, and dates the events.
        compute_loss: ``(model, batch)`` to a scalar loss; None where the owner gave none.
        evaluator: Reads the gate split; None where the owner gave no measure.
        functions: The owner's functions that train; what they keep is put back behind each of our
            passes.
        twin_update: One update of a twin.
        build_twin: Makes a module for a twin where a copy cannot be made; None: a copy is.
        watcher: Knows the updates, and their rates.
        factor: Warm-up of parameters that appear.
        journal: Publishes what happens, and keeps it for the report.
        bus: Carries it to the log and to the owner's sink.
        log: The file that it goes to; None where the owner wants none.
        ledger: Counts the work.
        grafts: All grafts so far.
        host_cost: What the model cost before any graft; its FLOPs are known after the first batch.
        fits: How many samples the passes beside the run are made of, where that was chosen.
        update_rules: What is known of passes that measure an update.
        activation_bytes: What one update keeps for its backward; 0 before the first batch.
        losses: Recent training losses.
        num_moves: Moves of kernels to other modules that the layers have followed.
        num_packages: Packages that were tried so far.
        num_decisions: Decisions to grow so far.
        choice: What the owner named at the last of them; None where the ranking chose.
        closed: Sites at which nothing grows since their layers are not healthy, with the reasons,
            as they were at the last decision to grow.
        incidents: What goes wrong with the sources of kernels.
        null_beside: The null twin that trains on to the end of the run; None without one.
        too_dear: Why no package can be paid for in a run of this length; None where one can.
        awaited_flops: What the shortest trial of a package takes that was not earned yet; the next
            decision to grow waits for it. 0 where there was none.
        no_twins: Why no twin can be made; None where one can, or nobody has tried.
        last_change_update: When the last graft ended, by a verdict or a removal, or none was to
            be had; None before.
        last_measurement: What the last evaluation of the model as it is gave.
        has_left: Whether an error ends the run on this rank, so that it asks the others nothing.
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
    cache: KernelCache
    outbox: Outbox | None
    offers: Offers
    field_reports: FieldReports
    incidents: Incidents
    origin_id: str
    owned_registry: Registry | None
    clock: Clock
    compute_loss: LossFunction | None
    evaluator: Evaluator | None
    functions: tuple[object, ...]
    twin_update: TwinUpdate
    build_twin: TwinBuilder | None
    watcher: UpdateWatcher
    factor: UpdateFactor
    journal: Journal
    bus: EventBus
    log: EventLog | None
    ledger: WorkLedger
    grafts: Grafts
    host_cost: Cost
    fits: Fits = field(default_factory=Fits)
    update_rules: dict[str, Rule] = field(default_factory=dict)
    activation_bytes: int = 0
    losses: TrainingLosses = field(default_factory=TrainingLosses)
    num_packages: int = 0
    num_decisions: int = 0
    choice: Choice | None = None
    closed: dict[str, str] = field(default_factory=dict)
    null_beside: Beside | None = None
    too_dear: str | None = None
    awaited_flops: float = 0.0
    no_twins: str | None = None
    num_moves: int = field(default_factory=lambda: Moves.count)
    last_change_update: int | None = None
    last_measurement: Measurement | None = None
    has_left: bool = False

    @property
    def updates(self) -> int:
        """Optimizer updates done."""
        return self.watcher.updates

    def follow_exchanges(self) -> None:
        """Go on with what others have put in the place of a layer with kernels."""
        if self.num_moves == Moves.count:
            return
        self.num_moves = Moves.count
        for name, layer in self.layers.items():
            self.layers[name] = cast("KasminaLayer", where_kernels_stand(layer))

    def end_null_beside(self, reason: str) -> None:
        """Let go of the null that trains beside the run, if one does: nothing is claimed by it.

        Args:
            reason: Why it is no measure of the run any more, or cannot go on.
        """
        beside, self.null_beside, self.ledger.promised = self.null_beside, None, 0.0
        if beside is not None:
            beside.close()
            self.tell_null_ended(beside.package, reason)

    def tell_null_ended(self, package: int, reason: str) -> None:
        """Say that a null trains beside the run no longer.

        Args:
            package: Number of the package that it had.
            reason: Why.
        """
        self.journal.note(
            f"package {package} made linear trained beside the run until update {self.updates} and "
            f"no longer, so that no capacity of it is claimed at the end: {reason}"
        )

    def placement(self) -> Placement:
        """Look at whose the parameters are now."""
        return Placement(self.model, self.optimizer, self.group_for)

    def live_step(self) -> LiveStep:
        """Return how the live run made its last update, for twins to do likewise."""
        return LiveStep(
            settings=self.watcher.settings,
            loss_scale=self.watcher.loss_scale,
            clipping=self.watcher.clipping,
            average=averaging(self.given),
        )

    def settle_sizes(self) -> None:
        """Let every rank go by the smallest sizes of all; each has to come here."""
        if any_rank(self.given, here=self.fits.is_news):
            for sizes in over_ranks(self.given, self.fits.state_dict()):
                self.fits.take(sizes)
            self.fits.is_news = False

    def going_on(self, flops: float) -> GoingOn | None:
        """Say what so many FLOPs of going on would bring, from the run's own curve.

        What fell because another package was taken over is no part of that curve.
        """
        since = self.journal.last_switch
        points = [(e.update, e.gate_loss) for e in self.journal.evaluations if e.update >= since]
        each = self.ledger.update_flops
        return going_on(points, at=self.updates, extra_updates=flops / each) if each else None

    def measure(self) -> Measurement:
        """Read the gate split for the model as it is, and count what that takes.

        Every rank has to measure at the same moment, and all get the same measurement.

        Raises:
            GrowthError: The owner gave no ``evaluate``.
            RankFailedError: Another rank could not measure.
        """
        return self._of_ranks(self._counted_reading)

    def _counted_reading(self, evaluator: Evaluator) -> Measurement:
        reading = self.ledger.reading
        if reading.is_known:
            with reading.counted():
                return evaluator(self.model)
        before, changes = evaluator.num_readings, self.fits.num_changes
        with self.ledger.measured("evaluation") as work:
            found = evaluator(self.model)
        reading.learn(work.flops, evaluator.num_readings - before)
        if self.fits.num_changes != changes:
            reading.forget()  # what did not fit was counted with it
        return found

    def measure_copy(self, model: nn.Module) -> Measurement:
        """Read the gate split for a copy of the model, which may hold other kernels."""
        return self.measured(lambda evaluator: evaluator(model))

    def measured(self, read: Callable[[Evaluator], Measurement]) -> Measurement:
        """Read the gate split in the way that ``read`` says, under the counter.

        Raises:
            As :meth:`measure`.
        """

        def counted(evaluator: Evaluator) -> Measurement:
            with self.ledger.measured("evaluation"):
                return read(evaluator)

        return self._of_ranks(counted)

    def _of_ranks(self, read: Callable[[Evaluator], Measurement]) -> Measurement:
        """Let every rank read; return what they measured together."""
        evaluator = self._evaluator()
        if self.has_left:
            msg = "nothing is measured by a rank that was ended by an error"
            raise GrowthError(msg)
        with self.fits.in_use():
            found = joined(each_rank(self.given, lambda: (read(evaluator), evaluator.mark)))
        self.settle_sizes()
        return found

    def _evaluator(self) -> Evaluator:
        if self.evaluator is None:
            msg = "there is no evaluate=, so nothing can be measured; give one to the Grower"
            raise GrowthError(msg)
        return self.evaluator

    def trial_memory(self, parameters: int) -> MemoryEstimate:
        """Estimate what a trial of a package of so many parameters needs of memory."""
        settings = self.settings
        return estimate(
            self.model,
            self.optimizer,
            num_twins=(1 if settings.attribution == "none" else 2) + settings.nulls,
            package_parameters=parameters,
            activation_bytes=self.activation_bytes,
        )

    def memory_shortage(self, parameters: int) -> str | None:
        """Say that the twins of a trial do not fit, or None."""
        device = next((p.device for p in self.model.parameters()), None)
        found = None if device is None else available_bytes(device)
        return self.trial_memory(parameters).shortage(found)

    @property
    def parameter_room(self) -> float:
        """Most parameters that one more kernel may have."""
        if self.host_cost.parameters < self.budget.small_host:
            return self.budget.small_graft
        return self.budget.room(host=self.host_cost, admitted=self.grafts.added_cost).parameters

    def over_budget(self, cost: Cost) -> str | None:
        """Say why a kernel of such a cost does not fit beside what was admitted, or None."""
        return self.budget.check(
            host=self.host_cost,
            candidate=cost,
            admitted=self.grafts.added_cost,
        )
