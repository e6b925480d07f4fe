"""Averages of a model that grows: they have its parameters at every moment, or somebody is told."""

import copy
import gc
import io
import logging
import weakref

import pytest
import torch
from growing import batches, compute_loss, growing
from growing import wrapped as growing_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper
from esper.continuity.snapshot import RunSnapshot
from esper.growth.policies import ByHand


def model():
    torch.manual_seed(0)
    return esper.wrap(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))


def kernel(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4))


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def averaged_model(live, **settings):
    return AveragedModel(live, multi_avg_fn=get_ema_multi_avg_fn(0.5), **settings)


def by_zip(average, live):
    with torch.no_grad():
        for mean, p in zip(average.parameters(), live.parameters(), strict=True):
            mean.lerp_(p, 0.5)


def by_name(average, live):
    values = live.state_dict()
    with torch.no_grad():
        for name, mean in average.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(values[name], 0.5)


KINDS = {
    "averaged-model": (averaged_model, lambda average, live: average.update_parameters(live)),
    "with-buffers": (
        lambda live: averaged_model(live, use_buffers=True),
        lambda average, live: average.update_parameters(live),
    ),
    "by-zip": (copy.deepcopy, by_zip),
    "by-name": (copy.deepcopy, by_name),
}


def assert_in_step(average, live):
    inner = getattr(average, "module", average)
    mine, theirs = dict(inner.named_parameters()), dict(live.named_parameters())
    assert list(mine) == list(theirs)
    assert [p.shape for p in mine.values()] == [p.shape for p in theirs.values()]
    assert list(inner.state_dict()) == list(live.state_dict())


def graft(layer, seed_idx=0, alpha=1.0, of=kernel):
    layer.graft(seed_idx, of(), alpha=alpha, guard="off", example=X)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_has_every_change_of_the_model(kind):
    """Grafts, alphas, a graft in another's place, order of slots, unloading: pair by pair."""
    live = model().eval()
    make, update = KINDS[kind]
    average = esper.follow(live, make(live)).eval()
    changes = (
        lambda: graft(live[0], alpha=0.0),
        lambda: live[0].set_alpha(0, 0.25),
        lambda: live[0].set_alpha(0, 1.0),
        lambda: graft(live[2], 1),
        lambda: graft(live[2], 0),
        lambda: graft(live[2], 1, of=lambda: kernel(16)),
        lambda: live[0].unload_kernel(0),
        lambda: graft(live[0], 3),
    )
    for change in changes:
        change()
        assert_in_step(average, live)
        for _ in range(40):  # the model stands still, so that its average becomes the model
            update(average, live)
        assert torch.allclose(average(X), live(X), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_keeps_what_it_has_averaged(kind):
    """A kernel's average begins at its appearance, and is an average from then on."""
    live = model()
    make, update = KINDS[kind]
    average = esper.follow(live, make(live))
    update(average, live)
    graft(live[0])
    inner = getattr(average, "module", average)
    first = live[0].seed_kernel(0)[0].weight.detach().clone()
    assert torch.equal(inner[0].seed_kernel(0)[0].weight, first)
    with torch.no_grad():
        live[0].seed_kernel(0)[0].weight.add_(1.0)
    live[0].set_alpha(0, 0.5)
    update(average, live)
    assert torch.allclose(inner[0].seed_kernel(0)[0].weight, first + 0.5)
    assert inner[0].alpha(0) == 0.5


def test_an_average_is_saved_and_restored():
    """Averaging bytes rounds them down; what a file's kernels are built by is not spoilt."""
    live = model()
    average = AveragedModel(live, avg_fn=lambda a, p, _: 0.9 * a + 0.1 * p, use_buffers=True)
    esper.follow(live, average)
    graft(live[0], of=lambda: nn.Linear(4, 4))
    for _ in range(30):
        average.update_parameters(live)
    assert torch.equal(
        average.state_dict()["module.0._seeds.0.structure"],
        live.state_dict()["0._seeds.0.structure"],
    )


def test_a_fold_is_made_in_the_average_too():
    """With its own averaged kernel and host: the average's function stays what it was."""
    live = model().eval()
    average = esper.follow(live, copy.deepcopy(live))
    live[0].graft(0, nn.Linear(4, 4), alpha=0.5, example=X)
    with torch.no_grad():
        average[0].weight.add_(0.1)
        average[0].seed_kernel(0).weight.add_(0.1)
    before = average(X)
    assert live[0].fossilize(0).folded
    assert_in_step(average, live)
    assert torch.allclose(before, average(X), atol=1e-5)


def test_a_fossil_that_is_not_folded_stays():
    """It is one in the average as well."""
    live = model()
    average = esper.follow(live, copy.deepcopy(live))
    graft(live[0])
    assert not live[0].fossilize(0).folded
    assert_in_step(average, live)
    assert average[0].state_layout.state(0) == esper.SeedLifecycleState.FOSSILIZED


def test_an_isolated_kernel_keeps_its_average():
    """It goes with the model's, and comes back as it was averaged, not as it was born."""
    live = model()
    average = esper.follow(live, copy.deepcopy(live))
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    esper.sync_optimizer(live, optimizer)
    graft(live[0])
    esper.sync_optimizer(live, optimizer)
    live[0].set_guard(0, "step")
    with torch.no_grad():
        average[0].seed_kernel(0)[0].weight.fill_(7.0)
    spoil = live[0].seed_kernel(0).register_forward_hook(lambda *call: call[2] * torch.inf)
    live(X).sum().backward()
    optimizer.step()
    spoil.remove()
    assert_in_step(average, live)
    assert not any("_seeds" in name for name, _ in average.named_parameters())
    for _ in range(60):
        esper.maintain(live)
    assert live[0].state_layout.contributes(0)
    assert_in_step(average, live)
    assert bool((average[0].seed_kernel(0)[0].weight == 7.0).all())


def test_an_average_of_another_dtype_and_mode_keeps_them():
    """A kernel joins it as its host is there."""
    live = model()
    average = esper.follow(live, copy.deepcopy(live).double().eval().requires_grad_(False))
    graft(live[0])
    joined = average[0].seed_kernel(0)[0].weight
    assert (joined.dtype, joined.requires_grad) == (torch.float64, False)
    assert not average[0].seed_kernel(0).training
    assert average(X.double()).isfinite().all()


def test_kernels_that_were_there_first_are_made_up_for():
    """Following may begin late: the average gets what it lacks."""
    live = model()
    averages = [copy.deepcopy(live), averaged_model(live)]
    graft(live[0])
    for average in averages:
        esper.follow(live, average)
        assert_in_step(average, live)
    graft(live[2])
    assert all(assert_in_step(average, live) is None for average in averages)


@pytest.mark.parametrize("trial", ["twin", "shadow"])
def test_a_run_and_its_average_are_in_step_at_every_update(trial, caplog):
    """Through trial, taking over, watch and verdict; nobody has to be warned of twins."""
    live, optimizer = growing_model()
    average = esper.follow(live, averaged_model(live))
    grower = growing(live, optimizer, policy=ByHand([("0", "mlp-4x4-w32")]), trial=trial)
    for batch in batches(110):
        loss = compute_loss(live, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grower.step(loss, batch=batch)
        assert_in_step(average, live)
        average.update_parameters(live)
        assert average.module[0].alpha(0) == live[0].alpha(0)
    grower.close()
    assert_in_step(average, live)
    assert grower.report().grafts[0].admitted_at is not None
    assert "copy of the model" not in caplog.text


def test_a_snapshot_has_the_average():
    """Updates that a run takes back are taken out of its average."""
    live = model()
    average = esper.follow(live, copy.deepcopy(live))
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    before = average[0].weight.detach().clone()
    snapshot = RunSnapshot(live, optimizer, update=0)
    with torch.no_grad():
        average[0].weight.fill_(9.0)
    snapshot.restore(optimizer)
    assert torch.equal(average[0].weight, before)


def hand_graft(live):
    optimizer = torch.optim.SGD(live.parameters(), lr=0.1)
    graft(live[0])
    esper.sync_optimizer(live, optimizer)
    esper.sync_optimizer(live, optimizer)


@pytest.mark.parametrize("make", [copy.deepcopy, averaged_model], ids=["copy", "averaged-model"])
def test_a_copy_that_does_not_follow_is_told_of(make, caplog):
    """When parameters appear, once, with the cure."""
    live = model()
    average = make(live)
    hand_graft(live)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "esper.follow(model, averaged)" in record.getMessage()
    assert average is not None


@pytest.mark.parametrize(
    "make",
    [lambda live: esper.follow(live, copy.deepcopy(live)), lambda _: None],
    ids=["follows", "none"],
)
def test_nobody_is_told_without_need(make, caplog):
    """Neither where every copy follows, nor where there is none any more."""
    live = model()
    copy.deepcopy(live)
    gc.collect()
    average = make(live)
    hand_graft(live)
    assert not caplog.records
    del average


def test_copies_of_a_followed_model_are_followed_by_nobody():
    """A copy, or a file, of a model has no average, and leaves that of the model alone."""
    live = model()
    average = esper.follow(live, copy.deepcopy(live))
    other = copy.deepcopy(live)
    file = io.BytesIO()
    torch.save(live, file)
    file.seek(0)
    for one in (other, torch.load(file, weights_only=False)):
        graft(one[0])
        assert_in_step(average, live)


def test_an_average_is_not_kept_alive():
    """Nor is the model hindered by one that has gone."""
    live = model()
    average = esper.follow(live, copy.deepcopy(live))
    gone = weakref.ref(average)
    del average
    gc.collect()
    assert gone() is None
    graft(live[0])


@pytest.mark.parametrize(
    ("average", "error", "words"),
    [
        ({"0.weight": torch.zeros(4, 4)}, TypeError, "got dict"),
        (nn.Linear(4, 4), ValueError, "only one of them has 0, 1, 2"),
        (esper.wrap(nn.Sequential(nn.Linear(4, 4))), ValueError, "only one of them has 1, 2"),
    ],
    ids=["dict", "not-wrapped", "another"],
)
def test_what_is_no_average_of_the_model_is_refused(average, error, words):
    """The error says what does not match."""
    with pytest.raises(error, match=words):
        esper.follow(model(), average)
