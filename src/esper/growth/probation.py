"""From admission to verdict: blending, holding, the fossilization gate, and removal."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from esper.continuity.optimizer import remove_parameters, sync_optimizer
from esper.continuity.snapshot import RunSnapshot
from esper.contracts.lifecycle import GraftStage, SeedLifecycleState
from esper.growth.budget import Cost
from esper.growth.evaluation import averaged
from esper.growth.gates import GateVerdict, not_worse, read_gate, test_level
from esper.growth.live_kernel import LiveKernel, graft_kernel, remove_kernel
from esper.growth.twins import Twin, tau_of

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer
    from esper.growth.germination import Contender
    from esper.growth.measurement import Measurement
    from esper.growth.run import GrowthRun

LOSS_CHECK_EVERY = 10
"""Updates between two looks at the training loss; each look reads the device once."""


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

    @property
    def twins(self) -> tuple[Twin, Twin, Twin]:
        """All three."""
        return self.null, self.host, self.perturbed


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
        self._layer: KasminaLayer = contender.audition.layer
        self._snapshot = RunSnapshot(run.model, run.optimizer, update=run.updates)
        self._host = list(run.model.parameters())
        self._factors = run.factor.state_dict(self._host)
        self._fork = _make_fork(run, contender) if contender.null is not None else None
        peak = run.peak_of(self._layer)
        self._kernel = graft_kernel(
            contender.audition, self._layer, run.optimizer, run.factor, peak=peak
        )
        self._usual = _LossRange.of(run)
        self._looks: dict[str, list[Measurement]] = defaultdict(list)
        hold, num_looks = run.settings.hold_updates, run.settings.looks
        moments = {self._ramp + hold * (i + 1) // num_looks for i in range(num_looks)}
        self._look_at = sorted(moments)
        self._holds = False
        run.admitted[contender.graft] = contender.cost
        self._level = test_level(len(run.admitted))
        run.journal.moved(contender.graft, GraftStage.BLENDING, reason, admitted_at=run.updates)
        run.journal.alpha(contender.graft, 0.0)

    @property
    def host_twin(self) -> torch.nn.Module | None:
        """The twin that carries nothing, while there is a fork."""
        return None if self._fork is None else self._fork.host.model

    @property
    def needs_batches(self) -> bool:
        """Twins train on the run's batches."""
        return self._fork is not None

    @property
    def stages(self) -> tuple[tuple[str, int, str], ...]:
        """Site, seed and stage of what is under way."""
        audition = self._contender.audition
        stage = GraftStage.HOLDING if self._holds else GraftStage.BLENDING
        return ((self._contender.site, audition.seed_idx, stage.value),)

    @property
    def _ramp(self) -> int:
        return self._run.settings.ramp_updates

    @property
    def _num_updates(self) -> int:
        return self._run.updates - self._snapshot.update

    def advance(self, batches: list[Any]) -> Probation | None:
        """Follow one update of the run; None once the verdict is spoken."""
        trouble = self._trouble()
        if trouble is not None:
            self._remove(trouble)
            return None
        self._advance_twins(batches)
        alpha = self._kernel.set_alpha(self._num_updates, self._ramp)
        if not self._holds and self._num_updates >= self._ramp:
            self._holds = True
            self._run.journal.alpha(self._contender.graft, alpha)
            reason = f"alpha reached 1 after {self._ramp} updates"
            self._run.journal.moved(self._contender.graft, GraftStage.HOLDING, reason)
        if self._look_at and self._num_updates >= self._look_at[0]:
            self._look_at = [u for u in self._look_at if u > self._num_updates]
            self._look()
        if self._num_updates < self._ramp + self._run.settings.hold_updates:
            return self
        self._judge()
        return None

    def close(self, reason: str) -> None:
        """Remove the graft: what was not judged does not stay."""
        self._remove(reason)

    def _trouble(self) -> str | None:
        state = self._state()
        if state is not SeedLifecycleState.ACTIVE:
            return f"its seed is in {state.name}"
        if self._num_updates % LOSS_CHECK_EVERY:
            return None
        return self._usual.trouble(self._run)

    def _state(self) -> SeedLifecycleState:
        return self._layer.state_layout.state(self._kernel.seed_idx)

    def _advance_twins(self, batches: list[Any]) -> None:
        if self._fork is None:
            return
        for twin in self._fork.twins:
            twin.update(batches, self._run.rates)
            self._run.count_pass("twins", batches)
        self._fork.null_kernel.set_alpha(self._num_updates, self._ramp)

    def _look(self) -> None:
        """Read the gate split for the live model and for every twin."""
        run = self._run
        self._looks["live"].append(run.measure())
        if self._fork is not None:
            for name in ("null", "host", "perturbed"):
                twin = getattr(self._fork, name)
                read = run.measured(lambda evaluator, m=twin.model: evaluator(m), "twins")  # type: ignore[misc] # mypy cannot type a default of a lambda
                self._looks[name].append(read)

    def _judge(self) -> None:
        """Read the fossilization gate, once, on the mean of the looks."""
        run, graft = self._run, self._contender.graft
        without = self._measure_without()
        with_seed = averaged(self._looks["live"])
        verdict = self._verdict(with_seed)
        run.journal.gate(graft, "fossilization", verdict)
        run.journal.amend(graft, dependence=without.loss - self._looks["live"][-1].loss)
        if verdict.passed:
            self._fossilize(verdict.reason)
        else:
            self._remove(verdict.reason, without)

    def _verdict(self, with_seed: Measurement) -> GateVerdict:
        if self._fork is None:
            return _compared(self._before, with_seed, level=self._level)
        null, host, perturbed = (
            averaged(self._looks[name]) for name in ("null", "host", "perturbed")
        )
        tau = tau_of(host.loss, perturbed.loss)
        verdict = judge(null, with_seed, level=self._level, tau=tau)
        self._run.journal.amend(
            self._contender.graft,
            contribution=verdict.effect,
            contribution_stderr=verdict.stderr,
            host_only_contribution=host.loss - with_seed.loss,
        )
        return verdict

    def _measure_without(self) -> Measurement:
        """Read the gate split with the seed off; an isolated seed is off already."""
        seed_idx = self._kernel.seed_idx
        if self._state() is not SeedLifecycleState.ACTIVE:
            return self._run.measure()
        alpha = self._layer.alpha(seed_idx)
        self._layer.set_alpha(seed_idx, 0.0)
        try:
            return self._run.measure()
        finally:
            self._layer.set_alpha(seed_idx, alpha)

    def _fossilize(self, reason: str) -> None:
        run, graft = self._run, self._contender.graft
        certificate = self._layer.fossilize(self._kernel.seed_idx)
        if certificate.folded:
            run.factor.remove(self._kernel.parameters)
            remove_parameters(run.optimizer, self._kernel.parameters)
        else:
            self._layer.set_guard(self._kernel.seed_idx, "step")
            sync_optimizer(run.model, run.optimizer)
        run.journal.fossilized(
            graft,
            self._contender.site,
            folded=certificate.folded,
            rel_diff=certificate.rel_diff,
            why=certificate.reason,
        )
        run.last_change = run.updates
        run.journal.moved(
            graft,
            GraftStage.FOSSILIZED,
            reason,
            verdict="fossilized",
            folded=certificate.folded,
        )

    def _remove(self, reason: str, without: Measurement | None = None) -> None:
        """Cull by the better of two: keep the trained host, or go back to the admission."""
        run, contender = self._run, self._contender
        if without is None:
            without = self._measure_without()
        kept = _compared(self._before, without, level=self._level)
        remove_kernel(self._kernel, run.optimizer, run.factor)
        updates_lost = 0
        if not kept.passed:
            updates_lost = self._num_updates
            self._snapshot.restore(run.optimizer)
            run.factor.load_state_dict(self._factors, self._host)
            run.losses.clear()
        run.admitted[contender.graft] = Cost(parameters=0, flops=0.0, latency_s=0.0)
        run.last_change = run.updates
        run.embargo(contender.site, self._kernel.seed_idx, contender.blueprint.id)
        host = "the snapshot was restored" if updates_lost else "the trained host was kept"
        run.journal.rolled_back(contender.graft, updates_lost, f"{host}: {kept.reason}")
        run.journal.moved(
            contender.graft,
            GraftStage.CULLED,
            reason,
            verdict="culled after admission",
            updates_lost=updates_lost,
        )


def _make_fork(run: GrowthRun, contender: Contender) -> Fork:
    assert contender.null is not None
    null, host, perturbed = (
        Twin(run.model, run.optimizer, run.factor, run.twin_update) for _ in range(3)
    )
    perturbed.perturb(run.settings.random_seed + run.updates)
    site: Any = null.model.get_submodule(contender.site)
    peak = run.peak_of(contender.audition.layer)
    kernel = graft_kernel(contender.null, site, null.optimizer, null.factor, peak=peak)
    return Fork(null=null, null_kernel=kernel, host=host, perturbed=perturbed)


def judge(
    reference: Measurement,
    candidate: Measurement,
    *,
    level: float,
    tau: float = 0.0,
    min_effect: float = 0.0,
) -> GateVerdict:
    """Read a gate on two evaluations; without per-sample losses it does not pass.

    Args:
        reference: The gate split without the graft.
        candidate: The gate split with it.
        level: One-sided level, in (0, 0.5).
        tau: Spread between models that ought to be equal, in units of the loss.
        min_effect: Smallest fall of the loss that counts, in units of the loss.
    """
    if reference.per_sample is None or candidate.per_sample is None:
        return _unmeasured(level)
    return read_gate(
        reference.per_sample, candidate.per_sample, level=level, tau=tau, min_effect=min_effect
    )


def _compared(reference: Measurement, candidate: Measurement, *, level: float) -> GateVerdict:
    if reference.per_sample is None or candidate.per_sample is None:
        return _unmeasured(level)
    return not_worse(reference.per_sample, candidate.per_sample, level=level)


def _unmeasured(level: float) -> GateVerdict:
    return GateVerdict(
        passed=False,
        effect=None,
        stderr=None,
        tau=None,
        z=None,
        level=level,
        samples=0,
        reason="evaluate gives no per-sample losses, so luck cannot be told from gain",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _LossRange:
    """The training loss before an admission, and what would be a spike after it.

    A spike is a mean of the last ten losses above ``highest + 2 (highest - lowest)`` of the up
    to fifty before: a rule that neither a scale nor an offset of the loss changes.
    """

    limit: float | None

    @classmethod
    def of(cls, run: GrowthRun) -> _LossRange:
        """Look at the losses of the run so far; without any there is no limit."""
        if len(run.losses) < LOSS_CHECK_EVERY:
            return cls(limit=None)
        losses = torch.stack(tuple(run.losses))
        highest, lowest = float(losses.max()), float(losses.min())
        limit = highest + 2 * (highest - lowest)
        return cls(limit=limit if math.isfinite(limit) else None)

    def trouble(self, run: GrowthRun) -> str | None:
        """Say what is wrong with the last losses, or None."""
        if not run.losses:
            return None
        recent = float(torch.stack(tuple(run.losses)[-LOSS_CHECK_EVERY:]).mean())
        if not math.isfinite(recent):
            return f"the training loss became {recent}"
        if self.limit is not None and recent > self.limit:
            return f"the training loss spiked: {recent:.3g}, at most {self.limit:.3g} expected"
        return None
