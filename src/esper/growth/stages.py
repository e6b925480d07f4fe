"""From a decision to grow to what is tried: recording, ranking, and the trial that follows.

Recording -> Trial -> Holding                   trial="twin"
Recording -> Auditioning -> Probation           trial="shadow"
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from esper.growth.germination import (
    choose_package,
    germinate_choice,
    germinate_package,
    open_sites,
    rank,
)
from esper.growth.recording import Recorder, record_beside
from esper.growth.settings import MIN_TRIAL
from esper.growth.shadow_trial import Auditioning
from esper.growth.sizing import affordable_updates, paid_trial, too_dear, too_slow
from esper.growth.trial import Trial
from esper.resilience.attempt import Done, attempt

if TYPE_CHECKING:
    from esper.contracts.progress import GraftStatus
    from esper.growth.batch import Batch
    from esper.growth.germination import Contender, Ranked
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
        package, updates = self._package(batches)
        if run.settings.trial == "shadow" and package:
            return self._audition(package[0], batches)
        parameters = sum(contender.graft.cost.parameters for contender in package)
        against = run.memory_shortage(parameters) if package else None
        if against is None and package and batches:
            against = too_slow(run, package, batches[-1])
        if package and against is None:
            made = attempt(lambda: Trial(run, package, updates))
            if isinstance(made, Done):
                return made.value
            against = f"no trial could begin: {made}"
        for contender in package:
            contender.withdraw(against or "", update=run.updates, verdict="refused in trial")
        if against is not None:
            run.journal.note(against)
        if not self._advise_only:
            run.last_change_update = run.updates
        return None

    def _package(self, batches: list[Batch]) -> tuple[list[Contender], int]:
        """Return what is to be tried, and for how many updates; the policy hears of it."""
        run, observations = self._run, self._recorder.observations
        if self._choice is not None:
            run.policy.germinated(run.updates, self._choice)
            return self._chosen_by_hand(batches)
        with run.ledger.measured("ranking"):
            ranked = rank(run, observations)
        run.journal.ranked(ranked.order, ranked.refused)
        run.policy.germinated(run.updates, None)
        if self._advise_only:
            return [], 0
        if run.settings.trial == "shadow":
            chosen, updates = choose_package(run, ranked, limit=1), 0
        else:
            limit = len(run.layers)
            choose = functools.partial(choose_package, run, ranked, limit=limit)
            chosen, updates = paid_trial(run, lambda flops: choose(flops=flops), batches)
        if not chosen:
            self._say_why_not(ranked, batches)
        package = germinate_package(run, chosen, ranked, observations)
        if chosen and not package:
            run.journal.note("no kernel that was chosen passed its probe")
        return package, updates

    def _say_why_not(self, ranked: Ranked, batches: list[Batch]) -> None:
        run = self._run
        wanted = choose_package(run, ranked, limit=len(run.layers))
        if not wanted:
            run.journal.note("no candidate with a predicted gain is within the budget")
            return
        cheapest = min((entry.flops or 0.0 for entry in wanted), default=0.0)
        run.too_dear = too_dear(run, cheapest, batches)
        run.journal.note(run.too_dear)

    def _chosen_by_hand(self, batches: list[Batch]) -> tuple[list[Contender], int]:
        run = self._run
        assert self._choice is not None, "the owner named a graft"
        contender = germinate_choice(run, self._choice, self._recorder.observations)
        if contender is None or run.settings.trial == "shadow":
            return ([] if contender is None else [contender]), 0
        updates = affordable_updates(run, [contender.graft.cost.flops], batches)
        if updates >= MIN_TRIAL:
            return [contender], updates
        reason = too_dear(run, contender.graft.cost.flops, batches)
        contender.withdraw(reason, update=run.updates, verdict="refused in trial")
        run.journal.note(reason)
        return [], 0

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
