"""What watches a run of a command: nothing of it slows, stalls or changes the run."""

import contextlib
import logging
import random
import socket
import threading
from dataclasses import dataclass

import pytest
from accelerate import tracking
from collectors import collecting
from safetensors.torch import load_file

from esper.contracts.errors import EsperError
from esper.observability.prometheus import PrometheusSink
from esper.observability.spans import Collector
from esper.resilience.clock import MonotonicClock
from esper.services.job_options import JobOptions
from esper.services.run_job import run_job
from esper.services.settings import Environment, read_environment
from esper.services.sinks import RunSinks, sinks_of

pytestmark = pytest.mark.network

END_S = 5.0


@dataclass
class Watched:
    weights: dict
    train_s: float
    end_s: float


def watched(folder, sinks):
    """Run the job, told to sinks, and close them as the command does."""
    clock = MonotonicClock()
    start_s = clock.now()
    run = run_job("watched_job:job", run_dir=folder, options=JobOptions(random_seed=3), sinks=sinks)
    trained_s = clock.now()
    sinks.close()
    assert run.error is None
    (kept,) = (run.folder / "model").glob("*.safetensors")
    return Watched(load_file(kept), trained_s - start_s, clock.now() - trained_s)


def equal(one, other):
    return one.weights.keys() == other.weights.keys() and all(
        one.weights[name].equal(other.weights[name]) for name in one.weights
    )


class Tracker(tracking.GeneralTracker):
    """A tracker that does at every call what its class is told to."""

    name = "mishap"
    requires_logging_directory = False
    act = staticmethod(lambda: None)

    def __init__(self, run_name):
        super().__init__()

    @property
    def tracker(self):
        return self

    def start(self):
        self.act()

    def store_init_configuration(self, values):
        self.act()

    def log(self, values, step=None):
        self.act()

    def finish(self):
        self.act()


@pytest.fixture
def mishap(monkeypatch):
    """Sets what the tracker does."""
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mishap", Tracker)
    return lambda act: monkeypatch.setattr(Tracker, "act", staticmethod(act))


def refuse():
    raise ConnectionError("500 Internal Server Error")


@pytest.fixture
def let_go():
    event = threading.Event()
    yield event
    event.set()


@contextlib.contextmanager
def silent():
    """Listen at a port, and answer nobody; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def told_by(mishap, let_go):
    """Makes sinks that all hang, refuse, or answer 500; the port for metrics is taken."""
    with (
        collecting(None) as hanging,
        collecting(500) as failing,
        PrometheusSink(0) as taken,
        silent() as mute,
    ):
        endpoints = {"hanging": hanging.endpoint, "failing": failing.endpoint}

        def make(folder, how):
            mishap((lambda: let_go.wait(60)) if how == "hanging" else refuse)
            endpoint = endpoints.get(how, "http://127.0.0.1:9/v1/traces")
            environment = Environment(
                report_to=("mishap",),
                collector=Collector(endpoint=endpoint, timeout_s=60),
                metrics_port=taken.port,
                bus_url=f"redis://127.0.0.1:{mute if how == 'hanging' else 9}/0",
            )
            return sinks_of(environment, folder=folder)

        yield make


@pytest.mark.slow
def test_sinks_that_misbehave_change_nothing(tmp_path, told_by, caplog):
    """The weights are those of a run that nobody watches, and each sink is warned of once."""
    alone = watched(tmp_path / "alone", RunSinks([]))
    for how in ("hanging", "refusing", "failing"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "esper"):
            beside = watched(tmp_path / how, told_by(tmp_path, how))
        assert equal(alone, beside)
        assert beside.end_s <= END_S
        said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(said) == 4, said
        parts = ("the tracker mishap", "the collector at", "metrics are not shown at port")
        for part in (*parts, "the bus at"):
            assert sum(part in text for text in said) == 1, said


@pytest.mark.slow
def test_control_a_sink_that_draws_random_numbers_changes_the_weights(tmp_path):
    """What is compared would tell."""

    class Drawing:
        def publish(self, event):
            random.random()

    alone = watched(tmp_path / "alone", RunSinks([]))
    assert not equal(alone, watched(tmp_path / "beside", RunSinks([Drawing()])))


@pytest.mark.torture
def test_sinks_that_hang_cost_a_run_no_time(tmp_path, told_by):
    """Of several runs by turns the fastest watched one takes at most 1.10 times the other."""
    alone, beside = [], []
    for number in range(5):
        alone.append(watched(tmp_path / f"alone{number}", RunSinks([])).train_s)
        sinks = told_by(tmp_path, "hanging")
        beside.append(watched(tmp_path / f"beside{number}", sinks).train_s)
    assert min(beside) <= 1.10 * min(alone)


@pytest.mark.torture
def test_control_a_sink_that_holds_its_publisher_costs_time(tmp_path, let_go):
    """One that claims never to wait and does is what the bus keeps others from."""

    class Holding:
        never_waits = True

        def publish(self, event):
            let_go.wait(0.05)

    alone = min(watched(tmp_path / f"alone{n}", RunSinks([])).train_s for n in range(2))
    assert watched(tmp_path / "beside", RunSinks([Holding()])).train_s > 1.10 * alone


def test_the_jobs_own_sink_is_told_as_well():
    """Where nobody else is, it stays the only one."""
    own = object()
    assert RunSinks([]).beside(own) is own
    assert RunSinks([]).beside(None) is None


def test_a_tracker_that_is_not_there_is_refused_before_anything_is_trained(tmp_path):
    """The option counts before the environment, and a name that is none is an error."""
    environment = read_environment({"ESPER_REPORT_TO": "nobody"})
    for named, wrong in (((), "nobody"), (("nothing",), "nothing")):
        with pytest.raises(EsperError, match=f"report_to='{wrong}' is no tracker"):
            sinks_of(environment, report_to=named, folder=tmp_path)


def test_only_the_first_rank_reports(tmp_path):
    """The others have no sink but the job's own, whatever is set."""
    variables = {"ESPER_REPORT_TO": "nobody", "RANK": "3"}
    assert sinks_of(read_environment(variables), folder=tmp_path).beside(None) is None
