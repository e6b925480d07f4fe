"""A run in the tracker that its owner already uses."""

import logging
import threading

import pytest
from accelerate import tracking
from told_runs import told_run

from esper.bus.in_process import EventBus
from esper.contracts.errors import EsperError
from esper.contracts.events import SeedMeasured
from esper.integrations.trackers import MOST_SEEDS, TrackerSink, tracker_sinks


class Recorder(tracking.GeneralTracker):
    """A tracker as accelerate lets anybody add one."""

    name = "recorder"
    requires_logging_directory = False
    made = ()

    def __init__(self, run_name):
        super().__init__()
        self.run_name, self.calls = run_name, []
        self.made.append(self)

    @property
    def tracker(self):
        return self

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.calls.append(values)

    @tracking.on_main_process
    def log(self, values, step=None):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    return Recorder.made


def told(sink, events=None):
    for event in told_run(2) if events is None else events:
        sink.publish(event)


def test_numbers_have_names_by_convention(recorder):
    """Each starts with esper/, at the update that it is of; the run's settings come first."""
    (sink,) = tracker_sinks(["recorder", "recorder", "none"], project="digits")
    told(sink)
    (made,) = recorder
    start, settings, *logged, finish = made.calls
    assert (made.run_name, start, finish) == ("digits", "start", "finish")
    assert settings == {"esper/overhead": 0.5, "esper/goal": "min", "esper/horizon": "None"}
    at = {(step, name): value for step, values in logged for name, value in values.items()}
    assert at[10, "esper/gate_loss"] == 1.0
    assert at[10, "esper/metric/accuracy"] == 0.5
    assert at[15, "esper/trials/taken_over"] == 1
    assert at[15, "esper/work_flops"] == 1e9
    assert {type(value) for value in at.values()} <= {int, float}
    assert sink.num_failures == 0


def test_a_tracker_that_takes_text_gets_gates_and_stages_as_words(recorder, monkeypatch):
    """Where words stand beside curves, what happened is told in a sentence."""
    monkeypatch.setattr(Recorder, "name", "wandb")
    given = Recorder("given")
    told(TrackerSink(given))
    texts = {name: v for _, values in given.calls[1:] for name, v in values.items()}
    assert texts["esper/trial_read"] == "package 2 refused: z = 4"
    assert "start" not in given.calls  # what was started by others is left open
    assert "finish" not in given.calls


def test_figures_of_seeds_have_curves_of_their_own_up_to_a_number(recorder):
    """What was not measured has none; of many seeds the first ones are drawn."""
    (sink,) = tracker_sinks(["recorder"])
    at = {"time_s": 1.0, "run_id": "0" * 32}
    measured = [
        SeedMeasured(
            **at, update=100, seq=i, site=f"h.{i}", seed_idx=0, state="active", latency_us=9.0
        )
        for i in range(MOST_SEEDS + 5)
    ]
    told(sink, [*measured, measured[0]])
    calls = [values for step, values in (c for c in recorder[0].calls if c != "start")]
    first = {
        "esper/seed_measured/h.0.0/latency_us": 9.0,
        "esper/seed_measured/h.0.0/fault_rate": 0.0,
        "esper/seed_measured/h.0.0/alpha": 1.0,
    }
    assert calls[0].items() >= first.items()
    assert calls[-1].items() >= first.items()
    names = {name.split("/")[2] for values in calls for name in values if "measured" in name}
    assert len(names) == MOST_SEEDS


def test_a_tracker_has_one_thread_from_first_to_last(recorder, monkeypatch):
    """MLflow has a run for each thread: a thread for each event would be a run for each."""
    threads, lanes = set(), set()
    monkeypatch.setattr(Recorder, "log", lambda *_, **__: threads.add(threading.current_thread()))
    monkeypatch.setattr(Recorder, "finish", lambda _: threads.add(threading.current_thread()))
    (sink,) = tracker_sinks(["recorder"])

    class Beside:
        is_slow = True

        def publish(self, event):
            lanes.add(threading.current_thread())
            sink.publish(event)

    bus = EventBus([Beside()])
    for event in told_run(2):
        bus.publish(event)
        assert bus.flush()
    assert len(lanes) > 1  # control: the bus has a thread for each
    (thread,) = threads
    thread.join(5.0)
    assert not thread.is_alive()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # what MLflow itself is warned of
@pytest.mark.parametrize("is_given", [False, True])
def test_a_run_is_one_run_of_mlflow(is_given, tmp_path, monkeypatch):
    """Started here or by its owner, whose thread is another."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    given = tracking.MLflowTracker("digits")
    if is_given:
        given.start()
    sink = TrackerSink(given if is_given else "mlflow", project="digits")
    bus = EventBus([sink])
    for event in told_run(2):
        bus.publish(event)
        assert bus.flush(30)
    if is_given:
        given.log({"loss": 1.0}, step=1)  # what its owner logs goes on
        given.finish()
    assert sink.num_failures == 0
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.data.metrics["esper/gate_loss"] > 0.0
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("name", ["all", "nobody", "wandb"])
def test_only_what_was_named_and_is_there(name):
    """``all`` names nothing, nor does a word that accelerate has not, or that is not installed."""
    with pytest.raises(EsperError, match=f"report_to='{name}'"):
        tracker_sinks([name])


@pytest.mark.parametrize("broken", ["start", "log", "finish", "store_init_configuration"])
def test_a_tracker_that_raises_is_one_warning(recorder, monkeypatch, caplog, broken):
    """Whatever it refuses, its owner reads so once and the run goes on."""

    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(Recorder, broken, refuse)
    (sink,) = tracker_sinks(["recorder"])
    with caplog.at_level(logging.WARNING):
        told(sink)
    (said,) = [r.getMessage() for r in caplog.records]
    assert "the tracker recorder failed, and the run goes on: ConnectionError: no route" in said


@pytest.mark.parametrize("hanging", ["start", "log", "finish"])
def test_a_tracker_that_hangs_is_waited_for_by_nobody(recorder, monkeypatch, caplog, hanging):
    """Publishing takes no time, the end what it is given, and one warning names the tracker."""
    let_go = threading.Event()
    monkeypatch.setattr(Recorder, hanging, lambda *args, **kwargs: let_go.wait(60))
    (sink,) = tracker_sinks(["recorder"])
    bus = EventBus([sink])
    with caplog.at_level(logging.WARNING):
        told(bus)
        assert not bus.flush(0.05)
    let_go.set()
    assert bus.flush()
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith("the tracker recorder has not taken every event")


@pytest.mark.slow
def test_tensorboard_has_curves_and_words(tmp_path):
    """A real writer of TensorBoard's files has the gate loss by update, and verdicts as text."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    (sink,) = tracker_sinks(["tensorboard"], folder=tmp_path)
    told(sink)
    assert sink.num_failures == 0
    (file,) = (tmp_path / "tensorboard" / "00000000").glob("events.out.*")
    events = [proto.Event.FromString(record) for record in records_of(file.read_bytes())]
    values = [(e.step, v) for e in events for v in e.summary.value]
    assert (10, 1.0) in {(s, v.simple_value) for s, v in values if v.tag == "esper/gate_loss"}
    texts = {v.tag for _, v in values if v.tensor.string_val}
    assert "esper/trial_read/text_summary" in texts


def records_of(data):
    """Yield the records of a file of TensorFlow's: length, its sum, the bytes, their sum."""
    while data:
        size = int.from_bytes(data[:8], "little")
        yield data[12 : 12 + size]
        data = data[16 + size :]
