"""The values that a run and the demo report."""

import json
from dataclasses import replace

import pytest

from esper.contracts.lifecycle import GraftStage
from esper.contracts.report import (
    ArmReport,
    ArmRun,
    ControlRow,
    ControlsReport,
    DemoReport,
    Evaluation,
    GraftRecord,
    RunReport,
)


def an_arm(*accuracy, **other):
    counts = tuple(100 + i for i in range(len(accuracy)))
    values = {"train_flops": 1e9, "latency_us": 50.0, "seconds": 2.0} | other
    return ArmReport(accuracy=accuracy, parameters_by_seed=counts, **values)


def a_graft(**other):
    values = {
        "graft": 1,
        "site": "0",
        "seed_idx": 0,
        "blueprint": "mlp",
        "artifact_id": "a" * 64,
        "stage": GraftStage.FOSSILIZED,
        "verdict": "fossilized",
        "reason": "better than its twin",
        "parameters": 40,
        "germinated_at": 10,
    }
    return GraftRecord(**(values | other))


def a_run(**other):
    values = {
        "settings": {},
        "updates": 100,
        "parameters_before": 358,
        "parameters_after": 398,
        "grafts": (a_graft(),),
    }
    return RunReport(**(values | other))


def a_demo(**other):
    values = {
        "random_seeds": (0, 1),
        "updates": 100,
        "arms": {
            "host": an_arm(90.0, 91.0),
            "grown": an_arm(92.0, 94.0, worst_dip_points=0.4),
            "random": an_arm(91.0, 92.0),
            "scratch": an_arm(93.0, 93.0),
        },
        "controls": ControlsReport(
            rows=(
                ControlRow(kind="noop", tried=4, admitted=0, fossilized=0, naive_accepted=0),
                ControlRow(
                    kind="capacity_free", tried=4, admitted=2, fossilized=1, naive_accepted=3
                ),
            )
        ),
    }
    return DemoReport(**(values | other))


def test_the_demo_report_has_the_promised_keys():
    """The JSON has every key that readers of report.json count on, with its results inside."""
    body = json.loads(a_demo().to_json())
    promised = (
        "arms grown_minus_host grown_minus_scratch grown_minus_random worst_dip_points fossilized "
        "culled controls ranking_spearman export_max_rel_diff environment format_version"
    )
    assert set(promised.split()) <= body.keys()
    assert body["arms"].keys() == {"host", "grown", "random", "scratch"}
    of_an_arm = "accuracy accuracy_mean accuracy_std parameters train_flops latency_us seconds"
    assert set(of_an_arm.split()) <= body["arms"]["grown"].keys()
    assert body["grown_minus_host"].keys() == {"mean", "low", "high"}


def test_the_controls_are_counted_by_kind():
    """A kind's fossils are counted under its name; the naive gate's yes over all kinds."""
    controls = json.loads(a_demo().to_json())["controls"]
    counts = {name: count for name, count in controls.items() if name != "rows"}
    assert counts == {
        "noop_fossilized": 0,
        "noise_fossilized": 0,
        "capacity_free_fossilized": 1,
        "random_features_fossilized": 0,
        "naive_gate_accepted": 3,
    }


def test_differences_are_paired_by_random_seed():
    """The interval is that of the differences, and not of the arms' means."""
    difference = a_demo().grown_minus_host
    assert difference.mean == pytest.approx(2.5)
    assert difference.high - difference.low == pytest.approx(2 * 12.706204736 * 0.5)


def test_mean_and_spread_of_an_arm_are_computed():
    """An arm's mean and sample standard deviation follow from its list."""
    arm = an_arm(90.0, 92.0, 94.0)
    assert (arm.accuracy_mean, arm.accuracy_std, arm.parameters) == (92.0, 2.0, 101.0)


def test_a_demo_stopped_before_its_first_seed_is_still_a_report():
    """Without a completed random seed every result is None, and the JSON is valid."""
    empty = {name: an_arm() for name in ("host", "grown", "random", "scratch")}
    body = json.loads(a_demo(random_seeds=(), arms=empty, interrupted=True).to_json())
    assert body["grown_minus_host"] == {"mean": None, "low": None, "high": None}
    assert body["arms"]["grown"]["accuracy_mean"] is None


def test_grafts_are_counted_over_the_grown_arm_only():
    """Fossils and culls of the random arm do not count as the demo's."""
    culled = a_graft(stage=GraftStage.CULLED, verdict="culled at admission")
    looks = {"updates": (0,), "accuracy": (50.0,), "parameters": (358,)}
    report = a_demo(
        runs=(
            ArmRun(arm="grown", random_seed=0, report=a_run(), **looks),
            ArmRun(arm="grown", random_seed=1, report=a_run(grafts=(culled,)), **looks),
            ArmRun(arm="random", random_seed=0, report=a_run(), **looks),
        )
    )
    assert (report.fossilized, report.culled) == (1, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: a_demo(arms={"host": an_arm(90.0)}),
        lambda: a_demo(arms=a_demo().arms | {"host": an_arm(90.0)}),
        lambda: replace(an_arm(90.0), parameters_by_seed=()),
        lambda: ArmRun(arm="host", random_seed=0, updates=(0,), accuracy=(), parameters=(1,)),
    ],
    ids=["missing arms", "unpaired arms", "unequal lists", "unequal looks"],
)
def test_a_report_that_contradicts_itself_is_refused(call):
    """Missing arms, unpaired arms and lists of unequal length raise with what was found."""
    with pytest.raises(ValueError, match=r"got|as many|has"):
        call()


def test_overhead_is_all_work_but_training():
    """The share counts every category except training's own, and is 0 without any work."""
    work = {"training": 75.0, "audition": 20.0, "evaluation": 5.0}
    assert a_run(work=work).overhead_share == 0.25
    assert a_run().overhead_share == 0.0


def test_a_run_without_a_test_split_says_that_it_is_optimistic():
    """Gate figures are headed as optimistic exactly where there is no test split."""
    evaluations = (Evaluation(update=0, gate_loss=2.3), Evaluation(update=100, gate_loss=0.4))
    without = a_run(evaluations=evaluations)
    assert "used for growing: optimistic" in str(without)
    assert "optimistic" not in str(replace(without, test_metrics={"accuracy": 93.0}))


def test_a_run_reads_as_plain_text():
    """The text names every graft with its verdict and what was measured, and every note."""
    report = a_run(
        grafts=(a_graft(contribution=0.031, dependence=0.2, updates_lost=40),),
        notes=("AdamW is not fused",),
        interrupted=True,
    )
    text = str(report)
    assert text.startswith("Stopped after 100 updates")
    for words in (
        "mlp at 0, 40 parameters: fossilized (better than its twin)",
        "contribution +0.031, dependence +0.2",
        "cost 40 updates",
        "Note: AdamW is not fused",
    ):
        assert words in text


def test_a_number_that_is_not_finite_does_not_reach_the_file():
    """JSON has no NaN: writing one raises instead of making a file that others refuse."""
    with pytest.raises(ValueError, match="JSON"):
        a_run(test_metrics={"accuracy": float("nan")}).to_json()
