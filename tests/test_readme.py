"""The documents: what they show runs, and what they name exists."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def _block(language):
    """Return the README's block of a language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return block


@pytest.mark.slow
def test_readme_example_prints_what_the_readme_says():
    """The example, run as it stands in a process of its own, prints the block below it."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", _block("python")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as for every test
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == _block("text")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_targets_that_make_has(document):
    """Every `make target` in a document is a target of the Makefile."""
    text = document.read_text(encoding="utf-8")
    code = re.findall(r"`[^`\n]*`|^ {4}.*$", text, flags=re.MULTILINE)
    named = {name for span in code for name in re.findall(r"\bmake ([a-z]+)", span)}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert named <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))


def test_readme_names_both_commands_and_make_knows_them():
    """The README names `make demo` and `make test`, and make can say what each would do."""
    assert {"demo", "test"} <= set(re.findall(r"^ {4}make ([a-z]+)", README, flags=re.MULTILINE))
    subprocess.run(["make", "-n", "demo", "test"], cwd=ROOT, check=True, capture_output=True)


def test_readme_names_commands_that_esper_has():
    """Every `esper command` in the README is a command."""
    from esper.cli.app import app

    known = {each.name or each.callback.__name__ for each in app.registered_commands}
    known |= {group.typer_instance.info.name for group in app.registered_groups}
    named = set(re.findall(r"(?:^ {4}|`)esper ([a-z-]+)", README, flags=re.MULTILINE))
    assert named >= {"grow", "suggest", "doctor"}
    assert named <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_link_to_files_that_exist(document):
    """Every link to a file of the repository leads to one."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    files = [link for link in links if "://" not in link]
    assert [link for link in files if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_documents_name_files_that_exist(name):
    """Every path between backticks is one of the repository."""
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"`((?:src|tests|docs|examples|benchmarks|\.ci)/[^`\s*<]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
SOURCES = ROOT / "src" / "esper"


def _map():
    """Return the files that the map names, by room, in its order; a file named twice is twice."""
    text = ARCHITECTURE.partition("## The map")[2].partition("To change ...")[0]
    rooms = re.findall(
        r"^- \*\*(\w+)\*\*:(.*?)(?=^- \*\*|\Z)", text, flags=re.DOTALL | re.MULTILINE
    )
    return {room: re.findall(r"`(\w+)`", body) for room, body in rooms}


def test_the_map_names_every_file_once_and_none_that_is_not_there():
    """Room by room, the map has each module exactly once."""
    assert len(ARCHITECTURE.splitlines()) < 200
    found = {
        path.parent.name: sorted(each.stem for each in path.parent.glob("[!_]*.py"))
        for path in SOURCES.glob("*/__init__.py")
    }
    assert {room: sorted(files) for room, files in _map().items()} == found


def test_the_map_leads_from_ten_changes_to_files_that_it_names():
    """A newcomer's change has a line that says where it goes, and the map knows that place."""
    table = ARCHITECTURE.partition("To change ...")[2].partition("\n\n[")[0]
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+) \|$", table, flags=re.MULTILINE)
    named = [path for _, paths in rows for path in re.findall(r"`(\w+)/(\w+)\.py`", paths)]
    assert len(rows) >= 10
    assert [f"{room}/{file}" for room, file in named if file not in _map()[room]] == []


def test_no_cell_or_paragraph_of_the_map_is_a_wall_of_text():
    """Nobody reads a cell of two thousand characters."""
    assert max(len(line) for line in ARCHITECTURE.splitlines()) <= 120
    assert max(map(len, ARCHITECTURE.split("\n\n- **")[1].split("\n\n")[0].split("\n- **"))) <= 760


@pytest.mark.parametrize("room", sorted(path.parent.name for path in SOURCES.glob("*/__init__.py")))
def test_each_room_says_what_lives_there_and_where_its_door_is(room):
    """In at most ten lines, before any code."""
    doc = ast.get_docstring(ast.parse((SOURCES / room / "__init__.py").read_text()))
    assert len(doc.splitlines()) <= 10
    assert "door" in doc or _map()[room] == []
