"""Decisions and their index agree, and the reference has the public names."""

import re
from pathlib import Path

import pytest

import esper
import esper.execution

ROOT = Path(__file__).parent.parent
DECISIONS = ROOT / "docs" / "adr"
REFERENCE = ROOT / "docs" / "reference"
COUNTERPARTS = {"supersedes": "superseded by", "amends": "amended by"}


def _pages():
    """Return number, title, file name and status of each decision, as its page has them."""
    form = re.compile(r"# (\d{4})\. (.+)\n\nStatus: (.+)\n")
    for path in sorted(DECISIONS.glob("[0-9]*.md")):
        number, title, status = form.match(path.read_text(encoding="utf-8")).groups()
        yield number, title, path.name, status


def _claims(statuses):
    """Return what the statuses say of other pages, each claim as the newer page words it."""
    said = {"old": set(), "new": set()}
    for number, status in statuses.items():
        for verb, passive in COUNTERPARTS.items():
            said["new"] |= {(number, verb, old) for old in re.findall(rf"{verb} (\d{{4}})", status)}
            newer = re.findall(rf"{passive} \[(\d{{4}})\]", status)
            said["old"] |= {(new, verb, number) for new in newer}
    return said


def test_index_has_every_decision_as_its_page_has_it():
    """The index has number, title, link and status of every page, in order, and nothing else."""
    index = (DECISIONS / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d{4}) \| \[(.+)\]\((\S+)\) \| (.+) \|$", index, flags=re.MULTILINE)
    assert rows == list(_pages())


def test_decisions_have_numbers_of_their_own():
    """A page's file name begins with its number, and numbers have no gap and no twin."""
    pages = list(_pages())
    assert [name[:4] for _, _, name, _ in pages] == [number for number, *_ in pages]
    assert [int(number) for number, *_ in pages] == list(range(1, len(pages) + 1))


def test_replaced_decisions_lead_to_what_replaced_them():
    """Whatever a page supersedes or amends says so and links to it, and nothing else does."""
    claims = _claims({number: status for number, _, _, status in _pages()})
    assert ("0011", "supersedes", "0005") in claims["new"]
    assert claims["old"] == claims["new"]


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("accepted", "accepted; supersedes 0001"),
        ("superseded by [0002](0002-b.md)", "accepted"),
        ("superseded by 0002", "accepted; supersedes 0001"),
        ("amended by [0002](0002-b.md)", "accepted; supersedes 0001"),
    ],
)
def test_one_sided_claims_are_found(older, newer):
    """Control: a claim that one page makes alone, or that does not link, is a difference."""
    claims = _claims({"0001": older, "0002": newer})
    assert claims["old"] != claims["new"]


def test_superseded_decisions_are_not_accepted():
    """A status that says superseded says nothing else first, and every other one is accepted."""
    for number, _, _, status in _pages():
        assert status.startswith(("accepted", "superseded by [")), number


def _listed():
    """Return every path that a directive of the reference names."""
    for path in sorted(REFERENCE.glob("*.md")):
        yield from re.findall(r"^::: (\S+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_reference_has_every_public_name_once():
    """Each name of `esper` and, but for those, of `esper.execution` has one directive; no other."""
    public = [f"esper.{name}" for name in esper.__all__]
    further = set(esper.execution.__all__) - set(esper.__all__)
    assert sorted(_listed()) == sorted([*public, *(f"esper.execution.{name}" for name in further)])


def test_names_that_both_packages_have_are_one_object():
    """A name that the reference has under `esper` alone means the same in `esper.execution`."""
    shared = set(esper.execution.__all__) & set(esper.__all__)
    assert shared >= {"KasminaLayer", "KernelLoadError"}
    for name in shared:
        assert getattr(esper, name) is getattr(esper.execution, name), name


def _tests_named(text):
    return set(re.findall(r"`(test_\w+)`", text))


def _tests_there():
    files = (ROOT / "tests").rglob("test_*.py")
    pattern = re.compile(r"^def (test_\w+)", flags=re.MULTILINE)
    return {name for path in files for name in pattern.findall(path.read_text(encoding="utf-8"))}


def test_threat_model_names_tests_that_there_are():
    """Every defence of the threat model is shown by a test, and every test that it names exists."""
    page = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!threat|---)(.+) \|$", page, flags=re.MULTILINE)
    assert len(rows) > 20
    assert [row for row in rows if not _tests_named(row)] == []
    assert _tests_named(page) - _tests_there() == set()
