"""Every field of every public dataclass is documented, the events first: they are a file format."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import esper

ROOT = Path(esper.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))


def _is_dataclass(node: ast.ClassDef) -> bool:
    made_by = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return "dataclass" in {ast.unparse(each).rpartition(".")[2] for each in made_by}


def _fields(node: ast.ClassDef) -> list[str]:
    return [
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and isinstance(line.target, ast.Name)
        and not line.target.id.startswith("_")
        and not ast.unparse(line.annotation).startswith(("ClassVar", "typing.ClassVar"))
    ]


def _documented(node: ast.ClassDef) -> set[str]:
    _, _, rest = (ast.get_docstring(node) or "").partition("\nAttributes:\n")
    section = re.match(r"(?:    .*\n?|\n)*", rest)
    return set(re.findall(r"^ {4}(\w+): \S", section[0], re.MULTILINE)) if section else set()


def _undocumented(source: str) -> list[str]:
    """Return ``Class.field`` for every field that its class's docstring does not explain."""
    return [
        f"{node.name}.{name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and _is_dataclass(node)
        for name in _fields(node)
        if name not in _documented(node)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_field_has_its_line(path):
    """A reader of a value learns what each part of it means, without reading the code."""
    assert _undocumented(path.read_text(encoding="utf-8")) == []


CONTROL = '''
@dataclass(frozen=True)
class Reading:
    """A reading.

    Attributes:
        value: In volts.
            unit: Not a field, but more of the line above.

    Raises:
        error: It is none.
    """

    kind: ClassVar[str] = ""
    value: float
    unit: str
    error: float


@dataclasses.dataclass
class Silent:
    """Says nothing."""

    value: float


@dataclass
class _Own:
    value: float


class Plain:
    value: float
'''


def test_control_what_is_missing_is_found():
    """Fields without a line, in either spelling of the decorator; nothing else."""
    assert _undocumented(CONTROL) == ["Reading.unit", "Reading.error", "Silent.value"]
