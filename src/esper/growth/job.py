"""A whole training run as a value, and the loop that trains and grows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Unpack, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from esper.continuity.ensemble import joined
from esper.contracts.arguments import check_type, whole_number
from esper.contracts.choices import SCHEDULES, Schedule
from esper.contracts.errors import GrowthError
from esper.contracts.events import STOPPED
from esper.contracts.progress import Progress
from esper.growth.evaluation import measuring
from esper.growth.grower import Grower
from esper.growth.options import GrowerOptions, check_options
from esper.growth.policies import Never
from esper.growth.settings import GrowthSettings
from esper.wrapping.wrap import wrap

if TYPE_CHECKING:
    from pathlib import Path

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from esper.contracts.report import RunReport
    from esper.growth.batch import Batch, LossFunction
    from esper.growth.suggestion import Suggestions
    from esper.wrapping.select import Select

SUGGEST_SHARE = 0.2
"""Share of a job that is trained before its suggestions are ranked."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GrowthJob:
    """A training run that ``esper grow`` and ``esper suggest`` can take over.

    Attributes:
        model: The model, not wrapped; it is wrapped in place.
        optimizer: What trains its parameters, as for the Grower: one optimizer, or a sequence.
        train: Batches to train on; iterated once an epoch.
        gate: Held-out batches for the gates, in the same order every time; at least 200 samples.
        test: Batches that growth never sees, read once at the end; None without a test split.
        loss: ``(model, batch)`` to per-sample losses, shape (samples,); their mean is trained.
        epochs: Passes over ``train``, at least 1.
        metrics: ``(model, batch)`` to further per-sample figures by name, for example
            ``{"accuracy": correct_N.float()}``; None for none.
        scheduler: Learning-rate scheduler of ``optimizer``; None for a constant rate.
        schedule: Whether ``scheduler`` steps after each ``"epoch"`` or each ``"update"``.
        select: What to wrap, as for :func:`esper.wrap`; None for the default.
        num_seeds: Seeds of each wrapped layer, at least 1.
        grower: Further arguments of the Grower: by name, as it takes them, or
            :class:`GrowthSettings`. ``compute_loss``, ``evaluate`` and ``horizon`` follow from the
            job where they are not among them.

    Raises:
        TypeError: A field is of the wrong type, the optimizer is not supported, or the Grower
            has no argument of that name.
        ValueError: ``epochs`` or ``num_seeds`` is less than 1, a loader is known to be empty, or a
            setting is out of its range.
    """

    model: nn.Module
    optimizer: Optimizer | Sequence[Optimizer]
    train: Iterable[Batch]
    gate: Iterable[Batch]
    loss: LossFunction
    epochs: int
    test: Iterable[Batch] | None = None
    metrics: Callable[[nn.Module, Batch], Mapping[str, Tensor]] | None = None
    scheduler: LRScheduler | None = None
    schedule: Schedule = "epoch"
    select: Select | None = None
    num_seeds: int = 4
    grower: GrowerOptions | GrowthSettings = field(default_factory=GrowerOptions)

    def __post_init__(self) -> None:
        """Refuse a job that cannot run, before anything is trained."""
        expected = {
            "model": (nn.Module, "a torch.nn.Module"),
            "train": (Iterable, "an iterable of batches"),
            "gate": (Iterable, "an iterable of batches"),
            "grower": (Mapping | GrowthSettings, "the Grower's arguments, or GrowthSettings"),
        }
        for name, (kind, words) in expected.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                msg = f"GrowthJob({name}=...) is {words}, got {type(value).__name__}"
                raise TypeError(msg)
        for name in ("epochs", "num_seeds"):
            whole_number(f"GrowthJob({name}=...)", getattr(self, name), least=1)
        self._check_functions()
        if self.schedule not in SCHEDULES:
            msg = f'GrowthJob(schedule=...) is "epoch" or "update", got {self.schedule!r}'
            raise ValueError(msg)
        for name in ("train", "gate", "test"):
            loader = getattr(self, name)
            if isinstance(loader, Sized) and len(loader) == 0:
                raise ValueError(_empty(name))
            is_again = name == "gate" or (name == "train" and self.epochs > 1)
            if is_again and isinstance(loader, Iterator):
                msg = (
                    f"GrowthJob({name}=...): the {name} loader is gone through more than once, got "
                    f"a {type(loader).__name__}, which ends for good; give a list or a DataLoader"
                )
                raise TypeError(msg)
        joined(self.optimizer)
        check_options(options_of(self.grower))

    def _check_functions(self) -> None:
        for name in ("loss", "metrics"):
            function: object = getattr(self, name)
            if not callable(function) and (name == "loss" or function is not None):
                msg = f"GrowthJob({name}=...) is a function, got {type(function).__name__}"
                raise TypeError(msg)
        if self.scheduler is not None and not hasattr(self.scheduler, "step"):
            msg = f"GrowthJob(scheduler=...) has a step(), got {type(self.scheduler).__name__}"
            raise TypeError(msg)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            msg = (
                "GrowthJob(scheduler=...) is stepped without a figure, got ReduceLROnPlateau, "
                "which needs one; step it in a loop of your own, beside a Grower"
            )
            raise TypeError(msg)

    @property
    def horizon(self) -> int | None:
        """Updates of the whole run; None where ``train`` does not know its length."""
        return self.epochs * len(self.train) if isinstance(self.train, Sized) else None

    def compute_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""
        return _per_sample("loss", self.loss(model, batch)).mean()

    def evaluate(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """Return per-sample losses and metrics on the gate split."""
        return self._read(model, self.gate, "gate")

    def test_metrics(self, model: nn.Module) -> dict[str, float]:
        """Read the test split; empty without one. To be called once, after the run."""
        if self.test is None:
            return {}
        with measuring(model):
            losses, metrics = self._read(model, self.test, "test")
        means = {name: float(values.double().mean()) for name, values in metrics.items()}
        return {"loss": float(losses.double().mean()), **means}

    def _read(
        self, model: nn.Module, loader: Iterable[Batch], name: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        losses: list[Tensor] = []
        metrics: dict[str, list[Tensor]] = {}
        for batch in loader:
            losses.append(_per_sample("loss", self.loss(model, batch)).detach())
            found = {} if self.metrics is None else self.metrics(model, batch)
            check_type("GrowthJob(metrics=...)", found, Mapping, "a function to figures by name")
            for key, values in found.items():
                figures = _per_sample(f"metrics[{key!r}]", values)
                metrics.setdefault(key, []).append(figures.detach())
        if not losses:
            raise GrowthError(_empty(name))
        return torch.cat(losses), {key: torch.cat(values) for key, values in metrics.items()}


def _per_sample(name: str, values: object) -> Tensor:
    """Return what an owner's function gave, if that is one figure per sample."""
    if not isinstance(values, Tensor):
        msg = (
            f"GrowthJob({name}=...) returns one figure per sample, a tensor of shape (samples,); "
            f"got {values!r:.80} (a {type(values).__name__})"
        )
        raise GrowthError(msg)
    if values.ndim != 1:
        msg = (
            f"GrowthJob({name}=...) returns one figure per sample, shape (samples,); got shape "
            f'{tuple(values.shape)}. With torch losses, pass reduction="none"'
        )
        raise GrowthError(msg)
    return values


def grow(
    job: GrowthJob,
    *,
    run_dir: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> RunReport:
    """Train a job and grow its model.

    The model stays wrapped, for :func:`esper.unwrap` or :func:`esper.export`. ``KeyboardInterrupt``
    ends the run early: what has no verdict is removed, and the report says that it was stopped.

    Args:
        job: The job; its model is wrapped and trained in place.
        run_dir: Where ``events.jsonl`` is written; None writes no file.
        on_progress: Told after every update.

    Returns:
        The report, with the test split read once where there is one.

    Raises:
        GrowthError: A loader gave no batch.
        ValueError: The model has no layer that can be wrapped.
    """
    grower = grower_for(job, run_dir=run_dir)
    interrupted = train(job, grower, on_progress=on_progress)
    return with_test_metrics(job, replace(grower.report(), interrupted=interrupted))


def grower_for(job: GrowthJob, *, run_dir: Path | None = None) -> Grower:
    """Wrap a job's model in place and return the Grower that will watch its training.

    Args:
        job: The job.
        run_dir: Where ``events.jsonl`` is written; None leaves what the job says.

    Raises:
        ValueError: The model has no layer that can be wrapped.
        OSError: The folder cannot be written.
    """
    wrap(job.model, select=job.select, num_seeds=job.num_seeds)
    job.model.train()
    options = _grower_options(job)
    if run_dir is not None:
        options["run_dir"] = run_dir
    return Grower(job.model, job.optimizer, **options)


def train(
    job: GrowthJob, grower: Grower, *, on_progress: Callable[[Progress], None] | None = None
) -> bool:
    """Train a job to its end and close its Grower, whatever happens.

    Args:
        job: The job.
        grower: What :func:`grower_for` returned for it.
        on_progress: Told after every update.

    Returns:
        Whether ``KeyboardInterrupt`` ended it early.

    Raises:
        GrowthError: A loader gave no batch.
    """
    with grower:
        try:
            for epoch in range(job.epochs):
                _train_epoch(job, grower, epoch, on_progress)
        except KeyboardInterrupt:
            grower.close(STOPPED)
            return True
    return False


def with_test_metrics(job: GrowthJob, report: RunReport) -> RunReport:
    """Read a job's test split, once, and return the report with what was found.

    A figure that is not finite becomes a note: a report is data, and JSON has no such number.
    """
    found = job.test_metrics(job.model)
    finite = {name: value for name, value in found.items() if math.isfinite(value)}
    notes = tuple(f"the test {name} is {found[name]}" for name in found if name not in finite)
    return replace(report, test_metrics=finite, notes=(*report.notes, *notes))


def suggest(
    job: GrowthJob,
    *,
    epochs: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Suggestions:
    """Train a job for a part of its epochs and rank what could be grown.

    Nothing is grafted; the model stays wrapped, every seed dormant.

    Args:
        job: The job; its model is wrapped and trained in place.
        epochs: How many, at least 1; None for a fifth of the job's, at least one.
        on_progress: Told after every update.

    Raises:
        GrowthError: A loader gave no batch.
        ValueError: The model has no layer that can be wrapped, or ``epochs`` is below 1.
    """
    part = max(1, round(SUGGEST_SHARE * job.epochs))
    num_epochs = part if epochs is None else whole_number("epochs", epochs, least=1)
    wrap(job.model, select=job.select, num_seeds=job.num_seeds)
    job.model.train()
    options = _grower_options(job)
    options["policy"] = Never()
    with Grower(job.model, job.optimizer, **options) as grower:
        for epoch in range(num_epochs):
            _train_epoch(job, grower, epoch, on_progress)
        return grower.suggest()


def with_options(
    job: GrowthJob, *, epochs: int | None = None, **options: Unpack[GrowerOptions]
) -> GrowthJob:
    """Return a job that differs in its length and in what its Grower is told.

    Args:
        job: The job; it shares its model, optimizer and loaders with what is returned.
        epochs: Passes over ``train``, which also decide about a horizon that the job names; None
            for the job's own.
        options: Arguments of the Grower, which come before the job's own.

    Raises:
        TypeError: The Grower has no such argument.
        ValueError: A value is out of its range.
    """
    own = dict(options_of(job.grower))
    if epochs is not None:
        own.pop("horizon", None)
    told = cast("GrowerOptions", own | options)  # of two typed dictionaries mypy makes a plain one
    return replace(job, epochs=job.epochs if epochs is None else epochs, grower=told)


def options_of(grower: GrowerOptions | GrowthSettings) -> GrowerOptions:
    """Return the Grower's arguments that a job was given."""
    if not isinstance(grower, GrowthSettings):
        return grower
    options = cast("GrowerOptions", grower.as_options())  # settings are options, the parts unset
    if grower.horizon is None:
        options.pop("horizon")  # the job knows better
    return options


def _grower_options(job: GrowthJob) -> GrowerOptions:
    """Return the Grower's arguments, what follows from the job among them."""
    return {
        "compute_loss": job.compute_loss,
        "evaluate": job.evaluate,
        "horizon": job.horizon,
        **options_of(job.grower),
    }


def _train_epoch(
    job: GrowthJob,
    grower: Grower,
    epoch: int,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    num_batches, given = 0, job.optimizer
    optimizers = given if isinstance(given, Sequence) else [given]
    for batch in job.train:
        num_batches += 1
        loss = job.compute_loss(job.model, batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        for optimizer in optimizers:
            optimizer.step()
        if job.scheduler is not None and job.schedule == "update":
            job.scheduler.step()
        grower.step(loss, batch=batch)
        if on_progress is not None:
            on_progress(_progress(job, grower, epoch, num_batches))
    if num_batches == 0:
        raise GrowthError(_empty("train"))
    if job.scheduler is not None and job.schedule == "epoch":
        job.scheduler.step()
    grower.end_epoch()


def _progress(job: GrowthJob, grower: Grower, epoch: int, batch: int) -> Progress:
    total = job.horizon
    done = grower.updates if total is not None else epoch
    doing = f"epoch {epoch + 1} of {job.epochs}, batch {batch}"
    rows = (grower.progress_row(),)
    return Progress(done=done, total=total or job.epochs, doing=doing, rows=rows)


def _empty(name: str) -> str:
    return (
        f"the {name} loader gave no batch; expected an iterable of batches that can be iterated "
        "again in every epoch (a generator cannot: give a list or a DataLoader)"
    )
