"""What docs/observing.md says of names is so, and its block prints what stands below it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from esper.observability.measures import FAMILIES

PAGE = (Path(__file__).parent.parent / "docs" / "observing.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_its_block_prints_what_it_says():
    """In a process of its own."""
    ((code, expected),) = re.findall(
        r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, flags=re.DOTALL
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout == expected, result.stderr


def test_every_series_is_in_its_table():
    """With its labels, and what only rises as a total; and the table has no other."""
    rows = re.findall(r"^\| (`esper_.*?) \|", PAGE, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(.*?)`", row)}
    made = set()
    for family in FAMILIES:
        labels = f"{{{', '.join(family.labels)}}}" if family.labels else ""
        made.add(f"esper_{family.name}{'_total' if family.counts else ''}{labels}")
    assert named == made
