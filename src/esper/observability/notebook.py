"""A report in a notebook: its page inside a frame, and its losses drawn by matplotlib.

Importing this module lets every :class:`~esper.RunReport` draw itself.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from esper.contracts.run_report import RunReport
from esper.observability.markup import element
from esper.observability.page_frame import COLOURS
from esper.observability.report_page import loss_chart, run_page

if TYPE_CHECKING:
    from esper.observability.charts import Chart, Mark, Series

FRAME_HEIGHT: Final = "38rem"
"""Of the page in a notebook, which scrolls in it."""
DASHES: Final = {"host": (0, (1, 2)), "scratch": (0, (6, 2, 1.5, 2)), "grown": "solid"}
"""Of lines, so that none is told from another by its colour alone."""
SHAPES: Final = {"admitted": "^", "fossilized": "D", "culled": "x", "woken": "s"}
"""matplotlib's name of each mark's shape."""
MEANINGS: Final = {
    "admitted": "taken over",
    "fossilized": "made permanent",
    "culled": "refused or removed",
    "woken": "blocks wake",
}
LABEL_POINTS: Final = 7.0
"""From a mark to its label, in points."""


class NotebookDrawer:
    """Draws reports for notebooks."""

    def html(self, report: RunReport) -> str:
        """Return the report's page inside a frame, so that neither's styles reach the other's."""
        style = f"width: 100%; height: {FRAME_HEIGHT}; border: 0"
        page = run_page(report, base="about:srcdoc")  # or its links would lead out of the frame
        return str(element("iframe", srcdoc=page, style=style, title="Esper's report"))

    def plot(self, report: RunReport, axes: Any = None) -> Any:
        """Draw the losses of a report; see :meth:`esper.RunReport.plot`."""
        if axes is None:
            _, axes = _pyplot().subplots(figsize=(8.8, 3.8), layout="constrained")
        _draw(loss_chart(report), axes)
        return axes


def _pyplot() -> ModuleType:
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        msg = (
            "report.plot() needs matplotlib, which cannot be imported; "
            "pip install 'esper-morph[plot]' brings it"
        )
        raise ImportError(msg, name="matplotlib") from error
    return plt


def _draw(chart: Chart, axes: Any) -> None:
    for line in chart.series:
        if line.points:
            _draw_line(line, axes)
    for kind in dict.fromkeys(mark.kind for mark in chart.marks):
        _draw_marks([mark for mark in chart.marks if mark.kind == kind], axes)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label, xlim=chart.x_range, ylim=chart.y_range)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _draw_line(line: Series, axes: Any) -> None:
    x, y = zip(*line.points, strict=True)
    axes.plot(x, y, color=COLOURS[line.style], linestyle=DASHES[line.style], label=line.label)


def _draw_marks(marks: list[Mark], axes: Any) -> None:
    """Draw all marks of a kind, which share a shape, a word in the legend, and no colour."""
    kind = marks[0].kind
    axes.scatter(
        [mark.x for mark in marks],
        [mark.y for mark in marks],
        c=[COLOURS[mark.style or "ink"] for mark in marks],
        marker=SHAPES[kind],
        label=MEANINGS[kind],
        zorder=3,
        clip_on=False,
    )
    for mark in marks:
        axes.annotate(
            mark.label,
            (mark.x, mark.y),
            xytext=(0, LABEL_POINTS),
            textcoords="offset points",
            ha="center",
            color=COLOURS[mark.style or "ink"],
            annotation_clip=True,
        )


RunReport.drawer = NotebookDrawer()
