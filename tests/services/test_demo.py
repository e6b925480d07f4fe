"""The demo: every arm from one start, controls that fail, and a report that holds together."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn (extra demo)")

from esper.contracts.report import ArmRun, RunReport, TrialRecord
from esper.services import demo
from esper.services.arms import ArmResult, Grown, Stopped, grown_arm, host_arm
from esper.services.controls import ControlResult, run_controls
from esper.services.demo import dormant_is_identical, run_seed
from esper.services.digits import NUM_GATE, NUM_TRAIN, Split, batches, demo_host, load_digits
from esper.services.findings import SeedResult, demo_report, gains_of, spearman
from esper.services.looks import Looks

EPOCHS = 25


class Silent:
    """Stands for the queue to the parent."""

    def __init__(self):
        self.messages = []

    def put(self, message):
        self.messages.append(message)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def seed_result(tmp_path_factory) -> tuple[SeedResult, Silent, object]:
    folder = tmp_path_factory.mktemp("demo")
    messages = Silent()
    task = demo._Task(
        random_seed=1000,
        epochs=EPOCHS,
        run_dir=folder,
        exports=True,
        messages=messages,
        stop=threading.Event(),
    )
    return run_seed(task), messages, folder


def nothing(*_args, **_kwargs):
    pass


def a_trial(**other):
    values = {
        "package": 1,
        "grafts": (1,),
        "sites": ("3",),
        "blueprints": ("mlp",),
        "parameters": 40,
        "started_at": 116,
        "trial_updates": 200,
        "decided_at": 316,
        "verdict": "refused",
    }
    return TrialRecord(**(values | other))


def an_arm(name, *trials, accuracy=90.0, own=100.0, all_work=100.0):
    run = RunReport(
        settings={}, updates=500, trials=trials, parameters_before=358, parameters_after=358
    )
    report = run if name in {"grown", "random"} else None
    looks = {"updates": (), "accuracy": (), "parameters": ()}
    return ArmResult(
        run=ArmRun(arm=name, random_seed=0, report=report, **looks),
        accuracy=accuracy,
        accuracy_last=accuracy,
        parameters=358,
        train_flops=all_work,
        own_flops=own,
        latency_us=1.0,
        seconds=1.0,
        dip=None,
    )


def a_seed(random_seed=0, *, arms=(), controls=()):
    own = {name: an_arm(name) for name in ("host", "grown", "random", "scratch")}
    return SeedResult(
        random_seed=random_seed,
        arms=own | dict(arms),
        controls=controls,
        gains=(),
        dormant_identical=True,
        export_max_rel_diff=None,
    )


def report_of(*seeds):
    return demo_report(seeds, epochs=EPOCHS, processes=1, seconds=1.0)


def test_splits_are_disjoint_and_whole(digits):
    """Every image is in one split, and the sizes are those that the documents name."""
    sizes = [len(split.y_N) for split in (digits.train, digits.gate, digits.test)]
    assert sizes == [NUM_TRAIN, NUM_GATE, 1797 - NUM_TRAIN - NUM_GATE]
    images = {image.numpy().tobytes() for s in (digits.train, digits.gate) for image in s.x_N1HW}
    unseen = [image.numpy().tobytes() not in images for image in digits.test.x_N1HW]
    assert sum(unseen) / len(unseen) > 0.99  # scikit-learn's digits have a few doubles


def test_batches_depend_on_the_random_seed_and_the_epoch_only(digits):
    """Every arm of a random seed sees the same batches."""
    one, same, other = (
        [y.tolist() for _, y in batches(digits.train, seed, 3)] for seed in (1, 1, 2)
    )
    assert one == same != other
    assert len(one) == 20


def test_host_has_the_size_that_the_documents_name():
    """358 parameters, and other weights for another random seed."""
    assert sum(p.numel() for p in demo_host(0).parameters()) == 358
    assert not (demo_host(0)[0].weight == demo_host(1)[0].weight).all()


@pytest.mark.slow
def test_one_random_seed_gives_every_arm_and_control(seed_result):
    """All arms, the useless control whose turn it is, a linear one, an export that agrees."""
    result, messages, folder = seed_result
    assert set(result.arms) == {"host", "grown", "random", "scratch"}
    kinds = [control.kind for control in result.controls]
    assert kinds == ["noise", "linear"]
    assert all(control.trial is not None for control in result.controls)
    assert result.dormant_identical
    assert result.export_max_rel_diff <= 1e-6
    assert (folder / "events.jsonl").exists()
    shares = [share for _, share, _ in messages.messages]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.slow
def test_arms_start_as_one_run(seed_result):
    """The grown arm's looks are the host's, bit for bit, until its first verdict."""
    result, _, _ = seed_result
    host, grown = result.arms["host"].run, result.arms["grown"].run
    until = min(trial.decided_at for trial in grown.report.trials)
    pairs = [
        (a, b)
        for update, a, b in zip(host.updates, host.accuracy, grown.accuracy, strict=True)
        if update < until
    ]
    assert len(pairs) > 5
    assert all(a == b for a, b in pairs)


@pytest.mark.slow
def test_scratch_has_the_grown_networks_shape(seed_result):
    """Same final size, so that the comparison is of growing and not of size."""
    arms = seed_result[0].arms
    assert arms["scratch"].parameters == arms["grown"].parameters


@pytest.mark.slow
def test_accuracy_is_the_mean_of_ten_looks_at_the_test_split(seed_result):
    """One after each of the last ten epochs; the last of them is told beside it."""
    for arm in seed_result[0].arms.values():
        assert len(arm.run.test_accuracy) == 10
        assert arm.accuracy == pytest.approx(sum(arm.run.test_accuracy) / 10)
        assert arm.accuracy_last == arm.run.test_accuracy[-1]


@pytest.mark.slow
def test_only_growing_costs_more_than_training(seed_result):
    """Host and from scratch are trained and nothing else."""
    arms = seed_result[0].arms
    assert arms["host"].train_flops == arms["host"].own_flops
    assert arms["scratch"].train_flops == arms["scratch"].own_flops
    assert arms["grown"].train_flops > arms["grown"].own_flops


@pytest.mark.slow
def test_report_has_what_is_promised(seed_result):
    """report.json has every key that a reader was told of."""
    report = json.loads(report_of(seed_result[0]).to_json())
    assert set(report["arms"]["grown"]) >= {
        "accuracy",
        "accuracy_last",
        "accuracy_mean",
        "accuracy_std",
        "parameters",
        "train_flops",
        "work",
        "latency_us",
        "seconds",
    }
    assert report.keys() >= {
        "grown_minus_host",
        "grown_minus_scratch",
        "grown_minus_random",
        "wins",
        "packages_tried",
        "packages_passed",
        "worst_dip_points",
        "fossilized",
        "culled",
        "controls",
        "ranking_spearman",
        "export_max_rel_diff",
        "environment",
        "stages",
    }
    assert report["arms"]["host"]["worst_dip_points"] is not None


@pytest.mark.torture
def test_test_split_with_random_labels_changes_no_decision(digits):
    """The controller cannot reach the test split: same structure, same log, other accuracy."""
    import torch

    shuffled = digits.test.y_N[torch.randperm(len(digits.test.y_N))]
    other = replace(digits, test=Split(x_N1HW=digits.test.x_N1HW, y_N=shuffled))
    first, second = (grown_arm(split, 1001, EPOCHS, nothing).result for split in (digits, other))
    assert first.accuracy > 50 > second.accuracy
    assert first.run.report.timeline == second.run.report.timeline
    assert first.run.report.grafts == second.run.report.grafts
    assert [t.z for t in first.run.report.trials] == [t.z for t in second.run.report.trials]


@pytest.fixture(scope="module")
def controls(digits):
    """Random features at the second convolution, a no-op at the readout, linear ones at both."""
    forks = [host_arm(digits, random_seed, 21, nothing).fork for random_seed in (1002, 1001)]
    return [control for fork in forks for control in run_controls(digits, fork, nothing)]


@pytest.mark.torture
def test_naive_gate_is_seen_to_be_fooled(controls):
    """The control of the controls: an on/off gate after joint training keeps some of them."""
    assert any(control.naive_accepted for control in controls)


@pytest.mark.torture
def test_the_null_of_a_linear_package_begins_apart(controls):
    """Begun with the same numbers both would be one run, and the test of capacity no test."""
    linear = [control.trial for control in controls if control.kind == "linear"]
    assert {trial.sites for trial in linear} == {("3",), ("7",)}
    assert all(trial.capacity_stderr > 0 for trial in linear)
    (noop,) = [control.trial for control in controls if control.kind == "noop"]
    assert noop.capacity_stderr == 0


def test_dormant_host_is_the_bare_one(digits):
    """Twenty updates with every seed dormant give the bare host's very bits."""
    assert dormant_is_identical(digits, 1000)


def test_demo_stops_where_it_is_asked_to(digits):
    """A teller that raises ends the arm at the next epoch."""

    def stop(*_args, **_kwargs):
        raise Stopped

    with pytest.raises(Stopped):
        host_arm(digits, 0, 1, stop)


def test_report_of_nothing_is_readable():
    """Stopped before the first random seed was completed, the report is empty and whole."""
    report = demo_report([], epochs=EPOCHS, processes=1, seconds=0.1, interrupted=True)
    assert report.interrupted
    assert json.loads(report.to_json())["random_seeds"] == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"random_seeds": ()}, "needs random seeds"),
        ({"random_seeds": (1, 1)}, "each once"),
        ({"processes": 0}, "processes"),
        ({"epochs": 20}, "at least 21"),
    ],
)
def test_demo_that_cannot_run_is_refused(settings, words, tmp_path):
    """Before anything is trained."""
    with pytest.raises(ValueError, match=words):
        demo.run_demo(run_dir=tmp_path, **settings)


def test_rank_correlation():
    """Ties share their ranks; a constant column has none."""
    assert spearman([(1, 10), (2, 20), (3, 30)]) == pytest.approx(1.0)
    assert spearman([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1.0)
    assert spearman([(1, 1), (1, 2), (2, 3), (3, 4)]) == pytest.approx(0.9486833)
    assert spearman([(1, 1), (2, 1), (3, 1)]) is None
    assert spearman([(1, 1), (2, 2)]) is None


def test_the_test_split_is_looked_at_after_the_last_ten_epochs(digits):
    """And never before, whatever the model."""
    looks, model = Looks(), demo_host(0)
    for epoch in range(12):
        looks.after_epoch(11 - epoch, model, digits)
        assert len(looks.test) == max(0, epoch - 1)


def test_a_dip_is_the_largest_fall_after_a_switch():
    """From the last look before it, within 200 updates; of several switches the worst."""
    looks = Looks(accuracy={300: 91.0, 325: 87.5, 350: 92.0, 500: 90.0, 550: 10.0, 575: 9.0})
    assert looks.worst_dip([316]) == 3.5
    assert looks.worst_dip([316, 360]) == 82.0
    assert looks.worst_dip([]) is None


@pytest.mark.parametrize(
    ("trial", "claims"),
    [
        (a_trial(taken="candidate", capacity_shown=True), True),
        (a_trial(taken="candidate", capacity_shown=False), False),
        (a_trial(taken="null", capacity_shown=True), False),
        (a_trial(capacity_shown=True), False),
        (None, False),
    ],
)
def test_capacity_is_claimed_of_what_was_taken_over_only(trial, claims):
    """Of a refused package, and of one of which the null was taken, nothing is claimed."""
    control = ControlResult(kind="linear", site="3", trial=trial, naive_accepted=True)
    assert control.claims_capacity is claims
    (row,) = report_of(a_seed(controls=(control,))).controls.rows
    assert (row.tried, row.capacity_claimed, row.naive_accepted) == (1, claims, 1)


def test_a_verdict_that_another_machine_may_read_otherwise_is_named():
    """Where z lies within 0.5 of its threshold, on either side; of arms and controls alike."""
    near, far = a_trial(z=2.1, threshold=1.64), a_trial(z=2.2, threshold=1.64)
    control = ControlResult(
        kind="noise", site="7", trial=a_trial(z=1.2, threshold=1.64), naive_accepted=False
    )
    arms = {"grown": an_arm("grown", near), "random": an_arm("random", far)}
    notes = report_of(a_seed(4, arms=arms, controls=(control,))).notes
    named = [note for note in notes if note.startswith("Random seed 4")]
    assert len(named) == 2
    assert "package 1 of the grown arm: z = 2.10" in named[0]
    assert "the control noise at 7: z = 1.20" in named[1]


def test_work_is_of_all_random_seeds_together():
    """A small run with a dear trial weighs what it took, and no more."""
    small, large = an_arm("grown", own=1.0, all_work=5.0), an_arm("grown", own=99.0, all_work=145.0)
    report = report_of(
        *(a_seed(i, arms={"grown": a}.items()) for i, a in enumerate((small, large)))
    )
    assert report.arms["grown"].work == 1.5
    assert report.arms["host"].work == 1.0


def test_gains_are_predicted_for_what_was_chosen_at_random_as_well():
    """Both arms are one run until the verdict; a kernel without a score leaves its package out."""
    predicted = {("3", "mlp"): 0.25, ("7", "mlp"): 0.5}

    def grown(name, **trial):
        result = an_arm(name, a_trial(**trial))
        return Grown(result=result, model=None, kernels=(), predicted=predicted)

    pair = {"sites": ("3", "7"), "blueprints": ("mlp", "mlp"), "effect": 0.1}
    unknown = {"blueprints": ("block",), "effect": 0.3}
    first = grown("grown", **pair)
    assert gains_of(first, grown("random", effect=-0.2)) == ((0.75, 0.1), (0.25, -0.2))
    assert gains_of(first, grown("random", **unknown)) == ((0.75, 0.1),)
    assert gains_of(first, grown("random")) == ((0.75, 0.1),)
