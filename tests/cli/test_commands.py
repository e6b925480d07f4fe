"""The commands, as a user types them."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from esper import __version__
from esper.cli.app import app, parse_random_seeds
from esper.contracts.errors import EsperError

pytestmark = pytest.mark.filterwarnings("ignore:nothing can grow")
"""The jobs here are shorter than a graft."""

JOB = """
import torch
from torch import nn
from esper.growth.job import GrowthJob

def job(train=None, model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x_NF = torch.randn(264, 4)
    y_N = (x_NF[:, 0] * x_NF[:, 1] > 0).long()
    batches = list(zip(x_NF[:64].split(16), y_N[:64].split(16)))
    parameters = list(model.parameters()) or [torch.zeros(1, requires_grad=True)]
    return GrowthJob(
        model=model,
        optimizer=torch.optim.SGD(parameters, lr=0.1),
        train=batches if train is None else train,
        gate=[(x_NF[64:], y_N[64:])],
        loss=lambda model, batch: nn.functional.cross_entropy(
            model(batch[0]), batch[1], reduction="none"
        ),
        epochs=3,
    )

def empty(): return job(train=[])
def exhausted(): return job(train=iter(()))
def nothing_to_wrap(): return job(model=nn.Sequential(nn.ReLU(), nn.Flatten()))
def three(): return 3

def stopped():
    def batches():
        raise KeyboardInterrupt
        yield
    class Loader:
        def __iter__(self): return batches()
    return job(train=Loader())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a module of jobs; the process forgets it afterwards."""
    (tmp_path / "jobs_of_a_user.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("ESPER_RUN_DIR", raising=False)
    monkeypatch.delenv("ESPER_TRACEBACK", raising=False)
    yield tmp_path
    sys.modules.pop("jobs_of_a_user", None)


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def in_a_process(*arguments, **variables):
    command = [sys.executable, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, timeout=100
    )


def test_help_names_every_command(folder):
    """The help lists the four commands."""
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "grow", "suggest", "doctor"):
        assert command in result.stdout


def test_the_version_is_printed(folder):
    """``--version`` prints the version and nothing else."""
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"esper {__version__}\n")


@pytest.mark.parametrize("arguments", ["--help", "--version", "demo --help", "grow nobody:job"])
def test_a_command_without_work_does_not_import_torch(arguments):
    """The help, the version and the word on a wrong target are there before torch would be."""
    code = (
        "import sys\n"
        "from esper.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = in_a_process("-c", code, *arguments.split())
    assert result.returncode == 0
    assert result.stdout or result.stderr


def test_grow_trains_a_users_job_and_writes_its_report(folder):
    """A job in the working folder is trained; the report is printed and written."""
    result = run("grow", "jobs_of_a_user:job", "--run-dir", "out")
    assert result.exit_code == 0, result.stderr
    assert "12 updates, 58 parameters before" in result.stdout
    assert {"report.json", "report.html", "events.jsonl"} <= {
        path.name for path in (folder / "out").iterdir()
    }
    assert json.loads((folder / "out" / "report.json").read_text())["updates"] == 12


def test_the_run_folder_comes_from_the_environment(folder, monkeypatch):
    """Without the option, runs are written under ESPER_RUN_DIR."""
    monkeypatch.setenv("ESPER_RUN_DIR", str(folder / "elsewhere"))
    assert run("grow", "jobs_of_a_user:job").exit_code == 0
    assert (folder / "elsewhere" / "grow" / "report.json").exists()


def test_suggest_prints_a_ranked_table_and_writes_nothing(folder):
    """The table names sites and kernels with their cost, and no file is left."""
    result = run("suggest", "jobs_of_a_user:job")
    assert result.exit_code == 0, result.stderr
    assert "What growing would bring" in result.stdout
    assert "mlp" in result.stdout
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("command", ["grow", "suggest"])
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("jobs_of_a_user", "package.module:function"),
        ("jobs_of_nobody:job", "no module named 'jobs_of_nobody'"),
        ("jobs_of_a_user:none", "its functions are:"),
        ("jobs_of_a_user:three", "it returned int"),
        ("jobs_of_a_user:empty", "train loader"),
        ("jobs_of_a_user:exhausted", "train loader"),
        ("jobs_of_a_user:nothing_to_wrap", "wrap"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(folder, command, target, words):
    """A wrong target, job, loader or model ends with status 2 and one line, no traceback."""
    result = run(command, target)
    assert result.exit_code == 2
    (line,) = [row for row in result.stderr.splitlines() if row.startswith("esper: ")]
    assert words in line
    assert "Traceback" not in result.output


def test_the_traceback_is_there_for_those_who_ask(folder, monkeypatch):
    """With ESPER_TRACEBACK=1 the error itself comes out."""
    monkeypatch.setenv("ESPER_TRACEBACK", "1")
    result = run("grow", "jobs_of_a_user:three")
    assert isinstance(result.exception, EsperError)


def test_ctrl_c_ends_with_the_report_and_its_status(folder):
    """An interrupted run prints and writes a report that says so, and exits with 130."""
    result = run("grow", "jobs_of_a_user:stopped", "--run-dir", "out")
    assert result.exit_code == 130
    assert result.stdout.startswith("Stopped after 0 updates")
    assert json.loads((folder / "out" / "report.json").read_text())["interrupted"] is True


def test_the_command_works_as_a_process(folder):
    """``python -m esper`` refuses a wrong target with status 2, and only one line."""
    result = in_a_process("-m", "esper", "grow", "jobs_of_nobody:job")
    assert result.returncode == 2
    assert result.stderr.startswith("esper: there is no module named 'jobs_of_nobody'")
    assert len(result.stderr.splitlines()) == 1


def test_the_doctor_finds_a_problem_with_its_cure(folder):
    """A run folder that cannot be made is a problem: status 1, and what to do."""
    (folder / "file").write_text("")
    assert run("doctor").exit_code == 0
    result = run("doctor", "--run-dir", "file/runs")
    assert result.exit_code == 1
    assert "problem run folder" in result.stdout
    assert "cure: set ESPER_RUN_DIR" in result.stdout


def test_random_seeds_are_a_range():
    """The end is not included, as everywhere in Python."""
    assert parse_random_seeds("100:103") == (100, 101, 102)


@pytest.mark.parametrize("text", ["", "3", "5:5", "5:3", "-1:3", "a:b", "1:2:3"])
def test_random_seeds_that_are_no_range_are_refused(folder, text):
    """A wrong range ends the demo before it starts, with an example of a right one."""
    result = run("demo", f"--random-seeds={text}")
    assert result.exit_code == 2
    assert "for example 100:110" in result.stderr
