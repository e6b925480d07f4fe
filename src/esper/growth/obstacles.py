"""Why nothing grows although the policy would, in the words that the owner reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.growth.gates import MIN_SAMPLES, NO_SAMPLES
from esper.growth.germination import open_sites

if TYPE_CHECKING:
    from esper.growth.run import GrowthRun

NEVER_STEPPED: Final = (
    "nothing can grow: grower.step is never called; call grower.step(loss, batch=batch) after "
    "every optimizer.step()"
)


def never_grows(run: GrowthRun) -> str | None:
    """Say why a run can never grow, as far as its settings tell, or None."""
    horizon, needed = run.settings.horizon, run.settings.graft_updates
    if horizon is not None and needed > horizon:
        return (
            f"nothing can grow: a graft takes {needed} updates (record_updates, audition_updates, "
            f"ramp_updates and hold_updates), and horizon is {horizon}; shorten them, or train "
            "longer"
        )
    if run.budget.grafts == 0:
        return "nothing can grow: the budget allows no graft; give Budget(grafts=...) at least 1"
    return None


def missing_part(run: GrowthRun) -> str | None:
    """Say what the owner left out without which nothing is ever grafted, or None."""
    if run.compute_loss is None:
        return (
            "nothing can grow: without compute_loss= no kernel can be trained; give the Grower "
            "compute_loss=, (model, batch) to the scalar training loss"
        )
    if run.evaluator is None:
        return (
            "nothing can grow: without evaluate= no gate can be read; give the Grower evaluate=, "
            f"the model to one loss per held-out sample, at least {MIN_SAMPLES} of them"
        )
    return None


def missing_evidence(run: GrowthRun, *, has_batches: bool) -> str | None:
    """Say what is missing in the course of a run for a graft to be admitted, or None.

    Args:
        run: The run, which has been measured once.
        has_batches: Whether the owner passes batches to ``step``.
    """
    if not has_batches:
        return (
            "nothing can grow: grower.step was called without batch=, and without batches no "
            "kernel can be trained; call grower.step(loss, batch=batch), with what compute_loss "
            "takes"
        )
    found = run.last_measurement
    if found is None or found.per_sample is None:
        return (
            f"nothing can grow: {NO_SAMPLES}; return one loss per held-out sample, shape "
            '(samples,), in place of their mean (with torch losses, reduction="none")'
        )
    if len(found.per_sample) < MIN_SAMPLES:
        return (
            f"nothing can grow: too little power: {len(found.per_sample)} samples, at least "
            f"{MIN_SAMPLES} needed; hold out more data for evaluate"
        )
    return None


def unaffordable(run: GrowthRun) -> str:
    """Say that the overhead buys no audition now."""
    overhead = f"overhead={run.ledger.overhead:g} (FLOPs, as a ratio to those of training)"
    if run.ledger.update.is_known and run.ledger.update_flops == 0:
        return "torch counts no FLOPs in an update of this model, so that no ratio to them buys any"
    if run.settings.horizon is None and run.ledger.overhead > 0:
        return f"{overhead} buys no audition yet: it is earned by updates"
    return f"{overhead} buys no audition any more; raise it, or train longer"


def obstacle(run: GrowthRun) -> str | None:
    """Say why nothing can germinate now, or None."""
    horizon, needed = run.settings.horizon, run.settings.graft_updates
    limit = run.budget.grafts
    if horizon is not None and run.updates + needed > horizon:
        return f"a graft takes {needed} updates; too few are left of {horizon}"
    if limit is not None and run.grafts.num_admitted >= limit:
        return f"the budget's {limit} grafts were admitted"
    if run.compute_loss is not None and run.num_affordable == 0:
        return unaffordable(run)
    if not open_sites(run):
        return "no site has a seed that is dormant and under no embargo"
    return None
