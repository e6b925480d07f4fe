"""The controller: what it leaves alone, what it admits, what it takes back, and what it says."""

from __future__ import annotations

import html
import time
from contextlib import nullcontext

import pytest
import torch
from growing import (
    SHORT,
    compute_loss,
    equal_states,
    evaluate,
    growing,
    host,
    state_of,
    train,
    wrapped,
)
from replay_checks import in_a_log
from torch import nn

from esper.bus.in_process import EventBus
from esper.contracts.errors import GrowthError
from esper.contracts.lifecycle import GraftStage
from esper.growth.budget import Budget
from esper.growth.flops import update_flops
from esper.growth.grower import Grower
from esper.growth.policies import ByHand, EveryN, Never
from esper.observability.event_log import read_events
from esper.observability.replay import replay
from esper.observability.report_page import run_page
from esper.wrapping.unwrap import unwrap
from esper.wrapping.wrap import layers

BY_HAND = [("0", "mlp-4x4-w32")]
UNTIL_HELD = {
    "twin": 5 + SHORT["trial_updates"] + 4,
    "shadow": 2 + SHORT["audition_updates"] + SHORT["ramp_updates"] + 6,
}
"""Updates after which a kernel named by hand is in the model, by kind of trial."""


TRIALS = ["twin", pytest.param("shadow", marks=pytest.mark.slow)]


def verdicts(grower):
    return [graft.verdict for graft in grower.report().grafts]


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "random_seed",
    [pytest.param(n, marks=pytest.mark.slow if n < 2 else pytest.mark.torture) for n in range(5)],
)
def test_audition_leaves_no_trace(optimizer_class, dropout, random_seed):
    """A run whose candidates were all refused is bit-equal to one that never grafted."""
    finals, statistics = [], []
    for grows in (False, True):
        model, optimizer = wrapped(random_seed, dropout=dropout, optimizer_class=optimizer_class)
        torch.manual_seed(random_seed)
        settings = {"policy": EveryN(5), "trial": "shadow", "audition_updates": 30}
        grower = growing(model, optimizer, min_effect=1e9, **settings) if grows else None
        train(model, optimizer, 80, grower, random_seed)
        if grower is not None:
            assert "culled at admission" in verdicts(grower)
            grower.close()
        finals.append(state_of(model))
        statistics.append(torch.get_rng_state())
    assert equal_states(*finals)
    assert torch.equal(*statistics)


@pytest.mark.parametrize("trial", TRIALS)
def test_admitted_graft_does_leave_a_trace(trial):
    """The control of the test above: once a kernel is admitted the run is another one."""
    finals = []
    for min_effect in (1e9, 0.0):
        model, optimizer = wrapped()
        settings = {"policy": ByHand(BY_HAND), "min_effect": min_effect, "trial": trial}
        with growing(model, optimizer, **settings) as grower:
            train(model, optimizer, 75, grower)
        finals.append({k: v for k, v in state_of(model).items() if "_seeds" not in k})
    assert not equal_states(*finals)


@pytest.mark.slow
@pytest.mark.parametrize("trial", ["twin", "shadow"])
def test_useful_kernel_is_fossilized_and_lowers_the_held_out_loss(trial):
    """On a task that the host cannot solve, a package passes its trial and its watch, and helps."""
    losses = {}
    for grows in (False, True):
        model, optimizer = wrapped()
        settings = {"policy": EveryN(20), "trial": trial, "attribution": "trial"}
        grower = growing(model, optimizer, **settings) if grows else None
        train(model, optimizer, 300, grower)
        if grower is not None:
            grower.close()
            fossils = [g for g in grower.report().grafts if g.stage is GraftStage.FOSSILIZED]
            checked = fossils if trial == "twin" else fossils[:1]  # no passenger leaves an audition
            assert checked
            assert all(g.dependence is not None and g.dependence > 0 for g in checked)
            assert trial == "shadow" or grower.report().trials[0].capacity_shown
        model.eval()
        with torch.no_grad():
            losses[grows] = float(evaluate(model).mean())
    assert losses[True] < 0.8 * losses[False]


@pytest.mark.parametrize(
    ("min_effect", "words"),
    [(1e9, "came to a gate was dropped: "), (0.0, "came to a gate was kept.")],
)
def test_a_shadow_run_says_what_became_of_its_kernel(min_effect, words):
    """In the same words in the terminal and on its page; and no package is spoken of."""
    model, optimizer = wrapped()
    settings = {"audition_updates": 30, "ramp_updates": 4, "hold_updates": 4}
    settings |= {"trial": "shadow", "min_effect": min_effect}
    with growing(model, optimizer, policy=ByHand(BY_HAND), **settings) as grower:
        train(model, optimizer, 45, grower)
    report = grower.report()
    (graft,) = report.grafts
    assert graft.package is None
    assert f"The one kernel that {words}" in str(report)
    assert "package" not in str(report).partition(". ")[0]
    assert html.escape(f"The one kernel that {words}") in run_page(report)


@pytest.mark.parametrize("trial", TRIALS)
def test_kernel_parameters_join_the_group_of_their_host_and_leave_with_it(trial):
    """While a graft is in the model its parameters are the optimizer's; afterwards nothing is."""
    model, optimizer = wrapped()
    before = {id(p) for p in optimizer.param_groups[0]["params"]}
    settings = {"policy": ByHand(BY_HAND), "trial": trial, "hold_updates": 50}
    grower = growing(model, optimizer, **settings)
    train(model, optimizer, UNTIL_HELD[trial], grower)
    kernels = [p for name, p in model.named_parameters() if "_seeds" in name]
    assert kernels
    assert {id(p) for p in kernels} < {id(p) for p in optimizer.param_groups[0]["params"]}
    assert all("exp_avg" in optimizer.state[p] for p in kernels)
    spoil(model)
    with pytest.warns(UserWarning, match="loss was nan at update"):
        train(model, optimizer, 10, grower, random_seed=1)
    grower.close()
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == before
    assert all(p not in optimizer.state for p in kernels)
    assert not any("_seeds" in name for name, _ in model.named_parameters())


def spoil(model):
    with torch.no_grad():
        model[4].weight.fill_(float("nan"))


def test_close_leaves_no_hook_of_the_controller():
    """After close the optimizer has the hook of sync_optimizer, and the model has none."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=EveryN(5), min_effect=1e9)
    train(model, optimizer, 7, grower)
    assert any(m._forward_hooks for m in model.modules())  # it records
    grower.close()
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    assert not optimizer._optimizer_step_post_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("trial", TRIALS)
def test_poisoned_run_goes_back_to_the_admission(trial):
    """A loss that is not finite after it restores the snapshot and counts what it cost."""
    model, optimizer = wrapped()
    settings = {"policy": ByHand(BY_HAND), "trial": trial, "hold_updates": 200}
    grower = growing(model, optimizer, **settings)
    train(model, optimizer, UNTIL_HELD[trial], grower)
    (status,) = grower.stages
    assert (status.site, status.seed_idx) == ("0", 0)
    assert status.stage is GraftStage.HOLDING
    assert str(status) == "0.0 holding"
    spoil(model)
    with pytest.warns(UserWarning, match="loss was nan at update"):
        train(model, optimizer, 10, grower, random_seed=1)
    graft = grower.report().grafts[0]
    assert graft.verdict == ("rolled back" if trial == "twin" else "culled after admission")
    assert 0 < graft.updates_lost <= 40
    assert "training loss became nan" in graft.reason
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        (lambda m: evaluate(m).mean(), "no per-sample losses"),
        (lambda m: evaluate(m)[:299], "299 samples, at least 300"),
    ],
)
def test_measure_that_cannot_tell_gain_from_luck_costs_nothing(measure, words):
    """Nothing is ranked or auditioned on it, and the owner is told why at the first update."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, evaluate=measure, policy=EveryN(5))
    with pytest.warns(UserWarning, match=words):
        train(model, optimizer, 1, grower)
    train(model, optimizer, 60, grower)
    report = grower.report()
    assert not report.grafts
    assert not report.work["ranking"]
    assert any(words in note for note in report.notes)


def test_shuffling_loader_is_refused():
    """Per-sample losses in another order every time make paired tests meaningless."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, evaluate=lambda m: evaluate(m)[torch.randperm(400)])
    with pytest.raises(GrowthError, match="your loader shuffles"):
        train(model, optimizer, 2, grower)


def test_without_compute_loss_it_only_advises():
    """The ranking is in the log, nothing is grafted, and the owner is told once."""
    events = []

    class Sink:
        def publish(self, event):
            events.append(event)

    model, optimizer = wrapped()
    with pytest.warns(UserWarning, match="without compute_loss="):
        grower = growing(model, optimizer, compute_loss=None, policy=EveryN(5), sink=Sink())
    train(model, optimizer, 40, grower)
    assert not grower.report().grafts
    assert [e.kind for e in events].count("ranked") == 1
    assert sum("nothing is grafted" in note for note in grower.report().notes) == 1


def test_a_yes_that_nothing_comes_of_is_told_once():
    """A policy that says yes at every update, and to which nothing is done, is in the log once."""
    events = []

    class Sink:
        def publish(self, event):
            events.append(event)

    model, optimizer = wrapped()
    options = {"policy": EveryN(5), "budget": Budget(packages=0), "sink": Sink()}
    with pytest.warns(UserWarning, match="the budget allows no package"):
        grower = growing(model, optimizer, evaluate_every=1000, **options)
    train(model, optimizer, 40, grower)
    grower.close()
    assert [e.update for e in events if e.kind == "detected" and e.grow] == [5]


def test_what_a_bus_given_as_sink_is_behind_with_is_there_after_close():
    """A bus of one's own takes events on threads of its own; the end of a run waits for them."""

    class Slow:
        is_slow = True

        def __init__(self):
            self.kinds = []

        def publish(self, event):
            time.sleep(0.02)
            self.kinds.append(event.kind)

    model, optimizer = wrapped()
    slow = Slow()
    grower = growing(model, optimizer, sink=EventBus([slow]), evaluate_every=2)
    train(model, optimizer, 20, grower)
    grower.close()
    assert slow.kinds[-1] == "run_ended"


def test_suggestion_changes_nothing():
    """suggest() ranks sites and kernels; weights, moments and the random state stay."""
    model, optimizer = wrapped(dropout=0.3)
    grower = growing(model, optimizer)
    train(model, optimizer, 30, grower)
    before, random_state = state_of(model), torch.get_rng_state()
    grads = [p.grad.clone() for p in model.parameters()]
    rows = grower.suggest()
    assert {row.site for row in rows} == {"0", "1", "4"}
    assert rows[0].gain >= rows[1].gain
    assert all(row.parameters > 0 and row.latency_us > 0 for row in rows)
    assert equal_states(before, state_of(model))
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))


def test_a_run_grows_as_if_nobody_had_asked_for_a_suggestion():
    """What suggest() takes is not taken off what trials may: package and length are the same."""

    def trials(*, asks):
        model, optimizer = wrapped()
        options = {"policy": EveryN(30), "overhead": 10.0, "horizon": 300, "trial_updates": 200}
        grower = growing(model, optimizer, **options)
        train(model, optimizer, 20, grower)
        if asks:
            grower.suggest()
        train(model, optimizer, 40, grower)
        told = grower.report()
        return [(t.blueprints, t.trial_updates) for t in told.trials], told.work["ranking"]

    (quiet, ranking), (asked, with_suggestion) = trials(asks=False), trials(asks=True)
    assert len(quiet) == 1
    assert quiet[0][1] < 200, "the overhead decides on the length"
    assert asked == quiet
    assert with_suggestion > ranking


def test_what_a_suggestion_takes_beyond_the_limit_is_told():
    """The owner asked for it, so the limit does not hold it; the report says where it went."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=Never(), overhead=2.0, horizon=60)
    train(model, optimizer, 60, grower)
    before = grower.report()
    assert before.overhead <= before.overhead_limit
    assert "suggest()" not in str(before)
    grower.suggest()
    report = grower.report()
    assert report.overhead > report.overhead_limit
    assert "and the ranking of each suggest())" in str(report)


def test_suggestion_after_close_is_that_of_before():
    """The with-block may be over; once the seeds are gone it says so."""
    model, optimizer = wrapped()
    with growing(model, optimizer) as grower:
        train(model, optimizer, 12, grower)
        before = [(row.site, row.blueprint, row.gain) for row in grower.suggest()]
    assert [(row.site, row.blueprint, row.gain) for row in grower.suggest()] == before
    unwrap(model)
    with pytest.raises(GrowthError, match=r"before esper\.unwrap"):
        grower.suggest()


def test_suggestion_needs_a_batch():
    """Without a batch there is nothing to rank on, and the cure is named."""
    grower = growing(*wrapped())
    with pytest.raises(GrowthError, match=r"step\(loss, batch=batch\)"):
        grower.suggest()


def test_micro_batches_are_one_update():
    """step() may be called per micro-batch; only optimizer updates count."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=ByHand(BY_HAND))
    for index in range(100):
        batch = torch.arange(index, index + 32)
        loss = compute_loss(model, batch)
        (loss / 2).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
        grower.step(loss, batch=batch)
    assert grower.updates == 50
    each = update_flops(host(), compute_loss, torch.arange(32))
    assert grower.report().work["training"] == 100 * each


def test_batch_must_not_be_missing_under_way():
    """A step without its batch while a graft is under way is an error, not a silent gap."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=EveryN(5))
    train(model, optimizer, 15, grower)
    loss = compute_loss(model, torch.arange(32))
    loss.backward()
    optimizer.step()
    with pytest.raises(GrowthError, match="without batch="):
        grower.step(loss)


def test_a_line_is_printed_behind_each_look(capsys):
    """``on_progress=print`` is all that a loop of one's own needs, and it is off by default."""
    model, optimizer = wrapped()
    with growing(model, optimizer, policy=Never(), on_progress=print) as grower:
        train(model, optimizer, 12, grower)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["run at update 1", "run at update 11"]
    assert "gate loss" in lines[-1]
    assert lines[-1].endswith("33 parameters, dormant")


def test_a_line_is_told_where_a_graft_comes_to_another_stage():
    """Between two looks as well: the package by which a run tries to grow is named."""
    model, optimizer, told = *wrapped(), []
    with growing(
        model, optimizer, policy=EveryN(5), evaluate_every=100, on_progress=told.append
    ) as grower:
        train(model, optimizer, 10, grower)
        assert "in trial in a twin" in str(told[-1])


def test_on_progress_that_raises_ends_no_run():
    """It is called once, the run goes on, and a note says why nothing more was told."""
    model, optimizer, calls = *wrapped(), []

    def fail(row):
        calls.append(row)
        raise OSError("the terminal is gone")

    with growing(model, optimizer, policy=Never(), on_progress=fail) as grower:
        train(model, optimizer, 12, grower)
    assert len(calls) == 1
    assert any("the terminal is gone" in note for note in grower.report().notes)


@pytest.mark.slow
@pytest.mark.parametrize("trial", ["twin", pytest.param("shadow", marks=pytest.mark.torture)])
def test_log_replays_the_run(tmp_path, trial):
    """events.jsonl is enough to tell which kernel stands where, and all else that it can know."""
    model, optimizer = wrapped()
    with growing(model, optimizer, policy=EveryN(20), run_dir=tmp_path, trial=trial) as grower:
        train(model, optimizer, 250, grower)
    replayed = replay(read_events(tmp_path / "events.jsonl"))
    assert in_a_log(replayed.report) == in_a_log(grower.report())
    told = {
        (site, seed.seed_idx, seed.artifact_id, 1.0 if seed.alpha is None else seed.alpha)
        for site, seeds in replayed.structure.items()
        for seed in seeds
        if not seed.folded
    }
    assert told
    assert told == {
        (name, seed["seed"], seed["artifact_id"], layer.alpha(seed["seed"]))
        for name, layer in layers(model).items()
        for seed in layer.structure()
    }


@pytest.mark.slow
def test_same_random_seed_gives_the_same_log(tmp_path):
    """Two runs write the same events, their time and the name of the run aside."""
    logs = []
    for name in ("one", "other"):
        model, optimizer = wrapped()
        with growing(model, optimizer, policy=EveryN(20), run_dir=tmp_path / name) as grower:
            train(model, optimizer, 120, grower)
        logs.append(without_time(tmp_path / name / "events.jsonl"))
    assert logs[0] == logs[1]
    assert len(logs[0]) > 10


def without_time(path):
    import json

    return [
        {k: v for k, v in json.loads(line).items() if k not in ("time_s", "run_id", "id")}
        for line in path.read_text().splitlines()
    ]


def test_budget_bounds_the_packages():
    """No more are taken over than the budget has, and the owner is told."""
    model, optimizer = wrapped()
    settings = {"policy": ByHand([*BY_HAND, ("4", "mlp-4x1-w32")])}
    grower = growing(model, optimizer, budget=Budget(packages=1), **settings)
    train(model, optimizer, 80, grower)
    assert [g.admitted_at is not None for g in grower.report().grafts] == [True]
    assert any("budget's 1 packages" in note for note in grower.report().notes)


@pytest.mark.slow
def test_grown_model_unwraps_to_plain_torch():
    """After close the model is plain PyTorch that computes the same."""
    model, optimizer = wrapped()
    with growing(model, optimizer, policy=EveryN(20)) as grower:
        train(model, optimizer, 250, grower)
    model.eval()
    with torch.no_grad():
        before = evaluate(model)
        after = evaluate(unwrap(model))
    assert torch.allclose(before, after, rtol=1e-6, atol=1e-7)
    assert not any(type(m).__module__.startswith("esper") for m in model.modules())


def test_model_without_seeds_is_refused():
    """The error names the call that is missing."""
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"esper\.wrap"):
        Grower(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_unsupported_optimizer_is_refused():
    """LBFGS has one state for all parameters."""
    model, _ = wrapped()
    with pytest.raises(TypeError, match="LBFGS: it keeps one"):
        Grower(model, torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("audition_updates", 0), ("trial", "hope"), ("horizon", 0), ("trial_updates", 49)],
)
def test_settings_out_of_range_are_refused(setting, value):
    """The error names the setting and what it may be."""
    with pytest.raises(ValueError, match=setting):
        growing(*wrapped(), **{setting: value})


def test_unknown_site_by_hand_is_refused():
    """Before anything is trained; the error lists the sites there are."""
    with pytest.raises(GrowthError, match="its sites: 0, 1, 4"):
        growing(*wrapped(), policy=ByHand([("7", "mlp-4x4-w32")]))


@pytest.mark.parametrize("trial", TRIALS)
def test_kernel_that_fails_under_watch_is_culled(trial):
    """Its calls cost its own contribution, it is isolated, and the graft is removed."""
    model, optimizer = wrapped()
    settings = {"policy": ByHand(BY_HAND), "trial": trial, "hold_updates": 200}
    grower = growing(model, optimizer, **settings)
    train(model, optimizer, UNTIL_HELD[trial], grower)
    kernel = layers(model)["0"].seed_kernel(0)

    def fail(_x):
        raise RuntimeError

    kernel.forward = fail
    train(model, optimizer, 10, grower, random_seed=1)
    graft = grower.report().grafts[0]
    assert graft.verdict == ("rolled back" if trial == "twin" else "culled after admission")
    assert ("isolated" if trial == "twin" else "ERROR_RECOVERY") in graft.reason
    train(model, optimizer, 5, grower, random_seed=2)


@pytest.mark.parametrize("trial", TRIALS)
def test_what_the_overhead_does_not_buy_is_not_begun(trial):
    """The run says once what it would take, and is left alone."""
    model, optimizer = wrapped()
    by_hand = ByHand([("0", "mlp-4x4-w32")])
    settings = {"policy": by_hand, "overhead": 0.5, "horizon": 200, "trial": trial}
    grower = growing(model, optimizer, **settings)
    train(model, optimizer, 60, grower)
    report = grower.report()
    assert not report.grafts
    assert report.work["trial" if trial == "shadow" else "shadow"] == 0.0
    (note,) = [note for note in report.notes if note.startswith("overhead=0.5 buys no ")]
    assert "it would take a horizon of more than" in note


@pytest.mark.filterwarnings("ignore:nothing can grow. overhead=0")
@pytest.mark.parametrize(
    "settings", [{"overhead": 0.0}, {"overhead": 0.0, "horizon": 300}, {"horizon": 300}]
)
def test_an_overhead_that_buys_nothing_costs_one_pass_and_the_first_readings(settings):
    """They tell what things take; nothing is ranked, and no twin is rehearsed."""
    model, optimizer = wrapped()
    options = {"policy": EveryN(5), "overhead": 0.01, **settings}
    grower = growing(model, optimizer, **options)
    train(model, optimizer, 30, grower)
    grower.close()
    report, ledger = grower.report(), grower._run.ledger
    assert {name for name, flops in report.work.items() if flops} == {"training", "evaluation"}
    assert report.work["evaluation"] == ledger.update_flops + 3 * ledger.reading_flops
    assert "(whatever the limit, " in str(report)


@pytest.mark.parametrize("trial", TRIALS)
def test_without_a_horizon_a_trial_waits_until_it_is_earned(trial):
    """What the owner named comes when what it takes has been earned by training."""
    model, optimizer = wrapped()
    settings = {"policy": ByHand([("0", "mlp-4x4-w32")]), "trial": trial, "overhead": 120.0}
    grower = growing(model, optimizer, evaluate_every=1000, **settings)
    train(model, optimizer, 60, grower)
    (graft,) = grower.report().grafts
    assert graft.germinated_at > 10
    assert sum("yet: one is earned after about" in n for n in grower.report().notes) == 1


def test_advice_needs_no_batch():
    """Without compute_loss the batch is not asked for either."""
    model, optimizer = wrapped()
    with pytest.warns(UserWarning, match="without compute_loss="):
        grower = growing(model, optimizer, compute_loss=None, policy=EveryN(5))
    for index in range(20):
        loss = compute_loss(model, torch.arange(index, index + 32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grower.step(loss)
    assert not grower.report().grafts


def test_dropped_step_leaves_no_batch_behind():
    """A step whose gradients were thrown away is no update, and its batch is not the next one's."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=ByHand(BY_HAND), update=one_update)
    train(model, optimizer, 40, grower)
    assert grower.stages
    loss = compute_loss(model, torch.arange(32))
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    grower.step(loss, batch=torch.arange(32))
    train(model, optimizer, 3, grower)


def one_update(model, optimizer, batch):
    optimizer.zero_grad()
    compute_loss(model, batch).backward()
    optimizer.step()


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize("error", [ZeroDivisionError("by you"), KeyboardInterrupt()])
def test_close_does_not_raise_what_fails_in_it(error, trial):
    """Where the measure fails at the end the kernel goes all the same, with every hook; it is said.

    Ctrl-C is nobody's failure: it comes out, after everything was taken away.
    """
    model, optimizer = wrapped()
    fails = []

    def measure(m):
        if fails:
            raise fails[0]
        return evaluate(m)

    settings = {"policy": ByHand(BY_HAND), "trial": trial, "hold_updates": 200}
    grower = growing(model, optimizer, evaluate=measure, **settings)
    train(model, optimizer, UNTIL_HELD[trial], grower)
    assert grower.report().grafts[0].admitted_at is not None
    fails.append(error)
    comes_out = isinstance(error, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) if comes_out else nullcontext():
        grower.close()
    (graft,) = grower.report().grafts
    assert graft.verdict == ("rolled back" if trial == "twin" else "culled after admission")
    assert all(layer.seed_kernel(0) is None for layer in layers(model).values())
    assert not optimizer._optimizer_step_post_hooks
    said = [n for n in grower.report().notes if "ZeroDivisionError: by you" in n]
    assert bool(said) is not comes_out


def test_run_is_never_written_into_the_folder_of_another(tmp_path):
    """A second run in one folder is numbered, says where it is, and leaves the first one's log."""
    growers = []
    for _ in range(3):
        model, optimizer = wrapped()
        with growing(model, optimizer, run_dir=tmp_path / "run") as grower:
            growers.append(grower)
    assert [g.run_dir.name for g in growers] == ["run", "run-2", "run-3"]
    assert not any("holds a run" in note for note in growers[0].report().notes)
    (note,) = [note for note in growers[1].report().notes if "holds a run" in note]
    assert note == f"{tmp_path / 'run'} holds a run already; this one is in {tmp_path / 'run-2'}"
    assert (tmp_path / "run" / "events.jsonl").read_text().count("run_started") == 1


def test_group_that_is_added_later_is_taken_along():
    """Gradual unfreezing adds a param group in the middle of a run."""
    model, optimizer = wrapped()
    grower = growing(model, optimizer, policy=EveryN(5))
    train(model, optimizer, 12, grower)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": 1e-3})
    train(model, optimizer, 30, grower)
    assert grower.updates == 42


@pytest.mark.slow
def test_growth_under_autocast():
    """Layers that run in bfloat16 under autocast are recorded, ranked and grown."""
    model, optimizer = wrapped()

    def under_autocast(m, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return compute_loss(m, batch)

    grower = growing(model, optimizer, compute_loss=under_autocast, policy=EveryN(20))
    for index in range(120):
        batch = torch.arange(index, index + 32)
        loss = under_autocast(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grower.step(loss, batch=batch)
    assert grower.report().grafts
    assert grower.suggest()


@pytest.mark.slow
def test_growth_of_a_compiled_model():
    """A compiled step calls no hook: the recording is made up for by a pass of its own."""
    model, optimizer = wrapped()
    compiled = torch.compile(model, backend="aot_eager")
    grower = growing(compiled, optimizer, policy=EveryN(10))
    for batch in torch.arange(32 * 60).remainder(800).split(32):
        loss = compute_loss(compiled, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grower.step(loss, batch=batch)
    assert grower.report().grafts


def test_effective_settings_are_recorded():
    """What the run was told, and what it took by default, is in the report."""
    settings = growing(*wrapped()).report().settings
    assert SHORT.items() <= settings.items()
    assert settings["min_effect"] == 0.001
