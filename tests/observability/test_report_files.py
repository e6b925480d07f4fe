"""Reports as files."""

import errno
import json
from pathlib import Path

import pytest

from esper.observability.demo_page import demo_page
from esper.observability.report_files import write_report
from esper.observability.report_page import run_page


def test_a_report_is_written_as_data_and_as_a_page(tmp_path, demo_report, make_run):
    """The folder is made, and holds the report's JSON and its page, for demo and run alike."""
    for name, report, page in (("d", demo_report, demo_page), ("r", make_run(), run_page)):
        data, html = write_report(report, tmp_path / name)
        assert data.read_text(encoding="utf-8") == report.to_json()
        assert html.read_text(encoding="utf-8") == page(report)
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["report.html", "report.json"]


def test_a_report_that_cannot_be_written_changes_nothing(tmp_path, make_run):
    """A number that JSON does not have raises, and the report from before is still there."""
    write_report(make_run(), tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        write_report(make_run(test_metrics={"loss": float("nan")}), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["test_metrics"] == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_full_disk_is_named_with_its_file_and_costs_no_other(tmp_path, make_run, name):
    """A full disk does not say which file it was; the error does, and the other one is written."""
    (tmp_path / f".{name}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="make room") as failure:
        write_report(make_run(), tmp_path)
    assert failure.value.errno == errno.ENOSPC
    assert failure.value.filename == str(tmp_path / name)
    (other,) = {"report.json", "report.html"} - {name}
    assert [path.name for path in tmp_path.iterdir()] == [other]
