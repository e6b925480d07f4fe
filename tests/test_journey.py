"""Kernels that travel, by real processes: whatever is killed or altered, nothing is lost.

Ann submits blueprints, two workers compile them, and Ben's training run elsewhere grows with what
came of them, over a network that flaps; hers does, too, and publishes kernels of its own.
"""

import contextlib
import json
import signal
import sys
import threading
from dataclasses import replace

import pytest
import torch
from flapping_proxy import FLAPPING, SHUT, flapping
from growing import wrapped
from journey import journey
from journey_job import DECIDES, DONE, GATES, OUTAGE, START
from kernel_artifacts import artifact
from kernel_blueprints import linear_blueprint
from registries import served
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="needs the extra server")

from esper.cli.app import app
from esper.compiler.catalog import default_catalog
from esper.contracts.blueprint import TensorSpec
from esper.contracts.errors import EsperError
from esper.contracts.report import run_report_from_json
from esper.registry.http_registry import HttpRegistry
from esper.registry.memory import MemoryRegistry
from esper.state.site import describe_site
from esper.wrapping.wrap import layers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]
NAME = "mlp:prod"
STATUSES = ["VALIDATED"] * 3 + ["INVALID"]
"""Of Ann's blueprints."""
ENDS = ("VALIDATED", "INVALID")
LONG = ("--batch", "4096")
"""What a job is submitted with that is to be under way when it is looked at."""


def blueprints():
    """Return what Ann has compiled: three that fit a layer of the runs, and one that breaks."""
    layer = layers(wrapped()[0])["0"]
    fitting = default_catalog().blueprints_for(describe_site(layer, torch.zeros(2, 4)))[0]
    made = [replace(fitting, id=f"ann-{seed}", init_seed=seed).to_document() for seed in (5, 6, 7)]
    broken = json.loads(json.dumps(made[0]))
    broken["nodes"][0]["op_type"] = "conv2d"
    return [*made, broken]


def submitted(made, document, *options):
    """Submit a blueprint by the command; return the job's id."""
    file = made.folder / f"{len(list(made.folder.glob('*.json')))}.json"
    file.write_text(json.dumps(document))
    return made.json("blueprints", "submit", file.name, *options)["id"]


def status_of(made, job):
    return made.client.jobs.find(job).status


def compiled(made):
    """Submit the blueprints; return the jobs, and the digests of the three that are kernels."""
    jobs = [submitted(made, each) for each in blueprints()]
    made.until(lambda: all(status_of(made, job) in ENDS for job in jobs))
    found = [made.client.jobs.find(job) for job in jobs]
    assert [job.status for job in found] == STATUSES, found
    return jobs, [job.artifact_id for job in found[:3]]


def under_way(made, number):
    """Submit a job that takes a while; return it as it is when a worker is at it."""
    job = submitted(made, linear_blueprint(512, init_seed=number).to_document(), *LONG)
    made.until(lambda: status_of(made, job) != "UNVALIDATED")
    found = made.client.jobs.find(job)
    assert found.status == "COMPILING", f"it was done too quickly: {found}"
    return found


def kill(process):
    process.kill()
    assert process.wait(30) == -signal.SIGKILL


def tamper(made, digest):
    """Change one byte of a kernel on the server's disk."""
    blob = made.data / "blobs" / digest
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)


class Publisher(threading.Thread):
    """Publishes one artifact after the other; ``taken`` has those that were acknowledged."""

    def __init__(self, made):
        super().__init__()
        self._client, self.taken = HttpRegistry(made.address, token=made.token, timeout_s=1.0), {}

    def run(self):
        with contextlib.closing(self._client), contextlib.suppress(EsperError):
            for number in range(10_000):
                data = artifact(number, output_spec=TensorSpec((9,)))
                self.taken[self._client.put(data)] = data


def events(folder):
    """Return the events of a run's log, of which the last line may be on its way."""
    *lines, _ = (folder / "events.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines]


def refused(folder, digest):
    """Say whether a run's log says that it does not take a kernel."""
    notes = [each["text"] for each in events(folder) if each["kind"] == "noted"]
    return any(f"kernel {digest[:12]} of the registry was refused" in text for text in notes)


def has_reported(client, folder):
    """Say whether a registry has been told of every graft that a run's log has, once of each."""
    seen = [each for each in events(folder) if each.get("artifact_id") and "graft" in each]
    assert seen, "nothing was grafted"
    told = [
        report.graft_id
        for digest in {each["artifact_id"] for each in seen}
        for report in client.outcomes(digest)
        if report.run_id == seen[0]["run_id"]
    ]
    return sorted(told) == sorted({str(each["graft"]) for each in seen})


class Course:
    """The journey in the order of its legs; ``jobs`` and ``taken`` are what must not be lost."""

    def __init__(self, made, proxy, server):
        """Start both runs and both workers, which come up while blueprints are submitted."""
        self.made, self.proxy, self.server = made, proxy, server
        address = proxy.address
        self.workers = {
            name: made.start(name, "compile-worker", "--lease-s", "2", ESPER_WORKER_NAME=name)
            for name in ("wim", "zoe")
        }
        functions = {"ann": "own_kernels", "ben": "kernels_of_others"}
        self.runs = {name: made.grow(name, made_by, address) for name, made_by in functions.items()}

    def compile(self):
        """Have blueprints compiled, name one of the kernels, and alter another on the disk."""
        self.jobs, (self.first, self.second, self.bad) = compiled(self.made)
        self.made.typed("kernels", "tag", self.first, NAME)
        tamper(self.made, self.bad)

    def reach(self, opened, gate):
        """Let the runs go on, and wait until both are at their next gate."""
        self.made.open_gate(opened)
        for name, run in self.runs.items():
            self.made.until(lambda name=name: self.made.is_at(gate, name), run, name)

    def ask(self):
        """Wait until both runs, which train on, have found out that a kernel was altered."""
        for name, run in self.runs.items():
            folder = self.made.folder / name
            self.made.until(lambda f=folder: refused(f, self.bad), run, name)

    def lose_a_worker(self):
        """Kill the worker that is in a job."""
        job = under_way(self.made, 1)
        self.dead = job.worker.partition("/")[0]
        kill(self.workers.pop(self.dead))
        self.jobs.append(job.id)

    def lose_the_server(self):
        """Kill the server while a worker is in a job and somebody publishes."""
        made = self.made
        self.jobs.append(under_way(made, 2).id)
        publisher = Publisher(made)
        publisher.start()
        made.until(lambda: len(publisher.taken) >= 5)
        kill(self.server)
        publisher.join(30)
        self.taken = publisher.taken

    def serve_again(self):
        """Start the server on what the killed one has left, and move the name."""
        made = self.made
        self.server = made.serve("server-again")
        made.typed("kernels", "tag", self.second, NAME, "--expected", self.first)

    def finish(self):
        """Wait until what the runs have to say is there and acknowledged, and let them end."""
        made = self.made
        for name, run in self.runs.items():
            folder = made.folder / name
            made.until(lambda f=folder: has_reported(made.client, f), run, name)
            made.until(lambda f=folder: not (f / "outbox").exists(), run, name)
        made.open_gate(DONE)
        assert [run.wait(60) for run in self.runs.values()] == [0, 0]


def check_the_runs(course):
    """Ben's has tried what Ann's workers made, what was altered is in neither, both have told."""
    made = course.made
    for name in course.runs:
        folder = made.folder / name
        report = run_report_from_json((folder / "report.json").read_text())
        assert [trial.effect is None for trial in report.trials] == [False]
        assert course.bad not in {graft.artifact_id for graft in report.grafts}
        assert refused(folder, course.bad)
        assert has_reported(made.client, folder)
        assert not (folder / "outbox").exists()
        for graft in report.grafts:
            assert made.client.get(graft.artifact_id)
    assert {g.artifact_id for g in report.grafts} <= {course.first, course.second}, "Ben's"
    assert all(graft.is_of_a_registry for graft in report.grafts)


def check_what_was_acknowledged(course):
    """Every publish is there, every job has come to an end, and the name knows both kernels."""
    made = course.made
    assert [d for d, data in course.taken.items() if made.client.get(d) != data] == []
    made.until(lambda: all(status_of(made, job) in ENDS for job in course.jobs))
    found = [made.client.jobs.find(job) for job in course.jobs]
    assert [job.status for job in found] == [*STATUSES, "VALIDATED", "VALIDATED"]
    assert all(job.report["reason"] for job in found if job.status == "INVALID")
    lost = found[len(STATUSES)]
    assert lost.attempts > 1
    assert lost.worker.partition("/")[0] != course.dead
    moves = made.json("kernels", "history", NAME)["moves"]
    assert [move["digest"] for move in moves] == [course.first, course.second]


def check_the_name(course):
    """Elsewhere, over the network that flaps, the name gives the kernel that it was moved to."""
    made = course.made
    made.typed(
        *("kernels", "pull", NAME, "--output", "pulled"),
        URZA_API_URL=course.proxy.address,
        ESPER_CACHE_DIR=str(made.folder / "ben-cache"),
    )
    assert (made.folder / "pulled").read_bytes() == made.client.get(course.second)


def check_the_end(course):
    """Workers and server end when they are told to, the altered blob is found, nobody is left."""
    made = course.made
    (worker,) = course.workers.values()
    worker.terminate()
    assert worker.wait(60) == 130
    course.server.terminate()
    course.server.wait(60)
    check = made.json("registry", "verify", "--data", str(made.data), status=1)
    assert (check["quarantined"], check["missing"]) == ([course.bad], [])
    made.until(lambda: not made.left())


def test_nothing_is_lost_whoever_is_killed(tmp_path):
    """Server and worker are killed, a blob is altered, a name moved, and the network flaps."""
    with journey(tmp_path) as made:
        server = made.serve("server")
        with flapping(made.address) as proxy:
            course = Course(made, proxy, server)
            course.compile()
            course.reach(START, DECIDES)
            course.ask()
            course.lose_a_worker()
            course.lose_the_server()
            course.reach(DECIDES, OUTAGE)
            course.serve_again()
            course.reach(OUTAGE, DONE)
            course.finish()
            check_the_runs(course)
            check_what_was_acknowledged(course)
            check_the_name(course)
            check_the_end(course)
            assert set(proxy.num_done) == set(FLAPPING)


def test_control_nothing_arrives_where_the_network_is_shut(tmp_path, monkeypatch):
    """The run ends well, and what the other test waits for is not there."""
    monkeypatch.setenv("ESPER_JOURNEY", str(tmp_path))
    monkeypatch.setenv("ESPER_JOURNEY_RUN", "ann")
    for gate in GATES:
        (tmp_path / f"go-{gate}").touch()
    registry = MemoryRegistry()
    with served(registry) as address, flapping(address, SHUT) as proxy:
        options = ["--registry", proxy.address, "--run-dir", str(tmp_path / "ann")]
        done = CliRunner().invoke(app, ["grow", "journey_job:own_kernels", *options])
    assert done.exit_code == 0, done.output
    assert not has_reported(registry, tmp_path / "ann")
    assert len(list((tmp_path / "ann" / "outbox").glob("*.report.json"))) > 0
    assert set(proxy.num_done) == {"refuse"}
