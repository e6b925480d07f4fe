"""Why nothing grows although the policy would, in the words that the owner reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.growth.gates import MIN_SAMPLES, NO_SAMPLES
from esper.growth.germination import open_sites

if TYPE_CHECKING:
    from esper.growth.run import GrowthRun


def missing_evidence(run: GrowthRun, *, has_batches: bool) -> str | None:
    """Say what is missing for a graft ever to be admitted, or None.

    Args:
        run: The run.
        has_batches: Whether the owner passes batches to ``step``.
    """
    if run.compute_loss is None or run.evaluator is None or not has_batches:
        return "without compute_loss, evaluate and batch= there is no evidence"
    per_sample = None if run.last_measurement is None else run.last_measurement.per_sample
    if per_sample is None:
        return NO_SAMPLES
    if len(per_sample) < MIN_SAMPLES:
        return f"too little power: {len(per_sample)} samples, at least {MIN_SAMPLES} needed"
    return None


def obstacle(run: GrowthRun) -> str | None:
    """Say why nothing can germinate now, or None."""
    horizon, needed = run.settings.horizon, run.settings.graft_updates
    limit = run.budget.grafts
    if horizon is not None and run.updates + needed > horizon:
        return f"a graft takes {needed} updates; too few are left of {horizon}"
    if limit is not None and run.grafts.num_admitted >= limit:
        return f"the budget's {limit} grafts were admitted"
    if run.num_affordable == 0 and run.ledger.num_overdrafts >= (limit or 1):
        share = run.settings.overhead
        return f"the overhead of {share:.0%} is spent, one audition per graft included"
    if not open_sites(run):
        return "no site has a seed that is dormant and under no embargo"
    return None
