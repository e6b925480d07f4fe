"""The values that a run and the demo report."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from esper.contracts.intervals import Interval
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
    StageArm,
    StageRecord,
    TrialRecord,
    Wins,
    demo_report_from_json,
    run_report_from_json,
)

FILES = Path(__file__).parent / "files"


def a_file(name):
    return (FILES / name).read_text(encoding="utf-8")


def a_trial(**other):
    values = {
        "package": 1,
        "grafts": (1,),
        "sites": ("0",),
        "blueprints": ("mlp",),
        "parameters": 40,
        "started_at": 10,
        "trial_updates": 50,
    }
    return TrialRecord(**(values | other))


def a_stage(**other):
    values = {"path": "h", "depth": 2, "blocks": ("h.1",), "started_at": 50, "ramp_updates": 10}
    return StageRecord(**(values | other))


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
                    kind="linear",
                    tried=4,
                    admitted=2,
                    fossilized=2,
                    naive_accepted=3,
                    capacity_claimed=1,
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
        "capacity_free_fossilized": 0,
        "random_features_fossilized": 0,
        "linear_fossilized": 2,
        "naive_gate_accepted": 3,
        "capacity_claimed": 1,
    }


def test_a_linear_package_that_stayed_is_none_of_the_useless():
    """Its treatment may have helped; only a claim of capacity would be wrong."""
    assert a_demo().controls.useless == (0, 4)


def test_wins_losses_and_ties_are_counted_by_random_seed():
    """On the accuracy of the report; equal ones, as of runs that refused everything, are ties."""
    arms = a_demo().arms | {"host": an_arm(92.0, 91.0), "scratch": an_arm(93.0, 93.0)}
    wins = a_demo(arms=arms).wins
    assert wins["host"] == Wins(won=1, lost=0, tied=1)
    assert wins["scratch"] == Wins(won=1, lost=1, tied=0)


def test_packages_are_counted_over_the_grown_arm_where_they_were_read():
    """One that was given up before its verdict met nothing."""
    read = {"decided_at": 60, "effect": 0.1}
    trials = (a_trial(**read, taken="candidate"), a_trial(**read), a_trial(decided_at=70))
    looks = {"updates": (0,), "accuracy": (50.0,), "parameters": (358,)}
    run = ArmRun(arm="grown", random_seed=0, report=a_run(trials=trials), **looks)
    other = replace(run, arm="random")
    report = a_demo(runs=(run, other))
    assert (report.packages_tried, report.packages_passed) == (2, 1)


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
        lambda: replace(an_arm(90.0), accuracy_last=(90.0, 91.0)),
        lambda: ArmRun(arm="host", random_seed=0, updates=(0,), accuracy=(), parameters=(1,)),
    ],
    ids=["missing arms", "unpaired arms", "unequal lists", "unequal last", "unequal looks"],
)
def test_a_report_that_contradicts_itself_is_refused(call):
    """Missing arms, unpaired arms and lists of unequal length raise with what was found."""
    with pytest.raises(ValueError, match=r"got|as many|has"):
        call()


def test_overhead_is_all_flops_but_trainings_over_trainings():
    """Work of every category except training's own, over training's; 0 without any work."""
    work = {"training": 75.0, "trial": 20.0, "evaluation": 10.0}
    assert a_run(work=work).overhead_share == 0.4
    assert a_run(work=work).overhead == 30.0
    assert a_run().overhead_share == 0.0


def test_overhead_of_passes_is_a_share_of_all():
    """Reports of format 1 counted passes, and their share stays what it was."""
    work = {"training": 75.0, "audition": 20.0, "evaluation": 5.0}
    assert a_run(work=work, work_unit="passes").overhead_share == 0.25


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"effect": 0.5, "stderr": 0.1, "going_on": 0.1, "going_on_stderr": 0.1}, True),
        ({"effect": 0.2, "stderr": 0.1, "going_on": 0.1, "going_on_stderr": 0.1}, False),
        ({"effect": 0.5, "stderr": 0.1, "going_on": 0.1}, None),
        ({"effect": 0.5, "stderr": 0.1}, None),
        (
            {
                "taken": "null",
                "effect": 0.5,
                "stderr": 0.1,
                "null_effect": 0.1,
                "null_stderr": 0.1,
                "going_on": 0.1,
                "going_on_stderr": 0.1,
            },
            False,
        ),
    ],
    ids=["more", "within luck", "no error", "not known", "of the null"],
)
def test_going_on_is_beaten_beyond_luck_or_not_at_all(changes, expected):
    """What was taken over is held against it; what was not measured is neither yes nor no."""
    assert a_trial(**changes).beat_going_on is expected


def test_a_trial_was_read_once_it_has_its_verdict_and_an_effect():
    """A package that was given up before met nothing."""
    assert not a_trial(effect=0.5).was_read
    assert not a_trial(decided_at=60, verdict="refused").was_read
    assert a_trial(decided_at=60, verdict="refused", effect=0.5).was_read


def a_full_run(**other):
    """Return a run with every kind of record in it."""
    return a_run(
        evaluations=(Evaluation(update=0, gate_loss=2.5),),
        trials=(a_trial(effect=0.5, decided_at=60, verdict="kept", taken="candidate"),),
        stages=(a_stage(),),
        grafts=(a_graft(package=1),),
        work={"training": 8.0, "trial": 2.0},
        seconds={"training": 1.0, "trial": 0.5},
        overhead_limit=4.0,
        run_id="ab",
        control=a_run(),
        **other,
    )


def test_a_report_is_read_back():
    """Reading gives the value, and writing that one the very bytes."""
    report = a_full_run()
    assert run_report_from_json(report.to_json()) == report
    assert run_report_from_json(report.to_json()).to_json() == report.to_json()
    looks = {"updates": (0,), "accuracy": (50.0,), "parameters": (358,)}
    saved = Interval(mean=41.0, low=38.5, high=43.5)
    demo = a_demo(
        runs=(ArmRun(arm="grown", random_seed=0, report=report, test_accuracy=(1.0,), **looks),),
        stages=(StageArm(name="a"), StageArm(name="b", saved_at_equal_loss=saved, recorded=True)),
    )
    assert demo_report_from_json(demo.to_json()) == demo
    assert demo_report_from_json(demo.to_json()).to_json() == demo.to_json()


@pytest.mark.parametrize(
    ("name", "read"), [("run-1.json", run_report_from_json), ("demo-1.json", demo_report_from_json)]
)
def test_a_report_of_format_1_stays_readable(name, read):
    """All that it said is there, and written again in the format of today."""
    old = json.loads(a_file(name))
    written = json.loads(read(a_file(name)).to_json())

    def compare(before, after):
        if isinstance(before, dict):
            for key in before.keys() - {"format_version"}:
                compare(before[key], after[key] if before[key] is not None else after.get(key))
        elif isinstance(before, list):
            assert len(before) == len(after)
            for pair in zip(before, after, strict=True):
                compare(*pair)
        else:
            assert before == after

    compare(old, written)
    assert written["format_version"] == "1.1"


def test_a_demo_of_format_1_lacks_what_it_did_not_measure():
    """Single last looks, no work, no language model; its old kind of control keeps its count."""
    report = demo_report_from_json(a_file("demo-1.json"))
    grown = report.arms["grown"]
    assert (grown.accuracy_last, grown.work, report.stages) == ((), None, ())
    assert [row.kind for row in report.controls.rows][2] == "capacity_free"
    assert (report.packages_tried, report.controls.capacity_claimed) == (0, 0)


def test_a_run_of_format_1_is_what_it_was():
    """An audition and its twins: verdicts, contributions, and work in passes."""
    report = run_report_from_json(a_file("run-1.json"))
    fossil, culled = report.grafts
    assert (fossil.stage, culled.stage) == (GraftStage.FOSSILIZED, GraftStage.CULLED)
    assert fossil.contribution > 0
    assert culled.contribution is None
    assert report.work_unit == "passes"
    assert report.overhead_share == json.loads(a_file("run-1.json"))["overhead_share"]
    assert (report.trials, report.stages, report.run_id) == ((), (), "")


def test_fields_of_a_fork_are_written_no_more():
    """What a graft brought against a twin of its own was measured by earlier versions only."""
    graft = json.loads(a_run().to_json())["grafts"][0]
    assert not {"contribution", "contribution_stderr", "host_only_contribution"} & graft.keys()


def with_what_is_not_known(text):
    """Return a report as a later version might write it, with more in it at every depth."""
    text = text.replace('"format_version": "1.1"', '"format_version": "1.8"')
    text = re.sub(
        r'( *)"package": 1,', r'\1"pace": {"b": 1E5,\n \1"a":  [1,2]},\n\1"package": 1,', text
    )
    return re.sub(r'( *)"updates": 100,', r'\1"updated": 0.10,\n\1"updates": 100,', text)


def test_what_a_later_version_wrote_is_kept_byte_for_byte():
    """At every depth and in its place; what is known of it can be read."""
    later = with_what_is_not_known(a_full_run().to_json())
    report = run_report_from_json(later)
    assert dict(report.more) == {"updated": "0.10"}
    assert dict(report.trials[0].more)["pace"].startswith('{"b": 1E5,')
    assert dict(report.grafts[0].more)
    assert report.to_json() == later


def test_a_stage_that_only_a_later_version_knows_stays_a_word():
    """The report can be read, printed and written again; one of today with that word is refused."""
    text = a_full_run().to_json().replace('"stage": "fossilized"', '"stage": "napping"')
    later = with_what_is_not_known(text)
    report = run_report_from_json(later)
    assert report.grafts[0].stage == "napping"
    assert str(report)
    assert report.to_json() == later
    with pytest.raises(ValueError, match="napping"):
        run_report_from_json(text)


@pytest.mark.parametrize("version", ["2", '"2.0"'])
def test_a_report_of_a_higher_major_version_is_refused(version):
    """By name, with what to do."""
    later = a_full_run().to_json().replace('"1.1"', version)
    with pytest.raises(ValueError, match=r"run report format .*2.* is not known.*a newer Esper"):
        run_report_from_json(later)
    with pytest.raises(ValueError, match="demo report format"):
        demo_report_from_json(a_demo().to_json().replace('"1.1"', version))


@pytest.mark.parametrize("text", ["[]", "{}", "nothing", '{"format_version": "1.1"}'])
def test_what_is_no_report_is_refused(text):
    """Whatever is missing, it is a ValueError."""
    with pytest.raises(ValueError, match=r"expected|format|needs|Expecting"):
        run_report_from_json(text)


def test_where_a_run_is_names_packages():
    """A graft that is under way is told with its package."""
    holding = a_graft(stage=GraftStage.HOLDING, package=2)
    (status,) = a_run(grafts=(holding,)).progress_row().grafts
    assert (status.package, status.stage) == (2, GraftStage.HOLDING)


def test_a_number_that_is_not_finite_does_not_reach_the_file():
    """JSON has no NaN: writing one raises instead of making a file that others refuse."""
    with pytest.raises(ValueError, match="JSON"):
        a_run(test_metrics={"accuracy": float("nan")}).to_json()
