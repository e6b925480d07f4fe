"""The progress of a long command."""

import io

import pytest
from rich.console import Console

from esper.cli.progress import ProgressDisplay, progress_line
from esper.contracts.lifecycle import GraftStage
from esper.contracts.progress import GraftStatus, Progress, ProgressRow
from esper.observability.wording import duration_text
from esper.resilience.clock import ManualClock


def a_progress(done, *rows):
    return Progress(done=done, total=100, doing="growing", rows=rows)


A_ROW = ProgressRow(
    name="random seed 3, grown",
    update=420,
    gate_loss=0.123456,
    train_loss=0.0987654,
    metrics={"accuracy": 0.9325, "perplexity": 12.5},
    parameters=954,
    grafts=(GraftStatus(site="[blocks].3", seed_idx=0, stage=GraftStage.BLENDING),),
)


def shown(progresses, *, terminal, width=140):
    console = Console(
        file=io.StringIO(), force_terminal=terminal, width=width, markup=False, highlight=False
    )
    with ProgressDisplay(console, ManualClock()) as display:
        for progress in progresses:
            display(progress)
    return console.file.getvalue()


def test_time_left_follows_from_the_time_that_has_passed():
    """A quarter done in thirty seconds leaves ninety."""
    assert progress_line(a_progress(25), 30.0) == " 25%, 1:30 left, growing"


@pytest.mark.parametrize(
    "progress", [a_progress(0), a_progress(0.99), Progress(done=0, total=0, doing="growing")]
)
def test_time_left_is_unknown_at_the_start(progress):
    """Before a hundredth is done no time is made up: the first update is no measure."""
    assert progress_line(progress, 9.0).endswith("%, time left unknown, growing")


def test_time_left_is_known_from_a_hundredth_on():
    """Its control: one second for a hundredth leaves ninety-nine."""
    assert progress_line(a_progress(1), 1.0) == "  1%, 1:39 left, growing"


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
    """Loss, every metric, parameters and each graft's stage are in the line, brackets and all."""
    text = shown([a_progress(50, A_ROW)], terminal=False)
    assert (
        "random seed 3, grown at update 420, gate loss 0.1235, training loss 0.09877, "
        "accuracy 93.2 %, perplexity 12.5, 954 parameters, [blocks].3.0 blending"
    ) in text


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (GraftStage.GERMINATED, "being made"),
        (GraftStage.TRIAL, "in trial in a twin"),
        (GraftStage.HOLDING, "under watch"),
    ],
)
def test_a_package_is_told_in_one_piece(stage, words):
    """However many kernels it has, and beside what is tried by itself."""
    grafts = [GraftStatus(site=s, seed_idx=0, stage=stage, package=2) for s in ("a", "b", "c")]
    row = ProgressRow(name="run", update=3, grafts=(*grafts, *A_ROW.grafts))
    text = shown([a_progress(50, row)], terminal=False)
    assert text.endswith(f"package 2 of 3 kernels {words}, [blocks].3.0 blending\n")


def test_what_is_not_known_yet_is_left_out():
    """Before the first evaluation there is neither a loss nor a metric."""
    text = shown([a_progress(50, ProgressRow(name="run", update=3))], terminal=False)
    assert text.endswith("growing: run at update 3, dormant\n")


def test_on_a_terminal_there_is_a_table():
    """The table has a row per run, with its loss, metrics, parameters and stages."""
    text = shown([a_progress(50, A_ROW)], terminal=True)
    for words in ("accuracy", "perplexity", "random seed 3, grown", "93.2 %", "954", "50%"):
        assert words in text
    assert "[blocks].3.0 blending" in text


def test_runs_with_other_metrics_share_a_table():
    """Each metric has a column, in which a run without it has nothing."""
    other = ProgressRow(name="other", update=7, metrics={"bleu": 31.4})
    text = shown([a_progress(50, A_ROW, other)], terminal=True)
    (head,) = {line for line in text.splitlines() if "perplexity" in line}
    places = [head.index(word) for word in ("gate loss", "accuracy", "perplexity", "bleu", "seeds")]
    assert places == sorted(places)
    assert "31.4" in text


def test_bar_has_a_line_of_its_own():
    """Neither a table nor the next line of a run begins behind the bar."""
    for width in (140, 60):
        text = shown([a_progress(50, A_ROW)], terminal=True, width=width)
        bars = [line for line in text.splitlines() if "\u2501" in line]
        assert bars
        assert not any(word in line for line in bars for word in ("run", "update", "random"))


@pytest.mark.parametrize("width", [20, 40, 60])
def test_narrow_terminal_cuts_nothing_off(width):
    """Where a table does not fit each run is a paragraph, with every figure whole."""
    text = shown([a_progress(50, A_ROW)], terminal=True, width=width)
    words = " ".join(text.split())
    assert "\u2026" not in text
    for figure in ("0.1235", "0.09877", "93.2", "12.5", "954", "420"):
        assert figure in words
