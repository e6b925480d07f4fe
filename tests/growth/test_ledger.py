"""The ledger of work, embargoes that are counted in decisions, and the training losses."""

from __future__ import annotations

import pytest
import torch

from esper.growth.embargoes import Embargoes
from esper.growth.ledger import WorkLedger
from esper.growth.losses import LOSS_CHECK_EVERY, LOSS_WINDOW, SpikeLimit, TrainingLosses
from esper.growth.settings import GrowthSettings

BATCH = torch.zeros(32, 4)


def a_ledger(**settings):
    defaults = {"audition_updates": 10, "ramp_updates": 20, "hold_updates": 30, "horizon": 1000}
    ledger = WorkLedger(GrowthSettings(**{**defaults, **settings}))
    ledger.count_update([BATCH])
    return ledger


def test_work_is_counted_by_category():
    """A forward is one a sample, a forward with its backward three."""
    ledger = a_ledger()
    ledger.count_pass("shadow", [BATCH, BATCH])
    ledger.count_forward("evaluation", 7)
    assert ledger.by_category() == {
        "training": 96.0,
        "evaluation": 7.0,
        "shadow": 192.0,
        "ranking": 0.0,
        "twins": 0.0,
    }
    assert ledger.work("shadow") == 192


def test_samples_of_an_update_are_those_of_the_last_with_batches():
    """A step without its batch does not say that an update has none."""
    ledger = a_ledger()
    ledger.count_update([BATCH[:8], BATCH[:4]])
    assert ledger.samples_per_update == 12
    ledger.count_update([])
    assert ledger.samples_per_update == 12


def test_the_allowance_is_a_share_of_the_whole_run():
    """Of a run of known length; growing takes from it, training does not."""
    ledger = a_ledger(overhead=0.5)
    assert ledger.allowance_left(1) == 1000 * 96
    ledger.count_update([BATCH])
    ledger.count_forward("ranking", 96)
    assert ledger.allowance_left(1) == 999 * 96


def test_without_a_horizon_the_allowance_follows_from_the_updates():
    """So that it grows with the run, and no clock is read."""
    ledger = a_ledger(horizon=None, overhead=0.5)
    assert [ledger.allowance_left(updates) for updates in (0, 1, 10)] == [96, 96, 960]


@pytest.mark.parametrize(
    ("verify", "num"),
    [("snapshot", 1000 // 10), ("fork", (1000 - 3 * 50) // 20)],
)
def test_auditions_are_affordable_within_the_allowance(verify, num):
    """An audition is its passes; under a fork twice as many, after three twins' updates."""
    ledger = a_ledger(overhead=0.5, verify=verify)
    assert ledger.num_affordable(1) == num
    ledger.count_forward("twins", 10**9)
    assert ledger.num_affordable(1) == 0


def test_overdrafts_are_counted():
    """One audition per graft of the budget is given although nothing is left."""
    ledger = a_ledger()
    assert ledger.num_overdrafts == 0
    ledger.count_overdraft()
    assert ledger.num_overdrafts == 1


def test_an_embargo_is_over_after_so_many_decisions():
    """For the slot and for the blueprint, at this site and at no other."""
    embargoes = Embargoes(2)
    embargoes.count_decision()
    assert not embargoes.covers("0", 1)
    embargoes.lay("0", 1, "mlp-8")
    for _ in range(2):
        embargoes.count_decision()
        assert embargoes.covers("0", 1)
        assert embargoes.covers("0", "mlp-8")
    assert not embargoes.covers("0", 0)
    assert not embargoes.covers("1", "mlp-8")
    embargoes.count_decision()
    assert not embargoes.covers("0", 1)
    assert not embargoes.covers("0", "mlp-8")


def lost(*values):
    losses = TrainingLosses()
    for value in values:
        losses.add(torch.tensor(float(value)))
    return losses


def test_the_mean_is_of_the_last_losses():
    """None before the first, and of no more than are kept."""
    assert lost().mean() is None
    assert lost(1, 2, 6).mean() == 3.0
    assert lost(1, 2, 6).mean(2) == 4.0
    assert lost(*[100] * 10, *[1] * LOSS_WINDOW).mean() == 1.0


def test_losses_are_kept_without_their_graph():
    """So that no step's activations stay in memory."""
    losses, weight = TrainingLosses(), torch.ones(1, requires_grad=True)
    losses.add(weight.sum())
    assert len(losses) == 1
    assert not losses._losses[0].requires_grad
    losses.clear()
    assert len(losses) == 0


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 0.0), (1.0, -100.0)])
def test_a_spike_is_told_whatever_the_scale_and_offset(scale, offset):
    """Above the highest by twice the range before; just below is none."""
    before = [offset + scale * value for value in (1.0, 2.0) * 10]
    limit = SpikeLimit.after(lost(*before))
    for height, spikes in ((3.9, False), (4.1, True)):
        after = lost(*[offset + scale * height] * LOSS_CHECK_EVERY)
        assert (limit.trouble(after) is not None) is spikes


def test_a_loss_that_is_not_finite_is_trouble_without_a_limit():
    """A limit needs ten losses; a NaN needs none."""
    limit = SpikeLimit.after(lost(*[1.0] * (LOSS_CHECK_EVERY - 1)))
    assert limit.limit is None
    assert limit.trouble(lost(1e9)) is None
    assert limit.trouble(lost()) is None
    assert limit.trouble(lost(float("nan"))) == "the training loss became nan"
