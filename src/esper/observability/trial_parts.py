"""The parts of a page that show packages in trial, what was taken over, and stages of depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.contracts.lifecycle import GraftStage
from esper.contracts.report_text import WORDS, flops_text, with_error
from esper.observability.charts import Effect, EffectGroup, Mark, draw_effects
from esper.observability.graft_parts import curve, graft_style
from esper.observability.markup import Markup, element
from esper.observability.page_frame import Column, figure, table
from esper.observability.wording import NOT_MEASURED, bytes_text, number_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from esper.contracts.report import RunReport, StageRecord, TrialRecord

    Named = Iterable[tuple[str, TrialRecord]]

EVIDENCE_COLUMNS: Final = (
    Column(head="package", tip=WORDS["package"]),
    Column(head="verdict"),
    Column(head="candi\u00addate", kind="number", tip=WORDS["candidate"]),
    Column(head="treat\u00adment", kind="number", tip=WORDS["treatment"]),
    Column(head="capac\u00adity", kind="number", tip=WORDS["capacity"]),
    Column(head="going on", kind="number", tip=WORDS["going on"]),
)
COST_COLUMNS: Final = (
    Column(head="package", tip=WORDS["package"]),
    Column(head="kernels at sites", kind="text"),
    Column(head="para\u00admeters", kind="number"),
    Column(head="updates", kind="number", tip="from the copy of the run to the verdict"),
    Column(head="z (needed)", kind="number", tip="effect over its widened standard error"),
    Column(head="level", kind="number", tip="chance of keeping a useless package, one-sided"),
    Column(head="spread", kind="number", tip=WORDS["spread"]),
    Column(head="samples", kind="number", tip="of the gate split, paired"),
    Column(head="FLOPs", kind="number"),
    Column(head="s", kind="number", tip="wall time of the trial, in seconds"),
    Column(head="memory", kind="number", tip="as estimated before; most in use while it ran"),
)
OUTCOME_COLUMNS: Final = (
    Column(head="package", tip=WORDS["package"]),
    Column(head="verdict"),
    Column(head="reason", kind="text"),
    Column(head="taken over"),
    Column(head="gate loss before", kind="number"),
    Column(head="after", kind="number"),
    Column(head="under watch", tip=WORDS["watch"]),
    Column(head="passengers", tip=WORDS["passenger"]),
)
DEPTH_COLUMNS: Final = (
    Column(head="blocks"),
    Column(head="awake", kind="number", tip="blocks that work, before and after the stage"),
    Column(head="updates", kind="number", tip="from its first to its last update of the ramp"),
    Column(head="begins with", tip="fresh: the block's own weights; copy: its neighbour's"),
    Column(head="loss before", kind="number"),
    Column(head="after", kind="number"),
    Column(head="FLOPs", kind="number", tip="of the updates made at this depth"),
    Column(head="outcome", kind="text"),
)


def evidence_table(named: Named) -> Markup:
    """Return a table of verdicts, one row per package; each comes with the name to show for it."""
    rows = [
        (
            name,
            trial.verdict,
            with_error(trial.effect, trial.stderr, "+.3g"),
            with_error(trial.null_effect, trial.null_stderr, "+.3g"),
            _capacity_text(trial),
            with_error(trial.going_on, trial.going_on_stderr, "+.3g"),
        )
        for name, trial in named
    ]
    caption = (
        "Loss saved on the gate split against the live run at equal updates, read once, on weights "
        "averaged over the second half of the trial; \u00b1 is one standard error, widened by the "
        f"spread. {NOT_MEASURED} is not measured."
    )
    return table(caption, EVIDENCE_COLUMNS, rows, "No package was tried.")


def cost_table(named: Named) -> Markup:
    """Return a table of what each trial took, one row per package."""
    rows = [
        (
            name,
            _kernels_text(trial),
            f"{trial.parameters:,}",
            _span_text(trial.started_at, trial.decided_at),
            _z_text(trial),
            f"{trial.level:.3g}",
            f"{trial.spread:.2g}{f' ({trial.num_nulls} nulls)' if trial.num_nulls else ''}",
            f"{trial.samples:,}",
            flops_text(trial.flops),
            number_text(trial.seconds, ",.1f"),
            f"{bytes_text(trial.memory_bytes)}; {bytes_text(trial.memory_peak_bytes)}",
        )
        for name, trial in named
    ]
    caption = "What each trial tried, how it was judged, and what it took."
    return table(caption, COST_COLUMNS, rows, "No package was tried.")


def outcome_table(named: Iterable[tuple[str, TrialRecord, RunReport]]) -> Markup:
    """Return a table of what became of each package; each comes with its name and its run."""
    rows = [_outcome_row(name, trial, report) for name, trial, report in named]
    caption = (
        "On success the live run takes a twin's state between two updates. The fall at the switch "
        "is optimistic: what was taken is what looked best."
    )
    return table(caption, OUTCOME_COLUMNS, rows, "No package was tried.")


def effect_figure(trials: Sequence[TrialRecord]) -> Markup:
    """Return the chart of all verdicts: candidate, null and going on beside the live run."""
    groups = [_effects_of(trial) for trial in trials if trial.was_read]
    said = [
        f"package {t.package}, {t.verdict}: candidate {with_error(t.effect, t.stderr, '+.3g')}, "
        f"null {with_error(t.null_effect, t.null_stderr, '+.3g')}"
        for t in trials
        if t.was_read
    ]
    drawing = draw_effects(
        name="effects",
        title="What each package brought against the live run",
        description=f"{'; '.join(said)}." if said else "No verdict was read.",
        groups=groups,
        x_label="gate loss saved against the live run (right is better)",
        zero_label="live run",
    )
    caption = (
        "Disc: the candidate twin. Square: the null twin, the same package made linear; what lies "
        "between the two is capacity, what the square saves is treatment. Triangle: what the "
        "trial's FLOPs would have brought as plain training. Bars: one standard error, widened by "
        "the spread between equal runs."
    )
    return figure(drawing, caption, style="narrow")


def words_list(words: Mapping[str, str]) -> Markup:
    """Return words with what they mean, or nothing where there are none."""
    if not words:
        return Markup("")
    groups = [
        element("div", element("dt", word), element("dd", text)) for word, text in words.items()
    ]
    return element("dl", *groups, class_="words")


def depth_table(stages: Sequence[StageRecord]) -> Markup:
    """Return a table of planned stages of depth, one row each."""
    rows = [
        (
            f"{stage.path}: {_blocks_text(stage)}",
            f"{stage.depth - len(stage.blocks)} to {stage.depth}",
            _span_text(stage.started_at, stage.ended_at),
            f"{stage.init}, ramp {stage.ramp_updates:,}",
            number_text(stage.loss_before, ".4g"),
            number_text(stage.loss_after, ".4g"),
            flops_text(stage.flops),
            f"{stage.verdict}{f': {stage.reason}' if stage.reason else ''}",
        )
        for stage in stages
    ]
    caption = (
        "Stages of depth are planned, and no gate decides about them. What the final depth from "
        "the start, or the smaller model for the same FLOPs, would have come to was not compared."
    )
    return table(caption, DEPTH_COLUMNS, rows, "No stage was planned.")


def package_marks(report: RunReport, points: Sequence[tuple[float, float]]) -> list[Mark]:
    """Return the marks of packages and of stages of depth on a curve.

    Args:
        report: The run.
        points: The curve, x rising.
    """
    height = curve(points)
    marks = []
    for trial in report.trials:
        for kind, update in _moments(trial, report):
            marks.append(
                Mark(
                    kind=kind,
                    x=update,
                    y=height(update),
                    text=f"package {trial.package}: {trial.verdict}, at update {update:,}",
                    style=graft_style(trial.package),
                    label=f"P{trial.package}",
                )
            )
    for stage in report.stages:
        text = f"{stage.path} wakes to {stage.depth} blocks at update {stage.started_at:,}"
        x, label = stage.started_at, f"depth {stage.depth}"
        marks.append(Mark(kind="woken", x=x, y=height(x), text=text, label=label))
    return marks


def _moments(trial: TrialRecord, report: RunReport) -> list[tuple[str, int]]:
    """Return which mark a package gets when: at its verdict, and where it was kept or undone."""
    if trial.decided_at is None:
        return []
    found = [("admitted" if trial.taken else "culled", trial.decided_at)]
    own = [g for g in report.grafts if g.package == trial.package and g.decided_at is not None]
    wanted = GraftStage.FOSSILIZED if trial.verdict == "kept" else GraftStage.CULLED
    last = max((g.decided_at for g in own if g.stage is wanted and g.decided_at), default=None)
    if trial.taken and last is not None and trial.verdict in ("kept", "rolled back"):
        found.append(("fossilized" if trial.verdict == "kept" else "culled", last))
    return found


def _effects_of(trial: TrialRecord) -> EffectGroup:
    rows = (
        ("candidate", "disc", "grown", trial.effect, trial.stderr),
        ("null", "square", "random", trial.null_effect, trial.null_stderr),
        ("going on", "admitted", "host", trial.going_on, trial.going_on_stderr),
    )
    effects = tuple(
        Effect(
            label=label,
            kind=kind,
            style=style,
            value=value,
            stderr=stderr or 0.0,
            text=f"{label}: {with_error(value, stderr, '+.3g')}",
        )
        for label, kind, style, value, stderr in rows
        if value is not None
    )
    kernels = len(trial.grafts)
    title = f"package {trial.package}, {kernels} kernel{'s' * (kernels != 1)}: {trial.verdict}"
    return EffectGroup(label=title, effects=effects)


def _z_text(trial: TrialRecord) -> str:
    if trial.z is None:
        return NOT_MEASURED
    needed = "" if trial.threshold is None else f" ({trial.threshold:.2f})"
    return f"{trial.z:.2f}{needed}"


def _capacity_text(trial: TrialRecord) -> str:
    if trial.capacity is None:
        return NOT_MEASURED
    least = "\u2265 " if trial.capacity_is_lower_bound else ""
    shown = {True: ", shown", False: ", not shown", None: ""}[trial.capacity_shown]
    return f"{least}{with_error(trial.capacity, trial.capacity_stderr, '+.3g')}{shown}"


def _kernels_text(trial: TrialRecord) -> str:
    pairs = zip(trial.blueprints, trial.sites, strict=True)
    kernels = ", ".join(f"{blueprint} at {site}" for blueprint, site in pairs)
    adds = f"; the null adds capacity at {', '.join(trial.null_adds)}" if trial.null_adds else ""
    return f"{kernels}{adds}"


def _span_text(start: int, end: int | None) -> str:
    return f"{start:,} to \u2026" if end is None else f"{start:,} to {end:,}"


def _outcome_row(name: str, trial: TrialRecord, report: RunReport) -> tuple[str, ...]:
    own = [graft for graft in report.grafts if graft.package == trial.package]
    left = [f"{g.graft} at {g.site}" for g in own if g.verdict == "removed as a passenger"]
    watch = {"kept": "it stayed", "taken over": "not over yet", "rolled back": "rolled back"}
    cost = f", {trial.updates_lost:,} updates lost" if trial.updates_lost else ""
    return (
        name,
        trial.verdict,
        trial.reason,
        trial.taken or "nothing",
        number_text(trial.gate_loss_before, ".4g"),
        number_text(trial.gate_loss_after, ".4g"),
        f"{watch.get(trial.verdict, NOT_MEASURED)}{cost}",
        ", ".join(left) or ("none" if trial.verdict == "kept" else NOT_MEASURED),
    )


def _blocks_text(stage: StageRecord) -> str:
    """Return the blocks of a stage by the parts of their names that differ."""
    return ", ".join(name.removeprefix(f"{stage.path}.") for name in stage.blocks)
