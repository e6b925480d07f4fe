"""The controller: watches a run, and decides between two updates what grows."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Final, Self, Unpack

from esper.continuity.ensemble import members_of
from esper.continuity.optimizer import busy_layers
from esper.contracts.errors import GrowthError
from esper.contracts.progress import ProgressRow
from esper.contracts.report import RunReport
from esper.growth.assembly import begin_run
from esper.growth.budget import count_parameters
from esper.growth.claims import claim, release
from esper.growth.obstacles import missing_evidence, obstacle
from esper.growth.options import GrowerOptions, show_options
from esper.growth.probation import Probation
from esper.growth.reading import Reading
from esper.growth.schedule import EVALUATE_EVERY, EvaluationSchedule
from esper.growth.stages import Recording
from esper.growth.suggestion import suggestions
from esper.seeds.maintenance import maintain_layers
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from esper.contracts.progress import GraftStatus
    from esper.growth.batch import Batch
    from esper.growth.stages import Stage
    from esper.growth.suggestion import Suggestion

KEPT_BATCHES: Final = 8
"""Recent batches that :meth:`Grower.suggest` may rank on."""


class Grower:
    """Grows a wrapped model while its owner trains it.

    Call :meth:`step` after every optimizer update (or micro-batch), :meth:`end_epoch` after an
    epoch if there are epochs, and :meth:`close` at the end, or use it as a context manager. Until
    a kernel is admitted, the run is bit-identical to one without a Grower.

    Every option is a keyword. The numbers, in italics below, are told one by one in
    :class:`~esper.growth.settings.GrowthSettings`.

    What is trained, and what it is judged by:
        ``compute_loss``: ``(model, batch)`` to the scalar training loss. Without it the Grower
        ranks and advises, and grafts nothing.
        ``evaluate``: ``evaluate(model)`` on held-out data (the *gate* split): per-sample losses,
        shape (samples,), at least 200 of them; or a dict whose first entry decides; or
        ``(losses, metrics)``. A scalar is accepted, but then no gate passes.
        ``update``: ``(model, optimizer, batch)``, one update of a twin; loss, backward and step
        with the recorded rates where None.
        ``group_for``: ``(name, parameter)`` to the param group that a kernel's parameter joins, or
        its number over all groups; where None, the one that trains the host layer's parameters of
        its kind.
        Numbers: *horizon*, *goal*, *random_seed*.

    When to grow, where, and what:
        ``policy``: When; ``DiminishingReturns`` where None.
        ``ranking``: Where and what; ``FirstOrderGain`` where None.
        ``catalog``: The kernels on offer; the default catalog where None.
        ``registry``: Where compiled kernels are stored and fetched from; one in memory where None.

    What it may cost:
        ``budget``: Limits on parameters, FLOPs, latency and the number of grafts.
        Numbers: *overhead*, *evaluate_every*.

    The course of a graft:
        Numbers: *record_updates*, *candidates*, *audition_updates*, *min_effect*, *embargo*,
        *ramp_updates*, *warmup_updates*, *lr_new*, *hold_updates*, *looks*, *verify*.

    What is written down:
        ``run_dir``: Where ``events.jsonl`` is written; None writes no files.
        ``sink``: Takes every event as well.
        ``clock``: Dates the events.

    Args:
        model: A model after :func:`esper.wrap`; it may be inside DDP or ``torch.compile``.
        optimizer: What trains it: ``torch.optim.SGD``, ``Adam``, ``AdamW`` or ``Muon``, what
            derives from them or wraps one, or a sequence of several that train it together. A layer
            that none of them trains, though it is trainable, does not grow.
        options: As above.

    Raises:
        ValueError: A setting is out of its range, the model has no layer with seeds or none that
            the optimizer trains, or the optimizer is another model's.
        TypeError: An option is unknown or of the wrong type, or the optimizer is not supported.
        GrowthError: A site named by hand is none of the model's or cannot grow, or another Grower
            that was not closed has the model or an optimizer.
    """

    @show_options
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        **options: Unpack[GrowerOptions],
    ) -> None:
        self._run = begin_run(model, optimizer, options)
        claim(self, [*layers(self._run.model).values(), *members_of(self._run.optimizer)])
        settings = self._run.settings
        self._schedule = EvaluationSchedule(
            every=settings.evaluate_every, overhead=settings.overhead
        )
        self._stage: Stage | None = None
        self._recent: deque[Batch] = deque(maxlen=KEPT_BATCHES)
        self._reading = Reading(update=0, horizon=settings.horizon)
        self._has_advised = self._closed = False
        self._run.journal.started({**settings.as_dict(), "budget": asdict(self._run.budget)})
        if settings.verify == "fork" and options.get("update") is None:
            self._run.journal.note(
                "twins are updated by loss, backward and step with the recorded rates; give "
                "update= if your own update does more"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def updates(self) -> int:
        """Optimizer updates seen so far."""
        return self._run.updates

    @property
    def stages(self) -> tuple[GraftStatus, ...]:
        """Where each graft is that is under way: its site, its seed and its stage."""
        return () if self._stage is None else self._stage.statuses

    @property
    def host_twin(self) -> nn.Module | None:
        """The twin without a graft, while ``verify="fork"`` has one; read it, do not train it."""
        return self._stage.host_twin if isinstance(self._stage, Probation) else None

    @property
    def last_metrics(self) -> dict[str, float]:
        """What ``evaluate`` returned beside the losses at the last evaluation, by name."""
        evaluations = self._run.journal.evaluations
        return dict(evaluations[-1].metrics) if evaluations else {}

    def progress_row(self, name: str = "run") -> ProgressRow:
        """Return where the run is: updates, what was measured last, and what is under way.

        Args:
            name: What runs, for a table of several.
        """
        evaluations = self._run.journal.evaluations
        return ProgressRow(
            name=name,
            update=self.updates,
            gate_loss=evaluations[-1].gate_loss if evaluations else None,
            metrics=self.last_metrics,
            parameters=count_parameters(self._run.model),
            grafts=self.stages,
        )

    def step(self, loss: Tensor | None = None, batch: Batch = None) -> None:
        """Take note of one training step; call it after the optimizer's.

        Args:
            loss: The training loss, a scalar tensor; it stays on its device.
            batch: What ``compute_loss`` takes: the batch that the loss was computed on.

        Raises:
            GrowthError: A graft is under way and ``batch`` is missing, or the Grower is closed.
            KernelExecutionError: A fossil's kernel keeps failing.
        """
        if self._closed:
            msg = "this Grower is closed; make another one to go on growing"
            raise GrowthError(msg)
        if loss is not None:
            self._run.losses.add(loss)
        batches = self._run.watcher.step(batch)
        if batches is not None:
            self._after_update(batches)

    def end_epoch(self) -> None:
        """Say that an epoch ended: the default moment for an evaluation."""
        self._schedule.end_epoch()
        if not self._closed and self._run.updates and self._look():
            self._decide()

    def suggest(self) -> list[Suggestion]:
        """Rank every kernel on offer on the recent batches; changes nothing.

        Returns:
            Best first; those that the ranking cannot score come last.

        Raises:
            GrowthError: There is no ``compute_loss``, or no batch was passed to :meth:`step`.
        """
        return suggestions(self._run, self._recent)

    def report(self) -> RunReport:
        """Return what happened so far; ``print`` it, or ask for its JSON."""
        run = self._run
        return RunReport(
            settings=run.settings.as_dict(),
            updates=run.updates,
            evaluations=tuple(run.journal.evaluations),
            grafts=run.grafts.records,
            timeline=tuple(run.journal.timeline),
            alphas=tuple(run.journal.alphas),
            work=run.ledger.by_category(),
            parameters_before=run.host_cost.parameters,
            parameters_after=count_parameters(run.model),
            notes=tuple(run.journal.notes),
        )

    def close(self, reason: str = "the run ended") -> None:
        """Decide nothing more: remove what has no verdict, every hook, and close the log.

        A graft that was admitted and not judged yet is removed: unmeasured means no. Closing
        twice does nothing.
        """
        if self._closed:
            return
        self._closed = True
        release(self)
        stage, self._stage = self._stage, None
        run = self._run
        try:
            if stage is not None:
                stage.close(f"{reason} before its verdict")
        finally:
            run.factor.close()
            run.watcher.close()
            self._recent.clear()
            run.journal.ended(reason, run.grafts.records)
            if run.log is not None:
                run.log.close()

    def _after_update(self, batches: list[Batch]) -> None:
        """Do what an update asks for, in this order: maintain, go on with a graft, look, decide."""
        run = self._run
        run.ledger.count_update(batches)
        run.count_host_flops(batches)
        self._recent.extend(batches)
        for fault in maintain_layers(busy_layers(run.optimizer)).faults:
            run.journal.faulted(fault)
        if self._stage is not None:
            if not batches and self._stage.needs_batches:
                msg = (
                    f"grower.step was called without batch= at update {run.updates}, while a "
                    "graft is under way; pass the batch of every step"
                )
                raise GrowthError(msg)
            self._stage = self._stage.advance(batches)
        self._look()
        self._decide()

    def _look(self) -> bool:
        """Let the policy see an evaluation where one is due; say whether it saw one."""
        run = self._run
        if run.evaluator is None:
            return run.updates % EVALUATE_EVERY == 0 and self._look_at_training_loss()
        if not self._schedule.is_due(run.updates, run.ledger.samples_per_update):
            return False
        before = run.ledger.work("evaluation")
        found = run.last_measurement = run.measure()
        self._schedule.evaluated(run.updates, run.ledger.work("evaluation") - before)
        train_loss = run.losses.mean()
        run.journal.evaluated(found, train_loss)
        self._observe(train_loss=train_loss, gate_loss=found.loss, metrics=found.metrics)
        return True

    def _look_at_training_loss(self) -> bool:
        """Let the policy see the training loss where there is no measure: for advice only."""
        loss = self._run.losses.mean()
        if loss is not None:
            self._observe(train_loss=loss, gate_loss=loss, metrics={})
        return loss is not None

    def _observe(
        self, *, train_loss: float | None, gate_loss: float, metrics: dict[str, float]
    ) -> None:
        """Show the policy an evaluation, which it sees again whenever it is asked."""
        self._reading = replace(
            self._reading_now(), train_loss=train_loss, gate_loss=gate_loss, metrics=metrics
        )
        self._run.policy.observe(self._reading)

    def _reading_now(self) -> Reading:
        run = self._run
        return replace(
            self._reading,
            update=run.updates,
            rates=tuple(run.watcher.rates),
            last_change_update=run.last_change_update,
        )

    def _decide(self) -> None:
        """Ask the policy where nothing is under way, and begin to record where it says yes."""
        run = self._run
        if self._stage is not None:
            return
        decision = run.policy.decide(self._reading_now())
        if decision.grow or self._schedule.last == run.updates:
            run.journal.detected(decision)
        if not decision.grow:
            return
        run.embargoes.count_decision()
        against = obstacle(run)
        if against is not None:
            run.journal.note(against)
            return
        missing = missing_evidence(run, has_batches=bool(self._recent))
        if missing is None and run.num_affordable == 0:
            run.ledger.count_overdraft()
        if missing is None or self._advises(missing):
            self._stage = Recording(run, decision.choice, advise_only=missing is not None)

    def _advises(self, missing: str) -> bool:
        """Say once what is missing; a ranking goes to the log the first time only."""
        self._run.journal.note(
            f"{missing}: nothing is grafted; candidates are ranked, and the ranking is in the log"
        )
        advises, self._has_advised = not self._has_advised, True
        return advises
