"""After a package was taken over: the watch, its passengers, and what becomes permanent."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from esper.continuity.ensemble import members_of
from esper.continuity.optimizer import sync_optimizer
from esper.continuity.replicas import over_ranks
from esper.growth.gates import is_worse, upper_rise
from esper.growth.live_kernel import make_permanent, remove_kernel
from esper.growth.losses import LOSS_CHECK_EVERY, SpikeLimit
from esper.growth.measurement import Measurement
from esper.growth.takeover import Taken
from esper.growth.tries import spend_try

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from esper.contracts.progress import GraftStatus
    from esper.contracts.report import TrialRecord
    from esper.growth.batch import Batch
    from esper.growth.graft import Graft
    from esper.growth.live_kernel import LiveKernel
    from esper.growth.run import GrowthRun
    from esper.growth.stage import StageState

PASSENGERS_SHARE = 0.5
"""Share of a package's measured effect that what leaves it may cost together."""


READINGS_OF_WHOLE = 2


class Holding:
    """A package that was taken over, under watch for ``hold_updates``.

    Args:
        run: The run.
        grafts: The grafts of the package.
        taken: Their kernels in the live model, in the same order, and the way back.
        record: What is known of the trial.
        before: The watch's part of the gate split before the switch.
        effect: Fall of the gate loss that the verdict measured.
    """

    def __init__(
        self,
        run: GrowthRun,
        *,
        grafts: Sequence[Graft],
        taken: Taken,
        record: TrialRecord,
        before: Measurement,
        effect: float,
    ) -> None:
        self._run = run
        self._members = list(zip(grafts, taken.kernels, strict=True))
        self._taken = taken
        self._record = record
        self._before = before
        self._effect = effect
        self._usual = SpikeLimit.after(run.losses)
        hold = run.settings.hold_updates
        self._look_at = sorted({hold // 2, hold} - {0})

    @property
    def needs_batches(self) -> bool:
        """The live run alone trains."""
        return False

    @property
    def statuses(self) -> tuple[GraftStatus, ...]:
        """Where each graft of the package is."""
        return tuple(graft.status for graft, _ in self._members)

    def advance(self, batches: list[Batch]) -> Holding | None:  # noqa: ARG002 - the protocol's signature
        """Follow one update of the run; None once the package is permanent, or gone."""
        is_look = bool(self._look_at) and self._num_updates >= self._look_at[0]
        trouble = self._trouble_of_ranks(is_look=is_look)
        if is_look:
            self._look_at.pop(0)
            trouble = trouble or self._watch()
        if trouble is not None:
            self._roll_back(trouble)
            return None
        if self._num_updates < self._run.settings.hold_updates:
            return self
        self._remove_passengers()
        self._fossilize("held without a rise of the gate loss")
        return None

    def close(self, reason: str) -> None:
        """End the watch early: the gate split is read once more, and decides."""
        trouble = f"{reason}, and the gate split could not be read"
        try:
            found = self._watch()
            trouble = f"{reason}; {found}" if found is not None else ""
        finally:
            if trouble:
                self._roll_back(trouble)
            else:
                self._fossilize(f"{reason}; the gate loss had not risen")

    def state_dict(self) -> StageState:
        """Return the watch and the way back: where it goes on, it decides what it would have."""
        return {
            "kind": "holding",
            "package": self._record.package,
            "before": self._before.state_dict(),
            "effect": self._effect,
            "usual": self._usual.limit,
            "look_at": list(self._look_at),
            **self._taken.state_dict(self._run, [graft for graft, _ in self._members]),
        }

    @classmethod
    def from_state_dict(cls, state: StageState, run: GrowthRun) -> Holding:
        """Go on with the watch that :meth:`state_dict` was taken of.

        Args:
            state: What it returned.
            run: A run whose model, optimizer and grafts are those of then.

        Raises:
            KeyError: The state names what the run does not have.
        """
        grafts, taken = Taken.from_state_dict(state, run)
        made = cls(
            run,
            grafts=grafts,
            taken=taken,
            record=next(t for t in run.journal.trials if t.package == state["package"]),
            before=Measurement.from_state_dict(state["before"]),
            effect=state["effect"],
        )
        made._usual, made._look_at = SpikeLimit(limit=state["usual"]), list(state["look_at"])
        return made

    @property
    def _num_updates(self) -> int:
        return self._run.updates - self._taken.snapshot.update

    def _trouble_of_ranks(self, *, is_look: bool) -> str | None:
        """Say what is wrong on any rank, where it is time to ask: no rank goes back by itself."""
        trouble = self._trouble()
        if not is_look and self._num_updates % LOSS_CHECK_EVERY:
            return trouble  # an isolated seed, which is isolated on every rank
        return next(filter(None, over_ranks(self._run.given, trouble)), None)

    def _trouble(self) -> str | None:
        isolated = [graft.site for graft, kernel in self._members if not kernel.is_active]
        if isolated:
            return f"its kernel at {isolated[0]} failed and was isolated"
        if self._num_updates % LOSS_CHECK_EVERY:
            return None
        return self._usual.trouble(self._run.losses)

    def _watch(self) -> str | None:
        return is_worse(self._before, self._run.measure().watchs_part)

    def _roll_back(self, reason: str) -> None:
        """Put the run back to the switch, exactly."""
        run, lost = self._run, self._num_updates
        self._taken.undo(run)
        for graft, _ in self._members:
            graft.cull(reason, update=run.updates, verdict="rolled back", updates_lost=lost)
        record = replace(self._record, verdict="rolled back", reason=reason, updates_lost=lost)
        run.journal.package_rolled_back(record, reason)
        run.last_change_update = run.updates
        run.end_null_beside(f"package {record.package} was rolled back")
        run.watcher.reads_scale = False
        run.ledger.structure_changed()
        spend_try(run.model)

    def _remove_passengers(self) -> None:
        """Take out the kernels that the package does without, the least needed first.

        Each is switched off with the earlier ones already off, so that two which stand in for one
        another do not leave both. Where the rest is not as good as a whole, all are put back.
        """
        run, allowed = self._run, PASSENGERS_SHARE * self._effect
        num_readings = 2 * len(self._members) + READINGS_OF_WHOLE
        is_paid = run.ledger.affordable(num_readings * run.ledger.reading_flops)
        if not over_ranks(run.given, is_paid)[0]:
            run.journal.note(
                f"the overhead does not buy the {num_readings} readings of the gate split that "
                f"would tell which kernels of package {self._record.package} are passengers"
            )
            return
        whole = run.measure().watchs_part
        rises = []
        for graft, kernel in self._members:
            with _switched_off([kernel]):
                dependence = run.measure().watchs_part.loss - whole.loss
            graft.record_dependence(dependence)
            rises.append(dependence if math.isfinite(dependence) else math.inf)
        order = sorted(zip(rises, self._members, strict=True), key=lambda entry: entry[0])
        leaving: list[tuple[Graft, LiveKernel, float, float]] = []
        for _, (graft, kernel) in order:
            off = [other for _, other, _, _ in leaving]
            with _switched_off([*off, kernel]):
                found = run.measure().watchs_part
            upper = upper_rise(whole, found)
            if upper >= allowed:
                break
            leaving.append((graft, kernel, found.loss - whole.loss, upper))
        if leaving and self._is_whole_without([kernel for _, kernel, _, _ in leaving], whole):
            self._take_out(leaving, allowed)

    def _is_whole_without(self, off: list[LiveKernel], whole: Measurement) -> bool:
        """Measure the pruned package as a whole, against the run before the switch as well."""
        with _switched_off(off):
            pruned = self._run.measure().watchs_part
        return is_worse(self._before, pruned) is None and (
            upper_rise(whole, pruned) < PASSENGERS_SHARE * self._effect
        )

    def _take_out(
        self, leaving: Sequence[tuple[Graft, LiveKernel, float, float]], allowed: float
    ) -> None:
        run = self._run
        for graft, kernel, rise, upper in leaving:
            remove_kernel(kernel, run.optimizer, run.factor)
            run.journal.passenger_removed(
                self._record.package, graft, rise=rise, upper=upper, allowed=allowed
            )
            words = f"without it the gate loss rises by {upper:.3g} at most, {allowed:.3g} allowed"
            graft.cull(words, update=run.updates, verdict="removed as a passenger")
        gone = {id(kernel) for _, kernel, _, _ in leaving}
        self._members = [member for member in self._members if id(member[1]) not in gone]
        run.ledger.structure_changed()

    def _fossilize(self, reason: str) -> None:
        run, folded = self._run, []
        for graft, kernel in self._members:
            certificate = make_permanent(kernel, run.optimizer, run.factor)
            folded.append(certificate.folded)
            run.journal.fossilized(
                graft,
                folded=certificate.folded,
                rel_diff=certificate.rel_diff,
                why=certificate.reason,
            )
            graft.fossilize(reason, update=run.updates, folded=certificate.folded)
        sync_optimizer(run.given, members_of(run.optimizer), group_for=run.group_for)
        if any(folded):
            run.ledger.structure_changed()
        run.journal.trial_changed(replace(self._record, verdict="kept"))
        run.last_change_update = run.updates


@contextmanager
def _switched_off(kernels: Sequence[LiveKernel]) -> Iterator[None]:
    """Let kernels contribute nothing for a while."""
    alphas = [kernel.layer.alpha(kernel.seed_idx) for kernel in kernels]
    try:
        for kernel in kernels:
            kernel.layer.set_alpha(kernel.seed_idx, 0.0)
        yield
    finally:
        for kernel, alpha in zip(kernels, alphas, strict=True):
            kernel.layer.set_alpha(kernel.seed_idx, alpha)
