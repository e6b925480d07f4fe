"""Reports with every part filled in, as a run would make them."""

import math

import pytest

from esper.contracts.lifecycle import GraftStage
from esper.contracts.report import (
    AlphaPoint,
    ArmReport,
    ArmRun,
    ControlRow,
    ControlsReport,
    DemoReport,
    Evaluation,
    GraftRecord,
    RunReport,
    StageRecord,
    TimelineEntry,
    TrialRecord,
)

UPDATES = 1200
LOOKS = tuple(range(0, UPDATES + 1, 10))
BENDS = {"host": 0.0, "grown": 4.0, "random": 2.2, "scratch": 4.3}


def a_graft(number, start, *, kept, site="3", blueprint="conv3x3-8"):
    stage = GraftStage.FOSSILIZED if kept else GraftStage.CULLED
    return GraftRecord(
        graft=number,
        site=site,
        seed_idx=0,
        blueprint=blueprint,
        artifact_id=f"{number:064x}",
        stage=stage,
        verdict="fossilized" if kept else "culled at fossilization",
        reason="better than its twin: z 4.1 over 1.96" if kept else "no better than its twin",
        parameters=596,
        germinated_at=start,
        admitted_at=start + 100,
        decided_at=start + 300,
        contribution=0.0412 if kept else 0.0011,
        contribution_stderr=0.0101,
        dependence=0.213,
        host_only_contribution=0.051,
        updates_lost=0 if kept else 200,
        folded=False if kept else None,
    )


def a_life(graft):
    start = graft.germinated_at
    path = [
        (start, GraftStage.GERMINATED),
        (start, GraftStage.AUDITION),
        (start + 100, GraftStage.BLENDING),
        (start + 200, GraftStage.HOLDING),
        (start + 300, graft.stage),
    ]
    before = None
    entries = []
    for update, stage in path:
        entries.append(
            TimelineEntry(
                update=update,
                graft=graft.graft,
                site=graft.site,
                blueprint=graft.blueprint,
                before=before,
                after=stage,
                reason="the next step",
            )
        )
        before = stage
    return entries


def make_run_report(shift=0, **other):
    """Return a run in which the first graft stays and the second is removed."""
    grafts = (
        a_graft(1, 200 + shift, kept=True),
        a_graft(2, 600 + shift, kept=False, site="0", blueprint="mlp-8"),
    )
    alphas = [
        AlphaPoint(update=graft.admitted_at + late, graft=graft.graft, alpha=alpha)
        for graft in grafts
        for late, alpha in ((0, 0.0), (100, 1.0))
    ]
    values = {
        "settings": {"verify": "fork", "overhead": 0.1},
        "updates": UPDATES,
        "evaluations": tuple(
            Evaluation(
                update=u, gate_loss=2.3 * math.exp(-u / 300) + 0.3, train_loss=2.0 - u / 1000
            )
            for u in LOOKS[::2]
        ),
        "grafts": grafts,
        "timeline": tuple(entry for graft in grafts for entry in a_life(graft)),
        "alphas": tuple(alphas),
        "work": {"training": 115200.0, "audition": 9600.0, "twins": 38400.0, "evaluation": 30000.0},
        "work_unit": "passes",
        "parameters_before": 358,
        "parameters_after": 954,
        "notes": ("the demo sets its own overhead",),
    }
    return RunReport(**(values | other))


def a_trial(package, *, kept):
    """Return a package of two kernels, with all that was measured of it."""
    start = 200 if kept else 600
    return TrialRecord(
        package=package,
        grafts=(2 * package - 1, 2 * package),
        sites=("0", "3"),
        blueprints=("mlp-8", "conv3x3-8"),
        parameters=636,
        started_at=start,
        trial_updates=200,
        decided_at=start + 200,
        verdict="kept" if kept else "refused",
        taken="candidate" if kept else "",
        reason="the loss falls by 0.0412" if kept else "not beyond luck",
        spread=1.6,
        samples=400,
        effect=0.0412 if kept else 0.0031,
        stderr=0.0101,
        z=4.07 if kept else 0.31,
        threshold=1.65,
        null_effect=0.0128,
        null_stderr=0.0094,
        capacity=0.0284 if kept else -0.0097,
        capacity_stderr=0.0099,
        capacity_shown=kept,
        going_on=0.0061,
        going_on_stderr=0.002,
        gate_loss_before=0.5123 if kept else None,
        gate_loss_after=0.4689 if kept else None,
        flops=4.1e9,
        seconds=3.2,
        memory_bytes=48 << 20,
        memory_peak_bytes=61 << 20,
    )


def a_kernel_of(trial, index, **other):
    """Return a kernel of a package, which stayed where its package did."""
    kept = trial.verdict == "kept"
    values = {
        "graft": trial.grafts[index],
        "site": trial.sites[index],
        "seed_idx": 0,
        "blueprint": trial.blueprints[index],
        "artifact_id": f"{trial.grafts[index]:064x}",
        "stage": GraftStage.FOSSILIZED if kept else GraftStage.CULLED,
        "verdict": "fossilized" if kept else "refused in trial",
        "reason": trial.reason,
        "parameters": 318,
        "germinated_at": trial.started_at,
        "admitted_at": trial.decided_at if kept else None,
        "decided_at": trial.decided_at + 100 * kept,
        "dependence": 0.2 if kept else None,
        "folded": False if kept else None,
        "package": trial.package,
    }
    return GraftRecord(**(values | other))


def a_life_in_a_trial(graft):
    path = [(graft.germinated_at, GraftStage.GERMINATED), (graft.germinated_at, GraftStage.TRIAL)]
    if graft.admitted_at is not None:
        path.append((graft.admitted_at, GraftStage.HOLDING))
    path.append((graft.decided_at, graft.stage))
    return [
        TimelineEntry(
            update=update,
            graft=graft.graft,
            site=graft.site,
            blueprint=graft.blueprint,
            before=path[place - 1][1] if place else None,
            after=stage,
            reason="the next step",
        )
        for place, (update, stage) in enumerate(path)
    ]


def make_twin_report(**other):
    """Return a run of which one package stays but for a passenger, and one is refused."""
    trials = (a_trial(1, kept=True), a_trial(2, kept=False))
    passenger = {"stage": GraftStage.CULLED, "verdict": "removed as a passenger"}
    grafts = tuple(
        a_kernel_of(trial, index, **(passenger if (trial.package, index) == (1, 1) else {}))
        for trial in trials
        for index in (0, 1)
    )
    values = {
        "settings": {"trial": "twin", "attribution": "trial"},
        "grafts": grafts,
        "trials": trials,
        "timeline": tuple(entry for graft in grafts for entry in a_life_in_a_trial(graft)),
        "alphas": (),
        "work": {"training": 9.9e9, "evaluation": 6.2e8, "ranking": 3.1e7, "trial": 8.2e9},
        "work_unit": "flops",
        "seconds": {"training": 14.2, "evaluation": 1.1, "ranking": 0.3, "trial": 6.6},
        "overhead_limit": 9.9e9,
        "run_id": "ab",
    }
    return make_run_report(**(values | other))


def a_stage_of_depth(**other):
    """Return a stage that woke two of four blocks."""
    values = {
        "path": "body.h",
        "depth": 4,
        "blocks": ("body.h.1", "body.h.3"),
        "started_at": 900,
        "ramp_updates": 60,
        "ended_at": 960,
        "loss_before": 0.4125,
        "loss_after": 0.3875,
        "flops": 6e9,
        "verdict": "awake",
    }
    return StageRecord(**(values | other))


def make_arm_run(arm, random_seed):
    """Return one arm's curve: a rise that flattens, with a second rise where it grew."""
    late = 300 + 10 * random_seed
    accuracy = tuple(
        90.0
        + random_seed % 3
        - 80.0 * math.exp(-u / 110)
        + BENDS[arm] * (1 / (1 + math.exp(-(u - late) / 60)))
        + 0.4 * math.sin(u / 17 + random_seed)
        for u in LOOKS
    )
    final = {"host": 358, "scratch": 954}.get(arm)
    return ArmRun(
        arm=arm,
        random_seed=random_seed,
        updates=LOOKS,
        accuracy=accuracy,
        parameters=tuple(final or (358 if u < late else 954) for u in LOOKS),
        report=make_run_report(10 * random_seed) if arm in {"grown", "random"} else None,
    )


def make_demo_report(random_seeds=tuple(range(10)), bends=BENDS, **other):
    """Return a demo in which growth beats the host and random choice, and not scratch."""
    arms = {
        arm: ArmReport(
            accuracy=tuple(90.0 + s % 3 + bend + 0.3 * ((s * 7) % 5) for s in random_seeds)
            if arm != "scratch"
            else tuple(90.0 + s % 3 + bend + 0.5 * ((s * 3) % 4) for s in random_seeds),
            parameters_by_seed=tuple(358 if arm == "host" else 954 for _ in random_seeds),
            train_flops=2.1e9 if arm == "host" else 6.3e9,
            latency_us=41.0 if arm == "host" else 77.0,
            seconds=2.4,
            worst_dip_points=0.6 if arm in {"grown", "random"} else None,
        )
        for arm, bend in bends.items()
    }
    rows = [("noop", 20, 0, 0, 0), ("noise", 20, 1, 0, 2)]
    rows += [("capacity_free", 20, 9, 1, 13), ("random_features", 20, 2, 0, 8)]
    values = {
        "random_seeds": tuple(random_seeds),
        "updates": UPDATES,
        "arms": arms,
        "controls": ControlsReport(
            rows=tuple(
                ControlRow(kind=kind, tried=a, admitted=b, fossilized=c, naive_accepted=d)
                for kind, a, b, c, d in rows
            )
        ),
        "ranking_spearman": 0.54,
        "export_max_rel_diff": 3.1e-8,
        "dormant_identical": True,
        "environment": {"torch": "2.13.0+cpu", "threads": 1},
        "settings": {"horizon": 1200},
        "runs": tuple(make_arm_run(arm, seed) for seed in random_seeds for arm in BENDS),
        "seconds": 121.0,
        "notes": ("evaluation every 10 updates",),
    }
    return DemoReport(**(values | other))


@pytest.fixture
def demo_report():
    """A demo of ten random seeds."""
    return make_demo_report()


@pytest.fixture
def make_demo():
    """The maker of demos, for those that differ in a field."""
    return make_demo_report


@pytest.fixture
def make_run():
    """The maker of run reports, for those that differ in a field."""
    return make_run_report


@pytest.fixture
def make_twin():
    """The maker of reports of runs with packages, for those that differ in a field."""
    return make_twin_report


@pytest.fixture
def stage_of_depth():
    """A stage that woke two of four blocks."""
    return a_stage_of_depth()
