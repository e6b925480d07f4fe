"""What docs/depth.md shows works as it stands, and prints what stands below it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "depth.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, flags=re.DOTALL)


def test_every_block_says_what_it_prints():
    """None is left out of the run below."""
    assert len(BLOCKS) == PAGE.count("```python") == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_its_block_runs_and_prints_what_it_says(number):
    """In a process of its own, with warnings as errors."""
    code, expected = BLOCKS[number]
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == (expected, "")
