"""The stages between a decision to grow and its verdict, each advanced once per update of the run.

    Recording -> Trial -> Holding                   trial="twin"
    Recording -> Auditioning -> Probation           trial="shadow"

``advance`` returns the stage that follows, or None where there is nothing more to do; ``close``
takes away everything that the stage put anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from esper.growth.germination import (
    germinate_choice,
    germinate_package,
    open_sites,
    rank,
)
from esper.growth.recording import Recorder, record_beside
from esper.growth.shadow_trial import Auditioning
from esper.growth.sizing import sized, too_slow
from esper.growth.trial import Trial

if TYPE_CHECKING:
    from esper.contracts.progress import GraftStatus
    from esper.growth.batch import Batch
    from esper.growth.germination import Contender
    from esper.growth.reading import Choice
    from esper.growth.run import GrowthRun


class Stage(Protocol):
    """What is under way between a decision to grow and its verdict."""

    @property
    def needs_batches(self) -> bool:
        """Whether ``advance`` cannot do without the batches of the update."""
        ...

    @property
    def statuses(self) -> tuple[GraftStatus, ...]:
        """Where each graft is that is under way."""
        ...

    def advance(self, batches: list[Batch]) -> Stage | None:
        """Follow one update, given the batches that it was made of."""
        ...

    def close(self, reason: str) -> None:
        """Take away everything that is not decided yet."""
        ...


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
        observations = self._recorder.observations
        return self._begin(self._germinated(), batches)

    def _germinated(self) -> list[Contender]:
        """Rank and germinate a package; the policy hears that its decision was carried out."""
        run, observations = self._run, self._recorder.observations
        if self._choice is not None:
            run.policy.germinated(run.updates, self._choice)
            contender = germinate_choice(run, self._choice, observations)
            return [] if contender is None else [contender]
        with run.ledger.measured("ranking"):
            ranked = rank(run, observations)
        run.journal.ranked(ranked.order, ranked.refused)
        run.policy.germinated(run.updates, None)
        if self._advise_only:
            return []
        limit = len(run.layers) if run.settings.trial == "twin" else 1
        package = germinate_package(run, ranked, observations, limit)
        if not package:
            run.journal.note("no candidate with a predicted gain passed budget and probe")
        return package

    def _begin(self, package: list[Contender], batches: list[Batch]) -> Stage | None:
        """Begin the trial of a package; where nothing can be tried, the log says why."""
        run = self._run
        if package and run.settings.trial == "shadow":
            return self._audition(package[0], batches)
        updates = 0
        if package:
            package, updates = sized(run, package, batches)
        if not package:
            if not self._advise_only:
                run.last_change_update = run.updates
            return None
        short = run.memory_shortage(package)
        if short is None:
            return Trial(run, package, updates)
        run.journal.note(short)
        for contender in package:
            contender.withdraw(short, update=run.updates, verdict="refused in trial")
        run.last_change_update = run.updates
        return None

    def _audition(self, contender: Contender, batches: list[Batch]) -> Stage | None:
        slow = too_slow(self._run, [contender], batches[-1]) if batches else None
        if slow is None:
            return Auditioning(self._run, contender)
        contender.withdraw(slow, update=self._run.updates, verdict="culled in audition")
        return None

    def close(self, reason: str) -> None:  # noqa: ARG002 - the protocol's signature
        """Remove the hooks."""
        self._recorder.close()
        self._run.watcher.reads_scale = self._run.settings.trial == "twin"

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
