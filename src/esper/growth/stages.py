"""From a decision to grow to what is tried: recording, ranking, and the trial that follows.

Recording -> Trial -> Holding                   trial="twin"
Recording -> Auditioning -> Probation           trial="shadow"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.growth.germination import (
    choose_package,
    germinate_choice,
    germinate_package,
    open_sites,
    rank,
)
from esper.growth.recording import Recorder, record_beside
from esper.growth.shadow_trial import Auditioning
from esper.growth.sizing import Size, sized, too_slow
from esper.growth.trial import Trial
from esper.resilience.attempt import Done, attempt

if TYPE_CHECKING:
    from esper.contracts.progress import GraftStatus
    from esper.growth.batch import Batch
    from esper.growth.germination import Contender
    from esper.growth.reading import Choice
    from esper.growth.run import GrowthRun
    from esper.growth.stage import Stage


class Recording:
    """Records ordinary training steps at the open sites, then ranks and germinates.

    Args:
        run: The run.
        choice: What the owner named; None lets the ranking choose.
        advise_only: Rank and record the ranking, but germinate nothing.
    """

    def __init__(
        self, run: GrowthRun, choice: Choice | None = None, *, advise_only: bool = False
    ) -> None:
        self._run = run
        self._choice = choice
        self._advise_only = advise_only
        layers = open_sites(run)
        if choice is not None and choice.site in layers:
            layers = {choice.site: layers[choice.site]}
        self._recorder = Recorder(
            layers,
            random_seed=run.settings.generator_seed + run.num_decisions,
            records_shadow_passes=True,
        )
        self._updates_left = run.settings.record_updates if choice is None else 1
        self._has_made_up = False
        run.watcher.reads_scale = True

    @property
    def needs_batches(self) -> bool:
        """An ordinary step is recorded without its batch."""
        return False

    @property
    def statuses(self) -> tuple[GraftStatus, ...]:
        """Nothing has germinated yet."""
        return ()

    def advance(self, batches: list[Batch]) -> Stage | None:
        """Count one recorded update; after the last, rank and germinate."""
        self._updates_left -= 1
        watcher = self._run.watcher
        self._recorder.end_update(
            num_batches=len(batches),
            loss_scale=watcher.loss_scale,
            share_kept=watcher.share_kept,
        )
        self._make_up_for_silent_sites(batches)
        if self._updates_left > 0 and not self._recorder.done:
            return self
        self.close("recorded")
        return self._begin(batches)

    def _begin(self, batches: list[Batch]) -> Stage | None:
        """Rank, choose and germinate; where nothing can be tried, the log says why."""
        run = self._run
        size, package = self._package(batches)
        if run.settings.trial == "shadow" and package:
            return self._audition(package[0], batches)
        parameters = sum(contender.graft.cost.parameters for contender in package)
        short = run.memory_shortage(parameters) if package else None
        slow = too_slow(run, package, batches[-1]) if package and batches else None
        if package and (short or slow) is None:
            made = attempt(lambda: Trial(run, package, size.updates))
            if isinstance(made, Done):
                return made.value
            slow = f"no trial could begin: {made}"
        for contender in package:
            reason = short or slow or ""
            contender.withdraw(reason, update=run.updates, verdict="refused in trial")
        if not self._advise_only:
            run.last_change_update = run.updates
            run.journal.note(
                short
                or slow
                or size.reason
                or "no candidate with a predicted gain passed budget and probe"
            )
        return None

    def _package(self, batches: list[Batch]) -> tuple[Size, list[Contender]]:
        """Return what is to be tried; the policy hears that its decision was carried out."""
        run, observations = self._run, self._recorder.observations
        if self._choice is not None:
            run.policy.germinated(run.updates, self._choice)
            return self._chosen_by_hand(batches)
        with run.ledger.measured("ranking"):
            ranked = rank(run, observations)
        run.journal.ranked(ranked.order, ranked.refused)
        run.policy.germinated(run.updates, None)
        if self._advise_only:
            return Size(num_kernels=0), []
        if run.settings.trial == "shadow":
            chosen = choose_package(run, ranked, 1)
            return Size(num_kernels=1), germinate_package(run, chosen, ranked, observations)
        chosen = choose_package(run, ranked, len(run.layers))
        size = sized(run, [entry.flops for entry in chosen], batches)
        if chosen and not size.num_kernels:
            run.too_dear = size.reason
        taken = chosen[: size.num_kernels]
        return size, germinate_package(run, taken, ranked, observations)

    def _chosen_by_hand(self, batches: list[Batch]) -> tuple[Size, list[Contender]]:
        run = self._run
        assert self._choice is not None, "the owner named a graft"
        contender = germinate_choice(run, self._choice, self._recorder.observations)
        if contender is None:
            return Size(num_kernels=0, reason="what was named by hand was refused"), []
        size = sized(run, [contender.graft.cost.flops], batches)
        if size.num_kernels or run.settings.trial == "shadow":
            return size, [contender]
        contender.withdraw(size.reason, update=run.updates, verdict="refused in trial")
        return size, []

    def _audition(self, contender: Contender, batches: list[Batch]) -> Stage | None:
        slow = too_slow(self._run, [contender], batches[-1]) if batches else None
        if slow is None:
            return Auditioning(self._run, contender)
        self._run.last_change_update = self._run.updates
        contender.withdraw(slow, update=self._run.updates, verdict="culled in audition")
        return None

    def close(self, reason: str) -> None:  # noqa: ARG002 - the protocol's signature
        """Remove the hooks."""
        self._recorder.close()
        self._run.watcher.reads_scale = False

    def _make_up_for_silent_sites(self, batches: list[Batch]) -> None:
        """Record one pass beside the run of the sites that the step had nothing of.

        A compiled graph calls no hook, and what a frozen layer gives has no gradient in a step.
        """
        run, compute_loss = self._run, self._run.compute_loss
        silent = [name for name, o in self._recorder.observations.items() if not o.inputs]
        if self._has_made_up or not silent or compute_loss is None or not batches:
            return
        self._has_made_up = True
        with run.ledger.measured("ranking"):
            record_beside(self._recorder, run.model, compute_loss, batches[-1], silent)
