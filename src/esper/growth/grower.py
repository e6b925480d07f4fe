"""The controller: watches a run, and decides between two updates what grows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch
from torch.utils.flop_counter import FlopCounterMode

from esper.bus.in_process import EventBus
from esper.compiler.catalog import default_catalog
from esper.continuity.optimizer import busy_layers, check_supported, sync_optimizer
from esper.continuity.warmup import UpdateCounter, UpdateFactor
from esper.contracts.errors import GrowthError
from esper.contracts.report import RunReport
from esper.fetching.enhanced_kernel_cache import EnhancedKernelCache
from esper.growth.batch import num_samples
from esper.growth.budget import (
    FORWARD_BACKWARD,
    Budget,
    Cost,
    count_parameters,
    forward_latency_s,
)
from esper.growth.evaluation import Evaluator
from esper.growth.gates import MIN_SAMPLES
from esper.growth.germination import open_sites, rank
from esper.growth.journal import Journal
from esper.growth.options import GrowerOptions, check_options, show_options
from esper.growth.policies import DiminishingReturns, choices_of
from esper.growth.probation import Probation
from esper.growth.ranking import FirstOrderGain
from esper.growth.reading import Reading
from esper.growth.recording import Recorder, record_beside
from esper.growth.run import GrowthRun
from esper.growth.stages import Recording, num_affordable
from esper.growth.twins import lockstep_update, owner_update
from esper.observability.event_log import EventLog
from esper.registry.open import open as open_registry
from esper.resilience.clock import MonotonicClock
from esper.seeds.maintenance import maintain_layers
from esper.seeds.shadow import shadow_pass
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from esper.contracts.ports import Clock
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.growth.policies import Policy
    from esper.growth.ranking import RankedCandidate
    from esper.growth.recording import SiteObservation
    from esper.growth.stages import Stage

EVALUATE_EVERY = 50
"""Updates between two evaluations where the owner says nothing and calls no ``end_epoch``."""
KEPT_BATCHES = 8
"""Recent batches that :meth:`Grower.suggest` may rank on."""


class Grower:
    """Grows a wrapped model while its owner trains it.

    Call :meth:`step` after every optimizer update (or micro-batch), :meth:`end_epoch` after an
    epoch if there are epochs, and :meth:`close` at the end, or use it as a context manager. Until
    a kernel is admitted, the run is bit-identical to one without a Grower.

    Every option is a keyword. The numbers, in italics below, are told one by one in
    :class:`GrowthSettings`.

    What is trained, and what it is judged by:
        ``compute_loss``: ``(model, batch)`` to the scalar training loss. Without it the Grower
        ranks and advises, and grafts nothing.
        ``evaluate``: ``evaluate(model)`` on held-out data (the *gate* split): per-sample losses,
        shape (samples,), at least 200 of them; or a dict whose first entry decides; or
        ``(losses, metrics)``. A scalar is accepted, but then no gate passes.
        ``update``: ``(model, optimizer, batch)``, one update of a twin; loss, backward and step
        with the recorded rates where None.
        Numbers: *horizon*, *goal*, *random_seed*.

    When to grow, where, and what:
        ``policy``: When; :class:`DiminishingReturns` where None.
        ``ranking``: Where and what; :class:`FirstOrderGain` where None.
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
        optimizer: Its optimizer: ``torch.optim.SGD``, ``Adam`` or ``AdamW``.
        options: As above.

    Raises:
        ValueError: A setting is out of its range, or the model has no layer with seeds.
        TypeError: An option is unknown or of the wrong type, or the optimizer is not supported.
        GrowthError: A site named by hand is none of the model's.
    """

    @show_options
    def __init__(
        self, model: nn.Module, optimizer: Optimizer, **options: Unpack[GrowerOptions]
    ) -> None:
        settings = check_options(options)
        check_supported(optimizer)
        bare = _unwrapped(model)
        found = layers(bare)
        if not found:
            msg = "the model has no layer with seeds: call esper.wrap(model) before the Grower"
            raise ValueError(msg)
        policy = options.get("policy") or DiminishingReturns()
        _check_choices(policy, found)
        sync_optimizer(bare, optimizer)
        clock = options.get("clock") or MonotonicClock()
        registry = options.get("registry")
        registry = open_registry("memory:") if registry is None else registry
        run_dir = options.get("run_dir")
        self._log = None if run_dir is None else EventLog(Path(run_dir) / "events.jsonl")
        bus = EventBus([s for s in (self._log, options.get("sink")) if s is not None])
        compute_loss, evaluate = options.get("compute_loss"), options.get("evaluate")
        update = options.get("update")
        random_seed = settings.random_seed
        self._counter = UpdateCounter(optimizer)
        self._run = GrowthRun(
            model=bare,
            layers=found,
            optimizer=optimizer,
            factor=UpdateFactor(
                optimizer, warmup_updates=settings.warmup_updates, lr_new=settings.lr_new
            ),
            settings=settings,
            budget=options.get("budget") or Budget(),
            policy=policy,
            ranking=options.get("ranking") or FirstOrderGain(random_seed=random_seed),
            catalog=options.get("catalog") or default_catalog(),
            registry=registry,
            cache=EnhancedKernelCache(source=registry),
            clock=clock,
            journal=Journal(bus, clock, lambda: self._run.updates),
            compute_loss=compute_loss,
            evaluator=None if evaluate is None else Evaluator(evaluate, goal=settings.goal),
            twin_update=owner_update(update) if update else _lockstep(compute_loss),
            host_cost=Cost(parameters=count_parameters(bare)),
        )
        self._rates_hook = optimizer.register_step_pre_hook(self._before_step)
        self._stage: Stage | None = None
        self._micro_batches: list[Any] = []
        self._recent: list[Any] = []
        self._epoch_ended = self._has_epochs = False
        self._dropped = False
        self._per_update: int | None = None
        self._evaluation_work = 0
        self._advised_at: int | None = None
        self._reading = Reading(update=0, horizon=settings.horizon)
        self._closed = False
        self._run.journal.started({**settings.as_dict(), "budget": asdict(self._run.budget)})
        self._warn(own_update=update is not None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def updates(self) -> int:
        """Optimizer updates seen so far."""
        return self._run.updates

    @property
    def stages(self) -> tuple[tuple[str, int, str], ...]:
        """Site, seed and stage of each graft that is under way."""
        return () if self._stage is None else self._stage.stages

    @property
    def host_twin(self) -> nn.Module | None:
        """The twin without a graft, while ``verify="fork"`` has one; read it, do not train it."""
        return self._stage.host_twin if isinstance(self._stage, Probation) else None

    @property
    def last_metrics(self) -> dict[str, float]:
        """What ``evaluate`` returned beside the losses at the last evaluation, by name."""
        evaluations = self._run.journal.evaluations
        return dict(evaluations[-1].metrics) if evaluations else {}

    def step(self, loss: Tensor | None = None, batch: Any = None) -> None:
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
        run = self._run
        if loss is not None:
            run.losses.append(loss.detach())
        if batch is not None:
            self._micro_batches.append(batch)
        if self._counter.count == run.updates:
            if self._dropped:  # a step whose gradients were thrown away is no update
                self._micro_batches.clear()
            self._dropped = False
            return
        run.updates = self._counter.count
        self._dropped = False
        self._after_update(self._batches_of_update())

    def end_epoch(self) -> None:
        """Say that an epoch ended: the default moment for an evaluation."""
        self._epoch_ended = self._has_epochs = True
        if not self._closed and self._run.updates:
            self._look(asked=False)

    def suggest(self) -> list[Suggestion]:
        """Rank every kernel on offer on the recent batches; changes nothing.

        Returns:
            Best first; those that the ranking cannot score come last.

        Raises:
            GrowthError: There is no ``compute_loss``, or no batch was passed to :meth:`step`.
        """
        run = self._run
        if run.compute_loss is None or not self._recent:
            msg = (
                "suggest() ranks on recent batches: give the Grower compute_loss= and call "
                "step(loss, batch=batch) in the training loop first"
            )
            raise GrowthError(msg)
        compute_loss = run.compute_loss
        recorder = Recorder(
            open_sites(run), random_seed=run.settings.random_seed, records_shadow_passes=True
        )
        with recorder:
            for batch in self._recent:
                record_beside(recorder, run.model, lambda model, b=batch: compute_loss(model, b))  # type: ignore[misc] # mypy cannot type a default of a lambda
                run.count_pass("ranking", [batch])
        ranked = rank(run, recorder.observations)
        return [
            Suggestion.of(entry, recorder.observations[entry.site], run.clock)
            for entry in ranked.order
        ]

    def report(self) -> RunReport:
        """Return what happened so far; ``print`` it, or ask for its JSON."""
        run = self._run
        return RunReport(
            settings=run.settings.as_dict(),
            updates=run.updates,
            evaluations=tuple(run.journal.evaluations),
            grafts=run.journal.grafts,
            timeline=tuple(run.journal.timeline),
            alphas=tuple(run.journal.alphas),
            work={name: float(work) for name, work in run.meter.state_dict().items()},
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
        stage, self._stage = self._stage, None
        try:
            if stage is not None:
                stage.close(f"{reason} before its verdict")
        finally:
            self._run.factor.close()
            self._counter.close()
            self._rates_hook.remove()
            self._recent.clear()
            self._run.journal.ended(reason)
            if self._log is not None:
                self._log.close()

    def _before_step(self, *_: Any) -> None:
        self._run.note_rates()
        self._dropped = True  # until the update is counted

    def _batches_of_update(self) -> list[Any]:
        """Return the batches of the update that was just counted.

        A step that GradScaler skipped calls no hook; its batches are left out by their number.
        """
        batches, self._micro_batches = self._micro_batches, []
        usual = len(batches) if self._per_update is None else self._per_update
        self._per_update = min(usual, len(batches)) or None
        return batches[-usual:] if usual else batches

    def _after_update(self, batches: list[Any]) -> None:
        run = self._run
        run.samples_per_update = sum(num_samples(b) for b in batches) or run.samples_per_update
        run.count_pass("training", batches)
        self._recent = [*self._recent, *batches][-KEPT_BATCHES:]
        self._count_flops(batches)
        self._maintain()
        if self._stage is not None:
            if not batches and self._stage.needs_batches:
                msg = (
                    f"grower.step was called without batch= at update {run.updates}, while a "
                    "graft is under way; pass the batch of every step"
                )
                raise GrowthError(msg)
            self._stage = self._stage.advance(batches)
        self._look(asked=True)

    def _look(self, *, asked: bool) -> None:
        """Evaluate where that is due, and ask the policy where it has something to say."""
        if self._evaluation_is_due():
            self._evaluate()
            asked = True
        elif self._run.evaluator is None and self._run.updates % EVALUATE_EVERY == 0:
            asked = self._look_at_training_loss() or asked
        if asked and self._stage is None:
            self._decide()

    def _look_at_training_loss(self) -> bool:
        """Let the policy see the training loss where there is no measure: for advice only."""
        loss = self._run.train_loss()
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
            rates=tuple(run.rates),
            last_change_update=run.last_change,
        )

    def _evaluation_is_due(self) -> bool:
        run = self._run
        if run.evaluator is None or run.evaluated_at == run.updates:
            return False
        if run.evaluated_at < 0:
            return True
        since = run.updates - run.evaluated_at
        if run.settings.evaluate_every is not None:
            return since >= run.settings.evaluate_every
        due = self._epoch_ended or (not self._has_epochs and since >= EVALUATE_EVERY)
        return due and since >= self._least_gap()

    def _least_gap(self) -> int:
        """Updates between evaluations that keep them within half of the overhead."""
        run = self._run
        share = run.settings.overhead / 2
        per_update = FORWARD_BACKWARD * max(run.samples_per_update, 1) * share / (1 - share)
        return math.ceil(self._evaluation_work / per_update) if per_update else EVALUATE_EVERY

    def _evaluate(self) -> None:
        run = self._run
        self._epoch_ended = False
        before = run.meter.work("evaluation")
        evaluation = run.measure()
        first = run.evaluated_at < 0
        self._evaluation_work = (run.meter.work("evaluation") - before) // (3 if first else 1)
        run.evaluated_at, run.last_gate = run.updates, evaluation
        train_loss = run.train_loss()
        run.journal.evaluated(evaluation, train_loss)
        self._observe(train_loss=train_loss, gate_loss=evaluation.loss, metrics=evaluation.metrics)

    def _decide(self) -> None:
        run = self._run
        decision = run.policy.decide(self._reading_now())
        if decision.grow or run.evaluated_at == run.updates:
            run.journal.detected(decision)
        if not decision.grow:
            return
        run.turns += 1
        obstacle = self._obstacle()
        if obstacle is not None:
            run.journal.note(obstacle)
            return
        missing = self._missing()
        if missing is not None:
            run.journal.note(
                f"{missing}: nothing is grafted; candidates are ranked, and the ranking is in "
                "the log"
            )
            if self._advised_at is not None:
                return
            self._advised_at = run.updates
        elif num_affordable(run) == 0:
            run.num_over += 1
        self._stage = Recording(run, decision.choice, advise_only=missing is not None)

    def _missing(self) -> str | None:
        """Say what is missing for a graft ever to be admitted, or None."""
        run = self._run
        if run.compute_loss is None or run.evaluator is None or not self._recent:
            return "without compute_loss, evaluate and batch= there is no evidence"
        if run.last_gate is None or run.last_gate.per_sample is None:
            return "evaluate gives no per-sample losses, so luck cannot be told from gain"
        if len(run.last_gate.per_sample) < MIN_SAMPLES:
            found = len(run.last_gate.per_sample)
            return f"too little power: {found} samples, at least {MIN_SAMPLES} needed"
        return None

    def _obstacle(self) -> str | None:
        """Say why nothing can germinate now although the policy would, or None."""
        run = self._run
        horizon, needed = run.settings.horizon, run.settings.graft_updates
        if horizon is not None and run.updates + needed > horizon:
            return f"a graft takes {needed} updates; too few are left of {horizon}"
        if run.budget.grafts is not None and len(run.admitted) >= run.budget.grafts:
            return f"the budget's {run.budget.grafts} grafts were admitted"
        if num_affordable(run) == 0 and run.num_over >= (run.budget.grafts or 1):
            share = run.settings.overhead
            return f"the overhead of {share:.0%} is spent, one audition per graft included"
        if not open_sites(run):
            return "no site has a seed that is dormant and under no embargo"
        return None

    def _maintain(self) -> None:
        """Read the seeds' counters and put faults into the log."""
        for fault in maintain_layers(busy_layers(self._run.optimizer)).faults:
            self._run.journal.faulted(
                fault.layer, fault.seed_idx, fault.faults, fault.state.name.lower(), fault.reason
            )

    def _count_flops(self, batches: list[Any]) -> None:
        """Count the host's FLOPs once, where the budget compares with them."""
        run = self._run
        relative = run.budget.flops is not None
        small = run.host_cost.parameters < run.budget.small_host
        if run.host_cost.flops is not None or run.compute_loss is None or not batches:
            return
        if relative and not small:
            with shadow_pass(run.model), torch.no_grad(), FlopCounterMode(display=False) as flops:
                run.compute_loss(run.model, batches[0])
            per_sample = flops.get_total_flops() / num_samples(batches[0])
            run.host_cost = replace(run.host_cost, flops=per_sample)

    def _warn(self, *, own_update: bool) -> None:
        run = self._run
        if run.settings.verify == "fork" and not own_update:
            run.journal.note(
                "twins are updated by loss, backward and step with the recorded rates; give "
                "update= if your own update does more"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """One row of what :meth:`Grower.suggest` returns.

    Attributes:
        site: Name of the layer.
        blueprint: Name of the kernel.
        gain: Predicted first-order gain, in units of the training loss; None without a score.
        stderr: Its standard error; None where it has none.
        parameters: Parameters that the kernel adds.
        flops: FLOPs that it adds to a forward of one sample.
        latency_us: Microseconds of a forward of the kernel on a recorded batch.
        reason: Why there is no score; empty where there is one.
    """

    site: str
    blueprint: str
    gain: float | None
    stderr: float | None
    parameters: int
    flops: float | None
    latency_us: float
    reason: str

    @classmethod
    def of(cls, entry: RankedCandidate, seen: SiteObservation, clock: Clock) -> Suggestion:
        """Time the candidate's kernel and put the row together."""
        parallel = entry.candidate.position == "parallel"
        example = seen.inputs[0] if parallel else seen.outputs[0]
        latency_s = forward_latency_s(entry.candidate.kernel, example, clock=clock)
        return cls(
            site=entry.site,
            blueprint=entry.blueprint,
            gain=entry.gain,
            stderr=entry.stderr,
            parameters=entry.parameters,
            flops=entry.flops,
            latency_us=latency_s * 1e6,
            reason=entry.reason,
        )


def _check_choices(policy: Policy, found: dict[str, KasminaLayer]) -> None:
    """Refuse a site named by hand that there is not, before anything is trained."""
    for choice in choices_of(policy):
        if choice.site not in found:
            msg = f"{choice.site!r} is no site of this model; its sites: {', '.join(found)}"
            raise GrowthError(msg)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DDP and ``torch.compile``."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, torch.nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _lockstep(
    compute_loss: Callable[[nn.Module, Any], Tensor] | None,
) -> Callable[[nn.Module, Optimizer, list[Any]], None]:
    if compute_loss is None:
        return lambda *_: None  # nothing is ever admitted, so there is never a twin
    return lockstep_update(compute_loss)
