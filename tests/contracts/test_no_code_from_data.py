"""Nothing in the package can turn data into code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import esper

ROOT = Path(esper.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
CALLS = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
ATTRIBUTES = {"torch.load", "torch.jit.load", "torch.export.load", "torch.package", "torch.hub"}
IMPORTS = ATTRIBUTES | {"torch.jit"}
ALLOWED = {"running/torchscript.py": ["torch.jit.load"]}
"""Each file that may, and what it does, once: it loads only what its own process wrote."""


def _dotted(node):
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return ""


def _offences(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _dotted(node.func) in CALLS:
            yield node.lineno, _dotted(node.func)
        if isinstance(node, ast.Attribute) and _dotted(node) in ATTRIBUTES:
            yield node.lineno, _dotted(node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = getattr(node, "module", None) or ""
            names = [base, *(f"{base}.{alias.name}".strip(".") for alias in node.names)]
            for name in names:
                if name.split(".")[0] in MODULES or name in IMPORTS:
                    yield node.lineno, name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_can_execute_data(path):
    """Pickle, torch.load, torch.jit.load, eval and exec do not occur in the syntax tree."""
    found = [name for _, name in _offences(ast.parse(path.read_text()))]
    assert found == ALLOWED.get(str(path.relative_to(ROOT)), [])


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec('1')",
        "torch.load(f)",
        "import torch.jit",
        "from torch import load",
        "from torch import jit",
        "x = torch.jit.load(f)",
        "torch.export.load(f)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    """The control: each of these is an offence."""
    assert list(_offences(ast.parse(source)))
