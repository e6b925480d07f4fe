"""The ``esper registry`` commands: serve, its tokens, and its upkeep."""

from __future__ import annotations

from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from esper.cli.console import print_json, print_json_or
from esper.cli.options import AsJson
from esper.cli.outcome import EXIT_PROBLEM, answers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.registry.stored import StoredRegistry

ENVIRONMENT: Final = (
    "Environment: ESPER_REGISTRY_DATABASE and ESPER_REGISTRY_BLOBS stand for --database and "
    "--blobs; URZA_API_TOKEN (or URZA_API_TOKEN_FILE) is the owner's token; AWS_ENDPOINT_URL, "
    "AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN reach the bucket."
)

app = typer.Typer(name="registry", no_args_is_help=True, help="Keep kernels for a team.")
token_app = typer.Typer(name="token", no_args_is_help=True, help="Who may do what.")
app.add_typer(token_app)

Data = Annotated[
    Path | None,
    typer.Option("--data", help="Directory that it is kept in; `registry` where nothing is said."),
]
Database = Annotated[
    str | None, typer.Option("--database", metavar="URL", help="postgresql://user@host/name")
]
Blobs = Annotated[
    str | None, typer.Option("--blobs", metavar="URL", help="s3://bucket/prefix, with --database.")
]
_FOLDER: Final = Path("registry")


@app.command(epilog=ENVIRONMENT)
def serve(
    data: Data = None,
    database: Database = None,
    blobs: Blobs = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port to listen at; 0 takes a free one.")
    ] = 8000,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Serve a registry over HTTP, and make its first token.

    With --json the address and the token, null where there was one, are printed once it listens.
    """
    with _opened(data, database, blobs, makes=True) as registry:
        from esper.services.registry_server import address_of, first_token
        from esper.services.registry_server import serve as serve_registry
        from esper.services.settings import read_environment

        def listens(port: int) -> None:
            """Make the first token: one that is made before is lost where nothing is served."""
            address = address_of(host, port)
            made = first_token(registry, read_environment().api_token)
            if as_json:
                print_json({"address": address, "token": made})
            elif made is not None:
                typer.echo(f"URZA_API_TOKEN={made}")
            if made is not None:
                typer.echo(
                    "That is the owner's token, with every scope; it is not shown again.", err=True
                )
            typer.echo(f"serving on {address}", err=True)

        serve_registry(registry, host=host, port=port, on_listening=listens)


@token_app.command("create", epilog=ENVIRONMENT)
def create_token(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    scope: Annotated[
        list[str], typer.Option("--scope", help="read, publish, promote, work or admin; repeat it.")
    ],
    data: Data = None,
    database: Database = None,
    blobs: Blobs = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Make a token, and print it; it cannot be shown again."""
    with (
        _opened(data, database, blobs, makes=True) as registry,
        registry.reporting("make a token"),
    ):
        from esper.resilience.clock import wall_time_s

        text, token = registry.book.tokens.create(name, scope, now_s=wall_time_s())
        print_json_or({"token": text, **asdict(token)}, text, as_json=as_json)


@token_app.command("list", epilog=ENVIRONMENT)
def list_tokens(
    data: Data = None,
    database: Database = None,
    blobs: Blobs = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """List the tokens, without their texts."""
    with _opened(data, database, blobs) as registry, registry.reporting("list the tokens"):
        tokens = registry.book.tokens.all()
        lines = (
            f"{token.id}  {token.name}  {' '.join(token.scopes)}"
            f"{'' if token.revoked_at_s is None else '  revoked'}"
            for token in tokens
        )
        print_json_or([asdict(token) for token in tokens], "\n".join(lines), as_json=as_json)


@token_app.command("revoke", epilog=ENVIRONMENT)
def revoke_token(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="As `token list` shows it.")],
    data: Data = None,
    database: Database = None,
    blobs: Blobs = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """End a token; exits with 1 where there is none that counts."""
    with _opened(data, database, blobs) as registry, registry.reporting("revoke a token"):
        from esper.resilience.clock import wall_time_s

        if not registry.book.tokens.revoke(token_id, now_s=wall_time_s()):
            typer.echo(
                f"esper: there is no token {token_id} that counts; see `token list`", err=True
            )
            raise typer.Exit(EXIT_PROBLEM)
        print_json_or({"id": token_id, "revoked": True}, "", as_json=as_json)


@app.command(epilog=ENVIRONMENT)
def migrate(
    data: Data = None,
    database: Database = None,
    blobs: Blobs = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Bring what a registry is kept in to this version; `serve` does it, too."""
    with _opened(data, database, blobs) as registry:
        version = registry.book.database.version()
        print_json_or({"version": version}, f"the book has format {version}", as_json=as_json)


@app.command(epilog=ENVIRONMENT)
def verify(
    data: Data = None,
    database: Database = None,
    blobs: Blobs = None,
    after: Annotated[str, typer.Option(help="Go on behind this digest.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Read no more artifacts.")] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Read every artifact; exits with 1 where one is damaged or missing."""
    with _opened(data, database, blobs) as registry:
        from esper.registry.documents import of_check

        check = registry.verify(after=after, limit=limit)
        text = (
            f"{check.intact} intact, {len(check.quarantined)} damaged and put aside, "
            f"{len(check.missing)} missing, {len(check.unreferenced)} unreferenced"
        )
        wrong = dict.fromkeys((*check.quarantined, *check.missing))
        more = [] if check.after is None else [f"go on with --after {check.after}"]
        print_json_or(of_check(check), "\n".join([text, *wrong, *more]), as_json=as_json)
        if wrong:
            raise typer.Exit(EXIT_PROBLEM)


@app.command(epilog=ENVIRONMENT)
def gc(
    data: Data = None,
    database: Database = None,
    blobs: Blobs = None,
    grace_s: Annotated[
        float, typer.Option(min=0, help="Seconds that bytes have to be unreferenced.")
    ] = 86_400.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing.")] = False,  # noqa: FBT002 - typer makes an option of it
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Remove bytes that two collections, a grace period apart, both found unreferenced."""
    with _opened(data, database, blobs) as registry:
        collect = registry.condemned if dry_run else registry.collect
        removed = collect(grace_s=grace_s)
        print_json_or({"removed": list(removed)}, "\n".join(removed), as_json=as_json)


@contextmanager
def _opened(
    data: Path | None, database: str | None, blobs: str | None, *, makes: bool = False
) -> Iterator[StoredRegistry]:
    """Open what a registry is kept in, which some commands make; errors become one line."""
    with answers() as environment:
        from esper.services.registry_server import open_storage

        if data is not None and (database or blobs):
            msg = "--data is a registry of its own: give it, or --database and --blobs"
            raise ValueError(msg)
        folder = data or _FOLDER
        database = database or (None if data else environment.registry_database)
        blobs = blobs or (None if data else environment.registry_blobs)
        if not (makes or database or blobs or folder.exists()):
            msg = f"there is no registry in {folder}: no such directory"
            raise FileNotFoundError(msg)
        opened = open_storage(data=folder, database=database, blobs=blobs, environment=environment)
        with closing(opened) as registry:
            yield registry
