"""The ``esper kernels`` commands: what is in a registry, and moving it about."""

from __future__ import annotations

from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from esper.cli.console import console, print_json, print_json_or
from esper.cli.options import AsJson, TokenFile
from esper.cli.outcome import EXIT_PROBLEM, answers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from esper.contracts.ports import Registry, RegistryEntry
    from esper.contracts.signature import KernelSignature
    from esper.services.settings import Environment

ENVIRONMENT: Final = (
    "Environment: URZA_API_URL stands for --registry; URZA_API_TOKEN (or URZA_API_TOKEN_FILE) is "
    "the token, sent to that address only; ESPER_TRUSTED_KEYS has, or names a file of, the public "
    "keys without whose signature nothing is read."
)

app = typer.Typer(name="kernels", no_args_is_help=True, help="Look at kernels, and move them.")

Address = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="ADDRESS",
        help="A directory, http://, https://, oci:// or hf://; URZA_API_URL where left out.",
    ),
]
Reference = Annotated[
    str,
    typer.Argument(metavar="KERNEL", help="name:tag, a digest, or the first 8 letters of one."),
]
Name = Annotated[str, typer.Argument(metavar="NAME:TAG", help="For example mlp:prod.")]
Limit = Annotated[int, typer.Option(min=1, help="Print no more.")]
Everything = Annotated[bool, typer.Option("--all", help="Every kernel with all of its names.")]


@app.command("list", epilog=ENVIRONMENT)
def list_kernels(
    registry: Address = None,
    token_file: TokenFile = None,
    limit: Limit = 50,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """List what was published last, the newest first."""
    with _opened(registry, token_file) as (opened, _):
        _show_found(opened.search(limit=limit, order="newest"), as_json=as_json)


@app.command(epilog=ENVIRONMENT)
def search(
    criteria: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CRITERION=VALUE...]", help="For example kind=linear mode=add."),
    ] = None,
    order: Annotated[
        str,
        typer.Option(
            metavar="oldest|newest|proven",
            help="What comes first; proven: what field reports say has worked, at sites of the "
            "kind that is asked for.",
        ),
    ] = "oldest",
    registry: Address = None,
    token_file: TokenFile = None,
    limit: Limit = 50,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Find kernels that meet every criterion; exits with 1 where there is none.

    A wrong criterion is answered with those that there are.
    """
    with _opened(registry, token_file) as (opened, _):
        found = opened.search(
            limit=limit,
            order=order,  # type: ignore[arg-type] # the registry looks at it
            **_criteria(criteria or []),
        )
        _show_found(found, as_json=as_json)
        if not found:
            raise typer.Exit(EXIT_PROBLEM)


@app.command(epilog=ENVIRONMENT)
def show(
    kernel: Reference,
    registry: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Show all that is known of a kernel."""
    with _opened(registry, token_file) as (opened, environment):
        from esper.cli.kernel_tables import print_entry
        from esper.registry.documents import of_entry

        digest = _digest_of(opened, kernel)
        entry, signatures = opened.entry(digest), opened.signatures(digest)
        if as_json:
            print_json({**of_entry(entry), "signatures": [s.to_document() for s in signatures]})
        else:
            print_entry(console(), entry, _signed_by(digest, signatures, environment))


@app.command(epilog=ENVIRONMENT)
def push(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="An artifact's file.")],
    registry: Address = None,
    token_file: TokenFile = None,
    name: Annotated[
        str | None, typer.Option("--tag", metavar="NAME:TAG", help="Point this to the last one.")
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Publish kernels, and print their digests. Publishing one again changes nothing."""
    with _opened(registry, token_file, makes=True) as (opened, _):
        digests = [opened.put(path.read_bytes()) for path in files]
        if name is not None:
            opened.tag(*_split(name), digests[-1])
        print_json_or({"ids": digests}, "\n".join(digests), as_json=as_json)


@app.command(epilog=ENVIRONMENT)
def pull(
    kernel: Reference,
    registry: Address = None,
    token_file: TokenFile = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to; DIGEST.safetensors if left out.")
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Fetch a kernel into a file."""
    with _opened(registry, token_file) as (opened, _):
        from esper.resilience.whole_file import write_whole

        digest = _digest_of(opened, kernel)
        path = output or Path(f"{digest}.safetensors")
        write_whole(path, opened.get(digest))
        print_json_or({"id": digest, "file": str(path)}, f"{digest} is in {path}", as_json=as_json)


@app.command(epilog=ENVIRONMENT)
def tag(
    kernel: Reference,
    name: Name,
    registry: Address = None,
    token_file: TokenFile = None,
    expected: Annotated[
        str | None,
        typer.Option(
            metavar="DIGEST", help="Only if it points there now; `none`: only if it is not there."
        ),
    ] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Point a name to a kernel; exits with 1 where it is not where you have seen it."""
    with _opened(registry, token_file) as (opened, _):
        from esper.contracts.ports import ANY

        digest = _digest_of(opened, kernel)
        seen = {None: ANY, "none": None}.get(expected, expected)
        opened.tag(*_split(name), digest, expected=seen)
        print_json_or({"name": name, "id": digest}, f"{name} points to {digest}", as_json=as_json)


@app.command(epilog=ENVIRONMENT)
def history(
    name: Name,
    registry: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Show where a name pointed, and who moved it; exits with 1 where it never was."""
    with _opened(registry, token_file) as (opened, _):
        from esper.cli.kernel_tables import print_history
        from esper.registry.documents import of_move

        moves = opened.history(*_split(name))
        if as_json:
            print_json({"moves": [of_move(move) for move in moves]})
        else:
            print_history(console(), name, moves)
        if not moves:
            raise typer.Exit(EXIT_PROBLEM)


@app.command(epilog=ENVIRONMENT)
def rollback(
    name: Name,
    registry: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Point a name to where it pointed before its last move."""
    with _opened(registry, token_file) as (opened, _):
        from esper.registry.rollback import roll_back

        digest = roll_back(opened, *_split(name))
        print_json_or({"name": name, "id": digest}, f"{name} points to {digest}", as_json=as_json)


@app.command(epilog=ENVIRONMENT)
def verify(
    kernel: Reference,
    registry: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Fetch a kernel and check its bytes, and with trusted keys who signed it; 1 where it fails."""
    with _opened(registry, token_file) as (opened, environment):
        from esper.contracts import artifact_format

        digest = _digest_of(opened, kernel)
        artifact_format.parse(opened.get(digest))
        signed = _signed_by(digest, opened.signatures(digest), environment)
        document = {"id": digest, "intact": True, "signed": signed}
        text = f"{digest} is intact; signed: {'; '.join(signed) or 'by nobody'}"
        print_json_or(document, text, as_json=as_json)


@app.command(epilog=ENVIRONMENT)
def sign(
    kernel: Reference,
    key: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="A private key: openssl genpkey -algorithm ed25519 -out key.pem makes one.",
        ),
    ],
    registry: Address = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Sign a kernel whose bytes are intact; prints the public key that others are to trust."""
    with _opened(registry, token_file, checks_signatures=False) as (opened, _):
        from esper.contracts import artifact_format
        from esper.resilience.clock import wall_time_s
        from esper.services.registry_client import signing_key

        signing = signing_key(key)
        digest = _digest_of(opened, kernel)
        artifact_format.parse(opened.get(digest))
        signature = signing.sign(digest, now_s=int(wall_time_s()))
        opened.attach_signature(signature)
        document = {**signature.to_document(), "public_key": signing.public_text}
        print_json_or(document, f"{digest} is signed by {signing.public_text}", as_json=as_json)


@app.command(epilog=ENVIRONMENT)
def deprecate(
    kernel: Reference,
    registry: Address = None,
    token_file: TokenFile = None,
    reason: Annotated[str | None, typer.Option(help="Why, for people.")] = None,
    successor: Annotated[
        str | None, typer.Option(metavar="KERNEL", help="What to use in its place.")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Take it back.")] = False,  # noqa: FBT002 - typer makes an option of it
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Say that a kernel should not be used any more. It can be had as before."""
    with _opened(registry, token_file) as (opened, _):
        if (reason is None) == (not undo):
            msg = "say why with --reason, or take it back with --undo"
            raise ValueError(msg)
        digest = _digest_of(opened, kernel)
        if reason is None:
            opened.reinstate(digest)
        else:
            after = None if successor is None else _digest_of(opened, successor)
            opened.deprecate(digest, reason=reason, successor=after)
        what = "deprecated" if reason is not None else "not deprecated"
        print_json_or(
            {"id": digest, "deprecated": not undo}, f"{digest} is {what}", as_json=as_json
        )


@app.command(epilog=ENVIRONMENT)
def copy(
    source: Annotated[str, typer.Argument(metavar="FROM", help="Address of a registry.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="Address of another.")],
    kernels: Annotated[
        list[str] | None, typer.Argument(metavar="[KERNEL...]", help="name:tag, or digests.")
    ] = None,
    everything: Everything = False,  # noqa: FBT002 - typer makes an option of it
    from_token_file: Annotated[Path | None, typer.Option(help="Its first line is FROM's.")] = None,
    to_token_file: Annotated[Path | None, typer.Option(help="Its first line is TO's.")] = None,
    as_json: AsJson = False,  # noqa: FBT002 - typer makes an option of it
) -> None:
    """Copy kernels with their names, signatures and records; may be repeated."""
    with answers() as environment, ExitStack() as open_ones:
        from esper.registry.copying import copy as copy_named
        from esper.registry.copying import copy_all
        from esper.services.registry_client import open_named

        if everything == bool(kernels):
            msg = "name the kernels to copy, or copy them with --all"
            raise ValueError(msg)
        is_alone = not (_is_remote(source) and _is_remote(target))
        here = open_ones.enter_context(
            closing(
                open_named(source, environment, token_file=from_token_file, takes_token=is_alone)
            )
        )
        there = open_ones.enter_context(
            closing(
                open_named(
                    target, environment, token_file=to_token_file, takes_token=is_alone, makes=True
                )
            )
        )
        copying = copy_all(here, there) if everything else copy_named(here, there, kernels or ())
        copied = []
        for one in copying:
            copied.append(asdict(one))
            if not as_json:
                typer.echo(f"{one.digest}  {' '.join(one.names)}".rstrip())
        if as_json:
            print_json({"copied": copied})


@contextmanager
def _opened(
    address: str | None,
    token_file: Path | None,
    *,
    checks_signatures: bool = True,
    makes: bool = False,
) -> Iterator[tuple[Registry, Environment]]:
    """Open a registry; what it answers with becomes one line and status 1, other errors 2."""
    with answers() as environment:
        from esper.services.registry_client import open_named

        opened = open_named(
            address,
            environment,
            token_file=token_file,
            checks_signatures=checks_signatures,
            makes=makes,
        )
        with closing(opened):
            yield opened, environment


def _criteria(words: list[str]) -> Any:
    from esper.registry.criteria import CRITERIA, from_text

    pairs = [word.partition("=") for word in words]
    wrong = [word for word, (name, equals, _) in zip(words, pairs, strict=True) if not equals]
    wrong += [name for name, equals, _ in pairs if equals and name not in CRITERIA]
    if wrong:
        msg = f"{', '.join(wrong)}: a criterion is NAME=VALUE, of {', '.join(CRITERIA)}"
        raise ValueError(msg)
    return {name: from_text(name, text) for name, _, text in pairs}


def _signed_by(
    digest: str, signatures: list[KernelSignature], environment: Environment
) -> list[str]:
    """Return who has signed, in words, as far as the trusted keys tell."""
    from esper.services.registry_client import trusted_of

    return [
        f"{signature.key_id[:12]}, {trusted_of(digest, signature, environment)}"
        for signature in signatures
    ]


def _digest_of(registry: Registry, reference: str) -> str:
    from esper.services.registry_client import digest_of

    return digest_of(registry, reference)


def _split(name: str) -> tuple[str, str]:
    from esper.contracts.reference import split_reference

    return split_reference(name)


def _is_remote(address: str) -> bool:
    return "://" in address and not address.startswith("file:")


def _show_found(found: list[RegistryEntry], *, as_json: bool) -> None:
    from esper.cli.kernel_tables import print_entries
    from esper.registry.documents import of_entry

    if as_json:
        print_json({"kernels": [of_entry(entry) for entry in found]})
    else:
        print_entries(console(), found)
