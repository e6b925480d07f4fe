"""What happens in a run, for the experiment tracker that its owner already uses."""

from __future__ import annotations

import importlib
import logging
import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, final

import torch

from esper.contracts.errors import EsperError
from esper.contracts.events import Event, RunEnded, RunStarted, SeedMeasured
from esper.integrations.missing import missing_framework
from esper.observability.measures import Tally
from esper.observability.sentences import is_annotation, sentence_of
from esper.resilience.attempt import Failed, attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from esper.observability.measures import Family, Labels

_LOG = logging.getLogger(__name__)

PROJECT: Final = "esper"

_TAKE_TEXT: Final = frozenset({"tensorboard", "wandb", "comet_ml", "trackio"})
"""Trackers that take words beside numbers, by accelerate's own ``log``."""

_NOT_DRAWN: Final = frozenset({"updates", "events", "run_seconds", "run_active", "trial_active"})
"""Families that say nothing as a curve over updates."""


MOST_SEEDS: Final = 40
"""Seeds whose figures a tracker is told; of more, the first ones are."""

_OF_SEEDS: Final = ("fault_rate", "health", "latency_us", "alpha")
"""Figures of a seed that are drawn."""


class Tracker(Protocol):
    """What is asked of one of accelerate's trackers."""

    name: Any

    def start(self) -> None:
        """Open its run."""
        ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Take the settings of the run."""
        ...

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Take numbers and words of an update."""
        ...

    def finish(self) -> None:
        """Close its run."""
        ...


class _HasTrackers(Protocol):
    """What is asked of an ``Accelerator``."""

    @property
    def trackers(self) -> Sequence[Any]:
        """Those that ``init_trackers`` has started."""
        ...


class TrackerSink:
    """Hands a run on to one tracker: numbers as ``esper/gate_loss``, events and gates as words.

    The tracker is one of accelerate's, which knows TensorBoard, W&B, MLflow, Trackio, Aim, ClearML,
    Comet, DVCLive and SwanLab. It starts with the run's first event and is finished with its last,
    beside the training, on one thread from first to last, since some go by the thread: nobody
    waits for it, and where it fails a warning says so, once. Of several ranks the first one
    reports.

    Args:
        tracker: Its name, as ``report_to`` has it; or one that was started already, as an
            ``Accelerator`` has them in ``trackers``, which is left open.
        project: What the tracker calls its project.
        folder: Where a tracker that writes files does, in a folder of its own for each run.

    Raises:
        EsperError: It is ``"all"``, or none of accelerate's, or it is not installed.
        ImportError: accelerate is not installed.

    Attributes:
        num_failures: Times that the tracker raised.
    """

    is_slow: ClassVar[bool] = True

    def __init__(
        self, tracker: str | Tracker, *, project: str = PROJECT, folder: Path | str = "runs"
    ) -> None:
        self._given = None if isinstance(tracker, str) else tracker
        self.name = f"the tracker {tracker if isinstance(tracker, str) else tracker.name!s}"
        self._make = _maker(tracker) if isinstance(tracker, str) else None
        self._project, self._folder = project, folder
        self._tracker: Tracker | None = None
        self._is_over = False
        self._takes_text = _short_name(tracker) in _TAKE_TEXT
        self._tally = Tally()
        self._seeds: set[str] = set()
        self._thread = _OneThread()
        self.num_failures = 0

    def publish(self, event: Event) -> None:
        """Hand one event on."""
        if not self._is_over:
            self._thread.call(lambda: self._take(event))
        if self._is_over:
            self._thread.end()

    def _take(self, event: Event) -> None:
        if self._tracker is None:
            started = self._fenced(lambda: self._started(event))
            if started is None:
                self._is_over = True
                return
            self._tracker = started
        tracker = self._tracker
        if isinstance(event, RunStarted):
            self._fenced(lambda: tracker.store_init_configuration(_flat(event.settings)))
        values = self._values(event)
        if values:
            self._fenced(lambda: tracker.log(values, step=event.update))
        if isinstance(event, RunEnded):
            self._is_over = True
            if self._given is None:
                self._fenced(tracker.finish)

    def _values(self, event: Event) -> dict[str, Any]:
        """Return what an event says, by the names that a tracker shows."""
        values: dict[str, Any] = {
            _metric_name(family, labels): value
            for family, labels, value in self._tally.take(event)
            if family.name not in _NOT_DRAWN
        }
        if isinstance(event, SeedMeasured):
            values |= self._of_seed(event)
        if self._takes_text and is_annotation(event):
            values[f"esper/{event.kind}"] = sentence_of(event)
        return values

    def _of_seed(self, event: SeedMeasured) -> dict[str, float]:
        """Return how a seed is doing, under its own name; of many seeds the first ones are told."""
        name = f"esper/{event.kind}/{event.site or 'root'}.{event.seed_idx}"
        if name not in self._seeds and len(self._seeds) >= MOST_SEEDS:
            return {}
        self._seeds.add(name)
        found = {figure: getattr(event, figure) for figure in _OF_SEEDS}
        return {f"{name}/{each}": value for each, value in found.items() if value is not None}

    def _started(self, event: Event) -> Tracker | None:
        """Start the tracker; None where another rank reports."""
        if self._given is not None:
            if not _is_first_rank():
                return None
            _join_run_of(self._given)
            return self._given
        assert self._make is not None, "it was named"
        if not _is_first_rank():
            return None
        from accelerate import PartialState

        PartialState()  # accelerate's trackers ask it which rank this is
        tracker = self._make(self._project, self._folder, event.run_id)
        tracker.start()
        return tracker

    def _fenced(self, fn: Callable[[], Any]) -> Any:
        """Call a tracker; where it raises, say so once and go on."""
        done = attempt(fn)
        if not isinstance(done, Failed):
            return done.value
        self.num_failures += 1
        if self.num_failures == 1:
            msg = "%s failed, and the run goes on: %s; later failures are only counted"
            _LOG.warning(msg, self.name, done)
        return None


@final
class _OneThread:
    """A thread on which one call after the other is made; in a forked process it is another."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._calls: SimpleQueue[tuple[Callable[[], None], Future[None]] | None] = SimpleQueue()

    def call(self, fn: Callable[[], None]) -> None:
        """Call it there, and wait until it is done.

        Raises:
            BaseException: What it raised.
        """
        if self._thread is None or not self._thread.is_alive():
            self._calls = SimpleQueue()
            self._thread = threading.Thread(
                target=self._work, args=(self._calls,), name="esper tracker", daemon=True
            )
            self._thread.start()
        done: Future[None] = Future()
        self._calls.put((fn, done))
        done.result()

    def end(self) -> None:
        """Let the thread end."""
        self._calls.put(None)

    @staticmethod
    def _work(calls: SimpleQueue[tuple[Callable[[], None], Future[None]] | None]) -> None:
        while (asked := calls.get()) is not None:
            fn, done = asked
            try:
                fn()
            except BaseException as error:  # noqa: BLE001 - raised where it was called
                done.set_exception(error)
            else:
                done.set_result(None)
            del asked, fn, done


def _join_run_of(tracker: Tracker) -> None:
    """Let this thread log to the run of a tracker that another thread has started.

    MLflow has a run for each thread, and starts one where a thread has none.
    """
    if str(tracker.name) == "mlflow":
        mlflow: Any = importlib.import_module("mlflow")
        theirs: Any = tracker
        mlflow.start_run(run_id=theirs.tracker.info.run_id)


def tracker_sinks(
    names: Iterable[str], *, project: str = PROJECT, folder: Path | str = "runs"
) -> list[TrackerSink]:
    """Return a sink for each tracker that is named, once.

    Args:
        names: As ``report_to`` has them; ``"none"`` names none.
        project: What the trackers call their project.
        folder: Where trackers that write files do.

    Raises:
        EsperError: A name is ``"all"`` or none of accelerate's, or what it needs is not installed.
    """
    named = dict.fromkeys(name for name in names if name != "none")
    return [TrackerSink(name, project=project, folder=folder) for name in named]


@final
class AcceleratorSink:
    """Hands a run on to the trackers that an ``Accelerator`` starts, once it has started them.

    ``init_trackers`` may come before the Grower is made or after it; events before are kept. An
    accelerator whose owner named no tracker costs nothing.

    Args:
        accelerator: Has the trackers; they are left open.
    """

    is_slow: ClassVar[bool] = True

    def __init__(self, accelerator: _HasTrackers) -> None:
        self.name = "the accelerator's trackers"
        self._accelerator = accelerator
        self._kept: list[Event] = []
        self._sinks: list[TrackerSink] = []

    def publish(self, event: Event) -> None:
        """Hand one event on, or keep it until there is a tracker."""
        if not self._sinks:
            self._sinks = [TrackerSink(tracker) for tracker in self._accelerator.trackers]
        self._kept.append(event)
        if not self._sinks:
            del self._kept[: -self._MOST_KEPT]
            return
        kept, self._kept = self._kept, []
        for each in kept:
            for sink in self._sinks:
                sink.publish(each)

    _MOST_KEPT: ClassVar[int] = 256


def tracker_names() -> dict[str, bool]:
    """Return the names that accelerate's trackers have, and whether each is installed.

    Raises:
        EsperError: accelerate is not installed.
    """
    tracking = _tracking()
    there = {str(name) for name in tracking.get_available_trackers()}
    builtin = {str(name) for name in tracking.LoggerType if str(name) != "all"}
    return {
        name: name in there or name not in builtin for name in sorted(tracking.LOGGER_TYPE_TO_CLASS)
    }


def _tracking() -> Any:
    try:
        from accelerate import tracking
    except ImportError as error:
        raise missing_framework("accelerate", "hf") from error
    return tracking


def _maker(name: str) -> Callable[[str, Path | str, str], Tracker]:
    """Return what makes a tracker for a project and a folder; of files, each run has its own.

    Raises:
        EsperError: It is none of accelerate's, or it is not installed.
    """
    try:
        known = tracker_names()
    except ImportError as error:
        msg = f"report_to={name!r} needs accelerate: pip install 'esper-morph[hf]'"
        raise EsperError(msg) from error
    if name not in known:
        hint = "name each tracker; " if name == "all" else ""
        msg = f"report_to={name!r} is no tracker; {hint}accelerate has {', '.join(known)}"
        raise EsperError(msg)
    if not known[name]:
        msg = f"report_to={name!r}: accelerate finds no {name} here; install it, or leave it out"
        raise EsperError(msg)
    kind = _tracking().LOGGER_TYPE_TO_CLASS[name]

    def make(project: str, folder: Path | str, run_id: str) -> Tracker:
        needs_folder = kind.requires_logging_directory
        where = (f"{name}/{run_id[:8]}", folder) if needs_folder else (project,)
        tracker: Tracker = kind(*where)
        return tracker

    return make


def _is_first_rank() -> bool:
    """Say whether this is the first of all ranks; so is a process by itself."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return True


def _short_name(tracker: str | Tracker) -> str:
    return tracker if isinstance(tracker, str) else str(tracker.name)


def _metric_name(family: Family, labels: Labels) -> str:
    """Return ``esper/takeovers/candidate``; what the owner measures keeps the owner's name."""
    return "/".join(["esper", family.name, *(label.replace(" ", "_") for label in labels)])


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as trackers take them: numbers and words."""
    return {
        f"esper/{name}": value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in settings.items()
    }
