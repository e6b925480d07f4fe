"""``esper report``: a finished run is printed, from its report or from its log."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper.cli.app import app
from esper.contracts.report import demo_report_from_json, run_report_from_json

FILES = Path(__file__).parents[1] / "contracts" / "files"


def run(*arguments):
    """Return what the command did."""
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path):
    """A folder of a run that has written everything."""
    shutil.copy(FILES / "run-1.json", tmp_path / "report.json")
    shutil.copy(FILES / "events-1.jsonl", tmp_path / "events.jsonl")
    return tmp_path


def test_a_folder_prints_its_report(folder):
    """The same words as at the end of the run."""
    result = run(folder)
    expected = run_report_from_json((folder / "report.json").read_text(encoding="utf-8"))
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{expected}\n"


def test_a_folder_without_a_report_prints_what_its_log_says(folder):
    """As that of a run that was killed, or of a loop without a command."""
    (folder / "report.json").unlink()
    of_folder, of_log = run(folder), run(folder / "events.jsonl")
    assert of_folder.exit_code == 0
    assert of_folder.stdout == of_log.stdout
    assert "gated-mlp-4x4-w64 at 0, 900 parameters: fossilized" in of_log.stdout


@pytest.mark.parametrize("what", ["", "report.json", "events.jsonl"])
def test_json_is_a_report_that_can_be_read_again(folder, what):
    """Nothing is printed beside it."""
    result = run(folder / what, "--json")
    assert result.exit_code == 0
    assert run_report_from_json(result.stdout).updates == 600


def test_a_demo_s_report_is_printed_as_its_tables(tmp_path):
    """And as JSON of its own."""
    shutil.copy(FILES / "demo-1.json", tmp_path / "report.json")
    assert "from scratch" in run(tmp_path).stdout
    assert demo_report_from_json(run(tmp_path, "--json").stdout).arms


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("nothing", None, "No such file"),
        ("", None, "it has neither report.json nor events.jsonl"),
        ("report.json", "not JSON", "report.json: "),
        ("report.json", json.dumps({"format_version": "9.0"}), "9.0"),
        ("events.jsonl", "", "the log has no event"),
    ],
    ids=["absent", "empty folder", "no JSON", "of a later version", "empty log"],
)
def test_what_is_not_there_or_refused_is_status_1(tmp_path, name, text, words):
    """In one line, with the file's name."""
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    result = run(tmp_path / name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_cannot_be_read_is_status_2(tmp_path):
    """As what lies behind a file that is no folder; bytes that are no text are refused, though."""
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    assert run(tmp_path).exit_code == 1
    assert run(tmp_path / "report.json" / "report.json").exit_code == 2
