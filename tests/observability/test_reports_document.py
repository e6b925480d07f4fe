"""What docs/reports.md says of logs and reports is so."""

import contextlib
import io
import re
from pathlib import Path

from esper.contracts.events import EVENT_FORMAT_VERSION
from esper.contracts.report import REPORT_FORMAT_VERSION
from esper.contracts.report_text import WORDS

PAGE = (Path(__file__).parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")


def test_its_block_prints_what_it_says():
    """As it stands."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (expected,) = re.findall(r"```text\n(.*?)```", PAGE, flags=re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue() == expected


def test_its_words_are_those_of_pages_and_terminal():
    """One text for each, wherever it is read."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", PAGE, flags=re.MULTILINE)
    assert dict(rows[1:]) == WORDS


def test_it_names_the_version_that_is_written():
    """Of events and of reports, which are of one."""
    assert EVENT_FORMAT_VERSION == REPORT_FORMAT_VERSION
    assert f'"format_version": "{REPORT_FORMAT_VERSION}"' in PAGE
