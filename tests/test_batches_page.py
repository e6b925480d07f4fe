"""What docs/batches.md shows works as it stands, and prints what stands below it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "batches.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_its_block_runs_and_prints_what_it_says():
    """In a process of its own, with warnings as errors."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (expected,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == (expected, "")
