"""From an admission after an audition to the verdict: blending, holding, and removal."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from esper.continuity.ensemble import members_of
from esper.continuity.optimizer import sync_optimizer
from esper.contracts.lifecycle import GraftStage, SeedLifecycleState
from esper.growth.evaluation import averaged
from esper.growth.gates import judge_not_worse, level_of
from esper.growth.live_kernel import make_permanent, place_kernel, remove_kernel
from esper.growth.losses import LOSS_CHECK_EVERY, SpikeLimit
from esper.growth.measurement import Measurement
from esper.growth.takeover import Taken
from esper.growth.tries import spend_try

if TYPE_CHECKING:
    from esper.contracts.progress import GraftStatus
    from esper.growth.audition import Audition
    from esper.growth.batch import Batch
    from esper.growth.germination import Contender
    from esper.growth.graft import Graft
    from esper.growth.run import GrowthRun
    from esper.growth.stage import StageState


LOOKS: Final = 5
"""Readings of the gate split whose mean stands for a model: one wobbles from update to update."""


class Probation:
    """An admitted graft: alpha ramps up, is held, and the graft is judged.

    Args:
        run: The run.
        graft: What was admitted.
        taken: Its kernel in the live model, and the way back.
        before: The watch's part of the gate split before the admission, seed off; a mean of looks.
    """

    def __init__(self, run: GrowthRun, *, graft: Graft, taken: Taken, before: Measurement) -> None:
        self._run = run
        self._graft = graft
        self._taken = taken
        (self._kernel,) = taken.kernels
        self._before = before
        self._usual = SpikeLimit.after(run.losses)
        self._looks: list[Measurement] = []
        hold, num_looks = run.settings.hold_updates, LOOKS
        moments = {self._ramp + hold * (i + 1) // num_looks for i in range(num_looks)}
        self._look_at = sorted(moments)
        self._level = level_of(run.settings.tries)

    @classmethod
    def admit(
        cls,
        run: GrowthRun,
        contender: Contender,
        audition: Audition,
        before: Measurement,
        reason: str,
    ) -> Probation:
        """Put a kernel into the live model, at alpha 0 and with its moments.

        Args:
            run: The run.
            contender: What is admitted.
            audition: Its audition.
            before: The watch's part of the gate split, seed off; a mean of looks.
            reason: Why it is admitted.
        """
        taken, optimizer = Taken.before(run), audition.optimizer
        kernel = place_kernel(
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
        taken = replace(taken, kernels=(kernel,))
        made = cls(run, graft=contender.graft, taken=taken, before=before)
        contender.graft.admit(reason, update=run.updates)
        run.journal.alpha(contender.graft, 0.0)
        return made

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
        return self._run.updates - self._taken.snapshot.update

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
        """Return the ramp, the looks so far, and the way back: it goes on from there."""
        return {
            "kind": "probation",
            "before": self._before.state_dict(),
            "usual": self._usual.limit,
            "looks": [look.state_dict() for look in self._looks],
            "look_at": list(self._look_at),
            **self._taken.state_dict(self._run, [self._graft]),
        }

    @classmethod
    def from_state_dict(cls, state: StageState, run: GrowthRun) -> Probation:
        """Go on with the probation that :meth:`state_dict` was taken of.

        Args:
            state: What it returned.
            run: A run whose model, optimizer and grafts are those of then.

        Raises:
            KeyError: The state names what the run does not have.
        """
        (graft,), taken = Taken.from_state_dict(state, run)
        before = Measurement.from_state_dict(state["before"])
        made = cls(run, graft=graft, taken=taken, before=before)
        made._usual, made._look_at = SpikeLimit(limit=state["usual"]), list(state["look_at"])
        made._looks = [Measurement.from_state_dict(look) for look in state["looks"]]
        return made

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
        certificate = make_permanent(self._kernel, run.optimizer, run.factor)
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
        updates_lost = 0 if keeps_host else self._num_updates
        if keeps_host:
            remove_kernel(self._kernel, run.optimizer, run.factor)
        else:
            self._taken.undo(run)
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
