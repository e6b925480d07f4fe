"""`make mutants` tells tests that would notice a mistake from tests that assert nothing."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

GRADE = """
def grade(points):
    if points < 0:
        raise ValueError(f"points are at least 0, found {points}")
    return "good" if points >= 90 else "poor"
"""
ASSERTING = """
import pytest
from toy.held import grade

def test_grade():
    assert [grade(points) for points in (0, 89, 90)] == ["poor", "poor", "good"]

def test_range():
    with pytest.raises(ValueError, match="points are at least 0, found -1"):
        grade(-1)
"""
CALLING = """
from toy.called import grade

def test_grade():
    grade(90)
"""
FILES = {
    "src/toy/held.py": GRADE,
    "src/toy/called.py": GRADE,
    "tests/test_held.py": ASSERTING,
    "tests/test_called.py": CALLING,
    "pyproject.toml": '[tool.pytest]\nmarkers = ["slow: slow", "torture: slower"]\n',
}


@pytest.fixture
def mutants():
    """The module, a script of the benchmarks."""
    pytest.importorskip("mutmut", reason="make mutants needs mutmut")
    spec = importlib.util.spec_from_file_location("mutants", BENCHMARKS / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutants"]


@pytest.mark.torture
@pytest.mark.timeout(300)
def test_tests_that_assert_kill_and_those_that_only_call_do_not(tmp_path, mutants):
    """The control: of the same mutants, a test without an assertion kills few.

    An entry of the list that excuses no survivor is told.
    """
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    held, called = (
        mutants.Module(sources=(f"src/toy/{name}.py",), tests=(f"tests/test_{name}.py",))
        for name in ("held", "called")
    )
    both = mutants.Module(sources=held.sources + called.sources, tests=held.tests + called.tests)
    folder = tmp_path / "build" / "toy"
    assert mutants.mutate(tmp_path, folder, both, jobs=2).wording == 0

    kept, empty = mutants.count(folder, held, ()), mutants.count(folder, called, ())
    assert kept.raw >= mutants.GOAL
    assert kept.mutants == empty.mutants > 8
    assert empty.raw < 0.2

    excused, stale = empty.survivors[0], mutants.Mutant(file="", function="", before="", after="")
    again = mutants.count(folder, called, (excused, stale))
    assert (again.mutants, again.killed) == (empty.mutants, empty.killed)
    assert (again.equivalent, again.stale) == (1, [stale])


def test_function_that_no_test_reaches_gets_every_test(tmp_path, mutants):
    """It may run in a child of a test, where mutmut does not see it; so it is tried once more."""
    meta, stats = tmp_path / "mutants/src/toy.py.meta", tmp_path / "mutants/mutmut-stats.json"
    meta.parent.mkdir(parents=True)
    codes = {"toy.x_seen__mutmut_1": 0, "toy.x_hidden__mutmut_1": mutants.NOBODY_CAME}
    meta.write_text(json.dumps({"exit_code_by_key": codes}))
    reached = {"toy.x_seen": ["a"]}
    durations = {"a": 0.1, "b": 0.2}
    stats.write_text(
        json.dumps({"tests_by_mangled_function_name": reached, "duration_by_test": durations})
    )
    assert mutants.give_every_test_to_the_unreached(tmp_path)
    assert json.loads(meta.read_text())["exit_code_by_key"] == {
        **codes,
        "toy.x_hidden__mutmut_1": None,
    }
    found = json.loads(stats.read_text())["tests_by_mangled_function_name"]
    assert found == {"toy.x_seen": ["a"], "toy.x_hidden": ["a", "b"]}
    assert not mutants.give_every_test_to_the_unreached(tmp_path)


def test_equivalent_mutants_are_counted_openly(mutants):
    """Of ten, two of them equivalent, six killed: 60 % of all, 75 % of those that can be."""
    score = mutants.Score(mutants=10, killed=6, equivalent=2)
    assert (score.raw, score.score) == (0.6, 0.75)
    assert "75.0% of 8 mutants killed (60.0% of 10, 2 of them" in next(mutants.report("x", score))
