"""Workers: every job is done once, whoever is killed, stopped, woken up or fed with poison."""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from kernel_artifacts import artifact
from registries import served, token_for
from workers import Service, service, wait_for, worker_thread, workers

pytest.importorskip("fastapi", reason="needs the extra server")

from esper.contracts.artifact_format import digest_of
from esper.contracts.errors import KernelSourceRefused
from esper.registry import book_jobs
from esper.registry.book_artifacts import Artifacts
from esper.registry.memory import MemoryRegistry
from esper.services import compile_worker
from esper.services.compile_worker import CompileWorker, WorkerOptions
from esper.services.sandbox import SandboxLimits

SUPPORT = Path(__file__).parent.parent / "support"
pytestmark = [pytest.mark.slow, pytest.mark.network]


@pytest.fixture(autouse=True)
def found_by_hosts(monkeypatch):
    """Let a sandbox's host import what these tests do, and end workers quickly."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(SUPPORT), *os.sys.path])))
    monkeypatch.setattr(compile_worker, "_WAIT_S", 0.2)


@pytest.fixture
def made():
    with service() as served_here:
        yield served_here


def begun(folder):
    """Return the processes in which a job that waits has begun."""
    return sorted(int(path.name.partition("-")[2]) for path in folder.glob("begun-*"))


def is_alive(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_job_whose_worker_was_killed_is_done_by_another(made, tmp_path, monkeypatch):
    """Its lease runs out, the next one does it, and nothing of the first is left running."""
    with workers(made, "ann", folder=tmp_path) as (ann,):
        job = made.submit("waits")
        (child,) = wait_for(lambda: begun(tmp_path))
        ann.process.kill()
        wait_for(lambda: not is_alive(child))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "go").touch()
    with worker_thread(made.address, made.token):
        (done,) = made.until("VALIDATED", job)
    assert (done.attempts, done.worker) == (2, "ben/0")
    assert made.num_reports(done) == 1


def stop_and_wake_up(made, folder, monkeypatch):
    """Stop a worker past its lease, let another do its job, wake it; return the job."""
    with workers(made, "ann", folder=folder) as (ann,):
        job = made.submit("waits")
        wait_for(lambda: begun(folder))
        ann.process.send_signal(signal.SIGSTOP)
        (folder / "go").touch()
        monkeypatch.setenv("TMPDIR", str(folder))
        with worker_thread(made.address, made.token):
            (done,) = made.until("VALIDATED", job)
        assert done.worker == "ben/0"
        ann.process.send_signal(signal.SIGCONT)
        ann.said(done.id)
    return made.jobs.find(job)


def test_a_worker_that_was_stopped_and_wakes_up_is_fenced(made, tmp_path, monkeypatch):
    """What it has done in the meantime changes nothing, and the job was done once."""
    job = stop_and_wake_up(made, tmp_path, monkeypatch)
    assert (job.attempts, made.num_reports(job)) == (2, 1)


def test_control_without_the_attempt_a_stopped_worker_finishes_again(monkeypatch, tmp_path):
    """Where renewing and finishing compare nothing, the job is done twice."""
    for name in ("_FINISH", "_RENEW"):
        heedless = getattr(book_jobs, name).replace(book_jobs._LEASED, "id = :id")
        monkeypatch.setattr(book_jobs, name, heedless)
    with service() as made:
        assert made.num_reports(stop_and_wake_up(made, tmp_path, monkeypatch)) == 2


def test_a_worker_that_is_told_to_end_gives_its_job_back(made, tmp_path):
    """The next one has it at once, no loss is counted, and the sandbox has ended."""
    with workers(made, "ann", folder=tmp_path) as (ann,):
        job = made.submit("waits")
        (child,) = wait_for(lambda: begun(tmp_path))
        ann.process.terminate()
        assert ann.process.wait(timeout=20) == 0
        ann.said("given back")
    assert not is_alive(child)
    assert made.jobs.find(job).status == "UNVALIDATED"
    assert made.registry.book.database.rows("SELECT num_losses FROM jobs") == [(0,)]


def is_idle(made):
    return all(job.status in ("VALIDATED", "INVALID") for job in made.jobs.list(limit=500))


def test_a_job_that_killed_three_workers_goes_to_no_fourth(made):
    """It is invalid then, and says so; what waited behind it is done."""
    with workers(made, "ann", "ben", "cat", "dan") as started:
        poison = made.submit("kills-worker")
        healthy = [made.submit(number=number) for number in range(1, 9)]
        wait_for(lambda: is_idle(made))
        dead = [each for each in started if each.process.poll() is not None]
    (job,) = made.until("INVALID", poison)
    assert "were lost 3 times" in job.report["reason"]
    assert len(dead) == job.attempts == book_jobs.MAX_LOSSES
    made.until("VALIDATED", *healthy)


def die_between(made, order):
    """Kill a worker between its last two words; return the job as it is then."""
    job = made.submit(number=7)
    with workers(made, "ann", order=(order,)) as (ann,):
        assert ann.process.wait(timeout=30) == -signal.SIGKILL
    return made.jobs.find(job)


def test_a_worker_that_dies_before_it_finishes_leaves_what_the_next_one_makes(made):
    """The artifact is there already, and is the same one; there is no other."""
    job = die_between(made, "die-between")
    digest = digest_of(artifact(7))
    assert job.status == "COMPILING"
    assert made.registry.exists(digest)
    with worker_thread(made.address, made.token):
        (done,) = made.until("VALIDATED", job.id)
    assert done.artifact_id == digest
    assert [entry.digest for entry in made.registry.search()] == [digest]


def test_control_who_finishes_first_promises_what_is_not_there(made, monkeypatch):
    """In the other order, with a server that does not look, a job has an artifact of nobody's."""
    size = Artifacts.size
    monkeypatch.setattr(Artifacts, "size", lambda self, digest: size(self, digest) or 1)
    job = die_between(made, "finish-first")
    monkeypatch.undo()
    assert job.status == "VALIDATED"
    assert not made.registry.exists(job.artifact_id)


POISON = {
    "memory": "MemoryError",
    "cpu": "longer than 0.6 s|processor time",
    "sleep": "longer than 0.6 s",
    "crash": "SIGSEGV",
    "flood": "longer than 1048576 bytes",
    "fail": "this blueprint is poison",
    "garbled": "has the fields",
    "refused": "it is not the identity",
    "no-artifact": "does not take the artifact",
}
LIMITS = SandboxLimits(memory_bytes=2**28, seconds=0.6, answer_bytes=2**20)


def test_poison_ends_its_own_job(made):
    """Each is invalid with its reason, the worker goes on, and no process is left."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    before = children.read_text()
    with worker_thread(made.address, made.token, limits=LIMITS):
        jobs = {kind: made.submit(kind) for kind in POISON}
        healthy = made.submit(number=5)
        found = made.until("INVALID", *jobs.values())
        made.until("VALIDATED", healthy)
    assert [
        job.blueprint_id
        for job in found
        if not re.search(POISON[job.blueprint_id], job.report["reason"])
    ] == []
    assert {job.attempts for job in found} == {1}
    assert children.read_text() == before


def detached(made, monkeypatch, folder, work):
    """Do a job that leaves forty processes behind; return those that are left, and end them."""
    monkeypatch.setenv("TMPDIR", str(folder))
    limits = SandboxLimits(memory_bytes=2**28, seconds=20.0)
    with worker_thread(made.address, made.token, work=work, limits=limits):
        made.until("VALIDATED", made.submit("detach"))
        left = [int(path.name) for path in folder.iterdir()]
        assert len(left) == 40
        alive = [pid for pid in left if is_alive(pid)]
    for pid in alive:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return alive


def test_forks_that_detach_are_gone_when_the_job_is_finished(made, monkeypatch, tmp_path):
    """Whatever has left its session is killed before anything is answered."""
    assert detached(made, monkeypatch, tmp_path, "compiled_work:work") == []


def test_control_killing_the_group_alone_leaves_them(made, monkeypatch, tmp_path):
    """A host that does not look at its children has all forty on its hands."""
    assert len(detached(made, monkeypatch, tmp_path, "killpg_work:work")) == 40


def held_kib(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


@pytest.mark.torture
@pytest.mark.parametrize(
    "number",
    [80, pytest.param(2_000, marks=[pytest.mark.torture, pytest.mark.timeout(1_200)])],
)
def test_memory_of_worker_and_host_is_flat_over_many_jobs(made, number):
    """What a job has taken is given back, poison or not."""
    with workers(made, "ann") as (ann,):
        worker = ann.process.pid
        tasks = Path(f"/proc/{worker}/task").glob("*/children")
        (host,) = "".join(path.read_text() for path in tasks).split()
        kinds = ("plain", "memory", "fail", "crash")

        def do(first, num_jobs):
            jobs = [made.submit(kinds[n % 4], n) for n in range(first, first + num_jobs)]
            wait_for(lambda: made.jobs.find(jobs[-1]).report, within_s=1_000.0)
            return held_kib(worker), held_kib(host)

        before = do(0, 24)
        after = do(24, number)
    assert after[0] <= before[0] + 2_048
    assert after[1] <= before[1] + 1_024


def do_with_four(made, number):
    """Do jobs with four worker processes; return the attempts and reports of each."""
    jobs = [made.submit(number=each) for each in range(number)]
    with workers(made, "ann", "ben", "cat", "dan"):
        done = made.until("VALIDATED", *jobs, within_s=600.0)
    return {(job.attempts, made.num_reports(job)) for job in done}, {job.worker for job in done}


def test_four_workers_do_every_job_once(made):
    """None is done twice, and each worker did some."""
    counts, by = do_with_four(made, 48)
    assert counts == {(1, 1)}
    assert len(by) == 4


@pytest.mark.torture
@pytest.mark.timeout(1_200)
def test_four_workers_do_every_one_of_800_jobs_once(made):
    """The same, ten times as long."""
    counts, by = do_with_four(made, 800)
    assert counts == {(1, 1)}
    assert len(by) == 4


def test_a_worker_outlives_its_server():
    """It asks again until somebody answers, and does what is there then."""
    registry = MemoryRegistry()
    with served(registry) as address:
        made = Service(registry, address)
    port = int(address.rpartition(":")[2])
    with worker_thread(address, made.token) as lines:
        wait_for(lambda: [line for line in lines if "asks again" in line])
        with served(registry, port=port):
            made.until("VALIDATED", made.submit(number=1))


def test_a_worker_without_the_right_ends_and_says_so(made):
    """What will not change is not asked for ever."""
    options = WorkerOptions(name="ann", confinement="process", work="compiled_work:work")
    token = token_for(made.registry, "read")
    worker = CompileWorker(made.address, options, token=token, tell=lambda told: None)
    with pytest.raises(KernelSourceRefused, match="scope work"):
        worker.run()
