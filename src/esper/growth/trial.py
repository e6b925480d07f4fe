"""The trial of a package: a copy of the run trains with it, and one verdict is read at the end."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from esper.compiler.linear_form import linear_form
from esper.continuity.placement import Placement
from esper.continuity.replicas import all_agree, in_step, over_ranks
from esper.contracts.choices import TAKEN
from esper.contracts.errors import BlueprintError, GrowthError
from esper.contracts.report import TrialRecord
from esper.growth.arm import Arm
from esper.growth.averaging import STATISTICS_BATCHES, WeightAverage, read_average
from esper.growth.gates import level_of
from esper.growth.holding import Holding
from esper.growth.live_kernel import place_kernel
from esper.growth.null_beside import NullBeside
from esper.growth.takeover import take_over
from esper.growth.tries import no_tries_left, spend_try
from esper.growth.twins import Twin, copied_model
from esper.growth.verdict import TrialReadings, last_is_worse, read_trial
from esper.resilience.attempt import Failed, attempt
from esper.seeds.linear_null import why_null_adds
from esper.state.kernel import prepare_kernel
from esper.state.ranges import named_ranges
from esper.state.shortage import is_shortage
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from esper.contracts.blueprint import BlueprintIR
    from esper.contracts.choices import Taken
    from esper.contracts.progress import GraftStatus
    from esper.growth.batch import Batch
    from esper.growth.extrapolation import GoingOn
    from esper.growth.germination import Contender
    from esper.growth.measurement import Measurement
    from esper.growth.run import GrowthRun
    from esper.growth.stage import Stage, StageState
    from esper.growth.verdict import TrialVerdict


class Trial:
    """A package in its trial; the live run goes on, and does not notice.

    Args:
        run: The run.
        package: What is tried, from distinct sites; at least one kernel.
        num_updates: Updates of the trial.
    """

    def __init__(self, run: GrowthRun, package: Sequence[Contender], num_updates: int) -> None:
        self._run = run
        self._package = tuple(package)
        self._num_updates = num_updates
        self._start = run.updates
        self._began = self._work()
        run.num_packages += 1
        run.watcher.reads_scale = True  # for as long as twins train
        for contender in self._package:
            contender.graft.begin_trial(contender.made_by)
        self._nulls = self._linear_forms()
        with run.fits.in_use():
            self._arms = self._made_arms()
        self._live = WeightAverage()
        self._shape = [p.shape for p in run.model.parameters()]
        self._batches: deque[Batch] = deque(maxlen=STATISTICS_BATCHES)
        self.record = self._begun()
        run.journal.trial_started(self.record, arms=[arm.name for arm in self._arms])

    @property
    def needs_batches(self) -> bool:
        """Twins train on the run's batches."""
        return True

    @property
    def statuses(self) -> tuple[GraftStatus, ...]:
        """Every kernel of the package is in its trial."""
        return tuple(contender.graft.status for contender in self._package)

    def advance(self, batches: list[Batch]) -> Stage | None:
        """Let every twin do the update; after the last, read the verdict."""
        if [p.shape for p in self._run.model.parameters()] != self._shape:
            self.close("the model was changed from outside during its trial")
            return None
        with named_ranges(self._seeds, "trial"):
            outcome = attempt(lambda: in_step(self._run.given, lambda: self._train(batches)))
        if isinstance(outcome, Failed):
            if isinstance(outcome.error, GrowthError):
                raise outcome.error
            self.close(f"its twin could not be trained: {outcome}")
            self._run.journal.warn(
                f"the trial of package {self.record.package} was given up at update "
                f"{self._run.updates:,}, since its twin could not be trained: {outcome}; the run "
                "itself was not touched"
            )
            return None
        self._run.settle_sizes()
        if self._done < self._num_updates:
            return self
        with named_ranges(self._seeds, "verdict"):
            return self._judge_in_memory()

    def _judge_in_memory(self) -> Stage | None:
        """Read the verdict; where there is no memory to read it, the trial is given up."""
        try:
            return self._judge()
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error) or self.record.verdict != "in trial":
                raise
            self.close(f"there is too little memory to read its verdict: {error}")
            return None

    def close(self, reason: str) -> None:
        """Drop the twins and free the seeds; the run is as if it had never tried. No try is spent.

        Args:
            reason: Why there is no verdict.
        """
        self._drop(reason)
        self.record = replace(self.record, verdict="refused", reason=reason)
        self._run.journal.trial_changed(self.record)

    def state_dict(self) -> StageState:
        """Return which package is tried: its twins are not saved, and are made anew."""
        return {
            "kind": "trial",
            "package": self.record.package,
            "grafts": [contender.graft.number for contender in self._package],
        }

    @property
    def _done(self) -> int:
        return self._run.updates - self._start

    @property
    def _seeds(self) -> list[tuple[nn.Module, int]]:
        return [(contender.layer, contender.seed_idx) for contender in self._package]

    @property
    def _ramp(self) -> int:
        return min(self._run.settings.ramp_updates, self._num_updates // 2)

    def _linear_forms(self) -> dict[str, BlueprintIR]:
        """Return the package made linear, by site; empty without attribution."""
        run = self._run
        if run.settings.attribution == "none":
            return {}
        try:
            return {c.graft.site: linear_form(c.blueprint) for c in self._package}
        except BlueprintError as error:
            run.journal.note(f"what is capacity and what treatment cannot be told apart: {error}")
            return {}

    def _made_arms(self) -> list[Arm]:
        run = self._run
        arms = [self._arm("candidate")]
        if self._nulls:
            arms.append(self._arm("null"))
        for i in range(run.settings.nulls):
            equal = Arm(name=f"equal {i + 1}", twin=Twin(run), meter=run.ledger.meter("trial"))
            equal.twin.perturb(run.settings.generator_seed * 1_000_003 + run.updates + i)
            arms.append(equal)
        return arms

    def _arm(self, name: str) -> Arm:
        """Make a twin with the package in it: as it is, or made linear."""
        run, twin = self._run, Twin(self._run)
        found = layers(twin.model)
        placement = Placement(twin.model, twin.optimizer, run.group_for)
        kernels = []
        for contender in self._package:
            site = found[contender.graft.site]
            kernel = contender.kernel
            if name == "null":
                kernel = prepare_kernel(site, self._nulls[contender.graft.site])
            kernels.append(
                place_kernel(
                    site,
                    contender.seed_idx,
                    kernel,
                    example=contender.example,
                    alpha=contender.alpha,
                    placement=placement,
                    factor=twin.factor,
                    peaks=run.watcher.peaks,
                )
            )
        meter = run.ledger.meter("trial")
        return Arm(name=name, twin=twin, meter=meter, kernels=tuple(kernels))

    def _train(self, batches: list[Batch]) -> None:
        run = self._run
        self._batches.extend(batches)
        averaging = self._done > self._num_updates // 2
        for arm in self._arms:
            arm.update(run, batches)
            arm.set_alphas(self._done, self._ramp)
            if averaging:
                arm.average.add(arm.twin.model)
        if averaging:
            self._live.add(run.model)

    def _judge(self) -> Stage | None:
        """Read the verdict, once, and do what it says."""
        run = self._run
        readings = self._readings()
        by_rank = over_ranks(run.given, run.going_on(self._work()[0] - self._began[0]))
        going_on = by_rank[0]  # what an update takes differs between ranks whose batches do
        verdict = read_trial(
            readings,
            level=level_of(run.settings.tries),
            settings=run.settings,
            going_on=going_on,
        )
        if not all_agree(run.given, TAKEN.index(verdict.taken)):
            verdict = verdict.refused("the ranks read different verdicts")
        arm = self._arm_named(verdict.taken) if verdict.taken else None
        live_now = taken_now = None
        if arm is not None:
            live_now = run.measure()
            taken_now = run.measure_copy(arm.twin.model)
            worse = last_is_worse(live_now.verdicts_part, taken_now.verdicts_part)
            if worse is not None:
                verdict, arm = verdict.refused(worse), None
        self.record = self._read(verdict, going_on)
        if arm is None or live_now is None or taken_now is None:
            self._refuse(verdict.reason)
            return None
        return self._take_over(arm, verdict, live_now, taken_now)

    def _refuse(self, reason: str) -> None:
        run = self._run
        spent = spend_try(run.model)
        run.last_change_update = run.updates
        self.record = replace(self.record, verdict="refused")
        run.journal.trial_read(self.record)
        self._drop(reason)
        if spent >= run.settings.tries:
            run.journal.note(no_tries_left(run.model, run.settings.tries))

    def _take_over(
        self, arm: Arm, verdict: TrialVerdict, live_now: Measurement, taken_now: Measurement
    ) -> Stage | None:
        run = self._run
        kernels = dict(zip(self.record.sites, arm.kernels, strict=True))
        outcome = attempt(lambda: take_over(run, arm.twin, kernels))
        if isinstance(outcome, Failed):
            self._keep_out(f"it could not be taken over, and the run is as it was: {outcome}")
            return None
        taken = outcome.value
        self.record = replace(
            self.record,
            verdict="taken over",
            gate_loss_before=_finite(live_now.watchs_part.loss),
            gate_loss_after=_finite(taken_now.watchs_part.loss),
        )
        run.journal.trial_read(self.record)
        run.last_change_update = run.updates
        run.ledger.structure_changed()
        for contender, kernel in zip(self._package, taken.kernels, strict=True):
            kept = kernel.seed.kernel.kernel_id if verdict.taken == "null" else None
            blueprint = kernel.seed.kernel.blueprint
            name = contender.blueprint.id if kept is None or blueprint is None else blueprint.id
            contender.graft.take_over(verdict.reason, update=run.updates, blueprint=name)
        run.journal.taken_over(self.record, folded=False)
        self._leave(arm, verdict)
        return Holding(
            run,
            grafts=[contender.graft for contender in self._package],
            taken=taken,
            record=self.record,
            before=live_now.watchs_part,
            effect=verdict.effect,
        )

    def _keep_out(self, trouble: str) -> None:
        """Say that a package passed, and that its taking over failed; no try is spent."""
        passed = f"it passed ({self.record.reason}), but {trouble}"
        self.record = replace(self.record, verdict="refused", taken="", reason=passed)
        self._run.journal.trial_read(self.record)
        self._drop(passed)

    def _leave(self, taken: Arm, verdict: TrialVerdict) -> None:
        """Let go of the twins; the null trains on where the owner wants it to the end."""
        run = self._run
        run.end_null_beside(f"package {self.record.package} was taken over")
        for arm in self._arms:
            goes_on = arm.name == "null" and run.settings.attribution == "run"
            if goes_on and taken.name == "candidate" and verdict.capacity is not None:
                window = max(1, self._num_updates // 2)
                run.null_beside = NullBeside(run, arm, window, package=self.record.package)
            else:
                arm.twin.close()
        self._arms = []
        run.watcher.reads_scale = run.null_beside is not None

    def _arm_named(self, name: Taken) -> Arm:
        return next(arm for arm in self._arms if arm.name == name)

    def _readings(self) -> TrialReadings:
        """Read the gate split for every arm and for the live run, on averaged weights."""
        run = self._run
        levels = {
            arm.name: self._level(copied_model(run, of=arm.twin.model), arm.average)
            for arm in self._arms
        }
        return TrialReadings(
            live=self._level(copied_model(run), self._live),
            candidate=levels["candidate"],
            null=levels.get("null"),
            equals=[found for name, found in levels.items() if name.startswith("equal")],
        )

    def _level(self, model: nn.Module, average: WeightAverage) -> Measurement:
        """Measure a copy of an arm at its averaged weights."""
        return read_average(self._run, average, model, list(self._batches))

    def _drop(self, reason: str) -> None:
        for arm in self._arms:
            arm.twin.close()
        self._arms = []
        self._run.watcher.reads_scale = self._run.null_beside is not None
        for contender in self._package:
            contender.withdraw(reason, update=self._run.updates, verdict="refused in trial")

    def _begun(self) -> TrialRecord:
        run, settings = self._run, self._run.settings
        with run.ledger.timed("trial"):
            adds = self._null_adds()
        parameters = sum(c.graft.cost.parameters for c in self._package)
        return TrialRecord(
            package=run.num_packages,
            grafts=tuple(c.graft.number for c in self._package),
            sites=tuple(c.graft.site for c in self._package),
            blueprints=tuple(c.blueprint.id for c in self._package),
            parameters=parameters,
            started_at=run.updates,
            trial_updates=self._num_updates,
            level=level_of(settings.tries),
            spread=settings.spread,
            attribution=settings.attribution if self._nulls else "none",
            num_nulls=settings.nulls,
            capacity_is_lower_bound=bool(adds),
            null_adds=adds,
            memory_bytes=run.trial_memory(parameters).total,
        )

    def _null_adds(self) -> tuple[str, ...]:
        """Say where the package made linear adds capacity of its own, and why."""
        found = []
        for contender in self._package if self._nulls else ():
            layer, site = contender.layer, contender.graft.site
            reason = why_null_adds(layer, prepare_kernel(layer, self._nulls[site]))
            if reason is not None:
                found.append(f"{site}: {reason}")
        return tuple(found)

    def _read(self, verdict: TrialVerdict, going_on: GoingOn | None) -> TrialRecord:
        run, live = self._run, verdict.live
        flops, seconds = self._work()
        null, capacity = verdict.null, verdict.capacity
        return replace(
            self.record,
            decided_at=run.updates,
            taken=verdict.taken,
            reason=verdict.reason,
            spread=verdict.spread.factor if math.isfinite(verdict.spread.factor) else 0.0,
            samples=live.samples,
            effect=live.effect,
            stderr=live.stderr,
            z=live.z,
            threshold=live.threshold,
            null_effect=None if null is None else null.effect,
            null_stderr=None if null is None else null.stderr,
            capacity=None if capacity is None else capacity.effect,
            capacity_stderr=None if capacity is None else capacity.stderr,
            capacity_shown=None if capacity is None else capacity.passed,
            going_on=None if going_on is None else going_on.gain,
            going_on_stderr=None if going_on is None else going_on.stderr,
            flops=flops - self._began[0],
            seconds=seconds - self._began[1],
        )

    def _work(self) -> tuple[float, float]:
        """FLOPs and seconds that all trials of the run have taken."""
        ledger = self._run.ledger
        return ledger.work("trial"), ledger.seconds_by_category()["trial"]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
