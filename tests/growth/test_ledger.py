"""The ledger of work, what growing may take of it, and the training losses."""

from __future__ import annotations

import gc
import json
import weakref
from contextlib import suppress

import pytest
import torch
from growing import batches, compute_loss, growing, wrapped
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from esper.growth.batch import KEPT_BATCHES
from esper.growth.budget import count_parameters
from esper.growth.ledger import WorkLedger
from esper.growth.losses import LOSS_CHECK_EVERY, LOSS_WINDOW, SpikeLimit, TrainingLosses
from esper.growth.policies import EveryN
from esper.growth.settings import GrowthSettings
from esper.resilience.clock import ManualClock

BATCH = torch.zeros(32, 4)
UPDATE = 3200
"""FLOPs of an update on that batch."""


def a_ledger(*, updates=1, reading=70, **settings):
    """A ledger that knows what an update and a reading take, after some updates."""
    clock = settings.pop("clock", None) or ManualClock()
    ledger = WorkLedger(GrowthSettings(**{"horizon": 1000, "overhead": 0.5, **settings}), clock)
    ledger.update.learn(UPDATE, BATCH.numel())
    ledger.reading.learn(reading)
    for _ in range(updates):
        ledger.count_update([BATCH])
    return ledger


def multiply():
    """Take 2 * 8 * 4 * 2 = 128 FLOPs, and twice as many in the backward."""
    left, right = torch.ones(8, 4, requires_grad=True), torch.ones(4, 2, requires_grad=True)
    (left @ right).sum().backward()


def test_what_torch_executes_is_counted_forward_and_backward():
    """Under its category, and what the block took is known after it."""
    ledger = a_ledger(updates=0)
    with ledger.measured("trial") as work:
        multiply()
    assert work.flops == 3 * 128
    assert ledger.by_category() == {
        "training": 0.0,
        "evaluation": 0.0,
        "ranking": 0.0,
        "trial": 384.0,
        "shadow": 0.0,
    }
    assert ledger.spent == 384


def test_a_block_in_a_block_counts_once():
    """FLOPs and seconds belong to the innermost; the outer one knows both."""
    clock = ManualClock()
    ledger = a_ledger(updates=0, clock=clock)
    with ledger.measured("trial") as outer:
        clock.advance(1.0)
        multiply()
        with ledger.measured("evaluation") as inner:
            clock.advance(2.0)
            multiply()
        with ledger.reading.counted():
            clock.advance(4.0)
    assert (outer.flops, inner.flops) == (768, 384)
    assert ledger.work("evaluation") == 384 + 70
    assert ledger.work("trial") == 384 - 70
    assert ledger.seconds_by_category()["evaluation"] == 6.0
    assert ledger.seconds_by_category()["trial"] == 1.0


def test_what_a_block_took_before_it_raised_is_counted():
    """It was executed."""
    ledger = a_ledger(updates=0)
    with suppress(ZeroDivisionError), ledger.measured("ranking"):
        multiply()
        raise ZeroDivisionError
    assert ledger.work("ranking") == 384


def test_seconds_between_updates_are_of_training_but_for_what_growing_took():
    """Loading of data is among them."""
    clock = ManualClock()
    ledger = a_ledger(clock=clock)
    clock.advance(5.0)
    with ledger.timed("shadow"):
        clock.advance(2.0)
    ledger.count("trial", flops=1, seconds=1.0)
    ledger.count_update([BATCH])
    seconds = ledger.seconds_by_category()
    assert (seconds["training"], seconds["shadow"], seconds["trial"]) == (4.0, 2.0, 1.0)


def test_an_update_counts_by_the_elements_of_its_batches():
    """So that a shorter batch, or a longer sequence, counts for what it is."""
    ledger = a_ledger(updates=0)
    ledger.count_update([BATCH[:8], BATCH[:4]])
    assert ledger.work("training") == UPDATE * 12 // 32
    ledger.count_update([torch.zeros(32, 8)])
    assert ledger.work("training") == UPDATE * 12 // 32 + 2 * UPDATE
    ledger.count_update([])
    assert ledger.work("training") == UPDATE * 12 // 32 + 2 * UPDATE
    assert ledger.update_flops == round(UPDATE * (12 / 32 + 2) / 2)


def test_the_allowance_is_a_ratio_to_the_training_of_the_whole_run():
    """Of a run of known length; growing takes from it, training does not."""
    ledger = a_ledger()
    assert ledger.limit(1) == ledger.allowance_left(1) == 500 * UPDATE
    ledger.count_update([BATCH])
    ledger.count("ranking", flops=100)
    assert ledger.limit(2) == 500 * UPDATE
    assert ledger.allowance_left(2) == 500 * UPDATE - 100


def test_the_allowance_ends_as_a_ratio_to_what_training_took():
    """Though updates became cheaper than expected."""
    ledger = a_ledger(updates=1, horizon=3)
    assert ledger.limit(1) == 1.5 * UPDATE
    ledger.count_update([BATCH[:16]])
    ledger.count_update([BATCH[:16]])
    assert ledger.limit(3) == 0.5 * ledger.work("training") == UPDATE


def test_without_a_horizon_the_allowance_follows_from_the_updates():
    """So that it grows with the run, and no clock is read."""
    ledger = a_ledger(horizon=None, updates=0)
    assert ledger.limit(0) == 0
    for updates in (1, 2):
        ledger.count_update([BATCH])
        assert ledger.limit(updates) == updates * UPDATE // 2


def test_growing_may_take_more_than_training():
    """The overhead is a ratio, not a share."""
    assert a_ledger(overhead=4.0).limit(1) == 4000 * UPDATE


def test_a_trial_leaves_to_evaluations_their_fifth():
    """Of what was not read yet; what it costs otherwise it may take to the last FLOP."""
    ledger = a_ledger()
    limit = ledger.limit(1)
    assert ledger.affordable(0.8 * limit)
    assert not ledger.affordable(0.8 * limit + 1)
    ledger.scheduled = limit // 5
    ledger.count("evaluation", flops=limit // 5)
    assert ledger.affordable(0.8 * limit)
    ledger.count("trial", flops=round(0.8 * limit))
    assert ledger.affordable(0)
    assert not ledger.affordable(1)


def test_the_horizon_that_a_trial_would_take_is_told():
    """A run of that length affords it, beside both fifths; where nothing would, None."""
    ledger = a_ledger()
    needed = ledger.horizon_for(10_000 * UPDATE)
    longer = a_ledger(horizon=needed)
    assert longer.affordable(10_000 * UPDATE + 0.2 * longer.limit(1))
    assert not a_ledger(horizon=needed - 1).affordable(
        10_000 * UPDATE + 0.2 * a_ledger(horizon=needed).limit(1)
    )
    assert a_ledger(overhead=0.0).horizon_for(1) is None
    assert WorkLedger(GrowthSettings(), ManualClock()).horizon_for(1) is None


def test_after_a_change_of_the_model_the_next_piece_is_measured():
    """Until then the last figure is what is expected, and what counts."""
    ledger = a_ledger(updates=0)
    ledger.structure_changed()
    assert not ledger.update.is_known
    assert ledger.update_flops == UPDATE
    with ledger.reading.counted() as work:
        multiply()
    assert work.flops == ledger.reading_flops == 384
    with ledger.reading.counted() as work:
        pass
    assert work.flops == 384


def test_a_meter_measures_once_and_scales_by_the_batch():
    """A trial's updates cost what the first did, by element."""
    ledger = a_ledger(updates=0)
    meter = ledger.meter("trial")
    for batch in (BATCH, BATCH[:16]):
        with meter.counted([batch]):
            multiply()
    assert ledger.work("trial") == 384 + 192


def test_a_model_that_counts_nothing_affords_nothing():
    """Where torch knows none of its operations no figure is divided by."""
    ledger = a_ledger(updates=0, reading=0)
    ledger.update.learn(0, 128)
    ledger.count_update([BATCH])
    assert (ledger.limit(1), ledger.update_flops) == (0, 0)
    assert ledger.affordable(0)
    assert not ledger.affordable(1)
    assert ledger.horizon_for(1) is None
    ledger.update.learn(5, 0)
    assert ledger.update_flops == 0


@pytest.mark.parametrize(
    ("category", "figures"),
    [
        ("testing", {"flops": 1}),
        ("trial", {"flops": -1}),
        ("trial", {"seconds": float("nan")}),
        ("trial", {"flops": float("inf")}),
    ],
)
def test_work_that_nobody_could_read_is_refused(category, figures):
    """By its name."""
    with pytest.raises(ValueError, match=r"testing|flops|seconds"):
        a_ledger().count(category, **figures)


def test_counts_survive_a_round_trip():
    """A ledger with the state of another, as JSON, goes on from its counts and figures."""
    ledger, other = a_ledger(updates=3), a_ledger(updates=0)
    ledger.count("trial", flops=7, seconds=2.0)
    ledger.scheduled = 5
    ledger.structure_changed()
    other.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert other.state_dict() == ledger.state_dict()
    assert other.limit(3) == ledger.limit(3)
    assert not other.update.is_known


def counted(*, asks):
    """Return what a ledger counted of updates, which may be asked behind each of them.

    Time passes between them, growing takes some of it, and what an update takes changes.
    """
    clock = ManualClock()
    ledger = a_ledger(updates=0, clock=clock)
    for update in range(3 * KEPT_BATCHES):
        clock.advance(1.0 + update)
        ledger.count_update([BATCH[: update % 5]])
        if update == 5:
            with ledger.timed("trial"):
                clock.advance(100.0)
        if update == 11:
            ledger.update.learn(7 * UPDATE, BATCH.numel())
        if asks:
            assert ledger.by_category()["training"] > 0 or update == 0
            ledger.seconds_by_category()
    return ledger.state_dict()


def test_it_does_not_matter_when_updates_are_added_up():
    """Each by what it took when it was made, whoever asks, and none of growing's time is theirs."""
    at_the_end = counted(asks=False)
    assert at_the_end == counted(asks=True)
    updates = range(3 * KEPT_BATCHES)
    by_hand = [(1 if i < 12 else 7) * (i % 5) * UPDATE // len(BATCH) for i in updates]
    assert at_the_end["flops"]["training"] == sum(by_hand)
    assert at_the_end["seconds"]["training"] == sum(1.0 + i for i in updates if i)
    assert at_the_end["seconds"]["trial"] == 100.0


@pytest.mark.parametrize("per_update", [1, 5])
def test_batches_wait_to_be_counted_no_longer_than_recent_ones_are_held(per_update):
    """So that nobody's memory is taken for it."""
    ledger, held = a_ledger(updates=0), []
    for _ in range(2 * KEPT_BATCHES):
        batches = [torch.zeros(2, 4) for _ in range(per_update)]
        held += [weakref.ref(batch) for batch in batches]
        ledger.count_update(batches)
        del batches
        assert sum(batch() is not None for batch in held) < KEPT_BATCHES


def test_a_loss_is_news_where_it_is_not_finite_or_is_again():
    """And the first one is, for whoever goes on from another run."""
    losses, nan = TrainingLosses(), float("nan")
    news = [losses.add(loss) for loss in (2.0, 1.0, nan, float("-inf"), 1.0, torch.tensor(0.5))]
    assert [str(loss) for loss in news] == ["2.0", "None", "nan", "-inf", "1.0", "None"]


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


class Saved:
    """What a graph holds for its backward."""


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_losses_are_kept_without_their_graph(shape):
    """So that no step's activations stay in memory."""
    losses, weight, saved = TrainingLosses(), torch.ones(shape, requires_grad=True), [Saved()]
    with saved_tensors_hooks(lambda _: saved.pop(), lambda kept: kept):
        loss = weight.square()
    assert losses.add(loss) == 1.0
    assert any(type(held) is Saved for held in gc.get_objects())
    del loss
    assert not any(type(held) is Saved for held in gc.get_objects())
    assert len(losses) == 1
    losses.clear()
    assert len(losses) == 0


def test_a_loss_that_its_owner_goes_on_writing_stays_as_it_was():
    """A running sum in one tensor is another figure at each step."""
    losses, total = TrainingLosses(), torch.zeros(())
    for _ in range(3):
        total += 1
        losses.add(total)
    assert losses.mean() == 2.0


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


def test_the_horizon_that_is_told_counts_what_was_taken_already():
    """Where rankings took more than their fifth, a run of that length affords a trial beside it."""
    ledger = a_ledger()
    ledger.count("ranking", flops=500 * UPDATE)
    needed = ledger.horizon_for(100 * UPDATE)
    for horizon, buys in ((needed, True), (needed - 2, False)):
        other = a_ledger(horizon=horizon)
        other.count("ranking", flops=500 * UPDATE)
        assert other.affordable(100 * UPDATE) is buys


def test_training_counts_what_the_run_executed_with_a_kernel_that_was_auditioned():
    """FLOPs of every update, as torch counts them in the training loop itself."""
    model, optimizer = wrapped()
    settings = {"trial": "shadow", "audition_updates": 60, "ramp_updates": 4}
    grower = growing(model, optimizer, policy=EveryN(5), **settings)
    executed, before = 0, count_parameters(model)
    for batch in batches(95):
        optimizer.zero_grad()
        with FlopCounterMode(display=False) as counter:
            loss = compute_loss(model, batch)
            loss.backward()
        executed += counter.get_total_flops()
        optimizer.step()
        grower.step(loss, batch=batch)
    assert count_parameters(model) > before
    assert grower.report().work["training"] == executed
    grower.close()
