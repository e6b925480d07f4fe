"""The only reader of the environment."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from esper.contracts.errors import EsperError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the commands take from the environment.

    Attributes:
        run_dir: Folder under which runs are written; ``ESPER_RUN_DIR``, by default ``runs``.
        traceback: Whether errors are shown with their traceback; ``ESPER_TRACEBACK=1``.
        api_url: Address of the registry that a run takes kernels from; ``URZA_API_URL``.
        api_token: A registry's token; ``URZA_API_TOKEN``, or the first line of the file that
            ``URZA_API_TOKEN_FILE`` names.
        registry_database: Address of a registry's book; ``ESPER_REGISTRY_DATABASE``.
        registry_blobs: Address of a registry's bytes; ``ESPER_REGISTRY_BLOBS``.
        bucket: How a bucket is reached, by the names that S3's own tools use:
            ``AWS_ENDPOINT_URL``, ``AWS_REGION``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``
            and ``AWS_SESSION_TOKEN``. No other variable of S3's changes anything.
    """

    run_dir: Path = Path("runs")
    traceback: bool = False
    api_url: str | None = None
    api_token: str | None = field(default=None, repr=False)
    registry_database: str | None = field(default=None, repr=False)
    registry_blobs: str | None = None
    bucket: Mapping[str, str] = field(default_factory=dict, repr=False)


_BUCKET: Final = {
    "endpoint": "AWS_ENDPOINT_URL",
    "region": "AWS_REGION",
    "access_key": "AWS_ACCESS_KEY_ID",
    "secret_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}
_READ_BY_OTHERS: Final = re.compile(r"AWS_.*|.*_proxy|.*_PROXY")


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read what is set, an empty variable being one that is not set.

    Args:
        variables: By name; None reads the process's own.

    Raises:
        EsperError: A variable has a value that it cannot have.
    """
    values = os.environ if variables is None else variables
    traceback = values.get("ESPER_TRACEBACK", "") or "0"
    if traceback not in ("0", "1"):
        msg = f"ESPER_TRACEBACK is 0 or 1, got {traceback!r}; unset it or set one of them"
        raise EsperError(msg)
    run_dir = Path(values.get("ESPER_RUN_DIR", "") or "runs")
    return Environment(
        run_dir=run_dir,
        traceback=traceback == "1",
        api_url=values.get("URZA_API_URL") or None,
        api_token=_api_token(values),
        registry_database=values.get("ESPER_REGISTRY_DATABASE") or None,
        registry_blobs=values.get("ESPER_REGISTRY_BLOBS") or None,
        bucket={name: values[key] for name, key in _BUCKET.items() if values.get(key)},
    )


@contextmanager
def hidden_from_libraries() -> Iterator[None]:
    """Hide what libraries read from the environment by themselves: S3's settings and proxies.

    For a moment in which nothing else runs, since the environment is the whole process's.
    """
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _is_hidden(name)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _is_hidden(name: str) -> bool:
    return _READ_BY_OTHERS.fullmatch(name) is not None


def _api_token(values: Mapping[str, str]) -> str | None:
    if values.get("URZA_API_TOKEN"):
        return values["URZA_API_TOKEN"]
    path = values.get("URZA_API_TOKEN_FILE")
    if not path:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").partition("\n")[0].strip() or None
    except (OSError, ValueError) as error:
        msg = f"URZA_API_TOKEN_FILE names {path}, which cannot be read: {error}"
        raise EsperError(msg) from error
