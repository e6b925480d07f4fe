"""The demo: every arm and every control at several random seeds, in a few processes."""

from __future__ import annotations

import gc
import multiprocessing
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors.torch import save_file

from esper.contracts.progress import Progress, ProgressRow
from esper.observability.event_log import EventLog
from esper.observability.run_folder import EVENTS_FILE, claim_run_folder
from esper.services.arms import (
    FORK_UPDATE,
    Stopped,
    Tell,
    grown_arm,
    host_arm,
    optimizer_for,
    scratch_arm,
    train_on,
)
from esper.services.controls import run_controls
from esper.services.digits import (
    UPDATES_PER_EPOCH,
    Digits,
    batches,
    demo_host,
    load_digits,
)
from esper.services.findings import SeedResult, demo_report, gains_of
from esper.services.interrupts import Interrupts
from esper.services.language import live_stages
from esper.wrapping.export import export
from esper.wrapping.wrap import wrap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from esper.contracts.report import DemoReport

EPOCHS: Final = 50
DEFAULT_RANDOM_SEEDS: Final = tuple(range(10))

Message = tuple[int, float, ProgressRow]
"""A random seed, the share of it that is done, and where it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRun:
    """A demo that was run.

    Attributes:
        report: What it found.
        folder: Where the report belongs; the log and the model are there.
    """

    report: DemoReport
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What a process needs for one random seed; crosses to it by pickling.

    Attributes:
        random_seed: The random seed.
        epochs: Epochs of every arm.
        run_dir: Where the grown arm's log and export go.
        exports: Whether this random seed exports its grown model.
        messages: Queue to the parent.
        stop: Event that asks to stop.
    """

    random_seed: int
    epochs: int
    run_dir: Path
    exports: bool
    messages: queue.Queue[Message]
    stop: threading.Event


def run_demo(
    random_seeds: Sequence[int] = DEFAULT_RANDOM_SEEDS,
    run_dir: Path = Path("runs/demo"),
    processes: int = 2,
    on_progress: Callable[[Progress], None] | None = None,
    epochs: int = EPOCHS,
    on_held: Callable[[], None] | None = None,
) -> DemoRun:
    """Run the demo; its report is the caller's to print and to write.

    The folder gets ``events.jsonl`` of the first random seed's grown arm, and its grown model under
    ``model``. Ctrl-C ends the demo early, with a report of the random seeds that were completed.

    Args:
        random_seeds: One run of every arm each; distinct.
        run_dir: Folder of everything that is written; one beside it is numbered where it holds a
            run already.
        processes: How many processes of one thread each.
        on_progress: Told several times a second.
        epochs: Epochs of 20 updates; the controls begin after 20 of them, so at least 21.
        on_held: Called for each Ctrl-C after the first, which changes nothing.

    Returns:
        The report, and the folder that it belongs into.

    Raises:
        ValueError: There is no random seed, one is there twice, or a count is below its least.
        ModuleNotFoundError: scikit-learn is not installed (extra ``demo``).
    """
    _check(random_seeds, processes, epochs)
    folder = claim_run_folder(run_dir)
    start = time.perf_counter()
    with Interrupts(on_held):
        results, interrupted = _run_all(random_seeds, folder, processes, on_progress, epochs)
    report = demo_report(
        results,
        epochs=epochs,
        processes=processes,
        seconds=time.perf_counter() - start,
        interrupted=interrupted,
    )
    return DemoRun(report=report, folder=folder)


def _check(random_seeds: Sequence[int], processes: int, epochs: int) -> None:
    if not random_seeds or len(set(random_seeds)) < len(random_seeds):
        msg = f"the demo needs random seeds, each once; got {list(random_seeds)}"
        raise ValueError(msg)
    if processes < 1:
        msg = f"processes is at least 1, got {processes}"
        raise ValueError(msg)
    if epochs * UPDATES_PER_EPOCH <= FORK_UPDATE:
        least = FORK_UPDATE // UPDATES_PER_EPOCH + 1
        msg = f"epochs is at least {least}: the controls begin before; got {epochs}"
        raise ValueError(msg)


def _run_all(
    random_seeds: Sequence[int],
    run_dir: Path,
    processes: int,
    on_progress: Callable[[Progress], None] | None,
    epochs: int,
) -> tuple[list[SeedResult], bool]:
    """Run every random seed in a pool; return what was completed, and whether it was stopped."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        messages, stop = manager.Queue(), manager.Event()
        tasks = [
            _Task(
                random_seed=random_seed,
                epochs=epochs,
                run_dir=run_dir,
                exports=i == 0,
                messages=messages,
                stop=stop,
            )
            for i, random_seed in enumerate(random_seeds)
        ]
        with ProcessPoolExecutor(processes, context, _begin_process) as pool:
            futures = [pool.submit(_run_apart, task) for task in tasks]
            try:
                _follow(futures, messages, len(tasks), on_progress)
                interrupted = False
            except KeyboardInterrupt:
                stop.set()
                interrupted = True
                for future in futures:
                    future.cancel()
                wait(futures)
            return _completed(futures), interrupted


def _begin_process() -> None:
    """Leave Ctrl-C to the parent, and take one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)


def _run_apart(task: _Task) -> SeedResult:
    """Run a random seed in a process of the pool.

    Collections of garbage, and searches for who refers to what, leave out all that was there
    before, libraries above all: with them a search, of which each fold makes four, took 50 ms.
    """
    gc.collect()
    gc.freeze()
    return run_seed(task)


def _follow(
    futures: list[Future[SeedResult]],
    messages: queue.Queue[Message],
    num_tasks: int,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Pass progress on until all are done; raise what a process raised."""
    shares: dict[int, float] = {}
    rows: dict[int, ProgressRow] = {}
    while not all(future.done() for future in futures):
        try:
            random_seed, share, row = messages.get(timeout=0.25)
        except queue.Empty:
            continue
        shares[random_seed], rows[random_seed] = share, row
        rows = {seed: row for seed, row in rows.items() if shares[seed] < 1.0}
        if on_progress is not None:
            done = sum(shares.values())
            on_progress(
                Progress(
                    done=done,
                    total=num_tasks,
                    doing=f"{sum(s >= 1.0 for s in shares.values())} of {num_tasks} random seeds",
                    rows=tuple(rows.values()),
                )
            )
    for future in futures:
        future.result()


def _completed(futures: list[Future[SeedResult]]) -> list[SeedResult]:
    return [
        future.result()
        for future in futures
        if not future.cancelled() and not isinstance(future.exception(), Stopped)
    ]


def run_seed(task: _Task) -> SeedResult:
    """Run every arm and the controls at one random seed.

    Raises:
        Stopped: The reader asked to stop.
    """
    digits, teller = load_digits(), _Teller(task)
    random_seed, epochs = task.random_seed, task.epochs
    host = host_arm(digits, random_seed, epochs, teller.step("host"))
    with _log(task) as log:
        grown = grown_arm(digits, random_seed, epochs, teller.step("grown"), sink=log)
    random = grown_arm(digits, random_seed, epochs, teller.step("random"), random_choice=True)
    scratch = scratch_arm(digits, random_seed, epochs, grown.kernels, teller.step("scratch"))
    assert host.fork is not None, "every arm is trained beyond it"
    controls = run_controls(digits, host.fork, teller.step("controls"))
    difference = (
        export_difference(grown.model, digits, task.run_dir / "model") if task.exports else None
    )
    identical = dormant_is_identical(digits, random_seed)
    stages = live_stages(random_seed, teller.step("language")) if task.exports else ()
    teller.finish()
    own = replace(host.result, dip=host.looks.worst_dip([*grown.switches, *random.switches]))
    return SeedResult(
        random_seed=random_seed,
        arms={"host": own, "grown": grown.result, "random": random.result, "scratch": scratch},
        controls=controls,
        gains=gains_of(grown, random),
        dormant_identical=identical,
        stages=stages,
        export_max_rel_diff=difference,
    )


def _log(task: _Task) -> AbstractContextManager[EventLog | None]:
    return EventLog(task.run_dir / EVENTS_FILE) if task.exports else nullcontext()


class _Teller:
    """Tells the parent how far one random seed is, and stops where it asks to.

    Args:
        task: The task.
    """

    def __init__(self, task: _Task) -> None:
        self._task = task
        self._before = 0.0

    def step(self, name: str) -> Tell:
        """Return what a step calls now and then, with what it knows of its progress."""
        start, weight = _begin_and_weight(name)
        looks = 0

        def told(share: float | None = None, row: ProgressRow | None = None) -> None:
            nonlocal looks
            looks += 1
            if self._task.stop.is_set():
                raise Stopped
            known = share if share is not None else 1 - 0.98**looks
            named = replace(
                row or ProgressRow(name=name, update=0),
                name=f"random seed {self._task.random_seed}, {name}",
            )
            self._task.messages.put((self._task.random_seed, start + weight * known, named))

        return told

    def finish(self) -> None:
        """Say that the random seed is completed."""
        row = ProgressRow(name=f"random seed {self._task.random_seed}", update=0)
        self._task.messages.put((self._task.random_seed, 1.0, row))


_WEIGHTS: Final = {
    "host": 0.05,
    "grown": 0.3,
    "random": 0.3,
    "scratch": 0.15,
    "controls": 0.15,
    "language": 0.05,
}
"""Share of a random seed's time that each step takes, about; for the time left."""


def _begin_and_weight(name: str) -> tuple[float, float]:
    names = list(_WEIGHTS)
    return sum(_WEIGHTS[n] for n in names[: names.index(name)]), _WEIGHTS[name]


def dormant_is_identical(digits: Digits, random_seed: int, updates: int = 20) -> bool:
    """Train the bare host and the wrapped dormant one side by side; compare every bit."""
    bare, dormant = demo_host(random_seed), wrap(demo_host(random_seed))
    optimizers = optimizer_for(bare), optimizer_for(dormant)
    for _, batch in zip(range(updates), batches(digits.train, random_seed, 0), strict=False):
        train_on(bare, optimizers[0], batch)
        train_on(dormant, optimizers[1], batch)
    pairs = zip(bare.parameters(), dormant.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs) and torch.equal(
        bare(digits.test.x_N1HW), dormant(digits.test.x_N1HW)
    )


def export_difference(model: nn.Module, digits: Digits, folder: Path) -> float:
    """Export a model, read it in a fresh process without Esper, and compare predictions.

    Returns:
        The largest difference of a logit, relative to the largest logit.

    Raises:
        RuntimeError: The fresh process failed; the message holds what it said.
    """
    export(model, folder)
    example = digits.test.x_N1HW
    with torch.no_grad():
        expected = model.eval()(example)
    save_file({"x": example, "expected": expected}, folder / "check.safetensors")
    done = subprocess.run(  # noqa: S603 - our own interpreter and our own text
        [sys.executable, "-I", "-c", _READ_EXPORT, str(folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode != 0:
        msg = f"the export could not be read in a fresh process: {done.stderr.strip()}"
        raise RuntimeError(msg)
    return float(done.stdout)


_READ_EXPORT: Final = """
import importlib.util, pathlib, sys
import torch
from safetensors.torch import load_file
from torch import nn
folder = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("grafts", folder / "grafts.py")
grafts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(grafts)
host = nn.Sequential(
    nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(16, 10),
)
model = grafts.build(host)
model.load_state_dict(load_file(folder / "model.safetensors"))
model.eval()
check = load_file(folder / "check.safetensors")
with torch.no_grad():
    found = model(check["x"])
assert not any(name.split(".")[0] == "esper" for name in sys.modules), "esper was imported"
print(float((found - check["expected"]).abs().max() / check["expected"].abs().max()))
"""
