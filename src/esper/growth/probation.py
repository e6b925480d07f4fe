"""From an admission after an audition to the verdict: blending, holding, and removal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.continuity.ensemble import members_of
from esper.continuity.optimizer import remove_parameters, sync_optimizer
from esper.continuity.snapshot import RunSnapshot
from esper.contracts.errors import GrowthError
from esper.contracts.lifecycle import GraftStage, SeedLifecycleState
from esper.growth.evaluation import averaged
from esper.growth.gates import judge_not_worse, level_of
from esper.growth.live_kernel import place_kernel, remove_kernel
from esper.growth.losses import LOSS_CHECK_EVERY, SpikeLimit
from esper.growth.tries import spend_try

if TYPE_CHECKING:
    from esper.contracts.progress import GraftStatus
    from esper.growth.audition import Audition
    from esper.growth.batch import Batch
    from esper.growth.germination import Contender
    from esper.growth.measurement import Measurement
    from esper.growth.run import GrowthRun
    from esper.growth.stage import StageState


LOOKS: Final = 5
"""Readings of the gate split whose mean stands for a model: one wobbles from update to update."""


class Probation:
    """An admitted graft: alpha ramps up, is held, and the graft is judged.

    Args:
        run: The run.
        contender: What was admitted.
        audition: Its audition.
        before: The watch's part of the gate split before the admission, seed off; a mean of looks.
        reason: Why it was admitted.
    """

    def __init__(
        self,
        run: GrowthRun,
        contender: Contender,
        audition: Audition,
        before: Measurement,
        reason: str,
    ) -> None:
        self._run = run
        self._contender = contender
        self._before = before
        self._snapshot = RunSnapshot(run.model, run.optimizer, update=run.updates)
        self._host = list(run.model.parameters())
        self._factors = run.factor.state_dict(self._host)
        optimizer = audition.optimizer
        self._kernel = place_kernel(
            contender.layer,
            contender.seed_idx,
            contender.kernel,
            example=contender.example,
            alpha=0.0,
            placement=run.placement(),
            factor=run.factor,
            peaks=run.watcher.peaks,
            state=None if optimizer is None else optimizer.state,
        )
        self._usual = SpikeLimit.after(run.losses)
        self._looks: list[Measurement] = []
        hold, num_looks = run.settings.hold_updates, LOOKS
        moments = {self._ramp + hold * (i + 1) // num_looks for i in range(num_looks)}
        self._look_at = sorted(moments)
        self._graft = contender.graft
        self._graft.admit(reason, update=run.updates)
        self._level = level_of(run.settings.tries)
        run.journal.alpha(self._graft, 0.0)

    @property
    def needs_batches(self) -> bool:
        """The live run alone trains."""
        return False

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

    def advance(self, batches: list[Batch]) -> Probation | None:  # noqa: ARG002 - the protocol's signature
        """Follow one update of the run; None once the verdict is spoken."""
        trouble = self._trouble()
        if trouble is not None:
            self._remove(trouble)
            return None
        alpha = self._kernel.set_alpha(self._num_updates, self._ramp)
        if self._num_updates == 1:  # before that alpha was 0, and the kernel was not run
            self._run.ledger.structure_changed()
        if self._graft.stage is GraftStage.BLENDING and self._num_updates >= self._ramp:
            self._run.journal.alpha(self._graft, alpha)
            self._graft.hold(f"alpha reached 1 after {self._ramp} updates")
        if self._look_at and self._num_updates >= self._look_at[0]:
            self._look_at = [u for u in self._look_at if u > self._num_updates]
            self._looks.append(self._run.measure().watchs_part)
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

    def state_dict(self) -> StageState:
        """Refuse: a kernel that blends in is not saved.

        Raises:
            GrowthError: Always; it says when the run can be saved.
        """
        left = self._ramp + self._run.settings.hold_updates - self._num_updates
        msg = (
            f"the kernel at {self._graft.site!r} was admitted and has no verdict yet, and such a "
            f"run cannot be saved: save it after {left} more updates, or call grower.close() "
            "before, which judges the kernel now"
        )
        raise GrowthError(msg)

    def _trouble(self) -> str | None:
        state = self._state()
        if state is not SeedLifecycleState.ACTIVE:
            return f"its seed is in {state.name}"
        if self._num_updates % LOSS_CHECK_EVERY:
            return None
        return self._usual.trouble(self._run.losses)

    def _state(self) -> SeedLifecycleState:
        return self._kernel.layer.state_layout.state(self._kernel.seed_idx)

    def _judge(self) -> None:
        """Read the fossilization gate, once, on the mean of the looks."""
        without = self._measure_without()
        with_seed = averaged(self._looks)
        verdict = judge_not_worse(self._before, with_seed, level=self._level)
        self._run.journal.gate(self._graft, "fossilization", verdict)
        self._graft.record_dependence(without.loss - self._looks[-1].loss)
        if verdict.passed:
            self._fossilize(verdict.reason)
        else:
            self._remove(verdict.reason, without)

    def _measure_without(self) -> Measurement:
        """Read the gate split with the seed off; an isolated seed is off already."""
        seed_idx = self._kernel.seed_idx
        if self._state() is not SeedLifecycleState.ACTIVE:
            return self._run.measure().watchs_part
        alpha = self._kernel.layer.alpha(seed_idx)
        self._kernel.layer.set_alpha(seed_idx, 0.0)
        try:
            return self._run.measure().watchs_part
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
        if certificate.folded:
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
        updates_lost = 0
        if not keeps_host:
            updates_lost = self._num_updates
            self._snapshot.restore(run.optimizer)
            run.factor.load_state_dict(self._factors, self._host)
            run.losses.clear()
        run.last_change_update = run.updates
        spend_try(run.model)
        run.ledger.structure_changed()
        host = "the snapshot was restored" if updates_lost else "the trained host was kept"
        run.journal.rolled_back(self._graft, updates_lost, f"{host}: {why}")
        self._graft.cull(
            reason,
            update=run.updates,
            verdict="culled after admission",
            updates_lost=updates_lost,
        )
