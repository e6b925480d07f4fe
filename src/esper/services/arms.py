"""The arms of the demo at one random seed: host, grown, random choice, and from scratch."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
import torch.nn.functional as F

from esper.compiler.lowering import LoweredKernel, lower
from esper.contracts.events import Ranked
from esper.contracts.progress import ProgressRow
from esper.contracts.report import ArmRun
from esper.growth.budget import Budget, count_parameters, forward_latency_s
from esper.growth.evaluation import measuring
from esper.growth.flops import update_flops
from esper.growth.grower import Grower
from esper.growth.ranking import RandomChoice
from esper.resilience.clock import MonotonicClock
from esper.services.digits import (
    BATCH_SIZE,
    LEARNING_RATE,
    UPDATES_PER_EPOCH,
    Digits,
    batches,
    demo_host,
)
from esper.services.looks import Looks, measure_on
from esper.wrapping.unwrap import unwrap
from esper.wrapping.wrap import layers, wrap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from esper.contracts.blueprint import BlueprintIR
    from esper.contracts.events import Event
    from esper.contracts.ports import EventSink
    from esper.contracts.report import Arm, RunReport
    from esper.growth.options import GrowerOptions

OVERHEAD: Final = 20.0
"""The demo's own, as a ratio to the host's training: its kernels are many times larger than the
host, so that a trial of 200 updates with its null costs more than the whole of a host's run."""
EVALUATE_EVERY: Final = 40
"""The demo's own, every second epoch: enough for the curve that says what going on would bring."""
HOLD_UPDATES: Final = 300
"""The demo's own: which kernels of a package are needed shows late. At the default of 100 some were
taken out in 6 of 16 runs; held for 300, in one of these six, which ended 1.2 points higher."""
FORK_UPDATE: Final = 400
"""Update of the host arm at which the controls begin."""


class Tell(Protocol):
    """What a step of the demo calls now and then."""

    def __call__(self, share: float | None = None, row: ProgressRow | None = None) -> None:
        """Take the share of the step that is done, in [0, 1], and where its run is.

        Raises:
            Stopped: The reader asked to stop.
        """
        ...


class Stopped(Exception):  # noqa: N818 - it is no error
    """The reader asked the demo to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """One arm at one random seed.

    Attributes:
        run: What was seen along the way.
        accuracy: Percent on the test split, mean of the looks after each of the last epochs.
        accuracy_last: Percent on the test split at the end.
        parameters: Parameters of the final model.
        train_flops: FLOPs of the run, training and growing.
        own_flops: FLOPs of the run's training alone.
        latency_us: Microseconds of a forward of one batch of the final model.
        seconds: Wall-clock seconds of the run.
        dip: Worst dip in points of gate accuracy; None where nothing was switched.
    """

    run: ArmRun
    accuracy: float
    accuracy_last: float
    parameters: int
    train_flops: float
    own_flops: float
    latency_us: float
    seconds: float
    dip: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HostFork:
    """The host at a fixed update, to be copied.

    Attributes:
        model: The host, not wrapped.
        optimizer_state: Of its optimizer.
        random_seed: What the batches follow from.
        update: Updates done.
    """

    model: nn.Module
    optimizer_state: dict[str, Any]
    random_seed: int
    update: int

    @classmethod
    def of(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, *, random_seed: int, update: int
    ) -> HostFork:
        """Copy a host that is in training."""
        return cls(
            model=copy.deepcopy(model),
            optimizer_state=copy.deepcopy(optimizer.state_dict()),
            random_seed=random_seed,
            update=update,
        )

    def copy(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return a wrapped copy of the host and an optimizer with the same moments."""
        model = wrap(copy.deepcopy(self.model))
        optimizer = optimizer_for(model)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer_state))
        return model, optimizer

    def batches_after(self, digits: Digits) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches that the host would be trained on next, without an end."""
        epoch = self.update // UPDATES_PER_EPOCH
        while True:
            yield from batches(digits.train, self.random_seed, epoch)
            epoch += 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Host:
    """The host arm.

    Attributes:
        result: The arm.
        looks: What was seen of it.
        fork: It as it was at :data:`FORK_UPDATE`; None where it was not trained that long.
    """

    result: ArmResult
    looks: Looks
    fork: HostFork | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grown:
    """A grown arm with its model.

    Attributes:
        result: The arm.
        model: The grown model, unwrapped to plain PyTorch.
        kernels: Site and blueprint of every kernel that stayed and was not folded.
        predicted: Gain by the arm's ranking, by site and blueprint, of what had a score when it
            first chose.
    """

    result: ArmResult
    model: nn.Module
    kernels: tuple[tuple[str, BlueprintIR], ...]
    predicted: dict[tuple[str, str], float]

    @property
    def switches(self) -> list[int]:
        """Updates after which the live run took a twin's state."""
        report = self.result.run.report
        trials = () if report is None else report.trials
        return [t.decided_at for t in trials if t.taken and t.decided_at is not None]


class _FirstRanking:
    """Keeps the scores of a run's first ranking, and passes every event on.

    Args:
        sink: Where to; None for nobody.
    """

    def __init__(self, sink: EventSink | None) -> None:
        self._sink = sink
        self.gains: dict[tuple[str, str], float] = {}

    def publish(self, event: Event) -> None:
        """Take one event."""
        if isinstance(event, Ranked) and not self.gains:
            for row in event.rows:
                gain = row["gain"]
                if isinstance(gain, float):
                    self.gains[str(row["site"]), str(row["blueprint"])] = gain
        if self._sink is not None:
            self._sink.publish(event)


def compute_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross entropy of a batch."""
    x_N1HW, y_N = batch
    return F.cross_entropy(model(x_N1HW), y_N)


def optimizer_for(model: nn.Module) -> torch.optim.AdamW:
    """Return the demo's optimizer."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def train_on(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]
) -> Tensor:
    """Do one update; return the loss."""
    loss = compute_loss(model, batch)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    optimizer.step()
    return loss


def host_arm(digits: Digits, random_seed: int, epochs: int, tell: Tell) -> Host:
    """Train the host alone."""
    return _plain_arm("host", demo_host(random_seed), digits, random_seed, epochs, tell)


def scratch_arm(
    digits: Digits,
    random_seed: int,
    epochs: int,
    kernels: tuple[tuple[str, BlueprintIR], ...],
    tell: Tell,
) -> ArmResult:
    """Train a network of the grown network's final shape for the same number of updates."""
    model = wrap(demo_host(random_seed))
    for site, blueprint in kernels:
        layer = layers(model)[site]
        seed_idx = next(i for i in range(layer.num_seeds) if layer.seed_kernel(i) is None)
        example = inputs_of(model, layer, digits)
        layer.graft(seed_idx, lower(blueprint), alpha=1.0, example=example)
    return _plain_arm("scratch", unwrap(model), digits, random_seed, epochs, tell).result


def grown_arm(
    digits: Digits,
    random_seed: int,
    epochs: int,
    tell: Tell,
    *,
    random_choice: bool = False,
    sink: EventSink | None = None,
) -> Grown:
    """Train and grow the host; with ``random_choice`` by random kernels of each site.

    Args:
        digits: The splits; the controller gets the training batches and the gate split.
        random_seed: Starts weights, batches and the controller.
        epochs: Epochs of 20 updates.
        tell: Told about the progress; may raise :class:`Stopped`.
        random_choice: Whether this is the random arm.
        sink: Takes every event of the run; None for nobody.
    """
    arm: Arm = "random" if random_choice else "grown"
    model = wrap(demo_host(random_seed))
    optimizer = optimizer_for(model)
    start = time.perf_counter()
    ranking = _FirstRanking(sink)
    options = _growing_options(digits, random_seed, epochs)
    options["sink"] = ranking
    if random_choice:
        options["ranking"] = RandomChoice(random_seed)
    looks = Looks()
    with Grower(model, optimizer, **options) as grower:
        for epoch in range(epochs):
            row = grower.progress_row(arm)
            tell(epoch / epochs, replace(row, metrics={**row.metrics, **looks.metrics}))
            for batch in batches(digits.train, random_seed, epoch):
                grower.step(train_on(model, optimizer, batch), batch=batch)
                looks.after_update(grower.updates, model, digits)
            looks.after_epoch(epochs - 1 - epoch, model, digits)
    report, kernels, plain = grower.report(), _standing_kernels(model), unwrap(model)
    result = _result(
        arm,
        plain,
        digits,
        looks,
        random_seed,
        report,
        flops=report.work,
        seconds=time.perf_counter() - start,
    )
    grown = Grown(result=result, model=plain, kernels=kernels, predicted=ranking.gains)
    return replace(grown, result=replace(result, dip=looks.worst_dip(grown.switches)))


def _growing_options(digits: Digits, random_seed: int, epochs: int) -> GrowerOptions:
    """Return how the demo grows, whoever chooses the kernels."""
    return {
        "compute_loss": compute_loss,
        "evaluate": measure_on(digits.gate),
        "horizon": epochs * UPDATES_PER_EPOCH,
        "overhead": OVERHEAD,
        "budget": Budget(packages=1),
        "evaluate_every": EVALUATE_EVERY,
        "hold_updates": HOLD_UPDATES,
        "random_seed": random_seed,
    }


def _standing_kernels(model: nn.Module) -> tuple[tuple[str, BlueprintIR], ...]:
    """Return site and blueprint of every kernel that stands in a model."""
    return tuple(
        (name, kernel.blueprint)
        for name, layer in layers(model).items()
        for kernel in map(layer.seed_kernel, range(layer.num_seeds))
        if isinstance(kernel, LoweredKernel)
    )


def _plain_arm(
    arm: Arm,
    model: nn.Module,
    digits: Digits,
    random_seed: int,
    epochs: int,
    tell: Tell,
) -> Host:
    optimizer = optimizer_for(model)
    start = time.perf_counter()
    looks, update, fork = Looks(), 0, None
    for epoch in range(epochs):
        parameters = count_parameters(model)
        row = ProgressRow(name=arm, update=update, metrics=looks.metrics, parameters=parameters)
        tell(epoch / epochs, row)
        if update == FORK_UPDATE:
            fork = HostFork.of(model, optimizer, random_seed=random_seed, update=update)
        for batch in batches(digits.train, random_seed, epoch):
            train_on(model, optimizer, batch)
            update += 1
            looks.after_update(update, model, digits)
        looks.after_epoch(epochs - 1 - epoch, model, digits)
    batch = next(batches(digits.train, random_seed, 0))
    flops = {"training": update_flops(model, compute_loss, batch) * update}
    seconds = time.perf_counter() - start
    result = _result(arm, model, digits, looks, random_seed, None, flops=flops, seconds=seconds)
    return Host(result=result, looks=looks, fork=fork)


def _result(
    arm: Arm,
    model: nn.Module,
    digits: Digits,
    looks: Looks,
    random_seed: int,
    report: RunReport | None,
    *,
    flops: Mapping[str, float],
    seconds: float,
) -> ArmResult:
    x_N1HW = digits.test.x_N1HW[:BATCH_SIZE]
    return ArmResult(
        run=ArmRun(
            arm=arm,
            random_seed=random_seed,
            updates=tuple(looks.accuracy),
            accuracy=tuple(looks.accuracy.values()),
            parameters=tuple(looks.parameters.values()),
            test_accuracy=tuple(looks.test),
            report=report,
        ),
        accuracy=looks.test_accuracy,
        accuracy_last=looks.test[-1],
        parameters=count_parameters(model),
        train_flops=sum(flops.values()),
        own_flops=flops["training"],
        latency_us=1e6 * forward_latency_s(model, x_N1HW, clock=MonotonicClock()),
        seconds=seconds,
        dip=None,
    )


def inputs_of(model: nn.Module, layer: nn.Module, digits: Digits) -> Tensor:
    """Return what reaches a layer for a batch."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with handle, measuring(model):
        model(digits.train.x_N1HW[:BATCH_SIZE])
    return seen[0]
