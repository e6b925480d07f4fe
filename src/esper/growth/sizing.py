"""How long a trial may be, and how large its package, for what growing may cost."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from esper.growth.averaging import STATISTICS_BATCHES, has_statistics
from esper.growth.batch import num_samples_in
from esper.growth.budget import Cost, synchronize
from esper.growth.probation import LOOKS
from esper.growth.settings import MIN_TRIAL
from esper.seeds.batch_rows import rows_of
from esper.seeds.fitting import Pass, device_of
from esper.seeds.shadow import shadow_pass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from esper.growth.batch import Batch
    from esper.growth.germination import Contender
    from esper.growth.ranking import RankedCandidate
    from esper.growth.run import GrowthRun

LAST_READINGS = 2
"""Readings of the gate split at a verdict beside those of averaged weights: the last iterates."""
WATCH_READINGS = 2
READINGS_AT_END = 2
LATENCY_REPEATS = 9
FORWARD_BACKWARD = 3
"""A backward takes twice the products of the forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How long a trial may be.

    Attributes:
        updates: Updates of the trial; 0 where none can be paid, or none is wanted.
        reason: Why none can be paid; empty where one can.
        waits: Whether one can be paid later, when it is earned.
    """

    updates: int = 0
    reason: str = ""
    waits: bool = False


NONE_LEFT: Final = Size(reason="no candidate with a predicted gain is within the budget")


def paid_trial(
    run: GrowthRun, choose: Callable[[float], list[RankedCandidate]], batches: list[Batch]
) -> tuple[list[RankedCandidate], Size]:
    """Choose a package whose trial the overhead buys, and say for how many updates.

    A trial as long as the owner wants comes before kernels that are dear; only where it buys none
    at all it is halved, down to 50 updates.

    Args:
        run: The run.
        choose: What would be tried, given the FLOPs that its kernels may take together in a
            forward of one sample; best predicted gain first.
        batches: The batches of the last update.
    """
    if run.settings.trial == "shadow":
        chosen = choose(math.inf)[:1]
        return (chosen, paid_kernel(run, chosen[0].flops, batches)) if chosen else ([], NONE_LEFT)
    updates = min(run.settings.trial_updates, *_updates_left(run))
    while updates >= MIN_TRIAL:
        chosen = choose(_kernel_flops(run, updates, batches))
        bought = affordable_updates(run, [entry.flops for entry in chosen], batches)
        if chosen and bought >= MIN_TRIAL:
            return chosen, Size(updates=bought)
        if updates == MIN_TRIAL:
            break
        updates = max(MIN_TRIAL, updates // 2)
    wanted = choose(math.inf)
    if not wanted:
        return [], NONE_LEFT
    return [], _too_dear(run, min(entry.flops or 0.0 for entry in wanted), batches)


def paid_kernel(run: GrowthRun, flops: float | None, batches: list[Batch]) -> Size:
    """Say for how many updates one kernel can be tried; of an audition, whether it can.

    Args:
        run: The run.
        flops: FLOPs of the kernel's forward of one sample; None where they were not counted.
        batches: The batches of the last update.
    """
    if run.settings.trial == "shadow":
        is_paid = run.ledger.affordable(_least_flops(run, flops, batches))
        return Size() if is_paid else _too_dear(run, flops, batches)
    updates = affordable_updates(run, [flops], batches)
    return Size(updates=updates) if updates >= MIN_TRIAL else _too_dear(run, flops, batches)


def never_paid(run: GrowthRun) -> str | None:
    """Say why not even a kernel that takes nothing could be tried in this run, or None.

    It is asked before a twin is rehearsed or anything is ranked, which cost something as well.
    Where no horizon is known a trial may be earned in time, unless nothing ever is.
    """
    if run.ledger.overhead == 0:
        return "overhead=0 buys no trial in this run: it would take a larger one"
    if run.settings.horizon is None or not run.ledger.update_flops:
        return None
    beside = _updates_beside(run, MIN_TRIAL) * _beside_flops(run, (), [])
    if run.ledger.affordable(_least_flops(run, None, []) + beside):
        return None
    return _too_dear(run, None, [], about="more than").reason


def _kernel_flops(run: GrowthRun, updates: int, batches: list[Batch]) -> float:
    """Return what kernels may take in a forward of one sample for a trial of so many updates."""
    settings, host = run.settings, run.ledger.update_flops
    arms = 1 if settings.attribution == "none" else 2
    left = run.ledger.left_for_trials() - reading_flops(run)
    left -= updates * (arms + settings.nulls) * host
    of_kernels = left / (updates * arms)
    beside = _updates_beside(run, updates)
    slope = updates * arms + beside * (1 - run.ledger.overhead)
    if slope > 0:
        of_kernels = min(of_kernels, (left - beside * host) / slope)
    return of_kernels / (FORWARD_BACKWARD * max(1, num_samples_in(batches)))


def _updates_beside(run: GrowthRun, updates: int) -> int:
    """Return for how long the null trains on behind a trial of so many updates, where known."""
    if run.settings.attribution != "run" or run.settings.trial == "shadow":
        return 0
    return max(0, run.ledger.updates_left(run.updates) - updates)


def _beside_flops(
    run: GrowthRun, kernel_flops: Sequence[float | None], batches: list[Batch]
) -> float:
    """Return what each update of a null behind its trial takes of the overhead.

    Its FLOPs, less what the overhead earns by the kernels that train in the live run then.
    """
    added = _added_flops(kernel_flops, batches)
    return max(0.0, run.ledger.update_flops + (1 - run.ledger.overhead) * added)


def _too_dear(
    run: GrowthRun, kernel_flops: float | None, batches: list[Batch], *, about: str = "about"
) -> Size:
    """Say why not even one kernel can be tried, and what it would take.

    Args:
        run: The run.
        kernel_flops: FLOPs of its forward of one sample; None where they were not counted.
        batches: The batches of the last update.
        about: Set before the horizon that it would take.
    """
    settings, needed = run.settings, run.settings.package_updates
    if settings.horizon is not None and run.updates + needed > settings.horizon:
        left = f"too few are left of {settings.horizon}"
        return Size(reason=f"a package takes {needed} updates at least; {left}")
    if run.ledger.update.is_known and run.ledger.update_flops == 0:
        return Size(
            reason="torch counts no FLOPs in an update of this model, so that no ratio to them "
            "buys any"
        )
    least, what = _least_flops(run, kernel_flops, batches), f"trial of {MIN_TRIAL} updates"
    beside = _beside_flops(run, [kernel_flops], batches) if _updates_beside(run, 0) else 0.0
    if settings.trial == "shadow":
        what = f"audition of {settings.audition_updates} passes"
    if beside:
        what += ', and of its null to the end of the run (attribution="run")'
    bought = f"overhead={run.ledger.overhead:g} buys no {what}"
    length = run.ledger.horizon_for(least + run.ledger.spent, per_update=beside)
    if length is None:
        other = ', or attribution="trial"' if beside else ""
        return Size(reason=f"{bought} in this run: it would take a larger one{other}")
    if settings.horizon is None:
        run.awaited_flops = least
        words = f"{bought} yet: one is earned after about {length:,} updates, or by a larger one"
        return Size(reason=words, waits=True)
    cure = f"it would take a horizon of {about} {length:,} updates, or a larger overhead"
    return Size(reason=f"{bought} in this run: {cure}")


def _least_flops(run: GrowthRun, kernel_flops: float | None, batches: list[Batch]) -> float:
    """Return the FLOPs of the shortest trial of one kernel, every reading included.

    What a null takes behind it is left out.
    """
    num = run.settings.audition_updates if run.settings.trial == "shadow" else MIN_TRIAL
    return num * update_flops(run, [kernel_flops], batches) + reading_flops(run)


def update_flops(
    run: GrowthRun, kernel_flops: Sequence[float | None], batches: list[Batch]
) -> float:
    """Return the FLOPs of one update of all arms of a trial, or of both passes of an audition."""
    settings, host = run.settings, run.ledger.update_flops
    added = _added_flops(kernel_flops, batches)
    if settings.trial == "shadow":
        return 2 * (host + added)
    arms = 1 if settings.attribution == "none" else 2
    return arms * (host + added) + settings.nulls * host


def _added_flops(kernel_flops: Sequence[float | None], batches: list[Batch]) -> float:
    """Return what kernels add to an update."""
    return FORWARD_BACKWARD * num_samples_in(batches) * sum(f or 0.0 for f in kernel_flops)


def reading_flops(run: GrowthRun) -> float:
    """Return the FLOPs of the readings of the gate split that a verdict and its watch take.

    Those that look for passengers come after them, as far as the overhead still buys them.
    """
    settings = run.settings
    if settings.trial == "shadow":
        return run.ledger.reading_flops * (2 * LOOKS + LAST_READINGS + WATCH_READINGS)
    arms = (2 if settings.attribution == "none" else 3) + settings.nulls
    at_last = run.ledger.reading_flops * (LAST_READINGS + WATCH_READINGS)
    at_the_end = end_reading_flops(run) if settings.attribution == "run" else 0.0
    return arms * _averaged_flops(run) + at_last + at_the_end


def end_reading_flops(run: GrowthRun) -> float:
    """Return the FLOPs of holding the run against a null that trained beside it to its end."""
    return READINGS_AT_END * _averaged_flops(run)


def _averaged_flops(run: GrowthRun) -> float:
    """Return the FLOPs of a reading at averaged weights, renewed statistics included."""
    forwards = STATISTICS_BATCHES if any(map(has_statistics, run.model.modules())) else 0
    of_statistics = forwards * run.ledger.update_flops / FORWARD_BACKWARD
    return run.ledger.reading_flops + of_statistics


def affordable_updates(
    run: GrowthRun, kernel_flops: Sequence[float | None], batches: list[Batch]
) -> int:
    """Return for how many updates a package can be tried, at most ``trial_updates``."""
    beside = _beside_flops(run, kernel_flops, batches)
    num_beside = _updates_beside(run, 0)
    each = update_flops(run, kernel_flops, batches) - (beside if num_beside else 0.0)
    left = run.ledger.left_for_trials() - reading_flops(run) - num_beside * beside
    bought = left / each if each > 0 else math.inf
    limits = [run.settings.trial_updates, bought, *_updates_left(run)]
    return max(0, int(min(limits)))


def _updates_left(run: GrowthRun) -> list[int]:
    """Updates that are left for a trial, where the length of the run is known; else as wanted."""
    settings = run.settings
    if settings.horizon is None:
        return [settings.trial_updates]
    return [settings.horizon - run.updates - settings.hold_updates]


def is_earned(run: GrowthRun) -> bool:
    """Say whether the overhead buys a whole trial of a host by now, where no horizon is known.

    With a horizon it is known from the start what can be afforded, and less may do.
    """
    if run.settings.horizon is not None:
        return True
    is_short = run.settings.trial == "shadow"
    num = run.settings.audition_updates if is_short else run.settings.trial_updates
    wanted = num * update_flops(run, (), []) + reading_flops(run)
    return run.ledger.affordable(max(wanted, run.awaited_flops))


def too_slow(run: GrowthRun, package: Sequence[Contender], batch: Batch) -> str | None:
    """Measure what a package adds to a forward, where the budget asks for it."""
    if run.budget.latency is None or run.host_cost.parameters < run.budget.small_host:
        return None
    with run.fits.in_use():
        return run.fits.run(
            lambda: _too_slow(run, package, batch),
            lambda: Pass(
                work="ranking",
                batch=batch,
                device=device_of(run.model),
                parted=lambda cuts, _: _too_slow(run, package, rows_of(batch, *cuts[-1])),
                measure=lambda *_: None,  # what is compared are forwards of as many samples
                rules=run.update_rules,
            ),
        )


def _too_slow(run: GrowthRun, package: Sequence[Contender], batch: Batch) -> str | None:
    now_s = _forward_s(run, batch)
    host_s = now_s - (run.grafts.added_cost.latency_s or 0.0)
    with ExitStack() as stack:
        for contender in package:
            stack.enter_context(contender.layer.shadow(contender.seed_idx, contender.kernel))
        added_s = max(0.0, _forward_s(run, batch) - now_s)
    run.journal.note(
        f"a package of {len(package)} kernels adds {added_s * 1e6:.0f} us to a forward of "
        f"{now_s * 1e6:.0f} us"
    )
    for contender in package:
        contender.graft.measured_latency(added_s / len(package))
    return run.budget.check(
        host=Cost(parameters=run.host_cost.parameters, latency_s=host_s),
        candidate=Cost(parameters=0, latency_s=added_s),
        admitted=run.grafts.added_cost,
    )


def _forward_s(run: GrowthRun, batch: Batch) -> float:
    """Return the median time of a forward on the batch, in seconds, without a trace."""
    compute_loss = run.compute_loss
    assert compute_loss is not None, "nothing germinates without compute_loss"
    times = []
    apart = shadow_pass(run.model, functions=(compute_loss,), values=(batch,))
    with apart, torch.no_grad():
        for _ in range(LATENCY_REPEATS):
            synchronize()
            start = run.clock.now()
            compute_loss(run.model, batch)
            synchronize()
            times.append(run.clock.now() - start)
    return sorted(times)[LATENCY_REPEATS // 2]
