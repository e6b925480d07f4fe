"""What a docstring refers to exists, as it is named, from where it stands."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

import esper

ROOT = Path(esper.__file__).parent
SOURCES = sorted(path for path in ROOT.rglob("*.py") if path.name != "__main__.py")
ROLE = re.compile(r":(?:func|class|meth|attr|data|mod|exc):`~?([\w.]+)`|``(esper\.[\w.]+)``")
"""A reference by its role, or a dotted name of ours as code."""


class File:
    """One source file: its names, what it imports, and what its classes have.

    Args:
        name: The module's dotted name.
        source: Its text.
    """

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.tree = ast.parse(source)
        self.imported: dict[str, str] = {}
        self.classes: dict[str, ast.ClassDef] = {}
        self.names: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = alias.name
        self.names = _bound(self.tree.body)
        self.classes = {n.name: n for n in self.tree.body if isinstance(n, ast.ClassDef)}

    def has(self, target: str, owner: str | None) -> bool:
        """Say whether a name means something here, in the body of the class ``owner`` or none."""
        first, _, rest = target.partition(".")
        if owner is not None and self.has_member(owner, target):
            return True
        if first in self.classes:
            return not rest or self.has_member(first, rest)
        if first in self.imported:
            return _exists(f"{self.imported[first]}.{rest}".rstrip("."))
        known = first in self.names and not rest
        return known or _leads("builtins", target.split(".")) or _exists(target)

    def has_member(self, owner: str, member: str) -> bool:
        """Say whether a class has a member, of its own or by a base class."""
        node = self.classes[owner]
        if member in _bound(node.body) | _own_attributes(node):
            return True
        return any(self.has(f"{ast.unparse(base)}.{member}", None) for base in node.bases)


def _bound(body: list[ast.stmt]) -> set[str]:
    """Return the names that statements bind, in branches too."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
        names |= {n.id for n in stored if isinstance(n.ctx, ast.Store)}
        names |= {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}
    return names


def _own_attributes(node: ast.ClassDef) -> set[str]:
    """Return the attributes that a class's methods give to ``self``."""
    return {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute)
        and isinstance(n.ctx, ast.Store)
        and ast.unparse(n.value) == "self"
    }


@functools.cache
def _file(module: str) -> File | None:
    path = ROOT.parent.joinpath(*module.split("."))
    for each in (path.with_suffix(".py"), path / "__init__.py"):
        if each.is_file():
            return File(module, each.read_text(encoding="utf-8"))
    return None


@functools.cache
def _exists(dotted: str) -> bool:
    """Say whether a dotted name leads to something, ours by its text and others' by import."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        module, rest = ".".join(parts[:cut]), parts[cut:]
        if parts[0] == "esper":
            file = _file(module)
            if file is not None:
                return not rest or file.has(".".join(rest), None)
        elif _leads(module, rest):
            return True
    return False


def _leads(module: str, rest: list[str]) -> bool:
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    return (
        functools.reduce(lambda it, name: it and getattr(it, name, None), rest, found) is not None
    )


def _texts(node: ast.AST, owner: str | None = None):
    """Yield every docstring, those of attributes too, with the class that it stands in."""
    for child in ast.iter_child_nodes(node):
        inner = child.name if isinstance(child, ast.ClassDef) and owner is None else owner
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            if isinstance(child.value.value, str):
                yield child.value.value, owner
        else:
            yield from _texts(child, inner)


def _dangling(file: File) -> list[str]:
    """Return what the docstrings of a file refer to and is not there."""
    return [
        target
        for text, owner in _texts(file.tree)
        for target in map("".join, ROLE.findall(text))
        if not file.has(target, owner)
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_reference_leads_somewhere(path):
    """A reader who follows a reference arrives."""
    module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    file = _file(module.removesuffix(".__init__"))
    assert _dangling(file) == []


CONTROL = '''
"""See :func:`gone`, :func:`here`, :func:`esper.contracts.reference.check_digest`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from esper.contracts.errors import EsperError

if TYPE_CHECKING:
    from esper.contracts.ports import Registry

LIMIT = 3
"""As :data:`LIMIT`, and :data:`LIMITS`; ``esper.contracts`` is there, ``esper.nowhere`` is not."""


def here():
    """As :meth:`Registry.fetch`, :meth:`Registry.open` and :func:`torch.nn.functional.linear`."""


class Base:
    """Has :attr:`level`, :meth:`stop` and :attr:`depth`."""

    level: int

    def __init__(self):
        self.depth = 1


class Derived(Base, EsperError):
    """Has :attr:`depth`, :attr:`Base.depth`, :meth:`with_traceback` and :attr:`width`."""

    def go(self):
        """As :meth:`go`, :meth:`Derived.go`, :meth:`Derived.stop` and :mod:`esper.contracts`."""
'''


def test_control_what_is_not_there_is_found():
    """Names of nothing, in every place that a docstring can stand; and no others."""
    assert _dangling(File("control", CONTROL)) == [
        "gone",
        "LIMITS",
        "esper.nowhere",
        "Registry.open",
        "stop",
        "width",
        "Derived.stop",
    ]
