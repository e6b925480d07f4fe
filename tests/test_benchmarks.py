"""The benchmarks run, say what they measured, and the document is what they wrote."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a module of the benchmarks, which are scripts beside each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.mark.torture  # half a minute, for what `make bench` shows by itself
def test_quick_run_measures_every_line_of_the_table(tmp_path, load):
    """`benchmarks/run.py --quick` prints every line that has a goal, and writes all of them."""
    for needed in ("sklearn", "peft", "cachetools", "fastapi"):
        pytest.importorskip(needed, reason="benchmarks need the extras demo and bench")
    printed = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout
    (written,) = tmp_path.glob("*.json")
    result = json.loads(written.read_text())
    assert {"torch", "python", "platform", "threads"} <= set(result["environment"])
    goals = load("goals").GOALS
    assert sorted(line["key"] for line in result["lines"]) == sorted(goal.key for goal in goals)
    assert {line["row"] for line in result["lines"]} == set(range(1, 18))
    assert [line["what"] for line in result["lines"] if line["what"] not in printed] == []
    rankings = [row["ranking"] for row in result["rankings"]["rows"]]
    assert rankings == ["FirstOrderGain", "GradientNorm", "RandomChoice"]
    unsaid = [line for line in result["lines"] if line["value"] is None and not line["note"]]
    assert unsaid == []


@pytest.mark.slow
def test_what_is_asked_for_is_at_hand(load):
    """At least 80 % of loads, for at most twice their bytes; bytes spent at random find little."""
    found = load("preloading").measured(40, random_seed=1)
    assert found["loads"] >= 100
    assert found["found"] >= 0.8
    assert found["bytes_fetched_over_used"] <= 2.0
    assert found["found_at_random"] < 0.4, "the control finds its kernels as well"


def test_document_is_what_the_kept_results_generate(load):
    """`docs/benchmarks.md` holds the figures of `benchmarks/results/`, and no other."""
    assert (ROOT / "docs" / "benchmarks.md").read_text() == load("document").as_markdown()


def test_missed_goals_are_shown_with_a_reason(load):
    """Every goal that a kept result misses has its reason beside it."""
    results = [json.loads(path.read_text()) for path in (BENCHMARKS / "results").glob("*.json")]
    assert results
    lines = [line for result in results for line in result["lines"]]
    missed = [line for line in lines if line["verdict"] == "missed"]
    unexplained = load("table").UNEXPLAINED
    assert [line["what"] for line in missed if line["reason"] in ("", unexplained)] == []


@pytest.mark.parametrize(
    ("key", "value", "verdict"),
    [
        ("always", 1.10, "met"),
        ("always", 1.101, "missed"),
        ("still compiled", 1.0, "met"),
        ("still compiled", 0.99, "missed"),
        ("flags", 5.0, "-"),
        ("gpu async", None, "not measured"),
    ],
)
def test_verdict_is_that_of_the_goal(load, key, value, verdict):
    """A figure meets its goal up to the limit, from the right side, and no further."""
    line = load("table").Line.of(load("measure").Figure(key=key, value=value))
    assert line.verdict == verdict
    assert bool(line.reason) == (verdict == "missed")


def test_a_figure_is_the_median_of_its_rounds_and_lies_within_their_quartiles(load):
    """A slow round moves no figure far, and a fast one none at all: that one stands beside it."""
    timing = load("measure").Timing
    rounds, ones = timing((3.0, 2.0, 90.0, 4.0, 3.5)), timing((1.0,) * 5)
    figures = (
        rounds.ratio(ones, "always"),
        rounds.added(ones, "always", 1.0),
        rounds.took("always", 1.0),
    )
    assert [figure.value for figure in figures] == [3.5, 2.5, 3.5]
    assert [figure.best for figure in figures] == [2.0, 1.0, 2.0]
    assert (rounds.median_s, rounds.best_s) == (3.5, 2.0)  # what stands beside them
    for figure in figures:
        low, high = figure.spread
        assert low <= figure.value <= high


@pytest.mark.slow
def test_a_whole_run_is_in_the_state_that_its_row_names(load):
    """Each kind of run trains; the one in a trial has a twin, the grown ones their kernels."""
    module = load("whole_run")
    size = module.Size("tiny", 16, 4, 2)
    runs = {state: module.Run(size, state) for state in module.states()}
    for run in runs.values():
        run.update()
    assert {s.stage.value for s in runs[module.TRIAL].grower.stages} == {"trial"}
    parameters = {s: sum(p.numel() for p in run.model.parameters()) for s, run in runs.items()}
    assert parameters["fossils, 16"] == parameters["by hand, 16"] > parameters[module.DORMANT]
    assert parameters[module.DORMANT] == parameters[module.WITHOUT]
    for run in runs.values():
        run.close()


@pytest.mark.torture
def test_the_time_of_a_run_is_that_of_the_rooms_it_was_spent_in(load):
    """Of a run in a trial most of it is its twins'; of one without Esper nothing is ours."""
    module = load("whole_run")
    size = module.Size("tiny", 16, 4, 2)
    found = {}
    for state in (module.WITHOUT, module.TRIAL):
        run = module.Run(size, state)
        found[state] = module.shares(run, 20)
        run.close()
    assert not {"twins of a trial", "growth", "forward"} & found[module.WITHOUT].keys()
    assert found[module.TRIAL]["twins of a trial"] > 0.2
    assert sum(found[module.TRIAL].values()) == pytest.approx(1.0)


def test_the_document_of_registries_has_the_figures_that_were_kept():
    """What is said of kernels at hand is what the last run of the benchmark wrote."""
    kept = BENCHMARKS / "results" / "preloading" / "simulated.json"
    figures = json.loads(kept.read_text(encoding="utf-8"))
    said = (ROOT / "docs" / "registry.md").read_text(encoding="utf-8")
    assert f"of {figures['runs']} simulated runs" in said
    assert f"{figures['found']:.1%}".replace("%", " %") in said
    assert f"{figures['bytes_fetched_over_used']:.2f} times the bytes" in said
    assert f"{figures['found_at_random']:.1%}".replace("%", " %") in said
