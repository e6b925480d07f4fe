"""What docs/extending.md shows works as it stands, and prints what stands below it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
PROMISED = ["operation", "kernel", "kind of layer", "policy", "ranking", "registry", "sink"]


def test_the_page_shows_how_to_add_each_of_the_seven():
    """One section each, in this order, and no other."""
    assert [name.split(maxsplit=1)[1] for name in SECTIONS] == PROMISED


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_its_block_runs_and_prints_what_it_says(name):
    """In a process of its own, with warnings as errors."""
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[name], flags=re.DOTALL)
    (expected,) = re.findall(r"```text\n(.*?)```", SECTIONS[name], flags=re.DOTALL)
    paths = [str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.stdout, result.stderr) == (expected, "")
