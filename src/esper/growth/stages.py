"""The stages of a graft before its admission, each advanced once per update of the run.

    Recording -> Auditioning -> Probation

``advance`` returns the stage that follows, or None where there is nothing more to do; ``close``
takes away everything that the stage put anywhere.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from esper.growth.budget import Cost, synchronize
from esper.growth.gates import judge, test_level
from esper.growth.germination import (
    Contender,
    germinate_best,
    germinate_choice,
    open_sites,
    rank,
)
from esper.growth.obstacles import unaffordable
from esper.growth.probation import Probation
from esper.growth.recording import Recorder, record_beside
from esper.seeds.shadow import shadow_pass

if TYPE_CHECKING:
    from esper.contracts.choices import GraftVerdict
    from esper.contracts.progress import GraftStatus
    from esper.growth.batch import Batch
    from esper.growth.gates import GateVerdict
    from esper.growth.measurement import Measurement
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
            random_seed=run.settings.generator_seed + run.embargoes.num_decisions,
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
        if self._choice is not None:
            self._run.policy.germinated(self._run.updates, self._choice)
            contender = germinate_choice(self._run, self._choice, observations)
            return None if contender is None else Auditioning(self._run, [contender])
        with self._run.ledger.measured("ranking"):
            ranked = rank(self._run, observations)
        self._run.journal.ranked(ranked.order, ranked.refused)
        self._run.policy.germinated(self._run.updates, None)
        if self._advise_only:
            return None
        limit = min(self._run.settings.candidates, self._run.num_affordable)
        if limit == 0:
            self._run.journal.note(unaffordable(self._run))
            return None
        contenders = germinate_best(self._run, ranked, observations, limit)
        if not contenders:
            self._run.last_change_update = self._run.updates
            self._run.journal.note("no candidate with a predicted gain passed budget and probe")
            return None
        return Auditioning(self._run, contenders)

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


class Auditioning:
    """Trains the contenders by shadow passes and reads the gate of each, once.

    Of those that pass, the one with the largest z is admitted: the surest gain, not the largest.
    Contenders of one audition share its level, so that a look at each of them is paid for.

    Args:
        run: The run.
        contenders: Auditioned side by side; from distinct sites.
    """

    def __init__(self, run: GrowthRun, contenders: list[Contender]) -> None:
        self._run = run
        self._contenders = contenders
        self._auditions = [c.audition for c in contenders]
        self._auditions += [c.null for c in contenders if c.null is not None]
        run.num_auditions += 1
        trained = any(c.audition.optimizer is not None for c in contenders)
        self._passes_left = run.settings.audition_updates if trained else 0
        self._meters = [run.ledger.meter("shadow") for _ in self._auditions]
        for contender in contenders:
            contender.graft.begin_audition("compiled, fetched, probed")

    @property
    def needs_batches(self) -> bool:
        """Shadow passes are on the run's batches."""
        return True

    @property
    def statuses(self) -> tuple[GraftStatus, ...]:
        """Every contender is in its audition."""
        return tuple(contender.graft.status for contender in self._contenders)

    def advance(self, batches: list[Batch]) -> Stage | None:
        """Do one shadow pass per contender; after the last, read the admission gate."""
        if self._passes_left > 0:
            self._passes_left -= 1
            compute_loss = self._run.compute_loss
            assert compute_loss is not None, "nothing germinates without compute_loss"
            for audition, meter in zip(self._auditions, self._meters, strict=True):
                if audition.optimizer is not None:
                    with meter.counted(batches[-1:]):
                        audition.shadow_update(self._run.model, batches[-1], compute_loss)
            self._shorten()
        return self if self._passes_left > 0 else self._judge(batches)

    def close(self, reason: str) -> None:
        """Cull every contender; the run is as if it had never grafted."""
        for contender in self._contenders:
            self._cull(contender, reason, "culled in audition")

    def _shorten(self) -> None:
        """Make no more passes than the overhead buys, by what the first of them took."""
        ledger = self._run.ledger
        passes = sum(meter.flops(meter.elements) for meter in self._meters)
        readings = len(self._contenders) * ledger.reading_flops
        rest = readings + ledger.flops_after_audition
        while self._passes_left and not ledger.affordable(self._passes_left * passes + rest):
            self._passes_left -= 1

    def _judge(self, batches: list[Batch]) -> Stage | None:
        """Read the admission gate of every contender, each once; the best that passes goes on."""
        before = self._run.measure()
        passed: list[tuple[float, Contender, str]] = []
        for contender in self._contenders:
            verdict = self._admission(contender, before)
            self._run.journal.gate(contender.graft, "admission", verdict)
            refusal = None if verdict.passed else verdict.reason
            refusal = refusal or self._over_latency(contender, batches)
            if refusal is None and verdict.z is not None:
                passed.append((verdict.z, contender, verdict.reason))
                continue
            graft = contender.graft
            self._run.embargoes.lay(graft.site, graft.seed_idx, contender.blueprint.id)
            self._cull(contender, refusal or verdict.reason, "culled at admission")
        if not passed:
            return None
        _, best, reason = max(passed, key=lambda entry: entry[0])
        for _, other, _ in passed:
            if other is not best:
                better = f"{best.blueprint.id} at {best.graft.site} helped more"
                self._cull(other, better, "culled in audition")
        return Probation(self._run, best, before, reason)

    def _admission(self, contender: Contender, before: Measurement) -> GateVerdict:
        """Compare the host as it is, seed on, with seed off; one look."""
        run = self._run
        after = run.measured(lambda evaluator: contender.audition.evaluate(run.model, evaluator))
        level = test_level(run.num_auditions) / len(self._contenders)
        known = math.isfinite(before.loss)  # where it is not, the gate refuses the samples
        min_effect = run.settings.min_effect * abs(before.loss) if known else 0.0
        return judge(before, after, level=level, min_effect=min_effect)

    def _over_latency(self, best: Contender, batches: list[Batch]) -> str | None:
        """Measure what the kernel adds to a forward, where the budget asks for it."""
        run = self._run
        if run.budget.latency is None or run.host_cost.parameters < run.budget.small_host:
            return None
        now_s = _forward_s(run, batches[-1])
        host_s = now_s - (run.grafts.added_cost.latency_s or 0.0)
        with best.audition.layer.shadow(best.audition.seed_idx, best.audition.kernel):
            grown_s = _forward_s(run, batches[-1])
        added_s = max(0.0, grown_s - now_s)
        graft = best.graft
        graft.cost = replace(graft.cost, latency_s=added_s)
        run.journal.note(
            f"graft {graft.number} adds {added_s * 1e6:.0f} us to a forward of {now_s * 1e6:.0f} us"
        )
        return run.budget.check(
            host=Cost(parameters=run.host_cost.parameters, latency_s=host_s),
            candidate=Cost(parameters=graft.cost.parameters, latency_s=added_s),
            admitted=run.grafts.added_cost,
            grafts=run.grafts.num_admitted,
        )

    def _cull(self, contender: Contender, reason: str, verdict: GraftVerdict) -> None:
        contender.audition.layer.cancel(contender.graft.seed_idx)
        contender.graft.cull(reason, update=self._run.updates, verdict=verdict)


def _forward_s(run: GrowthRun, batch: Batch, repeats: int = 9) -> float:
    """Return the median time of a forward on the batch, in seconds, without a trace."""
    compute_loss = run.compute_loss
    assert compute_loss is not None
    times = []
    apart = shadow_pass(run.model, functions=(compute_loss,), values=(batch,))
    meter = run.ledger.meter("evaluation")
    with apart, torch.no_grad():
        with meter.counted():
            compute_loss(run.model, batch)
        for _ in range(repeats):
            synchronize()
            start = run.clock.now()
            compute_loss(run.model, batch)
            synchronize()
            times.append(run.clock.now() - start)
    run.ledger.count("evaluation", flops=repeats * meter.flops())
    return sorted(times)[repeats // 2]
