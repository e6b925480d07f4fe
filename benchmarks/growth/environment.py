"""On what a run was measured: versions and threads, no names of machines or paths."""

import platform
import subprocess
from pathlib import Path

import torch


def environment() -> dict[str, str | int]:
    """Return what figures and seconds depend on beside the code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def commit(folder: Path) -> str | None:
    """Return the short name of the commit that a folder is at; None where nobody can say."""
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - a fixed command
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
