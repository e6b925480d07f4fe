"""``esper doctor``."""

import pytest

from esper.cli.doctor import (
    check_names,
    check_registry,
    check_run_dir,
    check_sandbox,
    check_torch,
    examine,
)
from esper.registry.directory import DirectoryRegistry
from esper.services import sandbox
from esper.services.settings import read_environment


def test_this_environment_is_well(tmp_path):
    """Where the tests run nothing is wrong, and versions, threads and devices are reported."""
    checks = {check.name: check for check in examine(tmp_path / "runs")}
    assert [check for check in checks.values() if check.cure] == []
    assert {"sandbox", "extra server", "extra sign"} <= checks.keys()
    assert {"python", "esper", "torch", "torch build", "threads", "devices"} <= checks.keys()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", ["esper", "esper-lang"])
def test_a_clash_of_names_is_a_problem(other):
    """Another distribution with the import name is named, with the commands that cure it."""
    check = check_names(["esper-morph", other])
    assert f"beside {other}," in check.found
    assert check.cure.startswith(f"pip uninstall {other}, then")


def test_our_own_name_is_no_clash():
    """The distribution itself, listed as often as it likes, is no problem."""
    assert check_names(["esper-morph", "Esper-Morph"]).cure == ""


@pytest.mark.parametrize(
    ("version", "is_well"),
    [(None, False), ("2.9.1", False), ("2.10.0", True), ("2.13.0+cpu", True), ("3.0", True)],
)
def test_torch_must_be_recent(version, is_well):
    """A torch that is missing or older than 2.10 is a problem."""
    check = check_torch({"torch": version}.get)
    assert (check.cure == "") is is_well


def test_a_run_folder_that_cannot_be_is_a_problem(tmp_path):
    """A run folder below a file cannot be made, and the cure names the setting."""
    (tmp_path / "file").write_text("")
    check = check_run_dir(tmp_path / "file" / "runs")
    assert "cannot be written" in check.found
    assert "ESPER_RUN_DIR" in check.cure


def test_the_sandbox_is_told(monkeypatch):
    """Whether bubblewrap works is said, with the reason, and is no problem either way."""
    for reason, found in ((None, "bubblewrap works"), ("it is not installed", "not installed;")):
        monkeypatch.setattr(sandbox, "why_no_bubblewrap", lambda reason=reason: reason)
        check = check_sandbox()
        assert found in check.found
        assert check.cure == ""


def test_a_registry_that_does_not_answer_is_a_problem(tmp_path):
    """A directory that is there answers, one that is not and a port without a server do not."""
    DirectoryRegistry(tmp_path / "kernels").close()
    named = {"URZA_API_URL": str(tmp_path / "kernels")}
    assert check_registry(read_environment(named)).found.endswith("kernels answers")
    assert check_registry(read_environment({})).cure == ""
    for address in (str(tmp_path / "none"), "http://127.0.0.1:9", "ftp://x"):
        assert "URZA_API_URL" in check_registry(read_environment({"URZA_API_URL": address})).cure
