"""The only reader of the environment."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from esper.contracts.errors import EsperError
from esper.observability.spans import Collector
from esper.registry.disk_cache import DEFAULT_CACHE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the commands take from the environment.

    Attributes:
        run_dir: Folder under which runs are written; ``ESPER_RUN_DIR``, by default ``runs``.
        traceback: Whether errors are shown with their traceback; ``ESPER_TRACEBACK=1``.
        api_token: A registry's token; ``URZA_API_TOKEN``, or the first line of the file that
            ``URZA_API_TOKEN_FILE`` names.
        api_url: Address of the registry that commands are about; ``URZA_API_URL``.
        trusted_keys: Public keys of those whose kernels are read, as text; ``ESPER_TRUSTED_KEYS``,
            which has them or names a file that has. None trusts every kernel that is there.
        worker_name: Name of a compile worker; ``ESPER_WORKER_NAME``.
        registry_database: Address of a registry's book; ``ESPER_REGISTRY_DATABASE``.
        registry_blobs: Address of a registry's bytes; ``ESPER_REGISTRY_BLOBS``.
        cache_dir: Folder in which what registries gave is kept; ``ESPER_CACHE_DIR``, by default
            ``esper`` in the user's cache folder. None where there is no such folder.
        cache_bytes: Its budget, at least 0; ``ESPER_CACHE_BYTES``, by default 10 GiB.
        offline: Whether no registry elsewhere is asked; ``ESPER_OFFLINE=1``.
        bus_url: Address of the Redis or Valkey that events go to as well; ``ESPER_BUS_URL``.
        report_to: Trackers that runs report to, by their names in accelerate; ``ESPER_REPORT_TO``,
            separated by commas.
        metrics_port: Port at which the first rank of a run shows its metrics to Prometheus, from 1
            to 65,535; ``ESPER_METRICS_PORT``. None shows none.
        collector: Where traces go, by the standard's ``OTEL_EXPORTER_OTLP_ENDPOINT`` and its like;
            None sends none.
        rank: Which process of a run this is, from 0; ``RANK``, as torchrun has it.
        bucket: How a bucket is reached, by the names that S3's own tools use:
            ``AWS_ENDPOINT_URL``, ``AWS_REGION``, ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``
            and ``AWS_SESSION_TOKEN``. No other variable of S3's changes anything.
    """

    run_dir: Path = Path("runs")
    traceback: bool = False
    api_token: str | None = field(default=None, repr=False)
    api_url: str | None = None
    trusted_keys: str | None = None
    worker_name: str | None = None
    registry_database: str | None = field(default=None, repr=False)
    registry_blobs: str | None = None
    cache_dir: Path | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES
    offline: bool = False
    bus_url: str | None = field(default=None, repr=False)
    report_to: tuple[str, ...] = ()
    metrics_port: int | None = None
    collector: Collector | None = field(default=None, repr=False)
    rank: int = 0
    bucket: Mapping[str, str] = field(default_factory=dict, repr=False)


_BUCKET: Final = {
    "endpoint": "AWS_ENDPOINT_URL",
    "region": "AWS_REGION",
    "access_key": "AWS_ACCESS_KEY_ID",
    "secret_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}
_LAST_PORT: Final = 65_535
_READ_BY_OTHERS: Final = re.compile(r"AWS_.*|.*_proxy|.*_PROXY")
_OF_A_SANDBOX: Final = re.compile(
    r"PATH|HOME|USER|LOGNAME|TMPDIR|TZ|LANG|LC_[A-Z]+|LD_LIBRARY_PATH|PYTHON[A-Z]+|VIRTUAL_ENV"
    r"|(OMP|MKL|OPENBLAS|KMP|CUDA|NVIDIA|TORCH|PYTORCH)_[A-Z_0-9]+"
)


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read what is set, an empty variable being one that is not set.

    Args:
        variables: By name; None reads the process's own.

    Raises:
        EsperError: A variable has a value that it cannot have.
    """
    values = os.environ if variables is None else variables
    run_dir = Path(values.get("ESPER_RUN_DIR", "") or "runs")
    return Environment(
        run_dir=run_dir,
        traceback=_switch(values, "ESPER_TRACEBACK"),
        api_token=_api_token(values),
        api_url=values.get("URZA_API_URL") or None,
        trusted_keys=_trusted_keys(values.get("ESPER_TRUSTED_KEYS", "").strip()),
        worker_name=values.get("ESPER_WORKER_NAME") or None,
        registry_database=values.get("ESPER_REGISTRY_DATABASE") or None,
        registry_blobs=values.get("ESPER_REGISTRY_BLOBS") or None,
        cache_dir=_cache_dir(values),
        cache_bytes=_cache_bytes(values),
        offline=_switch(values, "ESPER_OFFLINE"),
        bus_url=values.get("ESPER_BUS_URL") or None,
        report_to=_names(values.get("ESPER_REPORT_TO", "")),
        metrics_port=_metrics_port(values.get("ESPER_METRICS_PORT", "")),
        collector=_collector(values),
        rank=int(values["RANK"]) if values.get("RANK", "").isdecimal() else 0,
        bucket={name: values[key] for name, key in _BUCKET.items() if values.get(key)},
    )


def _switch(values: Mapping[str, str], name: str) -> bool:
    found = values.get(name, "") or "0"
    if found not in ("0", "1"):
        msg = f"{name} is 0 or 1, got {found!r}; unset it or set one of them"
        raise EsperError(msg)
    return found == "1"


def _cache_dir(values: Mapping[str, str]) -> Path | None:
    if values.get("ESPER_CACHE_DIR"):
        return Path(values["ESPER_CACHE_DIR"])
    if values.get("XDG_CACHE_HOME"):
        return Path(values["XDG_CACHE_HOME"]) / "esper"
    home = values.get("HOME")
    return Path(home) / ".cache" / "esper" if home else None


def _cache_bytes(values: Mapping[str, str]) -> int:
    found = values.get("ESPER_CACHE_BYTES", "") or str(DEFAULT_CACHE_BYTES)
    if re.fullmatch("[0-9]{1,18}", found) is None:
        msg = f"ESPER_CACHE_BYTES is a number of bytes, got {found!r}; 0 keeps nothing"
        raise EsperError(msg)
    return int(found)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _metrics_port(text: str) -> int | None:
    if not text:
        return None
    if re.fullmatch("[0-9]{1,5}", text) is None or not 1 <= int(text) <= _LAST_PORT:
        msg = f"ESPER_METRICS_PORT is a port from 1 to {_LAST_PORT}, got {text!r}"
        raise EsperError(msg)
    return int(text)


def _collector(values: Mapping[str, str]) -> Collector | None:
    """Return the collector that the standard's variables name; None where they name none."""

    def said(name: str) -> str:
        return values.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or values.get(
            f"OTEL_EXPORTER_OTLP_{name}", ""
        )

    endpoint = values.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "")
    if not endpoint and values.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        endpoint = values["OTEL_EXPORTER_OTLP_ENDPOINT"].rstrip("/") + "/v1/traces"
    is_off = values.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if not endpoint or is_off or values.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    if not endpoint.startswith(("http://", "https://")):
        kind = endpoint.partition(":")[0]
        msg = f"OTEL_EXPORTER_OTLP_ENDPOINT is http:// or https://, got {kind!r}"
        raise EsperError(msg)
    return Collector(
        endpoint=endpoint,
        headers=_headers(said("HEADERS")),
        timeout_s=_timeout_s(said("TIMEOUT")),
        certificate=said("CERTIFICATE") or None,
        compresses=said("COMPRESSION") == "gzip",
    )


def _headers(text: str) -> dict[str, str]:
    """Return headers as the standard writes them: ``name=value,name=value``, percent-encoded."""
    pairs = (part.partition("=") for part in text.split(",") if "=" in part)
    return {unquote(name).strip().lower(): unquote(value).strip() for name, _, value in pairs}


def _timeout_s(text: str) -> float:
    return float(text) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", text) and float(text) else 10.0


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


def environment_of_a_sandbox(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what Python and torch need of the environment, and nothing that may be a secret.

    Args:
        variables: By name; None reads the process's own.
    """
    values = os.environ if variables is None else variables
    return {name: values[name] for name in values if _OF_A_SANDBOX.fullmatch(name)}


def _is_hidden(name: str) -> bool:
    return _READ_BY_OTHERS.fullmatch(name) is not None


def _api_token(values: Mapping[str, str]) -> str | None:
    if values.get("URZA_API_TOKEN"):
        return values["URZA_API_TOKEN"]
    path = values.get("URZA_API_TOKEN_FILE")
    return token_in(path, "URZA_API_TOKEN_FILE") if path else None


def token_in(path: str | Path, said_by: str) -> str | None:
    """Return the first line of a file; None where it is empty.

    Args:
        path: The file.
        said_by: The variable or option that names it.

    Raises:
        EsperError: It cannot be read.
    """
    return _text_in(path, said_by).partition("\n")[0].strip() or None


def _trusted_keys(said: str) -> str | None:
    if not said:
        return None
    return said if said.startswith("ed25519:") else _text_in(said, "ESPER_TRUSTED_KEYS")


def _text_in(path: str | Path, said_by: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        msg = f"{said_by} names {path}, which cannot be read: {error}"
        raise EsperError(msg) from error
