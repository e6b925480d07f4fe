"""``report.html``: the page of a single run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.contracts.lifecycle import GraftStage
from esper.contracts.progress import metric_text
from esper.contracts.report_text import (
    OPTIMISTIC,
    flops_text,
    of_packages,
    of_single_grafts,
    of_stages,
)
from esper.contracts.run_report import beyond_limit, headline_sentences, words_for, work_text
from esper.observability.charts import SMALL, Chart, Series, draw_lanes, draw_lines, legend
from esper.observability.graft_parts import (
    STAGE_CAPTION,
    alpha_series,
    curve,
    graft_table,
    lanes_of,
    marks_of,
    registry_table,
    timeline_table,
)
from esper.observability.markup import Markup, element, join
from esper.observability.model_parts import model_figure, sites_of
from esper.observability.page_frame import (
    Column,
    document,
    facts,
    figure,
    notes,
    paragraph,
    parts_of,
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
    NOT_MEASURED,
    bytes_text,
    duration_text,
    number_text,
)

if TYPE_CHECKING:
    from esper.contracts.report import DemoReport, RunReport
    from esper.observability.charts import Mark
    from esper.observability.page_frame import Parts

MOST_METRICS: Final = 12
"""Charts of metrics on a page."""
MIN_LATE = 4
"""Readings from which on an axis is cut to them."""
MARK_CAPTION = (
    "Triangle: a package is taken over, or a graft admitted; diamond: it is made permanent; cross: "
    "it is refused or removed."
)


IN_THE_REPORT: Final = "in report.json, at the end"
"""Stands for what no event tells."""

TITLE: Final = "Esper: a run of growth"
"""Heading of a run's page."""


def run_page(report: RunReport, *, base: str | None = None) -> str:
    """Return the page of one run as HTML. Its first sentences are those of the terminal.

    Args:
        report: The run.
        base: Address that its links start from; None is its own.
    """
    return document(run_parts(report), base=base)


def run_parts(
    report: RunReport,
    *,
    title: str = TITLE,
    under_way: bool = False,
    span: int | None = None,
    elapsed_s: float | None = None,
) -> Parts:
    """Return what a run's page says.

    Args:
        report: The run, as far as it has come.
        title: Its heading.
        under_way: Whether it goes on.
        span: Updates that its charts have room for; None for those that were done.
        elapsed_s: Seconds since it began, where it goes on; None where not known.
    """
    changes = [(str(entry.graft), entry) for entry in report.timeline]
    span = max(span or 0, report.updates)
    done = f"{report.updates:,} updates were done"
    lead = _under_way(report, span) if under_way else headline_sentences(report)
    has_metrics = any(reading.metrics for reading in report.evaluations)
    return parts_of(
        title,
        *lead,
        intro=[
            stopped(report.interrupted, done),
            _run_facts(report, elapsed_s, under_way=under_way),
        ],
        sections=[
            section("Loss", _loss_figure(report, span)),
            section("The model", model_figure(report)) if sites_of(report) else None,
            section("Seeds at work", seed_table(report)) if report.seeds else None,
            section("Metrics", metric_figures(report, span)) if has_metrics else None,
            section("Trials", *_trial_parts(report)) if report.trials else None,
            section("Depth", depth_table(report.stages)) if report.stages else None,
            section("The lifecycle", *_life_parts(report, span)),
            section("Grafts", *_graft_parts(report)),
            section("Timeline", timeline_table(changes)),
            section("Faults and health", incident_table(report)) if report.incidents else None,
            section("Work", *_work_parts(report)),
            notes(report.notes),
            section("Settings", *_settings_parts(report)),
        ],
    )


def _under_way(report: RunReport, span: int) -> list[str]:
    """Say where a run is that goes on, and then what has met something so far."""
    of = f" of {span:,}" if span > report.updates else ""
    decided = [trial for trial in report.trials if trial.verdict != "in trial"]
    grafts = [graft for graft in report.grafts if graft.decided_at is not None]
    had_twins = report.settings.get("verify") == "fork"
    told = [
        *of_packages(decided, report.grafts, optimistic=report.optimistic, interrupted=False),
        *of_single_grafts(grafts, had_twins=had_twins),
        *of_stages(report.stages),
    ]
    first = f"Under way, at update {report.updates:,}{of}."
    return [first, *(told or ["Nothing has come to a verdict yet."])]


def incident_table(report: RunReport) -> Markup:
    """Return what went wrong with seeds and sources, and came right again, as a table."""
    columns = (
        Column(head="first at", kind="number"),
        Column(head="last at", kind="number"),
        Column(head="times", kind="number"),
        Column(head="where"),
        Column(head="what was said last", kind="text"),
    )
    rows = [
        (f"{i.since:,}", f"{i.last:,}", f"{i.times:,}", i.where, i.text) for i in report.incidents
    ]
    caption = "One row for each thing that went wrong, however often it did, by updates."
    return table(caption, columns, rows, "Nothing went wrong.")


def seed_table(report: RunReport) -> Markup:
    """Return how each seed that contributed was doing, when it was last told, as a table."""
    columns = (
        Column(head="where"),
        Column(head="state"),
        Column(head="alpha", kind="number"),
        Column(head="calls read", kind="number"),
        Column(head="faulty", kind="number"),
        Column(head="of the last 200", kind="number"),
        Column(head="health", kind="number"),
        Column(head="latency, us", kind="number"),
        Column(head="kernel", kind="number"),
    )
    rows = [
        (
            f"{seed.site or '(root)'}, seed {seed.seed_idx}",
            seed.state.replace("_", " "),
            f"{seed.alpha:.2g}",
            f"{seed.calls:,}",
            f"{seed.faults:,}",
            f"{seed.fault_rate:.1%}",
            number_text(seed.health),
            number_text(seed.latency_us, ",.0f"),
            bytes_text(seed.size_bytes),
        )
        for seed in report.seeds
    ]
    caption = (
        f"Seeds that contributed at update {report.seeds[-1].update:,}, when that was last told. "
        f"Health and latency are taken under telemetry; {NOT_MEASURED} was not."
    )
    return table(caption, columns, rows, "No seed contributed.")


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


def _graft_parts(report: RunReport) -> list[Markup]:
    """Return every graft, and which of them came from a registry, where any did."""
    parts = [graft_table([(str(g.graft), g) for g in report.grafts])]
    theirs = [graft for graft in report.grafts if graft.is_of_a_registry]
    if theirs:
        parts.append(registry_table(theirs))
    return parts


def _life_parts(report: RunReport, span: int) -> list[Markup]:
    title = "When each graft was tried, and what became of it"
    lanes = lanes_of(report, coloured=True)
    told = _lane_description(report)
    life = draw_lanes("lanes", title, told, lanes, report.updates, span=span)
    parts = [figure(life, STAGE_CAPTION)]
    if report.alphas or not report.trials:
        alphas = tuple(alpha_series(report, label="graft {graft}"))
        words = "One colour and dash for each graft."
        parts.append(alpha_chart(alphas, report, words, span=span))
    return parts


def _settings_parts(report: RunReport) -> list[Markup]:
    """Return the effective settings, with a word where the host is too small for shares."""
    settings = settings_table("Effective values.", report.settings)
    budget = report.settings.get("budget")
    limit = budget.get("small_host") if isinstance(budget, dict) else None
    if not isinstance(budget, dict) or not isinstance(limit, int | float):
        return [settings]
    if report.parameters_before is None or report.parameters_before >= limit:
        return [settings]
    words = (
        f"This host is small: {report.parameters_before:,} parameters, fewer than the "
        f"{limit:,.0f} of the budget's small_host. So each graft may have "
        f"{budget.get('small_graft'):,} parameters, and no limit that is a share of the host holds."
    )
    return [paragraph(words), settings]


def stopped(interrupted: bool, done: str) -> Markup:  # noqa: FBT001 - a field, passed on
    """Return a paragraph that says what was done, where a run was stopped; else nothing."""
    if not interrupted:
        return Markup("")
    return paragraph(f"The run was stopped before its end: {done}.", "stopped")


def _lane_description(report: RunReport) -> str:
    verdicts = [f"graft {g.graft}, {g.blueprint} at {g.site}: {g.verdict}" for g in report.grafts]
    return f"{'; '.join(verdicts)}."


def alpha_chart(
    series: tuple[Series, ...], report: DemoReport | RunReport, words: str, *, span: int = 0
) -> Markup:
    """Return the chart of alphas; the words go behind its caption.

    Args:
        series: The alphas.
        report: Whose they are.
        words: Said of them.
        span: Updates that it has room for, where those are more than were done.
    """
    kept = sum(line.points[-1][1] > 0.0 for line in series)
    chart = Chart(
        name="alphas",
        title="Alpha of every admitted graft over the updates",
        description=f"{kept} grafts stayed in the model; {len(series) - kept} fell back to 0.",
        x_label="updates",
        y_label="alpha",
        series=series,
        x_range=(0.0, max(span, report.updates)),
        y_range=(-0.04, 1.04),
    )
    caption = f"How far each admitted graft is blended in, from 0 (not at all) to 1. {words}"
    return figure(draw_lines(chart), caption, legend(chart))


def _run_facts(report: RunReport, elapsed_s: float | None, *, under_way: bool) -> Markup:
    pairs = {
        "Updates": f"{report.updates:,}",
        **(_standing(report, elapsed_s) if under_way else _sizes_and_share(report)),
    }
    theirs = {g.artifact_id for g in report.grafts if g.is_of_a_registry}
    if theirs:
        pairs["Kernels from a registry"] = f"{len(theirs):,}"
    gate = report.progress_row().measured()
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


def _standing(report: RunReport, elapsed_s: float | None) -> dict[str, str]:
    """Return how long a run goes on, and what it has in its model and on trial."""
    inside = [
        g for g in report.grafts if g.admitted_at is not None and g.stage is not GraftStage.CULLED
    ]
    on_trial = [
        f"package {t.package}, {report.updates - t.started_at:,} of {t.trial_updates:,} updates"
        for t in report.trials
        if t.verdict == "in trial"
    ]
    return {
        "Time since its start": NOT_MEASURED if elapsed_s is None else duration_text(elapsed_s),
        "Parameters before": number_text(report.parameters_before, ",d"),
        "Parameters now": number_text(report.parameters_after, ",d"),
        "Kernels in the model": f"{len(inside):,}",
        "On trial": ", ".join(on_trial) or "nothing",
        **(_growing_share(report) if report.work.get("training") else {}),
    }


def _sizes_and_share(report: RunReport) -> dict[str, str]:
    return {
        "Parameters before": number_text(report.parameters_before, ",d"),
        "Parameters after": number_text(report.parameters_after, ",d"),
        **_growing_share(report),
    }


def _growing_share(report: RunReport) -> dict[str, str]:
    """Return what share growing took, under the name of what it is a share of."""
    if _is_training_unknown(report):
        spent = report.stages and report.work
        return {"Work spent on growing": flops_text(report.overhead) if spent else "not known"}
    if report.work_unit == "passes":
        return {"Work spent on growing": f"{report.overhead_share:.1%}"}
    return {"Growing over training, FLOPs": f"{report.overhead_share:.1%}"}


def _is_training_unknown(report: RunReport) -> bool:
    return bool(report.updates) and not report.work.get("training")


def loss_chart(report: RunReport, span: int = 0) -> Chart:
    """Return the losses of a run over its updates, marked where something grew or left.

    Args:
        report: The run.
        span: Updates that it has room for, where those are more than were done.
    """
    gate = _gate_points(report)
    alone = () if report.control is None else _gate_points(report.control)
    train = tuple(
        (float(e.update), e.train_loss) for e in report.evaluations if e.train_loss is not None
    )
    ends = f" from {gate[0][1]:.4g} to {gate[-1][1]:.4g}" if gate else ""
    return Chart(
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
        x_range=(0.0, max(span, report.updates)),
        y_range=_effect_range(report, (gate, alone, train)),
        marks=tuple(_loss_marks(report, gate)),
    )


def _loss_figure(report: RunReport, span: int) -> Markup:
    chart, gate = loss_chart(report, span), _gate_points(report)
    captions = [MARK_CAPTION, "Each has the colour and number of its package (P) or graft."]
    if report.stages:
        captions.append("Block: a stage of depth begins.")
    if report.control is not None:
        captions.append("Control: the same job without growth.")
    if chart.y_range is not None and gate[0][1] > chart.y_range[1]:
        captions.append(
            f"The axis is cut at {chart.y_range[1]:.3g}, to show what came later; the gate loss "
            f"began at {gate[0][1]:.3g}."
        )
    if report.optimistic:
        captions.append(f"There is no test split, so every figure was {OPTIMISTIC}.")
    return figure(draw_lines(chart), " ".join(captions), legend(chart))


def _loss_marks(report: RunReport, gate: tuple[tuple[float, float], ...]) -> list[Mark]:
    if not gate:
        return []
    single = marks_of(report.grafts, curve(gate), coloured=True)
    return [*single, *package_marks(report, gate)]


def metric_figures(report: RunReport, span: int = 0) -> Markup:
    """Return the owner's metrics, a chart each, marked where something grew or left."""
    names = dict.fromkeys(name for reading in report.evaluations for name in reading.metrics)
    shown = [_metric_chart(report, name, place, span) for place, name in enumerate(names)]
    charts = [figure(draw_lines(chart), chart.title) for chart in shown[:MOST_METRICS]]
    left = len(shown) - len(charts)
    word = [paragraph(f"Metrics that are not drawn: {left:,}.", "caption")] if left else []
    return join(element("div", *charts, class_="small"), *word)


def _metric_chart(report: RunReport, name: str, place: int, span: int) -> Chart:
    points = tuple(
        (float(e.update), e.metrics[name]) for e in report.evaluations if name in e.metrics
    )
    last = metric_text(name, points[-1][1])
    return Chart(
        name=f"metric-{place + 1}",
        title=name,
        description=f"{name} over the updates, {last} at the last reading.",
        x_label="updates",
        y_label="",
        series=(Series(style="grown", points=points, label=last),),
        x_range=(0.0, max(span, report.updates)),
        marks=tuple(_loss_marks(report, points)),
        frame=SMALL,
    )


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
    if _is_training_unknown(report):
        told = work_text(report)
        return [paragraph(f"{told[0].upper()}{told[1:]}."), _flops_table(report)]
    training = report.seconds.get("training")
    growing_s = sum(report.seconds.values()) - (training or 0.0)
    unknown = "no limit was recorded" if report.seconds else IN_THE_REPORT
    known = report.overhead_limit is not None
    figures = {
        "Spent on growing": flops_text(report.overhead),
        "Growing may take": flops_text(report.overhead_limit) if known else unknown,
        "Share of training's FLOPs": f"{report.overhead_share:.1%}",
    }
    if training is not None:
        figures["Wall time beside training"] = f"{growing_s:,.1f} s of {training:,.1f} s"
    elif not report.seconds:
        figures["Wall time by work"] = IN_THE_REPORT
    beyond = beyond_limit(report)
    words = [paragraph(f"{beyond[0].upper()}{beyond[1:]}.")] if beyond else []
    return [facts(figures), *words, _flops_table(report)]


def _place(category: str) -> tuple[bool, str]:
    """Return by what categories of work are sorted: training first, then by name."""
    return category != "training", category


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
        for name in sorted({**report.work, **report.seconds}, key=_place)
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
        for name, work in sorted(report.work.items(), key=lambda item: _place(item[0]))
    ]
    caption = "A forward of one sample counts 1, a forward and backward 3."
    return table(caption, columns, rows, "No work was counted.")
