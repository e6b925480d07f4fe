"""A user's job, from its name to a model that is kept and a report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from esper.contracts.errors import GrowthError
from esper.resilience.attempt import Failed, attempt
from esper.services.interrupts import Interrupts
from esper.services.job_options import JobOptions, random_start, start_random
from esper.services.target import find_function, make_job

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from esper.contracts.progress import Progress
    from esper.contracts.report import RunReport
    from esper.growth.grower import Grower
    from esper.growth.job import GrowthJob
    from esper.growth.suggestion import Suggestions
    from esper.services.sinks import RunSinks

    Tell = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRun:
    """A job that was trained, and whose model is kept.

    Attributes:
        report: What happened, with the test split read once where there is one.
        folder: Where ``events.jsonl`` is, and where the report belongs.
        problems: What could not be done, in words to the owner.
        error: What ended the training before its end; None where nothing did.
    """

    report: RunReport
    folder: Path
    problems: tuple[str, ...] = ()
    error: BaseException | None = None


def run_job(
    target: str,
    *,
    run_dir: Path,
    options: JobOptions | None = None,
    on_progress: Tell | None = None,
    on_held: Callable[[], None] | None = None,
    sinks: RunSinks | None = None,
) -> JobRun:
    """Train and grow the job that ``target`` names, and keep its model before anything else.

    Whatever ends the training, an error after the first update and Ctrl-C included, the model is
    written as it is then. Test split and control come after that, and the report is the caller's
    to print and to write: nothing of it can cost the model any more.

    Args:
        target: ``"package.module:function"``.
        run_dir: Folder of the run; one beside it is numbered where it holds a run already.
        options: What is other than in the job.
        on_progress: Told after every update.
        on_held: Called for each Ctrl-C that waits for the model to be written.
        sinks: Where the run is told besides its log; the caller closes them.

    Raises:
        GrowthError: The target or an option is wrong, or a loader gave no batch.
        ValueError: The model has no layer that can be wrapped, or an option is out of its range.
        OSError: The folder cannot be written; nothing was trained.
    """
    options = options or JobOptions()
    job, control = _jobs(target, options)
    start = random_start()
    from esper.growth.job import grower_for

    job = job if sinks is None else _told_to(sinks, job)
    grower = grower_for(job, run_dir=run_dir)
    told = _part_of(on_progress, 0, parts=1 if control is None else 2)
    run = _train(job, grower, told, on_held)
    if control is None or run.report.interrupted:
        return run
    start()
    return _with_control(run, control, _part_of(on_progress, 1, parts=2))


def _jobs(target: str, options: JobOptions) -> tuple[GrowthJob, GrowthJob | None]:
    """Make the job and, where it is asked for, its control, both from the same random numbers."""
    function = find_function(target)
    if options.random_seed is not None:
        start_random(options.random_seed)
    if not options.control:
        return options.apply(make_job(target, function)), None
    start = random_start()
    job = options.apply(make_job(target, function))
    start()
    control = options.apply(make_job(target, function))
    own = {id(p) for p in job.model.parameters()}
    if job.model is control.model or any(id(p) in own for p in control.model.parameters()):
        msg = (
            f"{target}() returned the same model when it was called again; --control trains a "
            "second one: make model, optimizer and loaders inside the function"
        )
        raise GrowthError(msg)
    return job, control


def _told_to(sinks: RunSinks, job: GrowthJob) -> GrowthJob:
    """Return a job whose run is told to sinks, and to the job's own as before."""
    from esper.growth.job import options_of, with_options

    return with_options(job, sink=sinks.beside(options_of(job.grower).get("sink")))


def _train(
    job: GrowthJob,
    grower: Grower,
    on_progress: Tell | None,
    on_held: Callable[[], None] | None,
) -> JobRun:
    """Train a job, keep its model, and only then read its test split."""
    from esper.services.keeping import keep_model

    assert grower.run_dir is not None, "it was made with one"
    with Interrupts(on_held) as interrupts:
        stopped, error = _trained(job, grower, on_progress)
        interrupts.hold()
        if error is not None and grower.updates == 0:
            raise error
        kept = keep_model(job.model, grower.run_dir / "model", example=grower.example)
    report = replace(grower.report(), interrupted=stopped or error is not None)
    run = JobRun(report=report, folder=grower.run_dir, problems=kept.problems, error=error)
    return run if error is not None or interrupts.num_held else _tested(job, run)


def _trained(
    job: GrowthJob, grower: Grower, on_progress: Tell | None
) -> tuple[bool, BaseException | None]:
    """Train a job; say whether it was stopped, and which error ended it."""
    from esper.growth.job import train

    try:
        outcome = attempt(lambda: train(job, grower, on_progress=on_progress))
    except KeyboardInterrupt:
        return True, None
    except SystemExit as error:
        return False, error
    return (False, outcome.error) if isinstance(outcome, Failed) else (outcome.value, None)


def _tested(job: GrowthJob, run: JobRun) -> JobRun:
    """Read the test split of a run whose model is kept; what fails is a problem, and no more."""
    from esper.growth.job import with_test_metrics

    try:
        read = attempt(lambda: with_test_metrics(job, run.report))
    except KeyboardInterrupt:
        problem = "the test split was not read: you stopped it"
        report = replace(run.report, interrupted=True)
        return replace(run, report=report, problems=(*run.problems, problem))
    if isinstance(read, Failed):
        problem = f"the test split could not be read: {read}"
        return replace(run, problems=(*run.problems, problem))
    return replace(run, report=read.value)


def _with_control(run: JobRun, control: GrowthJob, on_progress: Tell | None) -> JobRun:
    """Train the same job without growth and put its report beside the run's."""
    from esper.growth.job import grow, with_options
    from esper.growth.policies import Never

    alone = with_options(control, policy=Never(), run_dir=None, sink=None, registry=None)
    try:
        found = attempt(lambda: grow(alone, on_progress=on_progress))
    except KeyboardInterrupt:
        found = Failed(GrowthError("you stopped it"))
    if isinstance(found, Failed):
        problem = f"the control has no result: {found.error}"
        return replace(run, problems=(*run.problems, problem))
    if found.value.interrupted:
        return replace(run, problems=(*run.problems, "the control has no result: you stopped it"))
    return replace(run, report=replace(run.report, control=found.value))


def _part_of(on_progress: Tell | None, part: int, *, parts: int) -> Tell | None:
    """Return what tells the progress of one part of several that are equally long."""
    if on_progress is None or parts == 1:
        return on_progress

    def told(progress: Progress) -> None:
        doing = f"control, {progress.doing}" if part else progress.doing
        done, total = progress.done + part * progress.total, parts * progress.total
        on_progress(replace(progress, done=done, total=total, doing=doing))

    return told


def suggest_for(
    target: str, *, options: JobOptions | None = None, on_progress: Tell | None = None
) -> Suggestions:
    """Train the job that ``target`` names for a while, graft nothing, and rank what could grow.

    Args:
        target: ``"package.module:function"``.
        options: What is other than in the job; its epochs are those that are trained, in place of
            a fifth of the job's, and there is no control.
        on_progress: Told after every update.

    Raises:
        GrowthError: The target or an option is wrong, or a loader gave no batch.
        ValueError: The model has no layer that can be wrapped, or an option is out of its range.
    """
    options = options or JobOptions()
    job, _ = _jobs(target, replace(options, epochs=None, control=False))
    from esper.growth.job import suggest

    return suggest(job, epochs=options.epochs, on_progress=on_progress)
