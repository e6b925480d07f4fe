"""From admission to verdict: blending, holding, the fossilization gate, and removal."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.continuity.ensemble import members_of
from esper.continuity.optimizer import remove_parameters, sync_optimizer
from esper.continuity.placement import Placement
from esper.continuity.snapshot import RunSnapshot
from esper.contracts.lifecycle import GraftStage, SeedLifecycleState
from esper.growth.evaluation import averaged
from esper.growth.gates import judge, judge_not_worse, test_level
from esper.growth.live_kernel import LiveKernel, graft_kernel, remove_kernel
from esper.growth.losses import LOSS_CHECK_EVERY, SpikeLimit
from esper.growth.twins import Twin, tau_of
from esper.wrapping.wrap import layers

if TYPE_CHECKING:
    from torch import nn

    from esper.contracts.progress import GraftStatus
    from esper.growth.batch import Batch
    from esper.growth.evaluation import Evaluator
    from esper.growth.gates import GateVerdict
    from esper.growth.germination import Contender
    from esper.growth.measurement import Measurement
    from esper.growth.run import GrowthRun


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fork:
    """The twins of an admission.

    Attributes:
        null: Carries the same-treatment null.
        null_kernel: The null in it.
        host: Carries nothing.
        perturbed: The host twin's copy whose weights were perturbed at the start.
    """

    null: Twin
    null_kernel: LiveKernel
    host: Twin
    perturbed: Twin

    def named(self) -> tuple[tuple[str, Twin], ...]:
        """Return all three with their names."""
        return ("null", self.null), ("host", self.host), ("perturbed", self.perturbed)


class Probation:
    """An admitted graft: alpha ramps up, is held, and the graft is judged.

    Args:
        run: The run.
        contender: What was admitted.
        before: The gate split at the admission, seed off.
        reason: Why it was admitted.
    """

    def __init__(
        self, run: GrowthRun, contender: Contender, before: Measurement, reason: str
    ) -> None:
        self._run = run
        self._contender = contender
        self._before = before
        self._snapshot = RunSnapshot(run.model, run.optimizer, update=run.updates)
        self._host = list(run.model.parameters())
        self._factors = run.factor.state_dict(self._host)
        self._fork = _make_fork(run, contender) if contender.null is not None else None
        self._kernel = graft_kernel(
            contender.audition,
            contender.audition.layer,
            run.factor,
            placement=run.placement(),
            peaks=run.watcher.peaks,
        )
        self._usual = SpikeLimit.after(run.losses)
        self._looks: dict[str, list[Measurement]] = defaultdict(list)
        hold, num_looks = run.settings.hold_updates, run.settings.looks
        moments = {self._ramp + hold * (i + 1) // num_looks for i in range(num_looks)}
        self._look_at = sorted(moments)
        self._meters = {name: run.ledger.meter("trial") for name, _ in self._twins()}
        run.ledger.structure_changed()
        self._graft = contender.graft
        self._graft.admit(reason, update=run.updates)
        self._level = test_level(run.grafts.num_admitted)
        run.journal.alpha(self._graft, 0.0)

    @property
    def host_twin(self) -> nn.Module | None:
        """The twin that carries nothing, while there is a fork."""
        return None if self._fork is None else self._fork.host.model

    @property
    def needs_batches(self) -> bool:
        """Twins train on the run's batches."""
        return self._fork is not None

    @property
    def statuses(self) -> tuple[GraftStatus, ...]:
        """Where the graft is."""
        return (self._graft.status,)

    @property
    def _ramp(self) -> int:
        return self._run.settings.ramp_updates

    @property
    def _num_updates(self) -> int:
        return self._run.updates - self._snapshot.update

    def advance(self, batches: list[Batch]) -> Probation | None:
        """Follow one update of the run; None once the verdict is spoken."""
        trouble = self._trouble()
        if trouble is not None:
            self._remove(trouble)
            return None
        self._advance_twins(batches)
        alpha = self._kernel.set_alpha(self._num_updates, self._ramp)
        if self._num_updates == 1:
            self._starts_to_contribute()
        if self._graft.stage is GraftStage.BLENDING and self._num_updates >= self._ramp:
            self._run.journal.alpha(self._graft, alpha)
            self._graft.hold(f"alpha reached 1 after {self._ramp} updates")
        if self._look_at and self._num_updates >= self._look_at[0]:
            self._look_at = [u for u in self._look_at if u > self._num_updates]
            self._look()
        if self._num_updates < self._ramp + self._run.settings.hold_updates:
            return self
        self._judge()
        return None

    def close(self, reason: str) -> None:
        """Remove the graft: what was not judged does not stay, though the gate cannot be read."""
        without = None
        try:
            without = self._measure_without()
        finally:
            if without is None:
                self._take_away(reason, keeps_host=False, why="the gate split could not be read")
        self._remove(reason, without)

    def _trouble(self) -> str | None:
        state = self._state()
        if state is not SeedLifecycleState.ACTIVE:
            return f"its seed is in {state.name}"
        if self._num_updates % LOSS_CHECK_EVERY:
            return None
        return self._usual.trouble(self._run.losses)

    def _state(self) -> SeedLifecycleState:
        return self._kernel.layer.state_layout.state(self._kernel.seed_idx)

    def _advance_twins(self, batches: list[Batch]) -> None:
        if self._fork is None:
            return
        for name, twin in self._fork.named():
            with self._meters[name].counted(batches):
                twin.update(batches, self._run.watcher.rates)
        self._fork.null_kernel.set_alpha(self._num_updates, self._ramp)

    def _twins(self) -> tuple[tuple[str, Twin], ...]:
        return () if self._fork is None else self._fork.named()

    def _starts_to_contribute(self) -> None:
        """Let what an update takes be measured again: at alpha 0 a kernel takes nothing."""
        self._run.ledger.structure_changed()
        for meter in self._meters.values():
            meter.forget()

    def _look(self) -> None:
        """Read the gate split for the live model and for every twin."""
        run = self._run
        self._looks["live"].append(run.measure())
        for name, twin in self._twins():
            read = run.measured(functools.partial(_measure_twin, twin), "trial")
            self._looks[name].append(read)

    def _judge(self) -> None:
        """Read the fossilization gate, once, on the mean of the looks."""
        without = self._measure_without()
        with_seed = averaged(self._looks["live"])
        verdict = self._verdict(with_seed)
        self._run.journal.gate(self._graft, "fossilization", verdict)
        self._graft.record_dependence(without.loss - self._looks["live"][-1].loss)
        if verdict.passed:
            self._fossilize(verdict.reason)
        else:
            self._remove(verdict.reason, without)

    def _verdict(self, with_seed: Measurement) -> GateVerdict:
        if self._fork is None:
            return judge_not_worse(self._before, with_seed, level=self._level)
        null, host, perturbed = (
            averaged(self._looks[name]) for name in ("null", "host", "perturbed")
        )
        tau = tau_of(host.loss, perturbed.loss)
        verdict = judge(null, with_seed, level=self._level, tau=tau)
        self._graft.record_contribution(
            verdict.effect, stderr=verdict.stderr, host_only=host.loss - with_seed.loss
        )
        return verdict

    def _measure_without(self) -> Measurement:
        """Read the gate split with the seed off; an isolated seed is off already."""
        seed_idx = self._kernel.seed_idx
        if self._state() is not SeedLifecycleState.ACTIVE:
            return self._run.measure()
        alpha = self._kernel.layer.alpha(seed_idx)
        self._kernel.layer.set_alpha(seed_idx, 0.0)
        try:
            return self._run.measure()
        finally:
            self._kernel.layer.set_alpha(seed_idx, alpha)

    def _fossilize(self, reason: str) -> None:
        run = self._run
        certificate = self._kernel.layer.fossilize(self._kernel.seed_idx)
        if certificate.folded:
            run.factor.remove(self._kernel.parameters)
            remove_parameters(run.optimizer, self._kernel.parameters)
        else:
            self._kernel.layer.set_guard(self._kernel.seed_idx, "step")
            sync_optimizer(run.given, members_of(run.optimizer), group_for=run.group_for)
        run.journal.fossilized(
            self._graft,
            folded=certificate.folded,
            rel_diff=certificate.rel_diff,
            why=certificate.reason,
        )
        run.last_change_update = run.updates
        run.ledger.structure_changed()
        self._graft.fossilize(reason, update=run.updates, folded=certificate.folded)

    def _remove(self, reason: str, without: Measurement | None = None) -> None:
        """Cull by the better of two: keep the trained host, or go back to the admission."""
        if without is None:
            without = self._measure_without()
        kept = judge_not_worse(self._before, without, level=self._level)
        self._take_away(reason, keeps_host=kept.passed, why=kept.reason)

    def _take_away(self, reason: str, *, keeps_host: bool, why: str) -> None:
        """Remove the kernel, and go back to the admission unless the trained host is kept."""
        run = self._run
        remove_kernel(self._kernel, run.optimizer, run.factor)
        run.ledger.structure_changed()
        updates_lost = 0
        if not keeps_host:
            updates_lost = self._num_updates
            self._snapshot.restore(run.optimizer)
            run.factor.load_state_dict(self._factors, self._host)
            run.losses.clear()
        run.last_change_update = run.updates
        run.embargoes.lay(self._graft.site, self._graft.seed_idx, self._contender.blueprint.id)
        host = "the snapshot was restored" if updates_lost else "the trained host was kept"
        run.journal.rolled_back(self._graft, updates_lost, f"{host}: {why}")
        self._graft.cull(
            reason,
            update=run.updates,
            verdict="culled after admission",
            updates_lost=updates_lost,
        )


def _measure_twin(twin: Twin, evaluator: Evaluator) -> Measurement:
    return evaluator(twin.model)


def _make_fork(run: GrowthRun, contender: Contender) -> Fork:
    assert contender.null is not None
    null, host, perturbed = (
        Twin(run.model, run.optimizer, run.factor, run.twin_update) for _ in range(3)
    )
    perturbed.perturb(run.settings.generator_seed + run.updates)
    site = layers(null.model)[contender.graft.site]
    kernel = graft_kernel(
        contender.null,
        site,
        null.factor,
        placement=Placement(null.model, null.optimizer, run.group_for),
        peaks=run.watcher.peaks,
    )
    return Fork(null=null, null_kernel=kernel, host=host, perturbed=perturbed)
