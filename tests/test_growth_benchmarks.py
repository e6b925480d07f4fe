"""What growing brings is measured by runs that go on where they stopped, and told as kept."""

import importlib
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
GROWTH = ROOT / "benchmarks" / "growth"


@pytest.fixture
def load(monkeypatch):
    """Import a module of the benchmark, which are scripts beside each other."""
    monkeypatch.syspath_prepend(str(GROWTH))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(GROWTH)):
            del sys.modules[name]


def a_result(load, **changes):
    """Return a result of a task that does not exist."""
    given = {
        "task": "a task",
        "arm": "grown late",
        "random_seed": 7,
        "settings": {"updates": 10, "horizons": [0.5]},
        "figures": {"loss": 1.5, "absent": None},
        "flops": 2e9,
        "seconds": 1.0,
        "curve": ((1, 1e9, 2.0),),
    }
    return load("store").Result(**{**given, **changes})


def test_document_and_pictures_are_what_the_kept_results_generate(load):
    """`docs/growth.md` and its pictures hold what is in `benchmarks/results/growth/`, no more."""
    pages = dict(load("document").pages(load("store").Store()))
    assert "growth.md" in pages
    assert [
        name for name, text in pages.items() if (ROOT / "docs" / name).read_text() != text
    ] == []


def test_result_is_read_as_it_was_written(load, tmp_path):
    """What a run came to is the same after it was kept."""
    store, result = load("store").Store(folder=tmp_path), a_result(load)
    store.write(result)
    assert list(store.of("a task")) == [result]


def test_result_of_other_settings_does_not_count(load, tmp_path):
    """A run is done again where its settings have changed, and only there."""
    store, result = load("store").Store(folder=tmp_path), a_result(load)
    store.write(result)
    assert store.has("a task", "grown late", 7, result.settings)
    assert not store.has("a task", "grown late", 7, {**result.settings, "updates": 11})
    assert not store.has("a task", "grown late", 8, result.settings)


def test_result_of_a_newer_format_is_refused(load, tmp_path):
    """A file that this version cannot know is no result."""
    store = load("store").Store(folder=tmp_path)
    store.write(a_result(load))
    (path,) = tmp_path.rglob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(ValueError, match="format 99"):
        list(store.of("a task"))


def test_result_without_what_it_was_measured_on_is_a_result(load, tmp_path):
    """Files that were written before that was recorded are read, and nothing is told of it."""
    store = load("store").Store(folder=tmp_path)
    store.write(a_result(load))
    (path,) = tmp_path.rglob("*.json")
    kept = json.loads(path.read_text())
    del kept["environment"], kept["commit"]
    path.write_text(json.dumps(kept))
    (found,) = store.of("a task")
    assert (found.environment, found.commit) == (None, None)
    assert list(load("document")._measured_on({"grown late": {7: found}})) == []


def test_document_says_on_what_results_were_measured_where_it_is_known(load):
    """Each environment and commit once, and of how many it was not recorded."""
    where = {"python": "3.12.3", "torch": "2.8.0", "processor": "x86_64", "threads": 1}
    known = [a_result(load, environment=where, commit=at) for at in ("abc1234", "abc1234", None)]
    of_arm = dict(enumerate([*known, a_result(load)]))
    (line,) = load("document")._measured_on({"grown late": of_arm})
    assert line == (
        "Measured on Python 3.12.3, torch 2.8.0, x86_64, 1 thread; of 1 of the 4 results it was "
        "not recorded. At abc1234.\n"
    )


def test_environment_names_versions_and_no_machine(load, tmp_path):
    """Four figures, and a commit where there is one."""
    module = load("environment")
    assert set(module.environment()) == {"python", "torch", "processor", "threads"}
    assert platform.node() not in map(str, module.environment().values())
    assert module.commit(tmp_path) is None


def test_flops_to_a_loss_lie_between_those_of_two_runs(load):
    """Half of the way between two losses is half of the way between the logarithms of FLOPs."""
    flops, is_beyond = load("figures").flops_at_loss([(1e9, 2.0), (4e9, 1.0)], 1.5)
    assert flops == pytest.approx(2e9)
    assert not is_beyond


@pytest.mark.parametrize(("loss", "flops"), [(0.5, 4e9), (3.0, 1e9)])
def test_loss_beyond_the_runs_counts_as_that_of_the_nearest(load, loss, flops):
    """Nothing is extrapolated: a saving beyond the curve is a bound, and said to be one."""
    assert load("figures").flops_at_loss([(1e9, 2.0), (4e9, 1.0)], loss) == (flops, True)


@pytest.mark.parametrize(
    ("count", "num", "low", "high"),
    [(0, 10, 0.0, 0.3085), (5, 100, 0.0164, 0.1128), (10, 10, 0.6915, 1.0)],
)
def test_interval_of_a_share_is_exact(load, count, num, low, high):
    """The intervals of counts are Clopper's and Pearson's."""
    found = load("figures").share_interval(count, num)
    assert found == pytest.approx((low, high), abs=1e-4)


def test_upper_bound_of_none_of_many_is_the_rule_of_three(load):
    """None of a hundred bounds a share by 3 %."""
    assert load("figures").upper_bound(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100), abs=1e-6)


def test_pooled_bound_of_twelve_hundred_runs_can_meet_its_goal(load):
    """At 5 % of all runs kept, 1,200 runs bound the share by 6.5 %, and 400 do not."""
    upper_bound = load("figures").upper_bound
    assert upper_bound(60, 1_200) <= 0.065 < upper_bound(20, 400)


def test_rate_of_a_forked_run_falls_to_zero_at_its_end(load):
    """Runs of several horizons have one beginning: the rate is the same until it falls."""
    training = load("training")
    rate = training.warm_then_constant(10)
    falling = training.falling(80, 100, rate)
    assert [falling(u) for u in range(81)] == [rate(u) for u in range(81)]
    assert falling(90) == 0.5
    assert math.isclose(falling(99), 0.05)


def test_no_pixel_of_an_image_is_of_two_splits(load):
    """What decides and what is told has not been trained on, down to single pixels."""
    pixels = torch.arange(200 * 160).reshape(200, 160, 1)
    cells = load("other_data").cells
    splits = [set(cells([pixels], kind).flatten().tolist()) for kind in ("train", "gate", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == pixels.numel()


@pytest.mark.parametrize(("loss", "told"), [(1.0, "2 won, 0 lost"), (2.0, "0 won, 2 lost")])
def test_lower_loss_is_a_run_that_is_won(load, loss, told):
    """Of a regression the arm with the lower loss has won, and the goal is missed without it."""
    runs = {"details": {"trials": []}}
    results = {
        arm: {
            seed: a_result(load, **runs, figures={"loss": at, "passed": 1, "work": 1.5})
            for seed in (1, 2)
        }
        for arm, at in (("host", 1.5), ("grown", loss))
    }
    task = load("tasks").TASKS["photographs"]
    (row,) = (r for r in load("sections").other_data(task, results)[0].splitlines() if told in r)
    assert row.endswith("met |" if loss < 1.5 else "missed |")


def test_power_is_told_of_the_verdict_and_of_the_claim(load):
    """Of useful packages those that were kept are told, and those whose capacity was shown."""
    seen = [("candidate", True), ("candidate", False), ("null", False), ("", True)]
    rows = [
        {"taken": taken, "capacity_shown": shown, "plain": False, "single": False}
        for taken, shown in seen
    ]
    results = {"useful 200": {7: a_result(load, details={"rows": rows})}}
    told = load("sections").useless(load("tasks").TASKS["useless, digits"], results)[0]
    assert "| useful 200 | taken over | 4 | 3 (19 to 99 %) |" in told
    assert "| useful 200 | taken over, with capacity shown | 4 | 1 (1 to 81 %) |" in told


def test_remedy_stands_beside_the_defaults_of_its_random_seeds(load):
    """Each is held against runs of the same random seeds, and one that was not run is left out."""
    results = {
        arm: {
            seed: a_result(load, figures={"accuracy": at + seed, "passed": 1.0, "parameters": 9})
            for seed in (60, 61)
        }
        for arm, at in (("host", 10), ("defaults", 13), ("muP", 12))
    }
    del results["muP"][61]
    task = load("tasks").TASKS["Fashion-MNIST, remedies"]
    *_, row = load("sections").remedies(task, results)[0].splitlines()
    told = "| muP | -1.00 (one run) | 0 won, 1 lost | +2.00 (one run) | 1 of 1 | 9 |"
    assert row == told


@pytest.mark.slow
def test_gpt_grows_by_stages_for_less_than_from_scratch(load):
    """A pair of runs of the class of transformers, in bfloat16, on whatever device there is."""
    pytest.importorskip("transformers")
    task = load("tasks").TASKS["GPT-2"]
    runs = {r.arm: r for r in task.runs(110, ["scratch 100", "grown of two"], task.quick)}
    scratch, grown = runs["scratch 100"], runs["grown of two"]
    assert scratch.figures["updates"] == grown.figures["updates"] == 10
    assert grown.flops < 0.5 * scratch.flops
    assert all(math.isfinite(run.figures["loss"]) for run in (scratch, grown))


@pytest.mark.torture
def test_interrupted_benchmark_goes_on_where_it_stopped(tmp_path):
    """A run that is cut off has no file, and only what has none is run again."""
    command = [sys.executable, str(GROWTH / "run.py"), "--quick", "--processes", "1"]
    command += ["--only", "useless, regression", "--random-seeds", "3", "--out", str(tmp_path)]
    command += ["--arms", "nothing", "noise"]

    def printed():
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout

    printed()
    kept = {path.name: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert len(kept) == 2
    assert all(json.loads(text)["environment"]["threads"] == 1 for text in kept.values())
    (tmp_path / "useless-regression" / "noise--3.json").unlink()
    again = printed()
    assert "noise" in again
    assert "nothing" not in again
    assert {path.name for path in tmp_path.rglob("*.json")} == set(kept)
