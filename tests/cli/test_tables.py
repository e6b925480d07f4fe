"""What the commands print at their end."""

import io

from rich.console import Console

from esper.cli.tables import print_demo
from esper.contracts.lifecycle import GraftStage
from esper.contracts.report import (
    ArmReport,
    ArmRun,
    ControlRow,
    ControlsReport,
    DemoReport,
    GraftRecord,
    RunReport,
    TimelineEntry,
    TrialRecord,
)


def a_demo():
    graft = GraftRecord(
        graft=1,
        site="3",
        seed_idx=0,
        blueprint="mlp [8]",
        artifact_id="",
        stage=GraftStage.FOSSILIZED,
        verdict="fossilized",
        reason="better than its twin",
        parameters=40,
        germinated_at=200,
        dependence=0.213,
        package=1,
    )
    trial = TrialRecord(
        package=1,
        grafts=(1,),
        sites=("3",),
        blueprints=("mlp [8]",),
        parameters=40,
        started_at=200,
        trial_updates=100,
        decided_at=300,
        verdict="kept",
        taken="candidate",
        effect=0.0412,
        stderr=0.0101,
        null_effect=0.0128,
        null_stderr=0.0094,
        capacity=0.0284,
        capacity_stderr=0.0099,
        capacity_shown=True,
    )
    entry = TimelineEntry(
        update=200,
        graft=1,
        site="3",
        blueprint="mlp [8]",
        before=None,
        after=GraftStage.TRIAL,
        reason="",
    )
    report = RunReport(
        settings={},
        updates=400,
        parameters_before=358,
        parameters_after=398,
        grafts=(graft,),
        timeline=(entry,),
        trials=(trial,),
    )
    arms = {
        name: ArmReport(
            accuracy=(mean, mean + 1.0),
            parameters_by_seed=(398, 398),
            train_flops=6.3e9,
            latency_us=70.0,
            seconds=1.0,
        )
        for name, mean in {"host": 90.0, "grown": 94.0, "random": 92.0, "scratch": 95.0}.items()
    }
    looks = {"updates": (0,), "accuracy": (10.0,), "parameters": (358,)}
    control = ControlRow(kind="noise", tried=20, admitted=1, fossilized=0, naive_accepted=7)
    return DemoReport(
        random_seeds=(5, 6),
        updates=400,
        arms=arms,
        controls=ControlsReport(rows=(control,)),
        runs=(ArmRun(arm="grown", random_seed=5, report=report, **looks),),
        notes=("a note",),
    )


def printed(call, value):
    console = Console(file=io.StringIO(), width=160, markup=False, highlight=False)
    call(console, value)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def test_the_demo_ends_with_its_tables():
    """First the good and the bad, then arms, differences, packages, grafts and the controls."""
    lines = printed(print_demo, a_demo())
    assert lines[0].startswith("Growth beat the host trained on without growing")
    assert ", but not a network of the grown shape" in " ".join(lines[:3])
    for line in (
        "grown 94.50 (88.15 to 100.85) 398 6.3 GFLOP \u2013 70 \u2013",
        "grown minus host only: +4.00 (+4.00 to +4.00) points; 2 won, 0 lost, 0 tied",
        "worst dip after a switch, points: \u2013 (the host's own \u2013)",
        "5 1 +0.0412 \u00b1 0.01 +0.0128 \u00b1 0.0094 +0.0284 \u00b1 0.0099 \u2013 kept",
        "package: kernels for several sites, tried together and judged as one",
        "5 1 1 mlp [8] 3 +0.2130 fossilized better than its twin",
        "5 1 trial 200",
        "noise 20 1 0 0 7",
        "Note: a note",
    ):
        assert line in lines
