"""Why nothing grows although the policy would, or not together, in words for the owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.continuity.replicas import num_apart
from esper.growth.gates import MIN_GATE_SAMPLES, MIN_SAMPLES, NO_SAMPLES
from esper.growth.germination import open_sites
from esper.growth.ledger import SHARE
from esper.growth.sizing import never_paid
from esper.growth.tries import no_tries_left, tries_spent

if TYPE_CHECKING:
    from esper.growth.run import GrowthRun

NEVER_STEPPED: Final = (
    "nothing can grow: grower.step is never called; call grower.step(loss, batch=batch) after "
    "every optimizer.step()"
)


def grows_apart(run: GrowthRun) -> str | None:
    """Say that processes which may train one model would each grow by itself, or None."""
    num_processes = num_apart(run.given)
    if num_processes == 1:
        return None
    return (
        f"{num_processes} processes are in a group, and the model is neither in DDP nor under "
        "FSDP2: each grows by itself. Where they train one model, give the Grower the one in "
        "torch.nn.parallel.DistributedDataParallel"
    )


def never_grows(run: GrowthRun) -> str | None:
    """Say why a run can never grow, as far as its settings tell, or None."""
    horizon, needed = run.settings.horizon, run.settings.package_updates
    if horizon is not None and needed > horizon:
        parts = "record_updates, 50 of a trial and hold_updates"
        if run.settings.trial == "shadow":
            parts = "record_updates, audition_updates, ramp_updates and hold_updates"
        return (
            f"nothing can grow: a package takes {needed} updates at least ({parts}), and horizon "
            f"is {horizon}; shorten them, or train longer"
        )
    if run.budget.packages == 0:
        return (
            "nothing can grow: the budget allows no package; give Budget(packages=...) at least 1"
        )
    if run.ledger.overhead == 0:
        return "nothing can grow: overhead=0 buys no trial; give a larger one"
    if tries_spent(run.model) >= run.settings.tries:
        return no_tries_left(run.model, run.settings.tries)
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
            f"the model to one loss per held-out sample, at least {MIN_GATE_SAMPLES} of them"
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
    if len(found.per_sample) < MIN_GATE_SAMPLES:
        return (
            f"nothing can grow: too little power: {len(found.per_sample)} samples, at least "
            f"{MIN_GATE_SAMPLES} needed ({MIN_SAMPLES} for verdicts, the rest for the watch); hold "
            "out more data for evaluate"
        )
    return None


def is_too_dear(run: GrowthRun) -> bool:
    """Say whether no package can be paid for in this run; what was found once stays."""
    if run.too_dear is None:
        run.too_dear = never_paid(run)
    return run.too_dear is not None


def obstacle(run: GrowthRun) -> str | None:
    """Say why nothing can germinate now, or None."""
    horizon, needed = run.settings.horizon, run.settings.package_updates
    limit = run.budget.packages
    if run.no_twins is not None:
        return f"nothing can grow: {run.no_twins}"
    if tries_spent(run.model) >= run.settings.tries:
        return no_tries_left(run.model, run.settings.tries)
    if horizon is not None and run.updates + needed > horizon:
        return f"a package takes {needed} updates at least; too few are left of {horizon}"
    if limit is not None and run.grafts.num_packages_admitted >= limit:
        return f"the budget's {limit} packages were taken over"
    if horizon is not None and is_too_dear(run):
        return run.too_dear
    if run.ledger.rankings > SHARE * run.ledger.limit(run.updates):
        return (
            f"rankings took a fifth of overhead={run.ledger.overhead:g}: the next waits until more "
            "is earned, if ever it is"
        )
    if not open_sites(run):
        ill = "; ".join(f"{site}: {why}" for site, why in run.closed.items())
        return f"no site has a seed that is dormant{f', and is healthy ({ill})' if ill else ''}"
    return None
