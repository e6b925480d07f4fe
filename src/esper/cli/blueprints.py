"""The ``esper blueprints`` commands: ask for kernels to be compiled, and look at blueprints."""

from __future__ import annotations

from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from esper.cli.console import print_json_or
from esper.cli.options import AsJson, TokenFile
from esper.cli.outcome import EXIT_PROBLEM, answers
from esper.contracts.compile_job import STATUSES
from esper.contracts.compile_options import ANY_TOOLCHAIN, CompileOptions
from esper.contracts.errors import EsperError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.contracts.blueprint import BlueprintIR
    from esper.contracts.compile_job import CompileJob
    from esper.registry.http_registry import HttpRegistry
    from esper.services.settings import Environment

ENVIRONMENT: Final = (
    "Environment: URZA_API_URL stands for --registry; URZA_API_TOKEN (or URZA_API_TOKEN_FILE) is "
    "the token."
)

app = typer.Typer(name="blueprints", no_args_is_help=True, help="What kernels are compiled from.")

File = Annotated[Path, typer.Argument(metavar="FILE", help="A blueprint's JSON.")]
Address = Annotated[
    str | None, typer.Option("--registry", metavar="URL", help="Where a registry is served.")
]
Batch = Annotated[int, typer.Option(min=1, help="Samples in the input that it is tried on.")]
Size = Annotated[int, typer.Option(min=1, help="Length of each free axis of that input.")]
_DEFAULTS: Final = CompileOptions()


@app.command(epilog=ENVIRONMENT)
def submit(
    file: File,
    registry: Address = None,
    token_file: TokenFile = None,
    again: Annotated[bool, typer.Option("--again", help="Try an INVALID one once more.")] = False,  # noqa: FBT002 - typer makes an option of it
    toolchain: Annotated[
        str, typer.Option(help="What it is to be compiled with, for example 'torch 2.13.0'.")
    ] = ANY_TOOLCHAIN,
    batch: Batch = _DEFAULTS.batch,
    size: Size = _DEFAULTS.size,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Ask for a blueprint to be compiled; prints the id under which it can be looked up."""
    with answers() as environment, server(registry, token_file, environment) as client:
        options = CompileOptions(batch=batch, size=size)
        job_id, status = client.jobs.submit(
            read_blueprint(file), options, toolchain=toolchain, again=again
        )
        print_json_or({"id": job_id, "status": status}, f"{job_id}  {status}", as_json=as_json)


@app.command("list", epilog=ENVIRONMENT)
def list_jobs(
    registry: Address = None,
    token_file: TokenFile = None,
    status: Annotated[
        str | None,
        typer.Option(metavar="|".join(STATUSES), help="List only those."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="List no more than so many.")] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """List what was asked for, oldest first."""
    with answers() as environment:
        if status is not None and status not in STATUSES:
            msg = f"--status is one of {', '.join(STATUSES)}, got {status!r}"
            raise EsperError(msg)
        with server(registry, token_file, environment) as client:
            jobs = client.jobs.list(limit=limit, status=status)
        lines = (f"{job.id}  {job.status:<11}  {job.blueprint_id}" for job in jobs)
        documents = [job.to_document() for job in jobs]
        print_json_or(documents, "\n".join(lines), as_json=as_json)


@app.command(epilog=ENVIRONMENT)
def show(
    job_id: Annotated[str, typer.Argument(metavar="ID", help="As `submit` prints it.")],
    registry: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Show where a blueprint stands; exits with 1 where it is INVALID or nobody asked for it."""
    with answers() as environment, server(registry, token_file, environment) as client:
        job = client.jobs.find(job_id)
        print_json_or(job.to_document(), "\n".join(_lines(job)), as_json=as_json)
        if job.status == "INVALID":
            raise typer.Exit(EXIT_PROBLEM)


@app.command()
def check(
    file: File,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Look whether a blueprint keeps every rule; exits with 1 where it does not."""
    with answers():
        from esper.compiler.lowering import checked_plan

        made = checked_plan(read_blueprint(file))
        found = {
            "id": made.blueprint.id,
            "digest": made.blueprint.digest,
            "parameters": made.parameter_count,
            "operations": len(made.steps),
        }
        text = f"{found['id']}: {found['operations']} operations, {found['parameters']} parameters"
        print_json_or(found, text, as_json=as_json)


@app.command()
def draw(
    file: File,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Draw a blueprint as text, with a rail for each value that is still to be read."""
    with answers():
        from esper.compiler.drawing import draw as drawn

        text = drawn(read_blueprint(file))
        print_json_or({"lines": text.split("\n")}, text, as_json=as_json)


def read_blueprint(file: Path) -> BlueprintIR:
    """Read a file that has a blueprint's JSON.

    Raises:
        BlueprintError: It has none.
        OSError: It cannot be read.
    """
    from esper.contracts.blueprint import BlueprintIR

    return BlueprintIR.from_json(file.read_bytes())


@contextmanager
def server(
    address: str | None, token_file: Path | None, environment: Environment
) -> Iterator[HttpRegistry]:
    """Yield the server that a command is about.

    Raises:
        EsperError: Nothing says where it is.
        ValueError: The address is no server's.
    """
    from esper.registry.http_registry import HttpRegistry
    from esper.services.registry_client import address_and_token

    url, token = address_and_token(address, environment, token_file=token_file)
    with closing(HttpRegistry(url, token=token, timeout_s=30.0)) as client:
        yield client


def _lines(job: CompileJob) -> Iterator[str]:
    yield f"{job.blueprint_id}  {job.status}  attempts: {job.attempts}"
    if job.artifact_id is not None:
        yield f"artifact_id: {job.artifact_id}"
    report = job.report or {}
    if report.get("reason"):
        yield f"reason: {report['reason']}"
    yield from report_lines(report)


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield what was measured of a kernel, for people."""
    for name, value in (report.get("findings") or {}).items():
        yield f"{name}: {value}"
