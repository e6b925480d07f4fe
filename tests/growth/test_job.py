"""Jobs: refused before anything is trained where they cannot run; trained and grown else."""

from __future__ import annotations

import pytest
import torch
from growing import GATE_X, GATE_Y, SHORT, X, Y, host, state_of
from torch import nn

from esper.contracts.errors import GrowthError
from esper.growth.job import GrowthJob, grow, suggest
from esper.growth.policies import EveryN


def loader(x, y, size=32):
    return list(zip(x.split(size), y.split(size), strict=True))


def losses(model, batch):
    x, y = batch
    return (model(x) - y).square()


def job(**changes):
    model = host()
    fields = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "train": loader(X, Y),
        "gate": loader(GATE_X, GATE_Y, 100),
        "loss": losses,
        "epochs": 6,
        "grower": {**SHORT, "policy": EveryN(20)},
    }
    return GrowthJob(**{**fields, **changes})


@pytest.mark.slow
def test_job_is_trained_and_grown():
    """The report has grafts, and the test split is read once, at the end."""
    reads = []

    class Test(list):
        def __iter__(self):
            reads.append(None)
            return super().__iter__()

    report = grow(job(test=Test(loader(GATE_X + 1, GATE_Y))))
    assert report.updates == 6 * 29
    assert report.grafts
    assert report.test_metrics["loss"] > 0
    assert len(reads) == 1


@pytest.mark.slow
def test_test_split_does_not_touch_the_decisions():
    """Random labels in the test split give the same grafts, verdicts and reasons."""
    reports = [grow(job(test=loader(GATE_X, labels))) for labels in (GATE_Y, torch.randn(400))]
    assert reports[0].test_metrics != reports[1].test_metrics
    assert reports[0].grafts == reports[1].grafts
    assert reports[0].timeline == reports[1].timeline
    assert reports[0].evaluations == reports[1].evaluations


def test_suggestion_grafts_nothing():
    """Every seed stays dormant, and the table has every site."""
    this = job()
    rows = suggest(this)
    assert {row.site for row in rows} == {"0", "1", "4"}
    assert not any("_seeds" in name for name in state_of(this.model))


def test_schedule_per_update_is_followed():
    """The scheduler steps as often as it was asked to."""
    model = host()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.99)
    this = job(model=model, optimizer=optimizer, scheduler=scheduler, schedule="update", epochs=1)
    grow(this)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.99**29)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "resnet"}, TypeError, "model=.*torch.nn.Module, got str"),
        ({"optimizer": None}, TypeError, "optimizer"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"train": []}, ValueError, "train loader gave no batch"),
        ({"gate": []}, ValueError, "gate loader gave no batch"),
        ({"schedule": "weekly"}, ValueError, "schedule"),
    ],
)
def test_job_that_cannot_run_is_refused(changes, error, words):
    """Before anything is trained, with the field and the cure."""
    with pytest.raises(error, match=words):
        job(**changes)


def test_one_shot_loader_is_refused_in_its_second_epoch():
    """A generator is empty the second time, and the message says what to give instead."""
    with pytest.raises(GrowthError, match="a generator cannot"):
        grow(job(train=iter(loader(X, Y))))


def test_loss_that_is_a_mean_is_refused():
    """The gates need one loss per sample."""
    with pytest.raises(GrowthError, match='reduction="none"'):
        grow(job(loss=lambda model, batch: losses(model, batch).mean()))


def test_model_without_a_site_is_refused():
    """There is nothing to wrap in it."""
    model = nn.Sequential(nn.PReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no"):
        grow(job(model=model, optimizer=optimizer))


def test_interrupt_ends_the_run_with_a_report():
    """Ctrl-C keeps what was found, and the report says that it was stopped."""

    class Stops(list):
        def __iter__(self):
            yield from list(super().__iter__())[:10]
            raise KeyboardInterrupt

    report = grow(job(train=Stops(loader(X, Y))))
    assert report.interrupted
    assert report.updates == 10
