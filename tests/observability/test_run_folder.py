"""A folder for each run."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from esper.observability.run_folder import claim_run_folder


def test_folder_is_made_and_the_next_one_is_numbered(tmp_path):
    """The name is the one that was asked for, with a number from the second run on."""
    names = [claim_run_folder(tmp_path / "deep" / "run").name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]


@pytest.mark.parametrize(
    "name",
    [
        "events.jsonl",
        "report.json",
        "report.html",
        "model/model.safetensors",
        "model/state_dict.pt",
    ],
)
def test_any_file_of_a_run_keeps_its_folder(tmp_path, name):
    """Whatever a run has left, the next one leaves it alone."""
    kept = tmp_path / "run" / name
    kept.parent.mkdir(parents=True)
    kept.write_text("of the first run")
    assert claim_run_folder(tmp_path / "run") == tmp_path / "run-2"
    assert kept.read_text() == "of the first run"


def test_folder_of_something_else_is_used(tmp_path):
    """A folder that the user has made, with files of other kinds in it, is taken as it is."""
    (tmp_path / "notes.txt").write_text("mine")
    assert claim_run_folder(tmp_path) == tmp_path


def test_working_folder_has_a_numbered_one_inside(tmp_path, monkeypatch):
    """A folder without a name, such as the working folder, has the next run within it."""
    monkeypatch.chdir(tmp_path)
    assert claim_run_folder(Path()) == Path()
    assert claim_run_folder(Path()) == Path("run-2")


def test_runs_that_begin_together_have_a_folder_each(tmp_path):
    """The claim is one step of the file system, so that no two threads get the same folder."""
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(claim_run_folder, [tmp_path / "run"] * 24))
    assert len(set(claimed)) == 24
