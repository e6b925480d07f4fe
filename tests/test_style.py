"""What is ignored is ignored for a reason that stands beside it."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import esper

ROOT = Path(esper.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

IGNORES = re.compile(r"#\s*(noqa|type:\s*ignore|ruff:\s*noqa|mypy:|pragma:|fmt:)", re.IGNORECASE)
CODES = r"[A-Z]+[0-9]+(, [A-Z]+[0-9]+)*"
WITH_REASON = re.compile(
    rf"# (ruff: )?noqa: {CODES} - \w.*"
    rf"|# type: ignore\[[a-z-]+(, [a-z-]+)*\] # (noqa: {CODES} - |(?!noqa))\w.*"
)
"""One directive with its codes, or one of each kind for the same reason; then the reason."""


def _without_reason(source: str) -> list[str]:
    """Return every comment that silences a check, and does not say which and why."""
    comments = [
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    ignores = [comment for comment in comments if IGNORES.match(comment)]
    return [comment for comment in ignores if not WITH_REASON.fullmatch(comment)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_ignore_says_why(path):
    """Who reads the line need not guess whether the check was wrong or the code."""
    assert _without_reason(path.read_text(encoding="utf-8")) == []


def test_control_an_ignore_without_a_reason_is_found():
    """Bare ones, blanket ones, and those that name a check but no reason; no others."""
    bad = [
        "# noqa",
        "# noqa: S101",
        "# noqa: S101 -",
        "# type: ignore",
        "# type: ignore[arg-type]",
        "# type: ignore # because",
        "# type: ignore[arg-type] # noqa: S101",
        "# ruff: noqa: S101",
        "# pragma: no cover",
    ]
    good = [
        "# noqa: S101 - a reason",
        "# noqa: S101, SLF001 - a reason",
        "# type: ignore[arg-type] # a reason",
        "# type: ignore[arg-type] # noqa: S101 - a reason",
        "# ruff: noqa: S101 - a reason",
        "# a comment",
    ]
    lines = "".join(f"x = 1  {comment}\n" for comment in bad + good)
    assert _without_reason(f'text = "# noqa"\n{lines}') == bad


def _names_cuda(source: str) -> bool:
    """Return whether a module's code names `torch.cuda`; what it says in words does not count.

    Under whatever name `torch` goes; a tensor's or a module's `cuda()` is found as well.
    """
    return any(
        (isinstance(node, ast.Attribute) and node.attr == "cuda" and not _is_version(node.value))
        or (isinstance(node, ast.Import) and any("torch.cuda" in a.name for a in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.cuda"))
        or (isinstance(node, ast.ImportFrom) and "cuda" in [a.name for a in node.names])
        for node in ast.walk(ast.parse(source))
    )


def _is_version(node: ast.expr) -> bool:
    """Say whether it is the version that torch was built for, which is no device."""
    return ast.unparse(node) == "torch.version"


def test_only_streams_names_cuda():
    """Ruff holds it where it looks; commands are excused from its ban, and not from this one."""
    named = {
        path.relative_to(ROOT).parts[0]
        for path in SOURCES
        if _names_cuda(path.read_text(encoding="utf-8"))
    }
    assert named <= {"streams"}


def test_control_a_named_cuda_is_found():
    """However it is imported; the version that torch was built for is no device."""
    bad = ["torch.cuda.synchronize()", "import torch.cuda", "from torch.cuda import Stream"]
    bad += ["from torch import cuda", "import torch as t\nt.cuda.synchronize()", "model.cuda()"]
    assert all(map(_names_cuda, bad))
    assert not _names_cuda("torch.version.cuda\n# torch.cuda\n")
