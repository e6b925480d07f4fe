"""What is wrong with a run is said while it can still be mended, and stands in the report."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from growing import X, compute_loss, evaluate, growing, train, wrapped
from torch.testing._internal.distributed.fake_pg import FakeStore

from esper.growth.budget import Budget
from esper.growth.flops import update_flops
from esper.growth.grower import STEPS_WITHOUT_UPDATE, Grower
from esper.growth.policies import ByHand, EveryN, Never
from esper.growth.ranking import FirstOrderGain


def poisoned(value, *, num=1):
    """The held-out measure, with some losses that are not finite."""

    def measure(model):
        losses = evaluate(model)
        losses[7 : 7 + num] = value
        return losses

    return measure


def last_line(report):
    (line,) = [line for line in str(report).splitlines() if line.startswith("Gate loss")]
    return line


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", [EveryN(5), ByHand([("0", "mlp-4x4-w32")])])
def test_held_out_loss_that_is_not_finite_is_said_at_the_first_update(value, policy):
    """The run goes on, nothing is ranked on it, and the report ends with it."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, evaluate=poisoned(value), policy=policy)
    with pytest.warns(UserWarning, match=f"loss was {value} at update 1: 1 of 400 .* sample 7"):
        train(model, optimizer, 1, grower)
    train(model, optimizer, 80, grower)
    grower.close()
    report = grower.report()
    assert not report.grafts
    assert not report.work["ranking"]
    assert f"{value} at the end" in last_line(report)
    assert str(grower.progress_row().gate_loss) == str(report.progress_row().gate_loss)
    assert str(report.progress_row().gate_loss) == str(value)
    assert json.loads(report.to_json())["not_finite"][0]["value"] == str(value)


def test_losses_of_both_infinities_are_not_a_warning_of_numpy():
    """Their mean is NaN, and it is Esper that says so."""
    model, optimizer = wrapped()

    def measure(model):
        losses = evaluate(model)
        losses[0], losses[1] = math.inf, -math.inf
        return losses, {"hits": losses}

    grower = growing(model, optimizer, evaluate=measure, policy=Never())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 1, grower)
    assert [str(w.message).partition(":")[0] for w in caught] == [
        "the gate loss was nan at update 1",
        "the hits was nan at update 1",
    ]


@pytest.mark.parametrize("trial", ["twin", "shadow"])
def test_loss_that_is_not_finite_during_a_trial_refuses_the_candidate(trial):
    """A verdict that meets it does not pass; the training does not end."""
    model, optimizer = wrapped()
    state = {"bad": False}

    def measure(model):
        return poisoned(math.nan)(model) if state["bad"] else evaluate(model)

    settings = {"policy": EveryN(5), "evaluate_every": 1000, "trial": trial}
    grower = growing(model, optimizer, evaluate=measure, **settings)
    train(model, optimizer, 12, grower)
    assert grower.stages
    state["bad"] = True
    train(model, optimizer, 60, grower, random_seed=1)
    grafts = grower.report().grafts
    assert {graft.verdict for graft in grafts} == {
        "refused in trial" if trial == "twin" else "culled at admission"
    }
    assert all("not finite" in graft.reason for graft in grafts)


def test_watch_that_reads_what_is_not_finite_is_written_down():
    """The package goes, what it brought is unknown, and the report is JSON all the same."""
    model, optimizer = wrapped()
    state = {"bad": False}

    def measure(model):
        return poisoned(math.nan, num=2)(model) if state["bad"] else evaluate(model)

    settings = {"policy": ByHand([("0", "mlp-4x4-w32")]), "evaluate_every": 1000}
    grower = growing(model, optimizer, evaluate=measure, **settings)
    train(model, optimizer, 58, grower)
    assert [status.stage.value for status in grower.stages] == ["holding"]
    state["bad"] = True
    train(model, optimizer, 10, grower, random_seed=1)
    (graft,) = grower.report().grafts
    assert graft.verdict == "rolled back"
    assert graft.dependence is None
    grower.report().to_json()


def test_figure_that_is_finite_again_says_until_when_it_was_not():
    """The end of the report is the last reading; a second time is no news."""
    model, optimizer = wrapped()
    seen = []

    def measure(model):
        seen.append(len(seen))
        return poisoned(math.nan)(model) if len(seen) in (5, 7) else evaluate(model)

    grower = growing(model, optimizer, evaluate=measure, policy=Never(), evaluate_every=1)
    with pytest.warns(UserWarning, match="gate loss was nan at update 3") as caught:
        train(model, optimizer, 8, grower)
    assert len(caught) == 1
    report = grower.report()
    assert [(n.since, n.until) for n in report.not_finite] == [(3, 4), (5, 6)]
    assert "nan" not in last_line(report)


@pytest.mark.parametrize("as_number", [False, True])
def test_training_loss_that_is_not_finite_is_said_at_its_update(as_number):
    """On the CPU reading it costs nothing, so it is read every time."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=Never())
    train(model, optimizer, 3, grower)
    bad = torch.tensor(math.nan)
    with pytest.warns(UserWarning, match="training loss was nan at update 3"):
        grower.step(float(bad) if as_number else bad, batch=torch.arange(4))
    assert "Training loss: nan at the end" in str(grower.report())


def test_model_lost_after_the_last_evaluation_is_read_once_more_at_the_end():
    """The report ends with what the model is at the end, and not with what it was."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=Never(), evaluate_every=1000)
    train(model, optimizer, 3, grower)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.warns(UserWarning, match="training loss was nan at update"):
        train(model, optimizer, 3, grower, random_seed=1)
    with pytest.warns(UserWarning, match="gate loss was nan at update"):
        grower.close()
    assert "nan at the end" in last_line(grower.report())


def test_infinite_training_data_does_not_end_a_recording():
    """Steps that are not finite are left out of the ranking, and the owner is told how many."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=EveryN(5), record_updates=4)
    train(model, optimizer, 6, grower)
    saved = X[:16].clone()
    X[:16] = math.inf
    try:
        compute_loss(model.eval(), torch.arange(16)).backward()
        optimizer.zero_grad()
    finally:
        X[:16] = saved
        model.train()
    train(model, optimizer, 8, grower, random_seed=1)
    assert any("steps recorded at 0 had values" in note for note in grower.report().notes)


def test_ranking_that_scores_nan_is_written_down_without_a_score(tmp_path):
    """A ranking of the owner's may fail in numbers; the log stays JSON and the run goes on."""

    class Broken(FirstOrderGain):
        def _score(self, site, readout):
            return math.nan, math.inf

    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=EveryN(5), ranking=Broken(), run_dir=tmp_path)
    train(model, optimizer, 20, grower)
    grower.close()
    events = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    (ranked, *_) = [event for event in events if event["kind"] == "ranked"]
    assert all(row["gain"] is None and row["reason"] for row in ranked["rows"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"horizon": 63}, "a package takes 64 updates at least .* horizon is 63"),
        ({"horizon": 83, "trial": "shadow"}, "a package takes 84 updates .* horizon is 83"),
        ({"budget": Budget(packages=0)}, "budget allows no package"),
        ({"overhead": 0.0}, "overhead=0 buys no trial; give a larger one"),
        ({"compute_loss": None}, "without compute_loss="),
        ({"evaluate": None}, "without evaluate="),
    ],
)
def test_run_that_can_never_grow_says_so_when_it_is_made(settings, words):
    """With the cure, and where the owner made it."""
    with pytest.warns(UserWarning, match=f"nothing can grow.*{words}") as caught:
        growing(*wrapped(), **settings)
    assert "growing.py" in caught[0].filename


def test_constructor_that_a_warning_ends_leaves_nothing_behind(tmp_path):
    """Where warnings are errors the log is closed and no hook of the controller stays."""
    model, optimizer = wrapped()
    with pytest.raises(UserWarning, match="nothing can grow"):
        growing(model, optimizer, horizon=5, run_dir=tmp_path)
    assert len(optimizer._optimizer_step_pre_hooks) == 1  # that of sync_optimizer
    assert (tmp_path / "events.jsonl").read_text().count("run_ended") == 1


@pytest.fixture(params=[1, 2])
def world_size(request):
    """A group of processes, of which this one is the only one that is there."""
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def test_processes_that_each_grow_by_themselves_are_told(world_size):
    """Two of a group; not one alone, nor where nothing grows."""
    model, optimizer = wrapped()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        growing(model, optimizer, policy=Never()).close()
        assert not caught
        growing(model, optimizer).close()
    said = [str(warning.message) for warning in caught]
    assert ["2 processes are in a group" in text for text in said] == [True] * (world_size == 2)


def test_policy_that_never_grows_is_not_warned_of():
    """Who asked for nothing misses nothing."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=Never(), horizon=5, evaluate=lambda _: 1.0)
    train(model, optimizer, 3, grower)


def test_steps_without_a_batch_are_said_at_the_first_update():
    """The report says it as well, and nothing is recorded."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=EveryN(5))
    loss = compute_loss(model, torch.arange(32))
    loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match=r"without batch=.*grower\.step\(loss, batch=batch\)"):
        grower.step(loss)
    assert "batch=" in str(grower.report())


def test_scalar_measure_costs_no_forward_hook():
    """Where no gate can pass there is no recording, however often the policy says yes."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=EveryN(1), evaluate=lambda m: evaluate(m).mean())
    with pytest.warns(UserWarning, match="one loss per held-out sample"):
        train(model, optimizer, 30, grower)
    assert not any(m._forward_hooks for m in model.modules())
    assert not grower.report().work["shadow"]


@pytest.mark.parametrize("end", [Grower.end_epoch, Grower.close])
def test_step_that_is_never_called_is_said(end):
    """At the end of the first epoch, or of the run."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer)
    train(model, optimizer, 3)
    with pytest.warns(UserWarning, match=r"grower\.step is never called"):
        end(grower)


def test_optimizer_that_never_steps_is_said():
    """The Grower was given another optimizer than the loop steps."""
    model, optimizer = wrapped()
    other = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grower = growing(model, optimizer)
    train(model, other, STEPS_WITHOUT_UPDATE - 1, grower)
    with pytest.warns(UserWarning, match="has made no update"):
        train(model, other, 1, grower)


def test_closing_what_was_never_used_is_no_trouble():
    """Nothing was trained, so nothing was missed."""
    growing(*wrapped()).close()


@pytest.mark.parametrize(
    "make",
    [float, lambda loss: np.float32(loss.item()), lambda loss: loss[None]],
    ids=["float", "numpy", "one element"],
)
def test_loss_may_be_a_number(make):
    """Frameworks hand out floats; the mean is the same, mixed with tensors too."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=Never())
    losses = []
    for index in range(4):
        loss = compute_loss(model, torch.arange(index, index + 16))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        grower.step(make(loss.detach()) if index % 2 else loss, batch=torch.arange(16))
    grower.end_epoch()
    assert grower._run.losses.mean() == pytest.approx(sum(losses) / 4)


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (torch.ones(32), ValueError, r"scalar, got a tensor of shape \(32,\)"),
        ({"loss": 1.0}, TypeError, "scalar tensor or a number, got dict"),
        (True, TypeError, "got bool"),
    ],
)
def test_loss_that_is_no_number_is_refused_by_name(loss, error, words):
    """The error says what was expected."""
    with pytest.raises(error, match=words):
        growing(*wrapped()).step(loss)


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (lambda m, b: compute_loss(m, b).item(), TypeError, "scalar tensor with a gradient; got"),
        (lambda m, b: compute_loss(m, b).detach(), ValueError, "got one without"),
        (lambda m, b: m(X[b]), ValueError, r"got the shape \(32,\)"),
        (lambda m, b: m(X[b], b), TypeError, "positional argument"),
    ],
    ids=["number", "detached", "per sample", "wrong call"],
)
def test_compute_loss_is_tried_at_the_first_step(function, error, words):
    """It is not found out in the middle of a run."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, compute_loss=function)
    with pytest.raises(error, match=words) as caught:
        train(model, optimizer, 1, grower)
    assert any("compute_loss was tried" in note for note in caught.value.__notes__)


def test_compute_loss_is_tried_once():
    """One forward and backward in all, and they are counted as growing."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=Never(), evaluate_every=1000)
    train(model, optimizer, 10, grower)
    update, reading = update_flops(model, compute_loss, torch.arange(32)), 400 * 2 * (4 * 4 + 4)
    assert grower.report().work["evaluation"] == update + 3 * reading
    assert grower.report().work["training"] == 10 * update


@pytest.mark.parametrize(
    ("option", "function"),
    [
        ("compute_loss", lambda model: model),
        ("evaluate", lambda model, loader: model),
        ("update", lambda model, batch: model),
    ],
)
def test_function_that_takes_other_arguments_is_refused_when_given(option, function):
    """The error names it and what it is called with."""
    with pytest.raises(TypeError, match=rf"{option} is called as {option}\(model"):
        growing(*wrapped(), **{option: function})


def test_policy_that_answers_with_a_bool_is_refused_by_name():
    """A decision has a reason, which a bool has not."""

    class Bool(EveryN):
        def decide(self, reading):
            return True

    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=Bool(5))
    with pytest.raises(TypeError, match=r"Bool\.decide returns .*; got True \(a bool\)"):
        train(model, optimizer, 1, grower)
