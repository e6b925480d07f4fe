"""Keeping what was trained: as code and weights, else as weights, else in another place."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from esper.resilience.attempt import Failed, attempt
from esper.resilience.whole_file import named
from esper.wrapping.export import export

if TYPE_CHECKING:
    from torch import nn

    from esper.state.layer_call import LayerCall

STATE_FILE: Final = "state_dict.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Where a model is now.

    Attributes:
        folder: Where it was written; None where no place took it.
        problems: What went wrong on the way, each with what to do.
    """

    folder: Path | None
    problems: tuple[str, ...] = ()


def keep_model(model: nn.Module, folder: Path, *, example: LayerCall | None = None) -> Kept:
    """Write a trained model to a folder, and by no means lose it. The model is not changed.

    Where it cannot be written as code, its ``state_dict`` is written, which loads into a model
    after ``esper.wrap``. Where the folder takes nothing, a temporary folder is tried.

    Args:
        model: A wrapped model.
        folder: Where to write; made if it is not there.
        example: An input of the model, as :func:`esper.export` takes it.
    """
    problems: list[str] = []
    for place in (folder, None):
        target = place or Path(tempfile.mkdtemp(prefix="esper-model-"))
        for write in (partial(export, example=example), _write_state):
            outcome = attempt(partial(write, model, target))
            if not isinstance(outcome, Failed):
                return Kept(folder=target, problems=(*problems, *_found(model, target, problems)))
            problems.append(f"the model could not be exported to {target}: {outcome.error}")
            if isinstance(outcome.error, OSError):
                break
    return Kept(folder=None, problems=tuple(problems))


def _found(model: nn.Module, target: Path, problems: list[str]) -> list[str]:
    """Say how to read a model that is not where, or what, it should be."""
    if not problems:
        return []
    if (target / STATE_FILE).exists():
        how = f"{type(model).__name__}(...), esper.wrap, load_state_dict(torch.load(...))"
        return [f"its weights are in {target / STATE_FILE}; read them with {how}"]
    return [f"the model is in {target}"]


def _write_state(model: nn.Module, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STATE_FILE
    try:
        torch.save(model.state_dict(), path)
    except RuntimeError as error:  # torch's writer has no other word for a full disk
        raise named(OSError(0, str(error)), path) from error
    return folder
