"""From a decision to grow to what is tried: recording, ranking, and the trial that follows.

Recording -> Trial -> Holding                   trial="twin"
Recording -> Auditioning -> Probation           trial="shadow"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.continuity.replicas import any_rank, in_step, over_ranks
from esper.growth.germination import (
    Chosen,
    choose_package,
    germinate,
    germinate_package,
    named_kernel,
    open_sites,
    rank,
)
from esper.growth.recording import Recorder, record_beside
from esper.growth.settings import LEAST_RECORDED
from esper.growth.shadow_trial import Auditioning
from esper.growth.sizing import NONE_LEFT, Size, paid_kernel, paid_trial, too_slow
from esper.growth.trial import Trial
from esper.resilience.attempt import Done, attempt
from esper.state.shortage import is_shortage

if TYPE_CHECKING:
    from esper.contracts.progress import GraftStatus
    from esper.growth.batch import Batch
    from esper.growth.germination import Contender, Ranked
    from esper.growth.ranking import RankedCandidate
    from esper.growth.reading import Choice
    from esper.growth.run import GrowthRun
    from esper.growth.stage import Stage, StageState


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
        self._least = LEAST_RECORDED if run.settings.trial == "twin" else 1
        self._wanted = run.settings.record_updates if choice is None else 1
        self._num_recorded = 0
        self._has_made_up = False
        run.watcher.reads_scale = True
        run.choice = choice

    @property
    def needs_batches(self) -> bool:
        """An ordinary step is recorded without its batch."""
        return False

    @property
    def statuses(self) -> tuple[GraftStatus, ...]:
        """Nothing has germinated yet."""
        return ()

    def advance(self, batches: list[Batch]) -> Stage | None:
        """Count one recorded update; after the last, rank and germinate.

        Twins need a few in any case: they tell how the run clips its gradients.
        """
        self._num_recorded += 1
        watcher = self._run.watcher
        self._recorder.end_update(
            num_batches=len(batches),
            loss_scale=watcher.loss_scale,
            share_kept=watcher.share_kept,
        )
        self._make_up_for_silent_sites(batches)
        is_done = any_rank(self._run.given, here=self._recorder.done)
        has_enough = self._num_recorded >= self._wanted or is_done
        if self._num_recorded < self._least or not has_enough:
            return self
        self.close("recorded")
        return self._begin(batches)

    def _begin(self, batches: list[Batch]) -> Stage | None:
        """Rank, choose and germinate; where nothing can be tried, the log says why."""
        run = self._run
        size, package = self._package(batches)
        against = self._against(package, batches) if package else size.reason
        against = self._against_of_ranks(package, against)
        if run.settings.trial == "shadow" and package:
            return self._audition(package[0], against)
        if not against:
            made = attempt(lambda: in_step(run.given, lambda: Trial(run, package, size.updates)))
            if isinstance(made, Done):
                return made.value
            against = f"no trial could begin: {made}"
        for contender in package:
            contender.withdraw(against, update=run.updates, verdict="refused in trial")
        if not self._advise_only:
            run.journal.note(against)
            if not size.waits:
                run.last_change_update = run.updates
        return None

    def _against(self, package: list[Contender], batches: list[Batch]) -> str:
        """Say why twins with a package do not fit, or would be too slow; empty where neither."""
        run, short = self._run, None
        if run.settings.trial == "twin":
            short = run.memory_shortage(sum(c.graft.cost.parameters for c in package))
        if short is None and batches:
            short = too_slow(run, package, batches[-1])
        return short or ""

    def _against_of_ranks(self, package: list[Contender], against: str) -> str:
        """Say what stands against a package on any rank; empty where nothing does."""
        names = [(contender.graft.site, contender.blueprint.id) for contender in package]
        told = over_ranks(self._run.given, (names, against))
        if any(others != names for others, _ in told):
            return against or "the ranks did not make the same kernels, so none is tried"
        return next((reason for _, reason in told if reason), "")

    def _package(self, batches: list[Batch]) -> tuple[Size, list[Contender]]:
        """Return what is to be tried; the policy hears of a decision that does not wait."""
        if self._choice is None:
            size, package = self._chosen_by_ranking(batches)
        else:
            size, package = self._chosen_by_hand(self._choice, batches)
        if not size.waits:
            self._run.policy.germinated(self._run.updates, self._choice)
        return size, package

    def _chosen_by_ranking(self, batches: list[Batch]) -> tuple[Size, list[Contender]]:
        run, observations = self._run, self._recorder.observations
        with run.ledger.measured("ranking"):
            ranked = rank(run, observations)
        run.journal.ranked(ranked.order, ranked.refused)
        refused = Size(reason="no candidate with a predicted gain passed budget and probe")
        if self._advise_only:
            return refused, []
        chosen, size = over_ranks(run.given, self._own_choice(ranked, batches))[0]
        if size.reason and not size.waits and size != NONE_LEFT:
            run.too_dear = size.reason
        if size.reason:
            return size, []
        package = germinate_package(run, self._offered(chosen, ranked), ranked, observations)
        return (size if package else refused), package

    def _offered(self, chosen: list[Chosen], ranked: Ranked) -> list[Chosen]:
        """Return what of a choice every rank can make: a rank may have been offered other kernels.

        Ranks that see other batches may describe a site in other ways.
        """
        mine = [(entry.site, entry.blueprint) in ranked.offers for entry in chosen]
        everywhere = map(all, zip(*over_ranks(self._run.given, mine), strict=True))
        return [entry for entry, is_there in zip(chosen, everywhere, strict=True) if is_there]

    def _own_choice(self, ranked: Ranked, batches: list[Batch]) -> tuple[list[Chosen], Size]:
        """Choose by this rank's ranking and ledger, of which others may see other batches."""
        run = self._run
        if not ranked.order and ranked.is_cut:
            bought = f"overhead={run.ledger.overhead:g} buys no ranking"
            return [], Size(reason=f"{bought}: raise it, or train longer")
        limit = 1 if run.settings.trial == "shadow" else len(run.layers)

        def choose(flops: float) -> list[RankedCandidate]:
            return choose_package(run, ranked, limit=limit, flops=flops)

        chosen, size = paid_trial(run, choose, batches)
        return [Chosen(e.site, e.blueprint, e.gain or 0.0) for e in chosen], size

    def _chosen_by_hand(self, choice: Choice, batches: list[Batch]) -> tuple[Size, list[Contender]]:
        run = self._run
        refused = Size(reason="what was named by hand was refused")
        found = named_kernel(run, choice, self._recorder.observations)
        if any_rank(run.given, here=found is None) or found is None:
            return refused, []
        size = over_ranks(run.given, paid_kernel(run, found.cost.flops, batches))[0]
        if size.reason:
            return size, []
        seen = self._recorder.observations[choice.site]
        contender = germinate(
            run, choice.site, found.blueprint, seen, "named by hand", found.artifact
        )
        return (refused, []) if contender is None else (size, [contender])

    def _audition(self, contender: Contender, slow: str) -> Stage | None:
        if not slow:
            return Auditioning(self._run, contender)
        self._run.last_change_update = self._run.updates
        contender.withdraw(slow, update=self._run.updates, verdict="culled in audition")
        return None

    def close(self, reason: str) -> None:  # noqa: ARG002 - the protocol's signature
        """Remove the hooks."""
        self._recorder.close()
        self._run.watcher.reads_scale = False

    def state_dict(self) -> StageState:
        """Return what it was begun with: what it recorded is not saved, and is recorded anew."""
        return {"kind": "recording", "advise_only": self._advise_only}

    def _make_up_for_silent_sites(self, batches: list[Batch]) -> None:
        """Record one pass beside the run of the sites that the step had nothing of.

        A compiled graph calls no hook, and what a frozen layer gives has no gradient in a step.
        """
        run, compute_loss = self._run, self._run.compute_loss
        silent = [name for name, o in self._recorder.observations.items() if not o.inputs]
        if self._has_made_up or not silent or compute_loss is None or not batches:
            return
        self._has_made_up = True
        try:
            with run.ledger.measured("ranking"), run.fits.in_use():
                record_beside(self._recorder, run.model, compute_loss, batches[-1], silent)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            run.journal.note(
                f"nothing was recorded at {', '.join(silent)}, for lack of memory: {error}"
            )
