"""The progress of a long command: a line and a table, or plain lines without a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from rich.console import Group
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper.contracts.progress import statuses_text
from esper.observability.wording import duration_text

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console, ConsoleOptions, RenderResult

    from esper.contracts.ports import Clock
    from esper.contracts.progress import Progress, ProgressRow

REFRESHES_PER_SECOND: Final = 4
LEAST_SHARE: Final = 0.01
"""Share of the work that has to be done before it says how long the rest will take."""
UNKNOWN: Final = "time left unknown"
WIDEST: Final = 1_000
"""Columns that a table may ask for, so that it says what it needs and not what it gets."""
PLAIN_LINES: Final = 20
"""Parts of the work, each of which gets one plain line."""


class ProgressDisplay:
    """Shows progress on a console for as long as it is entered. Call it with each progress.

    Args:
        console: Where to write; what it knows of its terminal decides the form.
        clock: Measures the time that has passed.
    """

    def __init__(self, console: Console, clock: Clock) -> None:
        self._console = console
        self._clock = clock
        self._start_s = clock.now()
        self._told = -1
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._start_s = self._clock.now()
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, refresh_per_second=REFRESHES_PER_SECOND, transient=True
            )
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, progress: Progress) -> None:
        """Show how far the command is."""
        line = progress_line(progress, self._clock.now() - self._start_s)
        if self._live is not None:
            self._live.update(_picture(progress, line))
        elif self._is_worth_a_line(progress):
            rows = "; ".join(map(str, progress.rows))
            self._console.print(f"{line}: {rows}" if rows else line, soft_wrap=True)

    def _is_worth_a_line(self, progress: Progress) -> bool:
        part = int(_share(progress) * PLAIN_LINES + 1e-9)
        if part <= self._told:
            return False
        self._told = part
        return True


def progress_line(progress: Progress, elapsed_s: float) -> str:
    """Return percent done, time left and what is being done, in one line.

    What the first hundredth took says little about the rest: it holds imports, first calls and
    compilations. Until then the time left is not known.

    Args:
        progress: How far the command is.
        elapsed_s: Seconds since it began.
    """
    share = _share(progress)
    is_known = share >= LEAST_SHARE
    left = f"{duration_text(elapsed_s / share * (1 - share))} left" if is_known else UNKNOWN
    return f"{share:4.0%}, {left}, {progress.doing}"


def _share(progress: Progress) -> float:
    return min(progress.done / progress.total, 1.0) if progress.total > 0 else 0.0


class _Rows:
    """A table of the runs, or where the terminal is too narrow for one, a paragraph for each."""

    def __init__(self, rows: tuple[ProgressRow, ...]) -> None:
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = _rows_table(self._rows)
        wide = options.update(max_width=WIDEST)
        if Measurement.get(console, wide, table).maximum <= options.max_width:
            yield table
        else:
            yield from (Text(str(row)) for row in self._rows)


def _picture(progress: Progress, line: str) -> Group:
    bar = Table.grid()  # a bar by itself does not end its line
    bar.add_row(ProgressBar(total=1.0, completed=_share(progress), width=40))
    return Group(Text(line), bar, *([_Rows(progress.rows)] if progress.rows else []))


def _rows_table(rows: tuple[ProgressRow, ...]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("run")
    measured = [row.measured() for row in rows]
    names = list(dict.fromkeys(name for texts in measured for name in texts))
    for head in ("update", *names, "parameters"):
        table.add_column(head, justify="right")
    table.add_column("seeds")
    for row, texts in zip(rows, measured, strict=True):
        parameters = "" if row.parameters is None else f"{row.parameters:,}"
        found = [texts.get(name, "") for name in names]
        cells = (row.name, f"{row.update:,}", *found, parameters, _grafts_text(row))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _grafts_text(row: ProgressRow) -> str:
    return statuses_text(row.grafts) or "dormant"
