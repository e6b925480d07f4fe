"""The commands that compile: ``compile`` one blueprint here, ``compile-worker`` what others ask."""

from __future__ import annotations

import signal
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, get_args

import typer

from esper.cli.blueprints import (
    Address,
    Batch,
    File,
    Size,
    read_blueprint,
    report_lines,
)
from esper.cli.console import print_json, print_json_or
from esper.cli.options import AsJson, TokenFile
from esper.cli.outcome import EXIT_PROBLEM, EXIT_STOPPED, answers
from esper.contracts.compile_options import CompileOptions
from esper.contracts.errors import EsperError, KernelSourceRefused

if TYPE_CHECKING:
    from esper.contracts.artifact import CompiledKernelArtifact
    from esper.contracts.canonical_json import JsonObject
    from esper.contracts.ports import Registry

ENVIRONMENT: Final = (
    "Environment: URZA_API_URL stands for --registry; URZA_API_TOKEN (or URZA_API_TOKEN_FILE) is "
    "the token, with the scopes work and publish; ESPER_WORKER_NAME is the worker's name, by "
    "default the host's with the process's number."
)
_DEFAULTS: Final = CompileOptions()
_MIB: Final = 2**20


def compile_file(
    file: File,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the artifact there.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Publish it in this registry: a directory or URL."),
    ] = None,
    token_file: TokenFile = None,
    batch: Batch = _DEFAULTS.batch,
    size: Size = _DEFAULTS.size,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Compile a blueprint here, and try what came of it; exits with 1 where it does not pass."""
    with answers() as environment:
        from esper.services.compiling import compile_and_validate

        found = compile_and_validate(read_blueprint(file), CompileOptions(batch=batch, size=size))
        artifact_id = None if found.artifact is None else found.artifact.artifact_id
        document = {"artifact_id": artifact_id, **found.report}
        if found.artifact is None:
            print_json_or(document, f"INVALID: {found.report['reason']}", as_json=as_json)
            raise typer.Exit(EXIT_PROBLEM)
        if output is not None:
            from esper.resilience.whole_file import write_whole

            write_whole(output, found.artifact.kernel_binary)
        if push is not None:
            from esper.services.registry_client import open_named

            with closing(
                open_named(push, environment, token_file=token_file, makes=True)
            ) as registry:
                _publish(registry, found.artifact, found.report)
        lines = [f"VALIDATED {artifact_id}", *report_lines(found.report)]
        print_json_or(document, "\n".join(lines), as_json=as_json)


def work(
    registry: Address = None,
    jobs: Annotated[int, typer.Option(min=1, help="Jobs that are done at once.")] = 1,
    memory: Annotated[
        int, typer.Option(min=1, help="MiB that one job may take, beyond what torch has.")
    ] = 2048,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds that one job may take.")] = 60.0,
    lease_s: Annotated[
        float,
        typer.Option(min=1.0, max=3_600.0, help="Seconds until others take what a dead one had."),
    ] = 30.0,
    sandbox: Annotated[
        str,
        typer.Option(
            metavar="auto|bwrap|process",
            help="Whether jobs run inside of bubblewrap: where it works, always, never.",
        ),
    ] = "auto",
    token_file: TokenFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Compile what a registry's server is asked for, until it is told to end (status 130).

    What comes of each job is told on standard error; with --json as a line of JSON on the output.
    """
    with answers() as environment:
        from esper.services.compile_worker import (
            CompileWorker,
            Told,
            WorkerOptions,
            name_of_this_process,
        )
        from esper.services.registry_client import address_and_token
        from esper.services.sandbox import (
            Confinement,
            SandboxLimits,
            hide_from_other_processes,
        )

        def tell(told: Told) -> None:
            if as_json:
                print_json(asdict(told))
            else:
                typer.echo(str(told), err=True)

        address, token = address_and_token(registry, environment, token_file=token_file)
        if sandbox not in get_args(Confinement):
            msg = f"--sandbox is one of {', '.join(get_args(Confinement))}, got {sandbox!r}"
            raise EsperError(msg)
        worker = CompileWorker(
            address,
            WorkerOptions(
                name=environment.worker_name or name_of_this_process(),
                num_jobs=jobs,
                lease_s=lease_s,
                limits=SandboxLimits(memory_bytes=memory * _MIB, seconds=seconds),
                confinement=sandbox,  # type: ignore[arg-type] # looked at above
            ),
            token=token,
            tell=tell,
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: worker.stop())
        hide_from_other_processes()
        worker.run()
        raise typer.Exit(EXIT_STOPPED)


def _publish(registry: Registry, artifact: CompiledKernelArtifact, report: JsonObject) -> None:
    """Publish an artifact in a registry, and what was found of it where that is kept there."""
    from esper.contracts.kernel_reports import ValidationReport

    digest = registry.put(artifact.kernel_binary, digest=artifact.artifact_id)
    found = ValidationReport.from_document({**report, "artifact_id": digest})
    try:
        registry.report_validation(found)
    except KernelSourceRefused as refused:  # publishing asks for less than reporting does
        typer.echo(f"esper: published without its report: {refused}", err=True)
