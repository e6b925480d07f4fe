"""``report.html``: the demo's page, and the page of a single run."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from esper.contracts.report import ARMS
from esper.contracts.report_text import OPTIMISTIC, WORDS, flops_text
from esper.contracts.run_report import headline_sentences, words_for
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
    section,
    settings_table,
    table,
)
from esper.observability.trial_parts import (
    cost_table,
    depth_table,
    effect_figure,
    evidence_table,
    outcome_table,
    package_marks,
    words_list,
)
from esper.observability.wording import (
    ARM_NAMES,
    CONTROL_NAMES,
    NOT_MEASURED,
    interval_text,
    measured_text,
    metric_text,
    not_beaten,
    number_text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.contracts.report import ArmReport, ArmRun, DemoReport, RunReport, TrialRecord
    from esper.observability.charts import Mark

MIN_LATE = 4
"""Readings from which on an axis is cut to them."""
MARK_CAPTION = (
    "Triangle: a package is taken over, or a graft admitted; diamond: it is made permanent; cross: "
    "it is refused or removed."
)


def demo_page(report: DemoReport) -> str:
    """Return the demo's page as HTML. Its first sentence says what growth beat and what not."""
    done = f"{len(report.random_seeds)} random seeds were completed"
    return document(
        "Esper demo: growing a digit classifier",
        not_beaten(report),
        intro=[_stopped(report.interrupted, done), _demo_facts(report)],
        sections=[
            section(
                "The arms", _arm_table(report), _difference_table(report), _accuracy_figure(report)
            ),
            section("Each random seed", _seed_figures(report)),
            section("The lifecycle", _lane_figure(report), _alpha_figure(report)),
            section("Parameters", _parameter_figure(report)),
            section("Grafts", *_demo_graft_tables(report)),
            section("Controls", _control_table(report)),
            notes(report.notes),
            section("How this was run", *_demo_settings(report)),
        ],
    )


def run_page(report: RunReport) -> str:
    """Return the page of one run as HTML. Its first sentences are those of the terminal."""
    changes = [(str(entry.graft), entry) for entry in report.timeline]
    return document(
        "Esper: a run of growth",
        *headline_sentences(report),
        intro=[
            _stopped(report.interrupted, f"{report.updates:,} updates were done"),
            _run_facts(report),
        ],
        sections=[
            section("Loss", _loss_figure(report)),
            section("Trials", *_trial_parts(report)) if report.trials else None,
            section("Depth", depth_table(report.stages)) if report.stages else None,
            section("The lifecycle", *_life_parts(report)),
            section("Grafts", graft_table([(str(g.graft), g) for g in report.grafts])),
            section("Timeline", timeline_table(changes)),
            section("Work", *_work_parts(report)),
            notes(report.notes),
            section("Settings", *_settings_parts(report)),
        ],
    )


def _trial_parts(report: RunReport) -> list[Markup]:
    """Return the verdicts as a chart and a table, the words that they use, and the rest."""
    named = [(str(trial.package), trial) for trial in report.trials]
    hint = f" Figures of the gate split were {OPTIMISTIC}." if report.optimistic else ""
    lead = (
        "A package was tried in a copy of the run, and judged once against the run itself, which "
        f"went on untouched.{hint}"
    )
    return [
        paragraph(lead),
        effect_figure(report.trials),
        words_list(words_for(report)),
        evidence_table(named),
        outcome_table((name, trial, report) for name, trial in named),
        cost_table(named),
    ]


def _life_parts(report: RunReport) -> list[Markup]:
    title = "When each graft was tried, and what became of it"
    lanes = lanes_of(report, coloured=True)
    life = draw_lanes("lanes", title, _lane_description(report), lanes, report.updates)
    parts = [figure(life, STAGE_CAPTION)]
    if report.alphas or not report.trials:
        alphas = tuple(alpha_series(report, label="graft {graft}"))
        parts.append(_alpha_chart(alphas, report, "One colour and dash for each graft."))
    return parts


def _settings_parts(report: RunReport) -> list[Markup]:
    """Return the effective settings, with a word where the host is too small for shares."""
    settings = settings_table("Effective values.", report.settings)
    budget = report.settings.get("budget")
    limit = budget.get("small_host") if isinstance(budget, dict) else None
    if not isinstance(budget, dict) or not isinstance(limit, int | float):
        return [settings]
    if report.parameters_before >= limit:
        return [settings]
    words = (
        f"This host is small: {report.parameters_before:,} parameters, fewer than the "
        f"{limit:,.0f} of the budget's small_host. So each graft may have "
        f"{budget.get('small_graft'):,} parameters, and no limit that is a share of the host holds."
    )
    return [paragraph(words), settings]


def _stopped(interrupted: bool, done: str) -> Markup:  # noqa: FBT001 - a field, passed on
    if not interrupted:
        return Markup("")
    return paragraph(f"The run was stopped before its end: {done}.", "stopped")


def _demo_facts(report: DemoReport) -> Markup:
    controls = report.controls
    nulls = sum(row.tried for row in controls.rows)
    kept = sum(row.fossilized for row in controls.rows)
    dormant = {None: "not measured", True: "bit-identical", False: "NOT identical"}
    return facts(
        {
            "Grown minus host, points": interval_text(report.grown_minus_host, sign=True),
            "Worst dip after a change": number_text(report.worst_dip_points, ".2f", "points"),
            "Grafts made permanent": f"{report.fossilized} ({report.culled} removed)",
            "Useless controls kept": f"{kept} of {nulls}",
            "The naive on/off gate kept": f"{controls.naive_gate_accepted} of {nulls}",
            "Ranking against gain": number_text(report.ranking_spearman, "+.2f", "rank corr."),
            "Export, relative difference": number_text(report.export_max_rel_diff, ".1e"),
            "Dormant against bare model": dormant[report.dormant_identical],
        }
    )


def _arm_table(report: DemoReport) -> Markup:
    columns = (
        Column(head="arm"),
        Column(head="test accuracy, % (95 % interval)", kind="number"),
        Column(head="parameters", kind="number"),
        Column(head="training work", kind="number"),
        Column(head="forward, \u00b5s", kind="number"),
        Column(head="run, s", kind="number"),
        Column(head="worst dip, points", kind="number"),
    )
    rows = [_arm_row(ARM_NAMES[name], report.arms[name]) for name in ARMS]
    caption = (
        f"{len(report.random_seeds)} random seeds, {report.updates:,} updates each; the test split "
        "was read once, at the end. Training work includes all that growing took."
    )
    return table(caption, columns, rows, "No arm was run.")


def _arm_row(name: str, arm: ArmReport) -> tuple[str, ...]:
    return (
        name,
        interval_text(arm.accuracy_interval),
        number_text(arm.parameters, ",.0f"),
        flops_text(arm.train_flops),
        number_text(arm.latency_us, ",.0f"),
        number_text(arm.seconds, ",.1f"),
        number_text(arm.worst_dip_points, ".2f"),
    )


def _difference_table(report: DemoReport) -> Markup:
    columns = (
        Column(head="difference"),
        Column(head="points (95 % interval)", kind="number"),
        Column(head="random seeds won", kind="number"),
    )
    differences = {
        "host": report.grown_minus_host,
        "random": report.grown_minus_random,
        "scratch": report.grown_minus_scratch,
    }
    rows = [
        (f"grown minus {ARM_NAMES[name]}", interval_text(value, sign=True), _wins(report, name))
        for name, value in differences.items()
    ]
    return table("Test accuracy, paired by random seed.", columns, rows, "No arm was run.")


def _wins(report: DemoReport, name: str) -> str:
    grown, other = report.arms["grown"].accuracy, report.arms[name].accuracy
    wins = sum(a > b for a, b in zip(grown, other, strict=True))
    return f"{wins} of {len(grown)}"


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
    height = curve(_points(run, "accuracy"))
    return marks_of(run.report.grafts, height, f"random seed {run.random_seed}, ")


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


def _lane_description(report: RunReport) -> str:
    verdicts = [f"graft {g.graft}, {g.blueprint} at {g.site}: {g.verdict}" for g in report.grafts]
    return f"{'; '.join(verdicts)}."


def _alpha_figure(report: DemoReport) -> Markup:
    series = [
        line for run in report.runs_of("grown") if run.report for line in alpha_series(run.report)
    ]
    words = "Solid blue: it stayed; dashed orange: it was removed."
    return _alpha_chart(tuple(series), report, words)


def _alpha_chart(series: tuple[Series, ...], report: DemoReport | RunReport, words: str) -> Markup:
    kept = sum(line.points[-1][1] > 0.0 for line in series)
    chart = Chart(
        name="alphas",
        title="Alpha of every admitted graft over the updates",
        description=f"{kept} grafts stayed in the model; {len(series) - kept} fell back to 0.",
        x_label="updates",
        y_label="alpha",
        series=series,
        x_range=(0.0, report.updates),
        y_range=(-0.04, 1.04),
    )
    caption = f"How far each admitted graft is blended in, from 0 (not at all) to 1. {words}"
    return figure(draw_lines(chart), caption, legend(chart))


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


def _demo_graft_tables(report: DemoReport) -> list[Markup]:
    grown = [(f"{seed} \u00b7 {graft.graft}", graft) for seed, graft in report.grafts("grown")]
    other = [(f"{seed} \u00b7 {graft.graft}", graft) for seed, graft in report.grafts("random")]
    changes = [
        (f"{run.random_seed} \u00b7 {entry.graft}", entry)
        for run in report.runs_of("grown")
        if run.report
        for entry in run.report.timeline
    ]
    trials = [
        (f"{run.random_seed} \u00b7 {trial.package}", trial, run.report)
        for run in report.runs_of("grown")
        if run.report
        for trial in run.report.trials
    ]
    return [
        *_demo_trials(trials),
        paragraph("Grafts of the grown arm, named by random seed \u00b7 number."),
        graft_table(grown),
        folded("Grafts of the random arm", graft_table(other)),
        folded("Timeline of the grown arm", timeline_table(changes)),
    ]


def _demo_trials(trials: list[tuple[str, TrialRecord, RunReport]]) -> list[Markup]:
    if not trials:
        return []
    named = [(name, trial) for name, trial, _ in trials]
    return [
        paragraph("Packages of the grown arm, named by random seed \u00b7 number."),
        words_list(WORDS),
        evidence_table(named),
        outcome_table(trials),
        folded("What the trials took", cost_table(named)),
    ]


def _control_table(report: DemoReport) -> Markup:
    columns = (
        Column(head="control"),
        Column(head="tried", kind="number"),
        Column(head="admitted", kind="number"),
        Column(head="made permanent", kind="number"),
        Column(head="a naive on/off gate would keep", kind="number"),
    )
    rows = [
        (
            CONTROL_NAMES.get(row.kind, row.kind),
            *(str(n) for n in (row.tried, row.admitted, row.fossilized, row.naive_accepted)),
        )
        for row in report.controls.rows
    ]
    caption = (
        "Kernels that add nothing, put through the same gates. The naive gate switches a trained "
        "graft off and keeps it if that hurts: it measures dependence, not what the graft brought."
    )
    return table(caption, columns, rows, "No control was run.")


def _demo_settings(report: DemoReport) -> list[Markup]:
    return [
        paragraph(f"The whole demo took {report.seconds:,.0f} s."),
        folded("Environment", settings_table("Where it ran.", report.environment)),
        folded("Settings", settings_table("The demo's own settings.", report.settings)),
    ]


def _run_facts(report: RunReport) -> Markup:
    pairs = {
        "Updates": f"{report.updates:,}",
        "Parameters before": f"{report.parameters_before:,}",
        "Parameters after": f"{report.parameters_after:,}",
        **_growing_share(report),
    }
    gate = measured_text(report.progress_row())
    training = gate.pop("training loss", None)
    gate = {name.removeprefix("gate "): text for name, text in gate.items()}
    if training is not None:
        pairs["Training loss"] = training
    if report.comparison is not None:
        measure = report.comparison.measure.capitalize()
        pairs[f"{measure} without growth"] = f"{report.comparison.control:.4g}"
    test = {name: metric_text(name, value) for name, value in report.test_metrics.items()}
    splits = (("Gate", gate), ("Test", test))
    return facts(pairs | {f"{split} {n}": text for split, own in splits for n, text in own.items()})


def _growing_share(report: RunReport) -> dict[str, str]:
    """Return what share growing took, under the name of what it is a share of."""
    if report.updates and not report.work.get("training"):
        return {"Work spent on growing": "not known"}
    if report.work_unit == "passes":
        return {"Work spent on growing": f"{report.overhead_share:.1%}"}
    return {"Growing over training, FLOPs": f"{report.overhead_share:.1%}"}


def _loss_figure(report: RunReport) -> Markup:
    gate = _gate_points(report)
    alone = () if report.control is None else _gate_points(report.control)
    train = tuple(
        (float(e.update), e.train_loss) for e in report.evaluations if e.train_loss is not None
    )
    ends = f" from {gate[0][1]:.4g} to {gate[-1][1]:.4g}" if gate else ""
    y_range = _effect_range(report, (gate, alone, train))
    chart = Chart(
        name="loss",
        title="Loss over the updates",
        description=f"The loss on the gate split went{ends}.",
        x_label="updates",
        y_label="loss",
        series=(
            Series(style="host", points=train, label="training loss"),
            Series(style="scratch", points=alone, label="gate loss, control"),
            Series(style="grown", points=gate, label="gate loss"),
        ),
        x_range=(0.0, report.updates),
        y_range=y_range,
        marks=tuple(_loss_marks(report, gate)),
    )
    captions = [MARK_CAPTION, "Each has the colour and number of its package (P) or graft."]
    if report.stages:
        captions.append("Block: a stage of depth begins.")
    if report.control is not None:
        captions.append("Control: the same job without growth.")
    if y_range is not None and gate[0][1] > y_range[1]:
        captions.append(
            f"The axis is cut at {y_range[1]:.3g}, to show what came later; the gate loss began "
            f"at {gate[0][1]:.3g}."
        )
    if report.optimistic:
        captions.append(f"There is no test split, so every figure was {OPTIMISTIC}.")
    return figure(draw_lines(chart), " ".join(captions), legend(chart))


def _loss_marks(report: RunReport, gate: tuple[tuple[float, float], ...]) -> list[Mark]:
    if not gate:
        return []
    single = marks_of(report.grafts, curve(gate), coloured=True)
    return [*single, *package_marks(report, gate)]


def _gate_points(report: RunReport) -> tuple[tuple[float, float], ...]:
    return tuple((float(e.update), e.gate_loss) for e in report.evaluations)


def _effect_range(
    report: RunReport, lines: tuple[tuple[tuple[float, float], ...], ...]
) -> tuple[float, float] | None:
    """Return a range of losses that shows what grafts did, and not only how the run began.

    It holds everything from the first admission on, or from where a sixth of the run was done if
    that was earlier. None where nothing was read there.
    """
    admitted = [g.admitted_at for g in report.grafts if g.admitted_at is not None]
    admitted += [t.decided_at for t in report.trials if t.decided_at is not None]
    start = min([report.updates / 6, *admitted])
    late = [loss for line in lines for update, loss in line if update >= start]
    if len(late) < MIN_LATE:
        return None
    low, high = min(late), max(late)
    room = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return low - room, high + room


def _work_parts(report: RunReport) -> list[Markup]:
    """Return what growing took, what it might take, and all work by category."""
    if report.work_unit == "passes":
        return [_pass_table(report)]
    training = report.seconds.get("training")
    growing_s = sum(report.seconds.values()) - (training or 0.0)
    known = report.overhead_limit is not None
    figures = {
        "Spent on growing": flops_text(report.overhead),
        "Growing may take": flops_text(report.overhead_limit) if known else "no limit was recorded",
        "Share of training's FLOPs": f"{report.overhead_share:.1%}",
    }
    if training is not None:
        figures["Wall time beside training"] = f"{growing_s:,.1f} s of {training:,.1f} s"
    return [facts(figures), _flops_table(report)]


def _flops_table(report: RunReport) -> Markup:
    training = report.work.get("training", 0.0)
    columns = (
        Column(head="category"),
        Column(head="FLOPs", kind="number"),
        Column(head="over training's", kind="number"),
        Column(head="wall time, s", kind="number"),
    )
    rows = [
        (
            name,
            flops_text(report.work.get(name)),
            f"{report.work.get(name, 0.0) / training:.1%}" if training else NOT_MEASURED,
            number_text(report.seconds.get(name), ",.2f"),
        )
        for name in {**report.work, **report.seconds}
    ]
    caption = (
        "FLOPs of what was executed, kernels included. A trial counts the updates of its twins; "
        "evaluation is of the gate split."
    )
    return table(caption, columns, rows, "No work was counted.")


def _pass_table(report: RunReport) -> Markup:
    total = sum(report.work.values())
    columns = (
        Column(head="category"),
        Column(head="forwards of one sample", kind="number"),
        Column(head="share", kind="number"),
    )
    rows = [
        (name, f"{work:,.0f}", f"{work / total if total else 0.0:.1%}")
        for name, work in report.work.items()
    ]
    caption = "A forward of one sample counts 1, a forward and backward 3."
    return table(caption, columns, rows, "No work was counted.")
