"""How long a trial may be, and how large its package, for what growing may cost."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from esper.growth.batch import num_samples_in
from esper.growth.budget import Cost, synchronize
from esper.growth.probation import LOOKS
from esper.growth.settings import MIN_TRIAL
from esper.seeds.shadow import shadow_pass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.growth.batch import Batch
    from esper.growth.germination import Contender
    from esper.growth.run import GrowthRun

LAST_READINGS = 2
"""Readings of the gate split at a verdict beside those of averaged weights: the last iterates."""
WATCH_READINGS = 2
LATENCY_REPEATS = 9
FORWARD_BACKWARD = 3
"""A backward takes twice the products of the forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How large a trial may be.

    Attributes:
        num_kernels: Kernels of the package, the best predicted gains; 0 where none can be tried.
        updates: Updates of the trial.
        reason: Why nothing can be tried; empty where something can.
        waits: Whether more can be tried later, when it is earned.
    """

    num_kernels: int
    updates: int = 0
    reason: str = ""
    waits: bool = False


def sized(run: GrowthRun, kernel_flops: Sequence[float | None], batches: list[Batch]) -> Size:
    """Return how much of a package the overhead buys a trial of, and for how many updates.

    Args:
        run: The run.
        kernel_flops: FLOPs of a forward of one sample of each kernel, best predicted gain first;
            None where they were not counted.
        batches: The batches of the last update.
    """
    if not kernel_flops:
        return Size(num_kernels=0)
    if run.settings.trial == "shadow":
        if run.ledger.affordable(_least_flops(run, kernel_flops[:1], batches)):
            return Size(num_kernels=1)
    else:
        for num_kernels in range(len(kernel_flops), 0, -1):
            updates = affordable_updates(run, kernel_flops[:num_kernels], batches)
            if updates >= MIN_TRIAL:
                return Size(num_kernels=num_kernels, updates=updates)
    reason = _too_dear(run, kernel_flops[:1], batches)
    return Size(num_kernels=0, reason=reason, waits=run.awaited_flops > 0)


def _too_dear(run: GrowthRun, kernel_flops: Sequence[float | None], batches: list[Batch]) -> str:
    settings, needed = run.settings, run.settings.package_updates
    if settings.horizon is not None and run.updates + needed > settings.horizon:
        return f"a package takes {needed} updates at least; too few are left of {settings.horizon}"
    least = _least_flops(run, kernel_flops, batches)
    what = f"trial of {MIN_TRIAL} updates"
    if settings.trial == "shadow":
        what = f"audition of {settings.audition_updates} passes"
    bought = f"overhead={run.ledger.overhead:g} buys no {what}"
    length = run.ledger.horizon_for(least)
    if length is None:
        return f"{bought} in this run: it would take a larger one"
    if settings.horizon is None:
        run.awaited_flops = least
        return f"{bought} yet: one is earned after about {length:,} updates, or by a larger one"
    return (
        f"{bought} in this run: it would take a horizon of about {length:,} updates, or a larger "
        "overhead"
    )


def _least_flops(
    run: GrowthRun, kernel_flops: Sequence[float | None], batches: list[Batch]
) -> float:
    """Return the FLOPs of the shortest trial of a package, every reading included."""
    num = run.settings.audition_updates if run.settings.trial == "shadow" else MIN_TRIAL
    return num * update_flops(run, kernel_flops, batches) + reading_flops(run, 1)


def update_flops(
    run: GrowthRun, kernel_flops: Sequence[float | None], batches: list[Batch]
) -> float:
    """Return the FLOPs of one update of all arms of a trial, or of both passes of an audition."""
    settings, host = run.settings, run.ledger.update_flops
    added = FORWARD_BACKWARD * num_samples_in(batches) * sum(f or 0.0 for f in kernel_flops)
    if settings.trial == "shadow":
        return 2 * (host + added)
    arms = 1 if settings.attribution == "none" else 2
    return arms * (host + added) + settings.nulls * host


def reading_flops(run: GrowthRun, num_kernels: int) -> float:
    """Return the FLOPs of every reading of the gate split that a trial and its watch take."""
    settings = run.settings
    if settings.trial == "shadow":
        return run.ledger.reading_flops * (2 * LOOKS + LAST_READINGS + WATCH_READINGS)
    arms = (2 if settings.attribution == "none" else 3) + settings.nulls
    passengers = 2 * num_kernels + 2
    return run.ledger.reading_flops * (arms + LAST_READINGS + WATCH_READINGS + passengers)


def affordable_updates(
    run: GrowthRun, kernel_flops: Sequence[float | None], batches: list[Batch]
) -> int:
    """Return for how many updates a package can be tried, at most ``trial_updates``."""
    each = update_flops(run, kernel_flops, batches)
    left = run.ledger.left_for_trials() - reading_flops(run, len(kernel_flops))
    bought = left / each if each > 0 else math.inf
    limits = [run.settings.trial_updates, bought, *_updates_left(run)]
    return max(0, int(min(limits)))


def _updates_left(run: GrowthRun) -> list[int]:
    """Updates that are left for a trial in a run of known length."""
    settings = run.settings
    if settings.horizon is None:
        return []
    return [settings.horizon - run.updates - settings.hold_updates]


def is_earned(run: GrowthRun) -> bool:
    """Say whether the overhead buys a whole trial of a host by now, where no horizon is known.

    With a horizon it is known from the start what can be afforded, and less may do.
    """
    if run.settings.horizon is not None:
        return True
    is_short = run.settings.trial == "shadow"
    num = run.settings.audition_updates if is_short else run.settings.trial_updates
    wanted = num * update_flops(run, (), []) + reading_flops(run, 1)
    return run.ledger.affordable(max(wanted, run.awaited_flops))


def too_slow(run: GrowthRun, package: Sequence[Contender], batch: Batch) -> str | None:
    """Measure what a package adds to a forward, where the budget asks for it."""
    if run.budget.latency is None or run.host_cost.parameters < run.budget.small_host:
        return None
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
