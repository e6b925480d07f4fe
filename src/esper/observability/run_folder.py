"""The folder of a run: a run never writes into the folder of another."""

from __future__ import annotations

from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

EVENTS_FILE: Final = "events.jsonl"
OUTBOX_FOLDER: Final = "outbox"
"""Kernels and field reports that are on their way to a registry."""

_OF_A_RUN: Final = (
    "report.json",
    "report.html",
    "model/model.safetensors",
    "model/state_dict.pt",
)


def claim_run_folder(wanted: Path) -> Path:
    """Make and return a folder for one run: ``wanted``, or ``wanted-2``, ``wanted-3`` and so on.

    A folder that holds a file of a run is left alone. The one that is returned is claimed by its
    empty ``events.jsonl``, so that of two runs that begin together each gets its own.

    Raises:
        OSError: A folder cannot be made or written.
    """
    return next(folder for folder in _numbered(wanted) if _claim(folder))


def earlier_outboxes(wanted: Path) -> list[Path]:
    """Return what runs of a folder, and of those numbered after it, have left to be sent."""
    runs = takewhile(Path.is_dir, _numbered(wanted))
    return [box for run in runs if (box := run / OUTBOX_FOLDER).is_dir()]


def _numbered(wanted: Path) -> Iterator[Path]:
    yield wanted
    base = wanted if wanted.name not in ("", "..") else wanted / "run"
    for number in count(2):
        yield base.with_name(f"{base.name}-{number}")


def _claim(folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    if any((folder / name).is_file() for name in _OF_A_RUN):
        return False
    try:
        (folder / EVENTS_FILE).open("x").close()
    except FileExistsError:
        return False
    return True
