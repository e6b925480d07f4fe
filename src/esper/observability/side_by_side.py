"""Several runs on one page: what they have in common first, then each beside the others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from esper.contracts.progress import metric_text
from esper.observability.charts import Chart, Series, draw_lines, legend
from esper.observability.graft_parts import graft_style
from esper.observability.markup import Markup, element
from esper.observability.page_frame import Column, figure, parts_of, section, table
from esper.observability.wording import NOT_MEASURED, number_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from esper.contracts.report import RunReport
    from esper.observability.page_frame import Parts

TITLE: Final = "Esper: runs beside each other"

Seen = tuple[str, str, "RunReport | None"]
"""A run as it is compared: its name, its state, and what is known of it."""

_IDS: Final = re.compile(r' (id|aria-labelledby|clip-path|href)="([^"]*)"')
_HEADINGS: Final = re.compile(r"<(/?)h([1-5])>")


def comparison(runs: Sequence[Seen], span: int = 0) -> Parts:
    """Return what stands above several runs: their losses in one chart, and a table.

    Args:
        runs: The runs, in order.
        span: Updates that the chart has room for, where those are more than were done.
    """
    num = {state: sum(found == state for _, found, _ in runs) for _, state, _ in runs}
    lead = f"{len(runs)} runs: {', '.join(f'{count} {state}' for state, count in num.items())}."
    chart = _loss_chart(runs, span)
    caption = "Gate loss of every run, on one axis: it compares runs of one job, measured alike."
    return parts_of(
        TITLE,
        lead,
        intro=[_links(runs)],
        sections=[
            section("All runs", figure(draw_lines(chart), caption, legend(chart)), _table(runs))
        ],
    )


def as_column(pieces: Mapping[str, Markup], number: int) -> dict[str, Markup]:
    """Return the pieces of one run with ids of their own, and headings a level below the page's.

    Text has no quotes and no tags that are not escaped, so that ids and headings are found as text.
    """
    start = f"run-{number}-"
    return {f"{start}{name}": _own(piece, start) for name, piece in pieces.items()}


def _own(piece: Markup, start: str) -> Markup:
    def prefixed(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if name == "clip-path":
            return f' clip-path="{value.replace("#", f"#{start}")}"'
        if name == "href":
            return f' href="{value.replace("#", f"#{start}", 1)}"' if value[:1] == "#" else found[0]
        return f' {name}="{" ".join(start + each for each in value.split())}"'

    lower = _HEADINGS.sub(lambda found: f"<{found[1]}h{int(found[2]) + 1}>", piece)
    return Markup(_IDS.sub(prefixed, lower))


def _links(runs: Sequence[Seen]) -> Markup:
    items = (
        element("li", element("a", name, href=f"#run-{number}-part-top"))
        for number, (name, _, _) in enumerate(runs, start=1)
    )
    return element("nav", element("ul", *items), aria_label="Runs")


def _loss_chart(runs: Sequence[Seen], span: int) -> Chart:
    series = tuple(
        Series(
            style=graft_style(number),
            points=tuple((float(e.update), e.gate_loss) for e in report.evaluations),
            label=name if len(name) <= 20 else f"\u2026{name[-19:]}",
        )
        for number, (name, _, report) in enumerate(runs, start=1)
        if report is not None
    )
    ends = [x for line in series for x, _ in line.points]
    late = [y for line in series for x, y in line.points if x >= max(ends, default=0.0) / 6]
    room = (max(late) - min(late)) * 0.06 or 1.0 if late else 1.0
    return Chart(
        name="all-losses",
        title="Gate loss of every run over the updates",
        description=f"{len(series)} runs were measured.",
        x_label="updates",
        y_label="gate loss",
        series=series,
        x_range=(0.0, max([span, *ends]) or 1.0),
        y_range=(min(late) - room, max(late) + room) if late else None,
    )


def _table(runs: Sequence[Seen]) -> Markup:
    columns = (
        Column(head="run"),
        Column(head="state"),
        Column(head="updates", kind="number"),
        Column(head="gate loss at first", kind="number"),
        Column(head="now", kind="number"),
        Column(head="packages kept", kind="number"),
        Column(head="refused", kind="number"),
        Column(head="faults", kind="number"),
    )
    rows = [_row(name, state, report) for name, state, report in runs]
    return table(f"{NOT_MEASURED} is not known.", columns, rows, "There is no run.")


def _row(name: str, state: str, report: RunReport | None) -> tuple[str, ...]:
    if report is None:
        return (name, state, *[NOT_MEASURED] * 6)
    losses = [reading.gate_loss for reading in report.evaluations]
    ends = [metric_text("gate loss", loss) for loss in (losses[:1] + losses[-1:])]
    kept = sum(trial.verdict in ("kept", "taken over") for trial in report.trials)
    refused = sum(trial.verdict in ("refused", "rolled back") for trial in report.trials)
    return (
        name,
        state,
        number_text(report.updates, ",d"),
        *(ends or [NOT_MEASURED] * 2),
        f"{kept:,}",
        f"{refused:,}",
        f"{len(report.incidents):,}",
    )
