"""``Staged``: planned stages of depth in a run that needs no wrapped model and no evidence."""

import math
import warnings

import pytest
import torch
from growing import SHORT, compute_loss, evaluate
from replay_checks import in_a_log
from sleepers import HOSTS, Listed, made, update
from torch import nn

import esper
from esper.contracts.report_text import flops_text
from esper.growth.policies import ByHand, Never
from esper.observability.event_log import read_events
from esper.observability.replay import replay
from esper.seeds.shallow import depth_state, load_depth_state

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))


def shallow(name="list", depth=2, lr=1e-3):
    model = esper.shallow(made(name), HOSTS[name].path, depth=depth)
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def run(model, optimizer, policy, updates=20, horizon=20, step=update, **options):
    """Train under a Grower; return its report, and what slept after each update."""
    torch.manual_seed(1)
    shares = []
    with esper.Grower(model, optimizer, horizon=horizon, policy=policy, **options) as grower:
        for _ in range(updates):
            grower.step(step(model, optimizer, X, Y))
            shares.append(max(depth_state(model).values(), default=1.0))
    return grower.report(), shares


def test_blocks_wake_at_their_share_of_the_run():
    """From update 10 of 20 over a fifth of what remains, without wrap, batches or a measure."""
    model, optimizer = shallow()
    report, shares = run(model, optimizer, esper.Staged({0.5: 6}))
    assert shares == [0.0] * 10 + [0.5] + [1.0] * 9
    (stage,) = report.stages
    assert (stage.path, stage.depth, stage.init, stage.verdict) == ("blocks", 6, "fresh", "awake")
    assert stage.blocks == ("blocks.1", "blocks.2", "blocks.4", "blocks.5")
    assert (stage.started_at, stage.ramp_updates, stage.ended_at) == (10, 2, 12)
    assert math.isfinite(stage.loss_before)
    assert math.isfinite(stage.loss_after)
    assert any("Nothing was compared" in note for note in report.notes)
    assert "In blocks, awake blocks went from 2 to 6" in str(report)
    assert {type(m) for m in model.modules()} == {type(m) for m in made("list").modules()}
    report.to_json()


def test_a_log_replays_the_stages(tmp_path):
    """Which blocks woke and when, as the report has it and as the model stands."""
    model, optimizer = shallow()
    report, _ = run(model, optimizer, esper.Staged({0.5: 4, 0.9: 6}), run_dir=tmp_path)
    replayed = replay(read_events(tmp_path / "events.jsonl")).report
    assert in_a_log(replayed) == in_a_log(report)
    assert [stage.depth for stage in replayed.stages] == [4, 6]
    assert esper.asleep(model) == ()


def test_until_then_the_run_is_that_of_the_shallow_model():
    """Bit for bit: the Grower draws no random number and touches no gradient."""
    states = []
    for policy in (esper.Staged({0.9: 6}), None):
        model, optimizer = shallow()
        torch.manual_seed(1)
        if policy is None:
            for _ in range(18):
                update(model, optimizer, X, Y)
        else:
            run(model, optimizer, policy, updates=18)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_stages_follow_each_other():
    """Each has a record, and what a stage costs is counted by itself."""
    model, optimizer = shallow(depth=1)
    report, _ = run(model, optimizer, esper.Staged({0.25: 3, 0.5: 6}, ramp=0.1, init="copy"))
    assert [(s.depth, s.started_at, s.init) for s in report.stages] == [
        (3, 5, "copy"),
        (6, 10, "copy"),
    ]
    assert [s.verdict for s in report.stages] == ["awake", "awake"]


def flops_of_block():
    """A forward and a backward of a block's two linear layers, on all rows."""
    return 3 * 2 * 2 * 64 * 8 * 16


def test_flops_are_those_of_what_was_executed():
    """The shallow part is a note; a stage has its updates at the new depth."""
    model, optimizer = shallow()
    report, _ = run(model, optimizer, esper.Staged({0.5: 6}))
    ends = 3 * 2 * 64 * 8 * (4 + 3)
    (stage,) = report.stages
    assert stage.flops == 9 * (6 * flops_of_block() + ends)
    (note,) = [note for note in report.notes if "FLOPs of training until" in note]
    assert note.startswith(
        f"{11 * (2 * flops_of_block() + ends):.4g} FLOPs of training until update 11"
    )


def test_a_report_of_depth_alone_says_nothing_of_kernels_and_batches():
    """What growing took is told without batches, and no note speaks of twins or of overhead."""
    model, optimizer = shallow()
    report, _ = run(model, optimizer, esper.Staged({0.5: 6}))
    text = str(report)
    assert "growing took no FLOPs beside the training, whose FLOPs are told stage by stage" in text
    assert not [word for word in ("overhead", "twin", "kernel", "batch=") if word in text]


def test_a_reading_beside_planned_depth_is_told_in_flops():
    """Where evaluate is given, what its readings took is in the sentence."""
    model, optimizer = shallow()
    options = {"evaluate": lambda m: (m(X) - Y).square().mean(1)}
    report, _ = run(model, optimizer, esper.Staged({0.5: 6}), **options)
    assert report.overhead > 0
    assert f"growing took {flops_text(report.overhead)} beside the training" in str(report)


def test_micro_batches_are_counted_each():
    """An update of two forwards costs two."""
    model, optimizer = shallow()

    def step(model, optimizer, x, y):
        model(x).square().mean().backward()
        return update(model, optimizer, x, y)

    report, _ = run(model, optimizer, esper.Staged({0.5: 6}), step=step)
    single, _ = run(*shallow(), esper.Staged({0.5: 6}))
    assert report.stages[0].flops == 2 * single.stages[0].flops


@pytest.mark.slow
def test_a_compiled_model_is_counted_aside():
    """No hook goes into a graph: ``compute_loss`` runs once at each depth, where there is one."""
    expected = run(*shallow(), esper.Staged({0.5: 6}))[0].stages[0].flops
    for given in ({}, {"compute_loss": lambda model, batch: model(X).sum()}):
        torch.compiler.reset()
        model, optimizer = shallow()
        fast = torch.compile(model, backend="eager", fullgraph=True)
        policy = esper.Staged({0.5: 6})
        with esper.Grower(fast, optimizer, horizon=20, policy=policy, **given) as grower:
            for _ in range(20):
                grower.step(update(fast, optimizer, X, Y), batch=X)
        assert grower.report().stages[0].flops == (expected if given else None)


def test_no_hook_of_ours_is_left():
    """After the run the model and the optimizer have the hooks of before."""
    model, optimizer = shallow()
    run(model, optimizer, esper.Staged({0.5: 6}))
    assert not optimizer._optimizer_step_post_hooks
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("trouble", [math.nan, 1e6])
@pytest.mark.filterwarnings("ignore:the training loss was nan")
def test_a_spike_puts_the_blocks_to_sleep(trouble):
    """The run goes back to where they began to wake, and the report says why."""
    model, optimizer = shallow()
    states = {}

    def step(model, optimizer, x, y):
        loss = update(model, optimizer, x, y)
        states[len(states) + 1] = {k: v.clone() for k, v in model.state_dict().items()}
        return loss * trouble if len(states) > 42 else loss

    report, _ = run(
        model, optimizer, esper.Staged({0.4: 6}, init="copy"), updates=50, horizon=100, step=step
    )
    (stage,) = report.stages
    assert (stage.verdict, stage.started_at, stage.ended_at) == ("put to sleep", 40, 50)
    assert "10 updates were undone" in stage.reason
    assert len(esper.asleep(model)) == 4
    assert all(torch.equal(value, states[40][key]) for key, value in model.state_dict().items())
    assert not any(p in optimizer.state for p in model.blocks[1].parameters())
    assert any("sleep again" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore:the training loss was nan")
def test_updates_of_blocks_that_sleep_again_are_counted_without_them():
    """What an update takes is measured anew where a spike takes the stage back."""
    model, optimizer = shallow()
    work = []
    with esper.Grower(
        model,
        optimizer,
        horizon=100,
        policy=esper.Staged({0.4: 6}),
        compute_loss=lambda model, batch: (model(batch) - Y).square().mean(),
    ) as grower:
        for number in range(60):
            loss = update(model, optimizer, X, Y)
            grower.step(math.nan if 42 < number < 52 else loss, batch=X)
            work.append(grower.report().work["training"])
    assert len(esper.asleep(model)) == 4
    assert work[45] - work[44] > 2 * (work[39] - work[38])
    assert work[59] - work[58] == work[39] - work[38]


def test_control_a_loss_as_usual_takes_nothing_back():
    """The same run without trouble keeps its blocks."""
    model, optimizer = shallow()
    report, _ = run(model, optimizer, esper.Staged({0.4: 6}), updates=60, horizon=100)
    assert report.stages[0].verdict == "awake"


def two_stacks():
    model = nn.ModuleDict({"encoder": Listed(3), "decoder": Listed(4)})
    for part in model:
        esper.shallow(model, f"{part}.blocks", depth=1)

    def step(model, optimizer, x, y):
        loss = (model["encoder"](x) - y).square().mean() + (model["decoder"](x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return model, torch.optim.SGD(model.parameters(), lr=1e-3), step


@pytest.mark.parametrize(
    "policy",
    [
        lambda: esper.Staged({"encoder.blocks": {0.5: 3}, "decoder.blocks": {0.5: 2, 0.8: 4}}),
        lambda: esper.AnyOf(
            esper.Staged({0.5: 3}, path="encoder.blocks"),
            esper.Staged({0.5: 2, 0.8: 4}, "decoder.blocks"),
        ),
    ],
    ids=["by_path", "any_of"],
)
def test_two_stacks_are_two_paths(policy):
    """Those that are due at the same update begin together."""
    model, optimizer, step = two_stacks()
    report, _ = run(model, optimizer, policy(), step=step)
    found = [(s.path.partition(".")[0], s.depth, s.started_at) for s in report.stages]
    assert found == [("encoder", 3, 10), ("decoder", 2, 10), ("decoder", 4, 16)]
    assert not depth_state(model)


def test_without_a_horizon_it_raises():
    """There is no share of what has no end."""
    model, optimizer = shallow()
    with pytest.raises(ValueError, match="give the Grower horizon="):
        esper.Grower(model, optimizer, policy=esper.Staged({0.8: 6}))


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (lambda: esper.Staged({0.5: 7}), "has 6 blocks, and 7 are planned"),
        (lambda: esper.Staged({0.5: 6}, path="head"), "no stack"),
        (lambda: esper.AllOf(esper.Staged({0.5: 6}), Never()), "compose it by AnyOf"),
        (lambda: esper.AnyOf(esper.Staged({0.5: 4}), esper.Staged({0.8: 6})), "planned for twice"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_by_the_grower(policy, said):
    """Before anything is trained, and with no hook left."""
    model, optimizer = shallow()
    with pytest.raises(ValueError, match=said):
        esper.Grower(model, optimizer, horizon=20, policy=policy())
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_without_the_sleepers_is_refused():
    """At once, and not when they wake."""
    model, _ = shallow()
    optimizer = torch.optim.SGD(model.blocks[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="is to wake and is in no param group"):
        esper.Grower(model, optimizer, horizon=20, policy=esper.Staged({0.5: 6}))


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (({},), TypeError, "blocks awake by shares"),
        ((6,), TypeError, "blocks awake by shares"),
        (({1.0: 6},), ValueError, r"a share of the horizon in \[0, 1\)"),
        (({0.5: 6, 0.8: 6},), ValueError, "depth rises"),
        (({0.5: 0},), ValueError, "at least 1"),
        (({"a": {0.5: 6}}, "b"), ValueError, "named once"),
        (({"a": 6},), TypeError, "the stages of 'a'"),
        (({0.5: 6}, None, 0.0), ValueError, r"in \(0, 1\]"),
        (({0.5: 6}, None, 0.2, "zero"), ValueError, "'fresh', 'copy'"),
    ],
)
def test_a_plan_that_is_none_is_refused(given, error, said):
    """With what was expected and found."""
    with pytest.raises(error, match=said):
        esper.Staged(*given)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_depth_that_is_awake_already_is_told_of_at_the_start(depth):
    """A warning with the path, what was asked for and what there is."""
    words = rf"in 'blocks': of its 6 blocks 2 are awake already, .* asks for {depth} at 60%"
    model, optimizer = shallow()
    with pytest.warns(UserWarning, match=words):
        esper.Grower(model, optimizer, horizon=20, policy=esper.Staged({0.6: depth})).close()


def test_a_stage_that_wakes_nothing_before_others_that_do_is_a_note():
    """A run that goes on where another ended has such stages behind it."""
    model, optimizer = shallow()
    report, _ = run(model, optimizer, esper.Staged({0.2: 2, 0.5: 6}))
    assert any("asks for 2 at 20% of the run" in note for note in report.notes)
    assert [stage.depth for stage in report.stages] == [6]


def test_a_model_in_which_nothing_sleeps_is_told_of():
    """Whoever forgot ``shallow`` hears of it at the start."""
    model = made("list")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"nothing can wake: .* call esper\.shallow"):
        esper.Grower(model, optimizer, horizon=20, policy=esper.Staged({0.5: 6})).close()
    with pytest.raises(UserWarning, match="nothing can wake"):  # warnings are errors here
        esper.Grower(model, optimizer, horizon=20, policy=esper.Staged({0.5: 6}))
    assert not optimizer._optimizer_step_post_hooks


def test_control_another_policy_needs_a_wrapped_model():
    """The promise of a run without ``wrap`` is that of stages alone."""
    model, optimizer = shallow()
    policy = esper.AnyOf(esper.Staged({0.5: 6}), esper.DiminishingReturns())
    with pytest.raises(ValueError, match=r"call esper\.wrap"):
        esper.Grower(model, optimizer, horizon=20, policy=policy)


@pytest.mark.slow
def test_beside_a_policy_that_grafts_both_go_on():
    """On a wrapped model blocks wake, and a kernel is tried before and none meanwhile."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in "123")),
        nn.Linear(4, 1),
        nn.Flatten(0),
    )
    esper.shallow(model, "1", depth=1)
    esper.wrap(model, select="0")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    policy = esper.AnyOf(ByHand([("0", "mlp-4x4-w32")]), esper.Staged({0.5: 3}))
    batches = [torch.randint(900, (32,)) for _ in range(200)]
    with esper.Grower(
        model,
        optimizer,
        policy=policy,
        horizon=200,
        compute_loss=compute_loss,
        evaluate=evaluate,
        **SHORT,
    ) as grower:
        for batch in batches:
            loss = compute_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            grower.step(loss, batch=batch)
    report = grower.report()
    assert [stage.verdict for stage in report.stages] == ["awake"]
    assert len(report.grafts) == 1
    assert not depth_state(model)


def test_a_run_that_ends_on_the_way_leaves_blocks_where_they_are():
    """The report says so, and ``deepen`` goes on from there."""
    model, optimizer = shallow()
    report, _ = run(model, optimizer, esper.Staged({0.4: 6}), updates=46, horizon=100)
    assert report.stages[0].verdict == "waking"
    assert "at alpha 0.5" in report.stages[0].reason
    assert not optimizer._optimizer_step_post_hooks
    esper.deepen(model, optimizer, depth=6, ramp_updates=1)
    update(model, optimizer, X)
    assert not depth_state(model)


def test_another_grower_goes_on_with_what_was_begun():
    """After a checkpoint: depth, updates and the policy's memory are put back, alpha goes on."""
    model, optimizer = shallow()
    policy = esper.Staged({0.4: 6})
    run(model, optimizer, policy, updates=46, horizon=100)
    other, resumed = made("list"), esper.Staged({0.4: 6})
    load_depth_state(other, depth_state(model))
    resumed.load_state_dict(policy.state_dict())
    optimizer = torch.optim.AdamW(other.parameters())
    with esper.Grower(other, optimizer, horizon=100, policy=resumed) as grower:
        watcher = grower._run.watcher
        watcher.load_state_dict({**watcher.state_dict(), "counts": [46], "updates": 46})
        for _ in range(7):
            grower.step(update(other, optimizer, X, Y))
    (stage,) = grower.report().stages
    assert (stage.started_at, stage.ramp_updates, stage.ended_at) == (47, 6, 53)


def test_a_memory_of_another_plan_is_refused():
    """A state has as many stacks as the plan."""
    with pytest.raises(ValueError, match="for its 1 stacks"):
        esper.Staged({0.5: 6}).load_state_dict({"num_begun": [1, 2]})


def test_nothing_is_said_of_evidence_that_stages_do_not_need():
    """No warning asks for ``compute_loss`` or ``evaluate``."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report, _ = run(*shallow(), esper.Staged({0.5: 6}))
    assert not [note for note in report.notes if "compute_loss" in note]
