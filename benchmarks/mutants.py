"""``make mutants``: would the tests notice a mistake in the parts that decide?

Mutmut makes one small change at a time to a module's functions, a mutant, and runs the tests that
reach it: a mutant that no test fails on has survived. Writes ``benchmarks/results/mutants/``; ends
with 1 where a module's score is below the goal.

    score = killed / (mutants - equivalent)

*Equivalent* is a survivor that nobody can tell from the original; ``equivalent_mutants.toml`` lists
each with the reason, and an entry that excuses no survivor is an error. Wording is not counted:
mutants of strings with a space in them and of f-strings, which are sentences for people. A module's
folder in ``build/mutants`` is kept while its tests and all of ``src`` stay as they are, and a run
that was stopped goes on from it.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutants" / "scores.json"
EQUIVALENT = ROOT / "benchmarks" / "equivalent_mutants.toml"
GOAL = 0.9

SURVIVED = 0
KILLED = {1, 3, 24, 36, 152, 255, -9, -11, -24}
"""A test failed, pytest broke, the time was over, or the process died."""
NOBODY_CAME = 33
"""No test reached the function in the process that mutmut looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """Files that are mutated together, and the tests that concern them.

    Attributes:
        sources: Files of ``src``, relative to the root.
        tests: Test files, or tests of a file, as pytest takes them; those marked slow are left out.
    """

    sources: tuple[str, ...]
    tests: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Mutant:
    """One change of one function, as statements without layout.

    Attributes:
        file: Path of the source.
        function: Its name, with that of its class.
        before: What was there.
        after: What the mutant has there.
    """

    file: str
    function: str
    before: str
    after: str


@dataclass(kw_only=True)
class Score:
    """What became of a module's mutants.

    Attributes:
        mutants: Number of mutants, wording left out.
        killed: How many of them a test failed on.
        equivalent: How many survivors are listed as equivalent.
        survivors: The other survivors.
        stale: Entries of the list that excuse no survivor.
        wording: Number of mutants that are not counted.
    """

    mutants: int = 0
    killed: int = 0
    equivalent: int = 0
    survivors: list[Mutant] = field(default_factory=list)
    stale: list[Mutant] = field(default_factory=list)
    wording: int = 0

    @property
    def raw(self) -> float:
        """Share of all mutants that were killed."""
        return self.killed / self.mutants

    @property
    def score(self) -> float:
        """Share of those that can be killed."""
        return self.killed / (self.mutants - self.equivalent)


MODULES = {
    "breaker": Module(
        sources=("src/esper/resilience/circuit_breaker.py",),
        tests=(
            "tests/resilience/test_circuit_breaker.py",
            "tests/resilience/test_circuit_breaker_threads.py",
        ),
    ),
    "codec": Module(
        sources=("src/esper/compiler/codec.py", "src/esper/contracts/artifact_format.py"),
        tests=("tests/compiler/test_codec.py", "tests/contracts/test_artifact_format.py"),
    ),
    "blending": Module(
        sources=("src/esper/forward/blending.py",),
        tests=("tests/forward/test_blending.py",),
    ),
    "verdicts": Module(
        sources=("src/esper/growth/verdict.py", "src/esper/growth/gates.py"),
        tests=("tests/growth/test_gates.py", "tests/growth/test_verdict.py"),
    ),
}


def main() -> int:
    """Mutate the modules that were asked for; return 1 where one is below the goal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "modules", nargs="*", choices=[*MODULES, []], help="all where none is given"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants tried at once")
    asked = parser.parse_args()
    written = json.loads(RESULTS.read_text())["modules"] if RESULTS.exists() else {}
    is_reached = True
    for name in asked.modules or MODULES:
        folder = ROOT / "build" / "mutants" / name
        print(f"{name}: mutating; mutmut's words are in {folder}.log", flush=True)
        score = mutate(ROOT, folder, MODULES[name], listed=equivalents(name), jobs=asked.jobs)
        print("\n".join(report(name, score)), flush=True)
        is_reached &= score.score >= GOAL and not score.stale
        written[name] = asdict(score) | {"raw": score.raw, "score": score.score}
        write(written)
    return 0 if is_reached else 1


def write(modules: dict[str, object]) -> None:
    """Write the results of every module so far."""
    versions = {name: importlib.metadata.version(name) for name in ("mutmut", "torch")}
    document = {
        "environment": {"python": platform.python_version(), **versions},
        "goal": GOAL,
        "modules": {name: modules[name] for name in MODULES if name in modules},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(document, indent=2) + "\n")


def report(name: str, score: Score) -> Iterator[str]:
    """Yield the lines that are printed of a module."""
    yield (
        f"{name}: {score.score:.1%} of {score.mutants - score.equivalent} mutants killed"
        f" ({score.raw:.1%} of {score.mutants}, {score.equivalent} of them equivalent);"
        f" goal {GOAL:.0%}"
    )
    for mutant in score.survivors:
        yield f"  survived in {mutant.file}, {mutant.function}:"
        yield f"    - {mutant.before}\n    + {mutant.after}"
    for mutant in score.stale:
        yield f"  listed as equivalent, and no survivor: {mutant.function}: {mutant.after}"


def equivalents(module: str) -> list[Mutant]:
    """Return the mutants of a module that are listed as equivalent."""
    entries = tomllib.loads(EQUIVALENT.read_text()).get(module, [])
    assert all(entry.pop("reason") for entry in entries)
    return [Mutant(**entry) for entry in entries]


def mutate(
    root: Path, folder: Path, module: Module, *, listed: Sequence[Mutant] = (), jobs: int | None
) -> Score:
    """Make and try every mutant of a module.

    Args:
        root: A project with ``src``, ``tests`` and ``pyproject.toml``.
        folder: Where mutmut works; what it has of the same files is kept.
        module: What is mutated, and by which tests it is held.
        listed: The mutants that are known to be equivalent.
        jobs: How many are tried at once; None for as many as there are cores.

    Raises:
        RuntimeError: Mutmut failed, or left a mutant untried.
    """
    prepare(root, folder, module)
    run_mutmut(folder, jobs)
    if give_every_test_to_the_unreached(folder):
        run_mutmut(folder, jobs)
    return count(folder, module, listed)


def prepare(root: Path, folder: Path, module: Module) -> None:
    """Copy a project to where it is mutated, unless the copy there is of the same files."""
    settings = {
        "source_paths": ["src"],
        "only_mutate": module.sources,
        "pytest_add_cli_args_test_selection": ("-m", "not slow and not torture", *module.tests),
        "pytest_add_cli_args": ["--hypothesis-seed=0", "-p", "no:cacheprovider"],
        "process_isolation": "forkserver",  # a process in which torch has run is not to be forked
        "timeout_constant": 3.0,  # seconds, times 15: a busy machine is no mistake
        "use_git_change_detection": False,
        "debug": True,  # or nothing says why it failed
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    project = (root / "pyproject.toml").read_text()
    text = "\n".join([project, "[tool.mutmut]", *lines, ""])
    digest = hashlib.sha256(text.encode())
    for path in concerning(root, module):
        digest.update(path.read_bytes())
    stamp = folder / "digest"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return
    shutil.rmtree(folder, ignore_errors=True)
    for part in ("src", "tests"):
        shutil.copytree(root / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "mutants" / "src").mkdir(parents=True)  # a path that is not there yet is never read
    (folder / "pyproject.toml").write_text(text)
    stamp.write_text(digest.hexdigest())


def concerning(root: Path, module: Module) -> list[Path]:
    """Return the files on which it depends what becomes of a module's mutants."""
    shared = [*(root / "src").rglob("*.py"), *(root / "tests" / "support").rglob("*.py")]
    own = [root / test.partition("::")[0] for test in module.tests]
    return sorted({*shared, *own, *(root / "tests").glob("conftest.py")})


def run_mutmut(folder: Path, jobs: int | None) -> None:
    """Try the mutants that have not been tried yet."""
    command = [str(Path(sys.executable).with_name("mutmut")), "run"]
    command += ["--max-children", str(jobs or os.cpu_count())]
    changed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / "mutants" / "src")}
    log = folder.with_name(f"{folder.name}.log")
    with log.open("w") as out:
        done = subprocess.run(  # noqa: S603 - a fixed command
            command,
            cwd=folder,
            env={**os.environ, **changed},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        words = log.read_text().replace("\r", "\n").splitlines()
        raise RuntimeError("mutmut failed:\n" + "\n".join(words[-30:]))


def give_every_test_to_the_unreached(folder: Path) -> bool:
    """Let every test be run on functions that none reaches; return whether there are any.

    Which tests reach a function is seen in mutmut's own process. What runs only in a child of a
    test, as after a fork, is reached all the same.
    """
    path = folder / "mutants" / "mutmut-stats.json"
    stats = json.loads(path.read_text())
    unreached = set()
    for meta in metas(folder):
        data = json.loads(meta.read_text())
        for key, code in data["exit_code_by_key"].items():
            function = key.partition("__mutmut_")[0]
            if code == NOBODY_CAME and not stats["tests_by_mangled_function_name"].get(function):
                data["exit_code_by_key"][key] = None
                unreached.add(function)
        meta.write_text(json.dumps(data))
    every = list(stats["duration_by_test"])
    stats["tests_by_mangled_function_name"] |= dict.fromkeys(unreached, every)
    path.write_text(json.dumps(stats))
    return bool(unreached)


def metas(folder: Path) -> list[Path]:
    """Return mutmut's notes on each file."""
    return sorted((folder / "mutants" / "src").rglob("*.py.meta"))


def count(folder: Path, module: Module, listed: Sequence[Mutant]) -> Score:
    """Count what became of a module's mutants."""
    score, excusing = Score(), set()
    for source in module.sources:
        for mutant, code, is_wording in tried(folder, source):
            if code != SURVIVED and code not in KILLED:
                raise RuntimeError(f"not tried (exit status {code}): {mutant}")
            if is_wording:
                score.wording += 1
                continue
            score.mutants += 1
            score.killed += code in KILLED
            if code == SURVIVED and mutant in listed:
                excusing.add(mutant)
                score.equivalent += 1
            elif code == SURVIVED:
                score.survivors.append(mutant)
    score.stale = [mutant for mutant in listed if mutant not in excusing]
    return score


def tried(folder: Path, source: str) -> Iterator[tuple[Mutant, int | None, bool]]:
    """Yield each mutant of a file, the exit status of its tests, and whether it is but wording."""
    mutated = folder / "mutants" / source
    codes = json.loads(mutated.with_name(f"{mutated.name}.meta").read_text())["exit_code_by_key"]
    functions = {
        node.name: node
        for node in ast.walk(ast.parse(mutated.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for key, code in codes.items():
        name = key.rpartition(".")[2]
        stem = name.partition("__mutmut_")[0]
        original, changed = functions[f"{stem}__mutmut_orig"], functions[name]
        before, after = difference(statements(original), statements(changed))
        function = stem.removeprefix("x").removeprefix("_").strip("ǁ").replace("ǁ", ".")
        is_wording = statements(original, wordless=True) == statements(changed, wordless=True)
        yield Mutant(file=source, function=function, before=before, after=after), code, is_wording


def statements(function: ast.AST, *, wordless: bool = False) -> list[str]:
    """Return a function's text without layout and name, one statement a line."""
    copied = ast.parse(ast.unparse(function))
    copied.body[0].name = "_"
    return ast.unparse(Wordless().visit(copied) if wordless else copied).splitlines()


class Wordless(ast.NodeTransformer):
    """Replaces sentences by one and the same."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """Replace a string that has a space in it."""
        is_sentence = isinstance(node.value, str) and " " in node.value
        return ast.Constant(value="a sentence") if is_sentence else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:  # noqa: ARG002 - ast's
        """Replace an f-string."""
        return ast.Constant(value="a sentence")


def difference(before: list[str], after: list[str]) -> tuple[str, str]:
    """Return the lines that differ; of a long one what differs, with a little around it."""
    marked = list(difflib.ndiff(before, after))
    gone = " ".join(line[2:].strip() for line in marked if line.startswith("- "))
    come = " ".join(line[2:].strip() for line in marked if line.startswith("+ "))
    if not gone.startswith(("def ", "async def ")):
        return gone, come
    parts = [text.split(", ") for text in (gone, come)]  # a default in a long signature
    return tuple(", ".join(p for p in parts[i] if p not in parts[1 - i]) for i in (0, 1))


if __name__ == "__main__":
    sys.exit(main())
