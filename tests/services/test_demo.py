"""The demo: every arm from one start, controls that fail, and a report that holds together."""

from __future__ import annotations

import json
import threading

import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn (extra demo)")

from esper.services import demo
from esper.services.arms import Looks, Stopped, grown_arm, host_arm
from esper.services.controls import HostFork, fork_host, run_controls, spearman
from esper.services.demo import SeedResult, demo_report, dormant_is_identical, run_seed
from esper.services.digits import NUM_GATE, NUM_TRAIN, Split, batches, demo_host, load_digits

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
    """All arms, four controls at two sites, an export that predicts the same."""
    result, messages, folder = seed_result
    assert set(result.arms) == {"host", "grown", "random", "scratch"}
    assert {row.kind: row.tried for row in result.controls} == {
        "noop": 2,
        "noise": 2,
        "capacity_free": 2,
        "random_features": 2,
    }
    assert sum(row.fossilized for row in result.controls) == 0
    assert result.dormant_identical
    assert result.export_max_rel_diff <= 1e-6
    assert (folder / "events.jsonl").exists()
    shares = [share for _, share, _ in messages.messages]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


@pytest.mark.slow
def test_arms_start_as_one_run(seed_result):
    """The grown arm's looks are the host's, bit for bit, until the first admission."""
    result, _, _ = seed_result
    host, grown = result.arms["host"].run, result.arms["grown"].run
    admitted = [g.admitted_at for g in grown.report.grafts if g.admitted_at is not None]
    until = min(admitted, default=10**9)
    pairs = [
        (a, b)
        for update, a, b in zip(host.updates, host.accuracy, grown.accuracy, strict=True)
        if update <= until
    ]
    assert len(pairs) > 10
    assert all(a == b for a, b in pairs)


@pytest.mark.slow
def test_scratch_has_the_grown_networks_shape(seed_result):
    """Same final size, so that the comparison is of growing and not of size."""
    arms = seed_result[0].arms
    assert arms["scratch"].parameters == arms["grown"].parameters


@pytest.mark.slow
def test_report_has_what_is_promised(seed_result):
    """report.json has every key that a reader was told of."""
    report = json.loads(
        demo_report([seed_result[0]], epochs=EPOCHS, processes=1, seconds=1).to_json()
    )
    assert set(report["arms"]["grown"]) >= {
        "accuracy",
        "accuracy_mean",
        "accuracy_std",
        "parameters",
        "train_flops",
        "latency_us",
        "seconds",
    }
    assert report.keys() >= {
        "grown_minus_host",
        "grown_minus_scratch",
        "grown_minus_random",
        "worst_dip_points",
        "fossilized",
        "culled",
        "controls",
        "ranking_spearman",
        "export_max_rel_diff",
        "environment",
    }


@pytest.mark.slow
def test_test_split_with_random_labels_changes_no_decision(digits):
    """The controller cannot reach the test split: same structure, same log, other accuracy."""
    import torch

    shuffled = digits.test.y_N[torch.randperm(len(digits.test.y_N))]
    other = type(digits)(
        train=digits.train,
        gate=digits.gate,
        test=Split(x_N1HW=digits.test.x_N1HW, y_N=shuffled),
    )
    results = []
    for split in (digits, other):
        _, looks = host_arm(split, 1001, EPOCHS, nothing)
        results.append(grown_arm(split, 1001, EPOCHS, looks, nothing).result)
    assert results[0].accuracy > 50 > results[1].accuracy
    assert results[0].run.report.timeline == results[1].run.report.timeline
    assert results[0].run.report.grafts == results[1].run.report.grafts


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


@pytest.mark.slow
def test_naive_gate_is_seen_to_be_fooled(digits):
    """The control of the controls: an on/off gate after joint training keeps some of them."""
    kept = 0
    for random_seed in (1000, 1001):
        fork = fork_host(digits, random_seed)
        assert isinstance(fork, HostFork)
        kept += sum(row.naive_accepted for row in run_controls(digits, fork, nothing))
    assert kept > 0


def test_dip_is_less_what_the_twin_fell(digits):
    """A fall that the twin shares is no dip of the graft."""
    from esper.contracts.lifecycle import GraftStage
    from esper.contracts.report import GraftRecord, RunReport, TimelineEntry
    from esper.services.arms import worst_dip

    record = GraftRecord(
        graft=1,
        site="0",
        seed_idx=0,
        blueprint="b",
        artifact_id="",
        stage=GraftStage.BLENDING,
        verdict="",
        reason="",
        parameters=1,
        germinated_at=10,
        admitted_at=100,
    )
    change = TimelineEntry(
        update=100,
        graft=1,
        site="0",
        blueprint="b",
        before=GraftStage.AUDITION,
        after=GraftStage.BLENDING,
        reason="",
    )
    report = RunReport(
        settings={},
        updates=300,
        grafts=(record,),
        timeline=(change,),
        parameters_before=1,
        parameters_after=2,
    )
    host = Looks(accuracy={100: 90.0, 110: 89.0, 120: 88.0, 310: 10.0})
    looks = Looks(
        accuracy={100: 91.0, 110: 87.5, 120: 91.0, 310: 20.0}, twin={100: 91.0, 110: 90.0}
    )
    assert worst_dip(report, looks, host) == pytest.approx(3.5 - 2.0)
