"""What docs/frameworks.md shows works as it stands, and prints what stands below it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parent.parent / "docs" / "frameworks.md").read_text(encoding="utf-8")
(TASK,) = re.findall(r"```python\n(# task.py\n.*?)```", PAGE, flags=re.DOTALL)
BLOCKS = re.findall(r"```python\n((?!# task).*?)```\n\n```text\n(.*?)```", PAGE, flags=re.DOTALL)
NEEDED = ["pytorch_lightning", "transformers", "accelerate", "torch"]


def test_every_block_says_what_it_prints():
    """None is left out of the run below."""
    assert len(BLOCKS) + 1 == PAGE.count("```python") == 5


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)), ids=NEEDED)
def test_its_block_runs_and_prints_what_it_says(number, tmp_path):
    """In a process of its own, with the warnings that are Esper's as errors."""
    pytest.importorskip(NEEDED[number])
    (tmp_path / "task.py").write_text(TASK, encoding="utf-8")
    code, expected = BLOCKS[number]
    command = [sys.executable, "-W", "error::UserWarning:__main__", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == (expected, "")
