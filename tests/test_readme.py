"""The documents: what they show runs, and what they name exists."""

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

    known = {command.callback.__name__ for command in app.registered_commands}
    named = set(re.findall(r"(?:^ {4}|`)esper ([a-z]+)", README, flags=re.MULTILINE))
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


def test_architecture_has_every_file_of_every_room():
    """The map names each module in its room's row, and none that is not there."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    rows = re.findall(r"^\| `(\w+)` \|(.*)$", text, flags=re.MULTILINE)
    named = {room: set(re.findall(r"`(\w+)`", row)) for room, row in rows}
    rooms = [path.parent for path in (ROOT / "src" / "esper").glob("*/__init__.py")]
    found = {room.name: {path.stem for path in room.glob("[!_]*.py")} for room in rooms}
    assert {room: named.get(room) for room in found} == found
