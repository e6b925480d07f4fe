"""How often a package is kept that deserves no place: real runs, each ended at its verdict.

The packages enter a trial by the door of ``benchmarks/growth/useless.py``; what the verdict reads,
and what it then does, is what it is in any run.
"""

import importlib
import sys
from pathlib import Path

import pytest

GROWTH = Path(__file__).parent.parent.parent / "benchmarks" / "growth"
RUNS = 100
UNLUCKY = 5_004
"""A run whose perturbed copy comes out better by luck; the laxer rules take it for a gain."""


@pytest.fixture(scope="module")
def load():
    """Import a module of the benchmark, which are scripts beside each other."""
    before, sys.path[:0] = set(sys.modules), [str(GROWTH)]
    yield importlib.import_module
    sys.path.remove(str(GROWTH))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(GROWTH)):
            del sys.modules[name]


def rows_of(useless, task, kinds, num_runs, first=5_000):
    """Return every run of a task: its kind, and what was said of it."""
    return [
        {"task": task, "kind": result.arm, **row}
        for result in useless.runs(f"useless, {task}", first, kinds, {"runs": num_runs})
        for row in result.details["rows"]
    ]


@pytest.fixture(scope="module")
def unlucky(load):
    """Return the trial of nothing at all, a perturbed copy, in a run that was picked for it."""
    (row,) = rows_of(load("useless"), "digits", ("nothing",), 1, first=UNLUCKY)
    return row


@pytest.fixture(scope="module")
def many(load):
    """Return all runs of every useless kind in every task."""
    useless = load("useless")
    return [
        row for task in useless.SUBJECTS for row in rows_of(useless, task, useless.USELESS, RUNS)
    ]


def counts_as_kept(row):
    """A linear package may be taken over, which folds; what counts is a claim of capacity."""
    if row["kind"] in ("linear", "own shape"):
        return bool(row["taken"] == "candidate" and row["capacity_shown"])
    return bool(row["taken"])


@pytest.mark.slow
def test_verdict_refuses_a_lucky_copy_of_the_run(unlucky):
    """A copy that differs by luck alone is refused, though it came out better."""
    assert unlucky["effect"] > 0
    assert not unlucky["taken"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["single", "plain"])
def test_laxer_rules_take_luck_for_a_gain(unlucky, rule):
    """The controls: one look at the last weights, and a standard error that is not widened."""
    assert unlucky[rule]


@pytest.mark.torture
@pytest.mark.timeout(0)
def test_useless_packages_are_kept_in_at_most_five_percent(many, load):
    """Pooled over kinds, tasks and starts at most 5 % are kept, and 6.5 % is out of reach."""
    kept = sum(map(counts_as_kept, many))
    assert kept <= 0.05 * len(many)
    assert load("figures").upper_bound(kept, len(many)) <= 0.065


@pytest.mark.torture
@pytest.mark.timeout(0)
def test_no_kind_of_useless_packages_is_kept_more_often(many, load):
    """No single kind's lower bound is above 5 %."""
    for kind in load("useless").USELESS:
        rows = [row for row in many if row["kind"] == kind]
        low, _ = load("figures").share_interval(sum(map(counts_as_kept, rows)), len(rows))
        assert low <= 0.05, kind


@pytest.mark.torture
@pytest.mark.timeout(0)
def test_plain_standard_error_keeps_too_many(many):
    """The control: without the spread between equal runs more than 5 % of nulls pass."""
    rows = [row for row in many if row["kind"] in ("nothing", "noise", "permuted")]
    assert sum(row["plain"] for row in rows) > 0.05 * len(rows)


@pytest.mark.torture
@pytest.mark.timeout(0)
def test_map_of_the_sites_own_shape_is_no_null(load):
    """The control: against such a map a linear package is said to have capacity too often."""
    rows = rows_of(load("useless"), "digits", ("own shape",), RUNS)
    assert sum(map(counts_as_kept, rows)) > 0.05 * len(rows)
