"""A child that goes wrong in any way costs its own work, and nobody else anything."""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from esper.services.sandbox import Answered, Broken, Sandbox, SandboxLimits, why_no_bubblewrap

SUPPORT = Path(__file__).parent.parent / "support"
LIMITS = SandboxLimits(memory_bytes=2**28, seconds=0.6, answer_bytes=2**20)


@pytest.fixture(scope="module")
def sandbox():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), *os.sys.path]))
        with Sandbox("poison:work", limits=LIMITS, confinement="process") as made:
            yield made


@pytest.fixture(scope="module")
def confined():
    """Return a sandbox whose host is inside of bubblewrap."""
    if shutil.which("bwrap") is None:
        pytest.skip("needs the program bwrap: it comes with bubblewrap")
    if (reason := why_no_bubblewrap()) is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), *os.sys.path]))
        with Sandbox("poison:work", limits=LIMITS, confinement="bwrap") as made:
            yield made


def _children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_work_is_done_in_a_child_of_a_host_that_is_warm(sandbox):
    """The answer is what the function returned; the host was warmed once, before any work."""
    assert sandbox.run(b"echo hello") == Answered(data=b"hello")
    warmed, parent = sandbox.run(b"host").data.split()
    assert warmed == parent == str(sandbox._host.pid).encode()


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        ("memory", "MemoryError"),
        ("cpu", "longer than 0.6 s|processor time"),
        ("sleep", "longer than 0.6 s"),
        ("crash", "ended by SIGSEGV"),
        ("leave", "exited with 17"),
        ("fail", "ValueError: this blueprint is poison"),
        ("flood", "longer than 1048576 bytes"),
    ],
)
def test_poison_ends_its_own_work_only(sandbox, poison, reason):
    """It says why; the same host does the next piece, and no child is left."""
    host = sandbox._host.pid
    broken = sandbox.run(poison.encode())
    assert isinstance(broken, Broken)
    assert not broken.is_ours
    assert re.search(reason, broken.reason)
    assert sandbox.run(b"echo again") == Answered(data=b"again")
    assert sandbox._host.pid == host
    assert _children(host) == []


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        ("memory", "MemoryError"),
        ("sleep", "longer than 0.6 s"),
        ("crash", "ended by SIGSEGV"),
        ("flood", "longer than 1048576 bytes"),
    ],
)
def test_poison_inside_of_bubblewrap_ends_its_own_work_only(confined, poison, reason):
    """The limits are the same there, and the next piece is done by the same host."""
    host = confined._host.pid
    broken = confined.run(poison.encode())
    assert isinstance(broken, Broken)
    assert re.search(reason, broken.reason)
    assert confined.run(b"echo again") == Answered(data=b"again")
    assert (confined.is_confined, confined._host.pid) == (True, host)


def outside(path, port):
    """Return what work is asked for that goes beyond its own: files, and the network."""
    return [f"write {path}", f"connect {port}"]


@pytest.fixture
def listening():
    """Return the port of a server of this test's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_inside_of_bubblewrap_no_file_is_written_and_nobody_is_called(
    confined, tmp_path, listening
):
    """What others have in the folder of everybody is not even seen."""
    here = SUPPORT / "written"  # where the work is found: others may lie in a hidden folder
    answers = [confined.run(asked.encode()) for asked in outside(here, listening)]
    assert [type(each) for each in answers] == [Broken, Broken]
    assert "Read-only file system" in answers[0].reason
    assert "Network is unreachable" in answers[1].reason or "refused" in answers[1].reason
    (tmp_path / "secret").write_text("of somebody else")
    assert confined.run(f"seen {tmp_path / 'secret'}".encode()) == Answered(data=b"False")


def test_control_in_a_process_both_are_done(sandbox, tmp_path, listening):
    """Limits hold memory and time, not files and the network."""
    asked = outside(tmp_path / "written", listening)
    answers = [sandbox.run(each.encode()) for each in asked]
    assert answers == [Answered(data=b"written"), Answered(data=b"connected")]


SECRETS = {
    "URZA_API_TOKEN": "secret-of-the-registry",
    "URZA_API_TOKEN_FILE": "secret-place",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-bucket",
    "ESPER_REGISTRY_DATABASE": "postgresql://secret@host/name",
    "WANDB_API_KEY": "secret-of-a-tracker",
}
WORKERS_PART = """
import sys
from esper.services.sandbox import Sandbox, hide_from_other_processes
from esper.services.sandbox_host import _give_up_capabilities
if sys.argv[1] == "process":
    _give_up_capabilities()  # a worker of root's is protected by having more than its work
if sys.argv[2] == "hidden":
    hide_from_other_processes()
with Sandbox("poison:work", confinement=sys.argv[1]) as sandbox:
    print(sandbox.run(b"environment").data.decode())
"""


def environments(confinement, kind="hidden"):
    """Return what work reads of its own environment, its host's, and that of who started it."""
    if confinement == "bwrap" and why_no_bubblewrap() is not None:
        pytest.skip("needs the program bwrap: it comes with bubblewrap")
    path = os.pathsep.join([str(SUPPORT), *os.sys.path])
    variables = {**os.environ, **SECRETS, "PYTHONPATH": path}
    command = [os.sys.executable, "-c", WORKERS_PART, confinement, kind]
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("confinement", ["bwrap", "process"])
def test_work_reads_no_secret_of_any_environment(confinement):
    """Neither its own has one, nor its host's, and that of the worker is not to be read."""
    own, hosts, workers = environments(confinement)
    assert "PYTHONPATH" in own
    assert "secret" not in own + hosts + workers
    assert confinement == "bwrap" or workers == "PermissionError"


@pytest.mark.slow
def test_control_a_worker_that_hides_nothing_is_read():
    """Of one process all others of its user read the environment, if nothing forbids it."""
    assert "secret-of-the-registry" in environments("process", "shown")[2]


def test_root_is_a_user_as_any_other(sandbox):
    """What the work may do it may do as a user: it has no capability, and gets none."""
    status = sandbox.run(b"read /proc/self/status").data.decode()
    assert set(re.findall(r"Cap(?:Eff|Prm):\s+(\S+)", status)) == {"0" * 16}
    assert re.search(r"NoNewPrivs:\s+1", status)


def test_inside_of_bubblewrap_the_files_of_users_are_not_seen(confined):
    """What lies in the folders of users, and where secrets are mounted, is empty."""
    for folder in ("/root", "/home", "/run"):
        found = confined.run(f"listed {folder}".encode()).data.decode().split()
        assert not set(found) - {path.split("/")[2] for path in os.sys.path if folder in path}


def test_all_that_a_user_has_is_not_shown_for_the_sake_of_code(confined, monkeypatch):
    """Who starts a worker in the own folder has it on Python's path, and nothing of it is seen."""
    homes = [path for path in Path("/home").iterdir() if path.is_dir()]
    if not homes:
        pytest.skip("nobody has a folder in /home here")
    monkeypatch.setattr(os.sys, "path", [*os.sys.path, str(homes[0])])
    with Sandbox("poison:work", limits=LIMITS, confinement="bwrap") as sandbox:
        answer = sandbox.run(f"seen {homes[0]}".encode())
    assert answer == Answered(data=b"False")


def work_in_the_folder_of_everybody(monkeypatch):
    """Start a host inside of bubblewrap whose work lies in ``/tmp``; return what it answers."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        (Path(folder) / "lying_there.py").write_text("def work(payload): return payload[::-1]")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(os.sys.path))
        with Sandbox("lying_there:work", confinement="bwrap") as sandbox:
            return sandbox.run(b"abc")


def test_code_in_the_folder_of_everybody_is_found_inside_of_bubblewrap(confined, monkeypatch):
    """An environment that was made in ``/tmp`` does its work as any other does."""
    assert work_in_the_folder_of_everybody(monkeypatch) == Answered(data=b"cba")


def test_control_code_that_is_hidden_is_not_found(confined, monkeypatch):
    """Where nothing of that folder is shown, the host does not start."""
    monkeypatch.setattr("esper.services.sandbox._code_in_hidden_folders", list)
    with pytest.raises(OSError, match="ended with exit code"):
        work_in_the_folder_of_everybody(monkeypatch)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_processes_that_detach_are_killed_too(tmp_path, monkeypatch):
    """Forty that have left their session are gone before the answer is given."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), *os.sys.path]))
    limits = SandboxLimits(memory_bytes=2**28, seconds=20.0)
    with Sandbox("poison:work", limits=limits, confinement="process") as sandbox:
        assert sandbox.run(f"detach {tmp_path}".encode()) == Answered(data=b"detached")
        left = [int(path.name) for path in tmp_path.iterdir()]
        assert len(left) == 40
        assert not any(map(_alive, left))


def test_control_killing_a_group_leaves_what_has_left_it():
    """Without a subreaper's look at its children, one that detached goes on."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            os.setsid()
            os.write(writing, str(os.getpid()).encode())
            time.sleep(60)
        os._exit(0)
    os.setpgid(child, child)
    detached = int(os.read(reading, 32))
    os.waitpid(child, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    try:
        assert _alive(detached)
    finally:
        os.kill(detached, signal.SIGKILL)


@pytest.mark.slow
def test_memory_stays_flat_over_200_pieces_of_work(sandbox):
    """What a piece has taken is given back; nothing is kept of poison either."""

    def held():
        status = Path(f"/proc/{sandbox._host.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1])

    kinds = [b"echo x", b"memory", b"fail", b"crash"]
    for number in range(8):
        sandbox.run(kinds[number % 4])
    before = held()
    for number in range(200):
        sandbox.run(kinds[number % 4])
    assert held() <= before + 1024  # KiB


def test_what_the_work_prints_is_no_answer(sandbox):
    """Standard output belongs to nobody; the answer comes by a pipe of its own."""
    assert sandbox.run(b"print nonsense") == Answered(data=b"printed")


def test_a_host_that_was_killed_is_started_again(sandbox):
    """The work at hand is ours to repeat, and the next piece is done."""
    sandbox._host.kill()
    sandbox._host.wait()
    assert sandbox.run(b"echo on") == Answered(data=b"on")


@pytest.mark.parametrize("name", ["memory_bytes", "seconds", "answer_bytes"])
def test_a_limit_is_above_0(name):
    """A limit of nothing is a mistake."""
    with pytest.raises(ValueError, match=name):
        SandboxLimits(**{name: 0})


def test_work_that_is_not_there_is_said_at_once():
    """A sandbox that could do nothing is not made."""
    with pytest.raises(OSError, match="ended with exit code"):
        Sandbox("esper.nowhere:work", confinement="process")


def test_bubblewrap_that_does_not_work_is_named(monkeypatch, tmp_path):
    """Who asks for it by name hears why it cannot be had."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="bubblewrap"):
        Sandbox("poison:work", confinement="bwrap")
