"""The progress of a long command."""

import io

import pytest
from rich.console import Console

from esper.cli.progress import ProgressDisplay, duration_text, progress_line
from esper.contracts.progress import Progress, ProgressRow
from esper.resilience.clock import ManualClock


def a_progress(done, *rows):
    return Progress(done=done, total=100, doing="growing", rows=rows)


A_ROW = ProgressRow(
    name="random seed 3, grown",
    update=420,
    accuracy=93.25,
    parameters=954,
    stages=("3.0 [blending]",),
)


def shown(progresses, *, terminal):
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=100, markup=False, highlight=False
    )
    with ProgressDisplay(console, ManualClock()) as display:
        for progress in progresses:
            display(progress)
    return console.file.getvalue()


def test_time_left_follows_from_the_time_that_has_passed():
    """A quarter done in thirty seconds leaves ninety."""
    assert progress_line(a_progress(25), 30.0) == " 25%, 1:30 left, growing"


@pytest.mark.parametrize("progress", [a_progress(0), Progress(done=0, total=0, doing="growing")])
def test_time_left_is_unknown_at_the_start(progress):
    """Before anything is done no time is made up."""
    assert progress_line(progress, 9.0) == "  0%, time left unknown, growing"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00"), (0.2, "0:01"), (59.5, "1:00"), (125, "2:05"), (3661, "1:01:01")],
)
def test_durations_are_rounded_up(seconds, expected):
    """A wait is never shown as shorter than it is."""
    assert duration_text(seconds) == expected


def test_without_a_terminal_there_are_sparse_plain_lines():
    """A thousand calls give about twenty lines, the last among them, without control codes."""
    text = shown([a_progress(i / 10) for i in range(1001)], terminal=False)
    lines = text.splitlines()
    assert 18 <= len(lines) <= 22
    assert lines[0].startswith("  0%")
    assert lines[-1].startswith("100%")
    assert "\x1b" not in text


def test_a_plain_line_tells_where_each_run_is():
    """Accuracy, parameters and the stage of each seed are in the line, brackets and all."""
    text = shown([a_progress(50, A_ROW)], terminal=False)
    assert "random seed 3, grown at update 420, 93.2 %, 954 parameters, 3.0 [blending]" in text


def test_on_a_terminal_there_is_a_table():
    """The table has a row per run, with its accuracy, parameters and stages."""
    text = shown([a_progress(50, A_ROW)], terminal=True)
    for words in ("accuracy", "random seed 3, grown", "93.2 %", "954", "3.0 [blending]", "50%"):
        assert words in text
