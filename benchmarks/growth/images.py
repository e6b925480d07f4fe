"""Two small classifiers that are grown: the demo's digits, and Fashion-MNIST.

The final accuracy of a run is the mean over its last ten epochs, since at a constant rate the last
one alone differs between equal runs by more than a point.
"""

import copy
import functools
import gzip
import statistics
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from store import Result
from task import Task
from torch import Tensor, nn

import esper
from esper.compiler.lowering import LoweredKernel, lower
from esper.contracts.blueprint import BlueprintIR
from esper.growth.evaluation import measuring
from esper.growth.flops import update_flops
from esper.services.digits import LEARNING_RATE, demo_host, load_digits

FASHION = Path("/usr/share/datasets/fashion-mnist")
LOOKS = 10
"""Last epochs whose mean accuracy is a run's."""

ARMS = ("host", "grown", "null", "scratch", "random", "defaults")
Batch = tuple[Tensor, Tensor]
Kernels = tuple[tuple[str, BlueprintIR], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Images and their labels: shapes (N, 1, height, width) and (N,)."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """What is trained on, what decides, and what is told."""

    train: Images
    gate: Images
    test: Images


def digits_splits(_settings: Mapping[str, Any]) -> Splits:
    """Return the demo's splits."""
    digits = load_digits()
    parts = (digits.train, digits.gate, digits.test)
    train, gate, test = (Images(x=part.x_N1HW, y=part.y_N) for part in parts)
    return Splits(train=train, gate=gate, test=test)


@functools.cache
def _fashion(kind: Literal["train", "t10k"]) -> Images:
    images = gzip.decompress((FASHION / f"{kind}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((FASHION / f"{kind}-labels-idx1-ubyte.gz").read_bytes())
    x = np.frombuffer(images, dtype=np.uint8, offset=16).reshape(-1, 1, 28, 28)
    y = np.frombuffer(labels, dtype=np.uint8, offset=8)
    return Images(
        x=torch.from_numpy(x.astype(np.float32) / 255), y=torch.from_numpy(y.astype(np.int64))
    )


def fashion_splits(settings: Mapping[str, Any]) -> Splits:
    """Take a few images of each split, the same for every run."""
    train, test = _fashion("train"), _fashion("t10k")
    order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(0))
    first, second = settings["train_images"], settings["gate_images"]
    taken, gate = order[:first], order[first : first + second]
    return Splits(
        train=Images(x=train.x[taken], y=train.y[taken]),
        gate=Images(x=train.x[gate], y=train.y[gate]),
        test=Images(x=test.x[: settings["test_images"]], y=test.y[: settings["test_images"]]),
    )


def fashion_host(random_seed: int) -> nn.Module:
    """Build a network of 640 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 10),
        )


def no_fashion() -> str | None:
    """Say why Fashion-MNIST cannot be had, or nothing."""
    if (FASHION / "train-images-idx3-ubyte.gz").exists():
        return None
    return f"{FASHION} is missing; Debian's package dataset-fashion-mnist puts it there"


def no_digits() -> str | None:
    """Say why the digits cannot be had, or nothing."""
    try:
        load_digits()
    except ModuleNotFoundError:
        return "scikit-learn is not installed (the extra demo has it)"
    return None


def compute_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


class Run:
    """One arm at one random seed.

    Args:
        splits: The data.
        settings: How long, and how.
        random_seed: Of weights and batches.
        model: What is trained.
    """

    def __init__(
        self, splits: Splits, settings: Mapping[str, Any], random_seed: int, model: nn.Module
    ) -> None:
        self.splits, self.settings, self.random_seed = splits, settings, random_seed
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings["rate"])
        self.looks: list[float] = []
        self.null_looks: list[float] = []
        self.seconds = 0.0

    def train(self, grower: esper.Grower | None = None) -> None:
        """Train to the end; looks at the test split are the benchmark's, and are not timed."""
        for epoch in range(self.settings["epochs"]):
            begin = time.perf_counter()
            for batch in self._batches(epoch):
                loss = compute_loss(self.model, batch)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                if grower is not None:
                    grower.step(loss, batch=batch)
            if grower is not None:
                grower.end_epoch()
            self.seconds += time.perf_counter() - begin
            if epoch >= self.settings["epochs"] - LOOKS:
                self._look(grower)

    @property
    def accuracy(self) -> float:
        """Percent of the test split, mean of the last looks."""
        return statistics.fmean(self.looks)

    def training_flops(self) -> float:
        """Return the FLOPs of training alone, at the shape that the model has now."""
        updates = self.settings["epochs"] * len(list(self._batches(0)))
        each = update_flops(self.model, compute_loss, next(self._batches(0)))
        return float(each) * updates

    def _batches(self, epoch: int) -> Iterator[Batch]:
        train, size = self.splits.train, self.settings["batch"]
        generator = torch.Generator().manual_seed(self.random_seed * 100_003 + epoch)
        for rows in torch.randperm(len(train.y), generator=generator).split(size):
            yield train.x[rows], train.y[rows]

    def _look(self, grower: esper.Grower | None) -> None:
        self.looks.append(_accuracy(self.model, self.splits.test))
        beside = None if grower is None else grower._run.null_beside  # noqa: SLF001 - no owner asks for it
        if beside is not None:
            self.null_looks.append(_accuracy(beside._arm.twin.model, self.splits.test))  # noqa: SLF001 - as above


def _accuracy(model: nn.Module, split: Images) -> float:
    with measuring(model):
        return 100 * float((model(split.x).argmax(1) == split.y).float().mean())


def measure(split: Images) -> Any:
    """Return the owner's measure: per-sample Brier scores, and who was right."""

    def evaluate(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        logits_NC = model(split.x)
        error_NC = logits_NC.softmax(1) - F.one_hot(split.y, logits_NC.shape[1])
        return error_NC.square().sum(1), {"accuracy": (logits_NC.argmax(1) == split.y).float()}

    return evaluate


def runs(
    task: str, random_seed: int, missing: Collection[str], settings: Mapping[str, Any]
) -> Iterator[Result]:
    """Run the missing arms of a random seed; null and scratch need what was grown."""
    begin, host = _TASKS[task]
    splits = begin(settings)

    def run(model: nn.Module) -> Run:
        return Run(splits, settings, random_seed, model)

    def put(arm: str, done: Run, flops: float, **more: Any) -> Result:
        return _result(task, arm, done, flops, **more)

    if "host" in missing:
        plain = run(host(random_seed))
        plain.train()
        yield put("host", plain, plain.training_flops())
    if {"grown", "null", "scratch"} & {*missing}:
        kernels, results = _grown_with_null(task, run(esper.wrap(host(random_seed))))
        yield from (each for each in results if each.arm in missing)
        if "scratch" in missing:
            shaped = run(_shaped(host(random_seed), kernels, splits.train.x[:2]))
            shaped.train()
            yield put("scratch", shaped, shaped.training_flops(), parameters=_size(shaped.model))
    if "random" in missing:
        random = run(esper.wrap(host(random_seed)))
        ranking = esper.RandomChoice(random_seed)
        yield _grow(task, "random", random, overhead=settings["overhead"], ranking=ranking)[0]
    if "defaults" in missing:
        yield _grow(task, "defaults", run(esper.wrap(host(random_seed))))[0]


def _grown_with_null(task: str, run: Run) -> tuple[Kernels, list[Result]]:
    """Grow; the null that trains beside to the end is an arm of its own."""
    grown, null_flops = _grow(
        task, "grown", run, overhead=run.settings["overhead"], attribution="run"
    )
    null = copy.copy(run)
    null.looks = run.null_looks or run.looks
    figures = {"beside": float(bool(run.null_looks))}
    result = _result(task, "null", null, null_flops, **figures)
    return _kernels(run.model), [grown, result]


def _grow(task: str, arm: str, run: Run, **options: Any) -> tuple[Result, float]:
    """Train with a Grower; return the result and the FLOPs of a training that is as large."""
    grower = esper.Grower(
        run.model,
        run.optimizer,
        compute_loss=compute_loss,
        evaluate=measure(run.splits.gate),
        horizon=run.settings["epochs"] * len(list(run._batches(0))),  # noqa: SLF001 - our own
        random_seed=run.random_seed,
        **options,
    )
    with grower:
        run.train(grower)
    report = grower.report()
    training = report.work["training"]
    figures = {
        "parameters": report.parameters_after,
        "work": sum(report.work.values()) / training,
        "work_without_null": (sum(report.work.values()) - report.work["trial"]) / training,
        "passed": float(any(t.taken for t in report.trials)),
        "capacity_shown": float(any(t.capacity_shown and t.taken for t in report.trials)),
        "end_capacity": report.end_capacity,
        "end_capacity_stderr": report.end_capacity_stderr,
        "end_capacity_shown": _number(report.end_capacity_shown),
    }
    trials = [
        {
            name: getattr(trial, name)
            for name in (
                "started_at",
                "trial_updates",
                "verdict",
                "taken",
                "sites",
                "blueprints",
                "parameters",
                "effect",
                "z",
                "null_effect",
                "capacity",
                "capacity_shown",
            )
        }
        for trial in report.trials
    ]
    details = {
        "work": {k: v / training for k, v in report.work.items()},
        "trials": trials,
        "notes": [n for n in report.notes if "buys no trial" in n or "refused" in n],
    }
    flops = sum(report.work.values())
    return _result(task, arm, run, flops, details=details, **figures), training


def _number(flag: bool | None) -> float | None:  # noqa: FBT001 - a value, no switch
    return None if flag is None else float(flag)


def _result(
    task: str,
    arm: str,
    run: Run,
    flops: float,
    *,
    details: Mapping[str, Any] | None = None,
    **figures: float | None,
) -> Result:
    return Result(
        task=task,
        arm=arm,
        random_seed=run.random_seed,
        settings={**run.settings},
        figures={"accuracy": statistics.fmean(run.looks), **figures},
        flops=flops,
        seconds=run.seconds,
        details=details or {},
    )


def _size(model: nn.Module) -> float:
    return float(sum(p.numel() for p in model.parameters()))


def _kernels(model: nn.Module) -> Kernels:
    """Return site and blueprint of what stands in a grown model."""
    return tuple(
        (name, kernel.blueprint)
        for name, layer in esper.layers(model).items()
        for kernel in map(layer.seed_kernel, range(layer.num_seeds))
        if isinstance(kernel, LoweredKernel)
    )


def _shaped(host: nn.Module, kernels: Kernels, x: Tensor) -> nn.Module:
    """Return a host that begins with the kernels that another ended with."""
    if not kernels:
        return host
    model = esper.wrap(host)
    for site, blueprint in kernels:
        layer = esper.layers(model)[site]
        idx = next(i for i in range(layer.num_seeds) if layer.seed_kernel(i) is None)
        layer.graft(idx, lower(blueprint), alpha=1.0)
    with torch.no_grad():
        model(x)
    return esper.unwrap(model)


_TASKS = {
    "digits": (digits_splits, demo_host),
    "Fashion-MNIST": (fashion_splits, fashion_host),
}
_DIGITS = {"epochs": 60, "batch": 32, "rate": LEARNING_RATE, "overhead": 6.0}
_FASHION_MNIST = {
    "epochs": 40,
    "batch": 64,
    "rate": 3e-3,
    "overhead": 6.0,
    "train_images": 6_000,
    "gate_images": 1_500,
    "test_images": 4_000,
}

_TOLD = """\
`host` never grows. `grown` has room for long trials (`overhead`) and `attribution="run"`: where a
package was taken over, its null, the package made linear, trains beside the run to the end, and is
the arm `null` (where none did, it is the grown run itself). `random` takes random kernels in the
same way, `attribution="trial"`. `defaults` is what an owner gets who names nothing but data and
horizon. `scratch` has the shape that `grown` ended with from its first update. Accuracies are means
over the last ten epochs."""
_TRIED = "three values of overhead (1, 4, 6) at random seed 60: 3 variants."

TASKS = (
    Task(
        name="digits",
        arms=ARMS,
        random_seeds=tuple(range(50, 62)),
        settings=_DIGITS,
        quick={**_DIGITS, "epochs": 22},
        runs=functools.partial(runs, "digits"),
        title="Digits: the demo's host of 358 parameters",
        told=_TOLD,
        section="images",
        figure="accuracy",
        unit="accuracy, %, test split",
        digits=2,
        tried=_TRIED,
        missing=no_digits,
    ),
    Task(
        name="Fashion-MNIST",
        arms=ARMS,
        random_seeds=tuple(range(50, 56)),
        settings=_FASHION_MNIST,
        quick={**_FASHION_MNIST, "train_images": 640, "epochs": 22, "test_images": 500},
        runs=functools.partial(runs, "Fashion-MNIST"),
        title="Fashion-MNIST: a host of 640 parameters",
        told=_TOLD,
        section="images",
        figure="accuracy",
        unit="accuracy, %, test split",
        digits=2,
        tried="nothing.",
        missing=no_fashion,
    ),
)
