"""``esper doctor``: what this environment is, and what is wrong with it."""

from __future__ import annotations

import platform
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Final

from esper.contracts.errors import EsperError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from esper.services.settings import Environment

DISTRIBUTION: Final = "esper-morph"
OLDEST_TORCH: Final = (2, 10)


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
        *([] if environment is None else [check_registry(environment)]),
    ]


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

    address = environment.api_url
    if address is None:
        return Check(name="registry", found="none named; URZA_API_URL would")
    try:
        with closing(open_named(None, environment)) as registry:
            registry.names(limit=1)
    except (EsperError, OSError, ValueError) as error:
        cure = "see that it runs, and that URZA_API_URL and URZA_API_TOKEN are its own"
        return Check(name="registry", found=f"{error}", cure=cure)
    return Check(name="registry", found=f"{address} answers")


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
