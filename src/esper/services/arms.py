"""The arms of the demo at one random seed: host, grown, random choice, and from scratch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

import torch
import torch.nn.functional as F

from esper.compiler.lowering import LoweredKernel, lower
from esper.contracts.progress import ProgressRow
from esper.contracts.report import ArmRun
from esper.growth.budget import count_parameters, forward_latency_s
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
    Split,
    batches,
    demo_host,
)
from esper.wrapping.unwrap import unwrap
from esper.wrapping.wrap import layers, wrap

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from esper.contracts.blueprint import BlueprintIR
    from esper.contracts.ports import EventSink
    from esper.contracts.report import Arm, RunReport
    from esper.growth.options import GrowerOptions

LOOK_EVERY: Final = 10
DIP_UPDATES: Final = 200
OVERHEAD: Final = 4.0
"""The demo's own: twins beside a run this short cost more than the run itself."""


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
        accuracy: Percent on the test split, read once at the end.
        parameters: Parameters of the final model.
        train_flops: FLOPs of the run, training and growing.
        latency_us: Microseconds of a forward of one batch of the final model.
        seconds: Wall-clock seconds of the run.
        dip: Worst dip in points of gate accuracy; None where nothing changed.
    """

    run: ArmRun
    accuracy: float
    parameters: int
    train_flops: float
    latency_us: float
    seconds: float
    dip: float | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grown:
    """A grown arm with its model.

    Attributes:
        result: The arm.
        model: The grown model, unwrapped to plain PyTorch.
        kernels: Site and blueprint of every kernel that stayed and was not folded.
    """

    result: ArmResult
    model: nn.Module
    kernels: tuple[tuple[str, BlueprintIR], ...]


@dataclass(slots=True, kw_only=True)
class Looks:
    """Gate accuracy in percent at every tenth update, of a model and of a twin beside it.

    Attributes:
        accuracy: Percent by update.
        parameters: Parameters of the model by update.
        twin: Percent of the twin by update, while there is one.
    """

    accuracy: dict[int, float] = field(default_factory=dict)
    parameters: dict[int, int] = field(default_factory=dict)
    twin: dict[int, float] = field(default_factory=dict)


def compute_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross entropy of a batch."""
    x_N1HW, y_N = batch
    return F.cross_entropy(model(x_N1HW), y_N)


def measure_on(split: Split) -> Callable[[nn.Module], tuple[Tensor, dict[str, Tensor]]]:
    """Return the owner's measure on a split: per-sample Brier scores, and who was right.

    The Brier score, the squared error of the probabilities, follows what the arms are compared
    by, their accuracy; cross entropy is dominated by the few most overconfident errors.
    """

    def evaluate(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        logits_NC = model(split.x_N1HW)
        error_NC = logits_NC.softmax(1) - F.one_hot(split.y_N, logits_NC.shape[1])
        return error_NC.square().sum(1), {"accuracy": (logits_NC.argmax(1) == split.y_N).float()}

    return evaluate


def accuracy_on(split: Split, model: nn.Module) -> float:
    """Return the accuracy in percent; modes and random state stay."""
    with measuring(model):
        return 100 * float(measure_on(split)(model)[1]["accuracy"].mean())


def optimizer_for(model: nn.Module) -> torch.optim.AdamW:
    """Return the demo's optimizer."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def train_on(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]
) -> Tensor:
    """Do one update; return the loss."""
    loss = compute_loss(model, batch)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    optimizer.step()
    return loss


def host_arm(digits: Digits, random_seed: int, epochs: int, tell: Tell) -> tuple[ArmResult, Looks]:
    """Train the host alone."""
    return _plain_arm("host", demo_host(random_seed), digits, random_seed, epochs, tell)


def grown_arm(
    digits: Digits,
    random_seed: int,
    epochs: int,
    host: Looks,
    tell: Tell,
    *,
    random_choice: bool = False,
    sink: EventSink | None = None,
) -> Grown:
    """Train and grow the host; with ``random_choice`` one random kernel at one random site.

    Args:
        digits: The splits.
        random_seed: Starts weights, batches and the controller.
        epochs: Epochs of 20 updates.
        host: Looks of the host arm at the same random seed, for the dips.
        tell: Told about the progress; may raise :class:`Stopped`.
        random_choice: Whether this is the random arm.
        sink: Takes every event of the run; None for nobody.
    """
    arm: Arm = "random" if random_choice else "grown"
    model = wrap(demo_host(random_seed))
    optimizer = optimizer_for(model)
    start = time.perf_counter()
    options = _growing_options(digits, random_seed, epochs)
    options["sink"] = sink
    if random_choice:
        options["ranking"], options["candidates"] = RandomChoice(random_seed), 1
    grower = Grower(model, optimizer, **options)
    looks = Looks()
    with grower:
        for epoch in range(epochs):
            row = grower.progress_row(arm)
            tell(epoch / epochs, replace(row, metrics={**row.metrics, **_last(looks)}))
            for batch in batches(digits.train, random_seed, epoch):
                grower.step(train_on(model, optimizer, batch), batch=batch)
                _look(looks, grower.updates, model, digits, grower.host_twin)
            grower.end_epoch()
    report, kernels, plain = grower.report(), _standing_kernels(model), unwrap(model)
    result = _result(
        arm,
        plain,
        digits,
        looks,
        random_seed,
        report,
        flops=sum(report.work.values()),
        seconds=time.perf_counter() - start,
        dip=worst_dip(report, looks, host),
    )
    return Grown(result=result, model=plain, kernels=kernels)


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
    return _plain_arm("scratch", unwrap(model), digits, random_seed, epochs, tell)[0]


def _growing_options(digits: Digits, random_seed: int, epochs: int) -> GrowerOptions:
    """Return how the demo grows, whoever chooses the kernels."""
    return {
        "compute_loss": compute_loss,
        "evaluate": measure_on(digits.gate),
        "horizon": epochs * UPDATES_PER_EPOCH,
        "overhead": OVERHEAD,
        "verify": "fork",
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


def worst_dip(report: RunReport, looks: Looks, host: Looks) -> float | None:
    """Return the worst dip of gate accuracy after a change, less that of the host-only twin.

    The dip is the largest fall below the value at the change, looked at every 10 updates for 200
    updates after each change of stage of an admitted graft. The twin is the graft's own host-only
    twin while there is one, and the host arm after the fork has ended.
    """
    admitted = {g.graft: g for g in report.grafts if g.admitted_at is not None}
    changes = {t.update for t in report.timeline if t.graft in admitted and t.before is not None}
    dips = [_dip_after(change, looks, host) for change in sorted(changes)]
    known = [dip for dip in dips if dip is not None]
    return max(known) if known else None


def _dip_after(change: int, looks: Looks, host: Looks) -> float | None:
    start = change - change % LOOK_EVERY
    window = [u for u in looks.accuracy if start <= u <= start + DIP_UPDATES]
    if not window:
        return None
    first = window[0]
    fall = looks.accuracy[first] - min(looks.accuracy[u] for u in window)
    forked = [u for u in window if u in looks.twin and first in looks.twin]
    falls = [looks.twin[first] - looks.twin[u] for u in forked]
    falls += [host.accuracy[first] - host.accuracy[u] for u in window if u not in forked]
    return fall - max(falls)


def _plain_arm(
    arm: Arm,
    model: nn.Module,
    digits: Digits,
    random_seed: int,
    epochs: int,
    tell: Tell,
) -> tuple[ArmResult, Looks]:
    optimizer = optimizer_for(model)
    start = time.perf_counter()
    looks, update = Looks(), 0
    for epoch in range(epochs):
        row = ProgressRow(
            name=arm, update=update, metrics=_last(looks), parameters=count_parameters(model)
        )
        tell(epoch / epochs, row)
        for batch in batches(digits.train, random_seed, epoch):
            train_on(model, optimizer, batch)
            update += 1
            _look(looks, update, model, digits, None)
    batch = next(batches(digits.train, random_seed, 0))
    flops = update_flops(model, compute_loss, batch) * update
    seconds = time.perf_counter() - start
    result = _result(
        arm, model, digits, looks, random_seed, None, flops=flops, seconds=seconds, dip=None
    )
    return result, looks


def _look(
    looks: Looks, update: int, model: nn.Module, digits: Digits, twin: nn.Module | None
) -> None:
    if update % LOOK_EVERY:
        return
    looks.accuracy[update] = accuracy_on(digits.gate, model)
    looks.parameters[update] = count_parameters(model)
    if twin is not None:
        looks.twin[update] = accuracy_on(digits.gate, twin)


def _result(
    arm: Arm,
    model: nn.Module,
    digits: Digits,
    looks: Looks,
    random_seed: int,
    report: RunReport | None,
    *,
    flops: float,
    seconds: float,
    dip: float | None,
) -> ArmResult:
    x_N1HW = digits.test.x_N1HW[:BATCH_SIZE]
    return ArmResult(
        run=ArmRun(
            arm=arm,
            random_seed=random_seed,
            updates=tuple(looks.accuracy),
            accuracy=tuple(looks.accuracy.values()),
            parameters=tuple(looks.parameters.values()),
            report=report,
        ),
        accuracy=accuracy_on(digits.test, model),
        parameters=count_parameters(model),
        train_flops=flops,
        latency_us=1e6 * forward_latency_s(model, x_N1HW, clock=MonotonicClock()),
        seconds=seconds,
        dip=dip,
    )


def _last(looks: Looks) -> dict[str, float]:
    """Return the accuracy of the last look, as a share; nothing before the first."""
    percent = next(reversed(looks.accuracy.values()), None)
    return {} if percent is None else {"accuracy": percent / 100}


def inputs_of(model: nn.Module, layer: nn.Module, digits: Digits) -> Tensor:
    """Return what reaches a layer for a batch."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with handle, measuring(model):
        model(digits.train.x_N1HW[:BATCH_SIZE])
    return seen[0]
