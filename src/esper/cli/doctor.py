"""``esper doctor``: what this environment is, and what is wrong with it."""

from __future__ import annotations

import platform
import socket
import sys
import tempfile
import threading
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Final

from esper.contracts.errors import EsperError
from esper.contracts.reference import without_password
from esper.resilience.attempt import Done, Failed, attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from esper.services.settings import Environment

DISTRIBUTION: Final = "esper-morph"
OLDEST_TORCH: Final = (2, 10)
PATIENCE_S: Final = 3.0
"""Seconds that an address has to answer in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        found: What was found.
        cure: What to do about it; empty where nothing is wrong.
    """

    name: str
    found: str
    cure: str = ""


EXTRAS: Final = (
    ("demo", "scikit-learn"),
    ("plot", "matplotlib"),
    ("hf", "transformers"),
    ("lightning", "pytorch-lightning"),
    ("server", "fastapi"),
    ("postgres", "psycopg"),
    ("s3", "obstore"),
    ("sign", "cryptography"),
    ("metrics", "prometheus-client"),
    ("otlp", "opentelemetry-sdk"),
    ("redis", "redis"),
)
"""Extra -> the distribution by which it is known."""


def examine(run_dir: Path, environment: Environment | None = None) -> list[Check]:
    """Look at the environment and return everything that was found.

    Args:
        run_dir: Folder under which runs are to be written; it is not made.
        environment: What the process was given; None leaves out what it names.
    """
    return [
        Check(name="python", found=f"{platform.python_version()} at {sys.executable}"),
        check_names(_providers()),
        check_torch(_version),
        *_torch_details(),
        *(_optional(name, extra) for extra, name in EXTRAS),
        check_run_dir(run_dir),
        check_sandbox(),
        *([] if environment is None else _addresses(environment)),
    ]


def _addresses(environment: Environment) -> list[Check]:
    """Ask every address that the environment names."""
    checks = (check_registry, check_bus, check_collector, check_metrics_port, check_trackers)
    return [check(environment) for check in checks]


def check_names(distributions: Iterable[str]) -> Check:
    """Tell whether another distribution claims the import name ``esper``.

    Args:
        distributions: Names of all that provide it, or that are called so.
    """
    others = sorted({name for name in distributions if name.lower() != DISTRIBUTION})
    found = f"{DISTRIBUTION} {_version(DISTRIBUTION) or '(not installed, run from its source)'}"
    if not others:
        return Check(name="esper", found=found)
    return Check(
        name="esper",
        found=f"{found}, beside {', '.join(others)}, with the same import name",
        cure=f"pip uninstall {' '.join(others)}, then pip install --force-reinstall {DISTRIBUTION}",
    )


def check_torch(version_of: Callable[[str], str | None]) -> Check:
    """Tell whether torch is there and recent enough.

    Args:
        version_of: From a distribution's name to its version; None where it is not installed.
    """
    version = version_of("torch")
    wanted = ".".join(str(part) for part in OLDEST_TORCH)
    cure = f"pip install 'torch>={wanted}'"
    if version is None:
        return Check(name="torch", found="not installed", cure=cure)
    major, minor = (int(part) for part in version.split(".")[:2])
    old = (major, minor) < OLDEST_TORCH
    return Check(name="torch", found=version, cure=cure if old else "")


def check_run_dir(run_dir: Path) -> Check:
    """Tell whether files can be written under ``run_dir``, without leaving any."""
    existing = run_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            return Check(name="run folder", found=f"{run_dir} can be written")
    except OSError as error:
        return Check(
            name="run folder",
            found=f"{run_dir} cannot be written: {error.strerror}",
            cure="set ESPER_RUN_DIR to a folder that can, or pass --run-dir",
        )


def check_sandbox() -> Check:
    """Tell whether what a compile worker runs can be kept from files and network."""
    from esper.services.sandbox import why_no_bubblewrap

    reason = why_no_bubblewrap()
    found = "bubblewrap works" if reason is None else f"{reason}; work is limited by a process"
    return Check(name="sandbox", found=found)


def check_registry(environment: Environment) -> Check:
    """Ask the registry that the environment names for a name, with its token."""
    from esper.services.registry_client import open_named

    if environment.api_url is None:
        return Check(name="registry", found="none named; URZA_API_URL would")

    def ask() -> None:
        with closing(open_named(None, environment)) as registry:
            registry.names(limit=1)

    cure = "see that it runs, and that URZA_API_URL and URZA_API_TOKEN are its own"
    return _asked("registry", environment.api_url, ask, cure)


def check_bus(environment: Environment) -> Check:
    """Ask the Redis or Valkey that events go to whether it is there."""
    if environment.bus_url is None:
        return Check(name="bus", found="in the process; ESPER_BUS_URL would name a Redis or Valkey")
    address = environment.bus_url

    def ask() -> None:
        try:
            import redis
        except ModuleNotFoundError as error:
            msg = f"the bus needs its extra: pip install '{DISTRIBUTION}[redis]'"
            raise EsperError(msg) from error
        url = address.replace("valkey", "redis", 1) if address.startswith("valkey") else address
        wait_s = PATIENCE_S / 2
        with closing(
            redis.Redis.from_url(url, socket_timeout=wait_s, socket_connect_timeout=wait_s)
        ) as client:
            client.ping()

    cure = "see that it runs, and that ESPER_BUS_URL has its address and its password"
    return _asked("bus", address, ask, cure)


def check_collector(environment: Environment) -> Check:
    """Send the collector of traces an empty request, as the standard lets anybody do."""
    collector = environment.collector
    if collector is None:
        return Check(
            name="traces", found="sent to none; OTEL_EXPORTER_OTLP_ENDPOINT would name one"
        )
    if _version("opentelemetry-exporter-otlp-proto-http") is None:
        cure = f"pip install '{DISTRIBUTION}[otlp]'"
        return Check(name="traces", found="the extra otlp is not installed", cure=cure)
    cure = "see that it runs, and takes OTLP over HTTP at OTEL_EXPORTER_OTLP_ENDPOINT"
    return _asked("traces", collector.endpoint, lambda: collector.send([]), cure)


def check_metrics_port(environment: Environment) -> Check:
    """Tell whether the port at which a run shows its metrics is free."""
    port = environment.metrics_port
    if port is None:
        return Check(name="metrics", found="not shown; ESPER_METRICS_PORT would")
    if _version("prometheus-client") is None:
        cure = f"pip install '{DISTRIBUTION}[metrics]'"
        return Check(name="metrics", found="the extra metrics is not installed", cure=cure)
    try:
        with socket.create_server(("", port)):
            return Check(name="metrics", found=f"port {port} is free for a run")
    except OSError as error:
        if _is_page_of_a_run(port):
            return Check(name="metrics", found=f"port {port} has the metrics of a run")
        cure = "choose another ESPER_METRICS_PORT: a run would go on without its metrics"
        return Check(name="metrics", found=f"port {port}: {error.strerror}", cure=cure)


def check_trackers(environment: Environment) -> Check:
    """Tell whether each tracker that the environment names is one, and is installed."""
    if not environment.report_to:
        return Check(name="trackers", found="none named; ESPER_REPORT_TO would")
    from esper.integrations.trackers import tracker_sinks  # torch comes with it

    try:
        tracker_sinks(environment.report_to)
    except EsperError as error:
        return Check(name="trackers", found=str(error), cure="install it, or mend ESPER_REPORT_TO")
    named = ", ".join(environment.report_to)
    return Check(name="trackers", found=f"{named}: installed; whether they answer, a run tells")


def _asked(name: str, address: str, ask: Callable[[], None], cure: str) -> Check:
    """Ask an address beside this thread, for a few seconds, and tell what came of it."""
    shown = without_password(address)
    answers: list[Done[None] | Failed] = []
    asking = threading.Thread(target=lambda: answers.append(attempt(ask)), daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    if not answers:
        found = f"{shown} does not answer within {PATIENCE_S:g} s"
        return Check(name=name, found=found, cure=cure)
    (answer,) = answers
    if isinstance(answer, Failed):
        told = str(answer.error).replace(address, shown) or type(answer.error).__name__
        found = told if shown in told else f"{shown}: {told}"
        return Check(name=name, found=found, cure=cure)
    return Check(name=name, found=f"{shown} answers")


def _is_page_of_a_run(port: int) -> bool:
    import httpx2

    address = f"http://127.0.0.1:{port}/metrics"
    page = attempt(lambda: httpx2.get(address, timeout=PATIENCE_S, trust_env=False).text)
    return isinstance(page, Done) and "esper_run_active" in page.value


def _providers() -> list[str]:
    """Return the distributions that provide a package ``esper`` or are called so."""
    providers = list(metadata.packages_distributions().get("esper", []))
    return [*providers, "esper"] if _version("esper") else providers


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _optional(distribution: str, extra: str) -> Check:
    version = _version(distribution)
    missing = f"not installed; pip install '{DISTRIBUTION}[{extra}]'"
    found = missing if version is None else f"{distribution} {version}"
    return Check(name=f"extra {extra}", found=found)


def _torch_details() -> list[Check]:
    """Return torch's build, threads and devices; none where it cannot be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        cure = "reinstall torch for this platform"
        return [Check(name="torch build", found=f"cannot be imported: {error}", cure=cure)]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    devices = "cpu" if accelerator is None else _devices(accelerator.type)
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    threads = f"{torch.get_num_threads()} within, {torch.get_num_interop_threads()} between"
    return [
        Check(name="torch build", found=build),
        Check(name="threads", found=f"{threads} operations"),
        Check(name="devices", found=devices),
    ]


def _devices(kind: str) -> str:
    import torch

    return f"cpu, {torch.accelerator.device_count()} x {kind}"
