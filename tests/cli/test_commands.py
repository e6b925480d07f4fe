"""The commands, as a user types them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esper import __version__
from esper.cli.app import app, parse_random_seeds
from esper.contracts.errors import EsperError
from esper.contracts.report import run_report_from_json

SHORT = (
    "esper: warning: nothing can grow: a package takes 166 updates at least (record_updates, 50 of "
    "a trial and hold_updates), and horizon is 12; shorten them, or train longer"
)
"""What is said of most jobs here: they are shorter than a trial."""

A_LOG = Path(__file__).parents[1] / "contracts" / "files" / "events-1.jsonl"

JOB = """
import os
import signal
import warnings
import torch
from torch import nn
from esper.growth.job import GrowthJob

def job(train=None, model=None, test=None, loss=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x_NF = torch.randn(364, 4)
    y_N = (x_NF[:, 0] * x_NF[:, 1] > 0).long()
    batches = list(zip(x_NF[:64].split(16), y_N[:64].split(16)))
    parameters = list(model.parameters()) or [torch.zeros(1, requires_grad=True)]
    return GrowthJob(
        model=model,
        optimizer=torch.optim.SGD(parameters, lr=0.1),
        train=batches if train is None else train(batches),
        gate=[(x_NF[64:], y_N[64:])],
        test=None if test is None else test(batches),
        loss=loss or (lambda model, batch: nn.functional.cross_entropy(
            model(batch[0]), batch[1], reduction="none"
        )),
        epochs=3,
    )

class Loader:
    # gives some batches, then does something else
    def __init__(self, batches, num, then):
        self.batches, self.num, self.then = batches, num, then
    def __iter__(self):
        yield from self.batches[: self.num]
        self.then()
        yield from self.batches[self.num :]

def interrupt(): raise KeyboardInterrupt
def leave(): raise SystemExit(7)
def fail(): raise ValueError("a word of the user's")
def press(): os.kill(os.getpid(), signal.SIGINT)
def press_twice():
    try: press()
    finally: press()

def empty(): return job(train=lambda batches: [])
def exhausted(): return job(train=lambda batches: iter(()))
def nothing_to_wrap(): return job(model=nn.Sequential(nn.ReLU(), nn.Flatten()))
def three(): return 3
def stopped(): return job(train=lambda batches: Loader(batches, 0, interrupt))
def stopped_twice(): return job(train=lambda b: Loader(b, 2, press_twice), test=lambda b: b)
def stopped_in_test(): return job(test=lambda batches: Loader(batches, 1, interrupt))
def fails_late(): return job(train=lambda batches: Loader(batches, 2, fail))
def leaves_late(): return job(train=lambda batches: Loader(batches, 2, leave))
def fails_in_test(): return job(test=lambda batches: Loader(batches, 1, fail))
def not_finite_in_test(): return job(test=lambda b: [(torch.full((9, 4), torch.nan), b[0][1][:9])])
def fails_inside_torch(): return job(loss=lambda m, b: nn.functional.nll_loss(m(b[0]), b[1][:3]))
def tested(): return job(test=lambda batches: batches)
def warn(): warnings.warn("a word of\\nthe user's")
def warns(): return job(train=lambda batches: Loader(batches, 1, warn))
def no_file(): return open("no_such_file_of_mine")
def shuffled(): return job(train=lambda b: torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(*map(torch.cat, zip(*b))), batch_size=16, shuffle=True))
def told(): return job(train=lambda b: Loader(b, 0, lambda: print("an epoch begins")))
def drawn():
    print("drew", torch.rand(1).item())
    return job()
MODEL = nn.Sequential(nn.Linear(4, 2))
def one_model(): return job(model=MODEL)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, ctrl_c):
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
    """The help lists the five commands."""
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "grow", "suggest", "replay", "doctor"):
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
    assert "Where and what to grow" in result.stdout
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
        ("jobs_of_a_user.py:job", "write jobs_of_a_user:job"),
        ("./jobs_of_a_user.py", "write jobs_of_a_user:job"),
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


MODEL_FILES = {"grafts.py", "model.safetensors"}


def report_in(folder):
    return json.loads((folder / "report.json").read_text())


def test_ctrl_c_ends_with_the_report_and_its_status(folder):
    """An interrupted run prints and writes a report that says so, and exits with 130."""
    result = run("grow", "jobs_of_a_user:stopped", "--run-dir", "out")
    assert result.exit_code == 130
    assert result.stdout.startswith("Stopped after 0 updates")
    assert report_in(folder / "out")["interrupted"] is True


@pytest.mark.parametrize(
    ("target", "status", "words"),
    [
        ("stopped_twice", 130, "Stopped after 2 updates"),
        ("stopped_in_test", 130, "the test split was not read: you stopped it"),
        ("fails_late", 2, "ValueError: a word of the user's"),
        ("leaves_late", 7, "Stopped after 2 updates"),
        ("fails_in_test", 2, "the test split could not be read: ValueError: a word"),
        ("not_finite_in_test", 0, "Note: the test loss is nan"),
    ],
)
def test_nothing_trained_is_lost(folder, target, status, words):
    """Whatever ends a run, or fails after it, the model is there, and the report says how far."""
    result = run("grow", f"jobs_of_a_user:{target}", "--run-dir", "out")
    assert result.exit_code == status
    assert words in result.output
    assert {path.name for path in (folder / "out" / "model").iterdir()} == MODEL_FILES
    assert report_in(folder / "out")["updates"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("size_bytes", [9_000, pytest.param(6_000, marks=pytest.mark.torture)])
def test_full_disk_names_the_file_and_keeps_the_model(folder, size_bytes):
    """Where a file finds no room it is named; the model is written before any page, and told of."""
    code = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size_bytes}, {size_bytes}))\n"
        "sys.argv[1:] = ['grow', 'jobs_of_a_user:job', '--run-dir', 'out']\n"
        "from esper.cli import main\n"
        "main()"
    )
    result = in_a_process("-B", "-c", code)
    assert result.returncode == 2
    assert "12 updates" in result.stdout
    assert "out/report.html" in result.stderr
    assert {path.name for path in (folder / "out" / "model").iterdir()} == MODEL_FILES
    assert not list((folder / "out").glob(".*"))


@pytest.mark.slow
def test_reader_that_goes_away_costs_no_page(folder):
    """Where nobody reads what is printed, as behind ``| head``, model and pages are there."""
    command = [sys.executable, "-m", "esper", "grow", "jobs_of_a_user:job", "--run-dir", "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.close()
    assert process.wait(timeout=100) != 0
    assert (folder / "out" / "report.html").exists()
    assert {path.name for path in (folder / "out" / "model").iterdir()} == MODEL_FILES


def test_second_run_leaves_the_first_one_alone(folder):
    """Runs into one folder are numbered, by default as by name, and say where they are."""
    for more in ((), ("--run-dir", "out")):
        first, second = (run("grow", "jobs_of_a_user:job", *more) for _ in range(2))
        base = "out" if more else "runs/grow"
        assert f"Written to {base}:" in first.stdout
        assert f"Written to {base}-2:" in second.stdout
        assert f"{base} holds a run already" in second.stdout
        assert report_in(folder / base)["notes"] != report_in(folder / f"{base}-2")["notes"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "filters", ["", pytest.param("error", marks=pytest.mark.torture), "error::UserWarning"]
)
def test_warning_is_one_line_and_ends_no_run(folder, filters):
    """Told once, without Python's source line, though the process makes errors of warnings."""
    command = ("-m", "esper", "grow", "jobs_of_a_user:job", "--run-dir", "out")
    result = in_a_process(*command, PYTHONWARNINGS=filters)
    assert result.returncode == 0, result.stderr
    assert [row for row in result.stderr.splitlines() if "nothing can grow" in row] == [SHORT]
    assert "UserWarning" not in result.stderr
    assert "callback(" not in result.stderr


def test_warning_of_a_users_own_code_keeps_its_file_and_line(folder):
    """A warning that the user's code gives is one line too, and says where it comes from."""
    result = run("grow", "jobs_of_a_user:warns", "--run-dir", "out")
    assert result.exit_code == 0, result.stderr
    (line,) = [row for row in result.stderr.splitlines() if "a word of" in row]
    assert line.startswith("esper: warning: a word of the user's (at jobs_of_a_user.py:")


@pytest.mark.slow
def test_warnings_that_are_ignored_stay_ignored(folder):
    """Whoever turns warnings off reads none; the report has them as notes."""
    command = ("-m", "esper", "grow", "jobs_of_a_user:job", "--run-dir", "out")
    result = in_a_process(*command, PYTHONWARNINGS="ignore")
    assert result.returncode == 0
    assert "nothing can grow" not in result.stderr
    assert "Note: nothing can grow" in result.stdout


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("fails_late", ", in fail;"),
        ("fails_inside_torch", "in <lambda>"),
        ("no_file", "in no_file"),
    ],
)
def test_users_own_error_keeps_its_file_and_line(folder, target, place):
    """The innermost line of the user's own code is named, though torch or Esper raised."""
    result = run("grow", f"jobs_of_a_user:{target}", "--run-dir", "out")
    assert result.exit_code == 2
    (line,) = [row for row in result.stderr.splitlines() if row.startswith("  at ")]
    assert line.startswith("  at jobs_of_a_user.py:")
    assert place in line
    assert "ESPER_TRACEBACK=1" in line


def test_error_that_a_target_makes_keeps_its_place(folder):
    """Wrapped into a word about the target, the error's own file and line are still there."""
    (folder / "jobs_of_a_user.py").write_text("import esper\ndef job():\n    return int('x')\n")
    result = run("grow", "jobs_of_a_user:job")
    assert "could not make a job: ValueError" in result.stderr
    assert "at jobs_of_a_user.py:3, in job" in result.stderr


def test_missing_module_of_a_user_is_not_taken_for_the_demos(folder):
    """Only the demo speaks of its extra."""
    (folder / "jobs_of_a_user.py").write_text(
        "def job():\n    raise ModuleNotFoundError('No module named', name='sklearn')\n"
    )
    result = run("grow", "jobs_of_a_user:job")
    assert isinstance(result.exception, ModuleNotFoundError)


@pytest.mark.parametrize("command", [(), ("demo",), ("grow",), ("suggest",), ("doctor",)])
def test_help_has_a_short_name_and_names_the_environment(folder, command):
    """``-h`` is ``--help``, and every help names the variables that are read."""
    short, long = run(*command, "-h"), run(*command, "--help")
    assert short.exit_code == 0
    assert short.stdout == long.stdout
    assert {"ESPER_RUN_DIR", "ESPER_TRACEBACK"} <= set(re.findall(r"ESPER_\w+", long.stdout))


def test_shell_completion_is_offered(folder):
    """The shell's completion can be installed, and completes commands and options."""
    assert "--install-completion" in run("--help").stdout
    script = {"_ESPER_COMPLETE": "complete_bash", "COMP_WORDS": "esper gr", "COMP_CWORD": "1"}
    code = "import sys; sys.argv = ['esper']; from esper.cli import main; main()"
    assert in_a_process("-c", code, **script).stdout.split() == ["grow"]


def test_grow_takes_what_a_job_would_be_edited_for(folder):
    """Epochs, overhead, random seed and budget come from the command, the rest from the job."""
    result = run(
        *("grow", "jobs_of_a_user:job", "--epochs", "2", "--overhead", "0.3"),
        *("--random-seed", "5", "--budget", "packages=1", "--budget", "flops=none"),
    )
    assert result.exit_code == 0, result.stderr
    report = report_in(folder / "runs" / "grow")
    settings = report["settings"]
    assert (report["updates"], settings["horizon"]) == (8, 8)
    assert (settings["overhead"], settings["random_seed"]) == (0.3, 5)
    assert (settings["budget"]["packages"], settings["budget"]["flops"]) == (1, None)
    assert settings["budget"]["small_graft"] == 10_000


@pytest.mark.parametrize(("options", "num"), [((), 1), (("--epochs", "2"), 2)])
def test_suggest_trains_as_long_as_it_is_told(folder, options, num):
    """So many passes, and a fifth of the job's, at least one, where nothing is said."""
    result = run("suggest", "jobs_of_a_user:told", *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("an epoch begins") == num


def test_suggest_takes_a_random_seed_and_a_budget(folder):
    """The job is made from that seed, and what exceeds the budget is not on offer."""
    options = ("suggest", "jobs_of_a_user:drawn", "--budget", "small_graft=0", "--random-seed")
    one, again, other = (run(*options, seed) for seed in ("5", "5", "6"))
    assert one.exit_code == 0, one.stderr
    drawn = [result.stdout.splitlines()[0] for result in (one, again, other)]
    assert drawn[0].startswith("drew")
    assert drawn[0] == drawn[1] != drawn[2]
    assert one.stdout.rstrip().endswith(": none")


def test_budget_that_is_a_number_is_a_share_of_any_host(folder):
    """A share alone holds for one graft and for all, in a small host too."""
    assert run("grow", "jobs_of_a_user:job", "--budget", "0.5").exit_code == 0
    budget = report_in(folder / "runs" / "grow")["settings"]["budget"]
    assert (budget["parameters"], budget["total_parameters"], budget["small_host"]) == (0.5, 0.5, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--overhead", "-1"), "overhead is a ratio to the FLOPs of training, at least 0"),
        (("--budget", "much"), "for example 0.2, or NAME=NUMBER"),
        (("--budget", "gifts=2"), "the budget has no 'gifts'; its limits are parameters"),
        (("--budget", "packages=1.5"), "packages is a whole number"),
        (("--budget", "-1"), "is a share of the host, at least 0, or None; got -1"),
        (("--budget", "nan"), "is a share of the host, at least 0, or None; got nan"),
        (("--budget", "packages=inf"), "packages is a whole number"),
    ],
)
def test_option_that_makes_no_sense_is_refused_before_the_training(folder, options, words):
    """One line with what was expected, status 2, and no folder."""
    result = run("grow", "jobs_of_a_user:job", *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("target", ["job", "tested", "shuffled"])
def test_control_is_the_same_job_without_growth(folder, target):
    """Where nothing grew the control ends at the very same loss: only growth is left out."""
    result = run("grow", f"jobs_of_a_user:{target}", "--control")
    assert result.exit_code == 0, result.stderr
    report = report_in(folder / "runs" / "grow")
    control = report["control"]
    assert control["settings"]["horizon"] == report["settings"]["horizon"]
    assert control["evaluations"] == report["evaluations"]
    measure = "test loss" if target == "tested" else "gate loss"
    assert result.stdout.startswith(f"Did it help? Not shown: the {measure} was")
    assert "no difference" in result.stdout
    assert control["test_metrics"] == report["test_metrics"]


def test_control_needs_a_model_of_its_own(folder):
    """A function that hands out one model twice is found out before anything is trained."""
    result = run("grow", "jobs_of_a_user:one_model", "--control")
    assert result.exit_code == 2
    assert "returned the same model when it was called again" in result.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("what", ["events.jsonl", ""], ids=["a log", "a folder"])
def test_replay_shows_a_run_from_its_log(folder, what):
    """A log, or the folder of a run: its report is printed, and written as a page."""
    (folder / "events.jsonl").write_bytes(A_LOG.read_bytes())
    result = run("replay", str(folder / what), "--page", "page.html")
    assert result.exit_code == 0, result.stderr
    assert "gated-mlp-4x4-w64 at 0, 900 parameters: fossilized" in result.stdout
    assert "Kernels in the model where the log ends" in result.stdout
    assert "<title>Esper: a run of growth" in (folder / "page.html").read_text(encoding="utf-8")


def test_replay_as_json_is_a_report(folder):
    """It is read as report.json is, and nothing is printed beside it."""
    result = run("replay", str(A_LOG), "--json")
    assert run_report_from_json(result.stdout).updates == 600


@pytest.mark.parametrize(
    ("text", "page", "status", "words"),
    [
        (None, "page.html", 1, "No such file"),
        ("", "page.html", 1, "the log has no event"),
        ("{}\n", "page.html", 1, "line 1: event format None is not known here"),
        ('{"format_version": "2.0"}\n', "page.html", 1, "read it with a newer Esper"),
        (A_LOG.read_text(encoding="utf-8"), "no/folder.html", 2, "No such file"),
    ],
    ids=["absent", "empty", "no event", "of a later major version", "no place for the page"],
)
def test_replay_says_refused_or_failed_by_its_status(folder, text, page, status, words):
    """1 where the log is not there or refused, 2 where something went wrong."""
    if text is not None:
        (folder / "events.jsonl").write_text(text, encoding="utf-8")
    result = run("replay", "events.jsonl", "--page", page)
    assert (result.exit_code, result.stdout) == (status, "")
    assert words in result.stderr


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
