"""The controller: watches a run, and decides between two updates what grows."""

from __future__ import annotations

import functools
import logging
import math
from collections import deque
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

from esper.continuity.ensemble import members_of
from esper.continuity.optimizer import busy_layers
from esper.continuity.replicas import all_agree, any_rank, each_rank, in_step, over_ranks, ranks_of
from esper.contracts.errors import GrowthError
from esper.contracts.progress import ProgressRow
from esper.contracts.report import RunReport
from esper.fetching.outbox import ReportParcel
from esper.growth.assembly import begin_run
from esper.growth.batch import KEPT_BATCHES
from esper.growth.budget import count_parameters
from esper.growth.callbacks import asked, measure_update, try_compute_loss
from esper.growth.claims import claim, release
from esper.growth.obstacles import (
    NEVER_STEPPED,
    grows_apart,
    is_too_dear,
    missing_evidence,
    missing_part,
    never_grows,
    obstacle,
)
from esper.growth.options import GrowerOptions, show_options
from esper.growth.outline import outline
from esper.growth.policies import outlook_of, waits_until
from esper.growth.reading import Decision, Reading
from esper.growth.rehearsal import rehearse
from esper.growth.saving import (
    check_loadable,
    checked_plain,
    damage_told,
    load_run,
    loaded_reading,
    resumed_stage,
    saved_reading,
    saved_run,
)
from esper.growth.schedule import EVALUATE_EVERY, EvaluationSchedule
from esper.growth.sizing import is_earned
from esper.growth.staged import PlannedDepth, grafts_nothing
from esper.growth.stages import Recording
from esper.growth.suggestion import suggestions
from esper.observability.run_folder import OUTBOX_FOLDER
from esper.resilience.attempt import Done, Failed, attempt
from esper.seeds.layer_health import illness_of
from esper.seeds.maintenance import MEASURED_EVERY, maintain_layers
from esper.state.layer_record import record_of
from esper.state.roster import Changes
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.progress import GraftStatus
    from esper.growth.batch import Batch
    from esper.growth.measurement import Measurement
    from esper.growth.stage import Stage
    from esper.growth.suggestion import Suggestions
    from esper.state.layer_call import LayerCall

_LOG = logging.getLogger(__name__)

_REMEMBERED: Final = ("num_steps", "num_told", "has_advised", "tried_loss", "tried_twin")
"""What the Grower itself remembers of a run, and saves."""

CLOSING_S: Final = 4.0
"""Seconds that a registry has at the end to take what is left."""

STEPS_WITHOUT_UPDATE: Final = 100
"""Calls of ``step`` without one update of the optimizer, after which something must be wrong."""

_LOST: Final = "look for NaN or infinity in the training data, or lower the learning rate"
"""What to do where the training loss is not finite."""


class Grower:
    """Grows a wrapped model while its owner trains it.

    Call :meth:`step` after every optimizer update (or micro-batch), :meth:`end_epoch` after an
    epoch if there are epochs, and :meth:`close` at the end, or use it as a context manager. Until
    a package is taken over, the run is bit-identical to one without a Grower.

    Every option is a keyword. The numbers, in italics below, are told one by one in
    :class:`~esper.growth.settings.GrowthSettings`.

    What is trained, and what it is judged by:
        ``compute_loss``: ``(model, batch)`` to the scalar training loss. Without it the Grower
        ranks and advises, and grafts nothing. Esper calls it beside the training as well: what it
        and the model keep (counters, generators, metrics, the batch) is put back after each such
        pass, and what cannot be is named by a warning.
        ``evaluate``: ``evaluate(model)`` on held-out data (the *gate* split): per-sample losses,
        shape (samples,), at least 300 of them, two thirds of which verdicts are read on; or a
        dict whose first entry decides; or ``(losses, metrics)``. A scalar is accepted, but then no
        gate passes and nothing is ranked. What it keeps is its owner's, but for random generators,
        which are put back.
        ``update``: ``(model, optimizer, batch)``, one update of a twin; where None loss, backward
        and step, with the rates, the clipping and the loss scale that the run was seen to have.
        ``group_for``: ``(name, parameter)`` to the param group that a kernel's parameter joins, or
        its number over all groups; where None, the one that trains the host layer's parameters of
        its kind.
        Numbers: *horizon*, *goal*, *random_seed*.

    When to grow, where, and what:
        ``policy``: When; ``DiminishingReturns`` where None.
        ``ranking``: Where and what; ``FirstOrderGain`` where None.
        ``catalog``: The kernels on offer; the default catalog where None.
        ``registry``: A registry, or the address of one that asks for no token: a directory or a
        server. Kernels that are compiled here are published there, and what each graft brought is
        reported, beside the run and without waiting. Kernels that fit a site are offered from
        there, those that have worked first, beside the catalog's, and those come from there that
        a policy names by their digest. None where None.
        ``preload_bytes``: Bytes of a registry's kernels that may be fetched before a ranking asks
        for them, at least 0; 32 MiB where None. At 0 none is offered.

    What it may cost:
        ``budget``: Limits on parameters, FLOPs, latency and the number of packages.
        ``fit_like``: The folder of a run, or its ``events.jsonl``: where a clock, or a lack of
        memory, chose there how many samples a pass is made of, this run makes its passes of as
        many. Nothing is chosen before where None.
        Numbers: *overhead*, *evaluate_every*, *pass_s*.

    How a package of kernels is tried, and what becomes of it:
        ``twin``: Builds a module like the model, for models that cannot be copied.
        Numbers: *trial*, *record_updates*, *trial_updates*, *tries*, *spread*, *nulls*,
        *attribution*, *pays*, *min_effect*, *warmup_updates*, *lr_new*, *hold_updates*; of
        ``trial="shadow"`` alone *audition_updates*, *ramp_updates*.

    What is written down:
        ``run_dir``: Where ``events.jsonl`` is written; None writes no files. A folder that holds
        a run already is left alone, and one beside it is numbered: see :attr:`run_dir`.
        ``sink``: Takes every event as well.
        ``clock``: Dates the events.
        ``on_progress``: Called with an :class:`~esper.ProgressRow` behind each update in which the
        gate split was read or something came to another stage; ``on_progress=print`` is a line
        for each, in a terminal and a notebook. One that raises is not called again, and noted.

    Args:
        model: A model after :func:`esper.wrap`; it may be inside DDP or ``torch.compile``. One
            that is only to wake blocks (``policy=esper.Staged(...)``) needs no ``wrap``.
        optimizer: What trains it: any of ``torch.optim`` but LBFGS, what keeps to its interface or
            wraps one, or a sequence of several that train it together. A layer
            that none of them trains, though it is trainable, does not grow.
        options: As above.

    Raises:
        ValueError: A setting is out of its range, the model has no layer with seeds or none that
            the optimizer trains, or the optimizer is another model's.
        TypeError: An option is unknown or of the wrong type, or the optimizer is not supported.
        GrowthError: A site named by hand is none of the model's or cannot grow, or another Grower
            that was not closed has the model or an optimizer.
        OSError: The log cannot be written in ``run_dir``.
    """

    @show_options
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        **options: Unpack[GrowerOptions],
    ) -> None:
        self._run = begin_run(model, optimizer, options)
        self._num_told = len(self._run.journal.notes)
        claim(self, [*layers(self._run.model).values(), *members_of(self._run.optimizer)])
        settings = self._run.settings
        self._schedule = EvaluationSchedule(self._run.ledger, every=settings.evaluate_every)
        self._stage: Stage | None = None
        self._told_yes: Decision | None = None
        self._depth = PlannedDepth(self._run)
        self._recent: deque[Batch] = deque(maxlen=KEPT_BATCHES)
        self._reading = Reading(update=0, horizon=settings.horizon)
        self._has_advised = self._closed = self._tried_loss = self._tried_twin = False
        self._had_batches = False  # of the run that was loaded
        self._at_the_end: dict[str, Any] = {}
        self._num_steps = 0
        self._quiet_until: float = 0
        self._changes_seen = 0
        self._on_progress, self._changes_told = options.get("on_progress"), 0
        self._run.journal.started(
            self._effective_settings(), outline(self._run.layers), self._run.host_cost.parameters
        )
        try:
            self._depth.warn_if_idle()
            self._warn(never_grows(self._run) or missing_part(self._run))
            self._warn(grows_apart(self._run))
        except UserWarning:  # the owner wants warnings to be errors: nothing is left behind
            self.close("it was refused")
            raise
        if self.run_dir is not None and self.run_dir != Path(options.get("run_dir") or ""):
            self._run.journal.note(
                f"{options.get('run_dir')} holds a run already; this one is in {self.run_dir}"
            )
        has_own_update = options.get("update") is not None
        if settings.trial == "twin" and not has_own_update and not grafts_nothing(self._run.policy):
            self._run.journal.note(
                "twins are updated by loss, backward and step with the rates, the clipping and the "
                "loss scale that the run is seen to have; give update= if your own update does more"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close; on a rank that an error ends, without asking the others, which may be anywhere."""
        self.close(by_error=kind is not None)

    @property
    def updates(self) -> int:
        """Optimizer updates seen so far."""
        return self._run.updates

    @property
    def run_dir(self) -> Path | None:
        """The folder of this run, where ``events.jsonl`` is written; None without one."""
        return None if self._run.log is None else self._run.log.path.parent

    @property
    def stages(self) -> tuple[GraftStatus, ...]:
        """Where each graft is that is under way: its site, its seed and its stage."""
        return () if self._stage is None else self._stage.statuses

    @property
    def example(self) -> LayerCall | None:
        """What ``evaluate`` first gave the model, on the device ``meta``; for ``esper.export``."""
        return None if self._run.evaluator is None else self._run.evaluator.example

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
        found, evaluations = self._run.last_measurement, self._run.journal.evaluations
        return ProgressRow(
            name=name,
            update=self.updates,
            gate_loss=None if found is None else found.told,
            train_loss=evaluations[-1].train_loss if evaluations else None,
            metrics=self.last_metrics,
            parameters=count_parameters(self._run.model),
            grafts=self.stages,
        )

    def step(self, loss: Tensor | float | None = None, batch: Batch = None) -> None:
        """Count one training step; call it after the optimizer's.

        At the first step with a batch ``compute_loss`` is tried on it, forward and backward, and
        after the first update ``evaluate`` is; both leave no trace in the run. What they take is
        counted; so is one more pass of ``compute_loss`` after each change of the model.

        Args:
            loss: The training loss: a scalar tensor, which stays on its device, or a number.
            batch: What ``compute_loss`` takes: the batch that the loss was computed on.

        Raises:
            GrowthError: A graft is under way and ``batch`` is missing, or the Grower is closed.
            KernelExecutionError: A fossil's kernel keeps failing.
            TypeError: ``loss`` is neither a tensor nor a number, or what ``compute_loss``,
                ``evaluate`` or the policy returned is none of what each may return.
            ValueError: The loss, given or computed, is not a scalar.
        """
        if self._closed:
            msg = "this Grower is closed; make another one to go on growing"
            raise GrowthError(msg)
        self._num_steps += 1
        run = self._run
        if loss is not None:
            read = run.losses.add(loss)
            if read is not None:
                run.journal.read("training loss", read, _LOST)
        if batch is not None and not self._tried_loss:
            self._tried_loss = True
            in_step(run.given, lambda: try_compute_loss(run, batch))
        batches = run.watcher.step(batch)
        if batches is None:
            if self._num_steps == STEPS_WITHOUT_UPDATE:
                self._say_what_is_never_called()
            return
        is_quiet = run.watcher.updates < self._quiet_until and self._changes_seen == Changes.count
        if not (batches and is_quiet) or run.incidents.kept:
            self._after_update(batches)
            return
        run.ledger.count_update(batches)
        self._recent.extend(batches)

    def end_epoch(self) -> None:
        """Say that an epoch ended: the default moment for an evaluation."""
        self._say_what_is_never_called()
        self._schedule.end_epoch(self._run.updates)
        self._quiet_until = 0
        if not self._closed and self._run.updates and self._look():
            self._look_at_offers()
            self._decide()
            self._tell()

    def suggest(self) -> Suggestions:
        """Rank every kernel on offer on the recent batches; changes nothing.

        After :meth:`close` too, for which the Grower keeps those batches.

        Returns:
            A list of :class:`~esper.Suggestion` that prints as a table. Best first; those that the
            ranking cannot score come last.

        Raises:
            GrowthError: There is no ``compute_loss``, no batch was passed to :meth:`step`, or the
                model's seeds were taken out, as by :func:`esper.unwrap`.
        """
        return suggestions(self._run, self._recent)

    def report(self) -> RunReport:
        """Return what happened so far; ``print`` it, or ask for its JSON."""
        run = self._run
        return RunReport(
            settings=self._effective_settings(),
            run_id=run.journal.run_id,
            updates=run.updates,
            evaluations=tuple(run.journal.evaluations),
            grafts=run.grafts.records,
            trials=tuple(run.journal.trials),
            timeline=tuple(run.journal.timeline),
            alphas=tuple(run.journal.alphas),
            stages=self._depth.records,
            work=run.ledger.by_category(),
            seconds=run.ledger.seconds_by_category(),
            overhead_limit=run.ledger.limit(run.updates),
            **self._at_the_end,
            parameters_before=run.host_cost.parameters,
            parameters_after=count_parameters(run.model),
            notes=tuple(run.journal.notes),
            not_finite=tuple(run.journal.not_finite),
            incidents=run.journal.incidents.records,
            sites=run.journal.sites,
            seeds=run.journal.seeds,
        )

    def _effective_settings(self) -> JsonObject:
        run = self._run
        return {**asdict(run.settings), "budget": asdict(run.budget)}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides in this run, for another process to go on with.

        To be saved between any two updates, together with the states of the model, the optimizer,
        the scheduler and the random generators. The values are plain: dicts, lists, tuples,
        numbers, text and tensors on the CPU, as ``torch.load(..., weights_only=True)`` takes them.

        A recording, a trial or an audition that is under way is not saved; where the state is
        loaded it begins again, and the cut one counts as a try.

        The null that ``attribution="run"`` trains to the end is saved with its moments and with two
        means of weights, four from the second window on: under AdamW five to seven times the
        weights of the model, copied to the CPU. Only its number is saved where it cannot be: of a
        model in shards, and where the last batches of a model with running statistics, the state of
        the optimizer, or what your functions keep of it, are not numbers, text, tensors, arrays,
        and dicts, lists and tuples of them.

        Raises:
            GrowthError: The way back of a watch has tensors that are sharded: the message says when
                the run can be saved.
            TypeError: What the policy or the ranking returns as its state is not plain.
        """
        own = {name: getattr(self, f"_{name}") for name in _REMEMBERED}
        own |= {"has_batches": self._has_batches, "reading": saved_reading(self._reading)}
        state = saved_run(self._run, self._stage, self.report())
        state["offers"] = self._run.offers.state_dict()
        state |= {"schedule": self._schedule.state_dict(), "depth": self._depth.state_dict()}
        return checked_plain({**state, "grower": own})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another Grower was saved; all of it, or nothing.

        To be called on a Grower that has made no step, after the states of the model and of its
        optimizer were loaded, and before the random state is. From there on the run is the one
        that was saved, bit for bit, its report included. In its own ``events.jsonl`` a note names
        the run that it continues.

        A trial or a recording that was under way begins again. The null of ``attribution="run"``
        trains on as well; where it could not be saved it is gone, and a note says so.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            GrowthError: This Grower has stepped, or was closed.
            ValueError: The state is damaged, of a newer Esper, of another model, or of a run with
                other settings; the message names what differs and what to do.
        """
        if self._num_steps or self._run.watcher.num_steps_of_optimizer or self._closed:
            msg = (
                "this Grower has stepped, or was closed, and a state is loaded into a fresh one: "
                "make a Grower, load the state into it, and train then"
            )
            raise GrowthError(msg)
        check_loadable(self._run, state)
        before = self.state_dict()
        try:
            with damage_told():
                self._take(state)
        except BaseException:
            self._take(before)
            raise
        self._run.journal.continues(state["run_id"])

    def _take(self, state: Mapping[str, Any]) -> None:
        """Let every part have its state; a stage last, which may begin again from there."""
        report, own = load_run(self._run, state), state["grower"]
        self._depth.load_state_dict(state["depth"], report.stages)
        self._schedule.load_state_dict(state["schedule"])
        self._reading = loaded_reading(own["reading"], self._run.settings.horizon)
        for name in _REMEMBERED:
            setattr(self, f"_{name}", own[name])
        self._had_batches = bool(own["has_batches"])
        self._have_offers(state.get("offers"))
        self._stage = resumed_stage(self._run, state)

    def _have_offers(self, state: Mapping[str, Any] | None) -> None:
        """Have at hand what a run had of its registry; what is gone is named."""
        missing = [] if state is None else self._run.offers.load_state_dict(state)
        if missing:
            self._run.journal.note(
                f"the run that goes on had {len(missing)} kernels of a registry at hand that are "
                f"not to be had now: {', '.join(digest[:12] for digest in missing)}; it goes on "
                "without them"
            )

    @property
    def _has_batches(self) -> bool:
        return self._had_batches or bool(self._recent)

    def close(self, reason: str = "the run ended", *, by_error: bool = False) -> None:
        """Decide nothing more: remove what has no verdict, every hook, and close the log.

        A trial that has no verdict is dropped, and no try is spent. A package under watch is
        looked at once more, and goes where the gate loss has risen: unmeasured means no. Closing
        twice does nothing. Closing never raises: what could not be taken away is a note of the
        report, and everything else is taken away all the same.

        Args:
            reason: Why it ends, for the report.
            by_error: Whether an error ends it on this rank, perhaps alone: the others, which may be
                anywhere, are asked nothing then.
        """
        if self._closed:
            return
        self._closed = True
        release(self)
        stage, self._stage = self._stage, None
        run = self._run
        run.has_left = by_error and ranks_of(run.given) is not None
        with ExitStack() as steps:  # each is done, though a second Ctrl-C should end one of them
            steps.callback(self._close_log)
            steps.callback(self._finish, self._flush)
            steps.callback(self._finish, lambda: self._say_ended(reason))
            steps.callback(self._finish, self._close_registry)
            steps.callback(self._finish, run.watcher.close)
            steps.callback(self._finish, run.factor.close)
            steps.callback(self._finish, lambda: self._depth.close(reason))
            if stage is not None:
                self._finish(lambda: stage.close(f"{reason} before its verdict"))
            self._finish(self._tell)
            self._finish(self._read_null_beside)
            self._finish(self._look_once_more)
            if run.watcher.num_steps_of_optimizer:
                self._finish(self._say_what_is_never_called)
            if not run.grafts.records and len(run.journal.notes) == self._num_told:
                self._finish(run.journal.why_nothing)

    def _read_null_beside(self) -> None:
        """Hold the run against the null that has trained beside it to the end."""
        beside, self._run.null_beside = self._run.null_beside, None
        if beside is None:
            return
        try:
            found = beside.read()
        finally:
            beside.close()
            self._run.ledger.promised = 0.0
        if found is not None and found.effect is not None:
            self._at_the_end = {
                "end_capacity": found.effect,
                "end_capacity_stderr": found.stderr,
                "end_capacity_shown": found.passed,
            }

    def _close_log(self) -> None:
        log = self._run.log
        if log is not None:
            log.close()
            if log.error is not None:
                self._run.journal.note(f"the log is incomplete, {log.error}")

    def _flush(self) -> None:
        """Let a sink that is behind catch up; one that cannot in time, or has failed, is named."""
        bus, journal = self._run.bus, self._run.journal
        if not bus.flush():
            journal.note("the sink given as sink= has not taken every event of the run")
        if bus.num_failures:
            journal.note(
                f"the sink given as sink= raised at {bus.num_failures} of {bus.num_published} "
                "events; the first time is in the log"
            )

    def _look_at_offers(self) -> None:
        """Let what a registry has be asked for, in time."""
        run = self._run
        run.offers.look(
            run.layers,
            outlook=outlook_of(run.policy, self._reading_now()),
            num_decisions=run.num_decisions,
            max_parameters=run.parameter_room,
        )

    def _report_grafts(self) -> None:
        """Put a report of every graft that was decided into the outbox; never waits.

        A registry that keeps none, which nobody can change from here, is sent none.
        """
        run = self._run
        reports = run.field_reports.decided(run.grafts, run.journal, run.origin_id)
        if run.outbox is not None and run.outbox.takes_reports:
            for report in reports:
                run.outbox.send(ReportParcel(report=report))

    def _tell_of_hitches(self) -> None:
        """Report what was decided, and say of what a registry did not take or give."""
        run = self._run
        self._report_grafts()
        for hitch in run.outbox.hitches() if run.outbox is not None else ():
            run.journal.hitched(hitch)
        for hitch in run.offers.hitches():
            run.journal.hitched(hitch)
        for event in run.incidents.take():
            run.journal.happened(event)

    def _close_registry(self) -> None:
        """Give the registry a few seconds more; what it has not taken is named."""
        run, outbox = self._run, self._run.outbox
        run.offers.close()
        if outbox is None:
            return
        self._report_grafts()
        left = outbox.close(CLOSING_S)
        self._tell_of_hitches()
        if run.owned_registry is not None:
            run.owned_registry.close()
        kernels = [parcel.digest[:12] for parcel in left if parcel.operation == "put"]
        num_reports = len(left) - len(kernels)
        where = "nowhere else" if self.run_dir is None else f"in {self.run_dir / OUTBOX_FOLDER}"
        if kernels:
            run.journal.note(
                f"the registry has not taken {len(kernels)} of the kernels that were compiled, "
                f"which are {where}: {', '.join(kernels)}"
            )
        if num_reports:
            run.journal.note(
                f"the registry has not taken {num_reports} of the field reports, which are {where}"
            )

    def _say_ended(self, reason: str) -> None:
        run = self._run
        work, parameters = run.ledger.by_category(), count_parameters(run.model)
        run.journal.ended(reason, run.grafts.records, work, parameters)

    def _finish(self, step: Callable[[], None]) -> None:
        """Do one step of closing; one that fails is said and leaves the others."""
        outcome = attempt(step)
        if isinstance(outcome, Failed):
            self._run.journal.note(f"closing was not complete: {outcome}")
            _LOG.error("closing was not complete; the run is kept", exc_info=outcome.error)

    def _after_update(self, batches: list[Batch]) -> None:
        """Do what an update asks for, in this order: maintain, go on with a graft, look, decide."""
        run = self._run
        if batches and not run.ledger.update.is_known:
            in_step(run.given, functools.partial(measure_update, run, batches[-1]))
        run.ledger.count_update(batches)
        self._recent.extend(batches)
        self._changes_seen = Changes.count
        run.follow_exchanges()
        measures = run.updates % MEASURED_EVERY == 0
        maintain_layers(busy_layers(run.optimizer), measures=measures, tell=run.journal.happened)
        self._tell_of_hitches()
        if run.null_beside is not None and batches:
            over = run.null_beside.advance(batches)
            if over is not None:
                run.end_null_beside(over)
        if batches and not self._tried_twin:
            self._tried_twin = True
            self._rehearse(batches)
        if self._stage is not None:
            if not batches and self._stage.needs_batches:
                msg = (
                    f"grower.step was called without batch= at update {run.updates}, while a "
                    "graft is under way; pass the batch of every step"
                )
                raise GrowthError(msg)
            self._stage = in_step(run.given, functools.partial(self._stage.advance, batches))
        self._depth.advance(batches, is_free=self._stage is None)
        if self._look() or run.updates == 1:
            self._look_at_offers()
        if run.updates == 1 and missing_part(run) is None:
            self._warn(self._missing_evidence())
        self._quiet_until = self._next_moment(self._decide())
        self._tell()

    def _next_moment(self, decision: Decision | None) -> float:
        """Return the next update at which anything may be asked for; 0 where that is not known.

        What others may do before is seen by :class:`Changes` and by the incidents of the sources.

        Args:
            decision: What the policy said; None where it was not asked.
        """
        run = self._run
        is_busy = self._depth.is_planned or run.null_beside is not None or run.offers.has_registry
        if decision is None or decision.grow or is_busy:
            return 0
        if not (self._tried_twin and run.ledger.update.is_known) or busy_layers(run.optimizer):
            return 0
        look = self._schedule.waits_until(run.updates)
        if run.evaluator is None:
            look = (run.updates // EVALUATE_EVERY + 1) * EVALUATE_EVERY
        return min(look, waits_until(run.policy, self._reading_now()))

    def _tell(self) -> None:
        """Tell the owner where the run is, where it was looked at or has changed since."""
        tell, changes = self._on_progress, self._run.journal.num_changes
        if tell is None or changes == self._changes_told:
            return
        self._changes_told = changes
        outcome = attempt(lambda: tell(self.progress_row()))
        if isinstance(outcome, Failed):
            self._on_progress = None
            self._run.journal.note(f"on_progress failed and is not called again: {outcome}")

    def _rehearse(self, batches: list[Batch]) -> None:
        """Try a twin, before anything depends on it; none where no trial can be paid."""
        run = self._run
        never = grafts_nothing(run.policy) or missing_part(run) is not None
        if run.settings.trial != "twin" or never or over_ranks(run.given, is_too_dear(run))[0]:
            return
        with run.ledger.measured("trial"):
            found = each_rank(run.given, lambda: rehearse(run, batches))
            run.no_twins = next(filter(None, found), None)
        if run.no_twins is not None:
            self._warn(f"nothing can grow: {run.no_twins}")

    def _warn(self, text: str | None) -> None:
        """Warn the owner of how it will grow, or not, unless the owner asked for no growth."""
        if text is not None and not grafts_nothing(self._run.policy):
            self._run.journal.warn(text)

    def _say_what_is_never_called(self) -> None:
        """Warn where ``step`` is never called, or the optimizer's step never seen."""
        if not self._num_steps:
            self._warn(NEVER_STEPPED)
        elif not self._run.watcher.num_steps_of_optimizer:
            self._warn(
                f"grower.step was called (so often: {self._num_steps}), and the optimizer that the "
                "Grower was given has made no update: give it the optimizer that the loop steps, "
                "and call grower.step after optimizer.step"
            )

    def _missing_evidence(self) -> str | None:
        return missing_evidence(self._run, has_batches=self._has_batches)

    def _look_once_more(self) -> None:
        """Read the gate split at the end where the run has been lost since it was last read."""
        run = self._run
        if run.evaluator is None or run.has_left or self._schedule.last == run.updates:
            return
        is_lost = any(n.what == "training loss" and n.until is None for n in run.journal.not_finite)
        if any_rank(run.given, here=is_lost):
            found = attempt(run.measure)
            if isinstance(found, Done):
                self._tell_measured(found.value, None)

    def _tell_measured(self, found: Measurement, train_loss: float | None) -> None:
        """Record a reading of the gate split, with what the run took and has until then."""
        run = self._run
        work, parameters = run.ledger.by_category(), count_parameters(run.model)
        run.journal.evaluated(found, train_loss, work, parameters)

    def _look(self) -> bool:
        """Let the policy see an evaluation where one is due; say whether it saw one."""
        run = self._run
        if run.evaluator is None:
            return run.updates % EVALUATE_EVERY == 0 and self._look_at_training_loss()
        if not self._is_due():
            return False
        before = run.ledger.work("evaluation")
        found = run.last_measurement = run.measure()
        self._schedule.evaluated(run.updates, run.ledger.work("evaluation") - before)
        stretched = over_ranks(run.given, self._schedule.stretched())[0]
        if stretched is not None:
            run.journal.note(stretched)
        train_loss = run.losses.mean()
        self._tell_measured(found, train_loss)
        self._observe(train_loss=train_loss, gate_loss=found.told, metrics=found.metrics)
        return True

    def _is_due(self) -> bool:
        """Say whether the gate split is to be read; of several ranks the first one's ledger says.

        What an update takes differs between ranks whose batches do.
        """
        run, is_due = self._run, self._schedule.is_due(self._run.updates)
        return over_ranks(run.given, is_due)[0] if self._schedule.is_wanted(run.updates) else is_due

    def _look_at_training_loss(self) -> bool:
        """Let the policy see the training loss where there is no measure: for advice only."""
        loss = self._run.losses.mean()
        if loss is not None:
            self._observe(train_loss=loss, gate_loss=loss, metrics={})
        return loss is not None

    def _observe(
        self, *, train_loss: float | None, gate_loss: float, metrics: dict[str, float]
    ) -> None:
        """Show the policy an evaluation, which it sees again whenever it is asked.

        Of several ranks it is the mean, so that each rank's policy sees the same.
        """
        told = over_ranks(self._run.given, (train_loss, gate_loss))
        known = [loss for loss, _ in told if loss is not None]
        train_loss = fmean(known) if known else None
        gate_loss = fmean(loss for _, loss in told)
        self._reading = replace(
            self._reading_now(), train_loss=train_loss, gate_loss=gate_loss, metrics=metrics
        )
        self._run.policy.observe(self._reading)

    def _reading_now(self) -> Reading:
        run = self._run
        busy = map(record_of, busy_layers(run.optimizer))
        return replace(
            self._reading,
            update=run.updates,
            rates=tuple(run.watcher.rates),
            unhealthy=tuple(record.name for record in busy if illness_of(record) is not None),
            last_change_update=run.last_change_update,
            num_packages=run.num_packages,
        )

    def _decide(self) -> Decision | None:
        """Ask the policy where nothing is under way, and begin to record where it says yes.

        Returns:
            What it said; None where it was not asked.
        """
        run = self._run
        if self._stage is not None or self._depth.is_waking:
            return None
        decision = asked(run.policy, self._reading_now())
        if self._schedule.last == run.updates and not all_agree(run.given, int(decision.grow)):
            run.journal.note("the ranks did not agree to grow, so none does: their losses differ")
            return decision
        is_told, self._told_yes = self._told_yes == decision, decision if decision.grow else None
        if self._schedule.last == run.updates or (decision.grow and not is_told):
            run.journal.detected(decision)
        if not decision.grow or self._is_hopeless():
            return decision
        run.num_decisions += 1
        run.closed = self._closed_sites()
        missing = missing_part(run)
        found = over_ranks(run.given, (obstacle(run), missing is not None or is_earned(run)))
        against, is_time = found[0]
        if against is not None:
            run.journal.note(against)
            return decision
        if not is_time:
            return decision
        if missing is None or self._advises(missing):
            if decision.choice is None:
                run.offers.take()
            self._told_yes = None
            self._stage = Recording(run, decision.choice, advise_only=missing is not None)
        return decision

    def _closed_sites(self) -> dict[str, str]:
        """Return the sites whose layers some rank finds ill, with the reasons."""
        found = {name: illness_of(record_of(layer)) for name, layer in self._run.layers.items()}
        ill = {name: why for name, why in found.items() if why is not None}
        return {name: why for own in over_ranks(self._run.given, ill) for name, why in own.items()}

    def _is_hopeless(self) -> bool:
        """Whether no gate could pass now: then nothing is recorded and nothing is ranked."""
        if missing_part(self._run) is not None:
            return False  # an owner who left a part out wants the advice, which is given once
        missing = self._missing_evidence()
        if missing is not None:
            self._run.journal.note(missing)
        found = self._run.last_measurement
        return missing is not None or (found is not None and not math.isfinite(found.loss))

    def _advises(self, missing: str) -> bool:
        """Say once what is missing; a ranking goes to the log the first time only."""
        self._run.journal.note(
            f"{missing}: nothing is grafted; candidates are ranked, and the ranking is in the log"
        )
        advises, self._has_advised = not self._has_advised, True
        return advises
