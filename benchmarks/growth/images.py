"""Small models that are grown over epochs; and two of them, the demo's digits and Fashion-MNIST.

What a run came to is the mean over its last ten epochs, since at a constant rate the accuracy of
the last one alone differs between equal runs by more than a point.
"""

import copy
import functools
import gzip
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

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
"""Last epochs whose mean is a run's."""

ARMS = ("host", "grown", "null", "scratch", "random", "defaults")
EARLY = 40
"""The arm `early` may grow whenever one such part of the run is over."""
Batch = tuple[Tensor, Tensor]
Kernels = tuple[tuple[str, BlueprintIR], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """Images and their labels, shapes (N, 1, height, width) and (N,); or other inputs, targets."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """What is trained on, what decides, and what is told."""

    train: Images
    gate: Images
    test: Images


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is trained, on what, and how it is read.

    Attributes:
        splits: Of the settings.
        host: Of a random seed, a network.
        compute_loss: Model and batch to the loss.
        measure: Of the gate split, the owner's measure.
        look: Model and the test split to figures, by name.
        digest: What tells the data apart where it depends on the machine.
    """

    splits: Callable[[Mapping[str, Any]], Splits]
    host: Callable[[int], nn.Module]
    compute_loss: Callable[[nn.Module, Batch], Tensor]
    measure: Callable[[Images], Callable[[nn.Module], Any]]
    look: Callable[[nn.Module, Images], Mapping[str, float]]
    digest: Callable[[], str] = lambda: ""


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


class Update(Protocol):
    """How a model is updated where that is not by its loss alone, in the loop and in twins."""

    def shown(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Return what twins get of a batch of the live run."""
        ...

    def __call__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...]
    ) -> Tensor:
        """Do an update, and return its loss."""
        ...


class Run:
    """One arm at one random seed.

    Args:
        subject: What is trained.
        settings: How long, and how.
        random_seed: Of weights and batches.
        model: The host, or one that grows or has grown from it.
        update: How it is updated; None: by its loss.
    """

    def __init__(
        self,
        subject: Subject,
        settings: Mapping[str, Any],
        random_seed: int,
        model: nn.Module,
        update: Update | None = None,
    ) -> None:
        self.subject, self.settings, self.random_seed = subject, settings, random_seed
        self._own_update = update
        self.splits, self.model = subject.splits(settings), model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=settings["rate"])
        self.looks: list[Mapping[str, float]] = []
        self.null_looks: list[Mapping[str, float]] = []
        self.seconds = 0.0

    def train(self, grower: esper.Grower | None = None) -> None:
        """Train to the end; looks at the test split are the benchmark's, and are not timed."""
        for epoch in range(self.settings["epochs"]):
            begin = time.perf_counter()
            for batch in self._batches(epoch):
                shown, loss = self._update(batch)
                if grower is not None:
                    grower.step(loss, batch=shown)
            if grower is not None:
                grower.end_epoch()
            self.seconds += time.perf_counter() - begin
            if epoch >= self.settings["epochs"] - LOOKS:
                self._look(grower)

    def _update(self, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Do an update; return what twins get of the batch, and the loss."""
        if self._own_update is not None:
            shown = self._own_update.shown(self.model, batch)
            return shown, self._own_update(self.model, self.optimizer, shown)
        loss = self.subject.compute_loss(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return batch, loss

    @property
    def updates(self) -> int:
        """How many there are in all."""
        return self.settings["epochs"] * math.ceil(self._samples / self.settings["batch"])

    @property
    def _samples(self) -> int:
        """How many an epoch takes: all, or as many as the settings say."""
        num = len(self.splits.train.y)
        return min(num, self.settings.get("samples_an_epoch", num))

    @property
    def figures(self) -> dict[str, float]:
        """Figures of the test split, means of the last looks."""
        return {name: statistics.fmean(look[name] for look in self.looks) for name in self.looks[0]}

    def training_flops(self) -> float:
        """Return the FLOPs of training alone, at the shape that the model has now."""
        each = update_flops(self.model, self.subject.compute_loss, next(self._batches(0)))
        return float(each) * self.updates

    def _batches(self, epoch: int) -> Iterator[Batch]:
        train, size = self.splits.train, self.settings["batch"]
        generator = torch.Generator().manual_seed(self.random_seed * 100_003 + epoch)
        order = torch.randperm(len(train.y), generator=generator)
        for rows in order[: self._samples].split(size):
            yield train.x[rows], train.y[rows]

    def _look(self, grower: esper.Grower | None) -> None:
        self.looks.append(self.subject.look(self.model, self.splits.test))
        beside = None if grower is None else grower._run.null_beside  # noqa: SLF001 - no owner asks for it
        if beside is not None:
            null = beside._arm.twin.model  # noqa: SLF001 - as above
            self.null_looks.append(self.subject.look(null, self.splits.test))


def accuracy(model: nn.Module, split: Images) -> dict[str, float]:
    """Look at a classifier: percent of a split."""
    with measuring(model):
        return {"accuracy": 100 * float((model(split.x).argmax(1) == split.y).float().mean())}


def measure(split: Images) -> Any:
    """Return the owner's measure: per-sample Brier scores, and who was right."""

    def evaluate(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        logits_NC = model(split.x)
        error_NC = logits_NC.softmax(1) - F.one_hot(split.y, logits_NC.shape[1])
        return error_NC.square().sum(1), {"accuracy": (logits_NC.argmax(1) == split.y).float()}

    return evaluate


def runs(
    task: str,
    subject: Subject,
    random_seed: int,
    missing: Collection[str],
    settings: Mapping[str, Any],
) -> Iterator[Result]:
    """Run the missing arms of a random seed; null and scratch need what was grown.

    Where the settings name no ``overhead``, `grown` and `random` have every default.
    """

    def run(model: nn.Module) -> Run:
        return Run(subject, settings, random_seed, model)

    def host() -> nn.Module:
        return subject.host(random_seed)

    seeded = {"random_seed": random_seed}
    given = {**seeded, "overhead": settings["overhead"]} if "overhead" in settings else {}
    if "host" in missing:
        plain = run(host())
        plain.train()
        yield _result(task, "host", plain, plain.training_flops(), parameters=_size(plain.model))
    if {"grown", "null", "scratch"} & {*missing}:
        kernels, results = _grown_with_null(task, run(esper.wrap(host())), given)
        yield from (each for each in results if each.arm in missing)
        if "scratch" in missing:
            shaped = run(_shaped(host(), kernels, subject.splits(settings).train.x[:2]))
            shaped.train()
            flops, size = shaped.training_flops(), _size(shaped.model)
            yield _result(task, "scratch", shaped, flops, parameters=size)
    if "random" in missing:
        ranking = esper.RandomChoice(random_seed)
        yield grow(task, "random", run(esper.wrap(host())), **given, ranking=ranking)[0]
    if "defaults" in missing:
        yield grow(task, "defaults", run(esper.wrap(host())), **seeded)[0]
    if "early" in missing:
        begun = run(esper.wrap(host()))
        policy = esper.EveryN(begun.updates // EARLY)
        yield grow(task, "early", begun, **seeded, policy=policy)[0]


def _grown_with_null(task: str, run: Run, given: Mapping[str, Any]) -> tuple[Kernels, list[Result]]:
    """Grow; a null that trains beside to the end is an arm of its own."""
    attribution = {"attribution": "run"} if given else {}
    grown, null_flops = grow(task, "grown", run, **given, **attribution)
    null = copy.copy(run)
    null.looks = run.null_looks or run.looks
    figures = {"beside": float(bool(run.null_looks))}
    result = _result(task, "null", null, null_flops, **figures)
    return _kernels(run.model), [grown, result]


def grow(task: str, arm: str, run: Run, **options: Any) -> tuple[Result, float]:
    """Train with a Grower; return the result and the FLOPs of a training that is as large."""
    grower = esper.Grower(
        run.model,
        run.optimizer,
        compute_loss=run.subject.compute_loss,
        evaluate=run.subject.measure(run.splits.gate),
        horizon=run.updates,
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
    digest = run.subject.digest()
    return Result(
        task=task,
        arm=arm,
        random_seed=run.random_seed,
        settings={**run.settings},
        figures={**run.figures, **figures},
        flops=flops,
        seconds=run.seconds,
        details={**(details or {}), **({"data": digest} if digest else {})},
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


DIGITS_SUBJECT = Subject(
    splits=digits_splits,
    host=demo_host,
    compute_loss=compute_loss,
    measure=measure,
    look=accuracy,
)
FASHION_SUBJECT = replace(DIGITS_SUBJECT, splits=fashion_splits, host=fashion_host)
DIGITS = {"epochs": 60, "batch": 32, "rate": LEARNING_RATE, "overhead": 6.0}
FASHION_MNIST = {
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
_TRIED_ON_FASHION = """\
at random seed 60, where the host ends at 77.7 and the defaults at 81.3: no warm-up of new
parameters 82.0; growth due every 94 updates (`EveryN(94)`), so that the first package joins at 3 %
of the run in place of 10 %, 83.6, with two packages in place of one (the arm `early` since, which
over six random seeds ends where the defaults do); due every 376, a recording of 64 updates, and the
peak rate for new parameters each as the defaults: 5 variants. Initial values, moments, distillation
and muP's rates stand in the next section."""

TASKS = (
    Task(
        name="digits",
        arms=ARMS,
        random_seeds=tuple(range(50, 62)),
        settings=DIGITS,
        quick={**DIGITS, "epochs": 22},
        runs=functools.partial(runs, "digits", DIGITS_SUBJECT),
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
        arms=(*ARMS, "early"),
        random_seeds=tuple(range(50, 56)),
        settings=FASHION_MNIST,
        quick={**FASHION_MNIST, "train_images": 640, "epochs": 22, "test_images": 500},
        runs=functools.partial(runs, "Fashion-MNIST", FASHION_SUBJECT),
        title="Fashion-MNIST: a host of 640 parameters",
        told=f"{_TOLD} `early` is `defaults` with `policy=EveryN(94)`, a fortieth of the run.",
        section="images",
        figure="accuracy",
        unit="accuracy, %, test split",
        digits=2,
        tried=_TRIED_ON_FASHION,
        missing=no_fashion,
    ),
)
