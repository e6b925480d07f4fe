"""The ``esper`` command and its subcommands."""

from __future__ import annotations

import logging
import sys
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from esper.cli import blueprints, compiling, dashboard, kernels, registry, report, watching
from esper.cli.console import console
from esper.cli.outcome import EXIT_ERROR, EXIT_PROBLEM, EXIT_STOPPED, one_line_errors
from esper.contracts.errors import EsperError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.contracts.events import Event
    from esper.contracts.ports import Registry
    from esper.contracts.report import DemoReport, RunReport
    from esper.services.run_job import JobRun
    from esper.services.settings import Environment

ENVIRONMENT: Final = (
    "Environment: ESPER_RUN_DIR is the folder under which runs are written (by default `runs`); "
    "ESPER_TRACEBACK=1 shows an error with its whole traceback; URZA_API_URL is the registry of "
    "`esper grow`, URZA_API_TOKEN its token; ESPER_REPORT_TO are its trackers, ESPER_METRICS_PORT "
    "its page for Prometheus, OTEL_EXPORTER_OTLP_ENDPOINT its collector of traces."
)

app = typer.Typer(
    name="esper",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(registry.app)
app.add_typer(kernels.app)
app.add_typer(blueprints.app)
app.command("compile", epilog=blueprints.ENVIRONMENT)(compiling.compile_file)
app.command(epilog=watching.ENVIRONMENT)(watching.watch)
app.command("compile-worker", epilog=compiling.ENVIRONMENT)(compiling.work)
app.command("report")(report.report)
app.command("dashboard", epilog=watching.ENVIRONMENT)(dashboard.dashboard)

Target = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FUNCTION",
        help="A function that returns an esper.GrowthJob, for example train:job.",
    ),
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        help="Where the run's files are written; numbered where it holds a run already. "
        "By default a folder under ESPER_RUN_DIR.",
    ),
]
Epochs = Annotated[
    int | None, typer.Option(min=1, help="Passes over the training data, other than the job's.")
]
SuggestEpochs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Passes over the training data before the ranking; a fifth of the job's if left out.",
    ),
]
Overhead = Annotated[
    float | None,
    typer.Option(help="What growing may take, in FLOPs, as a ratio to those of training."),
]
RandomSeed = Annotated[
    int | None,
    typer.Option(help="Starts Python's, numpy's and torch's generators before the job is made."),
]
BudgetLimits = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="LIMIT",
        help="What growth may add: a share of the host's parameters (0.2), or a limit of "
        "esper.Budget by name (packages=2, flops=none); may be repeated.",
    ),
]
RegistryAddress = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="ADDRESS",
        help="Take kernels from there and publish there: a directory, http://, https://, oci:// "
        "or hf://. By default URZA_API_URL.",
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TRACKER",
        help="A tracker that the run reports to, by its name in accelerate: tensorboard, wandb, "
        "mlflow, trackio and others; may be repeated. By default ESPER_REPORT_TO.",
    ),
]
Control = Annotated[
    bool,
    typer.Option(
        "--control",
        help="Train the same job without growth as well, and say what growth brought.",
    ),
]
Log = Annotated[
    Path,
    typer.Argument(metavar="LOG", help="An events.jsonl, or the folder of a run that has one."),
]
Page = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the report's page there as well.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the report as JSON, as report.json is written.")
]


def main() -> None:
    """Run the command that the process's arguments name, and exit."""
    app()


@app.callback(invoke_without_command=True, epilog=ENVIRONMENT)
def esper(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Grow a PyTorch model in place while it trains, on evidence."""
    if version:
        from esper import __version__

        typer.echo(f"esper {__version__}")
        raise typer.Exit


@app.command(epilog=ENVIRONMENT)
def demo(
    random_seeds: Annotated[
        str, typer.Option(help="First random seed and the one after the last.")
    ] = "0:10",
    run_dir: RunDir = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of 20 updates.")] = 55,
) -> None:
    """Grow a digit classifier, beside its controls, and report what growth did and did not do."""
    with one_line_errors() as environment:
        from esper.cli.progress import ProgressDisplay
        from esper.cli.tables import print_demo
        from esper.resilience.clock import MonotonicClock
        from esper.services.demo import run_demo

        seeds = parse_random_seeds(random_seeds)
        with (
            _demo_extra(),
            ProgressDisplay(console(stderr=True), MonotonicClock()) as display,
        ):
            run = run_demo(
                random_seeds=seeds,
                run_dir=run_dir or environment.run_dir / "demo",
                processes=processes,
                on_progress=display,
                epochs=epochs,
                on_held=_ask_for_patience,
            )
        try:
            print_demo(console(), run.report)
        finally:  # a reader that has gone away, as `| head` does, costs no page
            _write_pages(run.report, run.folder)
        _exit_if_stopped(interrupted=run.report.interrupted)


@app.command(epilog=ENVIRONMENT)
def grow(
    target: Target,
    run_dir: RunDir = None,
    epochs: Epochs = None,
    overhead: Overhead = None,
    random_seed: RandomSeed = None,
    budget: BudgetLimits = None,
    registry: RegistryAddress = None,
    report_to: ReportTo = None,
    control: Control = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Train your own job and grow its model where the evidence allows it."""
    with one_line_errors() as environment:
        from esper.cli.progress import ProgressDisplay
        from esper.resilience.clock import MonotonicClock
        from esper.services.job_options import JobOptions, parse_budget
        from esper.services.run_job import run_job
        from esper.services.sinks import sinks_of

        folder = run_dir or environment.run_dir / "grow"
        options = JobOptions(
            epochs=epochs,
            overhead=overhead,
            random_seed=random_seed,
            budget=parse_budget(budget or ()),
            control=control,
            registry=_registry_of(registry, environment),
        )
        _see_working_folder()
        with (
            _settings_said(),
            closing(options.registry) if options.registry else nullcontext(),
            closing(sinks_of(environment, report_to=report_to or (), folder=folder)) as sinks,
            ProgressDisplay(console(stderr=True), MonotonicClock()) as display,
        ):
            run = run_job(
                target,
                run_dir=folder,
                options=options,
                on_progress=display,
                on_held=_ask_for_patience,
                sinks=sinks,
            )
        _tell(run)


def _registry_of(address: str | None, environment: Environment) -> Registry | None:
    """Return the registry that a run is given, by option or environment; None without one."""
    if address is None and environment.api_url is None:
        return None
    from esper.services.registry_client import open_named

    return open_named(address, environment, makes=True)


def _tell(run: JobRun) -> None:
    """Print what a run has to say, then write its pages; its model is kept by now."""
    try:
        typer.echo(str(run.report))
        for problem in run.problems:
            typer.echo(f"esper: {problem}", err=True)
    finally:  # a reader that has gone away, as `| head` does, costs no page
        _write_pages(run.report, run.folder)
    if run.error is not None:
        raise run.error
    _exit_if_stopped(interrupted=run.report.interrupted)
    if run.problems:
        raise typer.Exit(EXIT_ERROR)


@app.command(epilog=ENVIRONMENT)
def suggest(
    target: Target,
    epochs: SuggestEpochs = None,
    random_seed: RandomSeed = None,
    budget: BudgetLimits = None,
) -> None:
    """Train your own job for a while, change nothing, and say where and what could grow."""
    with one_line_errors():
        from esper.cli.progress import ProgressDisplay
        from esper.resilience.clock import MonotonicClock
        from esper.services.job_options import JobOptions, parse_budget
        from esper.services.run_job import suggest_for

        options = JobOptions(
            epochs=epochs, random_seed=random_seed, budget=parse_budget(budget or ())
        )
        _see_working_folder()
        with ProgressDisplay(console(stderr=True), MonotonicClock()) as display:
            suggestions = suggest_for(target, options=options, on_progress=display)
        typer.echo(str(suggestions))


@app.command(epilog=ENVIRONMENT)
def replay(
    log: Log,
    page: Page = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Put a run together again from its log, and show it; exit with 1 where the log is refused.

    It may be the log of a run that was killed, or that an older Esper wrote.
    """
    with one_line_errors():
        from esper.observability.replay import replay as replay_events

        with _refusals():
            events = _events_of(log)
            found = replay_events(events)
        if page is not None:
            from esper.observability.time_page import page_in_time
            from esper.resilience.whole_file import write_whole

            write_whole(page, page_in_time(found.report, events).encode("utf-8"))
        if as_json:
            typer.echo(found.report.to_json(), nl=False)
        else:
            from esper.cli.tables import print_replayed

            print_replayed(console(), found)


def _events_of(log: Path) -> list[Event]:
    """Return the events of a log, which may be named by its run's folder."""
    from esper.observability.event_log import read_events
    from esper.observability.run_folder import EVENTS_FILE

    return read_events(log / EVENTS_FILE if log.is_dir() else log)


@contextmanager
def _refusals() -> Iterator[None]:
    """Exit with the status of a problem where a file is not there, or is refused."""
    from esper.cli.errors import error_text

    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        typer.echo(error_text(error), err=True)
        raise typer.Exit(EXIT_PROBLEM) from error


@app.command(epilog=ENVIRONMENT)
def doctor(run_dir: RunDir = None) -> None:
    """Look at the environment, and exit with 1 where something is wrong."""
    with one_line_errors() as environment:
        from esper.cli.doctor import examine
        from esper.cli.tables import print_checks

        checks = examine(run_dir or environment.run_dir, environment)
        print_checks(console(), checks)
        if any(check.cure for check in checks):
            raise typer.Exit(EXIT_PROBLEM)


def parse_random_seeds(text: str) -> tuple[int, ...]:
    """Return the random seeds that ``"100:110"`` stands for: 100 to 109.

    Raises:
        EsperError: The text is no such range, or the range is empty.
    """
    first, _, end = text.partition(":")
    if first.isdecimal() and end.isdecimal() and int(first) < int(end):
        return tuple(range(int(first), int(end)))
    msg = f"--random-seeds is FIRST:END with FIRST below END, for example 100:110; got {text!r}"
    raise EsperError(msg)


@contextmanager
def _demo_extra() -> Iterator[None]:
    """Say how to install what only the demo needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "sklearn":
            raise
        msg = "the demo needs its extra: pip install 'esper-morph[demo]'"
        raise EsperError(msg) from error


def _see_working_folder() -> None:
    """Let targets be imported from the working folder, as ``python -m`` does."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)


@contextmanager
def _settings_said() -> Iterator[None]:
    """Let what the controller says at its start, the effective settings, reach the terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("esper.growth.journal")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _ask_for_patience() -> None:
    typer.echo("esper: stopping already; what was trained is kept first", err=True)


def _write_pages(report: RunReport | DemoReport, folder: Path) -> None:
    """Write the pages of a run, and say what is in its folder then."""
    from esper.observability.report_files import write_report

    try:
        write_report(report, folder)
    finally:
        written = ", ".join(sorted(path.name for path in folder.iterdir()))
        typer.echo(f"Written to {folder}: {written}")


def _exit_if_stopped(*, interrupted: bool) -> None:
    if interrupted:
        raise typer.Exit(EXIT_STOPPED)
