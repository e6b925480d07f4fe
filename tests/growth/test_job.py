"""Jobs: refused before anything is trained where they cannot run; trained and grown else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from growing import GATE_X, GATE_Y, SHORT, X, Y, host, state_of
from torch import nn

from esper.contracts.errors import GrowthError
from esper.growth.job import GrowthJob, grow, suggest
from esper.growth.policies import EveryN, Never
from esper.growth.settings import GrowthSettings


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
    with pytest.warns(UserWarning, match="a package takes 64 updates"):
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
        ({"grower": {"triess": 2}}, TypeError, "'triess' .* did you mean tries"),
        ({"grower": {"tries": 0}}, ValueError, "tries is a count, at least 1; got 0"),
        ({"grower": {"policy": EveryN}}, TypeError, "policy is an object, got the class EveryN"),
        ({"grower": "tries"}, TypeError, "grower=.*the Grower's arguments.*got str"),
    ],
)
def test_job_that_cannot_run_is_refused(changes, error, words):
    """Before anything is trained, with the field and the cure."""
    with pytest.raises(error, match=words):
        job(**changes)


def test_unsupported_optimizer_is_refused_before_anything_is_wrapped():
    """LBFGS has one state for all parameters."""
    model = host()
    with pytest.raises(TypeError, match="LBFGS: it keeps one"):
        job(model=model, optimizer=torch.optim.LBFGS(model.parameters()))


def test_settings_of_a_job_may_be_a_value():
    """They stand for the mapping; the horizon is the job's where they have none."""
    settings = GrowthSettings(evaluate_every=10, hold_updates=7)
    with pytest.warns(UserWarning, match="horizon is 29"):
        report = grow(job(grower=settings, epochs=1))
    assert report.settings["hold_updates"] == 7
    assert report.settings["horizon"] == 29
    assert grow(job(grower=replace(settings, horizon=500), epochs=1)).settings["horizon"] == 500


def test_progress_has_everything_that_is_measured():
    """Metrics of any name and the gate loss, as at the last evaluation; the row is the Grower's."""
    rows = []

    def measured(model, batch):
        return {"perplexity": losses(model, batch).exp(), "hits": losses(model, batch) < 1}

    this = job(metrics=measured, epochs=2, grower={**SHORT, "policy": Never()})
    report = grow(this, on_progress=lambda p: rows.extend(p.rows))
    first, last = rows[0], rows[-1]
    assert first.metrics.keys() == last.metrics.keys() == {"perplexity", "hits"}
    evaluation = report.evaluations[-1]
    assert (last.gate_loss, last.metrics) == (evaluation.gate_loss, evaluation.metrics)
    assert (last.update, last.parameters) == (58, report.progress_row().parameters)
    assert report.progress_row() == last
    assert first.train_loss is not None
    assert last.train_loss == evaluation.train_loss


def test_one_shot_loader_is_refused_in_its_second_epoch():
    """One that hides a generator is empty then, and the message says what to give instead."""

    class Hides:
        def __init__(self, batches):
            self.once = iter(batches)

        def __iter__(self):
            return self.once

    with pytest.raises(GrowthError, match="a generator cannot"):
        grow(job(train=Hides(loader(X, Y))))


@pytest.mark.parametrize("name", ["train", "gate"])
def test_an_iterator_is_refused_at_the_door(name):
    """It ends for good, and both loaders are gone through again."""
    with pytest.raises(TypeError, match=f"the {name} loader is gone through more than once"):
        job(**{name: iter(loader(X, Y))})


def test_a_scheduler_that_wants_a_figure_is_refused_at_the_door():
    """A job has none for it."""
    given = job()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(given.optimizer)
    with pytest.raises(TypeError, match="ReduceLROnPlateau, which needs one"):
        replace(given, scheduler=scheduler)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ({"loss": lambda *_: 3}, r"loss=.*got 3 \(a int\)"),
        ({"metrics": lambda *_: {"acc": torch.tensor(1.0)}}, r"metrics\['acc'\]=.*shape \(\)"),
        ({"metrics": lambda *_: {"acc": "x"}}, r"metrics\['acc'\]=.*got 'x'"),
    ],
)
def test_what_a_function_of_a_job_gives_is_refused_by_its_name(function, words):
    """It is one figure a sample, and nothing of Python's or torch's own is raised."""
    with pytest.raises(GrowthError, match=words):
        grow(job(**function))


def test_metrics_that_are_no_dict_are_refused_by_their_name():
    """A list has no names for its figures."""
    with pytest.raises(TypeError, match=r"GrowthJob\(metrics=\.\.\.\) is a function to figures"):
        grow(job(metrics=lambda *_: [1]))


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
