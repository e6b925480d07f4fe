"""The audition: where no copy of the run fits, one kernel learns in passes beside it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from esper.compiler.linear_form import linear_form
from esper.continuity.warmup import rate_for_new
from esper.growth.audition import Audition
from esper.growth.evaluation import averaged
from esper.growth.gates import Spread, judge, level_of
from esper.growth.probation import LOOKS, Probation
from esper.growth.tries import no_tries_left, spend_try
from esper.state.kernel import prepare_kernel
from esper.state.ranges import named_ranges
from esper.state.shortage import is_shortage

if TYPE_CHECKING:
    from esper.contracts.progress import GraftStatus
    from esper.growth.batch import Batch
    from esper.growth.gates import GateVerdict
    from esper.growth.germination import Contender
    from esper.growth.measurement import Measurement
    from esper.growth.run import GrowthRun
    from esper.growth.stage import Stage, StageState
    from esper.state.kernel import PreparedKernel


class Auditioning:
    """Trains a kernel by shadow passes and reads its gate, once, against its own linear form.

    Both learn side by side, at a rate that decays to zero, so that what the gate reads has
    settled. "Off" is no reference: any trained parameters beat it.

    Args:
        run: The run.
        contender: What is auditioned.
    """

    def __init__(self, run: GrowthRun, contender: Contender) -> None:
        self._run = run
        self._contender = contender
        run.num_packages += 1
        null = prepare_kernel(contender.layer, linear_form(contender.blueprint))
        self._audition = _audition(run, contender, contender.kernel)
        self._null = _audition(run, contender, null)
        trained = any(a.optimizer is not None for a in (self._audition, self._null))
        self._num_passes = run.settings.audition_updates if trained else 0
        self._num_done = 0
        self._rates = [a.rates for a in (self._audition, self._null)]
        self._looks: list[Measurement] = []
        first = self._num_passes // 2
        self._look_at = {
            first + (self._num_passes - first) * (i + 1) // LOOKS for i in range(LOOKS)
        }
        self._meters = [run.ledger.meter("shadow") for _ in range(2)]
        contender.graft.begin_audition(contender.made_by)

    @property
    def needs_batches(self) -> bool:
        """Shadow passes are on the run's batches."""
        return True

    @property
    def statuses(self) -> tuple[GraftStatus, ...]:
        """The kernel is in its audition."""
        return (self._contender.graft.status,)

    def advance(self, batches: list[Batch]) -> Stage | None:
        """Do one shadow pass of each; after the last, read the admission gate."""
        seeds = [(self._contender.layer, self._contender.seed_idx)]
        if self._num_done < self._num_passes:
            try:
                with named_ranges(seeds, "trial"):
                    self._pass(batches)
            except (RuntimeError, MemoryError) as error:
                if not is_shortage(error):
                    raise
                self._give_up(f"there is too little memory to audition it: {error}")
                return None
            self._num_done += 1
            if self._num_done in self._look_at:
                self._looks.append(self._run.measure().watchs_part)
        if self._num_done < self._num_passes:
            return self
        with named_ranges(seeds, "verdict"):
            return self._judge()

    def _give_up(self, reason: str) -> None:
        """Cull a kernel that no verdict can be read on; no try is spent."""
        self.close(reason)
        self._run.last_change_update = self._run.updates
        self._run.journal.warn(f"an audition was given up, and the run goes on: {reason}")

    def close(self, reason: str) -> None:
        """Cull the kernel; the run is as if it had never grafted."""
        update = self._run.updates
        self._contender.withdraw(reason, update=update, verdict="culled in audition")

    def state_dict(self) -> StageState:
        """Return which kernel is auditioned: what it has learned is not saved."""
        return {"kind": "audition", "package": None, "grafts": [self._contender.graft.number]}

    def _pass(self, batches: list[Batch]) -> None:
        run = self._run
        assert run.compute_loss is not None, "nothing germinates without compute_loss"
        left = 1.0 - self._num_done / self._num_passes
        for number, audition in enumerate((self._audition, self._null)):
            if audition.optimizer is None:
                continue
            audition.set_rates([rate * left for rate in self._rates[number]])
            changes = run.fits.num_changes
            with self._meters[number].counted(batches[-1:]), run.fits.in_use():
                audition.shadow_update(run.model, batches[-1], run.compute_loss)
            if run.fits.num_changes != changes:
                self._meters[number].forget()  # what did not fit was counted with it

    def _judge(self) -> Stage | None:
        """Read the admission gate; what passes goes on to blend in."""
        run, graft = self._run, self._contender.graft
        verdict = self._admission()
        run.journal.gate(graft, "admission", verdict)
        if verdict.passed:
            before = averaged(self._looks or [run.measure().watchs_part])
            return Probation.admit(run, self._contender, self._audition, before, verdict.reason)
        update = run.updates
        self._contender.withdraw(verdict.reason, update=update, verdict="culled at admission")
        run.last_change_update = update
        if spend_try(run.model) >= run.settings.tries:
            run.journal.note(no_tries_left(run.model, run.settings.tries))
        return None

    def _admission(self) -> GateVerdict:
        """Compare the kernel with its linear form, both in the host as it is; one look."""
        run = self._run
        null, found = (
            run.measured(lambda e, a=a: a.evaluate(run.model, e)).verdicts_part  # type: ignore[misc] # mypy infers no default of a lambda
            for a in (self._null, self._audition)
        )
        known = math.isfinite(null.loss)  # where it is not, the gate refuses the samples
        return judge(
            null,
            found,
            level=level_of(run.settings.tries),
            spread=Spread(factor=run.settings.spread),
            min_effect=run.settings.min_effect * abs(null.loss) if known else 0.0,
        )


def _audition(run: GrowthRun, contender: Contender, kernel: PreparedKernel) -> Audition:
    rates = [
        rate_for_new(group, lr_new=run.settings.lr_new, peak=peak)
        for group, peak in zip(run.optimizer.param_groups, run.watcher.peaks, strict=True)
    ]
    return Audition.begin(
        contender.layer,
        contender.seed_idx,
        kernel,
        placement=run.placement(),
        rates=rates,
        random_seed=run.settings.generator_seed * 1_000_003 + run.updates,
        example=contender.example,
    )
