"""The parts of a page that show grafts: their table, timeline, lanes, alphas and marks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from esper.contracts.lifecycle import GraftStage
from esper.contracts.report_text import WORDS
from esper.observability.charts import Bar, Lane, Mark, Series
from esper.observability.page_frame import Column, table
from esper.observability.wording import NOT_MEASURED, number_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from esper.contracts.report import GraftRecord, RunReport, TimelineEntry
    from esper.observability.markup import Markup

STAGE_CAPTION: Final = (
    "Each row is one graft: thin grey while it is tried outside the model, in its package's twin "
    "or in an audition; orange while it blends in; tall blue while it is held under watch; a "
    "diamond and a green line once it is permanent, a cross where it was refused or removed."
)
NUM_STYLES: Final = 8
"""Colours that tell grafts of one run apart."""
Cells = tuple[Column, "Callable[[str, GraftRecord], str]"]
"""A column of the table of grafts, and what it shows of one."""


def graft_table(named: Iterable[tuple[str, GraftRecord]]) -> Markup:
    """Return a table with one row per graft; each comes with the name to show for it.

    Packages have a column where there are any, and so has what single grafts brought against
    twins, which reports of format 1 have.
    """
    grafts = list(named)
    cells = [_NAME, _KERNEL, _PARAMETERS, _DEPENDENCE, _VERDICT, _REASON]
    caption = "Dependence: only what switching the graft off costs, in loss on the gate split."
    if any(graft.contribution is not None for _, graft in grafts):
        cells[3:3] = [_CONTRIBUTION, _OVER_HOST]
        caption = (
            "In loss saved on the gate split. Contribution: against a twin trained without the "
            "graft, with its standard error; over the host alone: against a twin that carries "
            "nothing; dependence: only what switching the graft off costs."
        )
    if any(graft.package is not None for _, graft in grafts):
        cells[1:1] = [_PACKAGE]
    columns = [column for column, _ in cells]
    rows = [tuple(show(name, graft) for _, show in cells) for name, graft in grafts]
    return table(f"{caption} {NOT_MEASURED} is not measured.", columns, rows, "No graft was tried.")


def registry_table(grafts: Iterable[GraftRecord]) -> Markup:
    """Return a table of the kernels that came from a registry, each under its whole digest."""
    places: dict[tuple[str, str], list[int]] = {}
    for graft in grafts:
        places.setdefault((graft.blueprint, graft.artifact_id), []).append(graft.graft)
    columns = (Column(head="kernel"), Column(head="grafts"), Column(head="digest", kind="text"))
    rows = [
        (name, ", ".join(map(str, numbers)), digest) for (name, digest), numbers in places.items()
    ]
    return table("Kernels from a registry: they were not compiled here.", columns, rows, "None.")


def timeline_table(named: Iterable[tuple[str, TimelineEntry]]) -> Markup:
    """Return a table with one row per change of stage."""
    columns = (
        Column(head="graft"),
        Column(head="update", kind="number"),
        Column(head="kernel"),
        Column(head="site"),
        Column(head="stage"),
        Column(head="reason", kind="text"),
    )
    rows = [
        (name, f"{e.update:,}", e.blueprint, e.site, _stage_text(e), e.reason) for name, e in named
    ]
    return table("Every change of stage, in order.", columns, rows, "Nothing changed its stage.")


def graft_style(number: int) -> str:
    """Return the style class of a graft of a single run: eight colours, then from the first on."""
    return f"graft-{(number - 1) % NUM_STYLES + 1}"


def lanes_of(report: RunReport, prefix: str = "", *, coloured: bool = False) -> list[Lane]:
    """Return the life of every graft of a run as a lane.

    Args:
        report: The run.
        prefix: Set before a graft's number in the lane's label.
        coloured: Whether the label has its graft's own colour, or that of its package.
    """
    return [
        _lane(report, graft, prefix, graft_style(graft.package or graft.graft) if coloured else "")
        for graft in report.grafts
    ]


def alpha_series(report: RunReport, label: str = "") -> list[Series]:
    """Return every graft's alpha over the updates, as lines with ends.

    Between two recorded points alpha moves in a line; a removed graft falls to 0.

    Args:
        report: The run.
        label: Written at the end of each line, which has its graft's own colour then, with
            ``{graft}`` for its number; empty for faint lines, coloured by how the graft ended.
    """
    series = []
    for graft in report.grafts:
        points = [(float(p.update), p.alpha) for p in report.alphas if p.graft == graft.graft]
        if not points:
            continue
        if graft.stage is GraftStage.CULLED and graft.decided_at is not None:
            last = points[-1][1]
            end = float(graft.decided_at)
            points = [p for p in points if p[0] <= end] + [(end, last), (end, 0.0)]
        else:
            points.append((float(report.updates), points[-1][1]))
        ended = "random" if graft.stage is GraftStage.CULLED else "grown"
        style = graft_style(graft.graft) if label else ended
        shown = label.format(graft=graft.graft)
        series.append(Series(style=style, points=tuple(points), label=shown))
    return series


def marks_of(
    grafts: Sequence[GraftRecord],
    height: Callable[[float], float],
    prefix: str = "",
    *,
    coloured: bool = False,
) -> list[Mark]:
    """Return the marks of the lifecycle of grafts on a curve.

    Args:
        grafts: The run's grafts; those of packages are left out, which have marks of their own.
        height: The curve: from an update to its value.
        prefix: Set before each mark's tooltip.
        coloured: Whether a mark has its graft's own colour, and its number beside it.
    """
    marks: list[Mark] = []
    for graft in grafts:
        if graft.package is not None:
            continue
        own = (graft_style(graft.graft), str(graft.graft)) if coloured else ("", "")
        what = f"{prefix}graft {graft.graft}, {graft.blueprint} at {graft.site}"
        if graft.admitted_at is not None:
            marks.append(_mark("admitted", graft.admitted_at, height, what, own))
        if graft.decided_at is not None and graft.stage in (
            GraftStage.FOSSILIZED,
            GraftStage.CULLED,
        ):
            marks.append(_mark(graft.stage.value, graft.decided_at, height, what, own))
    return marks


def curve(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Return the function that moves in straight lines between ``points``, x rising."""

    def value(x: float) -> float:
        before, after = points[0], points[-1]
        for point in points:
            if point[0] <= x:
                before = point
            if point[0] >= x:
                after = point
                break
        span = after[0] - before[0]
        if span <= 0:
            return before[1]
        return before[1] + (x - before[0]) / span * (after[1] - before[1])

    return value


def _contribution_text(graft: GraftRecord) -> str:
    contribution = number_text(graft.contribution, "+.4f")
    if graft.contribution_stderr is None:
        return contribution
    return f"{contribution} \u00b1 {graft.contribution_stderr:.4f}"


def _reason_text(graft: GraftRecord) -> str:
    if not graft.updates_lost:
        return graft.reason
    return f"{graft.reason}; its removal cost {graft.updates_lost:,} updates"


_NAME: Final[Cells] = (Column(head="graft"), lambda name, _: name)
_PACKAGE: Final[Cells] = (
    Column(head="package", kind="number", tip=WORDS["package"]),
    lambda _, graft: number_text(graft.package, "d"),
)
_KERNEL: Final[Cells] = (
    Column(head="kernel at site"),
    lambda _, graft: f"{graft.blueprint} at {graft.site}",
)
_PARAMETERS: Final[Cells] = (
    Column(head="para\u00admeters", kind="number"),
    lambda _, graft: number_text(graft.parameters, ",d"),
)
_CONTRIBUTION: Final[Cells] = (
    Column(head="contri\u00adbution", kind="number"),
    lambda _, graft: _contribution_text(graft),
)
_OVER_HOST: Final[Cells] = (
    Column(head="over the host alone", kind="number"),
    lambda _, graft: number_text(graft.host_only_contribution, "+.4f"),
)
_DEPENDENCE: Final[Cells] = (
    Column(head="depen\u00addence", kind="number", tip=WORDS["dependence"]),
    lambda _, graft: number_text(graft.dependence, "+.4f"),
)
_VERDICT: Final[Cells] = (
    Column(head="verdict"),
    lambda _, graft: f"{graft.verdict}{', folded' if graft.folded else ''}",
)
_REASON: Final[Cells] = (Column(head="reason", kind="text"), lambda _, graft: _reason_text(graft))


def _stage_text(entry: TimelineEntry) -> str:
    return str(entry.after) if entry.before is None else f"{entry.before} to {entry.after}"


def _lane(report: RunReport, graft: GraftRecord, prefix: str, style: str) -> Lane:
    entries = [entry for entry in report.timeline if entry.graft == graft.graft]
    ends = [entry.update for entry in entries[1:]] + [report.updates]
    bars = tuple(
        Bar(
            stage=str(entry.after),
            start=entry.update,
            end=end,
            text=f"{entry.after}, updates {entry.update:,} to {end:,}",
        )
        for entry, end in zip(entries, ends, strict=False)
        if entry.after not in (GraftStage.FOSSILIZED, GraftStage.CULLED)
    )
    final = graft.stage in (GraftStage.FOSSILIZED, GraftStage.CULLED)
    package = "" if graft.package is None else f", package {graft.package}"
    return Lane(
        label=f"{prefix}{graft.graft}. {graft.blueprint} at {graft.site}{package}",
        bars=bars,
        style=style,
        verdict=graft.stage.value if final else "",
    )


def _mark(
    kind: str, update: int, height: Callable[[float], float], what: str, own: tuple[str, str]
) -> Mark:
    style, label = own
    text = f"{what}: {kind} at update {update:,}"
    return Mark(kind=kind, x=update, y=height(update), text=text, style=style, label=label)
