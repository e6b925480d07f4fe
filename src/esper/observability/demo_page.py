"""``report.html``: the demo's page."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

from esper.contracts.report import ARMS, OPPONENTS
from esper.contracts.report_text import WORDS, flops_text
from esper.observability.charts import SMALL, Chart, Series, draw_lanes, draw_lines, legend
from esper.observability.graft_parts import (
    STAGE_CAPTION,
    alpha_series,
    curve,
    graft_table,
    lanes_of,
    marks_of,
    timeline_table,
)
from esper.observability.markup import Markup, element
from esper.observability.page_frame import (
    Column,
    document,
    facts,
    figure,
    folded,
    notes,
    paragraph,
    parts_of,
    section,
    settings_table,
    table,
)
from esper.observability.report_page import MARK_CAPTION, alpha_chart, stopped
from esper.observability.trial_parts import (
    cost_table,
    evidence_table,
    outcome_table,
    package_marks,
    words_list,
)
from esper.observability.wording import (
    ARM_NAMES,
    CONTROL_NAMES,
    control_counts,
    difference_of,
    dip_text,
    interval_text,
    not_beaten,
    number_text,
    stage_rows,
    wins_text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.contracts.report import ArmReport, ArmRun, DemoReport, RunReport, TrialRecord
    from esper.observability.charts import Mark


def demo_page(report: DemoReport) -> str:
    """Return the demo's page as HTML. Its first sentence says the good and the bad."""
    done = f"{len(report.random_seeds)} random seeds were completed"
    parts = parts_of(
        "Esper demo: growing a digit classifier",
        not_beaten(report),
        intro=[stopped(report.interrupted, done), _demo_facts(report)],
        sections=[
            section(
                "The arms", _arm_table(report), _difference_table(report), _accuracy_figure(report)
            ),
            section("Each random seed", _seed_figures(report)),
            section("Packages", *_trial_parts(report)),
            section("Controls", _control_table(report)),
            section("A language model by stages", *_stage_parts(report)) if report.stages else None,
            section("The lifecycle", *_life_parts(report)),
            section("Parameters", _parameter_figure(report)),
            section("Grafts", *_graft_tables(report)),
            notes(report.notes),
            section("How this was run", *_demo_settings(report)),
        ],
    )
    return document(parts)


def _demo_facts(report: DemoReport) -> Markup:
    controls = report.controls
    tried = sum(row.tried for row in controls.rows)
    kept, useless = controls.useless
    dormant = {None: "not measured", True: "bit-identical", False: "NOT identical"}
    return facts(
        {
            "Grown minus host, points": interval_text(report.grown_minus_host, sign=True),
            "Against the host": wins_text(report.wins["host"]),
            "Packages taken over": f"{report.packages_passed} of {report.packages_tried}",
            "All work over training's": number_text(report.arms["grown"].work, ".2f"),
            "Worst dip after a switch, points": dip_text(report),
            "Useless controls kept": f"{kept} of {useless}",
            "Capacity claimed for controls": f"{controls.capacity_claimed} of {tried}",
            "The naive on/off gate kept": f"{controls.naive_gate_accepted} of {tried}",
            "Ranking against measured gain": number_text(
                report.ranking_spearman, "+.2f", "rank corr."
            ),
            "Grafts made permanent": f"{report.fossilized} ({report.culled} removed)",
            "Export, relative difference": number_text(report.export_max_rel_diff, ".1e"),
            "Dormant against bare model": dormant[report.dormant_identical],
        }
    )


def _arm_table(report: DemoReport) -> Markup:
    columns = (
        Column(head="arm"),
        Column(head="test accuracy, % (95 % interval)", kind="number"),
        Column(head="last look, %", kind="number"),
        Column(head="parameters", kind="number"),
        Column(head="FLOPs", kind="number"),
        Column(head="over its own training's", kind="number"),
        Column(head="forward, \u00b5s", kind="number"),
        Column(head="run, s", kind="number"),
        Column(head="worst dip, points", kind="number"),
    )
    rows = [_arm_row(ARM_NAMES[name], report.arms[name]) for name in ARMS]
    caption = (
        f"{len(report.random_seeds)} random seeds, {report.updates:,} updates each. Test accuracy: "
        "mean of the looks after each of the last ten epochs. FLOPs include all that growing took. "
        "The dip of the host is its own largest fall in the windows after the others' switches."
    )
    return table(caption, columns, rows, "No arm was run.")


def _arm_row(name: str, arm: ArmReport) -> tuple[str, ...]:
    return (
        name,
        interval_text(arm.accuracy_interval),
        number_text(statistics.fmean(arm.accuracy_last) if arm.accuracy_last else None, ".2f"),
        number_text(arm.parameters, ",.0f"),
        flops_text(arm.train_flops),
        number_text(arm.work, ".2f"),
        number_text(arm.latency_us, ",.0f"),
        number_text(arm.seconds, ",.1f"),
        number_text(arm.worst_dip_points, ".2f"),
    )


def _difference_table(report: DemoReport) -> Markup:
    columns = (
        Column(head="difference"),
        Column(head="points (95 % interval)", kind="number"),
        Column(head="random seeds"),
    )
    rows = [
        (
            f"grown minus {ARM_NAMES[name]}",
            interval_text(difference_of(report, name), sign=True),
            wins_text(report.wins[name]),
        )
        for name in OPPONENTS
    ]
    caption = (
        "Test accuracy, paired by random seed. Where every package was refused the grown network "
        "is the host, bit for bit, and that is a tie."
    )
    return table(caption, columns, rows, "No arm was run.")


def _mean_points(runs: Sequence[ArmRun], field: str) -> tuple[tuple[float, float], ...]:
    """Return the mean over runs at every update that all of them looked at."""
    if not runs:
        return ()
    values = [dict(zip(run.updates, getattr(run, field), strict=True)) for run in runs]
    shared = sorted(set.intersection(*(set(value) for value in values)))
    return tuple((x, statistics.fmean(value[x] for value in values)) for x in shared)


def _points(run: ArmRun, field: str) -> tuple[tuple[float, float], ...]:
    return tuple(zip(run.updates, getattr(run, field), strict=True))


def _arm_series(report: DemoReport, field: str, *, steps: bool = False) -> tuple[Series, ...]:
    """Return faint lines for every run and one bold line per arm, the mean."""
    faint = [
        Series(style=run.arm, points=_points(run, field), steps=steps)
        for run in report.runs
        if run.arm in {"host", "grown"}
    ]
    means = [
        Series(
            style=arm,
            points=_mean_points(report.runs_of(arm), field),
            label=ARM_NAMES[arm],
            steps=steps,
        )
        for arm in ARMS
    ]
    return (*faint, *means)


def _late_range(report: DemoReport) -> tuple[float, float] | None:
    """Return a range of accuracies that shows the late part, in which arms differ, well."""
    late = [
        accuracy
        for run in report.runs
        for update, accuracy in zip(run.updates, run.accuracy, strict=True)
        if update >= report.updates * 0.15
    ]
    if not late:
        return None
    low = min(late) // 5 * 5
    return low, min(100.0, max(late) + 1.0)


def _accuracy_figure(report: DemoReport) -> Markup:
    marks = [mark for run in report.runs_of("grown") for mark in _run_marks(run)]
    y_range = _late_range(report)
    ends = ", ".join(
        f"{ARM_NAMES[arm]} {points[-1][1]:.1f} %"
        for arm in ARMS
        if (points := _mean_points(report.runs_of(arm), "accuracy"))
    )
    chart = Chart(
        name="accuracy",
        title="Gate accuracy of all arms over the updates",
        description=f"Mean accuracy on the gate split at the last update: {ends}.",
        x_label="updates",
        y_label="accuracy on the gate split, %",
        series=_arm_series(report, "accuracy"),
        marks=tuple(marks),
        x_range=(0.0, report.updates),
        y_range=y_range,
    )
    cut = f" The axis starts at {y_range[0]:.0f} %." if y_range else ""
    caption = (
        "Bold: mean over random seeds. Faint: each random seed of the host and the grown arm, with "
        f"the lifecycle marked on it. {MARK_CAPTION}{cut}"
    )
    return figure(draw_lines(chart), caption, legend(chart))


def _run_marks(run: ArmRun) -> list[Mark]:
    if run.report is None or not run.updates:
        return []
    points, prefix = _points(run, "accuracy"), f"random seed {run.random_seed}, "
    if not run.report.trials:
        return marks_of(run.report.grafts, curve(points), prefix)
    found = package_marks(run.report, points)
    return [replace(mark, text=f"{prefix}{mark.text}", style="", label="") for mark in found]


def _seed_figures(report: DemoReport) -> Markup:
    drawings = [_seed_figure(report, random_seed) for random_seed in report.random_seeds]
    if not drawings:
        return paragraph("No random seed was completed.", "empty")
    caption = paragraph(f"Gate accuracy, every arm, one random seed each. {MARK_CAPTION}")
    return element("div", caption, element("div", *drawings, class_="small"))


def _seed_figure(report: DemoReport, random_seed: int) -> Markup:
    runs = [run for run in report.runs if run.random_seed == random_seed]
    series = [
        Series(style=run.arm, points=_points(run, "accuracy"), label=ARM_NAMES[run.arm])
        for run in runs
    ]
    marks = [mark for run in runs if run.arm == "grown" for mark in _run_marks(run)]
    ends = ", ".join(f"{ARM_NAMES[r.arm]} {r.accuracy[-1]:.1f} %" for r in runs if r.accuracy)
    chart = Chart(
        name=f"seed-{random_seed}",
        title=f"Gate accuracy at random seed {random_seed}",
        description=f"At the last update: {ends}.",
        x_label="updates",
        y_label="accuracy, %",
        series=tuple(series),
        marks=tuple(marks),
        x_range=(0.0, report.updates),
        y_range=_late_range(report),
        frame=SMALL,
    )
    return figure(draw_lines(chart), f"Random seed {random_seed}")


def _life_parts(report: DemoReport) -> list[Markup]:
    """Return the lives of the grafts, and their alphas where these moved."""
    moved = any(run.report and run.report.alphas for run in report.runs_of("grown"))
    return [_lane_figure(report), *([_alpha_figure(report)] if moved else [])]


def _lane_figure(report: DemoReport) -> Markup:
    runs = [run for run in report.runs_of("grown") if run.report]
    lanes = [
        lane
        for run in runs
        if run.report
        for lane in lanes_of(run.report, f"{run.random_seed} \u00b7 ")
    ]
    title = "When each graft of the grown arm was tried, and what became of it"
    description = f"{report.fossilized} grafts were made permanent and {report.culled} removed."
    drawing = draw_lanes("lanes", title, description, lanes, report.updates)
    return figure(drawing, f"{STAGE_CAPTION} Labels: random seed \u00b7 graft.")


def _alpha_figure(report: DemoReport) -> Markup:
    series = [
        line for run in report.runs_of("grown") if run.report for line in alpha_series(run.report)
    ]
    words = "Solid blue: it stayed; dashed orange: it was removed."
    return alpha_chart(tuple(series), report, words)


def _parameter_figure(report: DemoReport) -> Markup:
    ends = ", ".join(
        f"{ARM_NAMES[arm]} {number_text(report.arms[arm].parameters, ',.0f')}" for arm in ARMS
    )
    chart = Chart(
        name="parameters",
        title="Parameters of all arms over the updates",
        description=f"Mean of the final models: {ends}.",
        x_label="updates",
        y_label="parameters",
        series=_arm_series(report, "parameters", steps=True),
        x_range=(0.0, report.updates),
    )
    caption = (
        "Bold: mean over random seeds. A fold puts a kernel into the host's own weights, so that "
        "its parameters are gone again and what they learned stays."
    )
    return figure(draw_lines(chart), caption, legend(chart))


def _graft_tables(report: DemoReport) -> list[Markup]:
    grown = [(f"{seed} \u00b7 {graft.graft}", graft) for seed, graft in report.grafts("grown")]
    other = [(f"{seed} \u00b7 {graft.graft}", graft) for seed, graft in report.grafts("random")]
    changes = [
        (f"{run.random_seed} \u00b7 {entry.graft}", entry)
        for run in report.runs_of("grown")
        if run.report
        for entry in run.report.timeline
    ]
    return [
        paragraph("Grafts of the grown arm, named by random seed \u00b7 number."),
        graft_table(grown),
        folded("Grafts of the random arm", graft_table(other)),
        folded("Timeline of the grown arm", timeline_table(changes)),
    ]


def _trial_parts(report: DemoReport) -> list[Markup]:
    trials = _named_trials(report, "grown")
    if not trials:
        return [paragraph("No package was tried.", "empty")]
    named = [(name, trial) for name, trial, _ in trials]
    other = [(name, trial) for name, trial, _ in _named_trials(report, "random")]
    return [
        paragraph("Packages of the grown arm, named by random seed \u00b7 number."),
        words_list(WORDS),
        evidence_table(named),
        folded("What became of them", outcome_table(trials)),
        folded("What the trials took", cost_table(named)),
        folded("Packages of the random arm", evidence_table(other)),
    ]


def _named_trials(report: DemoReport, arm: str) -> list[tuple[str, TrialRecord, RunReport]]:
    return [
        (f"{run.random_seed} \u00b7 {trial.package}", trial, run.report)
        for run in report.runs_of(arm)
        if run.report
        for trial in run.report.trials
    ]


def _control_table(report: DemoReport) -> Markup:
    columns = (
        Column(head="control"),
        Column(head="tried", kind="number"),
        Column(head="taken over", kind="number"),
        Column(head="kept", kind="number"),
        Column(head="capacity claimed", kind="number"),
        Column(head="a naive on/off gate would keep", kind="number"),
    )
    rows = [
        (CONTROL_NAMES.get(row.kind, row.kind), *(str(n) for n in control_counts(row)))
        for row in report.controls.rows
    ]
    caption = (
        "Packages without capacity, put through the same trial. A linear one may be kept, since "
        "the treatment itself may help, but no capacity may be claimed for it: its null is the "
        "same package begun with other random numbers. The naive gate switches a trained graft "
        "off and keeps it if that hurts: it measures dependence, not what the graft brought."
    )
    return table(caption, columns, rows, "No control was run.")


def _stage_parts(report: DemoReport) -> list[Markup]:
    """Return the language model's arms: what was run here, and what was recorded before."""
    columns = (
        Column(head="arm"),
        Column(head="final loss, nats", kind="number"),
        Column(head="FLOPs", kind="number"),
        Column(head="saved at equal loss, % (95 % interval)", kind="number"),
        Column(head="from"),
    )
    caption = (
        "A small transformer that is trained with few blocks and deepened late. A run of this demo "
        "is too short to save anything and claims nothing; what is recorded comes from "
        "make bench-growth."
    )
    return [table(caption, columns, stage_rows(report), "No arm was run.")]


def _demo_settings(report: DemoReport) -> list[Markup]:
    return [
        paragraph(f"The whole demo took {report.seconds:,.0f} s."),
        folded("Environment", settings_table("Where it ran.", report.environment)),
        folded("Settings", settings_table("The demo's own settings.", report.settings)),
    ]
